"""How fast is the training step? Beside TRL's DPOTrainer and the authors' method, on equal work.

    python -m experiments.bench [--data pairs.jsonl] [--shape 6,6,384] [--only ours TRL]
    python -m experiments.bench --grow    how the cost grows with prompts, responses and batches

All have the same GPT-2-shaped weights and the same batches, AdamW at 1e-5, beta 0.1, gradients
clipped to 1, no dropout. Each contender is a process of its own, for its peak memory; only one
works at a time. Without --data the pairs are made up, as long as real ones: a prompt of 44 tokens
on average, responses of 16. Without trl and transformers (tests/peers/requirements.txt) TRL is
left out.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings

import torch

import data
import dpo
from experiments import lab, shared_row
from model import GPT, GPTConfig

try:
    import resource
except ImportError:  # Windows: the column of peak memory is left out
    resource = None

BETA, LR, BATCH, MICRO, VOCAB = 0.1, 1e-5, 8, 8, 50257  # MICRO: pairs at a time
GROWTH = [(16, 32, 8), (64, 32, 8), (256, 32, 8), (512, 32, 8),  # tokens of prompt, of responses,
          (64, 8, 8), (64, 128, 8), (64, 32, 2), (64, 32, 32)]  # pairs a batch  # fmt: skip
LOSS_STEPS, ROUNDS, TRL_STEPS = 10, 5, 60  # the first ten, whose losses are shown, warm up as well
FOUND = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICE = FOUND.type if FOUND else "cpu"


def made_up(n, prompt=None, response=None):
    """n pairs of random tokens. Lengths are given, or spread like those of instruction pairs."""
    random = torch.Generator().manual_seed(0)

    def part(mean, least, length):
        spread = torch.empty(1).exponential_(1 / (mean - least), generator=random).item()
        length = length or min(int(least + spread + 0.5), 3 * mean)
        return torch.randint(VOCAB - 1, (length,), generator=random).tolist()

    def row():
        both = [part(16, 4, response and response - 1) + [VOCAB - 1] for _ in range(2)]
        return data.TokenPair(part(44, 30, prompt), *both)

    return [row() for _ in range(n)]


# The contenders: each yields the mean loss of every optimiser step, as it was before the step


def batches(rows, batch):
    """The same for all contenders: pair ids (B,), without end."""
    return data.batches(rows, min(batch, len(rows)), torch.Generator().manual_seed(2))


def ours(rows, folder, batch, dtype="float32", compiled=False):
    """train.py's step: two plain rows a pair, the reference's log-probs computed once."""
    model = GPT.from_pretrained(folder).to(DEVICE)
    optimizer = lab.adamw(model, LR)
    ref = lab.all_logps(model, rows, MICRO, dtype)
    if compiled:
        model.compile(dynamic=True)
    settings = {"ref_logps": ref, "beta": BETA, "micro_batch_size": MICRO, "dtype": dtype}
    for ids in batches(rows, batch):
        losses, _ = lab.train_step(model, optimizer, rows, ids, **settings)
        yield losses.mean()


def shared(rows, folder, batch):
    """Ours, but both responses of a pair share one row and the tokens of its prompt."""
    model = GPT.from_pretrained(folder).to(DEVICE)
    optimizer = lab.adamw(model, LR)
    ref = lab.all_logps(model, rows, MICRO)
    for ids in batches(rows, batch):
        yield update(model, optimizer, (
            (*shared_row.response_logps(model, shared_row.collate(rows, part).to(DEVICE)),
             *ref[:, part]) for part in ids.split(MICRO)), len(ids))  # fmt: skip


def authors(rows, folder, batch):
    """The authors' method: a logit for every token, and the reference again in every step."""
    policy, reference = (GPT.from_pretrained(folder).to(DEVICE) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), LR, (0.9, 0.95), weight_decay=0.0)

    def logps(model, ids, mask):
        every = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return torch.where(mask[:, 1:], every, 0).sum(-1).chunk(2)  # chosen rows come first

    for pair_ids in batches(rows, batch):
        ids, mask = (tensor.to(DEVICE) for tensor in data.collate(rows, pair_ids.tolist()))

        def four(part):  # of a batch that is padded first, then cut
            both = torch.cat([part, part + len(pair_ids)])
            with torch.no_grad():
                ref = logps(reference, ids[both], mask[both])
            return *logps(policy, ids[both], mask[both]), *ref

        parts = torch.arange(len(pair_ids)).split(MICRO)
        yield update(policy, optimizer, map(four, parts), len(pair_ids))


def update(model, optimizer, parts, n):
    """parts: the four log-probs of some pairs, n in all, computed when they are asked for."""
    optimizer.zero_grad()
    total = 0.0
    for logps in parts:
        loss = dpo.dpo_loss(*logps, beta=BETA).losses.sum() / n
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def trl(rows, folder, batch, precompute=False):
    from experiments import bench_trl  # it wants trl and transformers

    order = batches(rows, batch)
    picked = [rows[i] for _ in range(TRL_STEPS) for i in next(order)]
    config = dict(
        beta=BETA, learning_rate=LR, adam_beta2=0.95, max_steps=TRL_STEPS, max_grad_norm=1.0,
        per_device_train_batch_size=min(batch, MICRO), precompute_ref_log_probs=precompute,
        gradient_accumulation_steps=max(1, batch // MICRO), use_cpu=DEVICE == "cpu",
    )  # fmt: skip
    return bench_trl.trl(picked, folder, VOCAB, config)


CONTENDERS = {
    "ours": ours,
    "ours, bfloat16": lambda *args: ours(*args, dtype="bfloat16"),
    "ours, compiled": lambda *args: ours(*args, compiled=True),
    "ours, bfloat16, compiled": lambda *args: ours(*args, dtype="bfloat16", compiled=True),
    "shared prompt": shared,
    "authors' method": authors,
    "TRL": trl,
    "TRL, reference precomputed": lambda *args: trl(*args, precompute=True),
}


# Taking turns


def serve(name, rows, folder, batch, pipe):
    """In a process of its own: for each n received, n steps -> (seconds, losses, peak bytes)."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # TRL talks
    warnings.simplefilter("ignore")
    as_train_sets_it()
    try:
        steps = CONTENDERS[name](rows, folder, batch)
        while n := pipe.recv():
            seconds, losses = [], []
            for _ in range(n):
                start = time.perf_counter()
                losses.append(next(steps).item())  # .item() waits for the device
                seconds.append(time.perf_counter() - start)
            pipe.send((seconds, losses, peak()))
    except Exception as error:  # no compiler, no memory: the others go on
        pipe.send(f"{type(error).__name__}: {error}"[:300])


def as_train_sets_it():
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32


def peak():
    """The most memory so far, in bytes: of the GPU's, else of this process. None if unknown."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    kilo = 1 if sys.platform == "darwin" else 1024
    return kilo * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def race(names, rows, folder, steps, batch=BATCH, first=LOSS_STEPS, rounds=ROUNDS):
    """A few steps of each, then in turn `steps` of each, `rounds` times, a large matrix product
    between -> {name: (seconds a step in each round, first losses, peak bytes)}, its flop/s."""
    context = multiprocessing.get_context("spawn")
    pipes, found, speeds = {}, {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        args = name, rows, folder, batch, theirs
        context.Process(target=serve, args=args, daemon=True).start()
        theirs.close()  # so that a contender that dies is an EOFError here, and no endless wait
        pipes[name].send(first)
        answer = pipes[name].recv()
        if isinstance(answer, str):
            print(f"{name} failed: {answer}")
            del pipes[name]
            continue
        _, losses, most = answer
        found[name] = [], losses, [most]
        print(f"{name}: first steps done", file=sys.stderr)
    for _ in range(rounds):
        speeds.append(matrix_speed())
        for name, pipe in pipes.items():
            pipe.send(steps)
            seconds, _, most = pipe.recv()
            found[name][0].append(statistics.mean(seconds))
            found[name][2].append(most)
    for pipe in pipes.values():
        pipe.send(0)
    return found, statistics.median(speeds)


def matrix_speed():
    """Flop/s of a large float32 (on CUDA: TF32) matrix product here and now."""
    as_train_sets_it()
    n = 8192 if DEVICE == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=DEVICE)
    (a @ b).sum().item()
    start = time.perf_counter()
    for _ in range(3):
        (a @ b).sum().item()
    return 3 * 2 * n**3 / (time.perf_counter() - start)


def useful_flops(rows, config, batch=BATCH):
    """Of a step on average: each token of prompt and responses once, the head where it is scored,
    times 3 for forward and backward. No padding, no prompt twice, no reference."""
    C, total = config.n_embd, 0
    for row in rows:
        x, w, l = len(row.prompt), len(row.chosen), len(row.rejected)
        tokens, scored = x + w + l - 2, w + l
        seen = x * (x + 1) / 2 + sum(x * (y - 1) + y * (y - 1) / 2 for y in (w, l))
        total += config.n_layer * (24 * tokens * C**2 + 4 * seen * C) + 2 * scored * C * VOCAB
    return 3 * batch * total / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="pairs as train.py reads them, with GPT-2's tokens")
    parser.add_argument("--shape", default="6,6,384", help="layers, heads, width")
    most = range(1, 1 + (TRL_STEPS - LOSS_STEPS) // ROUNDS)  # TRL is told beforehand when to end
    parser.add_argument("--steps", type=int, default=5, choices=most, help="steps of a turn")
    parser.add_argument("--only", default=list(CONTENDERS), nargs="+", choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=BATCH, help="pairs a step, 8 at a time")
    parser.add_argument("--grow", action="store_true", help="the table of growth instead")
    args = parser.parse_args()
    n_layer, n_head, n_embd = map(int, args.shape.split(","))
    config = GPTConfig(VOCAB, 1024, n_embd, n_layer, n_head)
    rows = made_up(8 * 125)
    if args.data:
        rows = data.encode_pairs(data.load_pairs(args.data), data.get_tokenizer("gpt2"), 1024)
    names = [name for name in args.only if importlib.util.find_spec("trl") or "TRL" not in name]
    if len(names) < len(args.only):
        print("TRL is not installed: pip install -r tests/peers/requirements.txt")
    where = f"{torch.get_num_threads()} threads, {DEVICE}, torch {torch.__version__}"
    print(f"layers, heads, width {args.shape}; {where}")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT(config).save_pretrained(folder)
        if args.grow:
            return grow(folder)
        found, speed = race(names, rows, folder, args.steps, args.batch)
    show(found, speed, useful_flops(rows, config, args.batch), args.batch)


def grow(folder):
    print("\n| prompt | responses | pairs | ours, seconds | authors' method | faster by |")
    print("|---" * 6 + "|")
    for prompt, response, batch in GROWTH:
        rows = made_up(4 * batch, prompt, response)
        found, _ = race(["ours", "authors' method"], rows, folder, 1, batch, 1, 3)
        ours, theirs = (statistics.median(seconds) for seconds, _, _ in found.values())
        numbers = f"{ours:.2f} | {theirs:.2f} | {theirs / ours:.1f}"
        print(f"| {prompt} | {response} | {batch} | {numbers} |")


def show(found, speed, flops, batch=BATCH):
    print(f"batches of {batch}; useful: of a large float32 product's {speed / 1e9:.0f} Gflop/s\n")
    heads = ["contender", "seconds a step (range)", "pairs/s", "ours is faster by", "useful"]
    if peak() is not None:
        heads.append("peak GB")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    base = found.get("ours", [[float("nan")]])[0]
    for name, (seconds, _, peaks) in found.items():
        middle = statistics.median(seconds)
        ratios = [their / our for their, our in zip(seconds, base)]
        cells = [f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})"]
        cells += [f"{batch / middle:.2f}"]
        cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        cells += [f"{flops / middle / speed:.0%}"]
        if peaks[-1] is not None:
            cells += [f"{peaks[-1] / 1e9:.2f}"]
        print(f"| {name} |", " | ".join(cells), "|")
    print("\nloss of the first steps")
    for name, (_, losses, _) in found.items():
        print(f"{name:27}", " ".join(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
