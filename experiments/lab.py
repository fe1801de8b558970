"""What the experiments share: the toy world, training, exact numbers, many runs at once.

The world is so small that a step of `descend` computes the log-prob of every response, (P, Y), and
reads those of its pairs from that table. Values and gradients are train.py's (a test says so), and
a batch of any size costs the same. `train_step` is train.py's step itself, on rows of tokens.
P = 2 prompts, Y = 1,111 responses, B pairs or responses in a batch.
"""

import argparse
import copy
import csv
import functools
import inspect
import itertools
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

import data
import dpo
import train

WORLD = data.ToyWorld()
BETA = 1.0  # train.py's in the toy world
PAIRS, STEPS, BATCH = 100_000, 800, 1024  # of a DPO run: some eight passes over the pairs
LENGTHS = torch.tensor([len(ids) for ids in WORLD.response_ids])  # in tokens


class Table(torch.nn.Module):
    """A policy that shares no weights: a free logit for every response, initially logps (P, Y)."""

    def __init__(self, logps):
        super().__init__()
        self.logits = torch.nn.Parameter(logps.clone())


def listed(model):
    """log pi(y|x) of every response, (P, Y) float64, with its gradient: data.ToyWorld.logps, made
    fast. Only the W^(K-1) longest prefixes are fed: being causal, they hold the shorter ones.
    """
    if isinstance(model, Table):
        return model.logits.log_softmax(-1)
    K, W, P = WORLD.K, WORLD.W, len(WORLD.prompts)
    prefixes = torch.tensor(list(itertools.product(range(W), repeat=K - 1)))
    prompts = WORLD.prompt_ids.repeat_interleave(len(prefixes), 0)
    ids = torch.cat([prompts, prefixes.repeat(P, 1)], 1)  # (P * W^(K-1), T)
    logits = model(ids)[:, -K:]  # from the last prompt token on
    logps = logits.double().log_softmax(-1).unflatten(0, (P, -1))  # (P, W^(K-1), K, W + 1)
    so_far, found = torch.zeros(P, 1, dtype=torch.float64), []
    for k in range(K):  # so_far (P, W^k): log-probs of the first k words
        longer = so_far[..., None] + logps[:, :: W ** (K - 1 - k), k]  # (P, W^k, W + 1)
        found.append(longer[..., W])  # the end token: a response of k words
        so_far = longer[..., :W].flatten(1)
    return torch.cat([*found, so_far], 1)  # K words: complete without an end token


def new_gpt(seed):
    """train.py's network for the toy world, untrained."""
    return train.build_model(train.parse_args(["--seed", str(seed)]), WORLD.tokenizer)


@functools.cache
def reference(seed):
    """SFT on the corpus -> (GPT, log pi_ref (P, Y)). Train a copy, never this one."""
    model = new_gpt(seed)
    corpus = WORLD.corpus(torch.Generator().manual_seed(seed))
    prompts = {tuple(ids): x for x, ids in enumerate(WORLD.prompt_ids.tolist())}
    responses = {tuple(ids): y for y, ids in enumerate(WORLD.response_ids)}
    x = torch.tensor([prompts[tuple(row.prompt)] for row in corpus])
    y = torch.tensor([responses[tuple(row.chosen)] for row in corpus])
    sft = descend(model, lambda logps, i: -logps[x[i], y[i]], len(corpus), 400, 1e-2, seed)
    *_, (_, logps) = sft
    return model, logps


def start_from(seed, kind="network"):
    """A policy at the reference of this seed, to be trained: (model, log pi_ref)."""
    model, ref = reference(seed)
    return (Table(ref) if kind == "table" else copy.deepcopy(model)), ref


def draw(seed, n, labels="hard", flip=0.0, among=None, stream=1000):
    """n preferences between responses of the reference, a fraction `flip` of them then reversed.
    labels: "hard", drawn by Bradley-Terry on r*, or "deterministic": the higher r* wins.
    `among` keeps only the pairs of that prompt. Another `stream` draws other pairs, to hold out."""
    generator = torch.Generator().manual_seed(stream + seed)
    drawn = WORLD.draw_pairs(reference(seed)[1], n, generator)
    if labels == "deterministic":
        drawn = exchange(drawn, true_margins(drawn) < 0)
    else:
        assert labels == "hard", labels
    if among is not None:
        drawn = data.Drawn(*(column[drawn.prompt == among] for column in drawn))
    wrong = torch.rand(len(drawn.prompt), generator=generator) < flip
    return exchange(drawn, wrong)


def true_margins(drawn):
    """r*(chosen) - r*(rejected) of each pair, (n,) float64."""
    chosen = WORLD.rewards[drawn.prompt, drawn.chosen]
    rejected = WORLD.rewards[drawn.prompt, drawn.rejected]
    return chosen - rejected


def exchange(drawn, wrong):
    """The pairs, with chosen and rejected exchanged where `wrong` (n,) is True."""
    chosen = torch.where(wrong, drawn.rejected, drawn.chosen)
    rejected = torch.where(wrong, drawn.chosen, drawn.rejected)
    return drawn._replace(chosen=chosen, rejected=rejected)


def descend(model, losses_of, n, steps, lr, seed, batch=BATCH):
    """Minimise the mean of losses_of(logps (P, Y), places (B,)) -> (B,) over n places, as train.py
    does: AdamW, a short warm-up, a linear decay, clipped gradients.
    Yields (step, logps) before each step and after the last.
    """
    optimizer = adamw(model, lr)
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / (steps // 20 + 1), (steps - step) / steps * 1.05)
        if len(left) < min(batch, n):
            left = torch.randperm(n, generator=generator)
        places, left = left[:batch], left[batch:]
        logps = listed(model)
        yield step, logps.detach()
        optimizer.zero_grad()
        losses_of(logps, places).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    yield steps, listed(model).detach()


def preferences(loss, drawn, ref, beta=BETA, **settings):
    """losses_of for `descend`: a loss of the four log-probs on these pairs."""
    loss = functools.partial(loss, **settings)

    def losses_of(logps, places):
        x, both = drawn.prompt[places], torch.stack([drawn.chosen, drawn.rejected])[:, places]
        return call_loss(loss, logps[x, both], ref[x, both], LENGTHS[both], beta)

    return losses_of


def soft_preferences(loss, drawn, ref, beta=BETA, **settings):
    """The same with soft labels: p L(chosen, rejected) + (1 - p) L(rejected, chosen), where p is
    Eq. 1's probability on r* that chosen wins. So there is no label noise."""
    as_drawn = preferences(loss, drawn, ref, beta, **settings)
    everywhere = torch.ones(len(drawn.prompt), dtype=torch.bool)
    reversed_pairs = preferences(loss, exchange(drawn, everywhere), ref, beta, **settings)
    p = true_margins(drawn).sigmoid()  # (1)

    def losses_of(logps, places):
        chosen_wins = as_drawn(logps, places)
        rejected_wins = reversed_pairs(logps, places)
        return p[places] * chosen_wins + (1 - p[places]) * rejected_wins

    return losses_of


def train_dpo(
    seed, drawn=None, lr=1e-2, steps=STEPS, loss=dpo.dpo_loss, kind="network", **settings
):
    """DPO, or another loss, from the reference: yields (step, logps) like `descend`."""
    model, ref = start_from(seed, kind)
    drawn = draw(seed, PAIRS) if drawn is None else drawn
    losses_of = preferences(loss, drawn, ref, **settings)
    yield from descend(model, losses_of, len(drawn.prompt), steps, lr, seed)


def measure(logps, ref, beta=BETA, prompts=slice(None)):
    """ToyWorld.measure, the mass on grammatical responses and the entropy; means over `prompts`."""
    there = logps[prompts]
    entropy = -(there.exp() * there.clamp(min=-1e9)).sum(-1)
    more = {"grammatical": there.exp()[:, WORLD.grammatical].sum(-1), "entropy": entropy}
    return WORLD.measure(logps, ref, beta, prompts) | means(more)


def means(columns):
    """{name: tensor} -> {name: its mean}. AssertionError if one is not finite."""
    found = {name: column.mean().item() for name, column in columns.items()}
    assert all(math.isfinite(mean) for mean in found.values()), f"not finite: {found}"
    return found


def agreement(rewards, ref):
    """How well rewards (P, Y), a reward model's or a policy's own, agree with r*; means over x.

    rank_correlation: Spearman's, over every response, the rare ones too (r* has ties: mean ranks).
    pair_accuracy: over all pairs that pi_ref would draw and whose true rewards differ.
    probability_error: the mean distance of sigma(r - r') from Bradley-Terry's p, over such pairs.
    """
    columns = {"rank_correlation": [], "pair_accuracy": [], "probability_error": []}
    for found, true, logps in zip(rewards, WORLD.rewards, ref):
        ranks = torch.stack([mean_ranks(found), mean_ranks(true)])
        columns["rank_correlation"].append(ranks.corrcoef()[0, 1])
        margins, truth = found[:, None] - found, true[:, None] - true
        odds = torch.where(truth != 0, logps.exp()[:, None] * logps.exp(), 0)
        right = dpo.accuracy(margins * truth.sign())
        apart = (margins.sigmoid() - truth.sigmoid()).abs()
        columns["pair_accuracy"].append((odds * right).sum() / odds.sum())
        columns["probability_error"].append((odds * apart).sum() / odds.sum())
    return {key: torch.stack(column).mean().item() for key, column in columns.items()}


def mean_ranks(values):
    """Ranks (n,), equal values sharing the mean of theirs."""
    _, level, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[level].double()


# Training on rows of tokens: train.py's step, for any model, world, loss and device


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0, fused=True)


def schedule(optimizer, rows, epochs, peak_lr, seed):
    """Yields (step, steps, pair ids (B,)) with the learning rate set, by train.py's toy defaults:
    batches of 512, a linear warm-up, then a linear decay."""
    batch_size = min(512, len(rows))
    steps = math.ceil(epochs * len(rows) / batch_size)
    warmup = max(1, min(150, steps // 10))
    batches = data.batches(rows, batch_size, torch.Generator().manual_seed(seed + 2))
    for step in range(1, steps + 1):
        if step <= warmup:
            lr = peak_lr * (step / warmup)
        else:
            lr = peak_lr * ((steps - step + 1) / (steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr
        yield step, steps, next(batches)


def train_step(
    model,
    optimizer,
    rows,
    ids,
    *,
    loss=dpo.dpo_loss,
    ref_logps=None,
    beta=BETA,
    micro_batch_size=512,
    dtype="float32",
):
    """One optimiser step on the mean loss of the pairs rows[i] for i in ids (B,).

    ref_logps: those of all rows, (2, n); a loss for SFT gets none. Returns the losses (B,), as they
    were before the step, and the gradient's norm before it was clipped to 1. FloatingPointError,
    before the step, if one of them is not finite.
    """
    optimizer.zero_grad()
    logged = []
    for part in ids.split(micro_batch_size):
        logps, lengths = pair_logps(model, rows, part, dtype)
        if ref_logps is None:
            of_ref = ()
        else:
            of_ref = ref_logps[:, part]
        losses = call_loss(loss, logps, of_ref, lengths, beta)
        (losses.sum() / len(ids)).backward()  # the parts add up to the mean over the batch
        logged.append(losses.detach())
    losses = torch.cat(logged)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(losses.mean() + grad_norm):
        raise FloatingPointError(f"losses {losses}, gradient norm {grad_norm}")
    optimizer.step()
    return losses, grad_norm


def pair_logps(model, rows, ids, dtype="float32"):
    """log pi(y|x) of some pairs and their responses' lengths: (2, B) each, chosen first; (1, B) if
    there is no rejected response."""
    tokens, mask = data.collate(rows, ids.tolist())
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logps = dpo.response_logps(model, tokens.to(model.device), mask)
    lengths = mask.sum(1).to(model.device)
    return logps.view(-1, len(ids)), lengths.view(-1, len(ids))


@torch.no_grad()
def all_logps(model, rows, micro_batch_size=512, dtype="float32"):
    """log pi(y|x) of both responses of every row: (2, n)."""
    parts = torch.arange(len(rows)).split(micro_batch_size)
    return torch.cat([pair_logps(model, rows, part, dtype)[0] for part in parts], dim=1)


def call_loss(loss, policy_logps, ref_logps, lengths, beta):
    """Losses (B,) from three (2, B), chosen first. After the log-probs a loss is passed those of
    beta, chosen_lengths and rejected_lengths that its signature names."""
    offered = {"beta": beta, "chosen_lengths": lengths[0], "rejected_lengths": lengths[-1]}
    named = inspect.signature(loss).parameters
    passed = {name: value for name, value in offered.items() if name in named}
    losses = loss(*policy_logps, *ref_logps, **passed)
    if isinstance(losses, tuple):  # such as dpo.DPOLoss
        losses = losses[0]
    assert losses.shape == policy_logps[0].shape, f"not one loss for each pair: {losses}"
    return losses


# Many runs, files, command line


def run_jobs(work, jobs, seconds):
    """[work(*job) for job in jobs], one thread each, on all cores; says how long is left, from
    a guess of each job's seconds. Give the longest first."""
    start, results, cores = time.time(), {}, os.cpu_count()
    context = get_context("spawn")
    with ProcessPoolExecutor(cores, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(work, *job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            waiting = [seconds[i] for i in range(len(jobs)) if i not in results]
            left = sum(waiting) - sum(waiting[:cores]) / 2  # those at work are half done
            spent = time.time() - start
            left *= spent / max(sum(seconds) - left, 1)
            times = f"{spent:.0f} s  {left:.0f} s left"
            print(f"{len(results)}/{len(jobs)} jobs  {times}", flush=True)
    return [results[i] for i in range(len(jobs))]


def run_and_save(functions, prefix, quick, folder):
    """functions: {f: guess of its seconds}, the longest first; f(seed, quick) gives rows. One seed
    or five, each to <folder>/<prefix>_<name of f>.csv."""
    jobs = [(f, seed, quick) for f in functions for seed in range(1 if quick else 5)]
    results = run_jobs(call, jobs, [functions[f] for f, *_ in jobs])
    for f in functions:
        rows = [row for job, part in zip(jobs, results) if job[0] is f for row in part]
        save_csv(folder / f"{prefix}_{f.__name__}.csv", rows)


def call(f, *arguments):
    return f(*arguments)


def parse(description):
    """--quick or the full run -> (quick, folder): out-quick, or assets, which README shows."""
    parser = argparse.ArgumentParser(description=description)
    help = "fewer seeds and settings, at most 2 minutes on two cores; writes to out-quick"
    parser.add_argument("--quick", action="store_true", help=help)
    quick = parser.parse_args().quick
    sys.stdout.reconfigure(errors="replace")  # the tables' ± on an ASCII console
    folder = Path("out-quick" if quick else "assets")
    folder.mkdir(parents=True, exist_ok=True)
    return quick, folder


def save_csv(path, rows):
    """Dicts of one set of keys, as a table; floats with six significant digits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def load_csv(path):
    """The rows of `save_csv`; what reads as a number is one."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def saved(name):
    """The rows of assets/<name>.csv, which an experiment made with five seeds."""
    return load_csv(Path(__file__).parents[1] / "assets" / f"{name}.csv")


def where(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def mean_sd(values):
    """Mean and standard deviation, 0 for a single one."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std(correction=min(1, len(values) - 1)).item()


def spread(values):
    """The same as text."""
    return "{:.2f} ± {:.2f}".format(*mean_sd(values))


def table(rows, by, columns):
    """A table in Markdown: for each value of `by`, mean and spread of the columns."""
    head = f"| {by} | {' | '.join(columns)} |".replace("_", " ")
    lines = [head, "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(row[by] for row in rows):
        mine = where(rows, **{by: name})
        cells = (spread([row[column] for row in mine]) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
