"""The family in dpo.LOSSES and experiments/losses.py: values by hand, pulls, optima, extremes.

DPO_MODULE=my_dpo python -m pytest tests/test_losses.py -k convex   grades your own f in LOSSES
"""

import math
from typing import NamedTuple

import pytest
import torch

from experiments import losses as more
from tests.helpers import Fixed, descend, expect, load_dpo

dpo = load_dpo()
f64 = torch.float64

# The two pairs of test_dpo.py: margins 1 and -3.5 at beta 1/2. Policy w, l; reference w, l.
BETA = 0.5
PAIRS = torch.tensor([[-2, -6], [-4, -1], [-3, -3], [-3, -5]], dtype=f64)
LENGTHS = torch.tensor([[2, 3], [4, 1]], dtype=f64)  # tokens of the chosen and rejected responses
LOSSES = [0.31326168751822286, 3.5297504182726205]  # log(1 + e^-1), log(1 + e^3.5)
WEIGHTS = [0.2689414213699951, 0.9706877692486436]  # sigma(-1), sigma(3.5)

# 2 prompts, and to each 27 responses
generator = torch.Generator().manual_seed(1)
REF = torch.randn(2, 27, generator=generator, dtype=f64).log_softmax(-1)
REWARDS = torch.randn(2, 27, generator=generator, dtype=f64)

# All pairs of responses to prompt 0, drawn from the reference: P_WIN that Y1 wins (Eq. 1), DRAWN
# that the pair is drawn and Y1 wins (equal pairs are kept, so half for each order), and S(y), how
# often y beats a draw from the reference.
Y1, Y2 = torch.cartesian_prod(torch.arange(27), torch.arange(27)).T
P_WIN = 1 / (1 + (REWARDS[0, Y2] - REWARDS[0, Y1]).exp())
DRAWN = REF[0, Y1].exp() * REF[0, Y2].exp() * P_WIN
S = (P_WIN * REF[0, Y2].exp()).view(27, 27).sum(-1)


def named(name):
    """The loss of this name. Of a file that begins with `from dpo import *`, LOSSES is ours."""
    loss = getattr(dpo, f"{name}_loss", None)
    if loss is None:
        loss = dpo.LOSSES[name]
    return loss


def losses_of(result):
    """What a loss function returns is its losses, or a tuple that names them."""
    return getattr(result, "losses", result)


def derivatives(loss, logps, **settings):
    """d loss / d each of the four log-probs, each pair by itself: (4, B)."""
    logps = logps.clone().requires_grad_()
    losses = losses_of(loss(*logps, **settings))
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    return grad


def with_log_ratio(rho):
    """Four log-probs of each pair, (4, B), whose log-ratios differ by rho (B,): m = beta rho."""
    zero = torch.zeros_like(rho)
    return torch.stack([rho, zero, zero, zero])


# dpo.LOSSES


# Settings, f(m) and -f'(m) at margins 1 and -3.5. With softplus(-1) = 0.3133, softplus(3.5) = 3.53:
#   cdpo    softplus(-m) + epsilon m                    0.3133 + 0.2,  3.5298 - 0.7
#   robust  softplus(-m) - m epsilon / (1 - 2 epsilon)  0.3133 - 1/3,  3.5298 + 3.5/3
#   ipo     ((m - 1/2) / beta)^2                        1, 64
BY_HAND = {
    "dpo": ({}, LOSSES, WEIGHTS),
    "cdpo": (
        {"epsilon": 0.2},
        [LOSSES[0] + 0.2, LOSSES[1] - 0.7],
        [WEIGHTS[0] - 0.2, WEIGHTS[1] - 0.2],
    ),
    "robust": (
        {"epsilon": 0.2},
        [LOSSES[0] - 1 / 3, LOSSES[1] + 3.5 / 3],
        [WEIGHTS[0] + 1 / 3, WEIGHTS[1] + 1 / 3],
    ),
    "ipo": ({}, [1.0, 64.0], [-4.0, 32.0]),
    "hinge": ({"beta": 0.6}, [0.0, 5.2], [0.0, 1.0]),  # at m = 1 it has a kink, and two slopes
}


@pytest.mark.parametrize("name", BY_HAND)
def test_family_by_hand(name):
    settings, losses, pull = BY_HAND[name]
    settings = {"beta": BETA} | settings
    result = named(name)(*PAIRS, **settings)
    why = f"{name}: f(m) of README's table at m = 2 beta and -7 beta"
    expect(losses_of(result), losses, why)
    chosen, rejected, _, _ = derivatives(named(name), PAIRS, **settings)
    pull = settings["beta"] * torch.tensor(pull, dtype=f64)
    why = f"{name}: descent pulls on grad log pi(y_w) - grad log pi(y_l) with beta (-f'(m))"
    expect(chosen, -pull, why)
    expect(rejected, pull, why)


def test_the_names_are_these():
    missing = set(BY_HAND) - set(dpo.LOSSES)
    assert not missing, f"dpo.LOSSES, from which --loss takes its names, has no {missing}"


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_family_is_convex_and_pulls_the_right_way(name):
    """Whatever f a class adds: convex, f'(0) < 0, of the margin alone; `weights`, if any, -f'."""
    loss = named(name)
    m = torch.linspace(-8, 8, 65, dtype=f64)
    m[m != 0] += 0.01  # beside the kinks
    logps = with_log_ratio(m / BETA)
    result = loss(*logps, beta=BETA)
    values = losses_of(result)
    assert values.shape == m.shape, f"{name}: one loss for each pair, (B,), no mean over pairs"

    same_margin = logps + torch.tensor([[3], [1], [2], [0]])  # (3 - 2) - (1 - 0) = 0
    shifted = losses_of(loss(*same_margin, beta=BETA))
    expect(shifted, values, f"{name}: a function of the margin alone?")

    slopes = values.diff() / m.diff()
    assert (slopes.diff() > -1e-9).all(), f"{name}: f is not convex, its slope falls somewhere"
    chosen, rejected, _, _ = derivatives(loss, logps, beta=BETA)
    assert chosen[m == 0] < 0, f"{name}: at a tie f'(0) must be negative, or nothing is learnt"
    expect(rejected, -chosen, f"{name}: chosen and rejected are pulled equally hard, apart")

    result = loss(*logps.requires_grad_(), beta=BETA)
    if hasattr(result, "weights"):
        expect(result.weights, -chosen / BETA, f"{name}: weights must be -f'(m)")
        assert not result.weights.requires_grad, f"{name}: weights carry no gradient: detach"


def test_cdpo_rests_where_the_labels_are_right_often_enough():
    """Zero gradient at sigma(m) = 1 - epsilon; for epsilon 0.2, beta 0.1 at rho = 13.863."""
    pair = with_log_ratio(torch.tensor([13.862943611198906], dtype=f64))
    slope = derivatives(dpo.cdpo_loss, pair, beta=0.1, epsilon=0.2)
    why = "cdpo: its minimum is at m = log((1 - epsilon) / epsilon)"
    expect(slope, torch.zeros(4, 1), why)
    lowest = dpo.cdpo_loss(*pair, beta=0.1, epsilon=0.2)
    expect(lowest, [0.5004024235381879], "cdpo: its minimum is the entropy of a 0.2 coin")


@pytest.mark.parametrize("loss", [dpo.cdpo_loss, dpo.robust_loss])
def test_no_noise_is_dpo_and_too_much_is_refused(loss):
    without_noise = loss(*PAIRS, beta=BETA, epsilon=0.0)
    expect(without_noise, LOSSES, f"{loss.__name__}: epsilon 0 is Eq. 7")
    for epsilon in (-0.1, 0.5, 0.7, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            loss(*PAIRS, beta=BETA, epsilon=epsilon)


def test_robust_is_unbiased_over_label_flips_and_unbounded_below():
    m = torch.linspace(-9, 9, 37, dtype=f64)
    right = dpo.robust_loss(*with_log_ratio(m), beta=1, epsilon=0.3)
    flipped = dpo.robust_loss(*with_log_ratio(-m), beta=1, epsilon=0.3)
    clean = torch.log1p((-m).exp())
    why = "robust: (1 - epsilon) f(m) + epsilon f(-m) is the loss of the clean labels"
    expect(0.7 * right + 0.3 * flipped, clean, why)

    far = with_log_ratio(torch.tensor([500.0], dtype=f64))
    got = dpo.robust_loss(*far, beta=0.1, epsilon=0.1)
    expect(got, [-6.25], "robust: at m = 50, epsilon 0.1 it is -50 * 0.1 / 0.8: no lower bound")


def test_ipo_has_a_finite_target_for_a_sure_label():
    """Two responses, p = 1: the margin stops at 1/2, so rho at 1 / (2 beta) = 5 for beta 0.1."""
    rho = torch.tensor([5.0, 0.0], dtype=f64)
    losses = dpo.ipo_loss(*with_log_ratio(rho), beta=0.1)
    why = "ipo: 0 at rho = 5, and (1 / (2 beta))^2 = 25 at the reference"
    expect(losses, [0.0, 25.0], why)
    beyond = derivatives(dpo.ipo_loss, with_log_ratio(rho + 0.001), beta=0.1)
    assert beyond[0, 0] > 0, "ipo: past its target it pulls back"


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_ipo_under_bradley_terry_labels_ends_at_g_over_tau(tau):
    """Eq. 9 and 17 of the IPO paper, pairs drawn from the reference: pi* is ref exp(g / tau) / Z
    with g(y) = P(y beats a draw from the reference). Not pi* of DPO."""
    ref = REF[0]

    def population_loss(policy):
        losses = dpo.ipo_loss(policy[Y1], policy[Y2], ref[Y1], ref[Y2], beta=tau)
        return (2 * DRAWN * losses).sum()

    optimum = (ref + S / tau).log_softmax(-1)
    found = descend(population_loss, start=ref)
    expect(found, optimum, "ipo: its optimum is ref exp(g / tau) / Z", 1e-8)


def test_cdpo_on_all_pairs_ends_beside_the_optimum_of_dpo():
    """Told of noise that is not there, cDPO stops short: its preferences are off by several points,
    where those of Eq. 4's optimum are exactly Eq. 1's (Eq. 6, in test_dpo.py)."""
    ref = REF[0]
    first, second = torch.triu_indices(27, 27, offset=1)
    p = 1 / (1 + (REWARDS[0, second] - REWARDS[0, first]).exp())

    def population_loss(policy):
        of_policy = (policy[first], policy[second])
        of_ref = (ref[first], ref[second])
        first_wins = dpo.cdpo_loss(*of_policy, *of_ref, beta=BETA, epsilon=0.1)
        second_wins = dpo.cdpo_loss(*of_policy[::-1], *of_ref[::-1], beta=BETA, epsilon=0.1)
        return (p * first_wins + (1 - p) * second_wins).mean()

    rewards = BETA * (descend(population_loss, start=ref) - ref)  # (5)
    preferences = torch.sigmoid(rewards[first] - rewards[second])
    off = (preferences - p).abs().max()
    assert off > 0.05, f"cdpo with epsilon 0.1 must not end at pi* of Eq. 4: off by {off:.3f} only"
    assert off < 0.15, f"cdpo with epsilon 0.1 ends near pi* of Eq. 4: off by {off:.3f}"


# experiments/losses.py


class ByHand(NamedTuple):
    """Log-probs and settings of a loss, its values, and d / d log-prob of chosen, of rejected."""

    logps: torch.Tensor
    settings: dict
    losses: list
    chosen: list
    rejected: list


def sigma(x):
    return 1 / (1 + math.exp(-x))


def sizes(lengths):
    chosen, rejected = lengths
    return {"chosen_lengths": chosen, "rejected_lengths": rejected}


ODDS = torch.tensor([[2 * math.log(0.5)], [4 * math.log(0.2)], [-9.0], [-9.0]], dtype=f64)
MORE_BY_HAND = {
    # Means per token -1 against -1, then -2 against -1. With beta 2 and gamma 1 the arguments of
    # sigma are -1 and -3; the derivative of a mean is 1 / length.
    "simpo": ByHand(
        PAIRS,
        settings={"beta": 2.0, "gamma": 1.0} | sizes(LENGTHS),
        losses=[math.log1p(math.e), math.log1p(math.e**3)],
        chosen=[-2 * sigma(1) / 2, -2 * sigma(3) / 3],
        rejected=[2 * sigma(1) / 4, 2 * sigma(3) / 1],
    ),
    # Mean probabilities 1/2 and 1/5, odds 1 and 1/4; d log odds / d log p = 1 / (1 - p).
    "orpo": ByHand(
        ODDS,
        settings={"alpha": 0.1} | sizes(LENGTHS[:, :1]),
        losses=[math.log(2) + 0.1 * math.log(1.25)],
        chosen=[-1 / 2 - 0.1 / 5 / 0.5 / 2],
        rejected=[0.1 / 5 / 0.8 / 4],
    ),
    # The chosen response of pair 1 has fallen by 3 nats: m = -3.5 - 0.5 * 2 * 3 = -6.5.
    "dpop": ByHand(
        PAIRS,
        settings={"beta": BETA, "alpha": 2.0},
        losses=[LOSSES[0], math.log1p(math.exp(6.5))],
        chosen=[-BETA * WEIGHTS[0], -BETA * sigma(6.5) * 3],
        rejected=[BETA * WEIGHTS[0], BETA * sigma(6.5)],
    ),
    "unlikelihood": ByHand(
        PAIRS,
        settings={"alpha": 0.5},
        losses=[2 - 2.0, 6 - 0.5],
        chosen=[-1.0, -1.0],
        rejected=[0.5, 0.5],
    ),
}


@pytest.mark.parametrize("name", MORE_BY_HAND)
def test_more_losses_by_hand(name):
    """The formula in the function's docstring, its pulls, and no reference but in dpop."""
    case = MORE_BY_HAND[name]
    loss = getattr(more, f"{name}_loss")
    expect(loss(*case.logps, **case.settings), case.losses, f"{name}: its formula")
    chosen, rejected, *of_ref = derivatives(loss, case.logps, **case.settings)
    expect(chosen, case.chosen, f"{name}: the pull on the chosen response")
    expect(rejected, case.rejected, f"{name}: the pull on the rejected response")
    if name != "dpop":
        assert not torch.stack(of_ref).any(), f"{name}: there is no reference"


@pytest.mark.parametrize("logp", [-1e-9, -1e-4, -1.0, -30.0, -1e4])
def test_odds_are_stable(logp):
    wanted = logp - math.log(-math.expm1(logp))
    got = more.log_odds(torch.tensor([logp]))  # float32
    expect(got / wanted, [1.0], "orpo: log(p / (1 - p)) through expm1", 1e-5)


def unlikelihood_of(policy, alpha):
    """The loss on infinitely many pairs: log-probs (27,) -> ()."""
    ref = REF[0]
    losses = more.unlikelihood_loss(policy[Y1], policy[Y2], ref[Y1], ref[Y2], alpha=alpha)
    return (2 * DRAWN * losses).sum()


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_unlikelihood_has_an_optimum_below_its_threshold(fraction):
    """pi = 2 ref (s - alpha (1 - s)) / (1 - alpha) up to alpha = min s / (1 - s); alpha = 0 is
    Preferred-FT: section 4's reference where there is no SFT model, the winners' frequencies."""
    alpha = fraction * (S / (1 - S)).min()
    optimum = 2 * REF[0].exp() * (S - alpha * (1 - S)) / (1 - alpha)
    expect(optimum.sum(), 1.0, "this test's closed form")
    found = descend(lambda policy: unlikelihood_of(policy, alpha), start=REF[0])
    expect(found, optimum.log(), "unlikelihood: its optimum below the threshold", 1e-7)


def test_unlikelihood_is_unbounded_above_its_threshold():
    """Take the worst response's mass away, and the loss falls for ever: Table 3 in numbers."""
    threshold = (S / (1 - S)).min()

    def without_the_worst(logp, alpha):
        policy = REF[0].clone()
        policy[S.argmin()] = logp
        return unlikelihood_of(policy.log_softmax(-1), alpha)

    for alpha in (1.1 * threshold, 1.0):
        far = without_the_worst(-1e3, alpha)
        farther = without_the_worst(-1e6, alpha)
        assert farther < far - 100, f"unlikelihood at alpha {alpha}: the loss must have no floor"
    far = without_the_worst(-1e3, 0.9 * threshold)
    farther = without_the_worst(-1e6, 0.9 * threshold)
    assert farther > far, "unlikelihood below its threshold: the loss must rise again"


# All of them: extremes, what is refused, defaults, and what is logged


ALL = {name: named(name) for name in dpo.LOSSES}
OTHERS = [more.simpo_loss, more.orpo_loss, more.dpop_loss, more.unlikelihood_loss]
WITH_LENGTHS = [more.simpo_loss, more.orpo_loss]
ALL |= {loss.__name__: loss for loss in OTHERS}
WITH_BETA = [dpo.dpo_loss, dpo.dpo_gradient, dpo.describe, *map(named, dpo.LOSSES)]


@pytest.mark.parametrize("name", ALL)
def test_extreme_log_probs(name):
    """Log-probs of -1e4 on either side, and of 0 (p = 1), in float32: finite loss and gradient."""
    loss = ALL[name]
    ends = torch.tensor([-1e4, -1e-9, 0.0])
    logps = torch.cartesian_prod(ends, ends, ends, ends).T  # (4, 81)
    settings = {}
    if loss in WITH_LENGTHS:
        settings = sizes(torch.ones(2, 81))
    finite = losses_of(loss(*logps, **settings)).isfinite().all()
    assert finite, f"{name}: at log-probs of -1e4 a loss is not finite: an exp or a log overflows"
    finite = derivatives(loss, logps, **settings).isfinite().all()
    assert finite, f"{name}: at log-probs of -1e4 a gradient is not finite"


def test_the_gradient_at_large_margins():
    m = torch.tensor([15.0, 20.0, 40.0])  # float32
    chosen, _ = dpo.dpo_gradient(*with_log_ratio(m), beta=1.0)
    why = "section 4: sigma(-m) is e^-m at large m, where 1 - sigma(m) is 0"
    expect(-chosen * m.exp(), [1.0, 1.0, 1.0], why, 1e-5)


def lapses(error, *calls, **settings):
    """Which of the calls (function, *arguments) do not raise this error, and what to do."""
    cure = {AssertionError: "call check_shapes", ValueError: "call check_settings"}[error]
    found = []
    for function, *args in calls:
        try:
            function(*args, **settings)
        except error:
            continue
        found.append(f"{function.__name__} must raise {error.__name__}: {cure}")
    return found


@pytest.mark.parametrize("loss", WITH_BETA)
def test_shapes_that_would_broadcast_are_refused(loss):
    """(B, 1) against (B,) would be B * B pairs and a plausible loss."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = PAIRS
    one_is_a_column = (loss, policy_chosen, policy_rejected, ref_chosen[:, None], ref_rejected)
    all_are_columns = (loss, *PAIRS[..., None])
    assert not lapses(AssertionError, one_is_a_column, all_are_columns, beta=0.5)


def test_other_shapes_that_would_broadcast_are_refused():
    first, second, *of_ref = PAIRS
    chosen_lengths, rejected_lengths = LENGTHS
    wide = torch.zeros(2, 3)
    ids = torch.zeros(2, 3, dtype=torch.long)
    one_row = torch.ones(1, 3, dtype=torch.bool)
    calls = [
        (more.unlikelihood_loss, first, second[:, None], *of_ref),
        (more.dpop_loss, first, second[:, None], *of_ref),
        (more.simpo_loss, *PAIRS, chosen_lengths, rejected_lengths[:, None]),
        (more.orpo_loss, *PAIRS, chosen_lengths, rejected_lengths[:, None]),
        (dpo.reward_model_loss, first, second[:, None]),
        (dpo.implicit_reward, first, second[:, None], 0.5),
        (dpo.plackett_luce_loss, wide, wide[:1]),
        (dpo.plackett_luce_loss, wide[0], wide[0]),
        (dpo.response_logps, Fixed(torch.zeros(2, 3, 5)), ids, one_row),
    ]
    assert not lapses(AssertionError, *calls)


def test_no_function_changes_its_arguments():
    calls = [
        (dpo.bradley_terry, REF, REWARDS),
        (dpo.kl_divergence, REF, REWARDS),
        (dpo.reward_model_loss, *PAIRS[:2]),
        (dpo.rlhf_objective, REF, REF, REWARDS, BETA),
        (dpo.optimal_policy, REF, REWARDS, BETA),
        (dpo.implicit_reward, REF, REWARDS, BETA),
        (dpo.plackett_luce_logps, REWARDS),
        (dpo.plackett_luce_loss, REF, REWARDS, BETA),
        (dpo.accuracy, REWARDS),
    ]
    for loss in (*WITH_BETA, more.dpop_loss, more.unlikelihood_loss):
        calls.append((loss, *PAIRS))
    for loss in WITH_LENGTHS:
        calls.append((loss, *PAIRS, *LENGTHS))
    for function, *args in calls:
        kept = [torch.as_tensor(arg).clone() for arg in args]
        function(*args)
        for number, (arg, before) in enumerate(zip(args, kept)):
            same = torch.equal(torch.as_tensor(arg), before)
            assert same, f"{function.__name__} changes its argument {number} in place"


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive_everywhere(beta):
    table = torch.zeros(2, 3)
    calls = [(more.simpo_loss, *PAIRS, *LENGTHS)]
    for function in (dpo.optimal_policy, dpo.plackett_luce_loss, dpo.implicit_reward):
        calls.append((function, table, table))
    for loss in (*WITH_BETA, more.dpop_loss):
        calls.append((loss, *PAIRS))
    assert not lapses(ValueError, *calls, beta=beta)


@pytest.mark.parametrize("shape", [(27,), (1, 1, 27)])
def test_the_last_dimension_lists_the_responses(shape):
    """(..., Y): one prompt alone, and prompts in two dimensions, give what a table gives."""
    optimum, log_Z = dpo.optimal_policy(REF, REWARDS, BETA)
    objective = dpo.rlhf_objective(optimum, REF, REWARDS, BETA)
    ranking = dpo.plackett_luce_logps(REWARDS[:, :4])

    ref = REF[0].view(shape)
    rewards = REWARDS[0].view(shape)
    found, normaliser = dpo.optimal_policy(ref, rewards, BETA)
    expect(found, optimum[0].view(shape), "Eq. 4 along the last dimension")
    expect(normaliser, log_Z[0].view(shape[:-1]), "log Z(x): one for each prompt")
    got = dpo.rlhf_objective(found, ref, rewards, BETA)
    expect(got, objective[0].view(shape[:-1]), "Eq. 3: one for each prompt")
    got = dpo.plackett_luce_logps(rewards[..., :4])
    expect(got, ranking[0].view(shape[:-1]), "Eq. 18: one for each ranking")


def test_defaults():
    """0.1, in appendix B; and a log-ratio of 10 against 0 is then a margin of 1."""
    ten, zero, one = torch.tensor([[10.0], [0.0], [1.0]], dtype=f64)
    pair = (ten, zero, zero, zero)
    tie = (zero, zero, zero, zero)
    half = (ten / 2, zero, zero, zero)
    minus_one = (-one, -one, zero, zero)  # both log-probs have fallen by one nat

    why = "by default beta is 0.1"
    chosen, _ = dpo.dpo_gradient(*pair)
    expect(chosen, [-0.1 * WEIGHTS[0]], f"dpo_gradient: {why}")
    ranking = torch.stack([ten, zero], dim=1)
    expect(dpo.plackett_luce_loss(ranking, 0 * ranking), LOSSES[:1], f"plackett_luce_loss: {why}")
    expect(dpo.describe(*pair)["margin"], [1.0], f"describe: {why}")
    expect(dpo.hinge_loss(*half), [0.5], f"hinge: {why}")
    expect(dpo.ipo_loss(*tie), [25.0], f"ipo: {why}")
    expect(dpo.cdpo_loss(*pair), [LOSSES[0] + 0.1], f"cdpo: {why}, epsilon 0.1")
    expect(dpo.robust_loss(*pair), [LOSSES[0] - 0.125], f"robust: {why}, epsilon 0.1")

    got = more.simpo_loss(*pair, one, one)
    expect(got, [math.log1p(math.exp(-19))], "simpo: by default beta is 2, gamma 1")
    got = more.orpo_loss(*minus_one, one, one)
    expect(got, [1 + 0.1 * math.log(2)], "orpo: by default alpha is 0.1")
    got = more.dpop_loss(*minus_one)
    expect(got, [math.log1p(math.exp(5))], "dpop: by default beta is 0.1, alpha 50")
    got = more.unlikelihood_loss(*minus_one)
    expect(got, [0.0], "unlikelihood: by default alpha is 1")


def test_accuracy_is_that_of_the_margins_and_not_of_the_log_probs():
    """The policy gives the rejected response more, but the reference gave it more still."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = torch.tensor(
        [[-4.0], [-3.0], [-8.0], [-3.0]], dtype=torch.float64
    )
    metrics = dpo.describe(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.5)
    expect(metrics["margin"], [2.0], "beta ((-4 + 8) - (-3 + 3))")
    expect(metrics["accuracy"], [1.0], "accuracy: is the margin above 0?")


def test_describe_by_hand():
    described = dpo.describe(*PAIRS, beta=0.5)
    wanted = {
        "loss": LOSSES,
        "margin": [1.0, -3.5],
        "weight": WEIGHTS,
        "accuracy": [1.0, 0.0],
        "chosen_reward": [0.5, -1.5],
        "rejected_reward": [-0.5, 2.0],
        "chosen_logp": [-2.0, -6.0],
        "rejected_logp": [-4.0, -1.0],
    }
    assert list(described) == list(wanted)
    for key, values in wanted.items():
        expect(described[key], values, f"describe: {key}")


def test_accuracy_counts_ties_half():
    expect(dpo.accuracy(torch.tensor([2.0, 0.0, -1.0])), [1.0, 0.5, 0.0], "ties count half")
