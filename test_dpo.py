"""The paper as tests: each named after what it checks, each against a value from elsewhere:
worked out by hand, listed exactly, from finite differences, or from a slow loop.

When one fails, its message says which equation is off and what the usual mistake is.
"""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

import data
import dpo
import train
from model import GPT, GPTConfig

# Two pairs whose numbers can be followed on paper, at beta = 1/2.
#   pair 0: r_w = 0.5 (-2 + 3) = 0.5,  r_l = 0.5 (-4 + 3) = -0.5,  margin  1.0  ranked right
#   pair 1: r_w = 0.5 (-6 + 3) = -1.5, r_l = 0.5 (-1 + 5) =  2.0,  margin -3.5  confidently wrong
BETA = 0.5
PAIRS = (
    torch.tensor([-2.0, -6.0], dtype=torch.float64),  # policy, chosen
    torch.tensor([-4.0, -1.0], dtype=torch.float64),  # policy, rejected
    torch.tensor([-3.0, -3.0], dtype=torch.float64),  # reference, chosen
    torch.tensor([-3.0, -5.0], dtype=torch.float64),  # reference, rejected
)
LOSSES = [0.31326168751822286, 3.5297504182726205]  # log(1 + e^-1), log(1 + e^3.5)
WEIGHTS = [0.2689414213699951, 0.9706877692486436]  # sigma(-1), sigma(3.5)


def expect(got, expected, why, tolerance=1e-12):
    """Compare, and on failure say which equation it was and what the usual mistake is."""
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert got.shape == expected.shape, f"{why}\n  shape {got.shape}, expected {expected.shape}"
    off = (got - expected).abs().max().item()
    assert off <= tolerance, f"{why}\n  got {got}\n  expected {expected}\n  off by {off:.2g}"


# A space small enough to list: 2 prompts with 27 answers each


@pytest.fixture
def space():
    """Reference log-probs and rewards (2, 27), and random policies on the same answers."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(2, 27).log_softmax(-1), 2 * draw(2, 27), (1.5 * draw(50, 2, 27)).log_softmax(-1)


# Section 3: Bradley-Terry, the reward model, the objective


def test_eq1_bradley_terry_by_hand():
    one, two = torch.tensor([1.0, 3.0, -200.0]), torch.tensor([0.0, 3.0, 200.0])
    why = "Eq. 1: P(y_1 beats y_2) = e^r1 / (e^r1 + e^r2); are the two rewards exchanged?"
    expect(dpo.bradley_terry(one, two), [math.e / (math.e + 1), 0.5, 0.0], why, 1e-7)
    both = dpo.bradley_terry(one, two) + dpo.bradley_terry(two, one)
    expect(both, [1.0, 1.0, 1.0], "Eq. 1: one of the two must win", 1e-7)


def test_eq2_reward_model_loss_by_hand():
    losses = dpo.reward_model_loss(torch.tensor([0.5, -1.5]), torch.tensor([-0.5, 2.0]))
    expect(losses, LOSSES, "Eq. 2: -log sigma(r_w - r_l) of each pair; is the sign right?", 1e-6)


def test_eq3_objective_of_a_coin_by_hand():
    policy = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    objective = dpo.rlhf_objective(policy, ref, torch.tensor([2.0, -1.0]), beta=0.3)
    why = "Eq. 3: J = E_pi[r] - beta KL(pi || pi_ref), with the expectation under pi, not pi_ref"
    expect(objective, 0.9 * 2 - 0.1 - 0.3 * kl, why)


def test_eq3_an_answer_of_probability_zero_costs_nothing():
    policy = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    expect(dpo.kl_divergence(policy, ref), math.log(2), "KL: 0 log 0 is 0, not NaN")


# Section 4: the optimum, the reward behind it, the loss


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_eq4_is_the_maximiser_of_eq3(space, beta):
    ref, rewards, policies = space
    best, log_Z = dpo.optimal_policy(ref, rewards, beta)
    expect(best.exp().sum(-1), [1.0, 1.0], "Eq. 4: divided by Z(x), the policy sums to 1")
    J = dpo.rlhf_objective(best, ref, rewards, beta)
    expect(J, beta * log_Z, "Eq. 4: at the optimum J = beta log Z(x); r / beta or r * beta?")
    others = dpo.rlhf_objective(policies, ref, rewards, beta)
    assert (others < J).all(), "Eq. 4: a random policy has a larger J, so this is no maximum"
    gap = (policies.exp() * (policies - best)).sum(-1)
    expect(J - others, beta * gap, "Eq. 4: J(pi*) - J(pi) = beta KL(pi || pi*)")


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_eq5_reward_from_its_policy(space, beta):
    ref, rewards, _ = space
    best, log_Z = dpo.optimal_policy(ref, rewards, beta)
    implied = dpo.implicit_reward(best, ref, beta) + beta * log_Z[:, None]
    expect(implied, rewards, "Eq. 5: r = beta log(pi_r / pi_ref) + beta log Z(x)")


def test_eq6_the_normaliser_cancels(space):
    ref, rewards, _ = space
    shifted = rewards + torch.tensor([[7.0], [-4.0]])  # any f(x): the same preferences
    for r in (rewards, shifted):
        best, _ = dpo.optimal_policy(ref, r, 0.7)
        h = dpo.implicit_reward(best, ref, 0.7)
        got = dpo.bradley_terry(h[:, :, None], h[:, None, :])  # every answer against every other
        wanted = 1 / (1 + (rewards[:, None, :] - rewards[:, :, None]).exp())
        expect(got, wanted, "Eq. 6: the preferences of pi* are those of r, whatever Z(x) is")


def test_eq7_by_hand():
    why = "Eq. 7: -log sigma(beta (log-ratio w - log-ratio l)); is it sign, beta or reference?"
    result = dpo.dpo_loss(*PAIRS, beta=BETA)
    expect(result.losses, LOSSES, why)
    expect(result.weights, WEIGHTS, "section 4: the weight is sigma(r_l - r_w), large when wrong")
    expect(result.chosen_rewards, [0.5, -1.5], "Eq. 5: r_w = beta (policy - reference)")
    expect(result.rejected_rewards, [-0.5, 2.0], "Eq. 5: r_l = beta (policy - reference)")


def test_eq7_is_log_2_where_policy_is_reference():
    logps = PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1]
    why = "Eq. 7: policy == reference costs log 2; do both see chosen and rejected in one order?"
    expect(dpo.dpo_loss(*logps, beta=0.3).losses, [math.log(2)] * 2, why)


def test_eq7_survives_extreme_margins():
    logps = [torch.tensor([x], requires_grad=True) for x in (-8000.0, -4000.0)]
    zero = torch.zeros(1)
    losses = dpo.dpo_loss(*logps, zero, zero, beta=0.3).losses
    losses.sum().backward()
    why = "Eq. 7 at a margin of -1200: use logsigmoid; log(sigmoid(x)) is -inf there"
    expect(losses, [1200.0], why, 1e-3)
    expect(torch.cat([x.grad for x in logps]), [-0.3, 0.3], why, 1e-6)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_eq7_refuses_beta(beta):
    for function in (dpo.dpo_loss, dpo.dpo_gradient):
        with pytest.raises(ValueError, match="beta"):
            function(*PAIRS, beta=beta)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_eq7_population_minimum_is_the_optimum_of_eq4(space, beta):
    """Weighted by the exact Bradley-Terry probabilities, Eq. 7 has its minimum at pi* of Eq. 4."""
    ref, rewards, policies = (part.narrow(-1, 0, 6) for part in space)  # 6 answers, 36 pairs
    ref = ref.log_softmax(-1)
    i, j = torch.tensor(list(itertools.product(range(6), repeat=2))).T
    p = 1 / (1 + (rewards[:, j] - rewards[:, i]).exp())
    logits = policies[0].clone().requires_grad_()
    search = "strong_wolfe"
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn=search
    )

    def closure():
        optimizer.zero_grad()
        pi = logits.log_softmax(-1)
        sums = pi[:, i].flatten(), pi[:, j].flatten(), ref[:, i].flatten(), ref[:, j].flatten()
        loss = (p.flatten() * dpo.dpo_loss(*sums, beta).losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best, _ = dpo.optimal_policy(ref, rewards, beta)
    why = "Eq. 7: with endless pairs its minimum is pi* of Eq. 4; is the reference left out?"
    expect(logits.log_softmax(-1), best, why, 1e-6)


# Section 4: the gradient, and the misprint


def test_gradient_by_hand():
    """Away from policy == reference, where even the misprinted weight would be right."""
    chosen, rejected = dpo.dpo_gradient(*PAIRS, beta=BETA)
    why = "section 4: d loss / d log pi(y_w) = -beta sigma(r_l - r_w); of y_l it is the opposite"
    expect(chosen, [-BETA * weight for weight in WEIGHTS], why)
    expect(rejected, [BETA * weight for weight in WEIGHTS], why)


def test_gradient_by_autograd_and_finite_differences():
    logps = [part.clone().requires_grad_() for part in PAIRS[:2]]
    dpo.dpo_loss(*logps, *PAIRS[2:], beta=BETA).losses.sum().backward()
    by_hand = dpo.dpo_gradient(*PAIRS, beta=BETA)
    eps = 1e-5
    for side, name in enumerate(("chosen", "rejected")):
        why = f"section 4, {name}: formula, autograd and finite differences must agree; a detach?"
        expect(logps[side].grad, by_hand[side], why)
        up, down = ([part.clone() for part in PAIRS] for _ in range(2))
        up[side] += eps
        down[side] -= eps
        slope = dpo.dpo_loss(*up, beta=BETA).losses - dpo.dpo_loss(*down, beta=BETA).losses
        expect(by_hand[side], slope / (2 * eps), why, 1e-8)


def test_gradient_appendix_a4_is_a_misprint():
    """A.4 prints the weight sigma(r_w - r_l): 33 times too small on the wrongly ranked pair."""
    chosen, _ = dpo.dpo_gradient(*PAIRS, beta=BETA)
    misprinted = -BETA * torch.sigmoid(torch.tensor([1.0, -3.5], dtype=torch.float64))
    assert (chosen - misprinted).abs().min() > 0.2, "A.4's misprint: the weight is sigma(r_l - r_w)"


def test_gradient_carries_nothing_through_weights_and_rewards():
    logps = [part.clone().requires_grad_() for part in PAIRS[:2]]
    result = dpo.dpo_loss(*logps, *PAIRS[2:], beta=BETA)
    carrying = [name for name, value in result._asdict().items() if value.requires_grad]
    assert carrying == ["losses"], f"only the losses carry a gradient, not {carrying}"


# Appendix A.3: rankings


def test_eq18_sums_to_one_over_all_rankings():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    total = dpo.plackett_luce_logps(rewards[orders]).exp().sum()
    expect(total, 1.0, "Eq. 18: the 24 rankings of 4 answers are all there is")
    r = [math.exp(x) for x in (0.3, -1.2, 2.0)]
    by_hand = math.log(r[0] / sum(r) * r[1] / (r[1] + r[2]))
    expect(dpo.plackett_luce_logps(rewards[:3]), by_hand, "Eq. 18: best first, sum over j >= k")


def test_eq20_of_two_answers_is_eq7():
    policy, ref = torch.stack(PAIRS[:2], -1), torch.stack(PAIRS[2:], -1)
    why = "Eq. 20 with K = 2 is Eq. 7; is the ranking read best first?"
    expect(dpo.plackett_luce_loss(policy, ref, beta=BETA), LOSSES, why)


# log pi(y|x) from a real GPT


V, END = 5, 0  # the end token is id 0, which is what collate pads with: pad id == end id


def tiny_gpt(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, n_positions=12, n_embd=16, n_layer=2, n_head=2)).double()
    for parameter in model.parameters():  # far from the small initialisation, biases included
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


ROWS = [  # prompts and answers of different lengths; answers that are the end token alone
    data.TokenPair([3, 1, 4], [2, 2, 4, END], [1, END]),
    data.TokenPair([2], [END], [4, 3, END]),
    data.TokenPair([1, 1, 2, 3, 4, 4], [3, END], [END]),
    data.TokenPair([4, 2], [1, END], [1, 3, 2, 2, 1, END]),
]


def one_at_a_time(model, prompt, answer):
    """The slow oracle: no batch, no mask, no padding, a token after the other."""
    total = 0.0
    for k, token in enumerate(answer):
        logits = model(torch.tensor([prompt + answer[:k]]))[0, -1]
        total = total + logits[token] - logits.logsumexp(-1)
    return total


def two_rows(model, rows, side):
    """The plain way: a padded row for each answer, then dpo.sequence_logps."""
    texts = [row.prompt + getattr(row, side) for row in rows]
    ids = torch.tensor([text + [END] * (12 - len(text)) for text in texts])
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        mask[i, len(row.prompt) : len(texts[i])] = 1
    return dpo.sequence_logps(model(ids), ids, mask)


def test_sequence_logps_is_the_slow_sum():
    model = tiny_gpt(0)
    for side in ("chosen", "rejected"):
        slow = torch.stack([one_at_a_time(model, row.prompt, getattr(row, side)) for row in ROWS])
        why = f"log pi(y|x), {side}: logits at t predict token t + 1; sum the answer's tokens only"
        expect(two_rows(model, ROWS, side), slow, why)


def test_sequence_logps_ignores_what_is_masked():
    logits = torch.zeros(1, 3, V)
    logits[0, 0, 1] = -torch.inf  # the prompt's second token is impossible, and nobody asks
    logps = dpo.sequence_logps(logits, torch.tensor([[2, 1, 4]]), torch.tensor([[0, 0, 1]]))
    expect(logps, [-math.log(V)], "a masked -inf must not turn into NaN: use where, not *", 1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, ids = 5 * torch.randn(2, 400, 50).bfloat16(), torch.randint(50, (2, 400))
    mask = torch.ones_like(ids)
    got, exact = (dpo.sequence_logps(x, ids, mask) for x in (logits, logits.double()))
    assert got.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    expect(got / exact, [1.0, 1.0], "a log-softmax in bfloat16 is off by whole nats", 1e-5)


def test_pair_rows_equal_two_rows():
    """One row [prompt | chosen | rejected] gives what two rows give: values and gradients."""
    model = tiny_gpt(0)
    sides = ("chosen", "rejected")
    results = []
    for logps in (
        dpo.response_logps(model, data.collate(ROWS, [2, 0, 3, 1])),
        [two_rows(model, [ROWS[i] for i in (2, 0, 3, 1)], side) for side in sides],
    ):
        model.zero_grad()
        factors = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.5, 0.3, 2.0, -0.7]])
        (factors * torch.stack(list(logps))).sum().backward()
        results.append((*logps, *(parameter.grad.clone() for parameter in model.parameters())))
    why = "the pair row: each answer sees the prompt and itself, positions restart, nothing else"
    for one_row, plain in zip(*results):
        expect(one_row, plain, why, 1e-9)


def test_pair_rows_in_float32():
    model = tiny_gpt(0).float()
    results = dpo.response_logps(model, data.collate(ROWS, range(4)))
    for got, side in zip(results, ("chosen", "rejected")):
        expect(got / two_rows(model, ROWS, side), [1.0] * 4, "the pair row in float32", 1e-6)


def test_padding_changes_nothing():
    model = tiny_gpt(0)
    together = torch.stack(dpo.response_logps(model, data.collate(ROWS, range(4))))
    alone = [torch.stack(dpo.response_logps(model, data.collate(ROWS, [i]))) for i in range(4)]
    expect(together, torch.cat(alone, 1), "a row alone and beside longer rows is the same row")


def test_all_answers_sum_to_one():
    """Every answer there is, through pair rows, chosen and rejected side: probability 1 each."""
    model = tiny_gpt(0)
    words = [token for token in range(V) if token != END]
    answers = [[*y, END] for n in range(3) for y in itertools.product(words, repeat=n)]
    answers += [list(y) for y in itertools.product(words, repeat=3)]  # the world's K: over, no end
    for prompt in ([3], [1, 2, 4]):
        rows = [data.TokenPair(prompt, y, z) for y, z in zip(answers, reversed(answers))]
        for logps in dpo.response_logps(model, data.collate(rows, range(len(rows)))):
            why = "pi(y|x) over all y must sum to 1: end token scored? prompt left out? summed?"
            expect(logps.exp().sum(), 1.0, why)


# Training


def dpo_losses(ref):
    return lambda chosen, rejected, ids: dpo.dpo_loss(chosen, rejected, *ref[:, ids], BETA).losses


def test_gradient_of_the_whole_pipeline():
    """collate, response_logps, Eq. 7 and its backward against the oracle's, policy != reference."""
    model, reference = tiny_gpt(0), tiny_gpt(1)
    oracle = [
        torch.stack([one_at_a_time(m, row.prompt, getattr(row, side)) for row in ROWS])
        for m in (model, reference)
        for side in ("chosen", "rejected")
    ]
    r_w, r_l = BETA * (oracle[0] - oracle[2]), BETA * (oracle[1] - oracle[3])
    (1 + (r_l - r_w).exp()).log().mean().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ref = train.all_logps(reference, ROWS, train.TOY)
    train.backward(model, ROWS, torch.arange(4), dpo_losses(ref), train.TOY)
    for parameter, gradient in zip(model.parameters(), wanted):
        expect(parameter.grad, gradient, "the training step's gradient is not Eq. 7's", 1e-9)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_gradient_is_the_batch_gradient(micro):
    """Of 7 pairs in parts of 1, of 2 (the last short) and of 3 (the last a single pair)."""
    model, reference = tiny_gpt(0), tiny_gpt(1)
    rows = ROWS + ROWS[:3]
    ref = train.all_logps(reference, rows, train.TOY)
    results = []
    for size in (0, micro):
        model.zero_grad()
        config = dataclasses.replace(train.TOY, micro_batch_size=size)
        record = train.backward(model, rows, torch.randperm(7), dpo_losses(ref), config)
        losses = record["loss"].sum()
        results.append((losses, *(parameter.grad.clone() for parameter in model.parameters())))
    why = f"parts of {micro}: divide by the pairs of the batch, not of the part or by the parts"
    for whole, parts in zip(*results):
        expect(parts, whole, why, 1e-10)


def test_reference_is_untouched_and_unshared():
    reference = tiny_gpt(1)
    before = copy.deepcopy(reference.state_dict())
    policy = copy.deepcopy(reference)
    ref = train.all_logps(reference, ROWS, train.TOY)
    assert not ref.requires_grad, "the reference's log-probs are numbers, with no gradient"
    config = dataclasses.replace(train.TOY, batch_size=4, warmup_steps=1, beta=BETA)
    losses = [
        record["loss"].mean().item()
        for *_, record, _ in train.updates(policy, ROWS, dpo_losses(ref), config, 5, 1e-2)
    ]
    expect(losses[0], math.log(2), "the first loss: policy and reference are still the same")
    assert losses[-1] < losses[0], f"Eq. 7 must fall under training, but went {losses}"
    assert all(parameter.grad is None for parameter in reference.parameters())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the reference has moved"
    moved = [not torch.equal(t, before[name]) for name, t in policy.state_dict().items()]
    assert all(moved), "every weight of the policy must move"


def test_logged_weight_is_the_weight():
    """The weight that train.py logs comes from autograd, for DPO it is sigma(r_l - r_w)."""
    model, ref = tiny_gpt(0), train.all_logps(tiny_gpt(1), ROWS, train.TOY)
    record = train.backward(model, ROWS, torch.arange(4), dpo_losses(ref), train.TOY)
    described = dpo.describe(record["chosen_logp"], record["rejected_logp"], *ref, BETA)
    why = "the logged weight: -(1/beta) d loss / d log pi(y_w)"
    expect(-record["chosen_grad"] / BETA, described["weight"], why)


def test_accuracy_counts_ties_half():
    expect(dpo.accuracy(torch.tensor([2.0, 0.0, -1.0])), [1.0, 0.5, 0.0], "ties count half")


# The toy world


def test_toy_world_enumeration_is_exact():
    """The listed log-probs are those of pair rows, and they sum to 1."""
    world = data.ToyWorld("small")
    torch.manual_seed(0)
    model = GPT(GPTConfig(world.W + 1, 8, 16, 1, 2)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    logps = world.logps(model)
    assert logps.shape == (2, 1111), "1 + 10 + 100 + 1000 answers of up to 3 words to 2 prompts"
    expect(logps.exp().sum(-1), [1.0, 1.0], "the listed answers are all there is")
    pairs = [data.Pair(x, y, y) for x in world.prompts for y in world.answers]
    rows = data.encode_pairs(pairs, world.tokenizer, 8, world.K)
    chosen, rejected = dpo.response_logps(model, data.collate(rows, range(len(rows))))
    expect(chosen, logps.flatten(), "enumeration and pair rows disagree", 1e-9)
    expect(rejected, logps.flatten(), "enumeration and pair rows disagree", 1e-9)


def test_toy_labels_follow_bradley_terry():
    world = data.ToyWorld()
    logps = torch.full((3, 2955), -math.log(2955), dtype=torch.float64)
    drawn = world.draw_pairs(logps, 200_000, "hard", torch.Generator().manual_seed(0))
    better = world.rewards[drawn.prompt, drawn.chosen] - world.rewards[drawn.prompt, drawn.rejected]
    for gap in (0.5, 1.0, 2.0):
        near = (better.abs() - gap).abs() < 0.01
        frequency = (better[near] > 0).double().mean()
        noise = 2 / math.sqrt(int(near.sum()))  # 4 standard errors of a coin
        why = f"Eq. 1: of two answers {gap} apart the better one wins with sigma({gap})"
        expect(frequency, 1 / (1 + math.exp(-gap)), why, noise + 0.002)
