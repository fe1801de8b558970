"""The family in dpo.LOSSES and experiments/losses.py: values by hand, pulls, optima, extremes.

DPO_MODULE=my_dpo python -m pytest tests/test_losses.py -k convex   grades your own f in LOSSES
"""

import itertools
import math

import pytest
import torch

from experiments import losses as more
from tests.helpers import Fixed, descend, expect, load_dpo

dpo = load_dpo()
f64 = torch.float64

# The two pairs of test_dpo.py: margins 1 and -3.5 at beta 1/2. Policy w, l; reference w, l.
BETA = 0.5
PAIRS = torch.tensor([[-2, -6], [-4, -1], [-3, -3], [-3, -5]], dtype=f64)
LOSSES = [0.31326168751822286, 3.5297504182726205]  # log(1 + e^-1), log(1 + e^3.5)
WEIGHTS = [0.2689414213699951, 0.9706877692486436]  # sigma(-1), sigma(3.5)

# 2 prompts, and to each 27 responses; pi* of Eq. 4; every pair of responses, labelled by Eq. 1.
random = torch.Generator().manual_seed(1)
REF = torch.randn(2, 27, generator=random, dtype=f64).log_softmax(-1)
REWARDS = torch.randn(2, 27, generator=random, dtype=f64)
BEST = (REF + REWARDS / BETA).log_softmax(-1)
I, J = torch.triu_indices(27, 27, offset=1)
LABELS = 1 / (1 + (REWARDS[:, J] - REWARDS[:, I]).exp())  # (2, 351)
RANKINGS = torch.tensor(list(itertools.permutations(range(4))))

# All pairs of responses, drawn from the reference: the share in which Y1 wins over Y2 (equal pairs
# kept, so half of it for each order), and S(y), how often y beats a draw from the reference.
Y1, Y2 = torch.cartesian_prod(torch.arange(27), torch.arange(27)).T
P_WIN = 1 / (1 + (REWARDS[0, Y2] - REWARDS[0, Y1]).exp())
DRAWN = REF[0, Y1].exp() * REF[0, Y2].exp() * P_WIN
S = (P_WIN * REF[0, Y2].exp()).view(27, 27).sum(-1)
LENGTHS = torch.tensor([[2, 3], [4, 1]], dtype=f64)  # tokens of the chosen and rejected responses


def named(name):
    """The loss of this name. Of a file that begins with `from dpo import *`, LOSSES is ours."""
    return getattr(dpo, f"{name}_loss", None) or dpo.LOSSES[name]


def derivatives(loss, logps, **settings):
    """d loss / d each of the four sums, each pair by itself: (4, B)."""
    logps = logps.clone().requires_grad_()
    result = loss(*logps, **settings)
    (grad,) = torch.autograd.grad(getattr(result, "losses", result).sum(), logps)
    return grad


# Margins 1 and -3.5. With softplus(-1) = 0.3133 and softplus(3.5) = 3.5298:
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
    expect(getattr(result, "losses", result), losses, why)
    chosen, rejected, *_ = derivatives(named(name), PAIRS, **settings)
    why = f"{name}: descent pulls on grad log pi(y_w) - grad log pi(y_l) with beta (-f'(m))"
    expect(chosen, [-settings["beta"] * x for x in pull], why)
    expect(rejected, [settings["beta"] * x for x in pull], why)


def test_the_names_are_these():
    assert set(dpo.LOSSES) >= set(BY_HAND), "dpo.LOSSES: dpo, cdpo, robust, ipo, hinge"


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_family_is_convex_and_pulls_the_right_way(name):
    """Whatever f a class adds: convex, f'(0) < 0, of the margin alone; `weights`, if any, -f'."""
    m = torch.linspace(-8, 8, 65, dtype=f64) + 0.01 * (torch.arange(65) != 32)  # 0, but no kinks
    zero = torch.zeros_like(m)

    def f(chosen, rejected=zero, ref_chosen=zero, ref_rejected=zero):
        result = named(name)(chosen, rejected, ref_chosen, ref_rejected, beta=BETA)
        return getattr(result, "losses", result)

    values = f(m / BETA)
    assert values.shape == m.shape, f"{name}: one loss for each pair, (B,), no mean over pairs"
    expect(f(m / BETA + 3, zero + 1, zero + 2), values, f"{name}: a function of the margin alone?")
    rises = values.diff() / m.diff()
    assert (rises.diff() > -1e-9).all(), f"{name}: f is not convex, its slope falls somewhere"
    grads = derivatives(named(name), torch.stack([m / BETA, zero, zero, zero]), beta=BETA)
    assert grads[0, 32] < 0, f"{name}: at a tie f'(0) must be negative, or nothing is learnt"
    expect(grads[1], -grads[0], f"{name}: chosen and rejected are pulled equally hard, apart")
    result = named(name)((m / BETA).requires_grad_(), zero, zero, zero, beta=BETA)
    if hasattr(result, "weights"):
        expect(result.weights, -grads[0] / BETA, f"{name}: weights must be -f'(m)")
        assert not result.weights.requires_grad, f"{name}: weights carry no gradient: detach"


def test_cdpo_rests_where_the_labels_are_right_often_enough():
    """Zero gradient at sigma(m) = 1 - epsilon; for epsilon 0.2, beta 0.1 at rho = 13.863."""
    rho = torch.tensor([13.862943611198906], dtype=f64)
    pair = torch.stack([rho, rho * 0, rho * 0, rho * 0])
    why = "cdpo: its minimum is at m = log((1 - epsilon) / epsilon)"
    expect(derivatives(dpo.cdpo_loss, pair, beta=0.1, epsilon=0.2), torch.zeros(4, 1), why)
    lowest = dpo.cdpo_loss(*pair, beta=0.1, epsilon=0.2)
    expect(lowest, [0.5004024235381879], "cdpo: its minimum is the entropy of a 0.2 coin")


@pytest.mark.parametrize("loss", [dpo.cdpo_loss, dpo.robust_loss])
def test_no_noise_is_dpo_and_too_much_is_refused(loss):
    expect(loss(*PAIRS, beta=BETA, epsilon=0.0), LOSSES, f"{loss.__name__}: epsilon 0 is Eq. 7")
    for epsilon in (-0.1, 0.5, 0.7, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            loss(*PAIRS, beta=BETA, epsilon=epsilon)


def test_robust_is_unbiased_over_label_flips_and_unbounded_below():
    m, zero = torch.linspace(-9, 9, 37, dtype=f64), torch.zeros(37, dtype=f64)
    right, flipped = (dpo.robust_loss(x, zero, zero, zero, beta=1, epsilon=0.3) for x in (m, -m))
    clean = torch.log1p((-m).exp())
    why = "robust: (1 - epsilon) f(m) + epsilon f(-m) is the loss of the clean labels"
    expect(0.7 * right + 0.3 * flipped, clean, why)
    far = torch.tensor([500.0], dtype=f64)
    got = dpo.robust_loss(far, far * 0, far * 0, far * 0, beta=0.1, epsilon=0.1)
    expect(got, [-6.25], "robust: at m = 50, epsilon 0.1 it is -50 * 0.1 / 0.8: no lower bound")


def test_ipo_has_a_finite_target_for_a_sure_label():
    """Two responses, p = 1: the margin stops at 1/2, so rho at 1 / (2 beta) = 5 for beta 0.1."""
    rho = torch.tensor([5.0, 0.0], dtype=f64)
    pair = torch.stack([rho, rho * 0, rho * 0, rho * 0])
    why = "ipo: 0 at rho = 5, and (1 / (2 beta))^2 = 25 at the reference"
    expect(dpo.ipo_loss(*pair, beta=0.1), [0.0, 25.0], why)
    grad = derivatives(dpo.ipo_loss, pair + 1e-3 * torch.eye(4, dtype=f64)[:, :1], beta=0.1)
    assert grad[0, 0] > 0, "ipo: past its target it pulls back"


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_ipo_under_bradley_terry_labels_ends_at_g_over_tau(tau):
    """Eq. 9 and 17 of the IPO paper, pairs drawn from the reference: pi* is ref exp(g / tau) / Z
    with g(y) = P(y beats a draw from the reference). Not pi* of DPO."""
    ref = REF[0]

    def loss_of(pi):
        return (2 * DRAWN * dpo.ipo_loss(pi[Y1], pi[Y2], ref[Y1], ref[Y2], beta=tau)).sum()

    wanted = (ref + S / tau).log_softmax(-1)
    expect(descend(loss_of, ref), wanted, "ipo: its optimum is ref exp(g / tau) / Z", 1e-8)


def test_cdpo_on_all_pairs_ends_beside_the_optimum_of_dpo():
    """Told of noise that is not there, cDPO stops short: an implied P off by several points."""

    def loss_of(pi):
        sums = [logps[0, side] for logps in (pi, REF) for side in (I, J)]
        win = dpo.cdpo_loss(*sums, beta=BETA, epsilon=0.1)
        lose = dpo.cdpo_loss(*(sums[k] for k in (1, 0, 3, 2)), beta=BETA, epsilon=0.1)
        return (LABELS[0] * win + (1 - LABELS[0]) * lose).mean()

    h = BETA * (descend(loss_of, REF) - REF)[0]
    off = (torch.sigmoid(h[I] - h[J]) - LABELS[0]).abs().max()
    assert 0.05 < off < 0.15, off
    exact = BETA * (BEST - REF)[0]
    expect(torch.sigmoid(exact[I] - exact[J]), LABELS[0], "DPO's own optimum is exact")


# experiments/losses.py


def sizes(lengths):
    return dict(zip(("chosen_lengths", "rejected_lengths"), lengths))


def sigma(x):
    return 1 / (1 + math.exp(-x))


# Pairs: simpo's means per token are -1 against -1, then -2 against -1, so with beta 2 and gamma 1
# its arguments are -1 and -3. orpo: mean probabilities 1/2 and 1/5, odds 1 and 1/4; d log odds /
# d log p = 1 / (1 - p). dpop: the chosen response of pair 1 fell by 3 nats: m = -3.5 - 0.5 * 2 * 3.
ODDS = torch.tensor([[2 * math.log(0.5)], [4 * math.log(0.2)], [-9.0], [-9.0]], dtype=f64)
MORE_BY_HAND = {  # log-probs, settings, losses, d / d chosen, d / d rejected
    "simpo": (PAIRS, {"beta": 2.0, "gamma": 1.0} | sizes(LENGTHS),
              [math.log1p(math.e), math.log1p(math.e**3)],
              [-2 * sigma(1) / 2, -2 * sigma(3) / 3], [2 * sigma(1) / 4, 2 * sigma(3) / 1]),
    "orpo": (ODDS, {"alpha": 0.1} | sizes(LENGTHS[:, :1]), [math.log(2) + 0.1 * math.log(1.25)],
             [-1 / 2 - 0.1 / 5 / 0.5 / 2], [0.1 / 5 / 0.8 / 4]),
    "dpop": (PAIRS, {"beta": BETA, "alpha": 2.0}, [LOSSES[0], math.log1p(math.exp(6.5))],
             [-BETA * WEIGHTS[0], -BETA * sigma(6.5) * 3], [BETA * WEIGHTS[0], BETA * sigma(6.5)]),
    "unlikelihood": (PAIRS, {"alpha": 0.5}, [2 - 2.0, 6 - 0.5], [-1.0, -1.0], [0.5, 0.5]),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_BY_HAND)
def test_more_losses_by_hand(name):
    """The formula in the function's docstring, its pulls, and no reference but in dpop."""
    logps, settings, losses, chosen, rejected = MORE_BY_HAND[name]
    loss = getattr(more, f"{name}_loss")
    expect(loss(*logps, **settings), losses, f"{name}: its formula")
    pull = derivatives(loss, logps, **settings)
    expect(pull[0], chosen, f"{name}: the pull on the chosen response")
    expect(pull[1], rejected, f"{name}: the pull on the rejected response")
    assert name == "dpop" or not pull[2:].any(), f"{name}: there is no reference"


@pytest.mark.parametrize("logp", [-1e-9, -1e-4, -1.0, -30.0, -1e4])
def test_odds_are_stable(logp):
    wanted = logp - math.log(-math.expm1(logp))
    got = more.log_odds(torch.tensor([logp]))  # float32
    expect(got / wanted, [1.0], "orpo: log(p / (1 - p)) through expm1", 1e-5)


def unlikelihood_of(pi, alpha):
    loss = more.unlikelihood_loss(pi[Y1], pi[Y2], REF[0, Y1], REF[0, Y2], alpha=alpha)
    return (2 * DRAWN * loss).sum()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_unlikelihood_has_an_optimum_below_its_threshold(share):
    """pi = 2 ref (s - alpha (1 - s)) / (1 - alpha) up to alpha = min s / (1 - s); alpha = 0 is
    Preferred-FT: section 4's reference where there is no SFT model, the winners' frequencies."""
    alpha = share * (S / (1 - S)).min()
    optimum = 2 * REF[0].exp() * (S - alpha * (1 - S)) / (1 - alpha)
    expect(optimum.sum(), 1.0, "this test's closed form")
    found = descend(lambda pi: unlikelihood_of(pi, alpha), REF[0])
    expect(found, optimum.log(), "unlikelihood: its optimum below the threshold", 1e-7)


def test_unlikelihood_is_unbounded_above_its_threshold():
    """Take the worst response's mass away, and the loss falls for ever: Table 3 in numbers."""
    threshold = (S / (1 - S)).min()

    def without_the_worst(logp, alpha):
        pi = REF[0].clone()
        pi[S.argmin()] = logp
        return unlikelihood_of(pi.log_softmax(-1), alpha)

    for alpha in (1.1 * threshold, 1.0):
        far, farther = (without_the_worst(logp, alpha) for logp in (-1e3, -1e6))
        assert farther < far - 100, f"unlikelihood at alpha {alpha}: the loss must have no floor"
    far, farther = (without_the_worst(logp, 0.9 * threshold) for logp in (-1e3, -1e6))
    assert farther > far, "unlikelihood below its threshold: the loss must rise again"


ALL = {name: named(name) for name in dpo.LOSSES}
ALL |= {name: getattr(more, name) for name in dir(more) if name.endswith("_loss")}


@pytest.mark.parametrize("name", ALL)
def test_extreme_log_probs(name):
    """Log-probs of -1e4 on either side, and of 0 (p = 1), in float32: finite loss and gradient."""
    ends = torch.tensor([-1e4, -1e-9, 0.0])
    logps = torch.cartesian_prod(ends, ends, ends, ends).T  # (4, 81)
    settings = sizes(torch.ones(2, 81)) if name in ("simpo_loss", "orpo_loss") else {}
    result = ALL[name](*logps, **settings)
    finite = getattr(result, "losses", result).isfinite().all()
    assert finite, f"{name}: at log-probs of -1e4 a loss is not finite: an exp or a log overflows"
    assert derivatives(ALL[name], logps, **settings).isfinite().all(), f"{name}: a gradient is not"


# What is refused, defaults, and what is logged


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


LOSS_LIKE = [dpo.dpo_loss, dpo.dpo_gradient, dpo.describe, *map(named, dpo.LOSSES)]


def test_extreme_rewards():
    m, zero = torch.tensor([15.0, 20.0, 40.0]), torch.zeros(3)  # float32
    pull = -dpo.dpo_gradient(m, zero, zero, zero, beta=1.0)[0] * m.exp()
    expect(pull, [1.0] * 3, "sigma(-m) is e^-m at large m, and 1 - sigma(m) is 0", 1e-5)
    rewards, zero = torch.tensor([1e4, -1e4]), torch.zeros(2)
    why = "Eq. 2 at margins of 1e4 and -1e4: log(sigmoid(x)) overflows, logsigmoid does not"
    expect(dpo.reward_model_loss(rewards, zero), [0.0, 1e4], why)


@pytest.mark.parametrize("loss", LOSS_LIKE)
def test_shapes_that_would_broadcast_are_refused(loss):
    """(B, 1) against (B,) would be B * B pairs and a plausible loss."""
    one_wrong = PAIRS[0], PAIRS[1], PAIRS[2][:, None], PAIRS[3]
    both = (loss, *one_wrong), (loss, *PAIRS[..., None])
    assert not lapses(AssertionError, *both, beta=0.5)


def test_other_shapes_that_would_broadcast_are_refused():
    ids, mask = torch.zeros(2, 3).long(), torch.ones(1, 3).bool()
    calls = [(loss, PAIRS[0], PAIRS[1][:, None], *PAIRS[2:])
             for loss in (more.unlikelihood_loss, more.dpop_loss)]  # fmt: skip
    calls += [(loss, *PAIRS, LENGTHS[0], LENGTHS[1][:, None])
              for loss in (more.simpo_loss, more.orpo_loss)]  # fmt: skip
    calls += [
        (dpo.reward_model_loss, PAIRS[0], PAIRS[1][:, None]),
        (dpo.implicit_reward, PAIRS[0], PAIRS[1][:, None], 0.5),
        (dpo.plackett_luce_loss, torch.zeros(2, 3), torch.zeros(1, 3)),
        (dpo.plackett_luce_loss, torch.zeros(3), torch.zeros(3)),
        (dpo.response_logps, Fixed(torch.zeros(2, 3, 5)), ids, mask),
    ]
    assert not lapses(AssertionError, *calls)


def test_no_function_changes_its_arguments():
    tables = REF, REWARDS
    calls = [(f, *PAIRS) for f in (*LOSS_LIKE, more.dpop_loss)]
    calls += [(f, *PAIRS, *LENGTHS) for f in (more.simpo_loss, more.orpo_loss)]
    calls += [(dpo.bradley_terry, *tables), (dpo.kl_divergence, *tables)]
    calls += [(dpo.reward_model_loss, *PAIRS[:2])]
    calls += [(f, *tables, BETA) for f in (dpo.optimal_policy, dpo.implicit_reward)]
    calls += [(dpo.rlhf_objective, REF, REF, REWARDS, BETA), (dpo.plackett_luce_logps, REWARDS)]
    calls += [(dpo.plackett_luce_loss, *tables, BETA), (dpo.accuracy, REWARDS)]
    for function, *args in calls:
        kept = [torch.as_tensor(arg).clone() for arg in args]
        function(*args)
        same = [torch.equal(torch.as_tensor(arg), was) for arg, was in zip(args, kept)]
        assert all(same), f"{function.__name__} changes its argument {same.index(False)} in place"


def test_rankings_of_two_and_of_some():
    """Eq. 18 with K = 2 is Eq. 1; and one response comes before another as often as Eq. 1 says."""
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=f64)
    a, b, c, _ = rewards.exp().tolist()
    expect(dpo.plackett_luce_logps(rewards[:2]).exp(), a / (a + b), "Eq. 18 with K = 2 is Eq. 1")
    p = dpo.plackett_luce_logps(rewards[RANKINGS]).exp()
    ahead = (RANKINGS == 0).int().argmax(-1) < (RANKINGS == 2).int().argmax(-1)
    expect(p[ahead].sum(), a / (a + c), "Eq. 18: 0 comes before 2 as often as Eq. 1 says")


def test_the_last_dimension_lists_the_responses():
    """(..., Y): one prompt alone, and prompts in two dimensions, give what a table gives."""
    best, log_Z = dpo.optimal_policy(REF, REWARDS, BETA)
    J = dpo.rlhf_objective(best, REF, REWARDS, BETA)
    ranking = dpo.plackett_luce_logps(REWARDS[:, :4])
    for shape in ((27,), (1, 1, 27)):
        ref, rewards = REF[0].view(shape), REWARDS[0].view(shape)
        found, normaliser = dpo.optimal_policy(ref, rewards, BETA)
        expect(found, best[0].view(shape), "Eq. 4 along the last dimension")
        expect(normaliser, log_Z[0].view(shape[:-1]), "log Z(x): one for each prompt")
        got = dpo.rlhf_objective(found, ref, rewards, BETA)
        expect(got, J[0].view(shape[:-1]), "Eq. 3: one for each prompt")
        got = dpo.plackett_luce_logps(rewards[..., :4])
        expect(got, ranking[0].view(shape[:-1]), "Eq. 18: one for each ranking")


def test_defaults():
    """0.1, in appendix B; and a log-ratio of 10 against 0 is then a margin of 1."""
    ten, zero, one = torch.tensor([[10.0], [0.0], [1.0]], dtype=f64)
    pair, ranking = (ten, zero, zero, zero), torch.tensor([[10.0, 0.0]], dtype=f64)
    for got, wanted, default in (
        (dpo.dpo_gradient(*pair)[0], -0.1 * WEIGHTS[0], "beta 0.1"),
        (dpo.plackett_luce_loss(ranking, ranking * 0), LOSSES[0], "beta 0.1"),
        (dpo.hinge_loss(ten / 2, *pair[1:]), 0.5, "beta 0.1"),
        (dpo.ipo_loss(zero, *pair[1:]), 25.0, "beta 0.1"),
        (dpo.cdpo_loss(*pair), LOSSES[0] + 0.1, "epsilon 0.1"),
        (dpo.robust_loss(*pair), LOSSES[0] - 0.125, "epsilon 0.1"),
        (dpo.describe(*pair)["margin"], 1.0, "beta 0.1"),
        (more.simpo_loss(*pair, one, one), math.log1p(math.exp(-19)), "beta 2, gamma 1"),
        (more.orpo_loss(-one, -one, zero, zero, one, one), 1 + 0.1 * math.log(2), "alpha 0.1"),
        (more.dpop_loss(-one, -one, zero, zero), math.log1p(math.exp(5)), "beta 0.1, alpha 50"),
        (more.unlikelihood_loss(-ten, -ten, zero, zero), 0.0, "alpha 1"),
    ):
        expect(got, [wanted], f"default {default}")


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive_everywhere(beta):
    zeros = torch.zeros(2, 3)
    of_tables = dpo.optimal_policy, dpo.plackett_luce_loss, dpo.implicit_reward
    assert not lapses(ValueError, *((function, zeros, zeros, beta) for function in of_tables))
    calls = [(f, *PAIRS) for f in (*LOSS_LIKE, more.dpop_loss)]
    assert not lapses(ValueError, *calls, (more.simpo_loss, *PAIRS, *LENGTHS), beta=beta)


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
