"""The road that DPO leaves out, and the exact curve: values by hand, by listing, by descent."""

import itertools
import math

import pytest
import torch

import data
import dpo
from experiments import frontier, lab, losses, rlhf
from experiments.lab import WORLD
from model import GPT, load
from tests.helpers import descend, expect, lines_of, run

f64 = torch.float64
PLACE = {y: i for i, y in enumerate(WORLD.responses)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def doubles(values):
    return torch.tensor(values, dtype=f64)


def optimum_of_eq4(ref, beta):
    logps, _ = dpo.optimal_policy(ref, WORLD.rewards, beta)
    return logps


def p_wins(x, y, other):
    """Eq. 1 on the true rewards: how often response y to prompt x beats the other one."""
    margin = WORLD.rewards[x, y] - WORLD.rewards[x, other]
    return sigma(margin.item())


def uniform():
    """log pi(y|x) where all responses are alike: (2, 1111)."""
    return torch.full((2, 1111), -math.log(1111), dtype=f64)


@pytest.fixture(scope="module")
def model():
    """A small network in place of a trained reference."""
    model = lab.new_gpt(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def ref(model):
    """Its exact table, (2, 1111)."""
    return lab.listed(model).detach()


@pytest.fixture
def reference(model, ref, monkeypatch):
    """lab.reference gives this network and its table, whatever the seed."""
    monkeypatch.setattr(lab, "reference", lambda seed: (model, ref))


# lab.py


def test_a_step_of_the_lab_is_a_step_of_train_py(tmp_path):
    """Away from the reference: a run is resumed from a checkpoint that holds another policy."""
    flags = "--pairs 64 --sft-epochs 0.01 --epochs 1 --save-every 1 --out".split()
    run(*flags, tmp_path)
    policy = lab.new_gpt(5)
    generator = seeded(0)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    checkpoint = load(tmp_path / "checkpoint.pt")
    checkpoint["step"] = 0
    checkpoint["model"] = policy.state_dict()
    checkpoint["optimizer"]["state"] = {}
    checkpoint["history"] = checkpoint["history"][:1]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    run("--resume", "--out", tmp_path)
    line = lines_of(tmp_path)[-1]
    theirs = load(tmp_path / "checkpoint.pt")["optimizer"]["state"]

    reference = GPT.from_pretrained(tmp_path / "reference")
    drawn = WORLD.draw_pairs(WORLD.logps(reference), 64, seeded(1))
    rows = WORLD.rows(drawn)
    ref_logps = lab.all_logps(reference, rows)
    optimizer = lab.adamw(policy, line["lr"])
    ids = torch.arange(64)
    losses, grad_norm = lab.train_step(policy, optimizer, rows, ids, ref_logps=ref_logps)
    assert abs(line["margin"]) > 0.1, "the policy is the reference, so nothing is shown"
    expect(losses.mean(), line["loss"], "the loss of lab.train_step (got), of train.py", 1e-5)
    expect(grad_norm / line["grad_norm"], 1.0, "the gradient norm, divided by train.py's", 1e-5)
    ours = optimizer.state_dict()["state"]
    for index, state in ours.items():
        moment = state["exp_avg"]
        tolerance = 1e-5 * moment.abs().max().item() + 1e-9
        why = f"AdamW's first moment of parameter {index}: lab's (got), train.py's"
        expect(moment, theirs[index]["exp_avg"], why, tolerance)


def test_soft_labels_by_hand(ref):
    """p times the loss of the pair and 1 - p times that of the reversed pair, away from ref."""
    drawn = WORLD.draw_pairs(ref, 50, seeded(0))
    policy = ref + 0.5 * torch.randn(ref.shape, generator=seeded(1))
    losses_of = lab.soft_preferences(dpo.dpo_loss, drawn, ref, beta=0.5)
    got = losses_of(policy, torch.arange(50))
    rewards = 0.5 * (policy - ref)  # (5)
    for i in range(50):
        x = drawn.prompt[i]
        w = drawn.chosen[i]
        l = drawn.rejected[i]
        margin = rewards[x, w] - rewards[x, l]
        p = p_wins(x, w, l)
        if_chosen_wins = torch.log1p((-margin).exp())
        if_rejected_wins = torch.log1p(margin.exp())
        by_hand = p * if_chosen_wins + (1 - p) * if_rejected_wins
        expect(got[i], by_hand, "soft labels: p L(chosen, rejected) + (1 - p) L(reversed)", 1e-6)


THROUGH_THE_TABLE = [  # a loss, the settings it is given, and all of them
    (dpo.dpo_loss, {"beta": 0.7}, {"beta": 0.7}),
    (dpo.cdpo_loss, {"epsilon": 0.3}, {"beta": 1.0, "epsilon": 0.3}),
    (losses.simpo_loss, {"gamma": 0.2}, {"beta": 1.0, "gamma": 0.2}),  # and the lengths
]


@pytest.mark.parametrize("loss, given, settings", THROUGH_THE_TABLE)
def test_training_through_the_table_is_training_on_rows(loss, given, settings, model, ref):
    """The same losses and the same gradient of every weight as data.collate's rows give; a loss
    gets beta, its own settings and the lengths that it names."""
    drawn = WORLD.draw_pairs(ref, 64, seeded(0))
    start = ref - 0.1 * torch.randn(ref.shape, generator=seeded(1))
    places = torch.arange(63, -1, -1)
    losses_of = lab.preferences(loss, drawn, start, **given)
    got = losses_of(lab.listed(model), places)

    ids, mask = data.collate(WORLD.rows(drawn), range(64))
    policy_chosen, policy_rejected = dpo.response_logps(model, ids, mask).chunk(2)
    ref_chosen = start[drawn.prompt, drawn.chosen].float()
    ref_rejected = start[drawn.prompt, drawn.rejected].float()
    if loss is losses.simpo_loss:
        chosen_lengths, rejected_lengths = mask.sum(1).chunk(2)
        settings = settings | {"chosen_lengths": chosen_lengths}
        settings["rejected_lengths"] = rejected_lengths
    wanted = loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, **settings)
    wanted = getattr(wanted, "losses", wanted)[places]
    expect(got, wanted, f"{loss.__name__} through the table (got) and on plain rows", 1e-5)

    weights = list(model.parameters())
    got = torch.autograd.grad(got.mean(), weights)
    wanted = torch.autograd.grad(wanted.mean(), weights)
    for one, other in zip(got, wanted):
        expect(one, other, "the gradient through the table (got) and on plain rows", 1e-5)


@pytest.mark.parametrize("kind", ["network", "table"])
def test_training_begins_at_the_reference_and_leaves_it(kind, model, ref, reference):
    drawn = WORLD.draw_pairs(ref, 64, seeded(0))
    (_, start), _, (_, end) = lab.train_dpo(0, drawn, steps=2, kind=kind)
    expect(start, ref, f"the policy of a {kind} starts as the reference")
    assert not torch.equal(start, end), f"the policy of a {kind} does not move"
    assert torch.equal(lab.listed(model), ref), "the reference was trained: it must be a copy"


def test_listed_responses(model, ref):
    expect(ref, WORLD.logps(model), "listed by prefixes (got), and one row a response", 1e-4)
    lengths = {"": 1, " good": 2, " not good": 3, " not very good": 3}
    for response, length in lengths.items():
        got = lab.LENGTHS[PLACE[response]]
        assert got == length, f"{response!r}: words and, below K = 3 of them, the end"


def test_measure_by_hand():
    """ToyWorld's numbers, the mass on 16 grammatical responses, and the entropy. Prompt 0: all
    responses alike. Prompt 1: two alone, one of which is no grammatical response."""
    logps = uniform()
    logps[1] = -torch.inf
    logps[1, PLACE[" good"]] = math.log(0.75)
    logps[1, PLACE[" very not good"]] = math.log(0.25)
    coin = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    alike = lab.measure(logps, logps, 2.0, slice(0, 1))
    assert alike["grammatical"] == pytest.approx(16 / 1111)
    assert alike["entropy"] == pytest.approx(math.log(1111))
    two = lab.measure(logps, logps, 2.0, slice(1, 2))
    assert two["grammatical"] == pytest.approx(0.75)
    assert two["entropy"] == pytest.approx(coin)

    both = lab.measure(logps, logps, 2.0)
    mean = (math.log(1111) + coin) / 2
    assert both["entropy"] == pytest.approx(mean), "the mean over the prompts"
    assert both["kl"] == 0
    assert both.items() > WORLD.measure(logps, logps, 2.0).items(), "and the world's own numbers"


def test_labels_that_are_always_right_and_flipped_ones(reference):
    clean = lab.draw_pairs(0, 4000, "deterministic")
    won = WORLD.rewards[clean.prompt, clean.chosen]
    lost = WORLD.rewards[clean.prompt, clean.rejected]
    assert (won >= lost).all(), "without flips the higher true reward wins every pair"

    noisy = lab.draw_pairs(0, 4000, "deterministic", flip=0.2)
    exchanged = (noisy.chosen == clean.rejected) & (noisy.rejected == clean.chosen)
    differ = clean.chosen != clean.rejected
    flipped = exchanged[differ].float().mean().item()
    assert flipped == pytest.approx(0.2, abs=0.03), "a fifth of the labels is flipped"

    other = lab.draw_pairs(0, 4000, "deterministic", stream=2000)
    assert not torch.equal(other.chosen, clean.chosen), "another stream draws other pairs"


def test_the_responses_of_pairs():
    """Prompt 0: 5 beats 7. Prompt 1: 7 beats 9, and 9 beats 9."""
    drawn = data.Drawn(
        prompt=torch.tensor([0, 1, 1]),
        chosen=torch.tensor([5, 7, 9]),
        rejected=torch.tensor([7, 9, 9]),
    )
    values = torch.arange(2 * 1111).view(2, 1111)
    assert lab.of_pairs(values, drawn).tolist() == [[5, 1118, 1120], [7, 1120, 1120]]
    mentioned = lab.mentioned(drawn)
    assert mentioned.nonzero().tolist() == [[0, 5], [0, 7], [1, 7], [1, 9]]


def test_rows_survive_a_file(tmp_path):
    """Numbers come back as numbers, also where rows have different columns."""
    rows = [{"seed": 0, "run": "DPO", "kl": 0.5}, {"seed": 1, "run": "Eq. 4", "beta": 2.0}]
    lab.save_csv(tmp_path / "rows.csv", rows)
    assert lab.load_csv(tmp_path / "rows.csv") == rows
    assert lab.where(rows, beta=2) == rows[1:]
    assert lab.where(rows, kl=1) == []
    assert lab.values(rows, "kl") == [0.5]


def test_means_and_spreads_over_seeds():
    """Each seed counts once, however many rows it has."""
    rows = [{"seed": 0, "x": 1.0}, {"seed": 0, "x": 3.0}, {"seed": 1, "x": 4.0}]
    assert lab.per_seed(rows, "x") == [2.0, 4.0]
    assert lab.mean(rows, "x") == 3.0
    assert lab.spread(rows, "x") == "3.00 ± 1.41", "the standard deviation of a sample of two"
    assert lab.spread(rows[:2], "x", digits=1) == "2.0"


# rlhf.py: the reward model


@pytest.mark.parametrize(
    "response, ids", [(" good", [4, 10]), (" not very good", [8, 9, 4]), ("", [10])]
)
def test_reward_model_reads_the_last_token_of_the_response(response, ids, model):
    """The reward of a response: the head at its last token, END where there is one, and never what
    fills the row after it."""
    reward_model = rlhf.Scalar(model)
    torch.nn.init.normal_(reward_model.head.weight)
    prompt = WORLD.prompt_ids[1].tolist()
    alone = reward_model(torch.tensor([prompt + ids]))[0, -1]
    x = torch.tensor([1])
    y = torch.tensor([PLACE[response]])
    [reward] = rlhf.score(reward_model, x, y)
    expect(reward, alone.item(), f"the reward of {response!r}: read at its last token", 1e-5)


def test_reward_model_starts_at_log_2_and_learns_eq2(model, ref):
    """A head of zeros ties every pair; on the same pairs Eq. 2 then ranks by r*."""
    x = torch.tensor([0, 1])
    y = torch.tensor([5, 900])
    first, second = rlhf.score(rlhf.Scalar(model), x, y).chunk(2)
    loss = dpo.reward_model_loss(first, second)
    expect(loss, [math.log(2)], "Eq. 2 where both rewards are 0", 1e-6)
    drawn = WORLD.draw_pairs(ref, 10_000, seeded(0))
    rewards = rlhf.train_reward_model(model, drawn, epochs=1)
    expect((ref.exp() * rewards).sum(-1), [0.0, 0.0], "E_ref[r_phi], section 3")
    fresh = WORLD.draw_pairs(ref, 10_000, torch.Generator().manual_seed(1))
    learned = lab.of_pairs(rewards, fresh)
    true = lab.of_pairs(WORLD.rewards, fresh)
    product = (learned[0] - learned[1]) * (true[0] - true[1])
    right = (product > 0).sum() / (product != 0).sum()
    assert right > 0.65, f"Eq. 2 ranks {right:.0%} of the pairs as r* does: the wrong way round?"


# rlhf.py: PPO


# Responses of 0, 1, 2 and 3 words, to either prompt, and the tokens of each that count
X = torch.tensor([0, 1, 1, 0])
Y = torch.tensor([0, 7, 55, 1000])
IDS = torch.cat([WORLD.prompt_ids[X], rlhf.RESPONSES[Y]], 1)
MASK = torch.tensor(
    [
        [True, False, False],  # END alone
        [True, True, False],  # a word and END
        [True, True, True],  # two words and END
        [True, True, True],  # three words, and no END
    ]
)


def test_ppo_loss_counts_what_the_mask_counts(model):
    """Where the policy is still the old one: -mean A, plus mean return^2 for a critic of zeros."""
    critic = rlhf.Scalar(model)
    old = rlhf.token_logps(model, IDS).detach()
    every = torch.arange(12.0).view(4, 3)
    advantages = torch.where(MASK, every, 99.0)  # 0, 3, 4, and 6 to 11: 58 in all
    returns = torch.where(MASK, 2.0, 99.0)
    loss = rlhf.ppo_loss(model, critic, IDS, old, advantages, returns, MASK, clip=0.2)
    expect(loss, -58 / 9 + 4, "PPO's loss at the old policy; is the filling after END in it?", 1e-5)
    loss.backward()
    assert critic.head.bias.grad.item() == pytest.approx(-4), "d mean (V - 2)^2 / d V at V = 0"
    slopes = [parameter.grad.any() for parameter in model.parameters()]
    assert any(slopes), "PPO's loss has no slope for the policy"
    model.zero_grad()


def test_number_of_finds_every_response():
    numbers = rlhf.number_of(rlhf.RESPONSES)
    assert numbers.tolist() == list(range(len(WORLD.responses))), "tokens -> index of the response"


def test_gae_by_hand():
    """One response of two tokens (a third is filling) and one of three.

    Row 1: delta_2 = 2 - 0.4 = 1.6, delta_1 = 0.5 + 0.4 - 1 = -0.1; A_1 = -0.1 + 0.5 * 1.6.
    Row 2: deltas 0.1, 0.1, 0.6: A_3 = 0.6, A_2 = 0.1 + 0.3 = 0.4, A_1 = 0.1 + 0.2 = 0.3.
    """
    mask = MASK[1:3]
    rewards = torch.tensor([[0.5, 2.0, 9.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[1.0, 0.4, 7.0], [0.2, 0.3, 0.4]])
    advantages, returns = rlhf.gae(rewards, values, mask, lam=0.5)
    expect(advantages, [[0.7, 1.6, 0.0], [0.3, 0.4, 0.6]], "advantages, GAE's Eq. 16", 1e-6)
    expect(returns[mask], [1.7, 2.0, 0.5, 0.7, 1.0], "returns, A + V", 1e-6)
    plain, _ = rlhf.gae(rewards, values, mask, lam=1.0)
    why = "GAE at lambda 1: the reward to come, minus V"
    expect(plain[:, 0], [2.5 - 1.0, 1.0 - 0.2], why, 1e-6)


CLIPPED = [  # the sign of the advantage; losses and their slopes at ratios 0.5, 1.1 and 1.5
    (1.0, [-0.5, -1.1, -1.2], [-0.5, -1.1, 0.0]),  # better: no more once above 1.2
    (-1.0, [0.8, 1.1, 1.5], [0.0, 1.1, 1.5]),  # worse: no less once below 0.8
]


@pytest.mark.parametrize("sign, losses, slopes", CLIPPED)
def test_ppo_clips_on_the_side_that_the_advantage_asks_for(sign, losses, slopes):
    """Arxiv 1707.06347, Eq. 7 and its Figure 1, with clip 0.2."""
    ratios = doubles([0.5, 1.1, 1.5])
    logps = ratios.log().requires_grad_()
    old_logps = torch.zeros(3)
    advantages = torch.full((3,), sign)
    loss = rlhf.clipped_loss(logps, old_logps, advantages, 0.2)
    expect(loss, losses, f"clipped loss, advantage {sign}")
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    expect(slope, slopes, f"its slope in log pi, advantage {sign}: 0 beyond the clip")


@torch.no_grad()
def test_token_rewards_add_up_to_section_3s_reward(model, ref):
    """r - beta (log pi - log pi_ref) of the whole response; what follows it counts 0."""
    policy = lab.new_gpt(3)
    table = lab.listed(policy)
    logps = rlhf.token_logps(policy, IDS)
    ref_logps = rlhf.token_logps(model, IDS)
    total = (logps * MASK).sum(1)
    expect(total, table[X, Y], "log-probs of tokens (got) add up to the listed one", 1e-5)
    true = WORLD.rewards[X, Y]
    got = rlhf.token_rewards(true.float(), logps, ref_logps, MASK, 0.3)
    wanted = true - 0.3 * (table - ref)[X, Y]
    expect(got.sum(1), wanted, "section 3's reward is the sum of those of the tokens", 1e-5)
    expect(got[~MASK], torch.zeros(3), "what fills the row after END earns nothing")


def after_ppo(model, ref, **settings):
    """lab.measure of the policy that PPO on the true rewards ends in."""
    *_, last = rlhf.ppo(model, WORLD.rewards, 0, samples=20 * 512, **settings)
    _, logps = last
    return lab.measure(logps, ref)


def test_ppo_climbs_eq3_and_holds_a_target_kl(model, ref):
    """On the true rewards J rises well above the start; a low target keeps KL near it."""
    before = [parameter.clone() for parameter in model.parameters()]
    free = after_ppo(model, ref)
    start = lab.measure(ref, ref)["objective"]
    best = lab.measure(optimum_of_eq4(ref, 1.0), ref)["objective"]
    gained = (free["objective"] - start) / (best - start)
    assert 0.3 < gained <= 1, f"PPO on r* gained {gained:.0%} of what pi* of Eq. 4 gains"
    held = after_ppo(model, ref, target_kl=0.2)
    assert held["kl"] < 0.9 * free["kl"], "the adaptive beta must hold KL down"
    for parameter, weight in zip(model.parameters(), before):
        assert torch.equal(parameter, weight), "PPO has trained the reference itself"


def test_next_beta_by_hand():
    expect(rlhf.next_beta(2.0, 0.3, 0.3), 2.0, "KL on its target: beta stays")
    expect(rlhf.next_beta(2.0, 0.33, 0.3), 2.02, "10% above the target: beta 1% up")
    expect(rlhf.next_beta(2.0, 9.0, 0.3), 2.04, "far above: 2%, no more")
    expect(rlhf.next_beta(2.0, 0.0, 0.3), 1.96, "far below: 2% down, no more")


# frontier.py


def by_listing_draws(probs, rewards, n):
    """The law of the best of n draws: every tuple of them listed, equal best share."""
    law = torch.zeros_like(probs)
    for draws in itertools.product(range(len(probs)), repeat=n):
        draws = list(draws)
        highest = rewards[draws].max()
        best = [i for i in draws if rewards[i] == highest]
        for i in best:
            law[i] += probs[draws].prod() / len(best)
    return law


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_law_of_the_best_of_n_draws(n):
    probs = doubles([0.1, 0.4, 0.2, 0.3])
    rewards = doubles([1.0, -2.0, 1.0, 0.0])  # the first and third are equal
    got = frontier.best_of_n(probs.log(), rewards, n)
    law = by_listing_draws(probs, rewards, n)
    expect(got.exp(), law, f"Best-of-{n}: F^n - F(r-)^n")


@pytest.mark.parametrize("labels", ["hard", "deterministic"])
def test_preferred_ft_minimises_the_loss_of_infinitely_many_pairs(labels):
    """-log pi(chosen), averaged over all pairs one by one; the minimum is found by descent."""
    probs = [0.1, 0.4, 0.3, 0.2]
    rewards = [1.0, -0.5, 0.3, 0.3]  # the last two are equal
    won = torch.zeros(4, dtype=torch.float64)  # how often each response is the chosen one
    for y, z in itertools.product(range(4), range(4)):
        p = 1 / (1 + math.exp(rewards[z] - rewards[y]))  # (1)
        if labels == "deterministic" and rewards[y] != rewards[z]:
            p = float(rewards[y] > rewards[z])
        won[y] += probs[y] * probs[z] * p
        won[z] += probs[y] * probs[z] * (1 - p)
    ref = torch.tensor(probs, dtype=torch.float64).log()
    found = descend(lambda logps: -(won * logps).sum(), ref)
    got = frontier.preferred_ft(ref, torch.tensor(rewards).double(), labels)
    expect(got, found, "Preferred-FT: 2 pi_ref(y) s(y)", 1e-7)


def test_preferred_ft_with_deterministic_labels_is_best_of_2(ref):
    rewards = WORLD.rewards[0]
    preferred = frontier.preferred_ft(ref[0], rewards, "deterministic")
    expect(preferred, frontier.best_of_n(ref[0], rewards, 2), "2 pi_ref s = best of 2", 1e-9)


def test_nothing_lies_above_the_exact_curve_and_the_check_can_fail(ref):
    curve = frontier.frontier(ref)

    def height(policy, more=0.0):
        found = lab.measure(policy, ref)
        return frontier.height(found["kl"], found["expected_reward"] + more, curve)

    noise = torch.randn(30, *ref.shape, generator=seeded(0))
    policies = (optimum_of_eq4(ref, 0.5) + 0.5 * noise).log_softmax(-1)
    for policy in (ref, *policies):
        assert height(policy) <= 1e-9, "Eq. 14: no policy lies above the curve"
    beta = frontier.CURVE_BETAS[150]
    on_the_curve = optimum_of_eq4(ref, beta)
    assert abs(height(on_the_curve)) < 1e-9, "pi* of Eq. 4 lies on the curve"
    above = height(on_the_curve, more=0.01)
    assert above == pytest.approx(0.01, abs=1e-6), "a point 0.01 above must be seen as such"


def test_reached_tosses_coins_between_policies():
    points = [(0.0, 0.0), (1.0, 2.0), (2.0, 1.0), (3.0, 3.0)]
    assert frontier.reached(points, 1.0) == 2.0
    assert frontier.reached(points, 0.5) == 1.0, "half of SFT, half of (1, 2)"
    assert frontier.reached(points, 2.0) == 2.5, "half of (1, 2), half of (3, 3)"
    assert frontier.reached(points, 9.0) == 3.0


def test_a_run_is_looked_at_more_often_in_its_first_steps(ref, reference, monkeypatch):
    """Of 128 steps those at 128, 90.5, 64, 45.3, 32 ... 2, 1.4, each rounded."""
    better, _ = dpo.optimal_policy(ref, WORLD.rewards, 1.0)
    run = [("anything", ref)] * 128 + [("anything", better)]
    who = {"seed": 0, "method": "DPO"}
    rows = frontier.looks_at(run, 128, who)
    steps = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128]
    assert [row["step"] for row in rows] == steps
    assert [row["kl"] for row in rows[:-1]] == [0.0] * 13, "the reference itself"
    gained = ((better.exp() - ref.exp()) * WORLD.rewards).sum(-1).mean()
    got = rows[-1]["expected_reward"] - rows[0]["expected_reward"]
    expect(got, gained, "E[r*] of the last policy minus that of the reference", 1e-9)
    monkeypatch.setattr(frontier, "height", lambda *_: 0.01)
    with pytest.raises(AssertionError, match="above the exact curve"):
        frontier.looks_at(run, 128, who)


def test_ppo_gt_sees_the_true_reward_and_ppo_the_learned_one(reference, monkeypatch):
    given = []

    def ppo(sft, rewards, seed, target_kl, samples):
        given.append((rewards, target_kl))
        yield 0, lab.listed(sft).detach()

    learned = torch.zeros_like(WORLD.rewards)
    monkeypatch.setattr(rlhf, "ppo", ppo)
    monkeypatch.setattr(rlhf, "train_reward_model", lambda *_: learned)
    monkeypatch.setattr(frontier, "TARGET_KLS", [2.0])
    frontier.ppo_rows(0, "any", 512, 1)
    frontier.ppo_rows(0, "hard", 512, 1)
    (true, true_target), (scored, scored_target) = given
    assert true is WORLD.rewards
    assert scored is learned
    assert true_target == scored_target == 2.0
