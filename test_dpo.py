"""The paper as tests, in its order: each is named after what it checks, against a value from
elsewhere: worked out by hand, listed exactly, or from finite differences. When one fails, its
message says which equation is off, and what the usual mistake is.

    python -m pytest test_dpo.py                        checks dpo.py
    DPO_MODULE=my_dpo python -m pytest test_dpo.py      grades my_dpo.py in its place
"""

import importlib
import itertools
import math
import os

import pytest
import torch

import data
from model import GPT, GPTConfig

dpo = importlib.import_module(os.environ.get("DPO_MODULE", "dpo").removesuffix(".py"))
if not any(getattr(value, "__module__", "") == dpo.__name__ for value in vars(dpo).values()):
    raise ImportError(f"{dpo.__name__}.py defines nothing of its own to grade")
f64 = torch.float64

# Two pairs whose numbers can be followed on paper, at beta = 1/2.
#   pair 0: r_w = 0.5 (-2 + 3) = 0.5,  r_l = 0.5 (-4 + 3) = -0.5,  margin  1.0  ranked right
#   pair 1: r_w = 0.5 (-6 + 3) = -1.5, r_l = 0.5 (-1 + 5) =  2.0,  margin -3.5  confidently wrong
BETA = 0.5
PAIRS = torch.tensor([[-2, -6], [-4, -1], [-3, -3], [-3, -5]], dtype=f64)  # policy w, l; reference
LOSSES = [0.31326168751822286, 3.5297504182726205]  # log(1 + e^-1), log(1 + e^3.5)
WEIGHTS = [0.2689414213699951, 0.9706877692486436]  # sigma(-1), sigma(3.5)


def softplus(*xs):
    return [math.log1p(math.exp(x)) for x in xs]


MISTAKES = {  # what Eq. 7 gives on these pairs when one thing is wrong
    "the sign of the margin is inverted, or chosen and rejected are exchanged": softplus(1, -3.5),
    "the minus before the log is missing": [-loss for loss in LOSSES],
    "the reference is left out": softplus(-1, 2.5),
    "the reference is added, or its chosen and rejected are exchanged": softplus(-1, 1.5),
    "the policy's chosen and rejected are exchanged": softplus(1, -1.5),
    "beta is missing": softplus(-2, 7),
    "beta is applied twice": softplus(-0.5, 1.75),
    "beta divides": softplus(-4, 14),
    "beta stands before the log": [BETA * x for x in softplus(-2, 7)],
    "beta stands before the log as well": [BETA * loss for loss in LOSSES],
    "beta multiplies the policy's log-probs alone": softplus(-1, 4.5),
    "the log is missing": [WEIGHTS[0] - 1, WEIGHTS[1] - 1],
}

# A space small enough to list: 2 prompts, and to each the 27 responses of 3 tokens out of 3.
random = torch.Generator().manual_seed(1)
REF = torch.randn(2, 27, generator=random, dtype=f64).log_softmax(-1)
REWARDS = torch.randn(2, 27, generator=random, dtype=f64)
POLICIES = (1.5 * torch.randn(50, 2, 27, generator=random, dtype=f64)).log_softmax(-1)
Z = (REF.exp() * (REWARDS / BETA).exp()).sum(-1)  # Eq. 4 written out, (2,)
BEST = (REF.exp() * (REWARDS / BETA).exp() / Z[:, None]).log()
REFS, ALL_REWARDS, BESTS = (x.expand_as(POLICIES) for x in (REF, REWARDS, BEST))
F_OF_X = torch.tensor([[7.0], [-4.0]], dtype=f64)  # any number for each prompt
I, J = torch.triu_indices(27, 27, offset=1)  # every pair of responses
LABELS = REWARDS[:, I].exp() / (REWARDS[:, I].exp() + REWARDS[:, J].exp())  # Eq. 1, (2, 351)
ENTROPY = -(LABELS * LABELS.log() + (1 - LABELS) * (1 - LABELS).log()).mean()
RANKINGS = torch.tensor(list(itertools.permutations(range(4))))


def expect(got, expected, why, tolerance=1e-12, mistakes=None):
    """Compare, and on failure say which equation it was and what the usual mistake is."""
    __tracebackhide__ = True  # pytest then points at the test
    got, expected = (torch.as_tensor(x, dtype=f64).detach() for x in (got, expected))
    if got.shape != expected.shape:
        shapes = f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        raise AssertionError(f"{why}\n  {shapes}; a mean or sum over pairs, or a kept dimension?")
    if not (got - expected).abs().max() <= tolerance:  # NaN is no success
        worst = (got - expected).abs().nan_to_num(torch.inf).argmax()  # of many show one
        shown = [x if x.numel() < 9 else x.flatten()[worst] for x in (expected, got)]
        message = "{}\n  expected {}\n  got      {}".format(why, *(x.tolist() for x in shown))
        for mistake, wrong in (mistakes or {}).items():
            if torch.allclose(got, torch.as_tensor(wrong, dtype=f64), atol=1e-5):
                message += f"\n  This is what comes out if {mistake}."
        raise AssertionError(message)


def by_eq18(rewards):
    """P(each ranking) of M responses by Eq. 18, factor by factor: (M! rankings, M) -> (M!,)."""
    e = rewards.exp()
    return torch.stack([e[:, k] / e[:, k:].sum(-1) for k in range(e.shape[1])]).prod(0)


def on_all_pairs(loss):
    """The mean of a pair loss over all pairs, each label with its exact probability."""
    return (LABELS * loss(I, J) + (1 - LABELS) * loss(J, I)).mean()


def descend(loss_of, start):
    """The policy that minimises a loss, from a start: Adam on its logits, Newton to the end."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(logits.log_softmax(-1)).backward()
        optimizer.step()
    loss, x = lambda x: loss_of(x.view_as(start).log_softmax(-1)), logits.detach().flatten()
    for _ in range(4):
        hessian = torch.autograd.functional.hessian(loss, x)
        slope = torch.autograd.functional.jacobian(loss, x)
        x = x - torch.linalg.pinv(hessian, rtol=1e-10) @ slope  # pinv: log_softmax ignores a shift
    return x.view_as(start).log_softmax(-1)


# Section 3: Bradley-Terry, the reward model, the objective
def test_eq1_bradley_terry():
    one, two = torch.broadcast_tensors(REWARDS[:, :, None], REWARDS[:, None, :])
    got, wanted = dpo.bradley_terry(one, two), one.exp() / (one.exp() + two.exp())
    wrong = {"the two rewards are exchanged": wanted.mT}
    expect(got, wanted, "Eq. 1: P(y_1 beats y_2) = e^r1 / (e^r1 + e^r2)", mistakes=wrong)
    expect(got + got.mT, torch.ones(2, 27, 27), "Eq. 1: one of the two must win")
    far = dpo.bradley_terry(torch.tensor([-2000.0, 2000.0]), torch.tensor([2000.0, -2000.0]))
    expect(far, [0.0, 1.0], "Eq. 1 for rewards far apart: use a sigmoid, e^2000 overflows")


def test_eq2_reward_model_loss_and_its_minimum():
    losses = dpo.reward_model_loss(*torch.tensor([[0.5, -1.5], [-0.5, 2.0]], dtype=f64))
    expect(losses, LOSSES, "Eq. 2: -log sigma(r_w - r_l) of each pair", mistakes=MISTAKES)
    far = dpo.reward_model_loss(torch.tensor([-1200.0]), torch.tensor([0.0]))
    expect(far, [1200.0], "Eq. 2 for rewards far apart: use logsigmoid, log(sigmoid) is -inf", 1e-3)
    r = (REWARDS + F_OF_X).requires_grad_()

    def loss(w, l):
        return dpo.reward_model_loss(r[:, w].flatten(), r[:, l].flatten()).view(2, -1)

    mean = on_all_pairs(loss)
    mean.backward()
    expect(mean, ENTROPY, "Eq. 2: its minimum is the entropy of the labels")
    expect(r.grad, torch.zeros(2, 27), "Eq. 2: at r* + f(x) its gradient is 0, for all x and y")


def test_eq3_objective_of_a_coin():
    policy, ref = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=f64).log()
    kl, reverse = 0.9 * math.log(1.5) - 0.1 * math.log(4), 0.4 * math.log(4) - 0.6 * math.log(1.5)
    mistakes = {
        "the KL is added": 1.7 + 0.3 * kl,
        "beta is missing": 1.7 - kl,
        "the KL is KL(pi_ref || pi), the other way round": 1.7 - 0.3 * reverse,
        "the expected reward is taken under pi_ref": 0.8 - 0.3 * kl,
        "the expected reward is a plain mean over the responses": 0.5 - 0.3 * kl,
    }
    why = "Eq. 3: J = E_pi[r] - beta KL(pi || pi_ref), both expectations under pi"
    got = dpo.rlhf_objective(policy, ref, torch.tensor([2.0, -1.0]), beta=0.3)
    expect(got, 0.9 * 2 - 0.1 - 0.3 * kl, why, mistakes=mistakes)
    sure = torch.tensor([0.0, -math.inf], dtype=f64)
    expect(dpo.kl_divergence(sure, ref), -math.log(0.6), "the KL of Eq. 3: 0 log 0 is 0, not NaN")


def test_section3_objective_is_the_expected_ppo_reward():
    pi = POLICIES.exp()
    J = (pi * REWARDS).sum(-1) - BETA * (pi * (POLICIES - REFS)).sum(-1)
    got = dpo.rlhf_objective(POLICIES, REFS, ALL_REWARDS, BETA)
    expect(got, J, "Eq. 3: E_pi[r] - beta KL(pi || pi_ref), a sum over all responses")
    mean = (pi * (REWARDS - dpo.implicit_reward(POLICIES, REFS, BETA))).sum(-1)
    expect(mean, J, "section 3: the mean of r - r-hat, with r-hat of Eq. 5, is J of Eq. 3")


# Section 4: the optimum, the reward behind it, the loss
def test_eq4_optimal_policy():
    best, log_Z = dpo.optimal_policy(REF, REWARDS, BETA)
    upside_down = (REF + REWARDS * BETA).logsumexp(-1)
    wrong = {"beta multiplies the reward": upside_down, "it is Z(x), not its log": Z}
    expect(log_Z, Z.log(), "log of Z(x) below Eq. 4, sum of pi_ref exp(r / beta)", mistakes=wrong)
    expect(best.exp().sum(-1), [1.0, 1.0], "Eq. 4: divided by Z(x), the policy sums to 1")
    expect(best, BEST, "Eq. 4: log pi_ref + r / beta - log Z(x)")
    best, log_Z = dpo.optimal_policy(torch.tensor([0.5, 0.5]).log(), torch.tensor([1e4, 0.0]), 1.0)
    why = "Eq. 4 for a reward of 10,000: sum with logsumexp, exp overflows"
    expect(torch.cat([best.exp(), log_Z[None]]), [1.0, 0.0, 1e4 - math.log(2)], why, 1e-3)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_eq4_is_the_maximiser_of_eq3(beta):
    best, log_Z = dpo.optimal_policy(REF, REWARDS, beta)
    top = dpo.rlhf_objective(best, REF, REWARDS, beta)
    others = dpo.rlhf_objective(POLICIES, REFS, ALL_REWARDS, beta)
    expect(top, beta * log_Z, "Eq. 4: at the optimum J = beta log Z(x)")
    assert (others < top).all(), "Eq. 4: a random policy has a larger J, so this is no maximum"
    gap = (POLICIES.exp() * (POLICIES - best)).sum(-1)
    expect(top - others, beta * gap, "Eq. 4: J(pi*) - J(pi) = beta KL(pi || pi*)")


def test_eq4_is_where_gradient_ascent_on_eq3_arrives():
    for start in POLICIES[:3]:
        found = descend(lambda pi: -dpo.rlhf_objective(pi, REF, REWARDS, BETA).sum(), start)
        expect(found.exp(), BEST.exp(), "Eq. 3: ascent on it must end at pi* of Eq. 4", 1e-4)


def test_eq5_reward_from_its_policy():
    implied = dpo.implicit_reward(BEST, REF, BETA) + BETA * Z.log()[:, None]
    ratio, up = BEST - REF, BETA * Z.log()[:, None]
    wrong = {
        "the reference is left out": BETA * BEST + up,
        "beta is missing": ratio + up,
        "beta divides": ratio / BETA + up,
        "the ratio is inverted": up - BETA * ratio,
    }
    why = "Eq. 5: r = beta (log pi_r - log pi_ref) + beta log Z(x)"
    expect(implied, REWARDS, why, mistakes=wrong)
    mean = (REFS.exp() * dpo.implicit_reward(POLICIES, REFS, BETA)).sum(-1)
    kl = (REFS.exp() * (REFS - POLICIES)).sum(-1)
    expect(mean, -BETA * kl, "Eq. 5: E_ref[r-hat] = -beta KL(pi_ref || pi)")


def test_eq6_the_normaliser_cancels():
    for r in (REWARDS, REWARDS + F_OF_X):  # the same preferences, another Z(x)
        h = dpo.implicit_reward(dpo.optimal_policy(REF, r, 0.7)[0], REF, 0.7)
        got = dpo.bradley_terry(h[:, I], h[:, J])
        expect(got, LABELS, "Eq. 6: the preferences of pi* are those of r, whatever Z(x) is")


def test_eq7_by_hand():
    result = dpo.dpo_loss(*PAIRS, beta=BETA)
    why = "Eq. 7: -log sigma(beta (log-ratio of chosen - log-ratio of rejected))"
    expect(result.losses, LOSSES, why, mistakes=MISTAKES)
    wrong = {"it is sigma(r_w - r_l), as A.4 misprints it": [1 - weight for weight in WEIGHTS]}
    why = "section 4: the weight is sigma(r_l - r_w), large where the ranking is wrong"
    expect(result.weights, WEIGHTS, why, mistakes=wrong)
    expect(result.chosen_rewards, [0.5, -1.5], "Eq. 5: r_w = beta (policy - reference)")
    expect(result.rejected_rewards, [-0.5, 2.0], "Eq. 5: r_l = beta (policy - reference)")
    result = dpo.dpo_loss(*PAIRS.clone().requires_grad_(), beta=BETA)
    carrying = [name for name, value in result._asdict().items() if value.requires_grad]
    assert carrying == ["losses"], f"Eq. 7: only losses carry a gradient, not {carrying}: detach"


def test_eq7_is_log_2_where_policy_is_reference():
    why = "Eq. 7: policy == reference costs log 2; do both see chosen and rejected in one order?"
    expect(dpo.dpo_loss(*PAIRS[:2], *PAIRS[:2], beta=0.3).losses, [math.log(2)] * 2, why)


def test_eq7_is_eq2_at_the_implicit_reward():
    h, pi, ref = BETA * (POLICIES[0, 0] - REF[0]), POLICIES[0, 0], REF[0]
    eq2 = (1 + (h[J] - h[I]).exp()).log()
    expect(dpo.reward_model_loss(h[I], h[J]), eq2, "Eq. 2: -log sigma(r_w - r_l)")
    losses = dpo.dpo_loss(pi[I], pi[J], ref[I], ref[J], BETA).losses
    expect(losses, eq2, "Eq. 7: it is Eq. 2 at the rewards of Eq. 5")


@pytest.mark.parametrize("start", POLICIES[:3])
def test_eq7_population_minimum_is_the_optimum_of_eq4(start):
    def loss_of(pi):
        def loss(w, l):
            sums = (logps[:, side].flatten() for logps in (pi, REF) for side in (w, l))
            return dpo.dpo_loss(*sums, BETA).losses.view(2, -1)

        return on_all_pairs(loss)

    why = "Eq. 7: descent on infinitely many pairs ends at pi* of Eq. 4, if loss and slope fit"
    expect(descend(loss_of, start), BEST, why, 1e-8)
    expect(loss_of(BEST), ENTROPY, "Eq. 7: its minimum is the entropy of the labels")


def test_eq7_survives_extreme_margins():
    logps = [torch.tensor([x], requires_grad=True) for x in (-8000.0, -4000.0)]
    losses = dpo.dpo_loss(*logps, torch.zeros(1), torch.zeros(1), beta=0.3).losses
    why = "Eq. 7 at a margin of -1200: use logsigmoid; log(sigmoid(x)) is -inf there"
    expect(losses, [1200.0], why, 1e-3)
    grads = torch.autograd.grad(losses.sum(), logps, allow_unused=True)
    assert None not in grads, "Eq. 7: a policy log-prob gets no gradient: is there a detach?"
    expect(torch.cat(grads), [-0.3, 0.3], why, 1e-6)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_eq7_refuses_beta(beta):
    with pytest.raises(ValueError):  # say so: at 0 the loss is log 2 for ever
        dpo.dpo_loss(*PAIRS, beta=beta)


def test_appendix_b_code_is_eq7():
    """Appendix B takes one table of log-probs and the places of winners and losers in it."""
    pi, ref = POLICIES[0, 0], REF[0]
    yw, yl = torch.tensor([3, 20, 11, 3]), torch.tensor([7, 1, 26, 20])
    losses = -torch.sigmoid(0.1 * ((pi[yw] - pi[yl]) - (ref[yw] - ref[yl]))).log()
    result = dpo.dpo_loss(pi[yw], pi[yl], ref[yw], ref[yl])
    expect(result.losses, losses, "appendix B: Eq. 7 in the paper's own code, default beta 0.1")
    expect(result.chosen_rewards, (0.1 * (pi - ref))[yw], "appendix B: rewards, beta (pi - ref)")


# The gradient of section 4, and the misprint. Never at policy == reference.
def slopes(at, side):  # d loss / d at[side] of each pair, by central differences
    step = 1e-5 * torch.eye(4, dtype=f64)[side, :, None]
    up, down = (dpo.dpo_loss(*(at + sign * step), beta=BETA).losses for sign in (1, -1))
    return (up - down) / 2e-5


def test_gradient_by_hand():
    expect(dpo.reward_margins(*PAIRS, beta=BETA), [1.0, -3.5], "reward_margins: r_w - r_l")
    chosen, rejected = dpo.dpo_gradient(*PAIRS, beta=BETA)
    up, down = ([sign * BETA * weight for weight in WEIGHTS] for sign in (-1, 1))
    mistakes = {
        "the weight is sigma(r_w - r_l), A.4's misprint": [-BETA * (1 - w) for w in WEIGHTS],
        "the sign is inverted: descent must raise the chosen response": down,
        "beta is missing": [-weight for weight in WEIGHTS],
        "it is divided by the number of pairs": [-BETA * weight / 2 for weight in WEIGHTS],
        "the weight is sigma', not sigma": [-BETA * w * (1 - w) for w in WEIGHTS],
        "the margin in the weight is without beta": [-BETA / (1 + math.exp(m)) for m in (2, -7)],
    }
    why = "section 4: d loss / d log pi(y_w) = -beta sigma(r_l - r_w)"
    expect(chosen, up, why, mistakes=mistakes)
    why = "section 4: d loss / d log pi(y_l) = +beta sigma(r_l - r_w)"
    expect(rejected, down, why, mistakes={"chosen and rejected are pulled the same way": up})


@pytest.mark.parametrize("side, name", [(0, "chosen"), (1, "rejected")])
def test_gradient_by_autograd_and_finite_differences(side, name):
    logps = [part.clone().requires_grad_() for part in PAIRS]
    dpo.dpo_loss(*logps, beta=BETA).losses.sum().backward()
    grad, slope = logps[side].grad, slopes(PAIRS, side)
    assert grad is not None, f"Eq. 7: no gradient reaches the policy's {name} log-prob: a detach?"
    why = f"section 4, {name}: autograd through dpo_loss is not its slope; a detach too many?"
    expect(grad, slope, why, 1e-8)
    why = f"section 4, {name}: dpo_gradient is not the slope of dpo_loss; see their tests by hand"
    expect(dpo.dpo_gradient(*PAIRS, beta=BETA)[side], slope, why, 1e-8)


def test_eq21_eq22_and_a4_are_misprinted():
    """The appendix exchanges r_w and r_l. Measured on the two pairs, which version is the slope?"""
    slope = slopes(PAIRS, 0)  # -0.134 and -0.485
    as_printed = -BETA * torch.tensor([1.0, -3.5], dtype=f64).sigmoid()  # -0.366 and -0.015
    why = "section 4's weight, sigma(r_l - r_w), is the slope of dpo_loss; A.4's is not"
    expect(dpo.dpo_gradient(*PAIRS, beta=BETA)[0], slope, why, 1e-8)
    assert ((slope - as_printed).abs() > 0.2).all(), "A.4's printed weight cannot be the slope"
    swapped = PAIRS[[1, 0, 3, 2]]  # Eq. 21 as printed: log sigma(r_l - r_w)
    expect(slopes(swapped, 1), -as_printed, "Eq. 21 as printed: A.4 with the other sign", 1e-8)


def test_eq22_weight_is_the_log_slope_of_sigma():
    """sigma'(u) / sigma(u) = sigma(-u) on a grid of u = r_w - r_l, sigma' by differences."""
    u, zero = torch.linspace(-20, 20, 41, dtype=f64), torch.zeros(41, dtype=f64)
    slope = ((u + 1e-5).sigmoid() - (u - 1e-5).sigmoid()) / 2e-5
    weights = dpo.dpo_loss(u, zero, zero, zero, 1.0).weights
    why = "section 4: the weight is near 1 where wrong, 1/2 at a tie, near 0 where right"
    wrong = {"the sign inside is inverted": [0.0, 0.5, 1.0]}
    expect(weights[[0, 20, 40]], [1.0, 0.5, 0.0], why, 1e-8, wrong)
    expect(weights, slope / u.sigmoid(), "Eq. 22: the weight is sigma'(u) / sigma(u)", 1e-7)


def gpt(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=5, n_positions=12, n_embd=16, n_layer=2, n_head=2)).double()
    for parameter in model.parameters():  # far from the small initialisation, biases included
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_gradient_through_a_gpt():  # all its parameters
    policy, reference = gpt(0), gpt(1)
    rows = [data.TokenPair([3, 1], [2, 4, 0], [1, 0]), data.TokenPair([2], [0], [4, 3, 3, 0])]
    ids, mask = data.collate(rows, [0, 1])

    def logps_of(model):
        return dpo.response_logps(model, ids, mask).chunk(2)  # chosen, rejected

    with torch.no_grad():
        ref = logps_of(reference)
    logps = logps_of(policy)
    by_hand = dpo.dpo_gradient(*(x.detach() for x in logps), *ref, BETA)
    wanted = torch.autograd.grad(logps, list(policy.parameters()), by_hand)
    dpo.dpo_loss(*logps_of(policy), *ref, BETA).losses.sum().backward()
    why = "section 4: autograd of dpo_loss (got), dpo_gradient times grad log pi (expected), in "
    for (name, parameter), gradient in zip(policy.named_parameters(), wanted):
        expect(parameter.grad, gradient, why + name, 1e-10)


# Section 5 and appendix A: classes of rewards, and the derivations
def test_definition1_one_class_is_one_likelihood():
    same, other = REWARDS + F_OF_X, REWARDS + torch.arange(27)  # f(x), and something of y
    true, same, other = (dpo.reward_model_loss(r[0, I], r[0, J]) for r in (REWARDS, same, other))
    expect(same, true, "Definition 1: Eq. 2 must not tell r and r + f(x) apart")
    assert (other - true).abs().max() > 0.1, "Definition 1: f may depend on x only"


@pytest.mark.parametrize("M", [3, 4])
def test_lemma1_one_class_has_one_ranking_distribution(M):
    rankings = torch.tensor(list(itertools.permutations(range(M))))
    got = dpo.plackett_luce_logps((REWARDS + F_OF_X)[0, rankings]).exp()
    why = "Lemma 1: f(x) cancels in every factor of Plackett-Luce, Eq. 18"
    expect(got, by_eq18(REWARDS[0, rankings]), why)


def test_lemma2_one_class_has_one_optimal_policy():
    shifted, _ = dpo.optimal_policy(REF, REWARDS + F_OF_X, BETA)
    expect(shifted, BEST, "Lemma 2: r + f(x) has the optimal policy of r; Z(x) takes f(x) up")


def projected(rewards):
    """f(r; pi_ref, beta) of Eq. 8 by way of the policy: beta log pi_r / pi_ref."""
    return dpo.implicit_reward(dpo.optimal_policy(REF, rewards, BETA)[0], REF, BETA)


def test_theorem1_and_eq8_each_class_has_a_member_that_is_a_policy():
    f_r = projected(REWARDS)
    why = "Theorem 1: beta log pi_r / pi_ref is f(r) of Eq. 8: r minus a function of x alone"
    expect(f_r, REWARDS - BETA * Z.log()[:, None], why)
    expect(projected(f_r), f_r, "Eq. 8: projecting twice is projecting once")
    why = "Eq. 8 and the chain of A.6: all of a class have one projection"
    expect(projected(REWARDS + F_OF_X), f_r, why)


def test_eq9_a_policy_in_disguise_has_normaliser_1():
    why = "Eq. 9: sum of pi_ref exp(r / beta) is 1 for r = beta log pi / pi_ref"
    for r in (projected(REWARDS), dpo.implicit_reward(POLICIES[0], REF, BETA)):
        expect(dpo.optimal_policy(REF, r, BETA)[1], [0.0, 0.0], why)
    assert dpo.optimal_policy(REF, REWARDS, BETA)[1].abs().min() > 0.1, "Eq. 9: not for any reward"


def test_proposition1_the_member_is_unique():
    h = dpo.implicit_reward(POLICIES[0], REF, BETA)
    why = "Proposition 1: + f(x) moves log Z(x) by f(x) / beta, and Eq. 9 holds only for f = 0"
    expect(dpo.optimal_policy(REF, h + F_OF_X, BETA)[1], F_OF_X[:, 0] / BETA, why)


def test_proposition1_breaks_for_an_answer_in_no_pair():
    pi, ref = POLICIES[0, 0].exp(), REF[0]
    moved = torch.cat([pi[:26] * (1 - pi[26] / 2) / (1 - pi[26]), pi[26:] / 2]).log()  # half of 26
    w, l = I[J < 26], J[J < 26]
    losses = [dpo.dpo_loss(x[w], x[l], ref[w], ref[l], BETA).losses for x in (pi.log(), moved)]
    expect(losses[1], losses[0], "Eq. 7 says nothing about a response that no pair mentions")
    never = REF.masked_fill(torch.arange(27) == 26, -torch.inf)  # pi_ref = 0: for ever
    best = dpo.optimal_policy(never, REWARDS + 99 * (torch.arange(27) == 26), BETA)[0]
    assert (best[:, 26] == -torch.inf).all(), "Eq. 4: where pi_ref is 0 so is every optimal policy"


def test_eq10_normaliser_and_variance():
    f_r = projected(REWARDS)
    J = dpo.rlhf_objective(POLICIES, REFS, ALL_REWARDS, BETA)
    with_f = dpo.rlhf_objective(POLICIES, REFS, f_r.expand_as(REFS), BETA)
    expect(with_f, J - BETA * Z.log(), "Eq. 10: with the normaliser it is J - beta log Z")
    kl = (POLICIES.exp() * (POLICIES - BEST)).sum(-1)
    expect(with_f, -BETA * kl, "Eq. 10: it is -beta KL(pi || pi_r), at most 0")

    def variance(pi, reward):
        # of (reward - beta log pi / pi_ref) grad log pi(y), y from pi, in the table's logits
        score = torch.eye(27) - pi.exp()[..., None, :]  # (..., Y, 27): d log pi(y) / d logits
        estimate = (reward - BETA * (pi - REF))[..., None] * score
        mean = (pi.exp()[..., None] * estimate).sum(-2)
        return (pi.exp() * (estimate**2).sum(-1)).sum(-1) - (mean**2).sum(-1)

    expect(variance(BEST, f_r), [0.0, 0.0], "Eq. 10: at pi_r, with the normaliser, no variance")
    assert (variance(BEST, REWARDS) > 0.1).all(), "Eq. 10: without it there is variance at pi_r"
    near = (BEST + 0.1 * POLICIES).log_softmax(-1)
    why = "Eq. 10 is no general inequality: less variance near pi_r, more at these random policies"
    assert (variance(near, f_r) < variance(near, REWARDS)).all(), why
    assert (variance(POLICIES, f_r) > variance(POLICIES, REWARDS)).all(), why


def test_eq11_to_eq15_are_one_objective():
    pi = POLICIES.exp()
    eq11 = dpo.rlhf_objective(POLICIES, REFS, ALL_REWARDS, BETA)
    eq12 = (pi * (POLICIES - (REF + REWARDS / BETA - Z.log()[:, None]))).sum(-1) - Z.log()
    eq13 = (pi * (POLICIES - dpo.optimal_policy(REF, REWARDS, BETA)[0])).sum(-1) - Z.log()
    eq14 = dpo.kl_divergence(POLICIES, BESTS) - Z.log()
    expect(eq11, -BETA * eq12, "Eq. 11 is -beta times Eq. 12: a maximum turned into a minimum")
    expect(eq13, eq12, "Eq. 13: 1/Z pi_ref exp(r / beta) is pi* of Eq. 4")
    expect(eq14, eq13, "Eq. 14: KL(pi || pi*) - log Z(x), with minus (v1 had plus)")
    assert (dpo.kl_divergence(POLICIES, BESTS) > 0).all(), "Eq. 15: over 0 where they differ"
    at_best = dpo.kl_divergence(dpo.optimal_policy(REF, REWARDS, BETA)[0], BEST)
    expect(at_best, [0.0, 0.0], "Eq. 15: and 0 at pi = pi* of Eq. 4")


def test_eq16_eq17_lead_to_eq6():  # A.2: beta log Z(x) leaves, 1 / (1 + exp(...)) stays
    eq17 = dpo.implicit_reward(BEST, REF, BETA) + BETA * Z.log()[:, None]
    eq16 = dpo.bradley_terry(eq17[:, I], eq17[:, J])
    eq6 = 1 / (1 + (BETA * (BEST - REF)[:, J] - BETA * (BEST - REF)[:, I]).exp())
    expect(eq16, eq6, "A.2: Eq. 16 (Eq. 1) at the reward of Eq. 17 (Eq. 5) is Eq. 6")


# Appendix A.3: rankings. Section 6: drift
def test_eq18_plackett_luce():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=f64)
    p = dpo.plackett_luce_logps(rewards[RANKINGS]).exp()
    a, b, c, d = rewards.exp().tolist()
    by_hand = a / (a + b + c + d) * b / (b + c + d) * c / (c + d)
    upwards = d / (a + b + c + d) * c / (a + b + c) * b / (a + b)
    wrong = {"it is read worst first, or the sum runs over j <= k": upwards}
    wrong["every factor divides by the sum over all"] = a * b * c * d / (a + b + c + d) ** 4
    why = "Eq. 18: best first, and the k-th factor's sum runs over j >= k"
    expect(p[0], by_hand, why, mistakes=wrong)
    expect(p.sum(), 1.0, "Eq. 18: the 24 rankings of 4 responses are all there is")
    far = dpo.plackett_luce_logps(torch.tensor([-2000.0, 0.0, 2000.0]))
    expect(far, -6000.0, "Eq. 18 for rewards far apart: stay in logs, e^2000 overflows", 1e-2)


def test_eq19_rankings_from_the_optimal_policy():
    loss = dpo.plackett_luce_loss(BEST[0, RANKINGS], REF[0, RANKINGS], BETA)
    why = "Eq. 19: Eq. 18 at beta log pi* / pi_ref is Eq. 18 at r*, for Z(x) cancels"
    p = by_eq18(REWARDS[0, RANKINGS])
    expect((-loss).exp(), p, why, mistakes={"Eq. 20's minus before the log is missing": 1 / p})


def test_eq20_of_two_answers_is_eq7():
    losses = dpo.plackett_luce_loss(PAIRS[:2].T, PAIRS[2:].T, BETA)
    expect(losses, LOSSES, "Eq. 20 with K = 2, best first, is Eq. 7", mistakes=MISTAKES)


def test_eq20_minimum_is_the_optimum_of_eq4():  # over all rankings of 4 responses
    p = by_eq18(REWARDS[0, RANKINGS])
    ref, best = REF[0, :4].log_softmax(-1), BEST[0, :4].log_softmax(-1)

    def loss_of(pi):
        return (p * dpo.plackett_luce_loss(pi[RANKINGS], ref[RANKINGS], BETA)).sum()

    why = "Eq. 20: with infinitely many rankings its minimum is pi* of Eq. 4"
    expect(descend(loss_of, POLICIES[0, 0, :4]), best, why, 1e-8)


def test_footnote3_sequence_kl_is_the_sum_of_token_kls():
    pi, ref, total = POLICIES[0, 0].exp().view(3, 3, 3), REF[0].exp().view(3, 3, 3), 0.0
    for k in range(3):  # all prefixes of k tokens: pi(prefix) KL(next token)
        p, q = (joint.flatten(k + 1).sum(-1) if k < 2 else joint for joint in (pi, ref))
        tokens = ((joint / joint.sum(-1, keepdim=True)).log() for joint in (p, q))
        total += (p.sum(-1) * dpo.kl_divergence(*tokens)).sum()
    got = dpo.kl_divergence(POLICIES[0, 0], REF[0])
    expect(got, total, "footnote 3: KL(pi || pi_ref) of sequences is the sum over their prefixes")
