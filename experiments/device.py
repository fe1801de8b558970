"""Does everything work, and how fast, on the device that is here: CUDA, MPS, else the CPU?

    python -m experiments.device
    python -m experiments.device --scale    what fits on a laptop's GPU, by formula

In at most five minutes: log-probs and gradients beside a float64 oracle on the CPU; masks that stay
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
from torch.profiler import ProfilerActivity, profile

import data
import dpo
import train
from experiments import bench, lab
from model import GPT, PUBLISHED, GPTConfig

SHAPES = {"cuda": (12, 12, 768), "mps": (6, 6, 384), "cpu": (2, 2, 128)}  # layers, heads, width
failed = []


def within(name, value, limit):
    """Print a number that should be at most `limit`."""
    print(f"{'ok' if value <= limit else 'FAILED':7} {name}: {value:.2g} (at most {limit:g})")
    if not value <= limit:
        failed.append(name)


def check():
    device = bench.DEVICE
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{where}, torch {torch.__version__}\n")
    exact(device)
    masks(device)
    deep_logits(device)
    with tempfile.TemporaryDirectory() as folder:
        runs(device, Path(folder))
        speed(device, folder)
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'all checks passed'}")
    return bool(failed)


def exact(device):
    """log pi(y|x) and the gradient of Eq. 7 in every weight, in float32, TF32 (on CUDA) and
    bfloat16, against float64 on the CPU: three layers, 32 pairs of some 76 tokens."""
    torch.manual_seed(0)
    oracle = GPT(GPTConfig(bench.VOCAB, 256, 96, 3, 3)).double()
    rows = bench.made_up(32)
    ids, mask = data.collate(rows, range(32))
    _, _, ref = wanted = answers(oracle, ids, mask)
    for name, precision, most, most_of_grad in (
        ("float32", "highest", 1e-3, 1e-4),
        ("TF32", "high", 1e-2, 1e-2),
        ("bfloat16", "highest", 0.1, 0.05),
    ):
        torch.set_float32_matmul_precision(precision)
        model = copy.deepcopy(oracle).float().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            logps, grad, _ = answers(model, ids.to(device), mask, ref.float().to(device))
        within(f"log-probs, {name}, nats", (logps - wanted[0]).abs().max().item(), most)
        apart = (grad - wanted[1]).norm() / wanted[1].norm()
        within(f"gradient, {name}, relative", apart.item(), most_of_grad)
    torch.set_float32_matmul_precision("highest")


def answers(model, ids, mask, ref=None):
    """Log-probs (2B,) and the flat gradient on the CPU in float64; the reference, a bit off."""
    logps = dpo.response_logps(model, ids, mask)
    if ref is None:
        ref = logps.detach() + torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    dpo.dpo_loss(*logps.chunk(2), *ref.chunk(2), beta=1.0).losses.mean().backward()
    grads = [parameter.grad.flatten().cpu().double() for parameter in model.parameters()]
    return logps.detach().cpu().double(), torch.cat(grads), ref


@torch.no_grad()
def masks(device):
    """The mask stays on the CPU while the tokens and the model are on the device (as train.py has
    it: a mask there would make the GPU wait). On the device it must do the same."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(bench.VOCAB, 256, 96, 3, 3))
    ids, mask = data.collate(bench.made_up(8), range(8))
    wanted = dpo.response_logps(model, ids, mask)
    model.to(device)
    for where in ("cpu", device):
        logps = dpo.response_logps(model, ids.to(device), mask.to(where)).cpu()
        within(f"log-probs, mask on {where}, nats", (logps - wanted).abs().max().item(), 1e-3)


def deep_logits(device):
    """Logits near -100, as GPT-2's are, where bfloat16 has steps of 0.5: the head must compute in
    float32, outside autocast. Softmax does not feel the shift."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(bench.VOCAB, 256, 320, 2, 4))
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(320), dim=0)
        along = model.wte.weight @ direction  # (V,)
        model.wte.weight += (1 - along)[:, None] * direction  # now 1 for every token
        model.ln_f.bias -= 100 * direction
    rows = bench.made_up(8, response=50)
    wanted = lab.all_logps(model, rows)  # in float32, on the CPU
    model.to(device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as train.py sets it
    together = lab.all_logps(model, rows, dtype="bfloat16")
    apart = (together.cpu() - wanted).abs().max().item()
    within("logits near -100, bfloat16, log-probs, nats", apart, 0.1)
    alone = lab.all_logps(model, rows, micro_batch_size=1, dtype="bfloat16")
    apart = (together - alone).abs().max().item()
    within("logits near -100, bfloat16, pair alone or in a batch, nats", apart, 0.05)
    optimizer = lab.adamw(model, lr=1e-4)
    settings = {"ref_logps": alone, "beta": 0.1, "dtype": "bfloat16"}
    losses, _ = lab.train_step(model, optimizer, rows, torch.arange(8), **settings)
    apart = abs(losses.mean().item() - math.log(2))
    within("logits near -100, bfloat16, first loss minus 0.6931", apart, 5e-4)
    torch.set_float32_matmul_precision("highest")


def runs(device, folder):
    """The default run of train.py; another, whose last steps are run again by --resume; files and
    samples."""
    summary = train.main(["--out", str(folder / "toy"), "--device", device])
    within("toy run, gap left", 1 - summary["gap_closed"], 0.05)
    world, out = data.ToyWorld(), str(folder / "short")
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags = "--pairs 4096 --sft-epochs 0.5 --save-every 30".split()
    train.main([*flags, "--device", device, "--out", out])
    whole = world.logps(GPT.from_pretrained(folder / "short" / "policy"))
    train.main(["--resume", "--device", device, "--out", out])  # from step 30 of 48
    resumed = world.logps(GPT.from_pretrained(folder / "short" / "policy"))
    torch.use_deterministic_algorithms(False)
    apart = (whole - resumed).exp().sub(1).abs().max().item()
    within("resumed run, relative change of a probability", apart, 0.01)

    torch.set_float32_matmul_precision("highest")
    policy = GPT.from_pretrained(folder / "toy" / "policy")  # written there, read on the CPU
    there = copy.deepcopy(policy).to(device)
    listed = world.logps(policy)
    apart = (world.logps(there) - listed).abs().max().item()
    within("files, log-probs there and here", apart, 1e-3)
    ids = world.prompt_ids[:1].expand(20_000, -1).to(device)
    drawn = there.generate(ids, world.K, stop_token=world.W)[:, world.prompt_ids.shape[1] :].cpu()
    y = listed[0].argmax()
    tokens = torch.tensor((world.response_ids[y] + [world.W] * world.K)[: world.K])
    p, found = listed[0, y].exp().item(), (drawn == tokens).all(1).double().mean().item()
    within("samples, standard errors", abs(found - p) / (p * (1 - p) / 20_000) ** 0.5, 4)


def speed(device, folder):
    """Pairs a second, peak memory, the share of the card's matrix speed; what a step waits for."""
    torch.manual_seed(0)
    n_layer, n_head, n_embd = SHAPES.get(device, SHAPES["cpu"])
    GPT(GPTConfig(bench.VOCAB, 1024, n_embd, n_layer, n_head)).save_pretrained(folder)
    batch = 32 if device == "cuda" else bench.BATCH
    rows = bench.made_up(batch * 60)
    names = [name for name in bench.CONTENDERS if "TRL" not in name and name != "ours, compiled"]
    print(f"\nlayers, heads, width {n_layer},{n_head},{n_embd}; {batch} pairs a step")
    found, fastest = bench.race(names, rows, folder, 5, batch, rounds=3)
    failed.extend(name for name in names if name not in found)
    config = GPTConfig(n_embd=n_embd, n_layer=n_layer)
    bench.show(found, fastest, bench.useful_flops(rows, config, batch), batch)
    for dtype in ("float32", "bfloat16"):
        steps = bench.ours(rows, folder, batch, dtype)
        for _ in range(3):
            next(steps)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=kinds) as trace:
            next(steps).item()
        events = trace.key_averages()
        shown = "scaled_dot_product", "flash", "fmha", "efficient_attention", "Synchronize"
        print(f"\n{dtype}: attention, and waits for the device, the profiler's own among them")
        for event in events:
            if any(word in event.key for word in shown) and "backward" not in event.key.lower():
                print(f"  {event.key[:70]} ({event.count})")
        if device == "cuda":
            print(events.table(sort_by="self_device_time_total", row_limit=12))


# On paper: what fits


def parameters(n_embd, n_layer, vocab=bench.VOCAB, positions=1024):
    """Weights of a GPT-2 with a tied head: 12 C^2 + 13 C a layer, embeddings, the last norm."""
    layer = 12 * n_embd**2 + 13 * n_embd
    return n_layer * layer + (vocab + positions) * n_embd + 2 * n_embd


def step_bytes(n_embd, n_layer, tokens, scored, dtype):
    """Memory of a training step -> (what stays, what one micro-batch adds), in bytes.

    Stays: weights, gradients, AdamW's two moments, in float32 whatever the dtype; in bfloat16 also
    a copy of the weights. A token keeps 16 C numbers a layer until backward (in bfloat16 36 C
    bytes); a scored one three rows of V.
    """
    n, bf16 = parameters(n_embd, n_layer), dtype == "bfloat16"
    kept = (36 if bf16 else 64) * n_embd * n_layer * tokens
    return n * (18 if bf16 else 16), kept + 12 * bench.VOCAB * scored


def scale():
    """What fits on a GPU of 8 GB, 7.5 of them free, with pairs of 2 rows of 256 tokens, 128 scored
    in each; and what a step needs in arithmetic."""
    print("| model | weights | dtype | GB that stay | GB a pair | pairs in 8 GB | Tflop a pair |")
    print("|---" * 7 + "|")
    for name, (n_embd, n_layer, _) in PUBLISHED.items():
        row = data.TokenPair([0] * 128, [0] * 128, [0] * 128)
        flops = bench.useful_flops([row], GPTConfig(n_embd=n_embd, n_layer=n_layer), 1)
        for dtype in ("float32", "bfloat16"):
            stays, a_pair = step_bytes(n_embd, n_layer, 512, 256, dtype)
            fits = max(0, int((7.5e9 - stays) / a_pair))
            numbers = f"{stays / 1e9:.1f} | {a_pair / 1e9:.2f} | {fits} | {flops / 1e12:.2f}"
            print(f"| {name} | {parameters(n_embd, n_layer) / 1e6:.0f}M | {dtype} | {numbers} |")
    stays, a_pair = step_bytes(768, 12, 512, 256, "float32")
    by_formula = (stays + 4 * a_pair) / 1e9
    measured = "not measured"
    if bench.peak() is not None:
        measured = f"measured {peak_bytes(4) / 1e9:.2f}"
    print(f"\ngpt2, float32, 4 pairs: {by_formula:.2f} GB, {measured} on {bench.DEVICE}")


def peak_bytes(pairs):
    """Measured in a step of GPT-2's shape on these rows; on a CPU without what was there before."""
    before = bench.peak() if bench.DEVICE == "cpu" else 0
    model = GPT(GPTConfig()).to(bench.DEVICE)
    rows = [data.TokenPair([0] * 128, [0] * 128, [0] * 128)] * pairs
    optimizer = lab.adamw(model, lr=1e-6)
    ref = torch.zeros(2, pairs, device=bench.DEVICE)
    for _ in range(2):
        lab.train_step(model, optimizer, rows, torch.arange(pairs), ref_logps=ref)
    return bench.peak() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", action="store_true", help="the table of what fits instead")
    sys.exit(scale() if parser.parse_args().scale else check())
