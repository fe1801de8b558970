"""What the questions share: the toy world, policies, pairs, training, exact numbers, tables.

The world is so small that a training step can compute the log-prob of every response, (P, Y), and
read those of its pairs from that table. Losses and gradients are those of train.py (a test says
so), and a batch of any size costs the same. `train_step` is train.py's own step, on rows of tokens.
P = 2 prompts, Y = 1,111 responses, n pairs, B of them in a batch.
"""

import copy
import csv
import functools
import inspect
import itertools
import math
from pathlib import Path

import torch

import data
import dpo
import train

WORLD = data.ToyWorld()
BETA = 1.0  # train.py's default in the toy world
PAIRS = 100_000  # of a usual run
STEPS = 800  # of a usual run: eight passes over its pairs
BATCH = 1024
LENGTHS = torch.tensor([len(ids) for ids in WORLD.response_ids])  # (Y,) in tokens
ASSETS = Path(__file__).parents[1] / "assets"


# Policies


class Table(torch.nn.Module):
    """A policy that shares no weights: a free logit for every response, from logps (P, Y)."""

    def __init__(self, logps):
        super().__init__()
        self.logits = torch.nn.Parameter(logps.clone())


def new_gpt(seed):
    """train.py's network for the toy world, untrained."""
    args = train.parse_args(["--seed", str(seed)])
    return train.build_model(args, WORLD.tokenizer)


def listed(model):
    """log pi(y|x) of every response: (P, Y) float64, with its gradient.

    The same values as data.ToyWorld.logps, but faster: only the W^(K-1) sequences of K - 1 words
    are fed to the model. As it is causal, their logits also give every shorter response.
    """
    if isinstance(model, Table):
        return model.logits.log_softmax(-1)
    K = WORLD.K
    W = WORLD.W
    P = len(WORLD.prompts)
    words = torch.tensor(list(itertools.product(range(W), repeat=K - 1)))  # (W^(K-1), K - 1)
    prompts = WORLD.prompt_ids.repeat_interleave(len(words), dim=0)
    ids = torch.cat([prompts, words.repeat(P, 1)], dim=1)  # (P * W^(K-1), T)
    logits = model(ids)[:, -K:]  # from the last token of the prompt on
    logps = logits.double().log_softmax(-1)
    logps = logps.unflatten(0, (P, -1))  # (P, W^(K-1), K, W + 1)

    so_far = torch.zeros(P, 1, dtype=torch.float64)  # of the first k words: (P, W^k)
    complete = []
    for k in range(K):
        alike = W ** (K - 1 - k)  # neighbouring rows that begin with the same k words
        next_token = logps[:, ::alike, k]  # (P, W^k, W + 1)
        longer = so_far[..., None] + next_token
        complete.append(longer[..., W])  # the end token: a response of k words
        so_far = longer[..., :W].flatten(1)
    complete.append(so_far)  # K words need no end token
    return torch.cat(complete, dim=1)


@functools.cache
def reference(seed):
    """SFT on the corpus -> (GPT, log pi_ref (P, Y)). Train a copy, never this one."""
    model = new_gpt(seed)
    corpus = WORLD.corpus(torch.Generator().manual_seed(seed))
    prompts = {tuple(ids): x for x, ids in enumerate(WORLD.prompt_ids.tolist())}
    responses = {tuple(ids): y for y, ids in enumerate(WORLD.response_ids)}
    x = torch.tensor([prompts[tuple(row.prompt)] for row in corpus])
    y = torch.tensor([responses[tuple(row.chosen)] for row in corpus])

    def sft_losses(logps, batch):
        return -logps[x[batch], y[batch]]

    logps = last(descend(model, sft_losses, len(corpus), steps=400, lr=1e-2, seed=seed))
    return model, logps


def start_from(seed, kind="network"):
    """A policy at the reference of this seed, to be trained, and log pi_ref (P, Y).

    kind: "network", or "table" for a policy that shares no weights.
    """
    model, ref = reference(seed)
    if kind == "table":
        return Table(ref), ref
    return copy.deepcopy(model), ref


# Pairs


def draw_pairs(seed, n, labels="hard", flip=0.0, stream=1000):
    """n preferences between responses of the reference, as data.Drawn.

    labels: "hard", drawn by Bradley-Terry on r* (Eq. 1), or "deterministic": the higher r* wins.
    A fraction `flip` is then reversed. Another `stream` draws other pairs, such as held-out ones.
    """
    generator = torch.Generator().manual_seed(stream + seed)
    drawn = WORLD.draw_pairs(reference(seed)[1], n, generator)
    if labels == "deterministic":
        drawn = exchange(drawn, true_margins(drawn) < 0)
    wrong = torch.rand(n, generator=generator) < flip
    return exchange(drawn, wrong)


def true_margins(drawn):
    """r*(chosen) - r*(rejected) of each pair: (n,) float64."""
    chosen, rejected = of_pairs(WORLD.rewards, drawn)
    return chosen - rejected


def exchange(drawn, wrong):
    """The pairs, with chosen and rejected exchanged where `wrong` (n,) is True."""
    chosen = torch.where(wrong, drawn.rejected, drawn.chosen)
    rejected = torch.where(wrong, drawn.chosen, drawn.rejected)
    return drawn._replace(chosen=chosen, rejected=rejected)


def of_pairs(values, drawn):
    """Log-probs or rewards (P, Y) -> those of the pairs' responses, (2, n), chosen first."""
    both = torch.stack([drawn.chosen, drawn.rejected])
    return values[drawn.prompt, both]


def mentioned(drawn):
    """(P, Y) bool: True for the responses that some pair mentions."""
    found = torch.zeros(WORLD.rewards.shape, dtype=torch.bool)
    found[drawn.prompt, drawn.chosen] = True
    found[drawn.prompt, drawn.rejected] = True
    return found


# Training through the table of all responses


def descend(model, losses_of, n, steps, lr, seed, batch_size=BATCH):
    """Minimise the mean of losses_of(logps (P, Y), batch (B,)) -> (B,). batch: indices below n.

    Like train.py: AdamW, a warm-up (a twentieth of the steps), a linear decay, clipped gradients.
    Each pass over the n is shuffled anew. What is left at its end, less than a batch, is dropped.
    Yields (step, logps) before each step and after the last.
    """
    optimizer = adamw(model, lr)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, n)
    waiting = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, lr, step, steps, warmup=steps // 20 + 1)
        if len(waiting) < batch_size:
            waiting = torch.randperm(n, generator=generator)
        batch = waiting[:batch_size]
        waiting = waiting[batch_size:]
        logps = listed(model)
        yield step - 1, logps.detach()
        optimizer.zero_grad()
        losses_of(logps, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    yield steps, listed(model).detach()


def last(run):
    """The log-probs (P, Y) at the end of a run."""
    for _, logps in run:
        pass
    return logps


def preferences(loss, drawn, ref, beta=BETA, **settings):
    """A loss of the four log-probs on these pairs, as `descend` wants it."""
    loss = functools.partial(loss, **settings)
    lengths = of_pairs(LENGTHS.expand(ref.shape), drawn)

    def losses_of(logps, batch):
        pairs = data.Drawn(*(column[batch] for column in drawn))
        return call_loss(
            loss, of_pairs(logps, pairs), of_pairs(ref, pairs), lengths[:, batch], beta
        )

    return losses_of


def soft_preferences(loss, drawn, ref, beta=BETA, **settings):
    """The same with soft labels: p L(chosen, rejected) + (1 - p) L(rejected, chosen), where p is
    Eq. 1's probability on r* that chosen wins. So there is no label noise."""
    everywhere = torch.ones(len(drawn.prompt), dtype=torch.bool)
    as_drawn = preferences(loss, drawn, ref, beta, **settings)
    reversed_pairs = preferences(loss, exchange(drawn, everywhere), ref, beta, **settings)
    p = true_margins(drawn).sigmoid()  # (1)

    def losses_of(logps, batch):
        chosen_wins = p[batch] * as_drawn(logps, batch)
        rejected_wins = (1 - p[batch]) * reversed_pairs(logps, batch)
        return chosen_wins + rejected_wins

    return losses_of


def train_dpo(
    seed,
    drawn,
    steps=STEPS,
    lr=1e-2,
    batch_size=BATCH,
    loss=dpo.dpo_loss,
    kind="network",
    **settings,
):
    """DPO, or another loss, from the reference: yields (step, logps (P, Y)) like `descend`.

    settings: beta, and what else the loss takes by name.
    """
    policy, ref = start_from(seed, kind)
    losses_of = preferences(loss, drawn, ref, **settings)
    return descend(policy, losses_of, len(drawn.prompt), steps, lr, seed, batch_size)


# Exact numbers


def measure(logps, ref, beta=BETA, prompts=slice(None)):
    """The exact numbers of a policy, means over `prompts`; logps and ref are (P, Y).

    Those of ToyWorld.measure (expected_reward, kl, objective, kl_to_optimum, gap_closed), and
    grammatical, the probability of grammatical responses, and entropy in nats.
    """
    numbers = WORLD.measure(logps, ref, beta, prompts)
    logps = logps[prompts]
    probs = logps.exp()
    more = {
        "grammatical": probs[:, WORLD.grammatical].sum(-1),
        "entropy": -(probs * logps.clamp(min=-1e9)).sum(-1),  # 0 log 0 = 0
    }
    return numbers | means(more)


def means(columns):
    """{name: tensor} -> {name: its mean}. AssertionError if one is not finite."""
    found = {name: column.mean().item() for name, column in columns.items()}
    for name, mean in found.items():
        assert math.isfinite(mean), f"{name} is {mean}"
    return found


# Training on rows of tokens: train.py's step, for any model, world, loss and device


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0, fused=True)


def set_learning_rate(optimizer, peak, step, steps, warmup):
    """A linear warm-up, then a linear decay to almost 0. Steps count from 1."""
    if step <= warmup:
        lr = peak * (step / warmup)
    else:
        lr = peak * ((steps - step + 1) / (steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = lr


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
    assert losses.shape == policy_logps[0].shape, f"not one loss per pair: {losses}"
    return losses


# Rows: dicts with a seed, settings and numbers


def save_csv(path, rows):
    """Rows as a table. Their columns may differ: a cell that a row lacks is left empty. Floats have
    six significant digits."""
    columns = {}  # in order of first appearance
    for row in rows:
        columns |= dict.fromkeys(row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: to_text(value) for key, value in row.items()})


def load_csv(path):
    """The rows of `save_csv`. What reads as a number is one; empty cells are left out. Floats have
    lost all but six digits."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.append({key: to_value(text) for key, text in row.items() if text != ""})
    return rows


def to_text(value):
    assert type(value) in (int, float, str), f"{value!r} cannot be read back from a CSV file"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def to_value(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def saved(name):
    """The rows of assets/<name>.csv, which a question has measured with five seeds."""
    return load_csv(ASSETS / f"{name}.csv")


def where(rows, **wanted):
    """The rows that have these values."""
    found = rows
    for key, value in wanted.items():
        found = [row for row in found if row.get(key) == value]
    return found


def values(rows, key):
    """The different values of a column, in order of first appearance."""
    return list(dict.fromkeys(row[key] for row in rows if key in row))


def per_seed(rows, key):
    """The mean of a column for each seed, over all its rows: choose one step first, by `where`."""
    found = []
    for seed in values(rows, "seed"):
        column = [row[key] for row in where(rows, seed=seed)]
        found.append(sum(column) / len(column))
    return found


def mean_sd(numbers):
    """Mean and standard deviation, 0 for a single number."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if len(numbers) == 1:
        return numbers.item(), 0.0
    return numbers.mean().item(), numbers.std().item()


def mean(rows, key):
    return mean_sd(per_seed(rows, key))[0]


def spread(rows, key, digits=2):
    """A column as text: mean ± standard deviation over the seeds."""
    numbers = per_seed(rows, key)
    middle, sd = mean_sd(numbers)
    if len(numbers) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {sd:.{digits}f}"


def is_clear(differences):
    """Is their mean more than two standard errors from 0? Paired differences, one per seed.

    With one seed every difference is clear, so the verdict of a --quick run says little.
    """
    middle, sd = mean_sd(differences)
    return abs(middle) > 2 * sd / len(differences) ** 0.5
