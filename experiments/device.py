"""Does everything work, and how fast, on the device that is here: CUDA, MPS, else the CPU?

    python -m experiments.device
    python -m experiments.device --scale    what fits on a laptop's GPU, by formula

In some minutes: log-probs and gradients beside a float64 oracle on the CPU; masks that stay
on the CPU; logits near -100 in bfloat16; the toy run, a resumed run, its files read on the CPU,
samples; then the speed of a GPT-2-shaped model, and what a training step waits for. Exit status 1
if a number is out of bounds.
"""

import argparse
import copy
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import profile

import data
import dpo
import train
from experiments import bench, lab, rlhf
from experiments.lab import WORLD
from model import GPT, PUBLISHED, GPTConfig

SHAPES = {  # layers, heads, width of the model whose speed is measured
    "cuda": (12, 12, 768),
    "mps": (6, 6, 384),
    "cpu": (2, 2, 128),
}
PRECISIONS = [  # name, float32 products, at most: nats, the gradient's relative error
    ("float32", "highest", 1e-3, 1e-4),
    ("TF32", "high", 1e-2, 1e-2),  # on CUDA; elsewhere it is float32
    ("bfloat16", "highest", 0.1, 0.05),
]
SAMPLES = 20_000
BATCH = 8  # pairs a step, where speed is measured
RACING = ["ours", "ours, compiled", "shared prompt", "authors' method"]
WATCHED = ["scaled_dot_product", "flash", "fmha", "efficient_attention", "Synchronize"]
failed = []


def within(name, value, limit):
    """Print a number that should be at most `limit`."""
    result = "ok"
    if not value <= limit:  # so that a NaN fails
        result = "FAILED"
        failed.append(name)
    print(f"{result:7} {name}: {value:.2g} (at most {limit:g})")


def apart(got, wanted):
    """The largest difference of two tensors, wherever they are."""
    return (got.cpu() - wanted.cpu()).abs().max().item()


def check():
    device = bench.DEVICE
    name = device
    if device == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}\n")
    exact(device)
    masks(device)
    deep_logits(device)
    with tempfile.TemporaryDirectory() as folder:
        toy_run(device, Path(folder))
        resumed_run(device, Path(folder))
        speed(device, folder)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
        return 1
    print("\nall checks passed")
    return 0


def small_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(bench.VOCAB, n_positions=256, n_embd=96, n_layer=3, n_head=3))


def exact(device):
    """log pi(y|x) and the gradient of Eq. 7 in every weight, in float32, TF32 (on CUDA) and
    bfloat16, against float64 on the CPU: three layers, 32 pairs of some 76 tokens."""
    oracle = small_gpt().double()
    ids, mask = data.collate(bench.made_up(32), range(32))
    right_logps = dpo.response_logps(oracle, ids, mask)
    a_bit_off = torch.linspace(-1, 1, len(right_logps), dtype=torch.float64)
    ref = right_logps.detach() + a_bit_off
    right_grad = gradient(oracle, right_logps, ref)
    ref = ref.float().to(device)
    for name, precision, nats, relative in PRECISIONS:
        torch.set_float32_matmul_precision(precision)
        model = copy.deepcopy(oracle).float().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            logps = dpo.response_logps(model, ids.to(device), mask)
        grad = gradient(model, logps, ref)
        within(f"log-probs, {name}, nats", apart(logps, right_logps), nats)
        error = (grad - right_grad).norm() / right_grad.norm()
        within(f"gradient, {name}, relative", error.item(), relative)
    torch.set_float32_matmul_precision("highest")


def gradient(model, logps, ref_logps):
    """Of the mean of Eq. 7 in all weights: one vector in float64, on the CPU."""
    loss = dpo.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=1.0).losses.mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    flat = torch.cat([grad.flatten() for grad in grads])
    return flat.cpu().double()


@torch.no_grad()
def masks(device):
    """The mask stays on the CPU while the tokens and the model are on the device (as train.py has
    it: a mask there would make the GPU wait). On the device it must do the same."""
    model = small_gpt()
    ids, mask = data.collate(bench.made_up(8), range(8))
    wanted = dpo.response_logps(model, ids, mask)
    model.to(device)
    for where in ("cpu", device):
        logps = dpo.response_logps(model, ids.to(device), mask.to(where))
        within(f"log-probs, mask on {where}, nats", apart(logps, wanted), 1e-3)


def deep_logits(device):
    """Logits near -100, as GPT-2's are, where bfloat16 has steps of 0.5: the head must compute in
    float32, outside autocast. Softmax does not feel the shift."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(bench.VOCAB, n_positions=256, n_embd=320, n_layer=2, n_head=4))
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(320), dim=0)
        along = model.wte.weight @ direction  # (V,)
        model.wte.weight += (1 - along)[:, None] * direction  # now 1 for every token
        model.ln_f.bias -= 100 * direction
    rows = bench.made_up(8, response=50)
    wanted = lab.all_logps(model, rows)  # in float32, on the CPU
    model.to(device)
    bench.as_train_sets_it()
    together = lab.all_logps(model, rows, dtype="bfloat16")
    what = "logits near -100, bfloat16"
    within(f"{what}, log-probs, nats", apart(together, wanted), 0.1)
    alone = lab.all_logps(model, rows, micro_batch_size=1, dtype="bfloat16")
    within(f"{what}, pair alone or in a batch, nats", apart(together, alone), 0.05)
    optimizer = lab.adamw(model, lr=1e-4)
    settings = {"ref_logps": alone, "beta": 0.1, "dtype": "bfloat16"}
    losses, _ = lab.train_step(model, optimizer, rows, torch.arange(8), **settings)
    off = abs(losses.mean().item() - math.log(2))
    within(f"{what}, first loss minus 0.6931", off, 5e-4)
    torch.set_float32_matmul_precision("highest")


def toy_run(device, folder):
    """The default run of train.py, its files read on the CPU, and samples."""
    out = folder / "toy"
    summary = train.main(["--out", str(out), "--device", device])
    within("toy run, gap left", 1 - summary["gap_closed"], 0.05)
    torch.set_float32_matmul_precision("highest")
    policy = GPT.from_pretrained(out / "policy")  # written there, read on the CPU
    listed = WORLD.logps(policy)
    policy.to(device)
    within("files, log-probs there and here", apart(WORLD.logps(policy), listed), 1e-3)
    ids = WORLD.prompt_ids[:1].expand(SAMPLES, -1).to(device)
    ids = policy.generate(ids, WORLD.K, stop_token=WORLD.W)
    drawn = ids[:, rlhf.START :].cpu()
    likeliest = listed[0].argmax()
    found = (drawn == rlhf.RESPONSES[likeliest]).all(1).double().mean().item()
    p = listed[0, likeliest].exp().item()
    standard_error = math.sqrt(p * (1 - p) / SAMPLES)
    within("samples, standard errors", abs(found - p) / standard_error, 4)


def resumed_run(device, folder):
    """A short run, whose last steps are run again by --resume."""
    out = folder / "short"
    flags = ["--device", device, "--out", str(out)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings = "--pairs 4096 --sft-epochs 0.5 --save-every 30".split()
    train.main(flags + settings)
    whole = WORLD.logps(GPT.from_pretrained(out / "policy"))
    train.main(flags + ["--resume"])  # from step 30 of 48
    resumed = WORLD.logps(GPT.from_pretrained(out / "policy"))
    torch.use_deterministic_algorithms(False)
    relative = (whole - resumed).expm1().abs().max().item()
    within("resumed run, relative change of a probability", relative, 0.01)


def speed(device, folder):
    """Pairs a second, peak memory, the share of the card's matrix speed; what a step waits for."""
    torch.manual_seed(0)
    n_layer, n_head, n_embd = SHAPES.get(device, SHAPES["cpu"])
    config = GPTConfig(bench.VOCAB, n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    GPT(config).save_pretrained(folder)
    rows = bench.made_up(500)
    print(f"\n{config}")
    flops = bench.useful_flops(rows, config)
    for dtype in ("float32", "bfloat16"):
        found, fastest = bench.race(RACING, rows, folder, BATCH, dtype, steps=2, rounds=3)
        failed.extend(f"{name}, {dtype}" for name in RACING if name not in found)
        bench.show(found, fastest, flops, BATCH, dtype)
    for dtype in ("float32", "bfloat16"):
        steps = bench.ours(rows, folder, BATCH, dtype)
        for _ in range(3):
            next(steps)
        with profile() as trace:
            next(steps).item()
        print(f"\n{dtype}: attention, and waits for the device, the profiler's own among them")
        for event in trace.key_averages():
            if any(word in event.key for word in WATCHED):
                print(f"  {event.key[:70]} ({event.count})")


# On paper: what fits


def parameters(n_embd, n_layer):
    """Weights of a GPT-2 with a tied head: 12 C^2 + 13 C a layer, embeddings, the last norm."""
    layer = 12 * n_embd**2 + 13 * n_embd
    embeddings = (bench.VOCAB + 1024) * n_embd
    return n_layer * layer + embeddings + 2 * n_embd


def step_bytes(n_embd, n_layer, tokens, scored, dtype):
    """Memory of a training step -> (what stays, what one micro-batch adds), in bytes.

    Stays: weights, gradients, AdamW's two moments, in float32 whatever the dtype; in bfloat16 also
    a copy of the weights. A token keeps 16 C numbers a layer until backward (in bfloat16 36 C
    bytes); a scored one three rows of V.
    """
    a_weight = 16
    a_channel = 64
    if dtype == "bfloat16":
        a_weight = 18
        a_channel = 36
    stays = a_weight * parameters(n_embd, n_layer)
    hidden = a_channel * n_embd * n_layer * tokens
    logits = 12 * bench.VOCAB * scored
    return stays, hidden + logits


def scale():
    """What fits on a GPU of 8 GB, 7.5 of them free, with pairs of 2 rows of 256 tokens, 128 scored
    in each."""
    print("| model | weights | dtype | GB that stay | GB a pair | pairs in 8 GB |")
    print("|---" * 6 + "|")
    too_large = []
    for name, (n_embd, n_layer, _) in PUBLISHED.items():
        millions = parameters(n_embd, n_layer) / 1e6
        stays, a_pair = step_bytes(n_embd, n_layer, 512, 256, "float32")
        if stays + a_pair > 7.5e9:
            too_large.append(name)
            continue
        for dtype in ("float32", "bfloat16"):
            stays, a_pair = step_bytes(n_embd, n_layer, 512, 256, dtype)
            fits = int((7.5e9 - stays) / a_pair)
            cells = [name, f"{millions:.0f}M", dtype, f"{stays / 1e9:.1f}", f"{a_pair / 1e9:.2f}"]
            bench.print_row([*cells, str(fits)])
    print(f"\nNot a single pair of {', '.join(too_large)} fits.")
    stays, a_pair = step_bytes(768, 12, 512, 256, "float32")
    by_formula = (stays + 4 * a_pair) / 1e9
    measured = "not measured"
    if bench.peak() is not None:
        row = data.TokenPair([0] * 128, [0] * 128, [0] * 128)
        gigabytes = peak_bytes([row] * 4) / 1e9
        measured = f"measured {gigabytes:.2f}"
    print(f"\ngpt2, float32, 4 pairs: {by_formula:.2f} GB, {measured} on {bench.DEVICE}")


def peak_bytes(rows):
    """Measured in a step of GPT-2's shape on these rows; on a CPU without what was there before."""
    before = 0
    if bench.DEVICE == "cpu":
        before = bench.peak()
    model = GPT(GPTConfig()).to(bench.DEVICE)
    optimizer = lab.adamw(model, lr=1e-6)
    ref = torch.zeros(2, len(rows), device=bench.DEVICE)
    for _ in range(2):
        lab.train_step(model, optimizer, rows, torch.arange(len(rows)), ref_logps=ref)
    return bench.peak() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", action="store_true", help="the table of what fits instead")
    if parser.parse_args().scale:
        scale()
    else:
        sys.exit(check())
