"""Direct Preference Optimization, equation by equation (Rafailov et al. 2023).

Equation numbers, in brackets at the end of a line, are those printed in arXiv 2305.18290 v3.
The paper's letters: y_w is chosen, y_l rejected, r-hat the implicit reward, sigma the sigmoid.

Every log-prob is log pi(y|x): the sum over an answer's tokens, its end-of-text too, in nats.
B pairs, K ranked answers, Y all answers there are, N scored tokens, T positions, V vocabulary.

Nothing here knows about models or files but `response_logps`, which turns a batch of pairs into
the four sums of Eq. 7 (two from the policy; two from the reference, computed once by train.py).
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


# Preferences -> rewards: the road of section 3, which DPO replaces


def bradley_terry(rewards_1, rewards_2):
    """P(y_1 beats y_2 | x): only the difference of the rewards counts. Any equal shapes. Eq. 1."""
    return torch.sigmoid(rewards_1 - rewards_2)  # (1): exp r1 / (exp r1 + exp r2)


def reward_model_loss(chosen_rewards, rejected_rewards):
    """-log P(chosen beats rejected) of each pair, (B,), (B,) -> (B,). Eq. 2 before its mean."""
    check_shapes(chosen_rewards, rejected_rewards)
    return -F.logsigmoid(chosen_rewards - rejected_rewards)  # (2)


def kl_divergence(logps, other_logps):
    """KL(pi || other) in nats, 0 log 0 being 0; the last dimension lists every answer: (..., Y)."""
    probs = logps.exp()
    return (probs * torch.where(probs > 0, logps - other_logps, 0)).sum(-1)  # 0 log 0 = 0


def rlhf_objective(policy_logps, ref_logps, rewards, beta):
    """J = E_pi[r] - beta KL(pi || pi_ref), exactly: three (..., Y) -> (...), in units of r. Eq. 3.

    The last dimension lists every answer, so this is a sum, not an estimate from samples.
    """
    expected_reward = (policy_logps.exp() * rewards).sum(-1)
    return expected_reward - beta * kl_divergence(policy_logps, ref_logps)  # (3)


# Rewards -> the best policy, and back: section 4


def optimal_policy(ref_logps, rewards, beta):
    """The policy that maximises Eq. 3, in closed form, and its normaliser. Eq. 4.

    Two (..., Y) -> log pi_r(y|x) (..., Y) and log Z(x) (...). ValueError unless beta > 0.
    """
    check_settings(beta)
    unnormalised = ref_logps + rewards / beta
    log_Z = unnormalised.logsumexp(-1)  # a sum over all answers: listed here, hopeless in general
    return unnormalised - log_Z[..., None], log_Z  # (4)


def implicit_reward(policy_logps, ref_logps, beta):
    """The reward for which this policy is optimal, up to beta log Z(x). Any equal shapes. Eq. 5.

    ValueError unless beta > 0, here and in all that builds on it.
    """
    check_settings(beta)
    assert policy_logps.shape == ref_logps.shape, (policy_logps.shape, ref_logps.shape)
    return beta * (policy_logps - ref_logps)  # (5) without beta log Z(x), the same for all answers


# Preferences -> the policy, no reward model between: Eq. 7


class DPOLoss(NamedTuple):
    """What `dpo_loss` says of each pair, all (B,). Only `losses` carries gradient."""

    losses: torch.Tensor
    weights: torch.Tensor  # sigma(r_rejected - r_chosen), from 0 to 1
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1
):
    """Eq. 7 for each pair: four (B,) sums of log-probs -> DPOLoss. Its mean is what one minimises.

    Where the policy equals the reference every loss is log 2 = 0.6931 and every weight 1/2.
    ValueError unless beta > 0.
    """
    check_shapes(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)  # (5)
    rejected_rewards = implicit_reward(policy_rejected_logps, ref_rejected_logps, beta)
    margins = chosen_rewards - rejected_rewards  # (6): beta log Z(x) is in both and cancels
    losses = -F.logsigmoid(margins)  # (7): Eq. 2 with the policy's own reward
    weights = torch.sigmoid(rejected_rewards - chosen_rewards)  # section 4: near 1 if wrong
    return DPOLoss(losses, weights.detach(), chosen_rewards.detach(), rejected_rewards.detach())


def dpo_gradient(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1
):
    """Section 4's gradient of each pair's Eq. 7 loss, by hand: d loss / d policy_chosen_logps and
    d loss / d policy_rejected_logps, each (B,), the factors of grad log pi in the paper's display.

    Descent pushes the chosen log-prob up and the rejected one down, most where r-hat ranks the two
    confidently the wrong way round. (A.4 in the appendix prints sigma(r_chosen - r_rejected), a
    misprint like the signs of Eq. 21 and 22; at policy == reference both are 1/2 and none shows.)
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    weights = torch.sigmoid(-reward_margins(*logps, beta=beta))  # sigma(r_rejected - r_chosen)
    return -beta * weights, beta * weights


def describe(*logps, beta=0.1):
    """What one watches while training, from the four sums of `dpo_loss`: a dict of (B,)."""
    losses, weights, chosen_rewards, rejected_rewards = dpo_loss(*logps, beta=beta)
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": losses,
        "margin": margins,
        "weight": weights,
        "accuracy": accuracy(margins),
        "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards,
        "chosen_logp": logps[0],
        "rejected_logp": logps[1],
    }


def accuracy(margins):
    """1 where the chosen answer is ahead, 0 where it is behind; a tie, as at first, counts half."""
    return (margins > 0).float() + (margins == 0).float() / 2


# The family: other convex functions f of the margin m = r_w - r_l (GPO, arXiv 2402.05749). Each
# pulls on grad log pi(y_w) - grad log pi(y_l) with beta (-f'(m)); for DPO, -f'(m) is the weight.
# `logps`: the four of dpo_loss. (B,) losses; ValueError unless beta > 0 and 0 <= epsilon < 1/2.


def reward_margins(*logps, beta):
    """m = r_w - r_l, the argument of Eq. 7's sigmoid: four (B,) -> (B,). ValueError as there."""
    check_shapes(*logps)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = logps
    chosen_rewards = implicit_reward(policy_chosen, ref_chosen, beta)
    return chosen_rewards - implicit_reward(policy_rejected, ref_rejected, beta)


def cdpo_loss(*logps, beta=0.1, epsilon=0.1):
    """Eq. 7 where a share epsilon of the labels is wrong: a pair rests at sigma(m) = 1 - epsilon.

    Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)


def robust_loss(*logps, beta=0.1, epsilon=0.1):
    """cDPO made unbiased: its mean over label flips is the clean Eq. 7. rDPO, arXiv 2403.00409."""
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return (-(1 - epsilon) * F.logsigmoid(m) + epsilon * F.logsigmoid(-m)) / (1 - 2 * epsilon)


def ipo_loss(*logps, beta=0.1):
    """(rho - 1 / (2 beta))^2 with rho = m / beta: a finite target, m = 1/2, even for a sure label.

    Azar et al. 2023, arXiv 2310.12036, Eq. 17; beta is their tau. (TRL takes means over tokens.)
    """
    return ((reward_margins(*logps, beta=beta) - 0.5) / beta) ** 2


def hinge_loss(*logps, beta=0.1):
    """max(0, 1 - m): full pull up to a margin of 1, none beyond. RSO's hinge, arXiv 2309.06657."""
    return F.relu(1 - reward_margins(*logps, beta=beta))


# What --loss offers
LOSSES = dict(dpo=dpo_loss, cdpo=cdpo_loss, robust=robust_loss, ipo=ipo_loss, hinge=hinge_loss)


# More than two answers: appendix A.3


def plackett_luce_logps(rewards):
    """log P(this ranking | x), answers in the order of the ranking: (..., K), best first -> (...).

    The winner is drawn with odds exp(r), then the runner-up from the rest, and so on. Eq. 18.
    """
    still_in = rewards.flip(-1).logcumsumexp(-1).flip(-1)  # log sum over j >= k of exp r_j
    return (rewards - still_in).sum(-1)  # (18)


def plackett_luce_loss(policy_logps, ref_logps, beta=0.1):
    """Eq. 20 for each ranking: two (B, K), best first -> (B,). With K = 2 it is Eq. 7."""
    check_shapes(policy_logps, ref_logps, dims=2)
    rewards = implicit_reward(policy_logps, ref_logps, beta)  # Z(x) cancels here too
    return -plackett_luce_logps(rewards)  # (19) is Eq. 18 at the implicit reward; (20) its -log


# log pi(y|x) from a model


def sequence_logps(logits, ids, mask):
    """log pi(y|x) the plain way, a row for each answer: (B, T, V), (B, T), (B, T) -> (B,).

    `mask` is True at the tokens of the answer (end-of-text too), False at prompt and padding.
    Summed, never averaged. In at least float32.
    """
    assert ids.shape == mask.shape == logits.shape[:2], (logits.shape, ids.shape, mask.shape)
    logps = at_least_float32(logits[:, :-1]).log_softmax(-1)  # position t predicts token t + 1
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T-1)
    return torch.where(mask[:, 1:].bool(), logps, 0).sum(-1)  # `where`: 0 * -inf would be NaN


def response_logps(model, batch):
    """log pi(y|x) of the answers of each pair row, in at least float32: chosen (B,), rejected (B,).

    `batch` is data.Batch: the model gives logits (M, V) only where a token of an answer is scored;
    the log-prob of target n belongs to chosen answer i if owner[n] = i, to rejected i if B + i.
    """
    B = len(batch.ids)
    logits = model(batch.ids, batch.positions, batch.mask, batch.score_at)  # (M, V)
    logps = at_least_float32(logits).log_softmax(-1)[batch.logits_row, batch.targets]  # (N,)
    sums = logps.new_zeros(2 * B).index_add(0, batch.owner, logps)
    return sums[:B], sums[B:]


def at_least_float32(logits):
    """A log-softmax in bfloat16 is off by whole nats in a long sum; float64 stays as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_settings(beta, epsilon=0.0):
    if not beta > 0:  # at beta = 0 the loss is log 2 for ever and the gradient 0
        raise ValueError(f"beta must be greater than 0, got {beta}")
    if not 0 <= epsilon < 0.5:  # at 1/2 the labels say nothing, beyond it they lie
        raise ValueError(f"epsilon must be at least 0 and less than 1/2, got {epsilon}")


def check_shapes(first, *others, dims=1):
    """Broadcasting a (B, 1) against a (B,) would give B * B pairs and a plausible loss."""
    for other in others:
        assert first.dim() == dims and first.shape == other.shape, (first.shape, other.shape)
