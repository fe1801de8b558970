"""Do the tests catch bugs? Plant one at a time in a copy of the code, run the tests, count.

    python tests/mutants.py [--only TEXT]    bugs of public DPO code, or those whose name has TEXT
    python tests/mutants.py --generated      every small change to the mathematics, the batches, the
                                             model and the training step, made by mutmut

Prints which test caught which bug. Exit status 1 if a planted bug survives.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  what the code under test imports, once for all runs
import pytest
import tiktoken  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parents[1]
# Slow, or about other things than bugs
NOT_RUN = ("bench", "grader", "notebook", "platforms", "readme")
TESTS = ["test_dpo.py"]
for path in sorted((ROOT / "tests").glob("test_*.py")):
    if path.stem.removeprefix("test_") not in NOT_RUN:
        TESTS.append(f"tests/{path.name}")

# name | what stands in the file => the bug. ⏎ ends a line of the file; indented lines continue.
PLANTED = r"""
# dpo.py
L1 sign inverted | margins)  # (7) => -margins)  #
L1 minus forgotten | -F.logsigmoid(margins)  # (7) => F.logsigmoid(margins)  #
L2 chosen and rejected swapped in both |
    chosen_rewards - rejected_rewards  # (6) => rejected_rewards - chosen_rewards  #
L3 swapped in the reference only |
    chosen_rewards =
    => ref_chosen_logps, ref_rejected_logps = ref_rejected_logps, ref_chosen_logps⏎
        chosen_rewards =
L4 reference never subtracted | (policy_logps - ref_logps) => policy_logps
L6 beta missing | beta * (policy_logps - ref_logps) => policy_logps - ref_logps
L7 beta applied twice | margins)  # (7) => beta * margins)  #
L9 beta outside the log-sigmoid |
    F.logsigmoid(margins)  # (7) => beta * F.logsigmoid(margins / beta)  #
L10 beta = 0 accepted | not beta > 0: => not beta >= 0:
L11 log(sigmoid) | F.logsigmoid(margins)  # (7) => torch.log(torch.sigmoid(margins))  #
L20 epsilon is ignored by cdpo |
    (1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m => F.logsigmoid(m
gradient: A.4's misprinted weight |
    weights = torch.sigmoid(rejected_rewards - chosen_rewards)⏎    return
    => weights = torch.sigmoid(chosen_rewards - rejected_rewards)⏎    return
gradient: sign inverted | -beta * weights, beta => beta * weights, -beta
weights: A.4's misprint in dpo_loss |
    rejected_rewards - chosen_rewards)  # section 4 => chosen_rewards - rejected_rewards)  #
weights carry gradient | weights.detach() => weights
Eq. 3 KL the other way round | policy_logps, ref_logps)  # (3) => ref_logps, policy_logps)  #
Eq. 3 reward under the reference | policy_logps.exp => ref_logps.exp
KL of probability 0 is NaN | torch.where(probs > 0, logps - other_logps, 0 => (logps - other_logps
Eq. 4 beta multiplies | rewards / beta => rewards * beta
Eq. 4 not normalised | unnormalised - log_Z[..., None] => unnormalised
Eq. 18 worst first | flip(-1).logcumsumexp(-1).flip => logcumsumexp
Eq. 20 without minus | -plackett_luce_logps => plackett_luce_logps
B1 no shift | targets = ids[:, 1:] => targets = ids[:, :-1]
B2 shift the wrong way | ids[:, :-1], scored) => ids[:, 1:], scored)
B3 mask not shifted | scored = mask[:, 1:] => scored = mask[:, :-1]
B11 mean for sum | rows.sum(-1)⏎ => rows.sum(-1) / mask.sum(-1)⏎
V1 IPO without 1/beta | ) / beta) ** 2 => )) ** 2
V10 cDPO smoothed the wrong way |
    (1 - epsilon) * F.logsigmoid(m) - epsilon => epsilon * F.logsigmoid(m) - (1 - epsilon)
M1 ties count 0 | () + (margins == 0).float() / 2 => ()
# train.py
held-out pairs at another beta | (*logps, *ref_logps, beta=beta) => (*logps, *ref_logps)
held-out pairs: the first of the file are scored |
    torch.randperm(len(held_out), generator=generator)[: => torch.arange(len(held_out))[:
resume: only the last pair is compared | repr(row).encode(), checksum => repr(row).encode()
resume: time left counts the steps of before | / (step - done) => / step
L17 the losses are summed | (losses.sum() / len(pair_ids)) => losses.sum()
D1 a micro-batch is averaged over its own pairs | (losses.sum() / len(pair_ids)) => losses.mean()
D6 last rate is 0 | (steps - step + 1) => (steps - step)
D6 no warm-up | peak * (step / warmup) => peak
L19 the name of the loss is ignored | return functions[name] => return dpo.dpo_loss
L20 a loss's own beta is overruled | return parameter.default => return 0.1
C1 the policy is the reference |
    ref_chosen, ref_rejected = ref_logps[:, part] => ref_chosen, ref_rejected = logps.detach()
C5 reference joined by place, not by pair |
    ref_chosen, ref_rejected = ref_logps[:, part]
    => ref_chosen, ref_rejected = ref_logps[:, : len(part)]
C14 the half-trained policy is the reference |
    ref_logps = all_logps(model, rows, args)
    => if resuming and (out / "checkpoint.pt").exists():⏎
            model.load_state_dict(load(out / "checkpoint.pt")["model"])⏎
        ref_logps = all_logps(model, rows, args)
gradients never cleared |
    optimizer.zero_grad()⏎        logged => logged
D12 seed ignored | args.seed + 2) => 2)
D18 the untrained policy is saved |
    model.save_pretrained(out / "policy")
    => build_model(args, tokenizer).save_pretrained(out / "policy")
D19 logged loss is not the loss | columns["loss"] = losses => columns["loss"] = losses / 2
M2 accuracy is summed | column.mean() for => column.sum() for
M4 last micro-batch logged | torch.cat(logged, dim=1) => torch.cat(len(logged) * logged[-1:], dim=1)
SFT trains on the rejected responses, too | row._replace(rejected=[]) => row
run, resume: the optimizer begins anew |
    optimizer.load_state_dict(checkpoint["optimizer"]) => pass
run, resume: the weights stay the reference's | model.load_state_dict(checkpoint["model"]) => pass
run, resume: one step is left out | if step <= done: => if step <= done + (done > 0):
run, a run on real pairs is overwritten | if run.get("data") and can_resume(out): => if False:
run, files of others are overwritten | if not run:⏎ => if False:⏎
run, a loss that is not finite | if not math.isfinite(loss) => if False and not math.isfinite(loss)
run, more held-out pairs than promised | [:MAX_SCORED] =>
run, processes: all take the same pairs |
    pair_ids = next(batches)[RANK::PROCESSES]⏎        if
    => pair_ids = next(batches)[::PROCESSES]⏎        if
run, processes: none hears of the others |
    net = torch.nn.parallel.DistributedDataParallel(model) => pass
run, processes: logged means of one alone |
    distributed.all_reduce(values) => values *= PROCESSES
# data.py
B4 first response token dropped | (starts[:, None] <= position) => (starts[:, None] < position)
B6 the prompt counts | (starts[:, None] <= position) & (position => (position
B9 padding counts | & (position < ends[:, None]) => & (position < T)
B12 end token never scored |
    encode_ordinary(pair.chosen) + [tokenizer.eot_token] => encode_ordinary(pair.chosen)
B24 halves exchanged |
    sequences += [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]
    => sequences = [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected] + sequences
B25 prompt cut on the right | prompt[-room:] => prompt[:room]
B27 room for one side only | max(len(chosen), len(rejected)) => len(chosen)
B33 equal pairs kept | if pair.chosen == pair.rejected: => if False:
D12 the remainder of an epoch is lost | torch.cat([waiting, epoch]) => epoch
split: a prompt may be on both sides | if key in held_out_prompts: => if len(held_out) < n_held_out:
split: near duplicates on both sides | comparable(row.text) => row.text
gap closed: KL the other way round |
    dpo.kl_divergence(logps, optimum) => dpo.kl_divergence(optimum, logps)
world: labels exchanged | generator=generator) < p => generator=generator) > p
world: pairs not from the policy | logps.exp().multinomial => torch.ones_like(logps).multinomial
world: the reward is a sum | return sum(opinions) / len(opinions) => return sum(opinions)
world: the corpus teaches no end | response.index(self.W) + 1] => response.index(self.W)]
messages: the prompt twice | if any(whole): => if False:
messages: whole dialogues with line ends of Windows |
    dialogue.replace("\r\n", "\n")⏎    return text.startswith => dialogue⏎    return text.startswith
init: its own tokenizer is not looked at | if text != expected: => if False:
text is changed |
    tokenizer.encode_ordinary(pair.prompt) => tokenizer.encode_ordinary(pair.prompt.strip())
# model.py
B23 causal flag forgotten | is_causal=True => is_causal=False
D13 the head's product in bfloat16 |
    with torch.autocast(x.device.type, enabled=False): => if True:
E3 temperature multiplies | probs = (logits / temperature) => probs = (logits * temperature)
E5 the end token may not be 0 | if stop_token is not None: => if stop_token:
E5 no stop at the end token | token = token.masked_fill(stopped, stop_token)⏎ => ⏎
model: scale of the residual projections | block.mlp.c_proj.weight /= => block.mlp.c_proj.weight *=
run, an untied head is dropped | if not torch.equal(head, embedding): => if False:
# experiments/losses.py
V4 ORPO on sums |
    chosen = policy_chosen_logps / chosen_lengths⏎
        rejected = policy_rejected_logps / rejected_lengths⏎    return -chosen
    => chosen, rejected = policy_chosen_logps, policy_rejected_logps⏎    return -chosen
V7 SimPO gamma inside beta | - rejected) - gamma => - rejected - gamma)
V8 SimPO with a reference | policy_chosen_logps / => (policy_chosen_logps - ref_chosen_logps) /
# experiments/rlhf.py
PPO: Eq. 2 the wrong way round |
    _loss(chosen_rewards, rejected_rewards) => _loss(rejected_rewards, chosen_rewards)
PPO: max in place of min | torch.min(ratio => torch.max(ratio
# experiments/lab.py
lab: rejected before chosen | [drawn.chosen, drawn.rejected] => [drawn.rejected, drawn.chosen]
lab: deterministic labels exchanged | true_margins(drawn) < 0 => true_margins(drawn) > 0
lab: soft labels mixed the wrong way | = p[batch] * as_drawn => = (1 - p[batch]) * as_drawn
# experiments/shared_row.py
shared row: rejected sees chosen | mask[i, fork:, trunk:fork] = False => pass
"""
GENERATED = """
[mutmut]
source_paths=
    dpo.py
    data.py
    model.py
    train.py
pytest_add_cli_args_test_selection=
    test_dpo.py
    tests/test_losses.py
    tests/test_logps.py
    tests/test_data.py
    tests/test_model.py
    tests/test_train.py
    tests/test_train_losses.py
    tests/test_train_step.py
also_copy=
    test_dpo.py
    tests
    experiments
"""
WHERE = [
    "dpo.*",
    "data.x_collate*",
    "data.x_batches*",
    "data.x_split*",
    "data.xǁToyWorld*",
    "model.xǁAttention*",
    "model.xǁMLP*",
    "model.xǁBlock*",
    "model.xǁGPTǁforward*",
    "model.xǁGPTǁhidden*",
    "model.xǁGPTǁhead*",
    "model.xǁGPTǁgenerate*",
    "train.x_plan*",
    "train.x_set_learning_rate*",
    "train.x_micro_batches*",
    "train.x_pair_logps*",
    "train.x_all_logps*",
    "train.x_call_loss*",
    "train.x_measure_step*",
    "train.x_means*",
]


def planted():
    """(name, file, old, new) of each bug in the table."""
    table = re.sub("⏎\n    ", "⏎", PLANTED.strip())
    for line in re.sub("\n    ", " ", table).splitlines():
        if line.startswith("# "):
            file = line[2:]
        else:
            name, change = line.split(" | ", 1)
            old, new = f"{change} ".replace("⏎", "\n").split(" => ")
            yield name, file, old, new.removesuffix(" ")


class FirstFailure:
    """A pytest plugin that remembers which test failed first."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.name = self.name or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def run(mutant, clean):
    """(name, which test caught it or "") for one bug, in a copy of the code. Runs in a process of
    its own, forked from this one with torch already imported."""
    name, file, old, new = mutant
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(clean, copy, dirs_exist_ok=True)
        text = (Path(clean) / file).read_text(encoding="utf-8")
        assert old in text, f"{name}: the line to change is not there any more"
        text = text.replace(old, new, 1)
        compile(text, file, "exec")  # a bug that is no Python would be caught by anything
        (Path(copy) / file).write_text(text, encoding="utf-8")
        os.chdir(copy)
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError))
        signal.alarm(400)  # some bugs never end
        first, stem, runs = FirstFailure(), Path(file).stem, name.startswith("run")
        tests = sorted(TESTS, key=lambda x: (("runs" in x) != runs, stem not in x))
        flags = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *(["-m", "slow or not slow"] if runs else []),
        ]
        nowhere = open(os.devnull, "w", encoding="utf-8")
        with nowhere, contextlib.redirect_stdout(nowhere):
            status = pytest.main([*flags, *tests], [first])
        signal.alarm(0)
        os.chdir("/")
        return name, first.name or ("" if status == 0 else "no test can start")


def copy_code(folder):
    kept = shutil.ignore_patterns(".*", "out*", "__pycache__", "assets")
    shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=kept)


def generated():
    """mutmut forks once a change and runs only the tests that reach it. Prints what survives."""
    with tempfile.TemporaryDirectory() as folder:
        copy_code(folder)
        (Path(folder) / "setup.cfg").write_text(GENERATED, encoding="utf-8")

        def mutmut(*arguments, **settings):
            command = [sys.executable, "-m", "mutmut", *arguments]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
            return subprocess.run(command, cwd=folder, env=env, encoding="utf-8", **settings)

        mutmut("run", *WHERE)
        results = mutmut("results", stdout=subprocess.PIPE).stdout
        for name in re.findall(r"(\S+): (?:survived|no tests|timeout)", results):
            mutmut("show", name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--generated", action="store_true", help="needs `pip install mutmut`")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    if args.generated:
        sys.exit(generated())
    mutants, rows, start = [m for m in planted() if args.only in m[0]], [], time.time()
    with tempfile.TemporaryDirectory() as clean:
        copy_code(clean)
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        pool = multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1)
        _, failed = pool.apply(run, (("no bug", "dpo.py", "", ""), clean))
        assert not failed, f"without any bug {failed} fails"
        for row in pool.imap(functools.partial(run, clean=clean), mutants):
            rows.append(row)
            left = (time.time() - start) / len(rows) * (len(mutants) - len(rows))
            line = f"{len(rows)}/{len(mutants)}  {left:.0f} s left  {row[0]}"
            print(f"{line}: {row[1] or 'SURVIVED'}", flush=True)
    survived = [name for name, caught in rows if not caught]
    total = f"{len(rows)} bugs planted, {len(rows) - len(survived)} killed"
    print(total, *survived, sep="\n  survives: ")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
