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
    *("test_dpo.py", "tests/test_shared_row.py", "tests/test_experiments.py"),
    *(
        f"tests/test_{x}.py"
        for x in ("losses", "logps", "data", "model", "train", "train_runs")
    ),
]
FILES = [
    *("dpo.py", "data.py", "model.py", "train.py"),
    *(f"experiments/{x}.py" for x in ("losses", "lab", "rlhf", "frontier")),
    *(f"experiments/{x}.py" for x in ("claims", "verdicts", "sample", "shared_row", "bench")),
]


# Planted by hand: name, file, the line as it is, the line with the bug


PLANTED = [
    ("L1 sign inverted", "dpo.py",
     "    losses = -F.logsigmoid(margins)  # (7)", "    losses = -F.logsigmoid(-margins)  #"),
    ("L1 minus forgotten", "dpo.py",
     "    losses = -F.logsigmoid(margins)  # (7)", "    losses = F.logsigmoid(margins)  #"),
    ("L2 chosen and rejected swapped in both", "dpo.py",
     "    margins = chosen_rewards - rejected_rewards  # (6)",
     "    margins = rejected_rewards - chosen_rewards  #"),
    ("L3 swapped in the reference only", "dpo.py",
     "    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, "
     "beta)  # (5)",
     "    ref_chosen_logps, ref_rejected_logps = ref_rejected_logps, ref_chosen_logps\n"
     "    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, "
     "beta)  # (5)"),
    ("L3 swapped in the policy only", "dpo.py",
     "    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, "
     "beta)  # (5)",
     "    policy_chosen_logps, policy_rejected_logps = policy_rejected_logps, "
     "policy_chosen_logps\n"
     "    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, "
     "beta)  # (5)"),
    ("L4 reference never subtracted", "dpo.py",
     "beta * (policy_logps - ref_logps)  # (5)", "beta * policy_logps  # (5)"),
    ("L5 reference added", "dpo.py",
     "beta * (policy_logps - ref_logps)  # (5)", "beta * (policy_logps + ref_logps)  # (5)"),
    ("L6 beta missing", "dpo.py",
     "beta * (policy_logps - ref_logps)  # (5)", "policy_logps - ref_logps  # (5)"),
    ("L7 beta applied twice", "dpo.py",
     "    losses = -F.logsigmoid(margins)  # (7)", "    losses = -F.logsigmoid(beta * margins)  #"),
    ("L8 beta divides", "dpo.py",
     "beta * (policy_logps - ref_logps)  # (5)", "(policy_logps - ref_logps) / beta  # (5)"),
    ("L9 beta outside the log-sigmoid", "dpo.py",
     "    losses = -F.logsigmoid(margins)  # (7)",
     "    losses = -beta * F.logsigmoid(margins / beta)  #"),
    ("L10 beta = 0 accepted", "dpo.py", "    if not beta > 0:", "    if not beta >= 0:"),
    ("L10 beta < 0 accepted", "dpo.py", "    if not beta > 0:", "    if beta == 0:"),
    ("L11 log(sigmoid)", "dpo.py",
     "    losses = -F.logsigmoid(margins)  # (7)",
     "    losses = -torch.log(torch.sigmoid(margins))  #"),
    ("L13 log forgotten", "dpo.py",
     "    losses = -F.logsigmoid(margins)  # (7)", "    losses = -torch.sigmoid(margins)  #"),
    ("L14 rejected detached", "dpo.py",
     "    margins = chosen_rewards - rejected_rewards  # (6)",
     "    margins = chosen_rewards - rejected_rewards.detach()  #"),
    ("L14 chosen detached", "dpo.py",
     "    margins = chosen_rewards - rejected_rewards  # (6)",
     "    margins = chosen_rewards.detach() - rejected_rewards  #"),
    ("L15 no gradient through the model", "dpo.py",
     "def response_logps(model, ids, mask):",
     "@torch.no_grad()\n"
     "def response_logps(model, ids, mask):"),
    ("L16 loss overwritten", "train.py",
     "        (losses.sum() / len(ids)).backward()",
     "        losses = -logps[0]\n"
     "        (losses.sum() / len(ids)).backward()"),
    ("L17 sum over the batch", "train.py",
     "        (losses.sum() / len(ids)).backward()", "        losses.sum().backward()"),
    ("L19 the name of the loss is ignored", "train.py",
     "else dpo.LOSSES[name]", "else dpo.dpo_loss"),
    ("L20 epsilon is ignored by cdpo", "dpo.py",
     "    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)",
     "    return -F.logsigmoid(m)"),
    ("L20 settings never reach the loss", "train.py",
     "if known.get(name) is not None]", "if name != 'beta' and name in known]"),
    ("L21 dpop fine with the wrong sign", "experiments/losses.py",
     "F.relu(ref_chosen_logps - policy_chosen_logps)",
     "F.relu(policy_chosen_logps - ref_chosen_logps)"),
    ("L21 dpop fine outside the sigmoid", "experiments/losses.py",
     "beta=beta) - beta * alpha * fallen)", "beta=beta)) + beta * alpha * fallen"),
    ("gradient: A.4's misprinted weight", "dpo.py",
     "    weights = torch.sigmoid(-reward_margins(*logps, beta=beta))",
     "    weights = torch.sigmoid(reward_margins(*logps, beta=beta))"),
    ("gradient: sign inverted", "dpo.py",
     "    return -beta * weights, beta * weights", "    return beta * weights, -beta * weights"),
    ("gradient: beta missing", "dpo.py",
     "    return -beta * weights, beta * weights", "    return -weights, weights"),
    ("weights: A.4's misprint in dpo_loss", "dpo.py",
     "    weights = torch.sigmoid(rejected_rewards - chosen_rewards)",
     "    weights = torch.sigmoid(chosen_rewards - rejected_rewards)"),
    ("weights carry gradient", "dpo.py", "(losses, weights.detach(),", "(losses, weights,"),
    ("rewards carry gradient", "dpo.py", "chosen_rewards.detach(), rej", "chosen_rewards, rej"),
    ("Eq. 3 KL the other way round", "dpo.py",
     "beta * kl_divergence(policy_logps, ref_logps)",
     "beta * kl_divergence(ref_logps, policy_logps)"),
    ("Eq. 3 reward under the reference", "dpo.py",
     "(policy_logps.exp() * rewards)", "(ref_logps.exp() * rewards)"),
    ("KL of probability 0 is NaN", "dpo.py",
     "(probs * torch.where(probs > 0, logps - other_logps, 0)).sum(-1)",
     "(probs * (logps - other_logps)).sum(-1)"),
    ("Eq. 4 beta multiplies", "dpo.py", "ref_logps + rewards / beta", "ref_logps + rewards * beta"),
    ("Eq. 4 without the reference", "dpo.py", "ref_logps + rewards / beta", "rewards / beta"),
    ("Eq. 4 not normalised", "dpo.py",
     "return unnormalised - log_Z[..., None], log_Z", "return unnormalised, log_Z"),
    ("Eq. 18 worst first", "dpo.py",
     "rewards.flip(-1).logcumsumexp(-1).flip(-1)", "rewards.logcumsumexp(-1)"),
    ("Eq. 20 without minus", "dpo.py",
     "    return -plackett_luce_logps(rewards)", "    return plackett_luce_logps(rewards)"),
    ("B1 no shift", "dpo.py",
     "    targets = ids[:, 1:].flatten()[at]", "    targets = ids[:, :-1].flatten()[at]"),
    ("B2 shift the wrong way", "dpo.py", "model(ids[:, :-1], at)", "model(ids[:, 1:], at)"),
    ("B3 mask not shifted", "dpo.py", "at = mask[:, 1:].flatten()", "at = mask[:, :-1].flatten()"),
    ("B6 the prompt counts", "data.py",
     "return ids, (start <= place) & (place < end)", "return ids, place < end"),
    ("B9 padding counts", "data.py",
     "return ids, (start <= place) & (place < end)", "return ids, (start <= place).expand(-1, T)"),
    ("B11 mean for sum", "dpo.py",
     "    return logps.new_zeros(len(ids)).index_add(",
     "    logps = logps / mask.sum(1)[at // (ids.shape[1] - 1)]\n"
     "    return logps.new_zeros(len(ids)).index_add("),
    ("B12 end token never scored", "data.py", "[ids + [tokenizer.eot_token] for", "[ids for"),
    ("B13 mask from ids: pad is the end token", "dpo.py",
     "at = mask[:, 1:].flatten()", "at = (mask & (ids != 0))[:, 1:].flatten()"),
    ("B14 end token twice", "data.py",
     "ids + [tokenizer.eot_token]", "ids + [tokenizer.eot_token] * 2"),
    ("B17 tokens merge over the boundary", "data.py",
     "        prompt, *responses = [tokenizer.encode_ordinary(text) for text in pair]",
     "        encode = tokenizer.encode_ordinary\n"
     "        prompt, full = encode(pair[0]), [encode(pair[0] + text) for text in "
     "pair[1:]]\n"
     "        responses = [ids[len(prompt) - 1 :] for ids in full]"),
    ("B23 causal flag forgotten", "model.py", "is_causal=True", "is_causal=False"),
    ("B24 halves split wrongly", "train.py",
     "    return logps.view(-1, len(ids)), mask", "    return logps.view(len(ids), -1).T, mask"),
    ("B24 halves exchanged", "data.py",
     "    texts += [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]",
     "    texts = [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected] + "
     "texts"),
    ("B25 response cut away", "data.py", "if room < 1 or", "if room < -999 or"),
    ("B25 prompt cut on the right", "data.py", "prompt[-room:]", "prompt[:room]"),
    ("B27 over-truncation", "data.py", "room = block_size -", "room = block_size - 1 -"),
    ("B27 room for one side only", "data.py", "max(len(chosen), len(rejected))", "len(chosen)"),
    ("B30 masked NaN survives", "dpo.py",
     "    at = mask[:, 1:].flatten().nonzero().squeeze(-1).to(ids.device)  # (N,): t "
     "predicts token t + 1\n"
     "    logits = at_least_float32(model(ids[:, :-1], at))  # (N, V), nowhere else\n"
     "    targets = ids[:, 1:].flatten()[at]\n"
     "    logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # "
     "(N,)\n",
     "    at = torch.arange(ids[:, 1:].numel())\n"
     "    logits = at_least_float32(model(ids[:, :-1], at))\n"
     "    targets = ids[:, 1:].flatten()\n"
     "    logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1) * "
     "mask[:, 1:].flatten()\n"),
    ("B33 equal pairs kept", "data.py",
     " and pair.chosen != pair.rejected else None", " else None"),
    ("C1 the policy is the reference", "train.py",
     "ref = () if ref_logps is None else ref_logps[:, part]",
     "ref = () if ref_logps is None else logps.detach()"),
    ("C2 reference carries gradient", "train.py",
     "@torch.no_grad()\n"
     "def all_logps",
     "def all_logps"),
    ("C5 reference joined by place, not by pair", "train.py",
     "else ref_logps[:, part]", "else ref_logps[:, : len(part)]"),
    ("C5 reference of another order", "train.py",
     "    if PROCESSES > 1:\n"
     "        distributed.all_reduce(logps)",
     "    logps = logps.flip(1)\n"
     "    if PROCESSES > 1:\n"
     "        distributed.all_reduce(logps)"),
    ("C8 reference without autocast", "train.py",
     "        logps[:, part], _ = pair_logps(model, rows, part, args)",
     "        args = argparse.Namespace(**vars(args) | {'dtype': 'float32'})\n"
     "        logps[:, part], _ = pair_logps(model, rows, part, args)"),
    ("C14 reference after training", "train.py",
     '    results["policy"], tables =', '    table = score()\n    results["policy"], tables ='),
    ("D1 accumulation not divided", "train.py",
     "        (losses.sum() / len(ids)).backward()", "        losses.mean().backward()"),
    ("D2 divided twice", "train.py",
     "        (losses.sum() / len(ids)).backward()",
     "        (losses.mean() / len(ids)).backward()"),
    ("D3 short last part weighs like a full one", "train.py",
     "        (losses.sum() / len(ids)).backward()",
     "        (losses.mean() / len(parts)).backward()"),
    ("D6 schedule per micro-batch", "train.py",
     "min(1, step / warmup, decay)", "min(1, 2 * step / warmup, decay)"),
    ("D6 last rate is 0", "train.py",
     "(steps - step + 1) / max", "(steps - step) / max"),
    ("gradients never cleared", "train.py", "    optimizer.zero_grad()\n", ""),
    ("no clipping", "train.py",
     "net.parameters(), args.max_grad_norm)", "net.parameters(), float('inf'))"),
    ("D12 never reshuffled", "data.py",
     "    left = torch.empty(0, dtype=torch.long)\n"
     "    while True:\n"
     "        while len(left) < batch_size:\n"
     "            left = torch.cat([left, torch.randperm(len(rows), "
     "generator=generator)])",
     "    left, order = torch.empty(0, dtype=torch.long), torch.randperm(len(rows), "
     "generator=generator)\n"
     "    while True:\n"
     "        while len(left) < batch_size:\n"
     "            left = torch.cat([left, order])"),
    ("D12 seed ignored", "train.py",
     "    generator = torch.Generator().manual_seed(args.seed + 2)",
     "    generator = torch.Generator().manual_seed(2)"),
    ("D13 log-softmax in bfloat16", "dpo.py",
     "    return logits.to(torch.promote_types(logits.dtype, torch.float32))", "    return logits"),
    ("D13 float64 cut to float32", "dpo.py",
     "    return logits.to(torch.promote_types(logits.dtype, torch.float32))",
     "    return logits.float()"),
    ("D14 weights in bfloat16", "train.py",
     "model = build_model(args, tokenizer).to(device)",
     "model = build_model(args, tokenizer).to(device).bfloat16()"),
    ("D16 new weights after loading", "train.py",
     "    model.config.eos_token_id = tokenizer.eot_token\n"
     "    return model",
     "    model.config.eos_token_id = tokenizer.eot_token\n"
     "    return GPT(model.config)"),
    ("D18 the untrained policy is saved", "train.py",
     '        model.save_pretrained(out / "policy")',
     '        build_model(args, tokenizer).save_pretrained(out / "policy")'),
    ("D19 logged loss is not the loss", "train.py",
     '| {"loss": losses}\n', '| {"loss": losses / 2}\n'),
    ("weight decay", "train.py", "weight_decay=0.0", "weight_decay=0.1"),
    ("soft labels mixed the wrong way", "train.py",
     "losses = soft[part] * losses + (1 - soft[part]) * swapped",
     "losses = (1 - soft[part]) * losses + soft[part] * swapped"),
    ("V1 IPO without 1/beta", "dpo.py", "- 0.5) / beta) ** 2", "- 0.5)) ** 2"),
    ("V1 IPO target 1", "dpo.py", "- 0.5) / beta) ** 2", "- 1.0) / beta) ** 2"),
    ("V4 ORPO on sums", "experiments/losses.py",
     "    chosen = policy_chosen_logps / chosen_lengths\n"
     "    rejected = policy_rejected_logps / rejected_lengths\n"
     "    return -chosen",
     "    chosen, rejected = policy_chosen_logps, policy_rejected_logps\n"
     "    return -chosen"),
    ("V5 ORPO odds unstable", "experiments/losses.py",
     "(-torch.expm1(logps)).log()", "(1 - logps.exp()).log()"),
    ("V6 ORPO without its SFT term", "experiments/losses.py",
     "    return -chosen - alpha *", "    return -alpha *"),
    ("V7 SimPO gamma inside beta", "experiments/losses.py",
     "beta * (chosen - rejected) - gamma", "beta * (chosen - rejected - gamma)"),
    ("V8 SimPO on sums", "experiments/losses.py",
     "    rejected = policy_rejected_logps / rejected_lengths\n"
     "    return -F",
     "    rejected = policy_rejected_logps\n"
     "    return -F"),
    ("V8 SimPO with a reference", "experiments/losses.py",
     "    chosen = policy_chosen_logps / chosen_lengths\n"
     "    rejected = policy_rejected_logps / rejected_lengths\n"
     "    return -F",
     "    chosen = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths\n"
     "    rejected = policy_rejected_logps / rejected_lengths\n"
     "    return -F"),
    ("V10 cDPO smoothed the wrong way", "dpo.py",
     "    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)",
     "    return -epsilon * F.logsigmoid(m) - (1 - epsilon) * F.logsigmoid(-m)"),
    ("V11 robust without its normaliser", "dpo.py", ") / (1 - 2 * epsilon)", ")"),
    ("V11 epsilon of 1/2 accepted", "dpo.py", "0 <= epsilon < 0.5", "0 <= epsilon <= 0.5"),
    ("V13 SimPO at DPO's beta", "train.py", "beta=None, sft_epochs", "beta=0.1, sft_epochs"),
    ("M1 ties count 0", "dpo.py", "+ (margins == 0).float() / 2", ""),
    ("M2 accuracy is summed", "train.py",
     "torch.stack([column.mean() for column", "torch.stack([column.sum() for column"),
    ("M3 margins times beta once more", "dpo.py",
     "    margins = chosen_rewards - rejected_rewards\n"
     "    return {",
     "    margins = beta * (chosen_rewards - rejected_rewards)\n"
     "    return {"),
    ("M4 last micro-batch logged", "train.py",
     "torch.cat(logged, 1)", "torch.cat(len(logged) * logged[-1:], 1)"),
    ("M10 reward without the reference", "dpo.py",
     '        "chosen_reward": chosen_rewards,', '        "chosen_reward": beta * logps[0],'),
    ("gap closed from the wrong end", "data.py",
     '1 - row["kl_to_optimum"] / max(gap, 1e-12)', '1 - gap / max(row["kl_to_optimum"], 1e-12)'),
    ("E1 temperature in scoring", "dpo.py",
     "    logps = logits.log_softmax(-1).gather",
     "    logps = (logits / 0.9).log_softmax(-1).gather"),
    ("E3 temperature multiplies", "model.py",
     "(logits / temperature).softmax", "(logits * temperature).softmax"),
    ("E4 last position but one", "model.py", "* context.shape[1] - 1", "* context.shape[1] - 2"),
    ("E5 no stop at the end token", "model.py",
     "                token = token.masked_fill(stopped, stop_token)\n", ""),
    ("world: labels exchanged", "data.py", '"hard": coin <= p', '"hard": coin > p'),
    ("world: deterministic labels exchanged", "data.py",
     '"deterministic": p >= 0.5', '"deterministic": p <= 0.5'),
    ("world: pairs not from the policy", "data.py",
     "logps.exp().multinomial", "torch.ones_like(logps).multinomial"),
    ("world: the reward is a sum", "data.py", "(opinions) / max(len(opinions), 1)", "(opinions)"),
    ("world: not does not turn", "data.py", '"not": -1.0', '"not": 1.0'),
    ("world: K words and an end", "data.py",
     "[[*y, self.W][: self.K] for y", "[[*y, self.W] for y"),
    ("world: log-probs of the wrong prompt", "data.py",
     "itertools.product(self.prompt_ids.tolist(), self",
     "itertools.product(self.prompt_ids.tolist()[::-1], self"),
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
    ("PPO: filling counted in the loss", "experiments/rlhf.py",
     "losses[mask].mean()", "losses.mean()"),
    ("PPO: filling counted in the critic's error", "experiments/rlhf.py",
     "errors[mask].mean()", "errors.mean()"),
    ("PPO: critic never trained", "experiments/rlhf.py", " + errors[mask].mean()", ""),
    ("leak: pairs drawn from the reference in every round", "experiments/claims.py",
     "draw_pairs(policy, pairs", "draw_pairs(ref, pairs"),
    ("leak: grammatical responses counted twice", "experiments/claims.py",
     "(paired & ~grammatical)", "paired"),
    ("frontier: Best-of-N forgets ties below", "experiments/frontier.py",
     "below.clamp(min=0) ** n", "0"),
    ("frontier: win rate without ties", "experiments/frontier.py", " + (margins == 0) / 2", ""),
    ("frontier: unlikelihood not normalised", "experiments/frontier.py",
     " / (1 - alpha)).log", ").log"),
    ("frontier: nothing is ever above", "experiments/frontier.py",
     "SWEEP * curve[2]).max()", "SWEEP * curve[2]).min()"),
    ("lab: pairs of the wrong prompt", "experiments/lab.py",
     "drawn.prompt == among", "drawn.prompt != among"),
    ("lab: every label flipped or none", "experiments/lab.py",
     "generator=generator) < flip", "generator=generator) > flip"),
    ("lab: reference of the loss left out", "experiments/lab.py",
     "ref[x, both], LENGTHS", "0 * ref[x, both], LENGTHS"),
    ("lab: ranks without ties", "experiments/lab.py", "- (counts - 1) / 2", ""),
    ("run, resume: the optimiser begins anew", "train.py",
     '        optimizer.load_state_dict(state["optimizer"])\n', ""),
    ("run, resume: the weights stay the reference's", "train.py",
     '        model.load_state_dict(state["model"])\n', ""),
    ("run, resume: the pairs in their first order", "train.py",
     "        if step > done:\n"
     "            yield step,",
     "        if step <= steps - done:\n"
     "            yield step + done,"),
    ("run, resume: one step is left out", "train.py",
     "        if step > done:", "        if step > done + (done > 0):"),
    ("run, resume: the half-trained policy is the reference", "train.py",
     "    ref_logps = all_logps",
     '    if args.resume and (out / "checkpoint.pt").exists():\n'
     '        model.load_state_dict(load(out / "checkpoint.pt")["model"])\n'
     "    ref_logps = all_logps"),
    ("run, resume: other pairs held out", "train.py",
     "claim(out, args, rows + held_out)", "claim(out, args, rows)"),
    ("run, resume: flags that differ", "train.py",
     "    if args.resume and vars(args) | kept != vars(args):", "    if False:"),
    ("run, an old run is resumed from", "train.py",
     "        (out / name).unlink(missing_ok=True)", "        pass"),
    ("run, an unfinished run is overwritten", "train.py",
     'if config.get("data") and not', "if False and not"),
    ("run, an unfinished run is overwritten by the toy world", "train.py",
     'if config.get("data") and not', 'if args.data and config.get("data") and not'),
    ("run, weights ruined by the last step", "train.py",
     "        if evaluates or saves:  # as after SFT", "        if False:  #"),
    ("run, evaluated as often as saved", "train.py",
     "        metrics |= evaluate(score()) if evaluates",
     "        metrics |= evaluate(score()) if evaluates or saves"),
    ("run, evaluation counts a process's own pairs", "train.py",
     "10 * len(held_out) / (PROCESSES * len(ids))", "10 * len(held_out) / 1e9"),
    ("run, one evaluation too many", "train.py", " and step + every <= steps)", ")"),
    ("run, a closed stdout", "train.py", " or sys.stdout is None:", ":"),
    ("run, Jupyter's stdout", "train.py", 'if hasattr(sys.stdout, "reconfigure")', "if True"),
    ("run, no compiler", "train.py", '        with os_error("--compile"):', "        if False:"),
    ("run, more than all held out", "train.py", "high = 1 if name", "high = 2 if name"),
    ("an id without text", "model.py",
     "            with suppress(KeyError):", "            if True:"),
    ("run, another architecture is read as GPT-2's", "model.py",
     "if given.get(key, fixed[key]) != fixed[key]", "if False"),
    ("run, checkpoint written in its place", "model.py",
     'open(f"{path}.tmp", "wb")', 'open(path, "wb")'),
    ("run, half a file is left", "model.py",
     '        Path(f"{path}.tmp").unlink(missing_ok=True)', "        pass"),
    ("run, a file may run code", "model.py",
     'map_location="cpu", weights_only=True)\n'
     "\n"
     "\n"
     "@context",
     'map_location="cpu", weights_only=False)\n'
     "\n"
     "\n"
     "@context"),
    ("run, a loss that is not finite", "train.py",
     "    if not values.isfinite().all():", "    if False:"),
    ("run, processes: more than pairs", "train.py", " if len(mine) else ()", ""),
    ("run, processes: a mean of unequal means", "train.py",
     "// PROCESSES) * PROCESSES", "// PROCESSES) * PROCESSES - (PROCESSES > 1)"),
    ("run, processes: none hears of the others", "train.py",
     "    net = torch.nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 "
     "else model",
     "    net = model"),
    ("run, processes: all take the same slice", "train.py",
     "yield step, steps, lr, ids[RANK::PROCESSES]", "yield step, steps, lr, ids[::PROCESSES]"),
    ("run, compile without being asked", "train.py", "    if args.compile:\n", "    if True:\n"),
    ("dialogues: the first turn is the prompt", "data.py",
     "commonprefix(both).rpartition(", "commonprefix(both).partition("),
    ("dialogues: a response may hold a question", "data.py", "(Human|Assistant):", "Assistant:"),
    ("dialogues: a response may go on", "data.py", "(Human|Assistant):", "Human:"),
    ("dialogues: a response may be empty", "data.py", "all(map(str.strip, pair)) and ", ""),
    ("dialogues: split though there is a prompt", "data.py", "    if not prompt:", "    if True:"),
    ("dialogues: Windows line ends", "data.py", '.replace("\\r\\n", "\\n")', ""),
    ("messages: the prompt twice", "data.py",
     ' if y.startswith(ROLES["assistant"]) else y for', " for"),
    ("messages: the prompt is lost", "data.py", "[prompt + y if", "[y if"),
    ("messages: content of any type", "data.py",
     '" + turn["content"] for', '" + str(turn["content"]) for'),
    ("messages: a text is the person's", "data.py",
     '("user", "assistant", "assistant")', '("user", "user", "assistant")'),
    ("pairs: repeats are dropped", "data.py",
     "    return pairs\n", "    return list(dict.fromkeys(pairs))\n"),
    ("pairs: the last one decides", "data.py", "    if not pairs:", "    if not pair:"),
    ("pairs: no count of repeats", "data.py", "len(pairs) - len(set(pairs))", "0"),
    ("pairs: one side's end tokens", "data.py",
     "for prompt, *both in pairs for response in both]",
     "for prompt, *both in pairs for response in both[:1]]"),
    ("a prompt without a token is kept", "data.py", "room < 1 or not prompt", "room < 1"),
    ("world: the corpus teaches no end", "data.py", "index(self.W) + 1]", "index(self.W)]"),
    ("world: chosen and rejected exchanged in rows", "data.py",
     "y[chosen], y[rejected])", "y[rejected], y[chosen])"),
    ("B4 first response token dropped", "data.py", "(start <= place)", "(start < place)"),
    ("D12 the remainder of an epoch is lost", "data.py",
     "            left = torch.cat([left, torch.randperm(len(rows), "
     "generator=generator)])",
     "            left = torch.randperm(len(rows), generator=generator)"),
    ("soft labels: lengths not swapped", "train.py",
     "ref.flip(0), lengths.flip(0)", "ref.flip(0), lengths"),
    ("M7 KL from the reference's responses", "data.py",
     '"kl": dpo.kl_divergence(logps, ref_logps)', '"kl": dpo.kl_divergence(ref_logps, logps)'),
    ("gap closed: KL the other way round", "data.py",
     "dpo.kl_divergence(ref_logps, best)", "dpo.kl_divergence(best, ref_logps)"),
    ("world: soft labels drawn as if they were hard", "data.py",
     '"soft": coin <= 1', '"soft": coin <= p'),
    ("run, resume: other pairs", "train.py",
     "if args.resume and config | pairs != config:", "if args.resume and not config:"),
    ("run, files of others are overwritten", "train.py",
     "if not config and out.exists() and any(out.iterdir()):", "if False:"),
    ("run, --init is overwritten", "train.py",
     "if init.exists() and out.resolve() in (init, *init.parents):",
     "if init.exists() and out.resolve() == init:"),
    ("run, an older .bin is read beside new safetensors", "model.py",
     'if not (folder / "model.safetensors").is_file():',
     'if (folder / "pytorch_model.bin").is_file():'),
    ("run, a stale safetensors file stays", "model.py",
     "            stale.unlink(missing_ok=True)", "            pass"),
    ("run, an untied head is dropped", "model.py",
     'if head is not None and not torch.equal(head, state.setdefault("wte.weight", '
     "head)):",
     "if False:"),
    ("run, the end token is not in config.json", "model.py",
     "| asdict(self.config)\n",
     '| {k: v for k, v in asdict(self.config).items() if k != "eos_token_id"}\n'
     '        config |= {"eos_token_id": None}\n'),
    ("run, processes: logged means of one alone", "train.py",
     "    if PROCESSES > 1:\n"
     "        distributed.all_reduce(values)",
     "    values *= PROCESSES\n"
     "    if False:\n"
     "        pass"),
    ("run, processes: a collective on the CPU", "train.py",
     "        distributed.all_reduce(logps)  #", "        distributed.all_reduce(logps.cpu())  #"),
    ("run, RANK counts alone", "train.py",
     'TORCHRUN = os.environ.get("RANK") and', 'TORCHRUN = os.environ.get("RANK") or'),
    ("split: a prompt may be on both sides", "data.py",
     "        sides[tuple(row.prompt) in held_out].append(row)",
     "        sides[tuple(row.prompt) in held_out and len(sides[1]) < n].append(row)"),
    ("split: nothing is left to train on", "data.py",
     "math.ceil(fraction * len(prompts)), len(prompts) - 1)",
     "math.ceil(fraction * len(prompts)), len(prompts))"),
    ("model: the last block at other places", "model.py",
     "x, mixed = x.flatten(0, 1)[at], mixed.flatten(0, 1)[at]",
     "x, mixed = x.flatten(0, 1)[at], mixed.flatten(0, 1)[at - 1]"),
    ("model: scale of the residual projections", "model.py", "std=0.02 / terms**0.5", "std=0.02"),
    ("schedule: no warm-up", "train.py", "min(1, step / warmup, decay)", "min(1, decay)"),
    ("shared row: rejected sees chosen", "experiments/shared_row.py",
     "        mask[i, fork:, trunk:fork] = False  #", "        pass  #"),
    ("shared row: positions run on", "experiments/shared_row.py",
     "torch.where(place < fork, place, place - len(rest_w))", "place"),
    ("shared row: one place late", "experiments/shared_row.py",
     "path[len(prompt) - 1 :]", "path[len(prompt) :]"),
    ("shared row: halves exchanged", "experiments/shared_row.py",
     "    return sums[:B], sums[B:]", "    return sums[B:], sums[:B]"),
]  # fmt: skip


# Generated: small changes to every line of these functions


WHERE = {  # None: the whole file
    "dpo.py": None,
    "experiments/losses.py": None,
    "data.py": {
        *("load_pairs", "to_pair", "as_dialogue", "encode_pairs", "collate", "batches", "split"),
        *("reward", "corpus", "draw_pairs", "rows", "logps", "measure"),
    },
    "model.py": {"forward", "hidden", "generate"},
    "train.py": {
        *("update", "call_loss", "pair_logps", "all_logps", "schedule", "means"),
        *("build_model", "load_loss", "claim"),
    },
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
            slow = ["-m", "slow or not slow"] if runs else []
            tests = sorted(
                TESTS, key=lambda x: (("runs" in x) != runs, stem not in x, folder not in x)
            )
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *slow, *tests], [first])
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
    "coin <= p -> (coin < p)": "equal with probability 0",
    "p >= 0.5 -> (p > 0.5)": "of two equally good responses either may win",
    "dtype=torch.float64) -> torch.zeros(P, 1)": "float32 0 plus float64 is float64",
    "transpose(1, 2) -> ": "exchanging two dimensions has no order",
    "torch.arange(ids.shape[1], device": "the CPU is the only device of these tests",
    "torch.zeros(B, 1, dtype=torch.bool, device=ids.device) -> torch.zeros(B, 1, dt": "as above",
    "torch.arange(1, B + 1, device=ids.device) -> ": "as above",
    "generate: no_grad removed": "only memory: drawn tokens carry no gradient",
    ".float() -> self(context, last)": "the model of these tests is float32 already",
}

if __name__ == "__main__":
    main()
