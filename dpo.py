"""Direct Preference Optimization, equation by equation (Rafailov et al. 2023).

Equation numbers, in brackets at the end of a line, are those printed in arXiv 2305.18290 v3.
The paper's letters: y_w is chosen, y_l rejected, r-hat the implicit reward, sigma the sigmoid.

Every log-prob is log pi(y|x) in nats, summed over a response's tokens, its end token included.
B pairs, R rows, T positions, N scored tokens, V vocabulary, K ranked responses, Y all responses.

Only `response_logps` knows of a model. It makes the four log-probs of Eq. 7: two from the policy
at every step, two from the reference, which train.py computes once.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


# Section 3: preferences -> rewards, the detour that DPO avoids


def bradley_terry(rewards_1, rewards_2):
    """P(y_1 beats y_2 | x). Only the difference of the rewards matters. Any equal shapes. Eq. 1."""
    return torch.sigmoid(rewards_1 - rewards_2)  # (1): exp r1 / (exp r1 + exp r2)


def reward_model_loss(chosen_rewards, rejected_rewards):
    """-log P(chosen beats rejected) of each pair: (B,), (B,) -> (B,). Eq. 2 before the mean."""
    check_shapes(chosen_rewards, rejected_rewards)
    return -F.logsigmoid(chosen_rewards - rejected_rewards)  # (2)


def kl_divergence(logps, other_logps):
    """KL(pi || other) in nats: two (..., Y) -> (...). The last dimension lists every response."""
    probs = logps.exp()
    return (probs * torch.where(probs > 0, logps - other_logps, 0)).sum(-1)  # 0 log 0 = 0


def rlhf_objective(policy_logps, ref_logps, rewards, beta):
    """J = E_pi[r] - beta KL(pi || pi_ref): three (..., Y) -> (...), in units of r. Eq. 3.

    The last dimension lists every response, so this is the exact value and not an estimate.
    """
    expected_reward = (policy_logps.exp() * rewards).sum(-1)
    return expected_reward - beta * kl_divergence(policy_logps, ref_logps)  # (3)


# Section 4: rewards -> the optimal policy, and back


def optimal_policy(ref_logps, rewards, beta):
    """The policy that maximises Eq. 3, in closed form, and its partition function. Eq. 4.

    Two (..., Y) -> log pi_r(y|x) (..., Y) and log Z(x) (...). ValueError unless beta > 0.
    """
    check_settings(beta)
    unnormalised = ref_logps + rewards / beta
    log_Z = unnormalised.logsumexp(-1)  # over all responses: listed here, intractable in general
    return unnormalised - log_Z[..., None], log_Z  # (4)


def implicit_reward(policy_logps, ref_logps, beta):
    """r-hat: the reward whose optimal policy this is, up to beta log Z(x). Any equal shapes. Eq. 5.

    ValueError unless beta > 0, here and in everything that builds on it.
    """
    check_settings(beta)
    assert policy_logps.shape == ref_logps.shape, (policy_logps.shape, ref_logps.shape)
    return beta * (policy_logps - ref_logps)  # (5) without beta log Z(x), equal for all responses


# Eq. 7: preferences -> policy, with no reward model in between


class DPOLoss(NamedTuple):
    """What `dpo_loss` returns for each pair, all (B,). Only `losses` carries a gradient."""

    losses: torch.Tensor
    weights: torch.Tensor  # sigma(r_rejected - r_chosen), between 0 and 1
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1
):
    """Eq. 7 for each pair: four (B,) log-probs -> DPOLoss. Training minimises the mean of `losses`.

    Where the policy equals the reference, every loss is log 2 = 0.6931 and every weight is 1/2.
    ValueError unless beta > 0.
    """
    check_shapes(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)  # (5)
    rejected_rewards = implicit_reward(policy_rejected_logps, ref_rejected_logps, beta)
    margins = chosen_rewards - rejected_rewards  # (6): beta log Z(x) is in both rewards and cancels
    losses = -F.logsigmoid(margins)  # (7): Eq. 2 with the policy's implicit reward
    weights = torch.sigmoid(rejected_rewards - chosen_rewards)  # section 4
    return DPOLoss(losses, weights.detach(), chosen_rewards.detach(), rejected_rewards.detach())


def dpo_gradient(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1
):
    """The gradient in section 4, by hand: d loss / d policy_chosen_logps and
    d loss / d policy_rejected_logps of each pair's own loss (not of the mean), each (B,).

    Descent raises the chosen log-prob and lowers the rejected one, most where r-hat ranks the pair
    confidently the wrong way round. The end of appendix A.4 misprints the weight as
    sigma(r_chosen - r_rejected). At policy == reference both weights are 1/2 and look alike.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    weights = torch.sigmoid(-reward_margins(*logps, beta=beta))  # sigma(r_rejected - r_chosen)
    return -beta * weights, beta * weights


def describe(*logps, beta=0.1):
    """The metrics of each pair, from the four log-probs of `dpo_loss`: a dict of (B,)."""
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
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie."""
    return (margins > 0).float() + (margins == 0).float() / 2


# Other convex functions f of the margin m = r_w - r_l (GPO, arXiv 2402.05749). Descent moves along
# beta (-f'(m)) (grad log pi(y_w) - grad log pi(y_l)); for DPO, -f'(m) is the weight.
# `logps` are the four of dpo_loss. (B,) losses; ValueError unless beta > 0 and 0 <= epsilon < 1/2.


def reward_margins(*logps, beta):
    """m = r_w - r_l, the argument of Eq. 7's sigmoid: four (B,) -> (B,). ValueError as there."""
    check_shapes(*logps)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = logps
    chosen_rewards = implicit_reward(policy_chosen, ref_chosen, beta)
    return chosen_rewards - implicit_reward(policy_rejected, ref_rejected, beta)


def cdpo_loss(*logps, beta=0.1, epsilon=0.1):
    """Eq. 7 if a fraction epsilon of the labels is wrong: its minimum is sigma(m) = 1 - epsilon.

    Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)


def robust_loss(*logps, beta=0.1, epsilon=0.1):
    """cDPO made unbiased: its mean over label flips is the clean Eq. 7. arXiv 2403.00409."""
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return (-(1 - epsilon) * F.logsigmoid(m) + epsilon * F.logsigmoid(-m)) / (1 - 2 * epsilon)


def ipo_loss(*logps, beta=0.1):
    """(rho - 1 / (2 beta))^2 with rho = m / beta: the target m = 1/2 is finite for any label.

    Azar et al. 2023, arXiv 2310.12036, Eq. 17; beta is their tau. (TRL averages over tokens.)
    """
    return ((reward_margins(*logps, beta=beta) - 0.5) / beta) ** 2


def hinge_loss(*logps, beta=0.1):
    """max(0, 1 - m): full gradient up to a margin of 1, none beyond. RSO, arXiv 2309.06657."""
    return F.relu(1 - reward_margins(*logps, beta=beta))


# The names that --loss takes
LOSSES = dict(dpo=dpo_loss, cdpo=cdpo_loss, robust=robust_loss, ipo=ipo_loss, hinge=hinge_loss)


# Appendix A.3: rankings of more than two responses


def plackett_luce_logps(rewards):
    """log P(this ranking | x) from K rewards, best response first: (..., K) -> (...). Eq. 18.

    The winner is drawn with odds exp(r), then the runner-up from the rest, and so on.
    """
    still_in = rewards.flip(-1).logcumsumexp(-1).flip(-1)  # log sum over j >= k of exp r_j
    return (rewards - still_in).sum(-1)  # (18)


def plackett_luce_loss(policy_logps, ref_logps, beta=0.1):
    """Eq. 20 for each ranking: two (B, K), best first -> (B,). With K = 2 it is Eq. 7."""
    check_shapes(policy_logps, ref_logps, dims=2)
    rewards = implicit_reward(policy_logps, ref_logps, beta)  # Z(x) cancels here too
    return -plackett_luce_logps(rewards)  # (19) is Eq. 18 at the implicit reward; (20) its -log


# log pi(y|x) from a model


def response_logps(model, ids, mask):
    """log pi(y|x) of each row, summed over the tokens where `mask` is True: (R, T), (R, T) -> (R,).

    `mask` is True at the tokens of the response, its end token included, False at the prompt and at
    padding. `model` maps ids (R, T) and places (N,) in the flattened rows to logits (N, V).
    The result is a sum, never a mean, in at least float32.
    """
    assert ids.shape == mask.shape, (ids.shape, mask.shape)
    at = mask[:, 1:].flatten().nonzero().squeeze(-1).to(ids.device)  # (N,): t predicts token t + 1
    logits = at_least_float32(model(ids[:, :-1], at))  # (N, V), nowhere else
    targets = ids[:, 1:].flatten()[at]
    logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    return logps.new_zeros(len(ids)).index_add(0, at // (ids.shape[1] - 1), logps)  # row by row


def at_least_float32(logits):
    """A log-softmax in bfloat16 is off by whole nats in a long sum. float64 stays as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_settings(beta, epsilon=0.0):
    if not beta > 0:  # at beta = 0 the loss is always log 2 and the gradient 0
        raise ValueError(f"beta must be greater than 0, got {beta}")
    if not 0 <= epsilon < 0.5:  # at 1/2 the labels carry no information
        raise ValueError(f"epsilon must be at least 0 and less than 1/2, got {epsilon}")


def check_shapes(first, *others, dims=1):
    """Broadcasting (B, 1) against (B,) would give B * B pairs and a plausible loss."""
    for other in others:
        assert first.dim() == dims and first.shape == other.shape, (first.shape, other.shape)
