"""The true reward that a policy can have at a given KL: the exact curve, and runs below it.

The paper's Figure 2, left, in the toy world. Every policy is a point there, with its exact
KL(pi || pi_ref) and E[r*]. None lies above the curve of pi*_beta (Eq. 4), which the paper could not
draw. Best-of-N and Preferred-FT have closed forms here, so they need no training.
P = 2 prompts, Y responses; labels are "hard" or "deterministic", as in lab.draw_pairs.
"""

import torch

import dpo
from experiments import lab, rlhf
from experiments.lab import WORLD

CURVE_BETAS = torch.logspace(2, -2, 400, dtype=torch.float64)  # along the exact curve
LOOKS = 14  # at the policy, during a run

# One setting of each method moves it along the KL axis. The betas are the paper's 0.05, 0.1, 1 and
# 5, and its target KLs 3, 6, 9 and 12, scaled to three words, whose KL hardly gets beyond 7 nats.
BETAS = [0.1, 0.25, 0.5, 1.0, 2.0]  # of DPO
TARGET_KLS = [0.5, 1.0, 2.0, 4.0]  # of PPO, nats
BEST_OF = [4, 16, 64]


# The exact curve


def frontier(ref):
    """KL, E[r*] and log Z of pi*_beta (Eq. 4), a column for each of CURVE_BETAS: (3, 400)."""
    columns = []
    for beta in CURVE_BETAS:
        optimum, log_Z = dpo.optimal_policy(ref, WORLD.rewards, beta)
        found = lab.measure(optimum, ref)
        columns.append([found["kl"], found["expected_reward"], log_Z.mean().item()])
    return torch.tensor(columns, dtype=torch.float64).T


def height(kl, expected_reward, curve):
    """How far a policy lies above the exact curve, in units of r*: at most 0, except for rounding.

    Nothing lies above: every policy has E[r*] - beta KL <= beta log Z, for every beta (Eq. 14).
    """
    _, _, log_Z = curve
    heights = expected_reward - CURVE_BETAS * kl - CURVE_BETAS * log_Z
    return heights.max().item()


def reached(points, budget):
    """The most E[r*] at a KL of at most `budget`, from the (KL, E[r*]) of some policies.

    Tossing a coin between two of them has the mean of their rewards, and at most the mean of their
    KLs, since the KL is convex. So points on a line between two policies count as reached.
    """
    within = [(kl, reward) for kl, reward in points if kl <= budget]
    beyond = [(kl, reward) for kl, reward in points if kl > budget]
    best = max(reward for _, reward in within)
    for kl, reward in within:
        for more_kl, more_reward in beyond:
            part = (budget - kl) / (more_kl - kl)
            best = max(best, reward + part * (more_reward - reward))
    return best


# Closed forms, for one prompt


def best_of_n(ref_logps, rewards, n):
    """The best of n responses drawn from pi_ref, exactly: two (Y,) -> log-probs (Y,).

    P(the best has reward r) = F(r)^n - F(r-)^n, where F is the distribution of the reward and F(r-)
    its value just below r. Responses of equal reward share it in the proportions of pi_ref.
    """
    probs = ref_logps.exp()
    levels, level = rewards.unique(return_inverse=True)  # ascending
    at_level = torch.zeros(len(levels), dtype=probs.dtype).index_add(0, level, probs)
    at_level = at_level / at_level.sum()
    up_to = at_level.cumsum(0)  # F(r)
    below = (up_to - at_level).clamp(min=0)  # F(r-)
    ratio = (up_to**n - below**n) / at_level
    return (probs * ratio[level]).log()


def win_rate(ref_logps, rewards, labels):
    """s(y): the fraction of its pairs, against responses of pi_ref, that y wins. (Y,) -> (Y,)"""
    margins = rewards[:, None] - rewards
    if labels == "hard":
        wins = margins.sigmoid()  # (1)
    else:
        wins = dpo.accuracy(margins).double()
    return wins @ ref_logps.exp()


def preferred_ft(ref_logps, rewards, labels):
    """Where SFT on the chosen responses of infinitely many pairs ends: 2 pi_ref(y) s(y). (Y,)"""
    return ref_logps + (2 * win_rate(ref_logps, rewards, labels)).log()


# Rows: a policy each, as a point in the plane


def point(who, logps, step=0, last=0):
    """who: seed, labels, method, setting. last: the number of steps of a run."""
    _, ref = lab.reference(who["seed"])
    found = lab.measure(logps, ref)
    row = who | {"step": step, "last": last}
    return row | {"kl": found["kl"], "expected_reward": found["expected_reward"]}


def name(seed, labels, method, setting=0):
    return {"seed": seed, "labels": labels, "method": method, "setting": setting}


def exact_rows(seed):
    """Without training: the curve, the reference, and the closed forms."""
    _, ref = lab.reference(seed)
    rows = [point(name(seed, "any", "SFT"), ref)]
    for beta in CURVE_BETAS[::8].tolist():
        optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, beta)
        rows.append(point(name(seed, "any", "Eq. 4", beta), optimum))
    prompts = list(zip(ref, WORLD.rewards))
    for n in BEST_OF:
        logps = torch.stack([best_of_n(*prompt, n) for prompt in prompts])
        rows.append(point(name(seed, "any", "Best-of-N", n), logps))
    for labels in ("hard", "deterministic"):
        logps = torch.stack([preferred_ft(*prompt, labels) for prompt in prompts])
        rows.append(point(name(seed, labels, "Preferred-FT"), logps))
    return rows


def dpo_rows(seed, labels, steps):
    """DPO at each beta."""
    pairs = lab.draw_pairs(seed, lab.PAIRS, labels)
    rows = []
    for beta in BETAS:
        run = lab.train_dpo(seed, pairs, steps=steps, beta=beta)
        rows += looks_at(run, steps, name(seed, labels, "DPO", beta))
    return rows


def ppo_rows(seed, labels, samples, epochs):
    """PPO at each target KL, on a reward model of the pairs that DPO has. With labels "any" it is
    PPO-GT, on the true reward."""
    sft, _ = lab.reference(seed)
    if labels == "any":
        method = "PPO-GT"
        rewards = WORLD.rewards
    else:
        method = "PPO"
        pairs = lab.draw_pairs(seed, lab.PAIRS, labels)
        rewards = rlhf.train_reward_model(sft, pairs, epochs, seed)
    rows = []
    for target_kl in TARGET_KLS:
        run = rlhf.ppo(sft, rewards, seed, target_kl=target_kl, samples=samples)
        rows += looks_at(run, samples // rlhf.BATCH, name(seed, labels, method, target_kl))
    return rows


def looks_at(run, last, who):
    """A run, which yields (_, logps) before each step and after the `last` -> rows.

    It is looked at after steps that grow by the root of 2, since the first ones matter most.
    """
    _, ref = lab.reference(who["seed"])
    curve = frontier(ref)
    looks = {round(last / 2 ** (k / 2)) for k in range(LOOKS)}
    rows = []
    for step, (_, logps) in enumerate(run):
        if step in looks:
            row = point(who, logps, step, last)
            above = height(row["kl"], row["expected_reward"], curve)
            assert above < 1e-9, f"above the exact curve: {row}"
            rows.append(row)
    return rows
