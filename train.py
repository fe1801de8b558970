"""SFT, the reference's log-probs once, DPO, and what is printed, plotted and saved.

    python train.py                      the toy world, whose exact optimum is known
    python train.py --data pairs.jsonl   your own preference pairs; see README

Departs from the paper: AdamW unless --optimizer rmsprop; after the warm-up the learning rate falls
in a line to 0 unless --no-decay; one epoch of the paper is as many as the preset says.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

import data
import dpo
from data import InputError
from model import GPT, GPTConfig


def knob(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting is a flag: sft_lr is --sft-lr."""

    data: str = knob("", "file of JSON lines with prompt, chosen, rejected; without it, the toy world")
    world: str = knob("default", "size of the toy world", ["default", "small"])
    pairs: int = knob(100_000, "preference pairs drawn in the toy world")
    labels: str = knob("hard", "who says which is better", ["hard", "soft", "deterministic"])
    held_out: float = knob(0.1, "share of the pairs that is kept for evaluation")
    tokenizer: str = knob("auto", "bytes, or gpt2 and others of tiktoken; auto: gpt2 with --init")
    init: str = knob("", "start from gpt2, gpt2-medium, ... or from a folder in that format")
    block_size: int = knob(8, "longest prompt plus answer, in tokens")
    n_layer: int = knob(1, "layers")
    n_head: int = knob(4, "attention heads")
    n_embd: int = knob(32, "width")
    loss: str = knob("dpo", f"what to minimise: {', '.join(dpo.LOSSES)}")
    beta: float = knob(1.0, "strength of the leash to the reference, greater than 0")
    sft_epochs: float = knob(20.0, "passes over the SFT corpus, or over the chosen answers; may be 0")
    sft_lr: float = knob(1e-2, "learning rate of SFT")
    epochs: float = knob(15.0, "passes over the pairs")
    lr: float = knob(1e-2, "learning rate of DPO")
    warmup_steps: int = knob(150, "steps in which the learning rate rises in a line from 0")
    decay: bool = knob(True, "after that let it fall in a line to 0")
    batch_size: int = knob(1024, "pairs in an update")
    micro_batch_size: int = knob(0, "pairs in memory at once, the gradient adds up; 0: the whole batch")
    optimizer: str = knob("adamw", "rmsprop is the paper's", ["adamw", "rmsprop"])
    max_grad_norm: float = knob(1.0, "longer gradients are cut to this length")
    device: str = knob("auto", "auto: cuda, else mps, else cpu")
    dtype: str = knob("float32", "of the matrix products", ["float32", "bfloat16"])
    log_every: int = knob(10, "steps between lines of metrics.jsonl")
    eval_every: int = knob(100, "steps between evaluations")
    seed: int = knob(0, "of weights, corpus, pairs, labels and order; the world is fixed")
    out: str = knob("out", "folder for everything that is written")


TOY = Config()
REAL = Config(
    block_size=1024, n_layer=4, n_head=4, n_embd=128, beta=0.1, sft_epochs=6.0, sft_lr=2e-3,
    epochs=4.0, lr=5e-4, warmup_steps=10, batch_size=32, micro_batch_size=8, log_every=1, eval_every=20,
)  # fmt: skip


def main(argv=None):
    """Run it all; returns what summary.json holds. A user's mistake is one line and exit status 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        return run(parse_args(argv))
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(config):
    start = time.time()
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    task = RealTask(config) if config.data else ToyTask(config)
    model = build_model(config, task.tokenizer).to(device)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    print(" ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items()))

    train_sft(model, task.sft_rows, config, device)
    model.save_pretrained(out / "reference")
    task.use_reference(model)  # the toy's pairs are drawn from it
    ref_logps = all_logps(model, task.rows, config, device)  # once; from here on only the policy
    rows = {"reference": task.evaluate(model)}
    before = task.samples(model)
    history = train_dpo(model, task, ref_logps, config, device, out)
    model.save_pretrained(out / "policy")
    rows["dpo"] = task.evaluate(model)
    rows |= task.optimum()

    summary = {"config": dataclasses.asdict(config), "seconds": round(time.time() - start, 1)}
    summary |= {"gap_closed": task.gap_closed(rows["dpo"]), "rows": rows}
    write(out / "summary.json", json.dumps(summary, indent=2))
    plot(history, rows, out / "curves.png")
    report(summary, before, task.samples(model))
    return summary


# Two tasks with the same face: rows to train on, evaluate(), samples()


class ToyTask:
    """The toy world: pairs drawn from the reference, and everything evaluated exactly."""

    def __init__(self, config):
        self.config = config
        self.world = data.ToyWorld(config.world)
        self.tokenizer = self.world.tokenizer
        self.generator = torch.Generator().manual_seed(config.seed)
        if config.block_size < self.world.prompt_ids.shape[1] + self.world.K:
            raise InputError(f"--block-size {config.block_size} is too short for the toy world")
        corpus = self.encode(self.world.corpus(self.generator))
        self.sft_rows = [row._replace(rejected=[]) for row in corpus]

    def encode(self, pairs):
        return data.encode_pairs(pairs, self.tokenizer, self.config.block_size, self.world.K)

    def use_reference(self, reference):
        """Draw the pairs from it, and from it work out the optimum that they hide. Eq. 4."""
        config, world = self.config, self.world
        self.ref = world.logps(reference)
        self.best, _ = dpo.optimal_policy(self.ref, world.rewards, config.beta)
        drawn = world.draw_pairs(self.ref, config.pairs, config.labels, self.generator)
        self.p = None if config.labels != "soft" else drawn.p.float()
        self.rows = self.encode(world.texts(drawn))
        held_out = math.ceil(config.held_out * config.pairs)
        self.held_out = world.draw_pairs(self.ref, held_out, config.labels, self.generator)

    def evaluate(self, model):
        return self.exact(self.world.logps(model))

    def optimum(self):
        return {"optimum": self.exact(self.best)}

    def exact(self, logps):
        """Means over prompts of sums over every answer; no estimate but the held-out pairs'."""
        prompt, chosen, rejected, p = self.held_out
        rewards = dpo.implicit_reward(logps, self.ref, self.config.beta)
        won = accuracy(rewards[prompt, chosen] - rewards[prompt, rejected])
        exact = {
            "expected_reward": (logps.exp() * self.world.rewards).sum(-1),
            "kl_to_reference": dpo.kl_divergence(logps, self.ref),
            "objective": dpo.rlhf_objective(logps, self.ref, self.world.rewards, self.config.beta),
            "kl_to_optimum": dpo.kl_divergence(logps, self.best),
            "pair_accuracy": p * won + (1 - p) * (1 - won),
        }
        return {key: value.mean().item() for key, value in exact.items()}

    def gap_closed(self, row):
        """1 - KL(pi || pi*) / KL(pi_ref || pi*): 0 at the reference, 1 at the optimum of Eq. 4."""
        if self.config.labels == "deterministic":
            return None  # Eq. 7 then has no finite optimum
        return 1 - row["kl_to_optimum"] / dpo.kl_divergence(self.ref, self.best).mean().item()

    def samples(self, model):
        """Three answers to each prompt, with their true rewards."""
        lines = []
        for text, ids in zip(self.world.prompts, self.world.prompt_ids):
            ids = ids.expand(3, -1).to(model.wte.weight.device)
            torch.manual_seed(self.config.seed)
            drawn = model.generate(ids, self.world.K, stop_token=self.tokenizer.eot_token)
            answers = [decode_answer(self.tokenizer, row[ids.shape[1] :].tolist()) for row in drawn]
            said = [f'"{y.strip()}" {self.world.reward(text, y):+.2f}' for y in answers]
            lines.append(f"{text.strip()} ... {', '.join(said)}")
        return lines


class RealTask:
    """Pairs from a file: a share is held out, and nothing but those pairs is known of the truth."""

    def __init__(self, config):
        self.config = config
        pairs = data.load_pairs(config.data)
        name = config.tokenizer
        if name == "auto":
            name = "gpt2" if config.init else "bytes"
        self.tokenizer = data.get_tokenizer(name)
        rows = data.encode_pairs(pairs, self.tokenizer, config.block_size)
        held_out = math.ceil(config.held_out * len(rows))
        if not 0 < held_out < len(rows):
            raise InputError(f"{config.data}: {len(rows)} pairs are too few to hold out {held_out}")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        self.held_out = [rows[i] for i in order[:held_out]]
        self.rows = [rows[i] for i in order[held_out:]]
        self.sft_rows = [row._replace(rejected=[]) for row in self.rows]
        self.p = None

    def use_reference(self, reference):
        self.ref = self.logps(reference)
        raw = accuracy(self.ref[0] - self.ref[1]).mean().item()
        print(f"{len(self.rows)} pairs to train on, {len(self.held_out)} held out")
        print(f"the reference's own log-prob prefers the chosen answer in {raw:.3f} of those")

    def logps(self, model):
        return all_logps(model, self.held_out, self.config, model.wte.weight.device)

    def evaluate(self, model):
        metrics = describe(self.logps(model), self.ref, self.config)
        return {f"held_out_{key}": value for key, value in metrics.items() if key != "weight"}

    def optimum(self):
        return {}

    def gap_closed(self, row):
        return None

    def samples(self, model):
        """The likeliest answer to two held-out prompts."""
        lines = []
        for row in self.held_out[:2]:
            ids = torch.tensor([row.prompt], device=model.wte.weight.device)
            drawn = model.generate(ids, 100, temperature=0, stop_token=self.tokenizer.eot_token)
            answer = decode_answer(self.tokenizer, drawn[0, len(row.prompt) :].tolist())
            lines.append(f"...{self.tokenizer.decode(row.prompt)[-60:]!r} -> {answer!r}")
        return lines


def decode_answer(tokenizer, ids):
    return tokenizer.decode(list(itertools.takewhile(lambda t: t != tokenizer.eot_token, ids)))


# Training


def train_sft(model, rows, config, device):
    """Maximise log pi(y|x) of the corpus: the reference of section 4 where no SFT model is given."""

    def losses_of(chosen, rejected, pair_ids):
        return -chosen

    for step, steps, lr, record, _ in updates(
        model, rows, losses_of, config, device, config.sft_epochs, config.sft_lr
    ):
        if step % config.log_every == 0 or step == steps:
            line = f"SFT {step}/{steps}  {finite(record[0].mean().item(), step):.3f} nats an answer"
            progress(line, step == steps)


def train_dpo(model, task, ref_logps, config, device, out):
    """Minimise Eq. 7 (or another of dpo.LOSSES); returns the lines of metrics.jsonl."""
    loss_fn = dpo.LOSSES[config.loss]

    def losses_of(chosen, rejected, pair_ids):
        ref_chosen, ref_rejected = ref_logps[:, pair_ids]
        losses = loss_fn(chosen, rejected, ref_chosen, ref_rejected, beta=config.beta).losses
        if task.p is None:
            return losses
        p = task.p[pair_ids].to(device)  # an endless number of annotators, of whom p say "chosen"
        other = loss_fn(rejected, chosen, ref_rejected, ref_chosen, beta=config.beta).losses
        return p * losses + (1 - p) * other

    history, begin, seen = [], time.time(), 0
    with open(out / "metrics.jsonl", "w") as file:
        for step, steps, lr, record, pair_ids in updates(
            model, task.rows, losses_of, config, device, config.epochs, config.lr
        ):
            seen += len(pair_ids)
            evaluate = step % config.eval_every == 0 or step == steps
            if not (step == 1 or step % config.log_every == 0 or evaluate):
                continue
            losses, chosen, rejected, pull, grad_norm = record
            metrics = {"step": step, "loss": finite(losses.mean().item(), step)}
            metrics |= describe((chosen, rejected), ref_logps[:, pair_ids], config)
            metrics["loss"] = losses.mean().item()
            metrics["weight"] = -pull.mean().item() / config.beta
            metrics |= {"grad_norm": grad_norm[0].item(), "lr": lr}
            seconds = time.time() - begin
            metrics["pairs_per_second"] = seen / seconds
            if evaluate:
                metrics |= task.evaluate(model)
                metrics["gap_closed"] = task.gap_closed(metrics)
            history.append(metrics)
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            if step == 1:
                print(f"DPO step 1  loss {metrics['loss']:.4f}  (log 2: the policy still is the reference)")
            left = seconds / step * (steps - step)
            progress(progress_line(metrics, steps, left), evaluate)
    return history


def updates(model, rows, losses_of, config, device, epochs, peak_lr):
    """Take the optimiser's steps one by one, yielding (step, steps, lr, record, pair_ids) after each.

    `record` (5, B): each pair's loss, both log-probs, d loss / d chosen log-prob; the gradient norm.
    """
    kinds = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    optimizer = kinds[config.optimizer](model.parameters(), lr=peak_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    steps = round(epochs * math.ceil(len(rows) / config.batch_size))
    endless = (batch for _ in itertools.count() for batch in data.epoch(rows, config.batch_size, generator))
    for step, pair_ids in enumerate(itertools.islice(endless, steps), start=1):
        lr = peak_lr * min(1, step / max(1, config.warmup_steps))
        if config.decay:
            lr *= 1 - (step - 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        record = backward(model, rows, pair_ids, losses_of, config, device)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        yield step, steps, lr, torch.cat([record, norm.expand(1, len(pair_ids))]), pair_ids


def backward(model, rows, pair_ids, losses_of, config, device):
    """Add the gradient of the mean loss of these pairs, in micro-batches. -> record (4, B)."""
    record = []
    for micro in pair_ids.split(config.micro_batch_size or len(pair_ids)):
        batch = data.collate(rows, micro).to(device)
        with autocast(config, device):
            chosen, rejected = dpo.response_logps(model, batch)
        chosen.retain_grad()
        losses = losses_of(chosen, rejected, batch.pair_ids)
        (losses.sum() / len(pair_ids)).backward()  # of the whole batch: the last part may be short
        pull = chosen.grad * len(pair_ids)
        record.append(torch.stack([losses, chosen, rejected, pull]).detach())
    return torch.cat(record, 1)


@torch.no_grad()
def all_logps(model, rows, config, device):
    """log pi(y|x) of both answers of every row, in the order of rows: (2, n)."""
    size = config.micro_batch_size or config.batch_size
    logps = []
    for pair_ids in torch.arange(len(rows)).split(size):
        with autocast(config, device):
            logps.append(torch.stack(dpo.response_logps(model, data.collate(rows, pair_ids).to(device))))
    return torch.cat(logps, 1)


def describe(logps, ref_logps, config):
    """Means over pairs, given log-probs (2, B) of the policy and of the reference."""
    result = dpo.dpo_loss(*logps, *ref_logps, beta=config.beta)
    margin = result.chosen_rewards - result.rejected_rewards
    metrics = {
        "loss": result.losses,
        "margin": margin,
        "weight": result.weights,
        "accuracy": accuracy(margin),
        "chosen_reward": result.chosen_rewards,
        "rejected_reward": result.rejected_rewards,
        "chosen_logp": logps[0],
        "rejected_logp": logps[1],
    }
    return {key: value.mean().item() for key, value in metrics.items()}


def accuracy(margins):
    """1 where the chosen answer is ahead, 0 where it is behind; a tie counts half."""
    return (margins > 0).float() + (margins == 0).float() / 2


def finite(loss, step):
    if not math.isfinite(loss):
        raise InputError(f"step {step}: the loss is {loss}; try a smaller --lr, --sft-lr or --max-grad-norm")
    return loss


# What is printed, plotted, saved


def progress(line, keep):
    """One line that changes in place on a terminal; piped, only the lines worth keeping."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)
    elif keep:
        print(line, flush=True)


def progress_line(metrics, steps, left):
    line = "DPO {step}/{steps}  loss {loss:.4f}  margin {margin:+.3f}  weight {weight:.3f}"
    line = line.format(steps=steps, **metrics) + f"  {metrics['pairs_per_second']:.0f} pairs/s"
    if metrics.get("gap_closed") is not None:
        line += f"  gap closed {metrics['gap_closed']:.1%}"
    if "held_out_accuracy" in metrics:
        line += f"  held-out accuracy {metrics['held_out_accuracy']:.3f}"
    return f"{line}  {left:.0f} s left"


def report(summary, before, after):
    """The table, a few samples before and after, and how much of the gap is closed."""
    for title, lines in (("before", before), ("after", after)):
        print(f"\nsamples {title} DPO", *lines, sep="\n  ")
    columns = list(summary["rows"]["reference"])
    print("\n" + " " * 10 + "".join(f"{column:>{len(column) + 2}}" for column in columns))
    for name, row in summary["rows"].items():
        print(f"{name:10}" + "".join(f"{row[column]:{len(column) + 2}.4f}" for column in columns))
    if "optimum" in summary["rows"]:
        gap = "-" if summary["gap_closed"] is None else f"{summary['gap_closed']:.1%}"
        print(f"gap closed: {gap}")
    print(f"{summary['seconds']:.0f} s; see {summary['config']['out']}/")


def plot(history, rows, path):
    """curves.png: did it learn, and what did it do to rewards, log-probs and weights?"""
    fig = Figure(figsize=(11, 7), layout="constrained")
    axes = fig.subplots(2, 2)
    evaluated = [line for line in history if "gap_closed" in line]

    def curves(ax, ylabel, lines, **labels):
        for (key, label), style in zip(labels.items(), ("-", "--", ":")):
            ax.plot([m["step"] for m in lines], [m[key] for m in lines], style, label=label)
        ax.set(xlabel="DPO step", ylabel=ylabel)
        ax.legend()

    if "optimum" in rows:
        curves(axes[0, 0], "nats, or units of reward", evaluated,
               expected_reward="E[r*]", kl_to_reference="KL to reference", objective="J, Eq. 3")  # fmt: skip
        best = rows["optimum"]["objective"]
        axes[0, 0].axhline(best, color="black", lw=0.8)
        axes[0, 0].annotate("J of the exact optimum", (0, best), va="bottom", fontsize=8)
    else:
        curves(axes[0, 0], "share of pairs ranked right", evaluated, held_out_accuracy="held out")
    curves(axes[0, 1], "nats; share", history, loss="loss, Eq. 7", weight="mean gradient weight")
    axes[0, 1].axhline(math.log(2), color="black", lw=0.8)
    axes[0, 1].annotate("log 2", (0, math.log(2)), va="bottom", fontsize=8)
    curves(axes[1, 0], "implicit reward, Eq. 5", history,
           chosen_reward="chosen", rejected_reward="rejected", margin="margin")  # fmt: skip
    curves(axes[1, 1], "mean log-prob of an answer (nats)", history,
           chosen_logp="chosen", rejected_logp="rejected")  # fmt: skip
    fig.savefig(path, dpi=120)


def write(path, text):
    """Beside, then renamed: a reader never finds half a file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text + "\n")
    os.replace(beside, path)


# Settings


def parse_args(argv):
    """Flags on top of the preset, REAL with --data and TOY without. InputError if they make no sense."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: refuse(f"{message}; see --help")
    for field in dataclasses.fields(Config):
        toy, real = getattr(TOY, field.name), getattr(REAL, field.name)
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        if field.metadata["choices"]:
            kind["choices"] = field.metadata["choices"]
        default = f"{toy}" if toy == real else f"{toy}, with --data {real}"
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {default})".replace("%", "%%"), **kind,
        )  # fmt: skip
    given = vars(parser.parse_args(argv))
    config = dataclasses.replace(REAL if given.get("data") else TOY, **given)

    for useless, flag, names in (
        (config.data, "--data", ("world", "pairs", "labels")),
        (not config.data, "the toy world", ("tokenizer", "init")),
        (config.init, "--init", ("n_layer", "n_head", "n_embd")),
    ):
        for name in names:
            if useless and name in given:
                refuse(f"--{name.replace('_', '-')} has no effect with {flag}")
    positive = "pairs block_size n_layer n_head n_embd beta sft_lr lr epochs batch_size max_grad_norm"
    for name in (positive + " log_every eval_every").split():
        if not 0 < getattr(config, name) < math.inf:
            refuse(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(config, name)}")
    for name in ("sft_epochs", "warmup_steps", "micro_batch_size", "held_out"):
        if not 0 <= getattr(config, name) < math.inf:
            refuse(f"--{name.replace('_', '-')} must not be negative, got {getattr(config, name)}")
    if config.loss not in dpo.LOSSES:
        refuse(f'unknown loss "{config.loss}"; there are {", ".join(dpo.LOSSES)}')
    if config.n_embd % config.n_head:
        refuse(f"--n-embd {config.n_embd} does not divide into --n-head {config.n_head} heads")
    return config


def refuse(message):
    raise InputError(message)


def pick_device(name):
    """auto: the first of CUDA, MPS, CPU that is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there.get(name.split(":")[0]):
        refuse(f"device {name} is not available here")
    return torch.device(name)


def build_model(config, tokenizer):
    if not config.init:
        shape = (config.n_embd, config.n_layer, config.n_head)
        return GPT(GPTConfig(tokenizer.n_vocab, config.block_size, *shape))
    try:
        model = GPT.from_pretrained(config.init)
    except ValueError as error:
        raise InputError(str(error)) from None
    if model.config.vocab_size != tokenizer.n_vocab or model.config.n_positions < config.block_size:
        refuse(
            f"--init {config.init} knows {model.config.vocab_size} tokens and {model.config.n_positions} "
            f"positions; the tokenizer {tokenizer.name} has {tokenizer.n_vocab}, --block-size is "
            f"{config.block_size}"
        )
    return model


def autocast(config, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


if __name__ == "__main__":
    main()
