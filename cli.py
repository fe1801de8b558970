"""The command line of train.py: its flags and presets, the loss by name, and what a run shows."""

import argparse
import importlib.util
import inspect
import json
import math
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import data
import dpo


def knob(default, help, *choices):
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Every setting is a flag: sft_lr is --sft-lr. The defaults are the toy world's."""

    data: str = knob("", "file of JSON lines with prompt, chosen, rejected; else the toy world")
    world: str = knob("default", "size of the toy world", "default", "small")
    pairs: int = knob(100_000, "preference pairs drawn in the toy world")
    labels: str = knob("hard", "who calls a pair's winner", "hard", "soft", "deterministic")
    held_out: float = knob(0.1, "held-out pairs, as a share of the pairs")
    tokenizer: str = knob("auto", "auto (gpt2 with --init, else bytes), or a tiktoken name")
    init: str = knob("", "start from gpt2, gpt2-medium, ... or from a folder in that format")
    block_size: int = knob(8, "longest prompt plus answer, in tokens")
    n_layer: int = knob(1, "layers")
    n_head: int = knob(2, "attention heads")
    n_embd: int = knob(32, "width")
    loss: str = knob("dpo", f"{', '.join(dpo.LOSSES)}, or file.py:function of the same four sums")
    beta: float = knob(1.0, "strength of the leash to the reference")
    epsilon: float = knob(None, "share of wrong labels that cdpo and robust allow for")
    alpha: float = knob(None, "weight of a loss's second term")
    gamma: float = knob(None, "margin that simpo_loss asks for")
    sft_epochs: float = knob(20.0, "passes over the SFT corpus or the chosen answers; 0 for none")
    sft_lr: float = knob(1e-2, "learning rate of SFT")
    epochs: float = knob(12.0, "passes over the pairs")
    lr: float = knob(1e-2, "learning rate of DPO")
    warmup_steps: int = knob(150, "steps of linear warm-up, at most a tenth of the run")
    decay: bool = knob(True, "let the learning rate fall linearly to 0 afterwards")
    batch_size: int = knob(512, "pairs in an update")
    micro_batch_size: int = knob(0, "pairs in memory at once, gradients add up; 0: the batch")
    optimizer: str = knob("adamw", "rmsprop is the paper's", "adamw", "rmsprop")
    max_grad_norm: float = knob(1.0, "longer gradients are cut to this length")
    device: str = knob("auto", "auto is cuda, else mps, else cpu", "auto", "cuda", "mps", "cpu")
    dtype: str = knob("float32", "of the matrix products", "float32", "bfloat16")
    compile: bool = knob(False, "use torch.compile: the first steps take long, the rest less")
    log_every: int = knob(10, "steps between lines of metrics.jsonl")
    eval_every: int = knob(100, "steps between evaluations")
    save_every: int = knob(500, "steps between checkpoints, to be resumed from")
    resume: bool = knob(False, "go on with the run in --out, whose settings hold")
    show: int = knob(0, "show this training pair as the model gets it, counted from 1, and stop")
    seed: int = knob(0, "of weights, corpus, pairs, labels and order; the world is fixed")
    out: str = knob("out", "folder for everything that is written")


TOY = Config()
REAL = replace(TOY, block_size=1024, n_layer=4, n_head=4, n_embd=128, sft_epochs=6.0, sft_lr=2e-3,
               beta=None, epochs=4.0, lr=5e-4, warmup_steps=10, batch_size=32, micro_batch_size=8,
               log_every=1, eval_every=20, save_every=100)  # fmt: skip
SETTINGS = "beta", "epsilon", "alpha", "gamma"  # of a loss; None is its own default
ABOUT = "DPO on a toy world whose optimum is known, or with --data on preference pairs of your own."
MAY_BE_0 = "sft_epochs", "warmup_steps", "micro_batch_size", "seed", "show", *SETTINGS[1:]


def parse_args(argv):
    """The flags on top of REAL with --data, of TOY without. InputError if they make no sense."""
    parser = argparse.ArgumentParser("train.py", description=ABOUT, allow_abbrev=False)
    parser.error = lambda message: refuse(f"{message}; see --help")
    flags = {setting.name: "--" + setting.name.replace("_", "-") for setting in fields(Config)}
    for setting in fields(Config):
        toy, real = (getattr(preset, setting.name) for preset in (TOY, REAL))
        defaults = f"{toy}; with --data {real}".replace("None", "the loss's own")
        help = f"{setting.metadata['help']} (default: {defaults})"
        typed = {"type": setting.type, "choices": setting.metadata["choices"]}
        kind = {"action": argparse.BooleanOptionalAction} if setting.type is bool else typed
        parser.add_argument(flags[setting.name], default=argparse.SUPPRESS, help=help, **kind)
    given = vars(parser.parse_args(argv))
    resumed = given.pop("resume", False)
    config = resume(given) if resumed else replace(REAL if given.get("data") else TOY, **given)
    dead = {"world", "pairs", "labels"} if config.data else {"tokenizer", "init", "block_size"}
    dead |= {"n_layer", "n_head", "n_embd"} if config.init else set()
    for name in dead & set(given):
        refuse(f"{flags[name]} has no effect {'here' if config.data else 'without --data'}")
    for setting in fields(Config):
        value, may_be_0 = given.get(setting.name, 1), setting.name in MAY_BE_0
        limit = {int: 2**40, float: math.inf}.get(setting.type)
        if limit and not (0 < value < limit or (value == 0 and may_be_0)):
            least = "0 or over" if may_be_0 else "over 0"
            refuse(f"{flags[setting.name]} must be {least}, and below {limit}")
    if given.get("data") == "":
        refuse("--data is empty; without it the toy world is trained on")
    if config.init and Path(config.out).resolve() in Path(config.init).resolve().parents:
        refuse(f"--init {config.init} lies in --out {config.out}, and a new run would remove it")
    config = resolve_loss(config, given)
    if config.n_embd % config.n_head:
        refuse(f"--n-embd {config.n_embd} does not divide into --n-head {config.n_head}")
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    device = [*there, "cpu"][0] if config.device == "auto" else config.device
    if device not in [*there, "cpu"]:
        refuse(f"--device {device} is not available here")
    auto = "toy" if not config.data else "gpt2" if config.init else "bytes"
    tokenizer = auto if config.tokenizer == "auto" else config.tokenizer
    return replace(config, device=device, tokenizer=tokenizer)


def resume(given):
    """The settings of the run in --out, which may go on upon another device; InputError where there
    is none or a flag says otherwise."""
    path = Path(given.pop("out", TOY.out)) / "config.json"
    if not path.exists():
        refuse(f"--resume: there is no run in {path.parent}")
    try:
        settings = json.loads(path.read_text())
        config = Config(**{name: value for name, value in settings.items() if name != "mark"})
    except (ValueError, TypeError, AttributeError) as error:
        refuse(f"--resume: {path} does not hold the settings of a run ({error})")
    for name, value in given.items():
        if name != "device" and value not in ("auto", getattr(config, name)):
            refuse(f"--resume: that run was begun with {name}={getattr(config, name)}, not {value}")
    device = given.get("device", "auto")
    return replace(config, resume=True, out=str(path.parent), device=device)


def resolve_loss(config, given):
    """Try the loss, so that it fails now and not after SFT; fill in its own defaults."""
    try:
        loss = load_loss(config.loss)
        for B in (1, 2, 3, min(config.micro_batch_size or config.batch_size, 4096)):
            logps = torch.full((2, B), -1.0, requires_grad=True)
            losses = call_loss(loss, config, logps, logps.detach(), torch.ones(2, B))
            if losses.shape != (B,):
                raise ValueError(f"must return one loss for each pair, (B,), not {losses}")
            (grad,) = torch.autograd.grad(losses.sum(), logps)
            if not (losses.isfinite() & grad.isfinite()).all():
                raise ValueError("loss or gradient not finite where policy == reference")
        named = inspect.signature(loss).parameters
        for name in SETTINGS:
            if name in named and getattr(config, name) is None:
                config = replace(config, **{name: float(named[name].default)})
        if config.beta is not None and not config.beta > 0:
            raise ValueError(f"its beta is {config.beta} and must be over 0")
    except (Exception, SystemExit) as error:  # whatever a student's file does
        if isinstance(error, data.InputError):
            raise
        refuse(f"--loss {config.loss}: {type(error).__name__}, {error}".replace("\n", " "))
    for name in SETTINGS:
        if name in given and name not in named:
            refuse(f"--{name} has no effect on --loss {config.loss}")
    return config if config.beta else replace(config, beta=0.1)  # of the rewards that are logged


def refuse(message):
    raise data.InputError(message)


@contextmanager
def ctrl_c():
    """A list that is no longer empty after Ctrl-C or a kill, so that the step is finished first."""
    interrupted = []
    handlers = {sort: signal.getsignal(sort) for sort in (signal.SIGINT, signal.SIGTERM)}
    for sort in handlers:
        signal.signal(sort, lambda *_: interrupted.append(True))
    try:
        yield interrupted
    finally:
        for sort, handler in handlers.items():
            signal.signal(sort, handler)


# The loss by name


def load_loss(name):
    """A name in dpo.LOSSES, or file.py:function for any function of the same four sums."""
    if name in dpo.LOSSES:
        return dpo.LOSSES[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        refuse(f"--loss {name}: there are {', '.join(dpo.LOSSES)}, or file.py:function")
    spec = importlib.util.spec_from_file_location("loss_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def call_loss(loss, config, policy_logps, ref_logps, lengths):
    """The losses (B,) of pairs, from three (2, B): chosen and rejected. A loss is passed the four
    sums and, if its signature names them, SETTINGS and both lengths, in tokens."""
    known = {key: getattr(config, key) for key in SETTINGS if getattr(config, key) is not None}
    known |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    named = known.keys() & inspect.signature(loss).parameters.keys()
    result = loss(*policy_logps, *ref_logps, **{key: known[key] for key in named})
    return getattr(result, "losses", result)  # a tensor, or a NamedTuple such as DPOLoss


# What a run shows


def means(columns):
    return {name: column.mean().item() for name, column in columns.items()}


def progress(line, keep):
    """One line that changes in place on a terminal; piped, only the lines worth keeping."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)
    elif keep:
        print(line, flush=True)


def measure(record, ref_logps, beta):
    """A step's means over its pairs. The weight is that of the loss in use, by autograd; for DPO
    it is sigma(r_rejected - r_chosen)."""
    metrics = dpo.describe(record["chosen_logp"], record["rejected_logp"], *ref_logps, beta=beta)
    metrics |= {"loss": record["loss"], "weight": -record["chosen_grad"] / beta}
    return means(metrics | {"grad_norm": record["grad_norm"]}) | {"lr": record["lr"]}


def check_finite(step, losses, grad_norm, pair_ids, lr, config):
    finite = losses.isfinite().cpu()
    if not (finite.all() and grad_norm.isfinite()):
        bad = pair_ids if finite.all() else pair_ids[~finite]
        pairs = ", ".join(str(i + 1) for i in bad[:5].tolist()) + ", ..." * (len(bad) > 5)
        where = f"step {step}: the loss or gradient of pairs {pairs} is not finite"
        refuse(f"{where}; is learning rate {lr} too large?" + " See --show." * bool(config.data))


def describe_step(metrics, steps, seconds_left):
    """A line of metrics.jsonl for people."""
    step = metrics["step"]
    shown = "loss", "margin", "weight", "gap_closed", "held_out_accuracy"
    line = [f"{key} {metrics[key]:.4f}" for key in shown if key in metrics]
    pace = f"{metrics['pairs_per_second']:.0f} pairs/s", f"{seconds_left:.0f} s left"
    return "  ".join([f"DPO {step}/{steps}", *line, *pace])


def samples(model, task, seed):
    """Each of the task's prompts with an answer; the same policy gives the same answers."""
    torch.manual_seed(seed)
    lines = []
    for prompt in task.prompts:
        ids = torch.tensor([prompt], device=model.device)
        ids = model.generate(ids, task.max_answer, task.temperature, None, task.tokenizer.eot_token)
        lines.append(task.tokenizer.decode(ids[0].tolist()).strip())
    return lines


def report(summary, before, after):
    print("\nsamples before DPO:", *before, "\nsamples after DPO:", *after, sep="\n")
    columns = list(summary["rows"]["reference"])
    print("\n" + " " * 9, *columns, sep="  ")
    for name, row in summary["rows"].items():
        print(f"{name:9}", *(f"{row[column]:{len(column)}.4f}" for column in columns), sep="  ")
    gap = "-" if summary["gap_closed"] is None else f"{summary['gap_closed']:.1%}"
    print(f"gap closed: {gap}\n{summary['seconds']:.0f} s; see {summary['config']['out']}/")


def plot(history, results, path):
    """curves.png: did it learn, and what did it do to the loss, the rewards and the log-probs?"""
    panels = {
        "reward; KL in nats": ("expected_reward", "kl_to_reference", "objective"),
        "held-out pairs: nats; share": ("held_out_loss", "held_out_accuracy"),
        "nats; mean gradient weight": ("loss", "weight"),
        "implicit reward (Eq. 5)": ("chosen_reward", "rejected_reward", "margin"),
        "log-prob of an answer, nats": ("chosen_logp", "rejected_logp"),
    }
    panels = [(ylabel, keys) for ylabel, keys in panels.items() if keys[0] in history[-1]]
    fig = Figure(figsize=(11, 7), layout="constrained")
    for ax, (ylabel, keys) in zip(fig.subplots(2, 2).flat, panels):
        lines = [line for line in history if keys[0] in line]
        for key, style in zip(keys, ("-", "--", ":")):
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            ax.plot(steps, values, style, label=key.replace("_", " "))
        if "objective" in keys:
            ax.axhline(results["optimum"]["objective"], color="black", label="objective of pi*")
        ax.set(xlabel="DPO step", ylabel=ylabel)
        ax.legend()
    fig.savefig(path, dpi=120)


def show(task, model, number):
    """Print a pair as the model gets it: each place with its token, the places that it may look
    at, and the answer tokens whose log-probs are read there."""
    if not task.config.data:
        task.use_reference(model)  # the toy's pairs are drawn from it, here untrained
    if number > len(task.rows):
        refuse(f"--show {number}: there are {len(task.rows)} pairs")
    longest = max(range(len(task.rows)), key=lambda i: sum(map(len, task.rows[i])))
    batch = data.collate(task.rows, [number - 1, longest])  # the other one, so that this is padded
    scored = {}
    for row, target, owner in zip(*(column.tolist() for column in batch[4:7])):
        side = {0: "chosen", 2: "rejected"}.get(owner)
        if side:
            token = task.tokenizer.decode([target])
            scored.setdefault(batch.score_at[row].item(), []).append(f"{side} {token!r}")
    print("place  position  token             looks at         scored here")
    for place, token in enumerate(task.tokenizer.decode([i]) for i in batch.ids[0].tolist()):
        position, scores = batch.positions[0, place].item(), ", ".join(scored.get(place, []))
        if place and position == 0:
            print(f"{place:5}  padding from here to {batch.ids.shape[1] - 1}")
            break
        seen = batch.mask[0, place].nonzero().flatten().numpy()
        runs = np.split(seen, np.flatnonzero(np.diff(seen) > 1) + 1)
        looks_at = ", ".join(f"{run[0]}-{run[-1]}" for run in runs)
        print(f"{place:5}  {position:8}  {token!r:16}  {looks_at:15}  {scores}".rstrip())
