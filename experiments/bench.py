"""How fast is the training step? Beside TRL's DPOTrainer and the authors' method, on equal work.

    python -m experiments.bench [--data pairs.jsonl] [--only ours TRL] [--steps 1]

All have the same GPT-2-shaped weights and the same batches, 8 pairs of a batch at a time, AdamW at
1e-5, beta 0.1, gradients clipped to 1, no dropout. Each contender is a process of its own, for its
peak memory; only one works at a time. Without --data the pairs are made up, as long as real ones: a
prompt of 44 tokens on average, responses of 16. Without trl and transformers
(tests/peers/requirements.txt) TRL is left out.
"""

import argparse
import functools
import importlib.util
import itertools
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

BETA = 0.1
LR = 1e-5
BATCH = 32  # pairs a step, as in train.py
MICRO_BATCH = 8  # pairs at a time
VOCAB = 50257
FIRST_STEPS = 10  # whose losses are shown; they warm up as well
ROUNDS = 5  # of alternating turns
MOST_STEPS = 3  # in a turn
TRL_STEPS = FIRST_STEPS + ROUNDS * MOST_STEPS  # TRL is told beforehand when to end
DEVICE = "cpu"
if torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator().type


def made_up(n, response=16):
    """n pairs of random tokens. Lengths are spread like those of instruction pairs, with responses
    of `response` tokens on average and an end token."""
    random = torch.Generator().manual_seed(0)

    def tokens(least, mean):
        beyond = torch.empty(1).exponential_(1 / (mean - least), generator=random).item()
        length = min(int(least + beyond + 0.5), 3 * mean)
        return torch.randint(VOCAB - 1, (length,), generator=random).tolist()

    rows = []
    for _ in range(n):
        chosen = tokens(4, response) + [VOCAB - 1]
        rejected = tokens(4, response) + [VOCAB - 1]
        rows.append(data.TokenPair(tokens(30, 44), chosen, rejected))
    return rows


# The contenders: each yields the mean loss of every optimiser step, as it was before the step


def batches(rows, batch_size):
    """The same for all contenders: pair ids (B,), without end."""
    return data.batches(rows, batch_size, torch.Generator().manual_seed(2))


def ours(rows, folder, batch_size, dtype, compiled=False):
    """train.py's step: two plain rows a pair, the reference's log-probs computed once."""
    model = GPT.from_pretrained(folder).to(DEVICE)
    optimizer = lab.adamw(model, LR)
    ref = lab.all_logps(model, rows, MICRO_BATCH, dtype)
    if compiled:
        model.compile(dynamic=True)
    settings = {"ref_logps": ref, "beta": BETA, "dtype": dtype, "micro_batch_size": MICRO_BATCH}
    for ids in batches(rows, batch_size):
        losses, _ = lab.train_step(model, optimizer, rows, ids, **settings)
        yield losses.mean()


def shared(rows, folder, batch_size, dtype):
    """Ours, but both responses of a pair share one row and the tokens of its prompt."""
    model = GPT.from_pretrained(folder).to(DEVICE)
    optimizer = lab.adamw(model, LR)
    ref = lab.all_logps(model, rows, MICRO_BATCH, dtype)

    def logps_of(part):
        batch = shared_row.collate(rows, part).to(DEVICE)
        with autocast(dtype):
            policy_logps = shared_row.response_logps(model, batch)
        return policy_logps, ref[:, part]

    for ids in batches(rows, batch_size):
        yield update(model, optimizer, logps_of, ids)


def authors(rows, folder, batch_size, dtype):
    """The authors' method: a logit for every token, the reference again in every step, and a batch
    padded as a whole before it is cut."""
    policy = GPT.from_pretrained(folder).to(DEVICE)
    reference = GPT.from_pretrained(folder).to(DEVICE)
    optimizer = torch.optim.AdamW(policy.parameters(), LR, (0.9, 0.95), weight_decay=0.0)

    def response_logps(model, ids, mask):
        logps = model(ids)[:, :-1].log_softmax(-1)
        logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return torch.where(mask[:, 1:], logps, 0).sum(-1)

    for pair_ids in batches(rows, batch_size):
        ids, mask = data.collate(rows, pair_ids.tolist())
        ids = ids.to(DEVICE).unflatten(0, (2, -1))  # (2, B, T): chosen, rejected
        mask = mask.to(DEVICE).unflatten(0, (2, -1))

        def logps_of(part):  # of places in the batch
            part_ids = ids[:, part].flatten(0, 1)
            part_mask = mask[:, part].flatten(0, 1)
            with autocast(dtype):
                with torch.no_grad():
                    ref_logps = response_logps(reference, part_ids, part_mask)
                policy_logps = response_logps(policy, part_ids, part_mask)
            return policy_logps.view(2, -1), ref_logps.view(2, -1)

        yield update(policy, optimizer, logps_of, torch.arange(batch_size))


def autocast(dtype):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")


def update(model, optimizer, logps_of, ids):
    """One step on the pairs `ids` (B,), a few at a time. Returns its loss.

    logps_of: ids of a part (b,) -> log-probs of policy and reference, (2, b) each, chosen first.
    """
    optimizer.zero_grad()
    total = 0
    for part in ids.split(MICRO_BATCH):
        policy_logps, ref_logps = logps_of(part)
        losses = dpo.dpo_loss(*policy_logps, *ref_logps, beta=BETA).losses
        loss = losses.sum() / len(ids)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def trl(rows, folder, batch_size, dtype, precompute=False):
    from experiments import bench_trl  # it wants trl and transformers

    in_order = []
    for ids in itertools.islice(batches(rows, batch_size), TRL_STEPS):
        in_order += [rows[i] for i in ids]
    config = dict(
        beta=BETA,
        learning_rate=LR,
        adam_beta2=0.95,
        max_steps=TRL_STEPS,
        max_grad_norm=1.0,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=batch_size // MICRO_BATCH,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,  # TRL's default saves memory and costs a forward pass
        precompute_ref_log_probs=precompute,
        use_cpu=DEVICE == "cpu",
    )
    return bench_trl.trl(in_order, folder, VOCAB, config)


CONTENDERS = {
    "ours": ours,
    "ours, compiled": functools.partial(ours, compiled=True),
    "shared prompt": shared,
    "authors' method": authors,
    "TRL": trl,
    "TRL, reference precomputed": functools.partial(trl, precompute=True),
}


# Taking turns


def serve(name, rows, folder, batch_size, dtype, pipe):
    """In a process of its own: for each n received, n steps -> (seconds, losses, peak bytes)."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # TRL talks
    sys.stderr = sys.stdout
    warnings.simplefilter("ignore")
    as_train_sets_it()
    try:
        steps = CONTENDERS[name](rows, folder, batch_size, dtype)
        while n := pipe.recv():
            seconds = []
            losses = []
            for _ in range(n):
                start = time.perf_counter()
                loss = next(steps).item()  # .item() waits for the device
                seconds.append(time.perf_counter() - start)
                losses.append(loss)
            pipe.send((seconds, losses, peak()))
    except Exception as error:  # no compiler, no memory: the others go on
        message = f"{type(error).__name__}: {error}"
        pipe.send(message[:300])


def as_train_sets_it():
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32


def peak():
    """The most memory so far, in bytes: of the GPU's, else of this process. None if unknown."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return most
    return 1024 * most


def race(names, rows, folder, batch_size, dtype, steps, rounds=ROUNDS):
    """A few steps of each, then in turn `steps` of each, `rounds` times, a large matrix product
    between -> what `show` wants of each that did not fail, by name; the product's flop/s."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    found = {}
    for name in names:
        pipe, theirs = context.Pipe()
        args = (name, rows, folder, batch_size, dtype, theirs)
        context.Process(target=serve, args=args, daemon=True).start()
        theirs.close()  # so that a contender that dies is an EOFError here, and no endless wait
        answer = ask(pipe, FIRST_STEPS)
        if isinstance(answer, str):
            print(f"{name} failed: {answer}")
            continue
        print(f"{name}: first steps done", file=sys.stderr)
        _, losses, _ = answer
        found[name] = {"seconds": [], "losses": losses}
        pipes[name] = pipe
    speeds = []
    for _ in range(rounds):
        speeds.append(matrix_speed(dtype))
        for name, pipe in pipes.items():
            answer = ask(pipe, steps)
            if isinstance(answer, str):
                sys.exit(f"{name} failed: {answer}")
            seconds, _, most = answer
            found[name]["seconds"].append(statistics.mean(seconds))
            found[name]["peak"] = most
    for pipe in pipes.values():
        pipe.send(0)
    return found, statistics.median(speeds)


def ask(pipe, steps):
    """What a contender says of its next steps, as `serve` has it; if it failed, why."""
    try:
        pipe.send(steps)
        return pipe.recv()
    except (EOFError, BrokenPipeError):
        return "its process died, perhaps for lack of memory"


def matrix_speed(dtype):
    """Flop/s of a large matrix product here and now; in TF32 for float32 on CUDA."""
    as_train_sets_it()
    n = 2048
    if DEVICE == "cuda":
        n = 8192
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=getattr(torch, dtype))
    (a @ b).sum().item()
    start = time.perf_counter()
    for _ in range(3):
        (a @ b).sum().item()
    seconds = time.perf_counter() - start
    return 3 * 2 * n**3 / seconds


def useful_flops(rows, config):
    """Of a pair on average: each token of prompt and responses once, the head where it is scored,
    times 3 for forward and backward. No padding, no prompt twice, no reference."""
    C = config.n_embd
    total = 0
    for row in rows:
        prompt = len(row.prompt)
        fed = prompt
        seen = prompt * (prompt + 1) / 2  # each token sees itself and what comes before it
        for response in (row.chosen, row.rejected):
            n = len(response) - 1  # the last token is scored, but never fed
            fed += n
            seen += n * prompt + n * (n + 1) / 2
        scored = len(row.chosen) + len(row.rejected)
        layer = 24 * fed * C**2 + 4 * seen * C
        total += config.n_layer * layer + 2 * scored * C * VOCAB
    return 3 * total / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="pairs as train.py reads them, with GPT-2's tokens")
    parser.add_argument("--only", default=list(CONTENDERS), nargs="+", choices=CONTENDERS)
    sizes = {"choices": range(MICRO_BATCH, 257, MICRO_BATCH), "metavar": "N"}
    help = "pairs a step, a multiple of 8"
    parser.add_argument("--batch-size", type=int, default=BATCH, help=help, **sizes)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-head", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=384)
    possible = range(1, MOST_STEPS + 1)
    parser.add_argument("--steps", type=int, default=1, choices=possible, help="steps of a turn")
    args = parser.parse_args()
    names = args.only
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: pip install -r tests/peers/requirements.txt")
        names = [name for name in names if "TRL" not in name]
    if args.data:
        tokenizer = data.get_tokenizer("gpt2")
        rows = data.encode_pairs(data.load_pairs(args.data), tokenizer, 1024)
    else:
        rows = made_up(1000)
    config = GPTConfig(VOCAB, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    print(f"{config}; {torch.get_num_threads()} threads, {DEVICE}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT(config).save_pretrained(folder)
        found, speed = race(names, rows, folder, args.batch_size, args.dtype, args.steps)
    show(found, speed, useful_flops(rows, config), args.batch_size, args.dtype)


def show(found, speed, flops, batch_size, dtype):
    """found: for each contender its seconds a step in each round, first losses and peak bytes.
    flops: useful ones, of a pair."""
    print(
        f"batches of {batch_size}; useful: of a large {dtype} product's {speed / 1e9:.0f} Gflop/s\n"
    )
    heads = ["contender", "seconds a step (range)", "pairs/s", "time / ours", "useful"]
    if peak() is not None:
        heads.append("peak GB")
    print_row(heads)
    print_row(["---"] * len(heads))
    base = [float("nan")]
    if "ours" in found:
        base = found["ours"]["seconds"]
    for name, result in found.items():
        seconds = result["seconds"]
        middle = statistics.median(seconds)
        pairs = batch_size / middle
        useful = flops * pairs / speed
        ratios = [their / our for their, our in zip(seconds, base)]
        cells = [name, spread(seconds), f"{pairs:.2f}", spread(ratios), f"{useful:.0%}"]
        if result["peak"] is not None:
            gigabytes = result["peak"] / 1e9
            cells.append(f"{gigabytes:.2f}")
        print_row(cells)
    print("\nloss of the first steps")
    for name, result in found.items():
        losses = [f"{loss:.4f}" for loss in result["losses"]]
        print(f"{name:27}", *losses)


def print_row(cells):
    print(f"| {' | '.join(cells)} |")


def spread(numbers):
    """Median (range)."""
    return f"{statistics.median(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


if __name__ == "__main__":
    main()
