"""The paper as tests, in its order. Each test is named after the equation that it checks.

Expected values are worked out by hand, by listing every response, or by finite differences.
A failing test says which equation is wrong and what the usual mistake is.

    python -m pytest test_dpo.py                        checks dpo.py
    DPO_MODULE=my_dpo python -m pytest test_dpo.py      grades my_dpo.py instead
"""

import itertools
import math

import pytest
import torch

import data
from tests.helpers import descend, expect, gpt, load_dpo
from tests.mistakes import (  # two pairs and their losses by hand, and what mistakes make of them
    BETA,
    EQ4_LOG_Z,
    EQ4_MISTAKES,
    EQ4_OPTIMUM,
    EQ4_REF,
    EQ4_REWARDS,
    EQ7_MISTAKES,
    LOSSES,
    PAIRS,
    WEIGHTS,
)

dpo = load_dpo()  # dpo.py, or the module that DPO_MODULE names
f64 = torch.float64

# A world small enough to list: 2 prompts, each with the 27 responses of 3 tokens out of 3.
# REF and each of the 50 random POLICIES are tables of log pi(y|x), (2, 27).
generator = torch.Generator().manual_seed(1)
REF = torch.randn(2, 27, generator=generator, dtype=f64).log_softmax(-1)
REWARDS = torch.randn(2, 27, generator=generator, dtype=f64)
POLICIES = (1.5 * torch.randn(50, 2, 27, generator=generator, dtype=f64)).log_softmax(-1)
F_OF_X = torch.tensor([[7.0], [-4.0]], dtype=f64)  # the paper's f(x): any number for each prompt

# Eq. 4 written out: Z(x), (2,), and log pi*(y|x), (2, 27)
Z = (REF.exp() * (REWARDS / BETA).exp()).sum(-1)
OPTIMUM = (REF.exp() * (REWARDS / BETA).exp() / Z[:, None]).log()


def kl(logps, other_logps):
    """KL(pi || other) written out, without dpo.kl_divergence: two (..., Y) -> (...)."""
    return (logps.exp() * (logps - other_logps)).sum(-1)


def each_pair(table):
    """A table at the two responses of every pair, 351 pairs per prompt: (2, 27) -> two (702,)."""
    first, second = torch.triu_indices(27, 27, offset=1)
    return table[:, first].flatten(), table[:, second].flatten()


def first_wins():
    """The probability that the first response of each pair wins, Eq. 1 written out: (702,)."""
    first, second = each_pair(REWARDS)
    return first.exp() / (first.exp() + second.exp())


def mean_over_labels(losses_if_first_wins, losses_if_second_wins):
    """The mean loss over all pairs, each label weighted by its probability: two (702,) -> ()."""
    p = first_wins()
    return (p * losses_if_first_wins + (1 - p) * losses_if_second_wins).mean()


def label_entropy():
    """The mean entropy of the labels: the mean of -log P(label) under the true probabilities."""
    p = first_wins()
    return mean_over_labels(-p.log(), -(1 - p).log())


# Section 3: Bradley-Terry, the reward model, the objective


def test_eq1_bradley_terry():
    first, second = each_pair(REWARDS)
    got = dpo.bradley_terry(first, second)
    wanted = first.exp() / (first.exp() + second.exp())
    why = "Eq. 1: P(y_1 beats y_2) = e^r1 / (e^r1 + e^r2)"
    expect(got, wanted, why, mistakes={"the two rewards are exchanged": 1 - wanted})
    total = got + dpo.bradley_terry(second, first)
    expect(total, torch.ones(702), "Eq. 1: one of the two must win")
    tie = dpo.bradley_terry(first, first)
    expect(tie, torch.full((702,), 0.5), "Eq. 1: at equal rewards each wins half of the time")
    far_apart = torch.tensor([-2000.0, 2000.0])
    got = dpo.bradley_terry(far_apart, -far_apart)
    expect(got, [0.0, 1.0], "Eq. 1 for rewards far apart: use a sigmoid, e^2000 overflows")


def test_eq2_reward_model_loss_and_its_minimum():
    chosen = torch.tensor([0.5, -1.5], dtype=f64)
    rejected = torch.tensor([-0.5, 2.0], dtype=f64)
    losses = dpo.reward_model_loss(chosen, rejected)
    expect(losses, LOSSES, "Eq. 2: -log sigma(r_w - r_l) of each pair", mistakes=EQ7_MISTAKES)
    far_apart = dpo.reward_model_loss(torch.tensor([-1200.0]), torch.tensor([0.0]))
    why = "Eq. 2 for rewards far apart: use logsigmoid, log(sigmoid) is -inf"
    expect(far_apart, [1200.0], why, tolerance=1e-3)

    rewards = (REWARDS + F_OF_X).requires_grad_()
    first, second = each_pair(rewards)
    losses_if_first_wins = dpo.reward_model_loss(first, second)
    losses_if_second_wins = dpo.reward_model_loss(second, first)
    loss = mean_over_labels(losses_if_first_wins, losses_if_second_wins)
    loss.backward()
    expect(loss, label_entropy(), "Eq. 2: its minimum is the entropy of the labels")
    why = "Eq. 2: its gradient is 0 at r* + f(x), for all x and y"
    expect(rewards.grad, torch.zeros(2, 27), why)


def test_eq3_objective_of_a_coin():
    policy = torch.tensor([0.9, 0.1], dtype=f64).log()
    ref = torch.tensor([0.6, 0.4], dtype=f64).log()
    rewards = torch.tensor([2.0, -1.0], dtype=f64)
    beta = 0.3
    expected_reward = 0.9 * 2 - 0.1 * 1
    forward = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)  # KL(pi || pi_ref)
    reverse = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)  # KL(pi_ref || pi)
    under_ref = 0.6 * 2 - 0.4 * 1
    plain_mean = (2 - 1) / 2
    mistakes = {
        "the KL is added": expected_reward + beta * forward,
        "beta is missing": expected_reward - forward,
        "the KL is KL(pi_ref || pi), the other way round": expected_reward - beta * reverse,
        "the expected reward is taken under pi_ref": under_ref - beta * forward,
        "the expected reward is a plain mean over the responses": plain_mean - beta * forward,
    }
    got = dpo.rlhf_objective(policy, ref, rewards, beta)
    why = "Eq. 3: J = E_pi[r] - beta KL(pi || pi_ref), both expectations under pi"
    expect(got, expected_reward - beta * forward, why, mistakes=mistakes)

    always_heads = torch.tensor([0.0, -math.inf], dtype=f64)
    got = dpo.kl_divergence(always_heads, ref)
    expect(got, -math.log(0.6), "the KL of Eq. 3: 0 log 0 is 0, not NaN")
    fair = torch.tensor([0.5, 0.5], dtype=f64).log()
    got = dpo.kl_divergence(fair, always_heads)
    assert got == math.inf, "the KL of Eq. 3: what pi_ref never says costs infinitely much"


@pytest.mark.parametrize("never", [-math.inf, -1000.0])
def test_eq3_gradient_of_the_kl_where_a_probability_is_0(never):
    """d KL / d log pi(y) is pi(y) (log pi(y) - log pi_ref(y) + 1), so it is 0 there."""
    policy = torch.tensor([math.log(0.9), math.log(0.1), never], dtype=f64, requires_grad=True)
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=f64).log()
    dpo.kl_divergence(policy, ref).backward()
    by_hand = [0.9 * (math.log(0.9 / 0.5) + 1), 0.1 * (math.log(0.1 / 0.3) + 1), 0.0]
    why = "the gradient of Eq. 3's KL is finite: a response of probability 0 adds 0, not NaN"
    expect(policy.grad, by_hand, why)


def test_section3_objective_is_the_expected_ppo_reward():
    """At the end of section 3, PPO maximises the mean of r - beta (log pi - log pi_ref)."""
    for policy in POLICIES:
        objective = dpo.rlhf_objective(policy, REF, REWARDS, BETA)
        written_out = (policy.exp() * REWARDS).sum(-1) - BETA * kl(policy, REF)
        why = "Eq. 3: E_pi[r] - beta KL(pi || pi_ref), a sum over all responses"
        expect(objective, written_out, why)
        ppo_reward = REWARDS - dpo.implicit_reward(policy, REF, BETA)
        mean = (policy.exp() * ppo_reward).sum(-1)
        why = "the end of section 3: the mean of r - r-hat, with r-hat of Eq. 5, is J of Eq. 3"
        expect(mean, written_out, why)


# Section 4: the optimum, the reward behind it, the loss


def test_eq4_by_hand():
    optimum, log_Z = dpo.optimal_policy(EQ4_REF, EQ4_REWARDS, BETA)
    why = "Eq. 4: log pi_ref + r / beta - log Z(x)"
    expect(optimum, EQ4_OPTIMUM, why, mistakes=EQ4_MISTAKES)
    why = "log of Z(x) below Eq. 4, where Z(x) is the sum of pi_ref exp(r / beta)"
    expect(log_Z, EQ4_LOG_Z, why, mistakes={"it is Z(x), not its log": EQ4_LOG_Z.exp()})


def test_eq4_optimal_policy():
    optimum, log_Z = dpo.optimal_policy(REF, REWARDS, BETA)
    expect(log_Z, Z.log(), "log of Z(x) below Eq. 4: the sum of pi_ref exp(r / beta)")
    expect(optimum.exp().sum(-1), [1.0, 1.0], "Eq. 4: divided by Z(x), the policy sums to 1")
    expect(optimum, OPTIMUM, "Eq. 4: log pi_ref + r / beta - log Z(x)")

    coin = torch.tensor([0.5, 0.5]).log()
    optimum, log_Z = dpo.optimal_policy(coin, torch.tensor([1e4, 0.0]), 1.0)
    why = "Eq. 4 for a reward of 10,000: use logsumexp, exp overflows"
    expect(optimum.exp(), [1.0, 0.0], why, tolerance=1e-3)
    expect(log_Z, 1e4 - math.log(2), why, tolerance=1e-3)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_eq4_is_the_maximiser_of_eq3(beta):
    optimum, log_Z = dpo.optimal_policy(REF, REWARDS, beta)
    highest = dpo.rlhf_objective(optimum, REF, REWARDS, beta)
    expect(highest, beta * log_Z, "Eq. 4: at the optimum J = beta log Z(x)")
    for policy in POLICIES:
        objective = dpo.rlhf_objective(policy, REF, REWARDS, beta)
        why = "Eq. 4: a random policy has a larger J, so this is not the maximum"
        assert (objective < highest).all(), why
        why = "Eq. 4: J(pi*) - J(pi) = beta KL(pi || pi*)"
        expect(highest - objective, beta * kl(policy, optimum), why)


def test_eq4_is_where_gradient_ascent_on_eq3_arrives():
    def minus_objective(policy):
        return -dpo.rlhf_objective(policy, REF, REWARDS, BETA).sum()

    for start in POLICIES[:3]:
        found = descend(minus_objective, start)
        why = "Eq. 3: gradient ascent on it must end at pi* of Eq. 4"
        expect(found.exp(), OPTIMUM.exp(), why, tolerance=1e-4)


def test_eq5_reward_from_its_policy():
    beta_log_Z = BETA * Z.log()[:, None]
    log_ratio = OPTIMUM - REF
    mistakes = {
        "the reference is left out": BETA * OPTIMUM + beta_log_Z,
        "beta is missing": log_ratio + beta_log_Z,
        "beta divides": log_ratio / BETA + beta_log_Z,
        "the ratio is inverted": -BETA * log_ratio + beta_log_Z,
    }
    got = dpo.implicit_reward(OPTIMUM, REF, BETA) + beta_log_Z
    why = "Eq. 5: r = beta (log pi_r - log pi_ref) + beta log Z(x)"
    expect(got, REWARDS, why, mistakes=mistakes)
    for policy in POLICIES:
        mean = (REF.exp() * dpo.implicit_reward(policy, REF, BETA)).sum(-1)
        why = "Eq. 5: the mean of r-hat under pi_ref is -beta KL(pi_ref || pi)"
        expect(mean, -BETA * kl(REF, policy), why)


def test_eq6_the_normaliser_cancels():
    for rewards in (REWARDS, REWARDS + F_OF_X):  # the same preferences, but another Z(x)
        optimum, _ = dpo.optimal_policy(REF, rewards, 0.7)
        first, second = each_pair(dpo.implicit_reward(optimum, REF, 0.7))
        got = dpo.bradley_terry(first, second)
        expect(got, first_wins(), "Eq. 6: the preferences of pi* are those of r, whatever Z(x) is")


def test_eq7_by_hand():
    result = dpo.dpo_loss(*PAIRS, beta=BETA)
    why = "Eq. 7: -log sigma(beta (log-ratio of chosen - log-ratio of rejected))"
    expect(result.losses, LOSSES, why, mistakes=EQ7_MISTAKES)
    mistakes = {"it is sigma(r_w - r_l), as A.4 misprints it": 1 - WEIGHTS}
    why = "section 4: the weight is sigma(r_l - r_w), large where the ranking is wrong"
    expect(result.weights, WEIGHTS, why, mistakes=mistakes)
    expect(result.chosen_rewards, [0.5, -1.5], "Eq. 5: r_w = beta (policy - reference)")
    expect(result.rejected_rewards, [-0.5, 2.0], "Eq. 5: r_l = beta (policy - reference)")

    logps = PAIRS.clone().requires_grad_()
    result = dpo.dpo_loss(*logps, beta=BETA)
    assert result.losses.requires_grad, "Eq. 7: losses must carry a gradient: is there a detach?"
    for name in ("weights", "chosen_rewards", "rejected_rewards"):
        carries_gradient = getattr(result, name).requires_grad
        assert not carries_gradient, f"Eq. 7: only losses carry a gradient, not {name}: detach"


def test_eq7_is_log_2_where_policy_is_reference():
    policy_chosen, policy_rejected, _, _ = PAIRS
    result = dpo.dpo_loss(policy_chosen, policy_rejected, policy_chosen, policy_rejected, beta=0.3)
    why = "Eq. 7: policy == reference costs log 2; is the order of chosen and rejected the same?"
    expect(result.losses, [math.log(2), math.log(2)], why)


def test_eq7_is_eq2_at_the_implicit_reward():
    policy = POLICIES[0]
    chosen_rewards, rejected_rewards = each_pair(BETA * (policy - REF))
    eq2 = (1 + (rejected_rewards - chosen_rewards).exp()).log()
    got = dpo.reward_model_loss(chosen_rewards, rejected_rewards)
    expect(got, eq2, "Eq. 2: -log sigma(r_w - r_l)")
    policy_chosen, policy_rejected = each_pair(policy)
    ref_chosen, ref_rejected = each_pair(REF)
    result = dpo.dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, BETA)
    expect(result.losses, eq2, "Eq. 7: it is Eq. 2 at the rewards of Eq. 5")


@pytest.mark.parametrize("start", POLICIES[:3])
def test_eq7_population_minimum_is_the_optimum_of_eq4(start):
    def population_loss(policy):
        policy_first, policy_second = each_pair(policy)
        ref_first, ref_second = each_pair(REF)
        if_first_wins = dpo.dpo_loss(policy_first, policy_second, ref_first, ref_second, BETA)
        if_second_wins = dpo.dpo_loss(policy_second, policy_first, ref_second, ref_first, BETA)
        return mean_over_labels(if_first_wins.losses, if_second_wins.losses)

    found = descend(population_loss, start)
    why = "Eq. 7: descent on infinitely many pairs must end at pi* of Eq. 4; is the gradient wrong?"
    expect(found, OPTIMUM, why, tolerance=1e-8)
    lowest = population_loss(OPTIMUM)
    expect(lowest, label_entropy(), "Eq. 7: its minimum is the entropy of the labels")


def test_eq7_survives_extreme_margins():
    policy_chosen = torch.tensor([-8000.0], requires_grad=True)
    policy_rejected = torch.tensor([-4000.0], requires_grad=True)
    zero = torch.zeros(1)
    losses = dpo.dpo_loss(policy_chosen, policy_rejected, zero, zero, beta=0.3).losses
    why = "Eq. 7 at a margin of -1200: use logsigmoid; log(sigmoid(x)) is -inf there"
    expect(losses, [1200.0], why, tolerance=1e-3)
    losses.sum().backward()
    for logps, slope in ((policy_chosen, -0.3), (policy_rejected, 0.3)):
        has_gradient = logps.grad is not None
        assert has_gradient, "Eq. 7: a policy log-prob gets no gradient: is there a detach?"
        expect(logps.grad, [slope], why, tolerance=1e-6)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_eq7_refuses_beta(beta):
    """At beta = 0 the loss is always log 2, so training would go on and learn nothing."""
    with pytest.raises(ValueError):
        dpo.dpo_loss(*PAIRS, beta=beta)


def test_appendix_b_code_is_eq7():
    """Appendix B takes one table of log-probs, and the indices of winners and losers in it."""
    pi_logps = POLICIES[0, 0]
    ref_logps = REF[0]
    yw_idxs = torch.tensor([3, 20, 11, 3])
    yl_idxs = torch.tensor([7, 1, 26, 20])
    pi_logratios = pi_logps[yw_idxs] - pi_logps[yl_idxs]
    ref_logratios = ref_logps[yw_idxs] - ref_logps[yl_idxs]
    losses = -torch.sigmoid(0.1 * (pi_logratios - ref_logratios)).log()
    rewards = 0.1 * (pi_logps - ref_logps)

    policy_chosen = pi_logps[yw_idxs]
    policy_rejected = pi_logps[yl_idxs]
    ref_chosen = ref_logps[yw_idxs]
    ref_rejected = ref_logps[yl_idxs]
    result = dpo.dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    expect(result.losses, losses, "appendix B: Eq. 7 in the paper's own code, default beta 0.1")
    why = "appendix B: rewards are beta (pi - ref)"
    expect(result.chosen_rewards, rewards[yw_idxs], why)
    expect(result.rejected_rewards, rewards[yl_idxs], why)


# The gradient of section 4, and the misprint. These tests never use policy == reference: there
# every weight is 1/2, and the right formula and the misprinted one look alike.


def slopes(logps, row):
    """d loss / d logps[row] of each pair, by central differences: (4, 2) -> (2,)."""
    step = 1e-5
    above = logps.clone()
    above[row] += step
    below = logps.clone()
    below[row] -= step
    rise = dpo.dpo_loss(*above, beta=BETA).losses - dpo.dpo_loss(*below, beta=BETA).losses
    return rise / (2 * step)


def test_gradient_by_hand():
    margins = dpo.reward_margins(*PAIRS, beta=BETA)
    expect(margins, [1.0, -3.5], "reward_margins: r_w - r_l")
    chosen, rejected = dpo.dpo_gradient(*PAIRS, beta=BETA)
    margins_without_beta = torch.tensor([2.0, -7.0], dtype=f64)
    mistakes = {
        "the weight is sigma(r_w - r_l), A.4's misprint": -BETA * (1 - WEIGHTS),
        "the sign is inverted: descent must raise the chosen response": BETA * WEIGHTS,
        "beta is missing": -WEIGHTS,
        "it is divided by the number of pairs": -BETA * WEIGHTS / 2,
        "the weight is sigma', not sigma": -BETA * WEIGHTS * (1 - WEIGHTS),
        "the margin in the weight is without beta": -BETA * (-margins_without_beta).sigmoid(),
    }
    why = "section 4: d loss / d log pi(y_w) = -beta sigma(r_l - r_w)"
    expect(chosen, -BETA * WEIGHTS, why, mistakes=mistakes)
    mistakes = {"chosen and rejected are pulled the same way": -BETA * WEIGHTS}
    why = "section 4: d loss / d log pi(y_l) = +beta sigma(r_l - r_w)"
    expect(rejected, BETA * WEIGHTS, why, mistakes=mistakes)


@pytest.mark.parametrize("row, name", [(0, "chosen"), (1, "rejected")])
def test_gradient_by_autograd_and_finite_differences(row, name):
    logps = PAIRS.clone().requires_grad_()
    losses = dpo.dpo_loss(*logps, beta=BETA).losses
    losses.sum().backward()
    slope = slopes(PAIRS, row)
    why = f"section 4, {name}: autograd through dpo_loss is not its slope; is there a detach?"
    expect(logps.grad[row], slope, why, tolerance=1e-8)
    by_hand = dpo.dpo_gradient(*PAIRS, beta=BETA)[row]
    why = f"section 4, {name}: dpo_gradient is not the slope of dpo_loss; see their tests by hand"
    expect(by_hand, slope, why, tolerance=1e-8)


def test_eq21_eq22_and_a4_are_misprinted():
    """The appendix exchanges r_w and r_l. Finite differences show which version is right."""
    slope = slopes(PAIRS, row=0)  # d loss / d log pi(y_w): -0.134 and -0.485
    chosen, _ = dpo.dpo_gradient(*PAIRS, beta=BETA)
    why = "section 4's weight, sigma(r_l - r_w), is the slope of dpo_loss; A.4's is not"
    expect(chosen, slope, why, tolerance=1e-8)
    margins = torch.tensor([1.0, -3.5], dtype=f64)
    a4_as_printed = -BETA * margins.sigmoid()  # weight sigma(r_w - r_l): -0.366 and -0.015
    far_off = (slope - a4_as_printed).abs() > 0.2
    assert far_off.all(), "A.4's printed weight cannot be the slope"

    # Eq. 21 as printed is the mean of -log sigma(r_l - r_w): Eq. 7 with y_w and y_l exchanged.
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = PAIRS
    exchanged = torch.stack([policy_rejected, policy_chosen, ref_rejected, ref_chosen])
    slope = slopes(exchanged, row=1)  # log pi(y_w) now stands in row 1
    why = "Eq. 21 as printed: its slope is A.4's with the other sign"
    expect(slope, -a4_as_printed, why, tolerance=1e-8)


def test_eq22_weight_is_the_log_slope_of_sigma():
    """sigma'(u) / sigma(u) = sigma(-u) on a grid of u = r_w - r_l, sigma' by differences."""
    u = torch.linspace(-20, 20, 41, dtype=f64)
    zero = torch.zeros(41, dtype=f64)
    weights = dpo.dpo_loss(u, zero, zero, zero, 1.0).weights
    wrong_tied_right = weights[[0, 20, 40]]  # u = -20, 0 and 20
    why = "section 4: the weight is near 1 where wrong, 1/2 at a tie, near 0 where right"
    mistakes = {"the sign inside is inverted": [0.0, 0.5, 1.0]}
    expect(wrong_tied_right, [1.0, 0.5, 0.0], why, tolerance=1e-8, mistakes=mistakes)
    slope = ((u + 1e-5).sigmoid() - (u - 1e-5).sigmoid()) / 2e-5
    why = "Eq. 22: the weight is sigma'(u) / sigma(u)"
    expect(weights, slope / u.sigmoid(), why, tolerance=1e-7)


def test_gradient_through_a_gpt():
    """The gradient of every parameter: autograd through dpo_loss, and section 4's formula."""
    policy = gpt(seed=0)
    reference = gpt(seed=1)
    rows = [
        data.TokenPair(prompt=[3, 1], chosen=[2, 4, 0], rejected=[1, 0]),
        data.TokenPair(prompt=[2], chosen=[0], rejected=[4, 3, 3, 0]),
    ]
    ids, mask = data.collate(rows, [0, 1])
    with torch.no_grad():
        ref_chosen, ref_rejected = dpo.response_logps(reference, ids, mask).chunk(2)

    chosen, rejected = dpo.response_logps(policy, ids, mask).chunk(2)
    losses = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA).losses
    parameters = list(policy.parameters())
    autograd = torch.autograd.grad(losses.sum(), parameters, retain_graph=True)

    # dpo_gradient gives d loss / d log pi(y|x). Autograd multiplies it by grad log pi(y|x).
    by_hand = dpo.dpo_gradient(
        chosen.detach(), rejected.detach(), ref_chosen, ref_rejected, beta=BETA
    )
    formula = torch.autograd.grad([chosen, rejected], parameters, by_hand)
    why = "section 4: autograd of dpo_loss (got), dpo_gradient times grad log pi (expected), in "
    names = [name for name, _ in policy.named_parameters()]
    for name, got, wanted in zip(names, autograd, formula):
        expect(got, wanted, why + name, tolerance=1e-10)


# Section 5 and appendix A: classes of rewards, and the derivations


def test_definition1_one_class_is_one_likelihood():
    def losses_of(rewards):
        chosen, rejected = each_pair(rewards)
        return dpo.reward_model_loss(chosen, rejected)

    losses = losses_of(REWARDS)
    why = "Definition 1: Eq. 2 must not tell r and r + f(x) apart"
    expect(losses_of(REWARDS + F_OF_X), losses, why)
    depends_on_y = torch.arange(27)
    difference = losses_of(REWARDS + depends_on_y) - losses
    assert difference.abs().max() > 0.1, "Definition 1: f may depend on x only"


def all_rankings(K):
    """Every order of K responses, as indices, best first: (K!, K)."""
    return torch.tensor(list(itertools.permutations(range(K))))


def by_eq18(rewards):
    """P(each ranking), factor by factor, from rewards with the best first: (K!, K) -> (K!,)."""
    odds = rewards.exp()
    p = torch.ones(len(rewards), dtype=f64)
    for k in range(rewards.shape[1]):
        p = p * odds[:, k] / odds[:, k:].sum(-1)
    return p


@pytest.mark.parametrize("K", [3, 4])
def test_lemma1_one_class_has_one_ranking_distribution(K):
    rankings = all_rankings(K)
    shifted = (REWARDS + F_OF_X)[0]
    got = dpo.plackett_luce_logps(shifted[rankings]).exp()
    wanted = by_eq18(REWARDS[0, rankings])
    expect(got, wanted, "Lemma 1: f(x) cancels in every factor of Plackett-Luce, Eq. 18")


def test_lemma2_one_class_has_one_optimal_policy():
    optimum, _ = dpo.optimal_policy(REF, REWARDS + F_OF_X, BETA)
    why = "Lemma 2: r + f(x) has the same optimal policy as r; Z(x) absorbs f(x)"
    expect(optimum, OPTIMUM, why)


def projected(rewards):
    """f(r; pi_ref, beta) of Eq. 8 by way of the policy: beta log pi_r / pi_ref."""
    optimum, _ = dpo.optimal_policy(REF, rewards, BETA)
    return dpo.implicit_reward(optimum, REF, BETA)


def test_theorem1_and_eq8_each_class_has_a_member_that_is_a_policy():
    f_r = projected(REWARDS)
    why = "Theorem 1: beta log pi_r / pi_ref is f(r) of Eq. 8: r minus a function of x alone"
    expect(f_r, REWARDS - BETA * Z.log()[:, None], why)
    expect(projected(f_r), f_r, "Eq. 8: projecting twice is the same as projecting once")
    why = "Eq. 8 and the chain of A.6: all rewards of a class have the same projection"
    expect(projected(REWARDS + F_OF_X), f_r, why)


def test_eq9_a_policy_in_disguise_has_normaliser_1():
    of_the_optimum = projected(REWARDS)
    of_a_random_policy = dpo.implicit_reward(POLICIES[0], REF, BETA)
    for rewards in (of_the_optimum, of_a_random_policy):
        _, log_Z = dpo.optimal_policy(REF, rewards, BETA)
        why = "Eq. 9: the sum of pi_ref exp(r / beta) is 1 for r = beta log pi / pi_ref"
        expect(log_Z, [0.0, 0.0], why)
    _, log_Z = dpo.optimal_policy(REF, REWARDS, BETA)
    assert log_Z.abs().min() > 0.1, "Eq. 9: it must not hold for every reward"


def test_proposition1_the_member_is_unique():
    rewards = dpo.implicit_reward(POLICIES[0], REF, BETA)
    _, log_Z = dpo.optimal_policy(REF, rewards + F_OF_X, BETA)
    why = "Proposition 1: + f(x) moves log Z(x) by f(x) / beta, and Eq. 9 holds only for f = 0"
    expect(log_Z, F_OF_X[:, 0] / BETA, why)


def test_proposition1_breaks_for_an_answer_in_no_pair():
    # Response 26 gives half of its probability to the others, in proportion to theirs.
    probs = POLICIES[0, 0].exp()
    moved = probs.clone()
    moved[26] = probs[26] / 2
    moved[:26] *= (1 - moved[26]) / (1 - probs[26])
    first, second = torch.triu_indices(26, 26, offset=1)  # all pairs without response 26
    ref_chosen = REF[0, first]
    ref_rejected = REF[0, second]

    def losses_of(policy):
        chosen = policy[first]
        rejected = policy[second]
        return dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA).losses

    why = "Eq. 7 says nothing about a response that no pair mentions"
    expect(losses_of(moved.log()), losses_of(probs.log()), why)

    # If the reference never gives response 26, no reward can make up for it.
    ref = REF.clone()
    ref[:, 26] = -torch.inf
    rewards = REWARDS.clone()
    rewards[:, 26] += 99
    optimum, _ = dpo.optimal_policy(ref, rewards, BETA)
    why = "Eq. 4: where pi_ref is 0, so is every optimal policy"
    assert (optimum[:, 26] == -torch.inf).all(), why


def gradient_variance(policy, rewards):
    """The variance of the policy gradient estimated from one response, summed over logits: (2,).

    The estimate is (r(y) - beta log pi(y) / pi_ref(y)) grad log pi(y), where the policy draws y.
    The gradient of log pi(y) in the 27 logits is one-hot(y) - pi.
    """
    probs = policy.exp()
    grad_logp = torch.eye(27, dtype=f64) - probs[:, None, :]  # (2, 27 responses, 27 logits)
    penalised_rewards = rewards - BETA * (policy - REF)
    estimate = penalised_rewards[:, :, None] * grad_logp
    mean = (probs[:, :, None] * estimate).sum(1, keepdim=True)  # (2, 1, 27)
    squared_distance = ((estimate - mean) ** 2).sum(-1)  # (2, 27 responses)
    return (probs * squared_distance).sum(-1)


def test_eq10_normaliser_and_variance():
    f_r = projected(REWARDS)
    for policy in POLICIES:
        objective = dpo.rlhf_objective(policy, REF, REWARDS, BETA)
        with_normaliser = dpo.rlhf_objective(policy, REF, f_r, BETA)
        why = "Eq. 10: with the normaliser it is J - beta log Z"
        expect(with_normaliser, objective - BETA * Z.log(), why)
        why = "Eq. 10: it is -beta KL(pi || pi_r), at most 0"
        expect(with_normaliser, -BETA * kl(policy, OPTIMUM), why)

    with_normaliser = gradient_variance(OPTIMUM, f_r)
    without = gradient_variance(OPTIMUM, REWARDS)
    expect(with_normaliser, [0.0, 0.0], "Eq. 10: at pi_r, with the normaliser, no variance")
    assert (without > 0.1).all(), "Eq. 10: without the normaliser there is variance at pi_r"

    # The paper says that the normaliser could lower the variance. Near pi_r it does.
    why = "Eq. 10: the normaliser lowers the variance near pi_r, and raises it at random policies"
    for policy in POLICIES:
        near = (OPTIMUM + 0.1 * policy).log_softmax(-1)
        lower = gradient_variance(near, f_r) < gradient_variance(near, REWARDS)
        assert lower.all(), why
        higher = gradient_variance(policy, f_r) > gradient_variance(policy, REWARDS)
        assert higher.all(), why


def test_eq11_to_eq15_are_one_objective():
    optimum, _ = dpo.optimal_policy(REF, REWARDS, BETA)
    log_Z = Z.log()
    tilted = REF + REWARDS / BETA - log_Z[:, None]  # log of 1/Z pi_ref exp(r / beta)
    for policy in POLICIES:
        eq11 = dpo.rlhf_objective(policy, REF, REWARDS, BETA)
        eq12 = kl(policy, tilted) - log_Z
        eq13 = kl(policy, optimum) - log_Z
        eq14 = dpo.kl_divergence(policy, OPTIMUM) - log_Z
        expect(eq11, -BETA * eq12, "Eq. 11 is -beta times Eq. 12: a maximum turned into a minimum")
        expect(eq13, eq12, "Eq. 13: 1/Z pi_ref exp(r / beta) is pi* of Eq. 4")
        expect(eq14, eq13, "Eq. 14: KL(pi || pi*) - log Z(x), with minus (v1 had plus)")
        positive = dpo.kl_divergence(policy, OPTIMUM) > 0
        assert positive.all(), "Eq. 15: the KL is positive where the policies differ"
    at_optimum = dpo.kl_divergence(optimum, OPTIMUM)
    expect(at_optimum, [0.0, 0.0], "Eq. 15: the KL is 0 at pi = pi* of Eq. 4")


def test_eq16_eq17_lead_to_eq6():
    """Appendix A.2: beta log Z(x) cancels, and 1 / (1 + exp(...)) remains."""
    log_ratio = OPTIMUM - REF
    eq17 = dpo.implicit_reward(OPTIMUM, REF, BETA) + BETA * Z.log()[:, None]
    first, second = each_pair(eq17)
    eq16 = dpo.bradley_terry(first, second)
    first, second = each_pair(BETA * log_ratio)
    eq6 = 1 / (1 + (second - first).exp())
    expect(eq16, eq6, "A.2: Eq. 16 (Eq. 1) at the reward of Eq. 17 (Eq. 5) is Eq. 6")


# Appendix A.3: rankings


def test_eq18_plackett_luce():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=f64)
    p = dpo.plackett_luce_logps(rewards[all_rankings(4)]).exp()
    a, b, c, d = rewards.exp().tolist()
    by_hand = a / (a + b + c + d) * b / (b + c + d) * c / (c + d)
    worst_first = d / (a + b + c + d) * c / (a + b + c) * b / (a + b)
    sum_over_all = a * b * c * d / (a + b + c + d) ** 4
    mistakes = {
        "it is read worst first, or the sum runs over j <= k": worst_first,
        "every factor divides by the sum over all": sum_over_all,
    }
    why = "Eq. 18: best first, and the k-th factor's sum runs over j >= k"
    expect(p[0], by_hand, why, mistakes=mistakes)  # p[0] is the ranking 0, 1, 2, 3
    expect(p.sum(), 1.0, "Eq. 18: the probabilities of all 24 rankings of 4 responses sum to 1")
    far_apart = dpo.plackett_luce_logps(torch.tensor([-2000.0, 0.0, 2000.0]))
    why = "Eq. 18 for rewards far apart: stay in logs, e^2000 overflows"
    expect(far_apart, -6000.0, why, tolerance=1e-2)


def test_eq19_rankings_from_the_optimal_policy():
    rankings = all_rankings(4)
    p = by_eq18(REWARDS[0, rankings])
    losses = dpo.plackett_luce_loss(OPTIMUM[0, rankings], REF[0, rankings], BETA)
    why = "Eq. 19: Eq. 18 at beta log pi* / pi_ref is Eq. 18 at r*, for Z(x) cancels"
    mistakes = {"Eq. 20's minus before the log is missing": 1 / p}
    expect((-losses).exp(), p, why, mistakes=mistakes)


def test_eq20_of_two_answers_is_eq7():
    policy = PAIRS[:2].T  # a row per pair, chosen before rejected
    ref = PAIRS[2:].T
    losses = dpo.plackett_luce_loss(policy, ref, BETA)
    expect(losses, LOSSES, "Eq. 20 with K = 2, best first, is Eq. 7", mistakes=EQ7_MISTAKES)


def test_eq20_minimum_is_the_optimum_of_eq4():
    """Each ranking of the first 4 responses to prompt 0 counts with its probability, Eq. 18."""
    rankings = all_rankings(4)
    p = by_eq18(REWARDS[0, rankings])
    ref = REF[0, :4].log_softmax(-1)
    optimum = OPTIMUM[0, :4].log_softmax(-1)

    def population_loss(policy):
        losses = dpo.plackett_luce_loss(policy[rankings], ref[rankings], BETA)
        return (p * losses).sum()

    found = descend(population_loss, start=POLICIES[0, 0, :4])
    why = "Eq. 20: with infinitely many rankings its minimum is pi* of Eq. 4"
    expect(found, optimum, why, tolerance=1e-8)


# Footnote 3, in section 6.1


def test_footnote3_sequence_kl_is_the_sum_of_token_kls():
    def mean_token_kl(joint, ref_joint):
        """The KL of the next token (the last dimension), averaged over the prefixes before it."""
        prefix = joint.sum(-1)
        token = joint / prefix[..., None]
        ref_token = ref_joint / ref_joint.sum(-1, keepdim=True)
        token_kl = dpo.kl_divergence(token.log(), ref_token.log())
        return (prefix * token_kl).sum()

    policy = POLICIES[0, 0].exp().view(3, 3, 3)  # by first, second and third token
    ref = REF[0].exp().view(3, 3, 3)
    first = mean_token_kl(policy.sum((1, 2)), ref.sum((1, 2)))
    second = mean_token_kl(policy.sum(2), ref.sum(2))
    third = mean_token_kl(policy, ref)
    got = dpo.kl_divergence(POLICIES[0, 0], REF[0])
    why = "footnote 3: KL(pi || pi_ref) of sequences is the sum over their tokens"
    expect(got, first + second + third, why)
