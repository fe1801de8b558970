"""SFT, the reference, DPO: the paper's pipeline, from top to bottom in `main`.

    python train.py                      the toy world, whose exact optimum is known
    python train.py --data pairs.jsonl   your own preference pairs
    python train.py --resume             continue the run in out/ after Ctrl-C or a crash

Departures from the paper: AdamW, a linear decay, clipped gradients, other step sizes (see README).
Shapes: n pairs in all, B in a step of this process, b in a micro-batch. Log-probs are in nats.
"""

import argparse
import inspect
import json
import math
import os
import runpy
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import distributed

import data
import dpo
from model import GPT, GPTConfig, load, os_error, save, save_json

REAL = dict(  # the defaults with --data; the toy world's are in parse_args
    block_size=1024, n_layer=4, n_head=4, n_embd=128, beta=None, sft_epochs=6.0, sft_lr=2e-3,
    epochs=4.0, lr=5e-4, warmup_steps=10, batch_size=32, micro_batch_size=8, eval_every=None,
)  # fmt: skip
OPTIMIZERS = {  # the betas are GPT-3's: with torch's 0.999 some toy runs stay on a plateau
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    "rmsprop": torch.optim.RMSprop,  # the paper's
}
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # else RANK and WORLD_SIZE are leftovers
RANK, PROCESSES = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if TORCHRUN else (0, 1)


def main(argv=None):
    """Train as the flags say. Returns what summary.json holds."""
    args, start = parse_args(argv), time.perf_counter()
    device, out = set_up(args), Path(args.out)
    loss = load_loss(args)  # dpo.dpo_loss, Eq. 7, unless --loss
    beta = args.beta or 0.1  # for the logged rewards
    world = None if args.data else data.ToyWorld()
    tokenizer = world.tokenizer if world else data.get_tokenizer(args.tokenizer)
    pairs = data.load_pairs(args.data) if args.data else []
    model = build_model(args, tokenizer).to(device)
    seeded = torch.Generator().manual_seed
    if world:
        corpus, rows, held_out = world.corpus(seeded(args.seed)), [], []
    else:
        size = min(args.block_size, model.config.n_positions)
        sides = data.split(pairs, args.held_out, seeded(args.seed))
        rows, held_out = (data.encode_pairs(x, tokenizer, size) if x else [] for x in sides)
        corpus = [row._replace(rejected=[]) for row in rows]
    if args.compile:
        model.compile(dynamic=True)
        with os_error("--compile"):  # where there is no compiler, torch says so in a hundred lines
            all_logps(model, (rows or corpus)[:1], args)
    claim(out, args, rows + held_out)
    net = torch.nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model

    def score():  # log pi of every response in the toy world, (P, Y), else of the held-out, (2, n)
        return world.logps(model) if world else all_logps(model, held_out, args)

    def evaluate(logps):
        if world:
            row = world.measure(logps, table, beta)
            if args.labels == "deterministic":  # Eq. 7 then has no optimum, and no gap to it
                del row["gap_closed"]
            return row
        metrics = dpo.describe(*logps, *table, beta=beta)
        names = "loss", "accuracy", "margin", "chosen_logp", "rejected_logp"
        return means({f"held_out_{name}": metrics[name] for name in names}) if held_out else {}

    # SFT: maximise log pi(y|x) of the corpus or, with --data, of the chosen responses
    if args.resume and (out / "reference" / "config.json").exists():
        model.load_state_dict(GPT.from_pretrained(out / "reference").state_dict())
    else:
        optimizer = OPTIMIZERS[args.optimizer](model.parameters())
        for step, steps, lr, ids in schedule(corpus, args.sft_epochs, args.sft_lr, args):
            losses, _, norm = update(net, optimizer, lr, args, corpus, ids, lambda y: -y)
            mean = means({"loss": losses, "grad_norm": norm})["loss"]
            progress(f"SFT {step}/{steps}  loss {mean:.3f} nats", step == steps)
        means({"logps": all_logps(model, corpus[:9], args)})  # did the last step ruin the model?
        if RANK == 0:
            model.save_pretrained(out / "reference")

    # The reference: the model after SFT. It never changes, so its log-probs are computed once, here
    table = score()
    if world:
        drawn = world.draw_pairs(table, args.pairs, args.labels, seeded(args.seed + 1))
        rows = world.rows(drawn)
    soft = drawn.p.float().to(device) if world and args.labels == "soft" else None
    ref_logps = all_logps(model, rows, args)
    results = {"reference": evaluate(table)}
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in held_out))[:2]
    before = [model.complete(prompt, tokenizer) for prompt in prompts]

    # DPO: it starts at the reference, where every DPO loss is -log sigma(0) = log 2 = 0.6931
    optimizer = OPTIMIZERS[args.optimizer](model.parameters())
    done, history, began = 0, [{"step": 0} | results["reference"]], time.perf_counter()
    if args.resume and (out / "checkpoint.pt").exists():
        state = load(out / "checkpoint.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, history = state["step"], state["history"]
    elif args.loss == "dpo":
        print("The policy starts as the reference, so the first DPO loss is log 2 = 0.6931")
    for step, steps, lr, ids in schedule(rows, args.epochs, args.lr, args, done):
        losses, logps, norm = update(net, optimizer, lr, args, rows, ids, loss, ref_logps, soft)
        metrics = dpo.describe(*logps, *ref_logps[:, ids], beta=beta) | {"loss": losses}
        metrics = {"step": step, "lr": lr} | means(metrics | {"grad_norm": norm})
        most = steps * PROCESSES * len(ids) // (10 * len(held_out) or math.inf) or 1  # evaluations
        every, saves = args.eval_every or math.ceil(steps / most), step % args.save_every == 0
        evaluates = step == steps or step % every == 0
        if evaluates or saves:  # did this step ruin the model?
            means({"logps": all_logps(model, rows[:9], args)})
        metrics |= evaluate(score()) if evaluates else {}
        history.append(metrics)
        left = (steps - step) * (time.perf_counter() - began) / (step - done)
        shown = "loss", "margin", "weight", "gap_closed", "held_out_accuracy"
        line = "  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)
        progress(f"DPO {step}/{steps}  {line}  {left:.0f} s left", step == 1 or evaluates or saves)
        if RANK == 0 and (evaluates or saves):
            (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)) + "\n")
        if RANK == 0 and saves:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save({"step": step, "history": history} | state, out / "checkpoint.pt")
    results["policy"], tables = {name: history[-1][name] for name in results["reference"]}, []
    if world:
        tables = table, score(), dpo.optimal_policy(table, world.rewards, beta)[0]
        results["optimum"] = evaluate(tables[-1])
    for prompt, text in zip(prompts, before):
        after = model.complete(prompt, tokenizer)
        print(f"\n{tokenizer.decode(prompt)}\nbefore DPO: {text}\nafter DPO: {after}")
    summary = {"config": vars(args), "seconds": round(time.perf_counter() - start, 1)}
    summary |= {"gap_closed": results["policy"].get("gap_closed"), "rows": results}
    report(results, world, tables)
    print(f"{summary['seconds']:.0f} s; see {out}/")
    if RANK == 0:
        model.save_pretrained(out / "policy")
        plot(history, out / "curves.png")
        save_json(summary, out / "summary.json")
    if PROCESSES > 1:
        distributed.destroy_process_group()
    return summary


def update(net, optimizer, lr, args, rows, ids, loss, ref_logps=None, soft=None):
    """One optimiser step on the mean loss of the pairs `ids` (B,). soft: (n,) soft labels.
    Returns losses (B,), log-probs (2, B) and the gradient norm."""
    optimizer.param_groups[0]["lr"] = lr  # there is one group
    optimizer.zero_grad()
    parts, logged = ids.split(args.micro_batch_size), []
    for part in parts:
        net.require_backward_grad_sync = part is parts[-1]  # DDP averages gradients once a step
        logps, lengths = pair_logps(net, rows, part, args)  # (2, b): chosen, rejected
        ref = () if ref_logps is None else ref_logps[:, part]
        losses = call_loss(loss, logps, ref, lengths, args.beta)  # Eq. 7, unless --loss
        if soft is not None:
            swapped = call_loss(loss, logps.flip(0), ref.flip(0), lengths.flip(0), args.beta)
            losses = soft[part] * losses + (1 - soft[part]) * swapped
        (losses.sum() / len(ids)).backward()  # the parts add up to the gradient of the mean
        logged.append(torch.cat([losses[None], logps]).detach())
    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
    optimizer.step()
    losses, *logps = torch.cat(logged, 1)
    return losses, logps, grad_norm


def call_loss(loss, policy_logps, ref_logps, lengths, beta):
    """Losses (b,) from three (2, b). It gets what it names; its own beta holds without --beta."""
    known = {"beta": beta or 0.1, "chosen_lengths": lengths[0], "rejected_lengths": lengths[-1]}
    named = [x for x in inspect.signature(loss).parameters.values() if x.name in known]
    passed = [x.name for x in named if x.name != "beta" or beta or x.default is x.empty]
    losses = loss(*policy_logps, *ref_logps, **{name: known[name] for name in passed})
    losses = losses[0] if isinstance(losses, tuple) else losses  # such as dpo.DPOLoss
    assert losses.shape == policy_logps[0].shape, f"not one loss for each pair: {losses}"
    return losses


def pair_logps(net, rows, ids, args):
    """log pi(y|x) of the pairs `ids`, and their responses' lengths: (2, b) each; (1, b) for SFT."""
    tokens, mask = data.collate(rows, ids.tolist())
    with torch.autocast(net.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logps = dpo.response_logps(net, tokens.to(net.device), mask)
    return logps.view(-1, len(ids)), mask.sum(1).view(-1, len(ids)).to(net.device)


@torch.no_grad()
def all_logps(model, rows, args):
    """log pi(y|x) of both responses of every row: (2, n). Each process computes its own share."""
    logps = torch.zeros(2, len(rows), device=model.device)
    mine = torch.arange(len(rows))[RANK::PROCESSES]
    for part in mine.split(args.micro_batch_size) if len(mine) else ():
        logps[:, part], _ = pair_logps(model, rows, part, args)
    if PROCESSES > 1:
        distributed.all_reduce(logps)  # a sum: the other processes hold zeros
    return logps


def schedule(rows, epochs, peak_lr, args, done=0):
    """Yields (step, steps, learning rate, this process's pairs) after step `done`, by the seed."""
    batch_size = max(1, min(args.batch_size, len(rows)) // PROCESSES) * PROCESSES
    steps = math.ceil(epochs * len(rows) / batch_size)
    warmup = max(1, min(args.warmup_steps, steps // 10))
    generator = torch.Generator().manual_seed(args.seed + 2)
    for step, ids in zip(range(1, steps + 1), data.batches(rows, batch_size, generator)):
        decay = (steps - step + 1) / max(1, steps - warmup) if args.decay else 1
        lr = peak_lr * min(1, step / warmup, decay)
        if step > done:
            yield step, steps, lr, ids[RANK::PROCESSES]


def build_model(args, tokenizer):
    """The GPT that --init names, or a new one. InputError if it does not fit the tokenizer."""
    torch.manual_seed(args.seed)
    shape = tokenizer.n_vocab, args.block_size, args.n_embd, args.n_layer, args.n_head
    model = GPT.from_pretrained(args.init) if args.init else GPT(GPTConfig(*shape))
    if model.config.vocab_size != tokenizer.n_vocab:
        raise data.InputError(f"--init {args.init}: its vocabulary is not that of the tokenizer")
    model.config.eos_token_id = tokenizer.eot_token
    return model


def load_loss(args):
    """The function that --loss names. Tries it once, so that a mistake shows before SFT."""
    path, _, name = args.loss.rpartition(":")
    if not path and name not in dpo.LOSSES:
        raise data.InputError(f"--loss {name}: not {', '.join(dpo.LOSSES)} or file.py:function")
    loss = runpy.run_path(path)[name] if path else dpo.LOSSES[name]
    logps = torch.full((2, 2), -1.0, requires_grad=True)
    call_loss(loss, logps, logps.detach(), torch.ones(2, 2), args.beta).sum().backward()
    return loss


def parse_args(argv=None):
    """The flags as a Namespace. With --resume they are those of the run in --out."""
    epilog = f"With --data the defaults are {REAL}. A beta of None is the loss's own default."
    form = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(None, "train.py [--data FILE] [flags]", epilog=epilog, **form)
    add = parser.add_argument
    add("--data", help="file of preference pairs; without it, the toy world")
    add("--pairs", type=int, default=100_000, help="pairs drawn in the toy world")
    add("--labels", default="hard", choices=("hard", "soft", "deterministic"), help="of toy pairs")
    add("--held-out", type=float, default=0.1, help="fraction of the prompts in --data")
    add("--tokenizer", help="bytes or a tiktoken name; None is gpt2 with --init, else bytes")
    add("--init", help="start from gpt2, gpt2-medium, ... or from a folder of that form")
    add("--block-size", type=int, default=8, help="longest prompt plus response, in tokens")
    add("--n-layer", type=int, default=1, help="layers")
    add("--n-head", type=int, default=2, help="attention heads")
    add("--n-embd", type=int, default=32, help="width")
    add("--loss", default="dpo", help=f"{', '.join(dpo.LOSSES)}, or file.py:function")
    add("--beta", type=float, default=1.0, help="strength of the KL penalty")
    add("--sft-epochs", type=float, default=8.0, help="epochs of SFT; 0 for none")
    add("--sft-lr", type=float, default=1e-2, help="peak learning rate of SFT")
    add("--epochs", type=float, default=6.0, help="epochs of DPO")
    add("--lr", type=float, default=1e-2, help="peak learning rate of DPO")
    add("--warmup-steps", type=int, default=150, help="at most a tenth of all steps")
    add("--decay", action=argparse.BooleanOptionalAction, default=True, help="then decay to 0")
    add("--batch-size", type=int, default=512, help="pairs in an optimiser step")
    add("--micro-batch-size", type=int, default=512, help="pairs in memory at once")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="rmsprop is the paper's")
    add("--max-grad-norm", type=float, default=1.0, help="clip longer gradients to this norm")
    add("--device", default="auto", help="auto is the accelerator, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add("--compile", action="store_true", help="use torch.compile")
    add("--eval-every", type=int, default=100, help="steps between evaluations; if None, so many "
        "that at most one pair is evaluated for ten that are trained on")  # fmt: skip
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue the run in --out with its own settings")
    add("--seed", type=int, default=0, help="of weights, corpus, pairs and their order")
    add("--out", default="out", help="folder for everything that is written")
    args = parser.parse_args(argv)
    run = read_config(Path(args.out)) if args.resume else REAL if args.data else {}
    kept = {k: run[k] for k in vars(args) if k in run and k not in ("resume", "out", "device")}
    parser.set_defaults(**kept)
    args = parser.parse_args(argv)
    if args.resume and (not run or vars(args) | kept != vars(args)):
        parser.error(f"--resume: {args.out} holds no run of train.py, or one with other flags")
    for name, value in vars(args).items():
        low = 0 if name in ("held_out", "sft_epochs", "warmup_steps", "seed") else 1e-99
        high = 1 if name == "held_out" else 1e99
        if value == "" or (type(value) in (int, float) and not low <= value <= high):
            parser.error(f"--{name.replace('_', '-')} {value!r} is out of range")
    args.tokenizer = args.tokenizer or ("gpt2" if args.init else "bytes")
    return args


def read_config(out):
    """What `claim` wrote to config.json in this folder; {} if train.py did not write one."""
    path = out / "config.json"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return json.loads(text) if '"made_by": "train.py"' in text else {}


def claim(out, args, rows):
    """Reserve --out for this run, before anything else is written. InputError if it is taken."""
    pairs = {"encoded_pairs": len(rows), "crc": zlib.crc32(repr(rows).encode())}
    config, init = read_config(out), Path(args.init or os.devnull).resolve()
    if args.resume and config | pairs != config:
        raise data.InputError(f"--resume: {out} holds no run of train.py on these pairs")
    if args.resume or RANK > 0:
        return
    if init.exists() and out.resolve() in (init, *init.parents):
        raise data.InputError(f"--out {out} holds --init {args.init}: choose another")
    if not config and out.exists() and any(out.iterdir()):
        raise data.InputError(f"--out {out} holds files of something else: choose another")
    if config.get("data"):
        raise data.InputError(f"--out {out} holds a run on pairs: --resume it, or choose another")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("reference/config.json", "checkpoint.pt", "policy/config.json", "summary.json"):
        (out / name).unlink(missing_ok=True)
    save_json(vars(args) | {"made_by": "train.py"} | pairs, out / "config.json")


def set_up(args):
    """Choose the device, join the other processes, print the settings."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(RANK % max(1, torch.cuda.device_count()))
    if PROCESSES > 1:
        distributed.init_process_group()
    if RANK > 0 or sys.stdout is None:  # None where it is closed
        sys.stdout = open(os.devnull, "w")
    if not args.data:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # tiny products: more are slower
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    return device


def means(columns):
    """{name: (B,) or ()} -> {name: mean over all processes}. InputError if one is not finite."""
    values = torch.stack([column.mean() for column in columns.values()])
    if PROCESSES > 1:
        distributed.all_reduce(values)
    if not values.isfinite().all():
        raise data.InputError("not finite: try a lower learning rate, and another --out")
    return dict(zip(columns, (values / PROCESSES).tolist()))


def progress(line, keep):
    """A line that changes in place on a terminal. Piped, only the lines to keep are printed."""
    if keep or sys.stdout.isatty():
        print("\r\033[K" * sys.stdout.isatty() + line, end="\n" * keep, flush=True)


def report(rows, world, tables):
    """Print the results and, from `tables` of log pi (P, Y), the optimum's likeliest responses."""
    for x, prompt in enumerate(world.prompts if world else []):
        print(f"\n{prompt.strip():16}     r*", *rows, sep="  ")
        for y in tables[-1][x].topk(6).indices:
            numbers = (f"{table[x, y].exp():{len(name)}.4f}" for name, table in zip(rows, tables))
            print(f"  {world.responses[y]:15} {world.rewards[x, y]:+6.2f}", *numbers, sep="  ")
    print("\n" + " " * 9, *rows["reference"], sep="  ")
    for name, row in rows.items():
        print(f"{name:9}", *(f"{row[key]:{len(key)}.4f}" for key in rows["reference"]), sep="  ")


def plot(history, path):
    """curves.png: objective or held-out pairs, loss and weight, rewards, log-probs, by step."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = {
        "reward, nats": ("expected_reward", "kl", "objective"),
        "held-out pairs": ("held_out_loss", "held_out_accuracy"),
        "loss in nats; mean weight": ("loss", "weight"),
        "implicit reward (Eq. 5)": ("chosen_reward", "rejected_reward", "margin"),
        "log-prob of a response, nats": ("chosen_logp", "rejected_logp"),
    }
    panels = [panel for panel in panels.items() if panel[1][0] in history[-1]]
    for ax, (label, names) in zip(figure.subplots(2, 2).flat, panels):
        for name in names:
            points = [(line["step"], line[name]) for line in history if name in line]
            ax.plot(*zip(*points), label=name.replace("_", " "))
        ax.set(xlabel="DPO step", ylabel=label)
        ax.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has none
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal cannot show
    try:
        main()
    except (data.InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume continues", file=sys.stderr)
        sys.exit(130)
