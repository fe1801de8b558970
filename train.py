"""SFT, the reference's log-probs once, DPO, and what is measured and saved on the way.

    python train.py                      the toy world, whose exact optimum is known
    python train.py --data pairs.jsonl   your own preference pairs
    python train.py --resume             go on with the run in out/

Departs from the paper: AdamW and a linear decay (--optimizer rmsprop --no-decay undo that), clipped
gradients, other steps (the paper's: --lr 1e-6 --batch-size 64 --warmup-steps 150).
"""

import ctypes
import json
import math
import os
import platform
import sys
import time
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import data
import dpo
from cli import Config, call_loss, check_finite, ctrl_c, describe_step, load_loss, means, measure
from cli import parse_args, plot, progress, refuse, report, samples, show
from model import GPT, GPTConfig, load, save, save_json

RANK = int(os.environ.get("RANK", 0))  # torchrun says which process this is
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # and of how many
NO_MEMORY = "MemoryError", "out of memory", "can't allocate memory"
ADAM_BETAS = 0.9, 0.95  # GPT-3's: with torch's own 0.999 some runs stay on a plateau, at 80%


def main(argv=None):
    """Run it all; returns what summary.json holds. A user's mistake: one line, exit status 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        return run(parse_args(argv))
    except (data.InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not any(text in repr(error) for text in NO_MEMORY):
            raise
        hint = "make the model, --micro-batch-size or --pairs smaller"
        print(f"train.py: out of memory: {hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


def run(config: Config):
    start = time.time()
    keep_freed_memory()
    if PROCESSES > 1:
        join_processes(config)
    torch.manual_seed(config.seed)
    task = RealTask(config) if config.data else ToyTask(config)
    model = build_model(config, task.tokenizer)
    if config.compile:
        model.compile(dynamic=True)
    if config.show:
        return show(task, model, config.show)
    out = begin(config, mark_of_run(task, config))
    print(*(f"{key}={value}" for key, value in asdict(config).items() if value is not None))

    if config.resume and (out / "reference" / "config.json").exists():
        model.load_state_dict(GPT.from_pretrained(out / "reference").state_dict())
    else:
        train_sft(model, task.sft_rows, config)
        if RANK == 0:
            model.save_pretrained(out / "reference")
    task.use_reference(model)  # the toy's pairs are drawn from it
    mark, path = mark_of_run(task, config), out / "reference_logps.pt"
    saved = saved_by_run(path, config, mark)
    ref_logps = all_logps(model, task.rows, config) if not saved else saved["logps"]
    ref_logps = ref_logps.to(model.device)  # once; from here on only the policy is in memory
    if RANK == 0:
        save({"mark": mark, "logps": ref_logps}, path)
    results = {"reference": task.evaluate(model)}
    before = samples(model, task, config.seed)
    history = train_dpo(model, task, ref_logps, config, mark)
    name = config.loss if config.loss in dpo.LOSSES else "policy"
    results[name] = task.evaluate(model)
    results |= {} if config.data else {"optimum": task.exact(task.best)}

    summary = {"config": asdict(config), "seconds": round(time.time() - start, 1)}
    summary |= {"gap_closed": results[name].get("gap_closed"), "rows": results}
    if RANK == 0:
        model.save_pretrained(out / "policy")
        save_json(summary, out / "summary.json")
        plot(history, results, out / "curves.png")
    report(summary, before, samples(model, task, config.seed))
    if PROCESSES > 1:
        distributed.destroy_process_group()
    return summary


def join_processes(config):
    """torchrun has started several: each will take its slice of every batch, the first writes."""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def begin(config, mark):
    """The folder --out: with --resume as that run left it, else without what one resumes from."""
    out = Path(config.out)
    settings = out / "config.json"
    if config.resume and json.loads(settings.read_text()).get("mark") != mark:
        refuse(f"--resume: the pairs or the loss are not those of the run in {out}")
    if RANK == 0 and not config.resume:
        begun, ended = out / "reference" / "config.json", out / "summary.json"
        unfinished = begun.exists() and not ended.exists()
        if unfinished and '"data": ""' not in settings.read_text():  # of a user's own pairs
            refuse(f"{out} holds a run that is not finished: add --resume, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        old = "reference/config.json reference_logps.pt checkpoint.pt policy/config.json curves.png"
        for name in [*old.split(), "summary.json"]:
            (out / name).unlink(missing_ok=True)
        save_json(asdict(config) | {"mark": mark}, settings)
    return out


def mark_of_run(task, config):
    """A number that tells this run's files from those of other settings, pairs or loss."""
    settings = asdict(replace(config, resume=False, out="", device=""))
    path = Path(config.loss.rpartition(":")[0])
    loss = path.read_bytes() if config.loss not in dpo.LOSSES else ""
    return zlib.crc32(repr((settings, loss, task.rows, task.held_out)).encode())


def saved_by_run(path, config, mark):
    """What this very run has saved there; None without --resume, or where it had not yet."""
    if not (config.resume and path.exists()):
        return None
    saved = load(path)
    if not isinstance(saved, dict) or saved.get("mark") != mark:
        refuse(f"--resume: {path} is not of this run: settings, pairs or the loss are others")
    return saved


class ToyTask:
    """The toy world: pairs drawn from the reference, and everything evaluated exactly."""

    def __init__(self, config):
        self.config = config
        self.world = world = data.ToyWorld(config.world)
        self.tokenizer = world.tokenizer
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sft_rows = world.corpus(self.generator)
        self.prompts, self.max_answer, self.temperature = world.prompt_ids.tolist(), world.K, 1.0
        self.rows = self.held_out = ()  # as long as there is no reference to draw them from

    def use_reference(self, reference):
        """Draw the pairs from it, and work out the optimum that lies behind their labels. Eq. 4."""
        config, world = self.config, self.world
        self.ref = world.logps(reference)
        drawn = world.draw_pairs(self.ref, config.pairs, config.labels, self.generator)
        self.rows, self.p = world.rows(drawn), drawn.p.float()
        n = math.ceil(config.held_out * config.pairs)
        self.held_out = world.draw_pairs(self.ref, n, config.labels, self.generator)
        self.best, _ = dpo.optimal_policy(self.ref, world.rewards, config.beta)
        self.gap = dpo.kl_divergence(self.ref, self.best).mean().item()

    def evaluate(self, model):
        return self.exact(self.world.logps(model))

    def exact(self, logps):
        """Means over prompts of sums over every answer; only the last is of the held-out pairs."""
        prompt, chosen, rejected, p = self.held_out
        rewards = dpo.implicit_reward(logps, self.ref, self.config.beta)
        won = dpo.accuracy(rewards[prompt, chosen] - rewards[prompt, rejected])
        row = means({
            "expected_reward": (logps.exp() * self.world.rewards).sum(-1),
            "kl_to_reference": dpo.kl_divergence(logps, self.ref),
            "objective": dpo.rlhf_objective(logps, self.ref, self.world.rewards, self.config.beta),
            "kl_to_optimum": dpo.kl_divergence(logps, self.best),
            "pair_accuracy": p * won + (1 - p) * (1 - won),
        })  # fmt: skip
        if self.config.labels != "deterministic" and self.gap > 1e-9:  # else no optimum, no gap
            row["gap_closed"] = 1 - row["kl_to_optimum"] / self.gap  # 0: reference, 1: pi* of Eq. 4
        return row


class RealTask:
    """Pairs from a file, a share of them held out; of the truth nothing is known but those."""

    def __init__(self, config):
        self.config = config
        pairs = data.load_pairs(config.data)
        self.tokenizer = data.get_tokenizer(config.tokenizer)
        rows = data.encode_pairs(pairs, self.tokenizer, config.block_size)
        held_out = math.ceil(config.held_out * len(rows))
        if held_out >= len(rows):
            refuse(f"{config.data}: {held_out} of {len(rows)} pairs are held out, none is left")
        generator = torch.Generator().manual_seed(config.seed)
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        self.held_out, self.rows = rows[:held_out], rows[held_out:]
        self.sft_rows = [row._replace(rejected=[]) for row in self.rows]  # plain sequences
        self.prompts = [row.prompt for row in self.held_out[:2]]
        self.max_answer, self.temperature = 100, 0

    def use_reference(self, reference):
        self.ref = all_logps(reference, self.held_out, self.config)
        raw = dpo.accuracy(self.ref[0] - self.ref[1]).mean().item()
        n = f"{len(self.rows)} pairs to train on, {len(self.held_out)} held out"
        print(f"{n}; the reference's raw log-prob prefers the chosen answer in {raw:.1%} of those")

    def evaluate(self, model):
        logps = all_logps(model, self.held_out, self.config)
        metrics = means(dpo.describe(*logps, *self.ref, beta=self.config.beta))
        wanted = "loss", "accuracy", "margin", "chosen_logp", "rejected_logp"
        return {f"held_out_{key}": metrics[key] for key in wanted}


def train_sft(model, rows, config):
    """Maximise log pi(y|x) of the corpus: section 4's reference where no SFT model is given."""
    training = updates(model, rows, lambda y, *_: -y, config, config.sft_epochs, config.sft_lr)
    for step, steps, record, _ in training:
        if step % config.log_every == 0 or step == steps:
            loss = record["loss"].mean().item()
            progress(f"SFT {step}/{steps}  loss {loss:.3f} nats an answer", step == steps)


def train_dpo(model, task, ref_logps, config, mark=None):
    """Minimise Eq. 7 or another loss; returns what was measured: step 0, then metrics.jsonl."""
    loss = load_loss(config.loss)
    lengths = torch.tensor([[len(row.chosen), len(row.rejected)] for row in task.rows])
    lengths = lengths.T.to(model.device)  # (2, n)

    def losses_of(chosen, rejected, pair_ids):
        args = torch.stack([chosen, rejected]), ref_logps[:, pair_ids], lengths[:, pair_ids]
        losses = call_loss(loss, config, *args)
        if config.labels != "soft":
            return losses
        swapped = call_loss(loss, config, *(arg.flip(0) for arg in args))
        p = task.p.to(model.device)[pair_ids]  # of endless annotators, the share that says chosen
        return p * losses + (1 - p) * swapped

    path, done = Path(config.out) / "checkpoint.pt", 0
    history, start, seen = [{"step": 0} | task.evaluate(model)], time.time(), 0
    if saved := saved_by_run(path, config, mark):
        done, history = saved["step"], saved["history"]
        print(f"going on after step {done}")
    elif config.loss == "dpo":
        print("DPO starts where the policy is the reference, so its first loss is log 2 = 0.6931")
    training = updates(model, task.rows, losses_of, config, config.epochs, config.lr, saved)
    metrics_file = Path(config.out) / "metrics.jsonl" if RANK == 0 else os.devnull
    with open(metrics_file, "w") as file, ctrl_c() as interrupted:
        for line in history[1:]:
            print(json.dumps(line), file=file, flush=True)
        for step, steps, record, pair_ids in training:
            seen += len(pair_ids)
            evaluate = step % config.eval_every == 0 or step == steps
            if evaluate or step == 1 or step % config.log_every == 0:
                metrics = {"step": step} | measure(record, ref_logps[:, pair_ids], config.beta)
                metrics |= {"pairs_per_second": seen / (time.time() - start)}
                metrics |= task.evaluate(model) if evaluate else {}
                if not all(map(math.isfinite, metrics.values())):
                    refuse(f"step {step}: not finite; is learning rate {config.lr} too large?")
                history.append(metrics)
                print(json.dumps(metrics), file=file, flush=True)
                left = (steps - step) * (time.time() - start) / (step - done)
                progress(describe_step(metrics, steps, left), step == 1 or evaluate)
            if 0 not in (step % config.log_every, step % config.save_every):
                continue
            stop = gather([torch.tensor([[len(interrupted)]])], [torch.tensor([RANK])], PROCESSES)
            if RANK == 0 and (step % config.save_every == 0 or stop.any()):
                state = {"model": model.state_dict(), "optimizer": record["optimizer"].state_dict()}
                save({"mark": mark, "step": step, "history": history} | state, path)
            if stop.any():  # all processes at one step
                raise KeyboardInterrupt
    return history


def updates(model, rows, losses_of, config, epochs, peak_lr, saved=None):
    """Train, yielding (step, steps, record, pair_ids) after each step of the optimiser, from the
    one after `saved`. record: `loss, chosen_logp, rejected_logp, chosen_grad`, each (B,), and
    `grad_norm, lr, optimizer`. InputError if a loss or the gradient is not finite.
    """
    if config.optimizer == "adamw":
        settings = dict(betas=ADAM_BETAS, weight_decay=0.0, fused=True)
        optimizer = torch.optim.AdamW(model.parameters(), peak_lr, **settings)
    else:
        optimizer = torch.optim.RMSprop(model.parameters(), peak_lr)
    generator = torch.Generator().manual_seed(config.seed)
    steps = math.ceil(epochs * math.ceil(len(rows) / config.batch_size))
    warmup = max(1, min(config.warmup_steps, steps // 10))
    done = saved["step"] if saved else 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    net = DistributedDataParallel(model) if PROCESSES > 1 else model
    batches = islice(data.batches(rows, config.batch_size, generator), done, None)
    for step, pair_ids in zip(range(done + 1, steps + 1), batches):
        lr = peak_lr * min(1, step / warmup)
        if config.decay and step > warmup:
            lr = peak_lr * (steps - step + 1) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        record = backward(net, rows, pair_ids, losses_of, config)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        look = step in (1, steps) or 0 in (step % config.log_every, step % config.save_every)
        if look or model.device.type == "cpu":  # elsewhere a look waits for the device
            check_finite(step, record["loss"], grad_norm, pair_ids, peak_lr, config)
        optimizer.step()
        yield step, steps, record | dict(grad_norm=grad_norm, lr=lr, optimizer=optimizer), pair_ids


def backward(net, rows, pair_ids, losses_of, config):
    """Add up the gradient of the mean loss of these pairs, micro-batch by micro-batch. Of many
    processes each takes its slice of each micro-batch, and net averages their gradients."""
    records, places = [torch.zeros(4, 0, device=net.device)], []
    micro = (config.micro_batch_size or len(pair_ids)) * PROCESSES
    parts = torch.arange(len(pair_ids)).split(micro)
    for part in parts:
        idle = len(part) <= RANK  # too few pairs for all: it takes part, but what it has counts 0
        mine = part[:1] if idle else part[RANK::PROCESSES]
        batch = data.collate(rows, pair_ids[mine]).to(net.device)
        more = PROCESSES > 1 and part is not parts[-1]
        with net.no_sync() if more else nullcontext():
            chosen, rejected = logps_of(net, batch, config)
            chosen.retain_grad()
            losses = losses_of(chosen, rejected, batch.pair_ids)
            share = 0 if idle else PROCESSES / len(pair_ids)  # the last part may be short
            (losses.sum() * share).backward()  # over all parts and processes, the mean
        if not idle:
            chosen_grad = chosen.grad / share  # of each pair's own loss, not of the mean
            records.append(torch.stack([losses, chosen, rejected, chosen_grad]).detach())
            places.append(mine)
    record = gather(records, places, len(pair_ids))
    return dict(zip(("loss", "chosen_logp", "rejected_logp", "chosen_grad"), record))


def logps_of(model, batch, config):
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return dpo.response_logps(model, batch)


@torch.no_grad()
def all_logps(model, rows, config):
    """log pi(y|x) of both answers of every row, in the order of rows: (2, n)."""
    logps, mine = [torch.zeros(2, 0, device=model.device)], torch.arange(len(rows))[RANK::PROCESSES]
    parts = mine.split(config.micro_batch_size or config.batch_size) if len(mine) else ()
    for part in parts:
        batch = data.collate(rows, part).to(model.device)
        logps += [torch.stack(logps_of(model, batch, config))]
    return gather(logps, parts, len(rows))


def gather(columns, places, n):
    """The columns that each process has, each in its place among the n of all: (k, n)."""
    columns = torch.cat(columns, 1)
    if PROCESSES == 1:
        return columns
    whole = columns.new_zeros(len(columns), n)
    whole[:, torch.cat([*places, torch.arange(0)])] = columns
    distributed.all_reduce(whole)
    return whole


def keep_freed_memory():
    """glibc gives large blocks back to the kernel and in the next step asks for them anew, page by
    page, each cleared first: a quarter of the time of a step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and stay there


def build_model(config, tokenizer):
    if not config.init:
        shape = config.n_embd, config.n_layer, config.n_head
        return GPT(GPTConfig(tokenizer.n_vocab, config.block_size, *shape)).to(config.device)
    model = GPT.from_pretrained(config.init)
    if model.config.vocab_size != tokenizer.n_vocab or model.config.n_positions < config.block_size:
        refuse(f"{config.init}: {model.config}; --tokenizer or --block-size does not fit it")
    return model.to(config.device)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # an answer may hold what a terminal can't show
    main()
