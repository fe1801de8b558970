"""Do the tests catch bugs? Plant one at a time in a copy of the code, run the tests, count.

    python tests/mutants.py [--only TEXT]    the bugs of public DPO code, or those named like TEXT
    python tests/mutants.py --generated      every small change to the mathematics, the batches, the
                                             model and the training step, made by mutmut

Writes tests/mutants.md. Exit status 1 if a planted bug survives.
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
NAMES = "shared_row", "experiments", "losses", "logps", "data", "model", "train", "train_runs"
TESTS = ["test_dpo.py", *(f"tests/test_{name}.py" for name in NAMES)]

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
L3 swapped in the policy only |
    chosen_rewards =
    => policy_chosen_logps, policy_rejected_logps = policy_rejected_logps, policy_chosen_logps⏎
        chosen_rewards =
L4 reference never subtracted | (policy_logps - ref_logps) => policy_logps
L5 reference added | - ref_logps) => + ref_logps)
L6 beta missing | beta * (policy_logps - ref_logps) => policy_logps - ref_logps
L7 beta applied twice | margins)  # (7) => beta * margins)  #
L8 beta divides | beta * (policy_logps - ref_logps) => (policy_logps - ref_logps) / beta
L9 beta outside the log-sigmoid |
    F.logsigmoid(margins)  # (7) => beta * F.logsigmoid(margins / beta)  #
L10 beta = 0 accepted | not beta > 0: => not beta >= 0:
L10 beta < 0 accepted | not beta > 0: => beta == 0:
L11 log(sigmoid) | F.logsigmoid(margins)  # (7) => torch.log(torch.sigmoid(margins))  #
L13 log forgotten | F.logsigmoid(margins)  # (7) => torch.sigmoid(margins)  #
L14 rejected detached | rejected_rewards  # (6) => rejected_rewards.detach()  #
L14 chosen detached |
    chosen_rewards - rejected_rewards  # (6) => chosen_rewards.detach() - rejected_rewards  #
L15 no gradient through the model | def response_logps => @torch.no_grad()⏎def response_logps
L20 epsilon is ignored by cdpo |
    (1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m => F.logsigmoid(m
gradient: A.4's misprinted weight | -reward_margins => reward_margins
gradient: sign inverted | -beta * weights, beta => beta * weights, -beta
gradient: beta missing | beta * weights, beta * => weights,
weights: A.4's misprint in dpo_loss |
    rejected_rewards - chosen_rewards => chosen_rewards - rejected_rewards
weights carry gradient | weights.detach() => weights
rewards carry gradient | chosen_rewards.detach() => chosen_rewards
Eq. 3 KL the other way round | policy_logps, ref_logps) => ref_logps, policy_logps)
Eq. 3 reward under the reference | policy_logps.exp => ref_logps.exp
KL of probability 0 is NaN | torch.where(probs > 0, logps - other_logps, 0 => (logps - other_logps
Eq. 4 beta multiplies | rewards / beta => rewards * beta
Eq. 4 without the reference | ref_logps + rewards => rewards
Eq. 4 not normalised | unnormalised - log_Z[..., None] => unnormalised
Eq. 18 worst first | flip(-1).logcumsumexp(-1).flip => logcumsumexp
Eq. 20 without minus | -plackett_luce_logps => plackett_luce_logps
B1 no shift | ids[:, 1:].flatten() => ids[:, :-1].flatten()
B2 shift the wrong way | ids[:, :-1], at) => ids[:, 1:], at)
B3 mask not shifted | 1:].flatten() => :-1].flatten()
B11 mean for sum |
    return logps. => logps = logps / mask.sum(1)[at // (ids.shape[1] - 1)]⏎    return logps.
B13 mask from ids: pad is the end token | mask[:, 1:].flatten => (mask & (ids != 0))[:, 1:].flatten
B30 masked NaN survives |
    mask[:, 1:].flatten().nonzero().squeeze(-1).to(ids.device)  # (N,): t predicts token t + 1⏎
        logits = at_least_float32(model(ids[:, :-1], at))  # (N, V), nowhere else⏎
        targets = ids[:, 1:].flatten()[at]⏎
        logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # (N,
    => torch.arange(ids[:, 1:].numel())⏎    logits = at_least_float32(model(ids[:, :-1], at))⏎
        targets = ids[:, 1:].flatten()⏎
        logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1) * mask[:,
    1:].flatten(
D13 log-softmax in bfloat16 | logits.to(torch.promote_types(logits.dtype, torch.float32)) => logits
D13 float64 cut to float32 | to(torch.promote_types(logits.dtype, torch.float32) => float(
V1 IPO without 1/beta | ) / beta) ** 2 => )) ** 2
V1 IPO target 1 | 0.5) / beta) * => 1.0) / beta) *
V10 cDPO smoothed the wrong way |
    (1 - epsilon) * F.logsigmoid(m) - epsilon => epsilon * F.logsigmoid(m) - (1 - epsilon)
V11 robust without its normaliser | ) / (1 - 2 * epsilon) => )
V11 epsilon of 1/2 accepted | epsilon < 0.5 => epsilon <= 0.5
M1 ties count 0 | () + (margins == 0).float() / 2⏎⏎⏎# => () ⏎⏎⏎#
M3 margins times beta once more |
    margins = chosen_rewards - rejected_rewards⏎    return
    => margins = beta * (chosen_rewards - rejected_rewards)⏎    return
M10 reward without the reference | : chosen_rewards, => : beta * logps[0],
E1 temperature in scoring | logits.log_softmax => (logits / 0.9).log_softmax
# train.py
D6 a warm-up of part of a step | steps // 10)) => steps / 10))
D6 two steps decay | max(1, steps - warmup) => max(2, steps - warmup)
L16 loss overwritten | (losses.sum() => losses = -logps[0]⏎        (losses.sum()
L17 sum over the batch | (losses.sum() / len(ids) => losses.sum(
L19 the name of the loss is ignored | dpo.LOSSES[name] => dpo.dpo_loss
L20 settings never reach the loss | beta" or beta or => beta" or
L20 a loss's own beta is overruled | x.name != "beta" or beta or x.default is x.empty => True
B24 halves split wrongly | -1, len(ids)), => len(ids), -1).T,
C1 the policy is the reference | ref_logps[:, part] => logps.detach()
C2 reference carries gradient | @torch.no_grad()⏎def => def
C5 reference joined by place, not by pair | ref_logps[:, part] => ref_logps[:, : len(part)]
C5 reference of another order |
    if PROCESSES > 1:⏎        distributed.all_reduce
    => logps = logps.flip(1)⏎    if PROCESSES > 1:⏎        distributed.all_reduce
C8 reference without autocast |
    logps[:, part],
    => args = argparse.Namespace(**vars(args) | {'dtype': 'float32'})⏎        logps[:, part],
C14 reference after training | results["policy => table = score()⏎    results["policy
D1 accumulation not divided | (losses.sum() / len(ids) => losses.mean(
D2 divided twice | sum() / len(ids => mean() / len(ids
D3 short last part weighs like a full one | sum() / len(ids => mean() / len(parts
D6 schedule per micro-batch | step / warmup => 2 * step / warmup
D6 last rate is 0 | step + 1) / max => step) / max
gradients never cleared | group⏎    optimizer.zero_grad() => group
no clipping | args.max_grad_norm => float('inf')
D12 seed ignored | args.seed + 2) => 2)
D14 weights in bfloat16 | tokenizer).to(device) => tokenizer).to(device).bfloat16()
D16 new weights after loading | return model => return GPT(model.config)
D18 the untrained policy is saved |
    model.save_pretrained(out / "policy
    => build_model(args, tokenizer).save_pretrained(out / "policy
D19 logged loss is not the loss | loss": losses} => loss": losses / 2}
weight decay | weight_decay=0.0 => weight_decay=0.1
soft labels mixed the wrong way |
    soft[part] * losses + (1 - soft[part]) => (1 - soft[part]) * losses + soft[part]
V13 SimPO at DPO's beta | None, sft_epochs => 0.1, sft_epochs
M2 accuracy is summed | mean() for column => sum() for column
M4 last micro-batch logged | cat(logged, 1) => cat(len(logged) * logged[-1:], 1)
run, resume: the optimiser begins anew |
    )⏎        optimizer.load_state_dict(state["optimizer"]) => )
run, resume: the weights stay the reference's | )⏎        model.load_state_dict(state["model"]) => )
run, resume: the pairs in their first order |
    > done:⏎            yield step => <= steps - done:⏎            yield step + done
run, resume: one step is left out | if step > done: => if step > done + (done > 0):
run, resume: the half-trained policy is the reference |
    ref_logps = all_logps
    => if args.resume and (out / "checkpoint.pt").exists():⏎
            model.load_state_dict(load(out / "checkpoint.pt")["model"])⏎    ref_logps = all_logps
run, resume: other pairs held out | rows + held_out => rows
run, resume: flags that differ | run or vars(args) | kept != vars(args) => run
run, an old run is resumed from | (out / name).unlink(missing_ok=True) => pass
run, a run on real pairs is overwritten | config.get("data") => False
run, a run on real pairs is overwritten by the toy world |
    config.get("data => args.data and config.get("data
run, weights ruined by the last step |
    evaluates or saves:  # did this step ruin the model? => False:  #
run, evaluated as often as saved | ) if evaluates => ) if evaluates or saves
run, evaluations: twice too many | most = steps * PROCESSES => most = 2 * steps * PROCESSES
run, evaluations: one too many | math.ceil(steps / most) => int(steps / most)
run, a closed stdout | 0 or sys.stdout is None: => 0:
run, Jupyter's stdout | hasattr(sys.stdout, "reconfigure") => True
run, no compiler | with os_error("--compile") => if False
run, more than all held out | high = 1 if name => high = 2 if name
run, a loss that is not finite | not values.isfinite().all() => False
run, processes: more than pairs | ) if len(mine) else (): => ):
run, processes: a mean of unequal means |
    PROCESSES) * PROCESSES => PROCESSES) * PROCESSES - (PROCESSES > 1)
run, processes: none hears of the others |
    torch.nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model => model
run, processes: all take the same slice | ids[RANK::PROCESSES => ids[::PROCESSES
run, compile without being asked | args.compile: => True:
soft labels: lengths not swapped | lengths.flip(0) => lengths
run, resume: other pairs | config | pairs != => not
run, files of others are overwritten | not config and out.exists() and any(out.iterdir()) => False
run, --init is overwritten | in (init, *init.parents) => == init
run, processes: logged means of one alone |
    if PROCESSES > 1:⏎        distributed.all_reduce(values)
    => values *= PROCESSES⏎    if False:⏎        pass
run, processes: a collective on the CPU | all_reduce(logps)  # => all_reduce(logps.cpu())  #
run, RANK counts alone | TORCHELASTIC_RUN_ID => RANK
split: after prompts are cut |
    sides = data.split(pairs, args.held_out, seeded(args.seed))⏎
            rows, held_out = (data.encode_pairs(x, tokenizer, size) if x else [] for x in sides
    => rows = data.encode_pairs(pairs, tokenizer, size)⏎
            keyed = [row._replace(prompt=tuple(row.prompt)) for row in rows]⏎
            rows, held_out = data.split(keyed, args.held_out, seeded(args.seed))⏎
            rows, held_out = ([r._replace(prompt=list(r.prompt)) for r in x] for x in (rows,
    held_out)
schedule: no warm-up | step / warmup, decay => decay
# experiments/losses.py
L21 dpop fine with the wrong sign |
    ref_chosen_logps - policy_chosen_logps => policy_chosen_logps - ref_chosen_logps
L21 dpop fine outside the sigmoid | ) - beta * alpha * fallen) => )) + beta * alpha * fallen
V4 ORPO on sums |
    chosen = policy_chosen_logps / chosen_lengths⏎
        rejected = policy_rejected_logps / rejected_lengths⏎    return -chosen
    => chosen, rejected = policy_chosen_logps, policy_rejected_logps⏎    return -chosen
V5 ORPO odds unstable | -torch.expm1(logps => 1 - logps.exp(
V6 ORPO without its SFT term | chosen - alpha => alpha
V7 SimPO gamma inside beta | - rejected) - gamma => - rejected - gamma)
V8 SimPO on sums | policy_rejected_logps / rejected_lengths => policy_rejected_logps
V8 SimPO with a reference | policy_chosen_logps / => (policy_chosen_logps - ref_chosen_logps) /
# data.py
world: the coin is not the seed's | torch.rand(n, generator=generator) => torch.rand(n)
B6 the prompt counts | (start <= place) & (place < end) => place < end
B9 padding counts | ) & (place < end) => ).expand(-1, T)
B12 end token never scored | + [tokenizer.eot_token] for => for
B14 end token twice | tokenizer.eot_token] => tokenizer.eot_token] * 2
B17 tokens merge over the boundary |
    prompt, *responses = [tokenizer.encode_ordinary(text) for text in pair
    => encode = tokenizer.encode_ordinary⏎
            prompt, full = encode(pair[0]), [encode(pair[0] + text) for text in pair[1:]]⏎
            responses = [ids[len(prompt) - 1 :] for ids in full
B24 halves exchanged |
    += [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]
    => = [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected] + texts
B25 response cut away | if room < 1 or => if room < -999 or
B25 prompt cut on the right | prompt[-room:] => prompt[:room]
B27 over-truncation | = block_size - => = block_size - 1 -
B27 room for one side only | max(len(chosen), len(rejected) => len(chosen
B33 equal pairs kept | and pair.chosen != pair.rejected else => else
D12 never reshuffled |
    left = torch.empty(0, dtype=torch.long)⏎    while True:⏎        while len(left) < batch_size:⏎
                left = torch.cat([left, torch.randperm(len(rows), generator=generator)
    => left, order = torch.empty(0, dtype=torch.long), torch.randperm(len(rows),
    generator=generator)⏎    while True:⏎        while len(left) < batch_size:⏎
                left = torch.cat([left, order
gap closed from the wrong end | row["kl_to_optimum"] / max(gap => gap / max(row["kl_to_optimum"]
world: labels exchanged | hard": coin <= p => hard": coin > p
world: deterministic labels exchanged | deterministic": p >= 0.5 => deterministic": p <= 0.5
world: pairs not from the policy | logps.exp().multinomial => torch.ones_like(logps).multinomial
world: the reward is a sum | ) / max(len(opinions), 1) => )
world: not does not turn | "not": -1.0 => "not": 1.0
world: K words and an end | ][: self.K] for => ] for
world: log-probs of the wrong prompt |
    (self.prompt_ids.tolist(), self => (self.prompt_ids.tolist()[::-1], self
dialogues: the first turn is the prompt | both).rpartition( => both).partition(
dialogues: a response may hold a question | (Human|Assistant) => Assistant
dialogues: a response may go on | (Human|Assistant) => Human
dialogues: a response may be empty | all(map(str.strip, pair)) and pair => pair
dialogues: split though there is a prompt | if not prompt: => if True:
dialogues: Windows line ends | text.replace("\r\n", "\n") => text
messages: the prompt twice | both if all(prompt in y for y in both) else [ => [
messages: the prompt is lost | [prompt + y for y in both] => both
messages: each with its own prompt | all(prompt in => any(prompt in
messages: content of any type | turn["content"] => str(turn["content"])
messages: a text is the person's | "assistant", " => "user", "
pairs: repeats are dropped | return pairs => return list(dict.fromkeys(pairs))
pairs: the last one decides | if not pairs: => if not pair:
pairs: no count of repeats | len(pairs) - len(set(pairs)) => 0
pairs: one side's end tokens | response in both] => response in both[:1]]
a prompt without a token is kept | 1 or not prompt => 1
world: the corpus teaches no end | index(self.W) + 1] => index(self.W)]
world: chosen and rejected exchanged in rows | chosen], y[rejected => rejected], y[chosen
B4 first response token dropped | start <= place) => start < place)
D12 the remainder of an epoch is lost |
    cat([left, torch.randperm(len(rows), generator=generator)]
    => randperm(len(rows), generator=generator
M7 KL from the reference's responses | logps, ref_logps) => ref_logps, logps)
gap closed: KL the other way round | ref_logps, best => best, ref_logps
world: soft labels drawn as if they were hard | soft": coin <= 1 => soft": coin <= p
split: a prompt may be on both sides | held_out].append => held_out and len(sides[1]) < n].append
split: nothing is left to train on | (prompts) - 1) => (prompts))
# model.py
model: the middle blocks are skipped | self.h[:-1]: => self.h[:1]:
B23 causal flag forgotten | is_causal=True => is_causal=False
E3 temperature multiplies | (logits / temperature). => (logits * temperature).
E4 last position but one | context.shape[1] - 1 => context.shape[1] - 2
E5 no stop at the end token | :⏎                token = token.masked_fill(stopped, stop_token) => :
an id without text | with suppress(KeyError) => if True
run, another architecture is read as GPT-2's | given.get(key, fixed[key]) != fixed[key] => False
run, checkpoint written in its place | f"{path}.tmp", => path,
run, half a file is left | Path(f"{path}.tmp").unlink(missing_ok=True) => pass
run, a file may run code | weights_only=True)⏎⏎⏎@ => weights_only=False)⏎⏎⏎@
run, an older .bin is read beside new safetensors |
    not (folder / "model.safetensors => (folder / "pytorch_model.bin
run, a stale safetensors file stays | stale.unlink(missing_ok=True) => pass
run, an untied head is dropped |
    head is not None and not torch.equal(head, state.setdefault("wte.weight", head)) => False
run, the end token is not in config.json |
    asdict(self.config)
    => {k: v for k, v in asdict(self.config).items() if k != "eos_token_id"}⏎
            config |= {"eos_token_id": None}
model: the last block at other places | mixed.flatten(0, 1)[at] => mixed.flatten(0, 1)[at - 1]
model: scale of the residual projections | 02 / terms**0.5 => 02
# experiments/rlhf.py
PPO: the reward model reads what fills the row | WORLD.prompt_ids.shape[1] + LENGTHS[y] - 1 => -1
PPO: the reward model reads the token before | LENGTHS[y] - 1 => LENGTHS[y] - 2
PPO: Eq. 2 the wrong way round | chosen[i], drawn.rejected => rejected[i], drawn.chosen
PPO: rewards not set to 0 |
    rewards - (lab.listed(sft).exp() * rewards).sum(-1, keepdim=True) => rewards
PPO: value after the end | torch.where(mask[:, t], values[:, t], 0.0) => values[:, t]
PPO: advantage after the end |
    torch.where(mask[:, t], delta + lam * ahead, 0.0) => delta + lam * ahead
PPO: lambda forgotten | + lam * ahead => + ahead
PPO: returns are rewards | advantages + values => advantages
PPO: max in place of min | torch.min(ratio => torch.max(ratio
PPO: no clip | ratio.clamp(1 - clip, 1 + clip) => ratio
PPO: KL rewarded | -beta * (logps => beta * (logps
PPO: reward at every token | out[torch.arange(len(out)), last] += rewards => out += rewards[:, None]
PPO: token log-probs one late | 1 :].log_softmax => 2 : -1].log_softmax
PPO: reference moves along | copy.deepcopy(sft) => sft
PPO: adaptive beta the wrong way | beta * (1 + 0.1 * => beta * (1 - 0.1 *
PPO: place in the listing | + token + 1 => + token
PPO: filling counted in the loss | losses[mask].mean => losses.mean
PPO: filling counted in the critic's error | errors[mask].mean => errors.mean
PPO: critic never trained | ) + errors[mask].mean() => )
# experiments/claims.py
leak: pairs drawn from the reference in every round | (policy, pairs => (ref, pairs
leak: grammatical responses counted twice | (paired & ~grammatical) => paired
# experiments/course.py
course: optimum of the other KL upside down | ref_logps - ( => ref_logps + (
course: chosen responses that lost | ref.exp() * wins, => ref.exp() * (1 - wins),
# experiments/frontier.py
frontier: Best-of-N forgets ties below | below.clamp(min=0) ** n => 0
frontier: win rate without ties | ) + (margins == 0) / 2 => )
frontier: unlikelihood not normalised | ) / (1 - alpha)) => ))
frontier: nothing is ever above | curve[2]).max() => curve[2]).min()
# experiments/lab.py
lab: pairs of the wrong prompt | prompt == among => prompt != among
lab: every label flipped or none | generator) < flip => generator) > flip
lab: reference of the loss left out | ref[x, both], => 0 * ref[x, both],
lab: ranks without ties | - (counts - 1) / 2) => )
# experiments/shared_row.py
shared row: rejected sees chosen | mask[i, fork:, trunk:fork] = False => pass
shared row: positions run on | torch.where(place < fork, place, place - len(rest_w)) => place
shared row: one place late | prompt) - 1 :] => prompt) :]
shared row: halves exchanged | [:B], sums[B:] => [B:], sums[:B]
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
    tests/test_train_runs.py
also_copy=
    test_dpo.py
    tests
    experiments
"""
WHERE = ["dpo.*", "data.x_collate*", "data.x_batches*", "data.xǁToyWorld*", "model.xǁBlock*",
         "model.xǁGPTǁ__init__*", "model.xǁGPTǁforward*", "model.xǁGPTǁhidden*",
         "model.xǁGPTǁgenerate*", "train.x_update*", "train.x_call_loss*", "train.x_pair_logps*",
         "train.x_all_logps*", "train.x_schedule*", "train.x_means*"]  # fmt: skip


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
        text = (Path(clean) / file).read_text()
        assert old in text, f"{name}: the line to change is not there any more"
        text = text.replace(old, new, 1)
        compile(text, file, "exec")  # a bug that is no Python would be caught by anything
        (Path(copy) / file).write_text(text)
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
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
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
        (Path(folder) / "setup.cfg").write_text(GENERATED)

        def mutmut(*arguments, **settings):
            command = [sys.executable, "-m", "mutmut", *arguments]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.run(command, cwd=folder, env=env, text=True, **settings)

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
    report = [f"`python tests/mutants.py`: {total}.", "", "| bug | killed by |", "|---|---|"]
    report += [f"| {name} | `{caught or '**survives**'}` |" for name, caught in rows]
    if not args.only:
        (ROOT / "tests/mutants.md").write_text("\n".join(report) + "\n")
    print(total, *survived, sep="\n  survives: ")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
