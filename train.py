"""SFT, the reference, DPO: the paper's pipeline, from top to bottom in `main`.

    python train.py                      the toy world, whose exact optimum is known
    python train.py --data pairs.jsonl   your own preference pairs
    python train.py --resume             continue the run in out/ after Ctrl-C or a crash

Departures from the paper: AdamW, a linear decay, clipped gradients, other learning rates.
Shapes: n pairs in all, B per step and process, b per micro-batch. Log-probs are in nats.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import runpy
import sys
import time
import warnings
import zlib
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import distributed

import data
import dpo
from model import GPT, GPTConfig, load, published_name, save, save_json, save_text

DEFAULTS = {  # flag: (in the toy world, with --data)
    "data": (None, None),
    "init": (None, None),
    "tokenizer": (None, None),  # None: gpt2 with --init, otherwise bytes
    "pairs": (100_000, 100_000),
    "held_out": (0.1, 0.1),
    "block_size": (8, 1024),
    "n_layer": (1, 4),
    "n_head": (2, 4),
    "n_embd": (32, 128),
    "loss": ("dpo", "dpo"),
    "beta": (1.0, None),  # None: the loss's own default, for DPO 0.1
    "sft_epochs": (8.0, 6.0),
    "sft_lr": (1e-2, 2e-3),
    "epochs": (6.0, 4.0),
    "lr": (1e-2, 5e-4),
    "warmup_steps": (150, 10),
    "decay": (True, True),
    "batch_size": (512, 32),
    "micro_batch_size": (512, 8),
    "optimizer": ("adamw", "adamw"),
    "max_grad_norm": (1.0, 1.0),
    "device": ("auto", "auto"),
    "dtype": ("float32", "float32"),
    "compile": (False, False),
    "evaluations": (10, 10),
    "save_every": (100, 100),
    "seed": (0, 0),
}
# --resume cannot change these: the weights, or the state of AdamW, would not fit.
FIXED = ["tokenizer", "block_size", "n_layer", "n_head", "n_embd", "optimizer"]
# --resume may change these without a warning: the checkpoint's checksum notices other pairs.
FREE = ["data", "micro_batch_size", "device", "dtype", "compile", "evaluations", "save_every"]
WRITTEN = [  # everything that a run writes into --out
    "config.json",
    "reference",
    "metrics.jsonl",
    "checkpoint.pt",
    "policy",
    "curves.png",
    "summary.json",
]
MAX_SCORED = 200  # held-out pairs per evaluation, so that evaluations stay cheap

if distributed.is_torchelastic_launched():  # torchrun starts one process per GPU
    RANK = int(os.environ["RANK"])
    PROCESSES = int(os.environ["WORLD_SIZE"])
else:
    RANK = 0
    PROCESSES = 1


@contextlib.contextmanager
def threads_restored():
    """The toy world uses one thread. Afterwards torch uses as many as before, whatever happened."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@threads_restored()
def main(argv=None):
    """Train according to the flags. Returns what summary.json holds."""
    start = time.perf_counter()
    args = parse_args(argv)
    out = Path(args.out)
    # A run is resumed from config.json, reference/, checkpoint.pt if there is one, and its pairs,
    # read or drawn again. Without a reference there is nothing to resume, and a new run begins.
    resuming = args.resume and can_resume(out)
    if not resuming:
        check_folder(args)
    device = set_up(args)
    loss_function = load_loss(args)
    beta = choose_beta(args, loss_function)

    # 1. Model and data

    world = None
    if args.data:
        tokenizer = data.get_tokenizer(args.tokenizer)
    else:
        world = data.ToyWorld()
        tokenizer = world.tokenizer
    model = build_model(args, tokenizer, resuming).to(device)
    if world:
        # The toy pairs do not exist yet: in part 3 they are drawn from the reference.
        sft_rows = world.corpus(seeded(args.seed))
    else:
        rows, held_out = load_rows(args, tokenizer, model.config.n_positions)
        sft_rows = [row._replace(rejected=[]) for row in rows]  # the chosen responses
    if args.compile:
        model.compile(dynamic=True)
    net = model  # the network that is trained: with several processes, the model inside DDP
    if PROCESSES > 1:
        net = torch.nn.parallel.DistributedDataParallel(model)
    # Only now may the folder change: creating DDP waits until every process has looked at it.
    prepare_folder(args, resuming, sft_rows)

    # 2. SFT: maximise log pi(y|x) of the corpus or, with --data, of the chosen responses

    if resuming:
        history = sft_metrics(out)
    else:
        history = []
        optimizer = make_optimizer(model, args)
        steps, batches = plan(sft_rows, args.sft_epochs, args)
        printed = evenly(steps, 10)
        for step in range(1, steps + 1):
            pair_ids = next(batches)[RANK::PROCESSES]  # this process's part of the batch
            set_learning_rate(optimizer, step, steps, args.sft_lr, args)
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            for part in micro_batches(net, pair_ids, args):
                logps, _ = pair_logps(net, sft_rows, part, args)
                part_loss = -logps.sum() / len(pair_ids)  # the parts add up to the batch's mean
                part_loss.backward()
                loss += part_loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
            metrics = means({"loss": loss, "grad_norm": grad_norm})
            stop_unless_finite(metrics, f"SFT step {step}")
            optimizer.step()
            history.append({"sft_step": step, "sft_loss": metrics["loss"]})
            line = f"SFT {step}/{steps}  loss {metrics['loss']:.3f} nats"
            progress(line, keep=step in printed)
        if RANK == 0:
            write_metrics(history, out)
            model.save_pretrained(out / "reference")

    # 3. The reference: the model as it is now, just trained or loaded. It never changes, so all
    #    that DPO needs of it, its log-probs, is computed once, here. From now on the model is the
    #    policy.

    if world:
        ref_table = world.logps(model)  # (P, Y): every response to every prompt
        drawn = world.draw_pairs(ref_table, args.pairs, seeded(args.seed + 1))
        rows = world.rows(drawn)
    else:
        ref_held_out = all_logps(model, held_out, args)  # (2, held-out pairs)
    ref_logps = all_logps(model, rows, args)  # (2, n): chosen, rejected

    def evaluate():
        if world:
            return world.measure(world.logps(model), ref_table, beta)
        return measure_held_out(all_logps(model, held_out, args), ref_held_out, beta)

    results = {"reference": evaluate()}  # before the first step, the policy is the reference

    # 4. DPO. In the first step all rewards are 0, so the loss is -log sigma(0) = log 2 = 0.6931.

    optimizer = make_optimizer(model, args)
    steps, batches = plan(rows, args.epochs, args)
    evaluated = evenly(steps, args.evaluations)
    history.append({"step": 0} | results["reference"])
    checksum = checksum_of(rows)  # to notice other pairs when the run is resumed
    done = 0
    if resuming and (out / "checkpoint.pt").exists():
        done, history = load_checkpoint(out / "checkpoint.pt", model, optimizer, checksum)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        pair_ids = next(batches)[RANK::PROCESSES]
        if step <= done:
            continue  # a resumed run skips the batches that it has seen
        set_learning_rate(optimizer, step, steps, args.lr, args)
        optimizer.zero_grad()
        logged = []
        for part in micro_batches(net, pair_ids, args):
            logps, lengths = pair_logps(net, rows, part, args)
            policy_chosen, policy_rejected = logps
            ref_chosen, ref_rejected = ref_logps[:, part]
            if args.loss == "dpo":
                losses = dpo.dpo_loss(
                    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta
                ).losses  # Eq. 7 for each pair
            else:
                losses = call_loss(loss_function, logps, ref_logps[:, part], lengths, beta)
            (losses.sum() / len(pair_ids)).backward()  # the parts add up to the batch's mean
            logged.append(torch.stack([losses, policy_chosen, policy_rejected]).detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
        metrics = measure_step(torch.cat(logged, dim=1), ref_logps[:, pair_ids], grad_norm, beta)
        stop_unless_finite(metrics, f"DPO step {step}")
        optimizer.step()

        if step in evaluated:
            metrics |= evaluate()
        history.append({"step": step, "lr": optimizer.param_groups[0]["lr"]} | metrics)
        seconds_per_step = (time.perf_counter() - began) / (step - done)
        left = (steps - step) * seconds_per_step
        line = f"DPO {step}/{steps}  {describe_step(metrics)}  {left:.0f} s left"
        progress(line, keep=step == 1 or step in evaluated)
        saving = step % args.save_every == 0
        if RANK == 0 and (saving or step in evaluated):
            write_metrics(history, out)
        if RANK == 0 and saving:
            checkpoint = {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
                "checksum": checksum,
            }
            save(checkpoint, out / "checkpoint.pt")

    # 5. Results

    results["policy"] = evaluate()  # once more, since a resumed run may have no step left
    if world:
        optimum, _ = dpo.optimal_policy(ref_table, world.rewards, beta)  # Eq. 4
        results["optimum"] = world.measure(optimum, ref_table, beta)
        tables = {"reference": ref_table, "policy": world.logps(model), "optimum": optimum}
        print_likeliest(world, tables)
    print_results(results)
    summary = {
        "config": vars(args) | {"beta": beta},  # the loss's own if --beta was not given
        "seconds": round(time.perf_counter() - start, 1),
        "gap_closed": results["policy"].get("gap_closed"),
        "rows": results,
    }
    if RANK == 0:
        model.save_pretrained(out / "policy")
        plot(history, out / "curves.png")
        save_json(summary, out / "summary.json")
    print(f"\n{summary['seconds']:.0f} s; curves.png, policy/ and reference/ are in {out}/")
    if args.data:
        print(f'sample from both: python -m experiments.sample {out} "a prompt"')
    if PROCESSES > 1:
        distributed.destroy_process_group()
    return summary


# The parts of a training step


def make_optimizer(model, args):
    """AdamW, or the paper's RMSprop. set_learning_rate chooses the learning rate at every step."""
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters())
    betas = (0.9, 0.95)  # GPT-3's: with torch's 0.999 some toy runs stay on a plateau
    return torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=0.0, fused=True)


def plan(rows, epochs, args):
    """The number of optimiser steps, and an endless stream of batches of indices into `rows`."""
    per_process = max(1, min(args.batch_size, len(rows)) // PROCESSES)
    batch_size = per_process * PROCESSES
    steps = math.ceil(epochs * len(rows) / batch_size)
    return steps, data.batches(rows, batch_size, seeded(args.seed + 2))


def set_learning_rate(optimizer, step, steps, peak, args):
    """Linear warm-up to the peak, then linear decay to almost 0 in the last step."""
    warmup = max(1, min(args.warmup_steps, steps // 10))
    if step <= warmup:
        lr = peak * (step / warmup)
    elif args.decay:
        lr = peak * ((steps - step + 1) / (steps - warmup))
    else:
        lr = peak
    for group in optimizer.param_groups:
        group["lr"] = lr


def micro_batches(net, pair_ids, args):
    """The pairs of a step in parts that fit into memory. Their gradients add up.

    With several processes, DDP averages the gradients over all processes in a backward pass. Only
    the last part of a step needs that, so we set require_backward_grad_sync, as DDP's no_sync()
    does. Without DDP nothing looks at it.
    """
    parts = pair_ids.split(args.micro_batch_size)
    for number, part in enumerate(parts, start=1):
        is_last = number == len(parts)
        net.require_backward_grad_sync = is_last
        yield part


def pair_logps(net, rows, pair_ids, args):
    """log pi(y|x) of the pairs `pair_ids` (b,), and the lengths of their responses.

    Both are (2, b), chosen first. Rows of SFT have no rejected response: (1, b).
    """
    tokens, mask = data.collate(rows, pair_ids.tolist())
    with torch.autocast(net.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        # The mask stays on the CPU: a mask on a GPU would make the program wait for the GPU.
        logps = dpo.response_logps(net, tokens.to(net.device), mask)
    lengths = mask.sum(1).to(net.device)
    return logps.view(-1, len(pair_ids)), lengths.view(-1, len(pair_ids))


@torch.no_grad()
def all_logps(model, rows, args):
    """log pi(y|x) of both responses of every row: (2, n). The processes share the work."""
    logps = torch.zeros(2, len(rows), device=model.device)
    mine = torch.arange(len(rows))[RANK::PROCESSES]
    for first in range(0, len(mine), args.micro_batch_size):
        part = mine[first : first + args.micro_batch_size]
        part_logps, _ = pair_logps(model, rows, part, args)
        logps[:, part] = part_logps
    if PROCESSES > 1:
        distributed.all_reduce(logps)  # a sum: the other processes hold zeros
    return logps


def call_loss(loss_function, policy_logps, ref_logps, lengths, beta):
    """The losses (b,) of some pairs. Log-probs and lengths are (2, b), chosen first.

    The loss gets the four log-probs, and beta, chosen_lengths and rejected_lengths if it has
    parameters with these names.
    """
    policy_chosen, policy_rejected = policy_logps
    ref_chosen, ref_rejected = ref_logps
    offered = {"beta": beta, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    parameters = inspect.signature(loss_function).parameters
    passed = {name: value for name, value in offered.items() if name in parameters}
    losses = loss_function(policy_chosen, policy_rejected, ref_chosen, ref_rejected, **passed)
    if isinstance(losses, tuple):  # such as dpo.DPOLoss
        losses = losses[0]
    assert losses.shape == policy_chosen.shape, f"not one loss for each pair: {losses}"
    return losses


def measure_step(logged, ref_logps, grad_norm, beta):
    """The mean metrics of a step. logged (3, B): losses, policy_chosen, policy_rejected."""
    losses, policy_chosen, policy_rejected = logged
    ref_chosen, ref_rejected = ref_logps
    columns = dpo.describe(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    columns["loss"] = losses  # from --loss; the other columns are always DPO's
    columns["grad_norm"] = grad_norm
    return means(columns)


def means(columns):
    """{name: (B,) or ()} -> {name: the mean over the pairs of all processes}."""
    values = torch.stack([column.mean() for column in columns.values()])
    if PROCESSES > 1:
        distributed.all_reduce(values)
    return dict(zip(columns, (values / PROCESSES).tolist()))


def stop_unless_finite(metrics, where):
    """InputError if the loss or the gradient is not finite, so that no step ruins the weights."""
    loss = metrics["loss"]
    grad_norm = metrics["grad_norm"]
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        why = f"the loss is {loss}, the gradient norm {grad_norm}"
        raise data.InputError(f"{where}: {why}; try a lower learning rate")


def evenly(steps, n):
    """n evenly spread step numbers from 1 to `steps`, the last included; all if steps < n."""
    return {math.ceil(steps * k / n) for k in range(1, n + 1)}


def measure_held_out(logps, ref_logps, beta):
    """The mean metrics of held-out pairs, whose log-probs are (2, n); {} if there are none."""
    if logps.numel() == 0:
        return {}
    metrics = dpo.describe(*logps, *ref_logps, beta=beta)
    names = ["loss", "accuracy", "margin", "chosen_logp", "rejected_logp"]
    return {f"held_out_{name}": metrics[name].mean().item() for name in names}


# What goes in


def seeded(seed):
    """Corpus and split use --seed, the toy pairs --seed + 1, the order of batches --seed + 2."""
    return torch.Generator().manual_seed(seed)


def checksum_of(rows):
    checksum = 0
    for row in rows:
        checksum = zlib.crc32(repr(row).encode(), checksum)
    return checksum


def load_rows(args, tokenizer, n_positions):
    """The pairs of --data as two lists of TokenPair: to train on, and held out."""
    pairs = data.load_pairs(args.data)
    block_size = min(args.block_size, n_positions)
    rows = data.encode_pairs(pairs, tokenizer, block_size)  # drops pairs that do not fit
    generator = seeded(args.seed)
    rows, held_out = data.split(rows, args.held_out, generator)
    scored = torch.randperm(len(held_out), generator=generator)[:MAX_SCORED]
    print(f"{len(rows)} pairs to train on, {len(held_out)} held out, {len(scored)} of them scored")
    return rows, [held_out[i] for i in scored]


def build_model(args, tokenizer, resuming=False):
    """The run's reference if it is resumed, else the GPT that --init names, else a new one.

    InputError if it was made for another tokenizer.
    """
    torch.manual_seed(args.seed)
    if resuming:
        source = Path(args.out) / "reference"
        model = GPT.from_pretrained(source)
    elif args.init:
        source = f"--init {args.init}"
        model = GPT.from_pretrained(args.init)
    else:
        source = "a new model"
        config = GPTConfig(
            vocab_size=tokenizer.n_vocab,
            n_positions=args.block_size,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
        )
        model = GPT(config)
    if model.config.vocab_size != tokenizer.n_vocab:
        sizes = f"{model.config.vocab_size} tokens, but the tokenizer has {tokenizer.n_vocab}"
        raise data.InputError(f"{source} has a vocabulary of {sizes}")
    if args.init and not resuming:
        data.check_tokenizer(args.init, model.config, tokenizer)
    model.config.eos_token_id = tokenizer.eot_token  # saved, so that sampling knows where to stop
    return model


def load_loss(args):
    """The function that --loss names: one of dpo.LOSSES, or file.py:function."""
    path, _, name = args.loss.rpartition(":")
    if path:
        found = runpy.run_path(path)
        functions = {key: value for key, value in found.items() if inspect.isfunction(value)}
    else:
        functions = dpo.LOSSES
    if name not in functions:
        known = ", ".join(functions)
        raise data.InputError(f"--loss {args.loss}: choose one of {known}, or file.py:function")
    return functions[name]


def choose_beta(args, loss_function):
    """--beta, or else the loss's own default, or else the paper's 0.1."""
    parameter = inspect.signature(loss_function).parameters.get("beta")
    toy, real = DEFAULTS["beta"]
    default = real if args.data else toy
    if parameter is None and args.beta != default:
        warnings.warn(f"--loss {args.loss} takes no beta: --beta only scales the logged rewards")
    if args.beta is not None:
        return args.beta
    if parameter is not None and isinstance(parameter.default, (int, float)):
        return parameter.default
    return 0.1


def load_checkpoint(path, model, optimizer, checksum):
    """Continue from a checkpoint. Returns its last step and the history up to there."""
    checkpoint = load(path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["checksum"] != checksum:
        warnings.warn(f"--resume: these are not the pairs that {path} was trained on")
    return checkpoint["step"], checkpoint["history"]


# The command line


def parse_args(argv=None):
    """The flags as a Namespace. With --resume the settings of the run in --out are the defaults."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="SFT, the reference, DPO: in the toy world, or on your own pairs with --data.",
        allow_abbrev=False,
    )

    def add(flag, help, **options):  # a flag that is not given is None at first
        toy, real = DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        default = f"{toy}; {real} with --data"
        if toy == real:
            default = toy
        parser.add_argument(flag, help=f"{help} (default: {default})", default=None, **options)

    positive = number(float, low=sys.float_info.min)
    at_least_1 = number(int, low=1)
    at_least_0 = number(int, low=0)
    add("--data", "file of preference pairs; without it, the toy world", type=not_empty)
    add("--init", "start from gpt2, gpt2-medium, ... or from a folder", type=not_empty)
    add("--tokenizer", "bytes, or a tiktoken name; if not given, gpt2 with --init, else bytes")
    add("--pairs", "pairs drawn in the toy world", type=at_least_1)
    add("--held-out", "fraction of the prompts to hold out", type=number(float, low=0, high=1))
    add("--block-size", "longest prompt plus response, in tokens", type=at_least_1)
    add("--n-layer", "layers", type=at_least_1)
    add("--n-head", "attention heads", type=at_least_1)
    add("--n-embd", "width", type=at_least_1)
    add("--loss", f"{', '.join(dpo.LOSSES)}, or file.py:function")
    add("--beta", "strength of the KL penalty; None: the loss's own default", type=positive)
    add("--sft-epochs", "epochs of SFT, 0 for none", type=number(float, low=0))
    add("--sft-lr", "peak learning rate of SFT", type=positive)
    add("--epochs", "epochs of DPO", type=positive)
    add("--lr", "peak learning rate of DPO", type=positive)
    add("--warmup-steps", "warm-up steps, at most a tenth of all steps", type=at_least_0)
    yes_or_no = argparse.BooleanOptionalAction
    add("--decay", "decay the learning rate after the warm-up", action=yes_or_no)
    add("--batch-size", "pairs per optimiser step", type=at_least_1)
    add("--micro-batch-size", "pairs in memory at once", type=at_least_1)
    add("--optimizer", "rmsprop is the paper's", choices=["adamw", "rmsprop"])
    add("--max-grad-norm", "clip gradients to this norm", type=positive)
    add("--device", "auto: the accelerator if there is one, otherwise the CPU")
    help = "precision of matrix products; on CUDA, float32 means TF32"
    add("--dtype", help, choices=["float32", "bfloat16"])
    add("--compile", "use torch.compile", action=yes_or_no)
    add("--evaluations", "evaluations in a run, evenly spread", type=at_least_1)
    add("--save-every", "steps between checkpoints", type=at_least_1)
    add("--seed", "seed for weights, corpus, pairs and their order", type=at_least_0)
    help = "folder for everything that is written (default: out)"
    parser.add_argument("--out", help=help, default="out", type=not_empty)
    help = "continue the run in --out with its own settings"
    parser.add_argument("--resume", help=help, action="store_true")
    args = parser.parse_args(argv)

    stored = {}
    if args.resume:
        stored = read_config(Path(args.out))
    if args.data and stored and stored.get("data") is None:  # of the toy world
        if can_resume(Path(args.out)):
            parser.error(f"--resume: the run in {args.out} is in the toy world, without --data")
        stored = {}  # it stopped before it had a reference: nothing of it is used
    if args.data is None:
        args.data = stored.get("data")
    changed = {}
    for name, (toy, real) in DEFAULTS.items():
        default = real if args.data else toy
        default = stored.get(name, default)
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default)
        elif given != default:
            changed[name] = default
    if stored and can_resume(Path(args.out)):
        report_changes(changed, args, parser)
    if args.tokenizer is None:
        args.tokenizer = "gpt2" if args.init else "bytes"
    if args.n_embd % args.n_head != 0:
        parser.error(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    return args


def number(kind, low, high=1e99):
    """For argparse: a function that reads a number and checks that it lies from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid float value"
    return parse


def not_empty(text):
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def report_changes(changed, args, parser):
    """Stop or warn if flags differ from those of the run: `changed` maps them to its own values."""
    for name in FIXED:
        if name in changed:
            flag = f"--{name.replace('_', '-')} {changed[name]}"
            parser.error(f"--resume: the run in {args.out} has {flag}, which cannot change")
    named = [f"{name} (was {value})" for name, value in changed.items() if name not in FREE]
    if named:
        warnings.warn(f"--resume changes settings of the run in {args.out}: {', '.join(named)}")


# The folder, the machine


def read_config(out):
    """The settings of the run in this folder; {} if train.py has written none."""
    try:
        settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(settings, dict) and settings.get("made_by") == "train.py":
        return settings
    return {}


def can_resume(out):
    """Is there a run with a complete reference? In reference/, config.json is written last."""
    return bool(read_config(out)) and (out / "reference" / "config.json").exists()


def check_folder(args):
    """InputError if a new run would overwrite a run on pairs, or what train.py has not written."""
    out = Path(args.out)
    if args.init and published_name(args.init) is None:  # a folder
        if Path(args.init).resolve().is_relative_to(out.resolve()):
            raise data.InputError(f"--out {out} holds --init {args.init}: choose another --out")
    run = read_config(out)
    if run.get("data") and can_resume(out):
        why = "holds a run on pairs: choose another --out, or --resume it if it was stopped"
        raise data.InputError(f"{out} {why}")
    if not run:
        for name in WRITTEN:
            if (out / name).exists():
                why = "was not written by train.py"
                raise data.InputError(f"{out / name} {why}: choose another --out")


def prepare_folder(args, resuming, rows):
    """Create --out and write the settings. A new run first removes an older one's results."""
    if RANK > 0:
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not resuming:
        (out / "reference" / "config.json").unlink(missing_ok=True)
        (out / "policy" / "config.json").unlink(missing_ok=True)
        for name in ["checkpoint.pt", "metrics.jsonl", "curves.png", "summary.json"]:
            (out / name).unlink(missing_ok=True)
    if args.resume and not resuming:
        print(f"nothing to resume: beginning a new run in {out}")
    # Trained on dialogues, a model wants to be asked in their form: see experiments/sample.py.
    dialogues = all(row.text.endswith(data.ROLES["assistant"]) for row in rows)
    settings = vars(args) | {"dialogues": dialogues, "made_by": "train.py"}
    save_json(settings, out / "config.json")


def set_up(args):
    """Join the other processes, choose the device, print the settings."""
    launched = os.environ.get("WORLD_SIZE") or "1"  # torchrun sets it, and so do other launchers
    if PROCESSES == 1 and launched != "1":
        raise data.InputError(
            f"WORLD_SIZE is {launched}, but this is not torchrun: launch several processes with "
            f"torchrun --nproc_per_node={launched} train.py ..."
        )
    device = choose_device(args)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    if PROCESSES > 1:
        distributed.init_process_group()
    if RANK > 0:  # one process speaks for all
        warnings.simplefilter("ignore")
    if RANK > 0 or sys.stdout is None:  # None: it is closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if not args.data:
        torch.set_num_threads(1)  # more threads gain little, and wait while the machine is busy
    print(*[f"{name}={value}" for name, value in vars(args).items()])
    return device


def choose_device(args):
    """--device, or the accelerator if there is one. InputError if torch cannot use it here."""
    try:
        if args.device != "auto":
            device = torch.device(args.device)
        elif torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        else:
            device = torch.device("cpu")
        if device.type == "cuda" and PROCESSES > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)  # raises if there is no such device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        why = f"cannot be used here: {reason:.100}"
        raise data.InputError(f"--device {args.device} {why}") from error
    return device


# What comes out


def progress(line, keep):
    """On a terminal, a line that changes in place. Elsewhere only lines to keep are printed."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="", flush=True)
        if keep:
            print()
    elif keep:
        print(line, flush=True)


def describe_step(metrics):
    names = ["loss", "margin", "weight", "gap_closed", "held_out_accuracy"]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)


def write_metrics(history, out):
    """metrics.jsonl: one JSON object per step, those of SFT first."""
    lines = [json.dumps(line) + "\n" for line in history]
    save_text("".join(lines), out / "metrics.jsonl")


def sft_metrics(out):
    """The lines of SFT in the metrics.jsonl of the run in `out`."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "sft_step" in line]


def print_likeliest(world, tables):
    """For each prompt, the likeliest responses under the optimum. tables: {name: log pi (P, Y)}."""
    for x, prompt in enumerate(world.prompts):
        print(f"\n{prompt.strip():20}     r*", *tables.keys(), sep="  ")
        for y in tables["optimum"][x].topk(6).indices:
            cells = [f"  {world.responses[y]:18} {world.rewards[x, y]:+6.2f}"]
            for name, table in tables.items():
                cells.append(f"{table[x, y].exp():{len(name)}.4f}")
            print(*cells, sep="  ")


def print_results(results):
    """One row per policy, the numbers aligned under their headings."""
    columns = list(results["reference"])
    if not columns:
        return  # no pair is held out
    widths = {column: max(len(column), 8) for column in columns}
    print()
    print(" " * 9, *[f"{column:>{widths[column]}}" for column in columns], sep="  ")
    for name, row in results.items():
        print(f"{name:9}", *[f"{row[column]:{widths[column]}.4f}" for column in columns], sep="  ")


def plot(history, path):
    """curves.png: a panel for each group of metrics that the history has."""
    panels = {
        "SFT loss, nats": ["sft_loss"],
        "reward, nats": ["expected_reward", "kl", "objective"],
        "gap closed": ["gap_closed"],
        "held-out loss, nats": ["held_out_loss"],
        "held-out accuracy": ["held_out_accuracy"],
        "loss in nats; mean weight": ["loss", "weight"],
        "implicit reward (Eq. 5)": ["chosen_reward", "rejected_reward", "margin"],
        "log-prob of a response, nats": ["chosen_logp", "rejected_logp"],
    }
    logged = set().union(*history)  # the names of all metrics
    shown = [label for label, names in panels.items() if names[0] in logged]
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax in axes[len(shown) :]:
        ax.remove()
    for ax, label in zip(axes, shown):
        ax.set(xlabel="DPO step", ylabel=label)
        for name in panels[label]:
            lines = [line for line in history if name in line]
            values = [line[name] for line in lines]
            if name == "sft_loss":
                steps = [line["sft_step"] for line in lines]
                ax.set_xlabel("SFT step")
            else:
                steps = [line["step"] for line in lines]
            ax.plot(steps, values, label=name.replace("_", " "))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)  # above
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    warnings.formatwarning = data.short_warning
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # print "?" for what the terminal cannot show
    try:
        main()
    except (data.InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if can_resume(Path(parse_args().out)):
            print("\ninterrupted: the same command with --resume continues", file=sys.stderr)
        else:
            print("\ninterrupted; there is nothing to resume yet", file=sys.stderr)
        sys.exit(130)
