"""Direct Preference Optimization, equation by equation (Rafailov et al. 2023).

A number in brackets in a comment, like (7), is an equation as printed in arXiv 2305.18290 v3.
The paper's letters: y_w is chosen, y_l rejected, r-hat the implicit reward, sigma the sigmoid.

Every log-prob is log pi(y|x) in nats, summed over a response's tokens, its end token included.
B pairs, R rows (chosen and rejected together), T positions, N scored tokens, V vocabulary,
K ranked responses, Y all responses.

Only `response_logps` touches a model. It computes the four log-probs of Eq. 7: two of the policy
at every step, two of the reference, which train.py computes once.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


# Section 3: preferences -> rewards, the detour that DPO avoids


def bradley_terry(rewards_1, rewards_2):
    """P(y_1 beats y_2 | x). Only the difference of the rewards matters. Any shape. Eq. 1."""
    return torch.sigmoid(rewards_1 - rewards_2)  # (1): exp r1 / (exp r1 + exp r2)


def reward_model_loss(chosen_rewards, rejected_rewards):
    """-log P(chosen beats rejected) of each pair: (B,), (B,) -> (B,). Eq. 2 without the mean."""
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

    Both arguments are (..., Y). Returns log pi_r(y|x), which is (..., Y), and log Z(x), (...).
    ValueError unless beta > 0.
    """
    check_settings(beta)
    unnormalised = ref_logps + rewards / beta
    log_Z = unnormalised.logsumexp(-1)  # over all responses: listed here, intractable in general
    return unnormalised - log_Z[..., None], log_Z  # (4)


def implicit_reward(policy_logps, ref_logps, beta):
    """r-hat: the reward for which this policy is optimal, up to beta log Z(x). Eq. 5.

    Any shape, the same for both. ValueError unless beta > 0, here and in what builds on it.
    """
    check_settings(beta)
    check_shapes(policy_logps, ref_logps, dims=policy_logps.dim())
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
    margins = chosen_rewards - rejected_rewards  # (6): here beta log Z(x) would cancel
    losses = -F.logsigmoid(margins)  # (7): Eq. 2 with the policy's implicit reward
    weights = torch.sigmoid(rejected_rewards - chosen_rewards)  # section 4: autograd makes it
    return DPOLoss(losses, weights.detach(), chosen_rewards.detach(), rejected_rewards.detach())


def dpo_gradient(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1
):
    """The gradient in section 4, by hand: d loss / d policy_chosen_logps and
    d loss / d policy_rejected_logps of each pair's own loss (not of the mean), each (B,).

    Descent raises the chosen log-prob and lowers the rejected one, most strongly where the implicit
    reward is confidently wrong. The end of appendix A.4 misprints the weight as
    sigma(r_chosen - r_rejected). At policy == reference both weights are 1/2 and look alike.
    """
    check_shapes(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)
    rejected_rewards = implicit_reward(policy_rejected_logps, ref_rejected_logps, beta)
    weights = torch.sigmoid(rejected_rewards - chosen_rewards)
    return -beta * weights, beta * weights


def describe(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1
):
    """The metrics of each pair as a dict of (B,), from the arguments of `dpo_loss`."""
    losses, weights, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": losses,
        "margin": margins,
        "weight": weights,
        "accuracy": accuracy(margins),
        "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards,
        "chosen_logp": policy_chosen_logps,
        "rejected_logp": policy_rejected_logps,
    }


def accuracy(margins):
    """1 where the chosen reward is higher, 0 where the rejected one is, 1/2 for a tie."""
    return (margins > 0).float() + (margins == 0).float() / 2


# Other convex functions f of the margin m = r_w - r_l (GPO, arXiv 2402.05749). Descent follows
# beta * weight * (grad log pi(y_w) - grad log pi(y_l)) with the weight -f'(m); for DPO, sigma(-m).
# `logps` are the four log-probs of dpo_loss, in its order. Each function returns (B,) losses, and
# raises ValueError unless beta > 0 and 0 <= epsilon < 1/2.


def reward_margins(*logps, beta):
    """m = r_w - r_l, the argument of Eq. 7's sigmoid: four (B,) -> (B,)."""
    check_shapes(*logps)
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps = logps
    chosen_rewards = implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)
    rejected_rewards = implicit_reward(policy_rejected_logps, ref_rejected_logps, beta)
    return chosen_rewards - rejected_rewards


def cdpo_loss(*logps, beta=0.1, epsilon=0.1):
    """Eq. 7 if a fraction epsilon of the labels is wrong. Smallest where sigma(m) = 1 - epsilon.

    Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return -(1 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)


def robust_loss(*logps, beta=0.1, epsilon=0.1):
    """Its mean over labels flipped with probability epsilon is Eq. 7 of the true labels, so it is
    unbiased, as cDPO is not. It has no lower bound. arXiv 2403.00409."""
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return (-(1 - epsilon) * F.logsigmoid(m) + epsilon * F.logsigmoid(-m)) / (1 - 2 * epsilon)


def ipo_loss(*logps, beta=0.1):
    """(rho - 1 / (2 beta))^2 with rho = m / beta. Smallest at m = 1/2, so the margin stays finite
    even where one response always wins.

    Azar et al. 2023, arXiv 2310.12036, Eq. 17; beta is their tau. (TRL averages over tokens.)
    """
    return ((reward_margins(*logps, beta=beta) - 0.5) / beta) ** 2


def hinge_loss(*logps, beta=0.1):
    """max(0, 1 - m): a constant gradient while m < 1, none beyond. RSO, arXiv 2309.06657."""
    return F.relu(1 - reward_margins(*logps, beta=beta))


# The names that --loss takes. dpo_loss returns a DPOLoss, the others return the losses alone.
LOSSES = {
    "dpo": dpo_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
}


# Appendix A.3: rankings of more than two responses


def plackett_luce_logps(rewards):
    """log P(this ranking | x) from K rewards, best response first: (..., K) -> (...). Eq. 18.

    The winner is drawn with probability proportional to exp(r), then the runner-up from the rest,
    and so on.
    """
    still_in = rewards.flip(-1).logcumsumexp(-1).flip(-1)  # log sum over j >= k of exp r_j
    return (rewards - still_in).sum(-1)  # (18)


def plackett_luce_loss(policy_logps, ref_logps, beta=0.1):
    """Eq. 20 for each ranking: two (B, K), best first -> (B,). With K = 2 it is Eq. 7."""
    check_shapes(policy_logps, ref_logps, dims=2)
    rewards = implicit_reward(policy_logps, ref_logps, beta)  # Z(x) cancels here too
    return -plackett_luce_logps(rewards)  # Eq. 18 at the implicit reward is (19), its -log (20)


# log pi(y|x) from a model


def response_logps(model, ids, mask):
    """log pi(y|x) of each row, summed over the tokens where `mask` is True: (R, T), (R, T) -> (R,).

    `mask` is True at the tokens of the response, its end token included, False at the prompt and at
    padding. It may be on the CPU. `model` maps ids and a mask of one shape to logits (N, V) at the
    N positions where the mask is True. The result is a sum, never a mean, in at least float32.
    """
    check_shapes(ids, mask, dims=2)
    scored = mask[:, 1:]  # (R, T - 1): position t predicts token t + 1
    logits = at_least_float32(model(ids[:, :-1], scored))  # (N, V), at the scored positions only
    targets = ids[:, 1:][scored]  # (N,)
    logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    rows = logps.new_zeros(scored.shape)  # 0 at the prompt and at padding
    rows[scored] = logps
    return rows.sum(-1)


def at_least_float32(logits):
    """Cast to float32, unless they are float32 or float64 already.

    In bfloat16 a log-softmax is so coarse that a long sum of log-probs is off by whole nats.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_settings(beta, epsilon=0.0):
    if not beta > 0:  # at beta = 0 the loss is always log 2 and the gradient 0
        raise ValueError(f"beta must be greater than 0, got {beta}")
    if not 0 <= epsilon < 0.5:  # at 1/2 the labels carry no information
        raise ValueError(f"epsilon must be at least 0 and less than 1/2, got {epsilon}")


def check_shapes(first, *others, dims=1):
    """All shapes must be equal: (B, 1) against (B,) would broadcast to B * B plausible losses."""
    assert first.dim() == dims, f"expected {dims} dimensions, got {tuple(first.shape)}"
    for other in others:
        assert first.shape == other.shape, f"shapes {tuple(first.shape)}, {tuple(other.shape)}"
