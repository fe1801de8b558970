"""Losses that are no function of DPO's margin. Use with `--loss experiments/losses.py:simpo_loss`.

The contract of dpo.LOSSES: four (B,) sums of log-probs in nats -> (B,) losses; train.py passes the
settings that a signature names, lengths (B,) in scored tokens among them. Three of the four never
look at the reference, whose two sums they are given all the same.
"""

import torch
from torch.nn import functional as F

import dpo


def simpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_lengths,
    rejected_lengths,
    beta=2.0,
    gamma=1.0,
):
    """-log sigma(beta (mean log-prob of chosen - of rejected) - gamma): no reference, a margin.

    Meng et al. 2024, arXiv 2405.14734, Eq. 6. Means over tokens, so beta is some 20 times DPO's;
    gamma is the margin itself, not its ratio to beta. ValueError unless beta > 0.
    """
    dpo.check_settings(beta)
    dpo.check_shapes(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_lengths,
    rejected_lengths,
    alpha=0.1,
):
    """SFT on the chosen response plus alpha times -log sigma(log odds ratio): no reference, no SFT
    before. Hong et al. 2024, arXiv 2403.07691, Eq. 6 and 7; alpha is their lambda.

    Odds are p / (1 - p) with log p the mean over tokens. (The sign of their gradient, Eq. 8, is
    a misprint: the loss falls along +delta h.)
    """
    dpo.check_shapes(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    return -chosen - alpha * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logps):
    """log(p / (1 - p)) from log p < 0. Through expm1, for 1 - exp(log p) is 0 near p = 1."""
    logps = logps.clamp(
        max=-(torch.finfo(logps.dtype).tiny ** 0.5)
    )  # p = 1 itself has infinite odds
    return logps - (-torch.expm1(logps)).log()


def dpop_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    alpha=50.0,
):
    """Eq. 7 with a penalty: alpha nats for each nat of the chosen log-prob below the reference.

    DPO-Positive, Pal et al. 2024, arXiv 2402.13228, Eq. 3; alpha is their lambda. ValueError unless
    beta > 0.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    fallen = F.relu(ref_chosen_logps - policy_chosen_logps)
    return -F.logsigmoid(dpo.reward_margins(*logps, beta=beta) - beta * alpha * fallen)


def unlikelihood_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, alpha=1.0
):
    """-log pi(y_w) + alpha log pi(y_l), the DPO paper's baseline (section 6; samples in Table 3).

    DPO's two pushes without its weight and its reference. Unbounded below unless alpha is small;
    alpha = 0 is Preferred-FT, SFT on the chosen responses.
    """
    dpo.check_shapes(policy_chosen_logps, policy_rejected_logps)
    return -policy_chosen_logps + alpha * policy_rejected_logps
