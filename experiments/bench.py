"""How fast is the training step? Beside TRL's DPOTrainer and the authors' method, on equal work.

    python -m experiments.bench [--data pairs.jsonl] [--shape 6,6,384] [--only ours TRL]

The same GPT-2-shaped weights, the same pairs in the same batches of 8, AdamW 1e-5, beta 0.1, clip
1.0, no dropout. Each contender is a process of its own (for its peak memory); they take turns, and
only one works at a time. Without --data the pairs are made up, as long as real ones: a prompt of 44
tokens on average, answers of 16. Without trl and transformers (tests/peers/requirements.txt) TRL is
left out.
"""

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import data
import dpo
import train
from model import GPT, GPTConfig

BETA, LR, BATCH, VOCAB = 0.1, 1e-5, 8, 50257
LOSS_STEPS, ROUNDS, TRL_STEPS = 10, 5, 60  # the first ten, whose losses are shown, warm up as well
CONFIG = replace(train.REAL, beta=BETA, batch_size=BATCH, micro_batch_size=0, warmup_steps=0,
                 decay=False, device="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip


def made_up(n, prompt=None, answer=None):
    """n pairs of random tokens. Lengths are given, or spread like those of instruction pairs."""
    random = torch.Generator().manual_seed(0)

    def part(mean, least, length):
        spread = torch.empty(1).exponential_(1 / (mean - least), generator=random).item()
        length = length or min(int(least + spread + 0.5), 3 * mean)
        return torch.randint(VOCAB - 1, (length,), generator=random).tolist()

    def row():
        answers = [part(16, 4, answer and answer - 1) + [VOCAB - 1] for _ in range(2)]
        return data.TokenPair(part(44, 30, prompt), *answers)

    return [row() for _ in range(n)]


# The contenders: each yields the loss of a step of the optimiser, before it


def ours(rows, folder, dtype="float32", compiled=False):
    """train.py's own step on pair rows, the reference's sums computed once."""
    model = GPT.from_pretrained(folder).to(CONFIG.device)
    config = replace(CONFIG, dtype=dtype)
    ref = train.all_logps(model, rows, config)
    if compiled:
        model.compile(dynamic=True)

    def losses_of(chosen, rejected, i):
        return dpo.dpo_loss(chosen, rejected, *ref[:, i], beta=BETA).losses

    for _, _, record, _ in train.updates(model, rows, losses_of, config, 10**6, LR):
        yield record["loss"].mean()


def authors(rows, folder):
    """The authors' code, written out: two padded rows a pair, a logit for every token of both, and
    the reference again in every step."""
    policy, reference = (GPT.from_pretrained(folder).to(CONFIG.device) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)

    def logps(model, ids, mask):
        sums = dpo.sequence_logps(model(ids), ids, mask)
        return sums.split(len(ids) // 2)  # chosen rows first

    for pair_ids in order(rows):
        picked = [rows[i] for i in pair_ids]
        texts = [(row.prompt, row.chosen) for row in picked]
        texts += [(row.prompt, row.rejected) for row in picked]
        ids = torch.zeros(len(texts), max(len(x + y) for x, y in texts), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, (x, y) in enumerate(texts):
            ids[i, : len(x + y)] = torch.tensor(x + y)
            mask[i, len(x) : len(x + y)] = True
        ids, mask = ids.to(CONFIG.device), mask.to(CONFIG.device)
        with torch.no_grad():
            ref = logps(reference, ids, mask)
        loss = dpo.dpo_loss(*logps(policy, ids, mask), *ref, beta=BETA).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        yield loss.detach()


def trl(rows, folder, precompute=False):
    """TRL's DPOTrainer with its defaults, but for the settings that all share. Its tokenizer reads
    token numbers as words, so that both train on equal tokens."""
    import datasets
    import tokenizers
    import transformers
    from trl import DPOConfig, DPOTrainer

    words = {str(i): i for i in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    end = dict(eos_token=str(VOCAB - 1), pad_token=str(VOCAB - 1))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **end)

    def text(ids):
        return "".join(f" {i}" for i in ids)

    batches = order(rows)
    picked = [rows[i] for _ in range(TRL_STEPS) for i in next(batches)]
    table = {"prompt": [text(row.prompt) for row in picked]}  # TRL adds the end to answers
    table |= {"chosen": [text(row.chosen[:-1]) for row in picked]}
    table |= {"rejected": [text(row.rejected[:-1]) for row in picked]}
    models = []
    for _ in range(2):
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        models.append(model)

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    config = DPOConfig(
        output_dir=str(Path(folder) / "trl"), beta=BETA, learning_rate=LR, max_steps=TRL_STEPS,
        per_device_train_batch_size=BATCH, lr_scheduler_type="constant", max_grad_norm=1.0,
        bf16=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        precompute_ref_log_probs=precompute, use_cpu=CONFIG.device == "cpu",
    )  # fmt: skip
    trainer = InOrder(models[0], models[1], config, None, datasets.Dataset.from_dict(table),
                      processing_class=tokenizer)  # fmt: skip
    yield from steps_of(trainer, transformers.TrainerCallback)


def steps_of(trainer, callback):
    """Turn trainer.train(), which calls us back, into a generator that we call."""
    import threading

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(callback):
        def on_step_begin(self, *args, **kwargs):
            go.acquire()

        def on_step_end(self, *args, **kwargs):
            done.release()

    trainer.add_callback(Turns())
    threading.Thread(target=trainer.train, daemon=True).start()
    while True:
        go.release()
        done.acquire()
        yield trainer.last_loss.detach()


def order(rows):
    """The batches of train.updates, in its order; a short one there would be one here."""
    generator = torch.Generator().manual_seed(CONFIG.seed)
    return (ids.tolist() for ids in data.batches(rows, BATCH, generator))


CONTENDERS = {
    "ours": ours,
    "ours, bfloat16": lambda rows, folder: ours(rows, folder, "bfloat16"),
    "ours, compiled": lambda rows, folder: ours(rows, folder, compiled=True),
    "authors' method": authors,
    "TRL": trl,
    "TRL, reference precomputed": lambda rows, folder: trl(rows, folder, True),
}


# Taking turns


def serve(name, rows, folder, pipe):
    """In a process of its own: for each n received, n steps -> (seconds, losses, peak bytes)."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # TRL talks
    warnings.simplefilter("ignore")
    steps = CONTENDERS[name](rows, folder)
    while n := pipe.recv():
        seconds, losses = [], []
        for _ in range(n):
            start = time.perf_counter()
            losses.append(next(steps).item())  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if CONFIG.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        pipe.send((seconds, losses, peak))


def race(names, rows, folder, steps):
    """Ten steps of each, then ROUNDS times `steps` of each in turn, with a large matrix product
    between -> {name: (seconds of a step in each round, losses, peak bytes)}, flop/s of the product.
    """
    context = multiprocessing.get_context("spawn")
    pipes, found, speeds = {}, {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        args = name, rows, folder, theirs
        context.Process(target=serve, args=args, daemon=True).start()
        theirs.close()  # so that a contender that fails is an EOFError here, and no endless wait
        pipes[name].send(LOSS_STEPS)
        _, losses, peak = pipes[name].recv()
        found[name] = ([], losses, peak)
        train.progress(f"{name}: first losses {losses[0]:.4f} ... {losses[-1]:.4f}", True)
    for _ in range(ROUNDS):
        speeds.append(matrix_speed())
        for name, pipe in pipes.items():
            pipe.send(steps)
            seconds, _, peak = pipe.recv()
            found[name][0].append(statistics.median(seconds))
            found[name] = (*found[name][:2], peak)
    for pipe in pipes.values():
        pipe.send(0)
    return found, statistics.median(speeds)


def matrix_speed(n=2048):
    """Flop/s of a large float32 matrix product here and now."""
    a, b = torch.randn(2, n, n, device=CONFIG.device)
    (a @ b).sum().item()
    start = time.perf_counter()
    for _ in range(3):
        (a @ b).sum().item()
    return 3 * 2 * n**3 / (time.perf_counter() - start)


def useful_flops(rows, config):
    """Of a step on average: every token of a row once, the head where it is scored, times 3 for
    forward and backward. No padding, no prompt twice, no reference."""
    C, total = config.n_embd, 0
    for row in rows:
        x, w, l = (len(part) for part in row)
        tokens, scored = x + w + l - 2, w + l
        seen = x * (x + 1) / 2 + sum(x * (y - 1) + y * (y - 1) / 2 for y in (w, l))
        total += config.n_layer * (24 * tokens * C**2 + 4 * seen * C) + 2 * scored * C * VOCAB
    return 3 * BATCH * total / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="pairs as train.py reads them, with GPT-2's tokens")
    parser.add_argument("--shape", default="6,6,384", help="layers, heads, width")
    most = range(1, 1 + (TRL_STEPS - LOSS_STEPS) // ROUNDS)  # TRL is told beforehand when to end
    parser.add_argument("--steps", type=int, default=5, choices=most, help="steps of a turn")
    parser.add_argument("--only", default=list(CONTENDERS), nargs="+", choices=CONTENDERS)
    args = parser.parse_args()
    n_layer, n_head, n_embd = map(int, args.shape.split(","))
    config = GPTConfig(VOCAB, 1024, n_embd, n_layer, n_head)
    rows = made_up(8 * 125)
    if args.data:
        rows = data.encode_pairs(data.load_pairs(args.data), data.get_tokenizer("gpt2"), 1024)
    names = [name for name in args.only if importlib.util.find_spec("trl") or "TRL" not in name]
    if len(names) < len(args.only):
        print("TRL is not installed: pip install -r tests/peers/requirements.txt")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT(config).save_pretrained(folder)
        found, speed = race(names, rows, folder, args.steps)
    show(found, speed, useful_flops(rows, config), args.shape)


def show(found, speed, flops, shape):
    print(
        f"\n{shape}, batches of {BATCH}, {torch.get_num_threads()} threads, {CONFIG.device}, torch"
    )
    print(f"{torch.__version__}; useful: of a large product's {speed / 1e9:.0f} Gflop/s\n")
    print("| contender | seconds a step (range) | pairs/s | ours is faster by | peak GB | useful |")
    print("|---" * 6 + "|")
    base = statistics.median(found["ours"][0]) if "ours" in found else float("nan")
    for name, (seconds, _, peak) in found.items():
        middle = statistics.median(seconds)
        cells = [f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})"]
        cells += [f"{BATCH / middle:.2f}", f"{middle / base:.2f}", f"{peak / 1e9:.2f}"]
        print(f"| {name} |", " | ".join([*cells, f"{flops / middle / speed:.0%}"]), "|")
    print("\nloss of the first steps")
    for name, (_, losses, _) in found.items():
        print(f"{name:27}", " ".join(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
