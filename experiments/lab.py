"""What the experiments share: the toy world, training, exact numbers, many runs at once.

The world is so small that a step computes the log-prob of every response, (P, Y), and reads those
of its pairs from that table. Values and gradients are train.py's (a test says so), and a batch of
any size costs the same.
P = 2 prompts, Y = 1,111 responses, B pairs or responses in a batch.
"""

import argparse
import copy
import csv
import functools
import itertools
import os
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
    `among` keeps only the pairs of that prompt. Another `stream` draws other pairs, to hold out."""
    generator = torch.Generator().manual_seed(stream + seed)
    drawn = WORLD.draw_pairs(reference(seed)[1], n, labels, generator)
    if among is not None:
        drawn = data.Drawn(*(column[drawn.prompt == among] for column in drawn))
    wrong = torch.rand(len(drawn.prompt), generator=generator) < flip
    chosen = torch.where(wrong, drawn.rejected, drawn.chosen)
    return drawn._replace(chosen=chosen, rejected=torch.where(wrong, drawn.chosen, drawn.rejected))


def descend(model, losses_of, n, steps, lr, seed, batch=BATCH):
    """Minimise the mean of losses_of(logps (P, Y), places (B,)) -> (B,) over n places, as train.py
    does: AdamW, a short warm-up, a linear decay, clipped gradients.
    Yields (step, logps) before each step and after the last.
    """
    optimizer = train.OPTIMIZERS["adamw"](model.parameters(), lr)
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
        return train.call_loss(loss, logps[x, both], ref[x, both], LENGTHS[both], beta)

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
    return WORLD.measure(logps, ref, beta, prompts) | train.means(more)


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
            train.progress(f"{len(results)}/{len(jobs)} jobs  {times}", True)
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
    folder = Path("out-quick" if quick else "assets")
    folder.mkdir(parents=True, exist_ok=True)
    return quick, folder


def save_csv(path, rows):
    """Dicts of one set of keys, as a table; floats with six significant digits."""
    with open(path, "w", newline="") as file:
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

    with open(path, newline="") as file:
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
