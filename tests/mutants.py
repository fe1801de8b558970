"""Do the tests catch bugs? Plant one at a time in a copy of the code, run the tests, count.

    python tests/mutants.py               the bugs of public DPO code, planted by hand
    python tests/mutants.py --generated   every flipped operator, changed constant, exchanged pair
                                          of arguments, dropped keyword, deleted line (30 min)
    python tests/mutants.py --only L1     those whose name contains this

Writes tests/mutants.md (with --generated tests/mutants-generated.md). Exit status 1 if a bug
survives that is not explained in SURVIVORS.
"""

import argparse
import ast
import contextlib
import copy
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  what the code under test imports, once for all runs
import pytest
import tiktoken  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "test_dpo.py",
    *(
        f"tests/test_{x}.py"
        for x in ("losses", "logps", "data", "model", "train", "train_runs", "experiments")
    ),
]
FILES = [
    *("dpo.py", "data.py", "model.py", "train.py"),
    *(f"experiments/{x}.py" for x in ("losses", "lab", "rlhf", "frontier")),
    *(f"experiments/{x}.py" for x in ("claims", "verdicts", "sample")),
    "cli.py",
]


# Planted by hand: name, file, the line as it is, the line with the bug


M = "    margins = chosen_rewards - rejected_rewards  # (6): beta log Z(x) is in both and cancels"
L = "    losses = -F.logsigmoid(margins)  # (7): Eq. 2 with the policy's own reward"
RW = "    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)  # (5)"
SUM = (
    "    return torch.where(mask[:, 1:].bool(), logps, 0).sum(-1)  # `where`: 0 * -inf would be NaN"
)
STEP = "            (losses.sum() * share).backward()"
BETA_RHO = "beta * (policy_logps - ref_logps)  # (5)"
PLANTED = [
    ("L1 sign inverted", "dpo.py", L, "    losses = -F.logsigmoid(-margins)"),
    ("L1 minus forgotten", "dpo.py", L, "    losses = F.logsigmoid(margins)"),
    ("L2 chosen and rejected swapped in both", "dpo.py", M,
     "    margins = rejected_rewards - chosen_rewards"),
    ("L3 swapped in the reference only", "dpo.py", RW,
     "    ref_chosen_logps, ref_rejected_logps = ref_rejected_logps, ref_chosen_logps\n" + RW),
    ("L3 swapped in the policy only", "dpo.py", RW,
     "    policy_chosen_logps, policy_rejected_logps = policy_rejected_logps, policy_chosen_logps\n"
     + RW),
    ("L4 reference never subtracted", "dpo.py", BETA_RHO, "beta * policy_logps  # (5)"),
    ("L5 reference added", "dpo.py", BETA_RHO, "beta * (policy_logps + ref_logps)  # (5)"),
    ("L6 beta missing", "dpo.py", BETA_RHO, "policy_logps - ref_logps  # (5)"),
    ("L7 beta applied twice", "dpo.py", L, "    losses = -F.logsigmoid(beta * margins)"),
    ("L8 beta divides", "dpo.py", BETA_RHO, "(policy_logps - ref_logps) / beta  # (5)"),
    ("L9 beta outside the log-sigmoid", "dpo.py", L,
     "    losses = -beta * F.logsigmoid(margins / beta)"),
    ("L10 beta = 0 accepted", "dpo.py", "    if not beta > 0:", "    if not beta >= 0:"),
    ("L10 beta < 0 accepted", "dpo.py", "    if not beta > 0:", "    if beta == 0:"),
    ("L11 log(sigmoid)", "dpo.py", L, "    losses = -torch.log(torch.sigmoid(margins))"),
    ("L13 log forgotten", "dpo.py", L, "    losses = -torch.sigmoid(margins)"),
    ("L14 rejected detached", "dpo.py", M,
     "    margins = chosen_rewards - rejected_rewards.detach()"),
    ("L14 chosen detached", "dpo.py", M,
     "    margins = chosen_rewards.detach() - rejected_rewards"),
    ("L15 no gradient through the model", "dpo.py", "def response_logps(model, batch):",
     "@torch.no_grad()\ndef response_logps(model, batch):"),
    ("L16 loss overwritten", "train.py", STEP, "            losses = -chosen\n" + STEP),
    ("L17 sum over the batch", "train.py", STEP, "            losses.sum().backward()"),
    ("L19 the name of the loss is ignored", "cli.py", "        return dpo.LOSSES[name]",
     "        return dpo.LOSSES['dpo']"),
    ("L20 epsilon is ignored by cdpo", "dpo.py",
     "    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)",
     "    return -F.logsigmoid(m)"),
    ("L20 settings never reach the loss", "cli.py", "    named = known.keys() &",
     "    named = {'chosen_lengths', 'rejected_lengths', 'beta'} &"),
    ("L21 dpop fine with the wrong sign", "experiments/losses.py",
     "F.relu(ref_chosen_logps - policy_chosen_logps)",
     "F.relu(policy_chosen_logps - ref_chosen_logps)"),
    ("L21 dpop fine outside the sigmoid", "experiments/losses.py",
     "beta=beta) - beta * alpha * fallen)", "beta=beta)) + beta * alpha * fallen"),
    ("gradient: A.4's misprinted weight", "dpo.py",
     "    weights = torch.sigmoid(-reward_margins(*logps, beta=beta))",
     "    weights = torch.sigmoid(reward_margins(*logps, beta=beta))"),
    ("gradient: sign inverted", "dpo.py", "    return -beta * weights, beta * weights",
     "    return beta * weights, -beta * weights"),
    ("gradient: beta missing", "dpo.py", "    return -beta * weights, beta * weights",
     "    return -weights, weights"),
    ("weights: A.4's misprint in dpo_loss", "dpo.py",
     "    weights = torch.sigmoid(rejected_rewards - chosen_rewards)",
     "    weights = torch.sigmoid(chosen_rewards - rejected_rewards)"),
    ("weights carry gradient", "dpo.py", "(losses, weights.detach(),", "(losses, weights,"),
    ("rewards carry gradient", "dpo.py", "chosen_rewards.detach(), rej", "chosen_rewards, rej"),
    ("Eq. 3 KL the other way round", "dpo.py", "beta * kl_divergence(policy_logps, ref_logps)",
     "beta * kl_divergence(ref_logps, policy_logps)"),
    ("Eq. 3 reward under the reference", "dpo.py", "(policy_logps.exp() * rewards)",
     "(ref_logps.exp() * rewards)"),
    ("KL of probability 0 is NaN", "dpo.py",
     "(probs * torch.where(probs > 0, logps - other_logps, 0)).sum(-1)",
     "(probs * (logps - other_logps)).sum(-1)"),
    ("Eq. 4 beta multiplies", "dpo.py", "ref_logps + rewards / beta", "ref_logps + rewards * beta"),
    ("Eq. 4 without the reference", "dpo.py", "ref_logps + rewards / beta", "rewards / beta"),
    ("Eq. 4 not normalised", "dpo.py", "return unnormalised - log_Z[..., None], log_Z",
     "return unnormalised, log_Z"),
    ("Eq. 18 worst first", "dpo.py", "rewards.flip(-1).logcumsumexp(-1).flip(-1)",
     "rewards.logcumsumexp(-1)"),
    ("Eq. 20 without minus", "dpo.py", "    return -plackett_luce_logps(rewards)",
     "    return plackett_luce_logps(rewards)"),
    ("B1 no shift", "dpo.py", "float32(logits[:, :-1])", "float32(logits[:, 1:])"),
    ("B2 shift the wrong way", "dpo.py", "logps.gather(-1, ids[:, 1:, None])",
     "logps.gather(-1, ids[:, :-1, None])"),
    ("B3 mask not shifted", "dpo.py", "torch.where(mask[:, 1:].bool(), logps, 0)",
     "torch.where(mask[:, :-1].bool(), logps, 0)"),
    ("B4 first answer token dropped, both sides", "data.py",
     "    counts = torch.cat([chosen, rejected]).flatten()",
     "    counts = torch.cat([chosen - 1, rejected - 1]).flatten()"),
    ("B1 pair row, one late", "data.py", "+ prompt[pair, 0] - 1 + k", "+ prompt[pair, 0] + k"),
    ("B6 the prompt counts", "dpo.py", SUM, "    return logps.sum(-1)"),
    ("B9 padding counts", "dpo.py", SUM,
     "    return torch.where(mask[:, 1:].bool().cummax(-1).values, logps, 0).sum(-1)"),
    ("B11 mean for sum", "dpo.py", SUM,
     "    return torch.where(mask[:, 1:].bool(), logps, 0).sum(-1) / mask.sum(-1)"),
    ("B11 mean for sum in the pair row", "dpo.py", "    return sums[:B], sums[B:]",
     "    sums = sums / batch.owner.bincount(minlength=2 * B).clamp(min=1)\n"
     "    return sums[:B], sums[B:]"),
    ("B12 end token never scored", "data.py", "[ids + [tokenizer.eot_token] for",
     "[ids for"),
    ("B13 mask from ids: pad is the end token", "dpo.py",
     "    logps = at_least_float32(logits[:, :-1]).log_softmax(-1)  # position",
     "    mask = mask * (ids != 0)\n"
     "    logps = at_least_float32(logits[:, :-1]).log_softmax(-1)  # "),
    ("B14 end token twice", "data.py", "ids + [tokenizer.eot_token]",
     "ids + [tokenizer.eot_token] * 2"),
    ("B17 tokens merge over the boundary", "data.py",
     "        prompt, *answers = [tokenizer.encode_ordinary(text) for text in pair]",
     "        encode = tokenizer.encode_ordinary\n"
     "        prompt, full = encode(pair[0]), [encode(pair[0] + text) for text in pair[1:]]\n"
     "        answers = [ids[len(prompt) - 1 :] for ids in full]"),
    ("B22 positions counted on in the second answer", "data.py",
     "place - skip * (block == 2))", "place)"),
    ("shared beginning: scored as if the answers parted at once", "data.py",
     "(k > shared[pair, 0])", "(k > 0)"),
    ("shared beginning: fed twice", "data.py", "l[len(both) : -1]", "l[:-1]"),
    ("shared beginning: equal answers leave nothing to score", "data.py",
     "commonprefix([row.chosen[:-1], row.rejected[:-1]])",
     "commonprefix([row.chosen, row.rejected])"),
    ("B23 rejected sees chosen", "data.py",
     "mask = (same | (block == 0)[:, None, :]) & (place[:, None] >= place)",
     "mask = (place[:, None] >= place).expand(B, -1, -1)"),
    ("B23 not causal", "data.py", ") & (place[:, None] >= place)", ")"),
    ("B23 answers do not see the prompt", "data.py",
     "mask = (same | (block == 0)[:, None, :]) &", "mask = same &"),
    ("B23 causal flag forgotten", "model.py", "is_causal=True", "is_causal=False"),
    ("B24 halves split wrongly", "dpo.py", "    return sums[:B], sums[B:]",
     "    return sums[::2], sums[1::2]"),
    ("B24 halves exchanged", "dpo.py", "    return sums[:B], sums[B:]",
     "    return sums[B:], sums[:B]"),
    ("B25 answer cut away", "data.py", "if room < 1 or", "if room < -999 or"),
    ("B25 prompt cut on the right", "data.py", "prompt[-room:]", "prompt[:room]"),
    ("B27 over-truncation", "data.py", "room = block_size -", "room = block_size - 1 -"),
    ("B27 room for one side only", "data.py", "max(len(chosen), len(rejected))", "len(chosen)"),
    ("B30 masked NaN survives", "dpo.py", SUM, "    return (mask[:, 1:] * logps).sum(-1)"),
    ("B33 equal pairs kept", "data.py", "if pair and pair.chosen != pair.rejected:",
     "if pair:"),
    ("C1 the policy is the reference", "train.py",
     "        args = torch.stack([chosen, rejected]), ref_logps[:, pair_ids],",
     "        args = torch.stack([chosen, rejected]), torch.stack([chosen, rejected]).detach(),"),
    ("C2 reference carries gradient", "train.py",
     "@torch.no_grad()\ndef all_logps", "def all_logps"),
    ("C5 reference joined by place, not by pair", "train.py",
     "        args = torch.stack([chosen, rejected]), ref_logps[:, pair_ids],",
     "        args = torch.stack([chosen, rejected]), ref_logps[:, : len(pair_ids)],"),
    ("C5 reference of another order", "train.py", "    return gather(logps, parts,",
     "    return gather(logps[::-1], parts,"),
    ("C8 reference without autocast", "train.py",
     "        logps += [torch.stack(logps_of(model, batch, config))]",
     "        logps += [torch.stack(dpo.response_logps(model, batch))]"),
    ("C14 reference after training", "train.py",
     "    history = train_dpo(model, task, ref_logps, config, mark)",
     "    history = train_dpo(model, task, ref_logps, config, mark)\n"
     "    task.use_reference(model)"),
    ("D1 accumulation not divided", "train.py", STEP, "            losses.mean().backward()"),
    ("D2 divided twice", "train.py", STEP,
     "            (losses.sum() * share / len(pair_ids)).backward()"),
    ("D3 short last part weighs like a full one", "train.py", STEP,
     "            (losses.mean() / len(parts)).backward()"),
    ("D6 schedule per micro-batch", "train.py", "lr = peak_lr * min(1, step / warmup)",
     "lr = peak_lr * min(1, 2 * step / warmup)"),
    ("D6 last rate is 0", "train.py", "(steps - step + 1) / (steps - warmup)",
     "(steps - step) / (steps - warmup)"),
    ("gradients never cleared", "train.py", "        optimizer.zero_grad()\n", ""),
    ("no clipping", "train.py", "model.parameters(), config.max_grad_norm)",
     "model.parameters(), float('inf'))"),
    ("D12 never reshuffled", "data.py",
     "    while True:\n        epoch = []\n"
     "        for pool in torch.randperm(len(rows), generator=generator)",
     "    order = torch.randperm(len(rows), generator=generator)\n"
     "    while True:\n        epoch = []\n        for pool in order"),
    ("D12 seed ignored", "train.py",
     "    generator = torch.Generator().manual_seed(config.seed)\n    steps",
     "    generator = torch.Generator()\n    steps"),
    ("D13 log-softmax in bfloat16", "dpo.py",
     "    return logits.to(torch.promote_types(logits.dtype, torch.float32))", "    return logits"),
    ("D13 float64 cut to float32", "dpo.py",
     "    return logits.to(torch.promote_types(logits.dtype, torch.float32))",
     "    return logits.float()"),
    ("D14 weights in bfloat16", "train.py", "*shape)).to(config.device)",
     "*shape)).to(config.device).bfloat16()"),
    ("D16 new weights after loading", "train.py",
     "    return model.to(config.device)", "    return GPT(model.config).to(config.device)"),
    ("D18 the untrained policy is saved", "train.py", 'model.save_pretrained(out / "policy")',
     'build_model(config, task.tokenizer).save_pretrained(out / "policy")'),
    ("D19 logged loss is not the loss", "cli.py", '{"loss": record["loss"], "weight"',
     '{"loss": record["loss"] / 2, "weight"'),
    ("weight decay", "train.py", "weight_decay=0.0", "weight_decay=0.1"),
    ("soft labels mixed the wrong way", "train.py", "p * losses + (1 - p) * swapped",
     "(1 - p) * losses + p * swapped"),
    ("V1 IPO without 1/beta", "dpo.py", "- 0.5) / beta) ** 2", "- 0.5)) ** 2"),
    ("V1 IPO target 1", "dpo.py", "- 0.5) / beta) ** 2", "- 1.0) / beta) ** 2"),
    ("V4 ORPO on sums", "experiments/losses.py",
     "    chosen = policy_chosen_logps / chosen_lengths\n"
     "    rejected = policy_rejected_logps / rejected_lengths\n    return -chosen",
     "    chosen, rejected = policy_chosen_logps, policy_rejected_logps\n    return -chosen"),
    ("V5 ORPO odds unstable", "experiments/losses.py", "(-torch.expm1(logps)).log()",
     "(1 - logps.exp()).log()"),
    ("V6 ORPO without its SFT term", "experiments/losses.py", "    return -chosen - alpha *",
     "    return -alpha *"),
    ("V7 SimPO gamma inside beta", "experiments/losses.py", "beta * (chosen - rejected) - gamma",
     "beta * (chosen - rejected - gamma)"),
    ("V8 SimPO on sums", "experiments/losses.py",
     "    rejected = policy_rejected_logps / rejected_lengths\n    return -F",
     "    rejected = policy_rejected_logps\n    return -F"),
    ("V8 SimPO with a reference", "experiments/losses.py",
     "    chosen = policy_chosen_logps / chosen_lengths\n    rejected = policy_rejected_logps / "
     "rejected_lengths\n    return -F",
     "    chosen = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths\n"
     "    rejected = policy_rejected_logps / rejected_lengths\n    return -F"),
    ("V10 cDPO smoothed the wrong way", "dpo.py",
     "    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)",
     "    return -epsilon * F.logsigmoid(m) - (1 - epsilon) * F.logsigmoid(-m)"),
    ("V11 robust without its normaliser", "dpo.py", ") / (1 - 2 * epsilon)", ")"),
    ("V11 epsilon of 1/2 accepted", "dpo.py", "0 <= epsilon < 0.5", "0 <= epsilon <= 0.5"),
    ("V12 a setting the loss does not name", "cli.py",
     "        if name in given and name not in named:", "        if False:"),
    ("V13 SimPO at DPO's beta", "cli.py", "beta=None, epochs", "beta=0.1, epochs"),
    ("M1 ties count 0", "dpo.py", "+ (margins == 0).float() / 2", ""),
    ("M2 accuracy is summed", "cli.py", "column.mean().item()", "column.sum().item()"),
    ("M3 margins times beta once more", "dpo.py",
     "    margins = chosen_rewards - rejected_rewards\n    return {",
     "    margins = beta * (chosen_rewards - rejected_rewards)\n    return {"),
    ("M4 last micro-batch logged", "train.py", "gather(records, places,",
     "gather(len(records) * records[-1:], places,"),
    ("M7 KL from the pairs' answers", "train.py", "dpo.kl_divergence(logps, self.ref),",
     "(logps - self.ref)[prompt, chosen],"),
    ("M10 reward without the reference", "dpo.py",
     "        \"chosen_reward\": chosen_rewards,", "        \"chosen_reward\": beta * logps[0],"),
    ("gap closed from the wrong end", "train.py", 'row["kl_to_optimum"] / self.gap',
     'self.gap / row["kl_to_optimum"]'),
    ("E1 temperature in scoring", "dpo.py", "    logps = at_least_float32(logits).log_softmax(-1)",
     "    logps = (at_least_float32(logits) / 0.9).log_softmax(-1)"),
    ("E3 sampler with top-k left on", "model.py", "        if top_k is not None:",
     "        top_k = top_k or 3\n            if top_k is not None:"),
    ("E3 temperature multiplies", "model.py", "(logits / temperature).softmax",
     "(logits * temperature).softmax"),
    ("E4 last position but one", "model.py", "* context.shape[1] - 1", "* context.shape[1] - 2"),
    ("E5 no stop at the end token", "model.py",
     "                token = token.masked_fill(stopped, stop_token)\n", ""),
    ("world: labels exchanged", "data.py", '"hard": coin > p', '"hard": coin < p'),
    ("world: deterministic labels exchanged", "data.py", '"deterministic": margins < 0',
     '"deterministic": margins > 0'),
    ("world: pairs not from the policy", "data.py", "logps.exp().multinomial",
     "torch.ones_like(logps).multinomial"),
    ("world: the reward is a sum", "data.py", "(opinions) / max(len(opinions), 1)", "(opinions)"),
    ("world: not does not turn", "data.py", '"not": -1.0', '"not": 1.0'),
    ("world: K words and an end", "data.py", "[*y, self.W][: self.K] for y", "[*y, self.W] for y"),
    ("world: enumeration without the end", "data.py", "listed.append(longer[..., W])",
     "listed.append(so_far)"),
    ("PPO: the reward model reads what fills the row", "experiments/rlhf.py",
     "last = WORLD.prompt_ids.shape[1] + LENGTHS[y] - 1", "last = -1"),
    ("PPO: the reward model reads the token before", "experiments/rlhf.py",
     "+ LENGTHS[y] - 1", "+ LENGTHS[y] - 2"),
    ("PPO: Eq. 2 the wrong way round", "experiments/rlhf.py",
     "torch.cat([drawn.chosen[i], drawn.rejected[i]])",
     "torch.cat([drawn.rejected[i], drawn.chosen[i]])"),
    ("PPO: rewards not set to 0", "experiments/rlhf.py",
     "return rewards - (lab.listed(sft).exp() * rewards).sum(-1, keepdim=True)", "return rewards"),
    ("PPO: value after the end", "experiments/rlhf.py",
     "following = torch.where(mask[:, t], values[:, t], 0.0)", "following = values[:, t]"),
    ("PPO: advantage after the end", "experiments/rlhf.py",
     "ahead = torch.where(mask[:, t], delta + lam * ahead, 0.0)", "ahead = delta + lam * ahead"),
    ("PPO: lambda forgotten", "experiments/rlhf.py", "delta + lam * ahead", "delta + ahead"),
    ("PPO: returns are rewards", "experiments/rlhf.py", "advantages + values", "advantages"),
    ("PPO: max in place of min", "experiments/rlhf.py", "-torch.min(ratio", "-torch.max(ratio"),
    ("PPO: no clip", "experiments/rlhf.py", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
    ("PPO: KL rewarded", "experiments/rlhf.py", "-beta * (logps - ref", "beta * (logps - ref"),
    ("PPO: reward at every token", "experiments/rlhf.py",
     "out[torch.arange(len(out)), last] += rewards", "out += rewards[:, None]"),
    ("PPO: token log-probs one late", "experiments/rlhf.py",
     "[:, start - 1 :].log_softmax", "[:, start - 2 : -1].log_softmax"),
    ("PPO: reference moves along", "experiments/rlhf.py",
     "policy, ref, critic = copy.deepcopy(sft), sft,", "policy, ref, critic = sft, sft,"),
    ("PPO: adaptive beta the wrong way", "experiments/rlhf.py",
     "beta * (1 + 0.1 *", "beta * (1 - 0.1 *"),
    ("PPO: place in the listing", "experiments/rlhf.py", "+ token + 1", "+ token"),
    ("PPO: filling counted in the loss", "experiments/rlhf.py", "losses[mask].mean()",
     "losses.mean()"),
    ("PPO: filling counted in the critic's error", "experiments/rlhf.py", "errors[mask].mean()",
     "errors.mean()"),
    ("PPO: critic never trained", "experiments/rlhf.py", " + errors[mask].mean()", ""),
    ("leak: pairs drawn from the reference in every round", "experiments/claims.py",
     "draw_pairs(policy, pairs", "draw_pairs(ref, pairs"),
    ("leak: grammatical answers counted twice", "experiments/claims.py",
     "(paired & ~grammatical)", "paired"),
    ("frontier: Best-of-N forgets ties below", "experiments/frontier.py",
     "below.clamp(min=0) ** n", "0"),
    ("frontier: win rate without ties", "experiments/frontier.py", " + (margins == 0) / 2", ""),
    ("frontier: unlikelihood not normalised", "experiments/frontier.py", " / (1 - alpha)).log",
     ").log"),
    ("frontier: nothing is ever above", "experiments/frontier.py",
     "SWEEP * curve[2]).max()", "SWEEP * curve[2]).min()"),
    ("lab: pairs of the wrong prompt", "experiments/lab.py", "drawn.prompt == among",
     "drawn.prompt != among"),
    ("lab: every label flipped or none", "experiments/lab.py", "generator=generator) < flip",
     "generator=generator) > flip"),
    ("lab: reference of the loss left out", "experiments/lab.py", "ref[x, both], LENGTHS",
     "0 * ref[x, both], LENGTHS"),
    ("lab: ranks without ties", "experiments/lab.py", "- (counts - 1) / 2", ""),
    ("run, resume: the optimiser begins anew", "train.py",
     '        optimizer.load_state_dict(saved["optimizer"])\n', ""),
    ("run, resume: the weights stay the reference's", "train.py",
     '        model.load_state_dict(saved["model"])\n', ""),
    ("run, resume: the pairs in their first order", "train.py", "generator), done, None)",
     "generator), 0, None)"),
    ("run, resume: one step is left out", "train.py", "zip(range(done + 1,", "zip(range(done + 2,"),
    ("run, resume: the half-trained policy is the reference", "train.py",
     "    task.use_reference(model)  # the toy's pairs are drawn from it\n",
     '    if config.resume and (out / "checkpoint.pt").exists():\n'
     '        model.load_state_dict(load(out / "checkpoint.pt")["model"])\n'
     "    task.use_reference(model)\n"),
    ("run, resume: files of another run", "train.py", 'saved.get("mark") != mark', "False"),
    ("run, resume: another loss of that name", "train.py", "repr((settings, loss, task",
     "repr((settings, task"),
    ("run, resume: other pairs held out", "train.py", "task.rows, task.held_out)", "task.rows)"),
    ("run, resume: flags that differ", "cli.py", 'if name != "device" and value not',
     "if 1 < 0 and value not"),
    ("run, an old run is resumed from", "train.py",
     "            (out / name).unlink(missing_ok=True)", "            pass"),
    ("run, an unfinished run is overwritten", "train.py", "if unfinished and", "if False and"),
    ("run, an unfinished run is overwritten by the toy world", "train.py",
     "if unfinished and", "if unfinished and config.data and"),
    ("run, resume: other pairs right after SFT", "train.py",
     'if config.resume and json.loads(settings.read_text()).get("mark") != mark:', "if False:"),
    ("run, weights ruined by the last step", "train.py",
     "if not all(map(math.isfinite, metrics.values())):", "if False:"),
    ("run, every error is a lack of memory", "train.py",
     "if not any(text in repr(error) for text in NO_MEMORY):", "if False:"),
    ("run, another architecture is read as GPT-2's", "model.py",
     "if given.get(key, ours) != ours", "if False"),
    ("run, checkpoint written in its place", "model.py", 'Path(f"{path}.tmp")', "Path(path)"),
    ("run, half a file is left", "model.py", "        beside.unlink(missing_ok=True)\n", ""),
    ("run, a file may run code", "model.py", "weights_only=True)\n    except Exception",
     "weights_only=False)\n    except Exception"),
    ("run, Ctrl-C loses the steps since the checkpoint", "train.py",
     "config.save_every == 0 or stop.any())", "config.save_every == 0)"),
    ("run, Ctrl-C stays ours", "cli.py", "            signal.signal(sort, handler)",
     "            pass"),
    ("run, a loss that is not finite", "cli.py",
     "if not (finite.all() and grad_norm.isfinite()):", "if not grad_norm.isfinite():"),
    ("run, a gradient that is not finite", "cli.py",
     "if not (finite.all() and grad_norm.isfinite()):", "if not finite.all():"),
    ("run, not finite, found after the step", "train.py",
     "        look = step in (1,", "        optimizer.step()\n        look = step in (1,"),
    ("run, processes: more than pairs", "train.py", " if len(mine) else ()", ""),
    ("run, processes: an idle one counts", "train.py", "share = 0 if idle else PROCESSES",
     "share = PROCESSES"),
    ("run, processes: a mean of unequal means", "train.py", STEP,
     "            (losses.mean() * (share > 0)).backward()"),
    ("run, processes: none hears of the others", "train.py",
     "net = DistributedDataParallel(model) if", "net = model if"),
    ("run, processes: all take the same slice", "train.py", "part[RANK::PROCESSES]",
     "part[::PROCESSES]"),
    ("run, compile without being asked", "train.py", "    if config.compile:\n", "    if True:\n"),
    ("dialogues: the first turn is the prompt", "data.py", "rpartition(ASSISTANT)",
     "partition(ASSISTANT)"),
    ("dialogues: an answer may hold a question", "data.py", "(Human|Assistant):", "Assistant:"),
    ("dialogues: an answer may go on", "data.py", "(Human|Assistant):", "Human:"),
    ("dialogues: an answer may be empty", "data.py", "x.strip() and not re", "not re"),
    ("dialogues: split though there is a prompt", "data.py", '"prompt" not in record and ', ""),
    ("a prompt without a token is kept", "data.py", "room < 1 or not prompt", "room < 1"),
    ("world: soft labels flipped as if they were hard", "data.py", '"soft": coin > 1',
     '"soft": coin > p'),
    ("world: the corpus teaches no end", "data.py", "index(self.W) + 1]", "index(self.W)]"),
    ("world: chosen and rejected exchanged in rows", "data.py", "answers[y], answers[z])",
     "answers[z], answers[y])"),
]  # fmt: skip


# Generated: small changes to every line of these functions


WHERE = {  # None: the whole file
    "dpo.py": None,
    "experiments/losses.py": None,
    "data.py": {
        *("load_pairs", "split_dialogues", "encode_pairs", "collate", "batches"),
        *("reward", "corpus", "draw_pairs", "rows", "logps"),
    },
    "model.py": {"forward", "generate"},
    "train.py": {
        *("use_reference", "exact", "evaluate", "train_sft", "train_dpo"),
        *("updates", "backward", "logps_of", "all_logps"),
    },
    "cli.py": {"load_loss", "call_loss", "means"},
}
SWAP = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}


def changes(node):
    """Every small change to this node, as source text in its place."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield repr(node.value + 1)
    signed = isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant)
    if signed and isinstance(node.op, (ast.USub, ast.Not)):
        yield f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.IfExp):
        yield f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    for field in ("op", "ops"):
        op = getattr(node, field, None)
        op = op[0] if isinstance(op, list) else op
        if type(op) in SWAP and not isinstance(node, ast.AugAssign):
            other = copy.deepcopy(node)
            setattr(other, field, SWAP[type(op)]() if field == "op" else [SWAP[type(op)]()])
            yield f"({ast.unparse(other)})"
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("detach", "double", "float"):
            yield ast.unparse(node.func.value)
        symmetric = ast.unparse(node.func).split(".")[-1] in (
            "check_shapes",
            "promote_types",
            "max",
        )
        starred = any(isinstance(arg, ast.Starred) for arg in node.args[:2])
        if len(node.args) > 1 and not starred and not symmetric:
            other = copy.deepcopy(node)
            other.args[:2] = other.args[1::-1]
            yield ast.unparse(other)
        for i in range(len(node.keywords)):
            other = copy.deepcopy(node)
            del other.keywords[i]
            yield ast.unparse(other)
    if isinstance(node, (ast.Expr, ast.AugAssign)) and not is_text(node):
        yield "pass"


def is_warning(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "progress")


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.Constant, ast.Yield))


def generated():
    for file, functions in WHERE.items():
        source = (ROOT / file).read_text()
        lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
        starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
        whole = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        whole = [node for node in whole if functions is None or node.name in functions]
        silent, seen = set(), set()
        for function in whole:
            for node in ast.walk(function):
                if isinstance(node, (ast.JoinedStr, ast.Raise)) or is_warning(node):  # a message
                    silent |= {id(part) for part in ast.walk(node)}
                if isinstance(node, ast.Assert) and node.msg:
                    silent |= {id(part) for part in ast.walk(node.msg)}
            if any("no_grad" in ast.unparse(mark) for mark in function.decorator_list):
                name = f"{file} {function.name}: no_grad removed"
                yield name, file, "@torch.no_grad()", "@torch.enable_grad()"
            for node in ast.walk(function):
                if id(node) in silent or not hasattr(node, "end_lineno"):
                    continue
                at = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                text = source.encode()
                for new in changes(node):
                    if (at, end, new) in seen:
                        continue
                    seen.add((at, end, new))
                    old = " ".join(text[at:end].decode().split())
                    changed = (text[:at] + new.encode() + text[end:]).decode()
                    name = f"{file}:{node.lineno} {function.name}: {old} -> {' '.join(new.split())}"
                    yield name, file, None, changed


# Running


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
    with tempfile.TemporaryDirectory() as planted:
        shutil.copytree(clean, planted, dirs_exist_ok=True)
        text = (Path(clean) / file).read_text()
        if old is not None:
            assert old in text, f"{name}: the line to change is not there any more"
            new = text.replace(old, new, 1)
        compile(new, file, "exec")  # a bug that is no Python would be caught by anything
        (Path(planted) / file).write_text(new)
        os.chdir(planted)
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError))
        signal.alarm(400)  # some bugs never end
        first = FirstFailure()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            stem, folder = Path(file).stem, Path(file).parent.name  # its own tests first
            runs = name.startswith("run")
            tests = sorted(
                TESTS, key=lambda x: (("runs" in x) != runs, stem not in x, folder not in x)
            )
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [first])
        signal.alarm(0)
        os.chdir("/")
        return name, first.name or ("" if status == 0 else "no test can start")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--generated", action="store_true", help="every small change to every line")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    mutants = [m for m in (generated() if args.generated else PLANTED) if args.only in m[0]]
    rows = []
    with tempfile.TemporaryDirectory() as clean:
        for item in (*FILES, *TESTS, "experiments/__init__.py", "tests/conftest.py"):
            (Path(clean) / item).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / item, Path(clean) / item)
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        pool = multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1)
        nothing = ("no bug", "dpo.py", "", "")
        (_, failed), start = pool.apply(run, (nothing, clean)), time.time()
        assert not failed, f"without any bug {failed} fails"
        for row in pool.imap(functools.partial(run, clean=clean), mutants):
            rows.append(row)
            left = (time.time() - start) / len(rows) * (len(mutants) - len(rows))
            line = f"{len(rows)}/{len(mutants)}  {left:.0f} s left  {row[0]}"
            print(f"{line}: {row[1] or 'SURVIVED'}", flush=True)
    survived = [name for name, caught in rows if not caught]
    unexplained = [name for name in survived if not explained(name)]
    total = (
        f"{len(rows)} bugs planted, {len(rows) - len(survived)} killed, {len(survived)} survived"
    )
    report = [f"`python tests/mutants.py{' --generated' * args.generated}`: {total}.", ""]
    report += ["| bug | killed by, or why it survives |", "|---|---|"]
    for name, caught in rows:
        if caught and args.generated:
            continue  # the survivors are what one wants to read
        caught = f"`{caught.replace('|', '/')}`" if caught else f"**survives**: {explained(name)}"
        report.append(f"| {name.replace('|', '/')} | {caught} |")
    if not args.only:
        where = f"tests/mutants{'-generated' * args.generated}.md"
        (ROOT / where).write_text("\n".join(report) + "\n")
    print(total, *unexplained, sep="\n  unexplained: ")
    sys.exit(bool(unexplained))


def explained(name):
    return next((why for text, why in SURVIVORS.items() if text in name), "")


SURVIVORS = {
    "kl_divergence: 0 -> 1": "it is multiplied by a probability of 0",
    "coin > p -> (coin >= p)": "equal with probability 0",
    "margins < 0 -> (margins <= 0)": "between equally good answers either may win",
    "dtype=torch.float64) -> torch.zeros(P, 1)": "float32 0 plus float64 is float64",
    "transpose(1, 2) -> ": "exchanging two dimensions has no order",
    "torch.arange(ids.shape[1], device": "the CPU is the only device of these tests",
    "torch.zeros(B, 1, dtype=torch.bool, device=ids.device) -> torch.zeros(B, 1, dt": "as above",
    "torch.arange(1, B + 1, device=ids.device) -> ": "as above",
    "generate: no_grad removed": "only memory: drawn tokens carry no gradient",
    "min(top_k, logits.shape[-1]) -> ": "the smaller of two has no order",
    ".float() -> self(context, score_at=last)": "the model of these tests is float32 already",
}

if __name__ == "__main__":
    main()
