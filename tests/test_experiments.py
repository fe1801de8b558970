"""The road that DPO leaves out, and the exact curve: values by hand, by listing, by descent."""

import itertools
import math

import pytest
import torch

import data
import dpo
from experiments import claims, frontier, lab, losses, rlhf
from experiments.lab import WORLD
from model import GPT, load
from tests.helpers import descend, expect, lines_of, run

PLACE = {y: i for i, y in enumerate(WORLD.responses)}


@pytest.fixture(scope="module")
def sft():
    """A small network in place of a trained reference, with its exact table."""
    model = lab.new_gpt(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, lab.listed(model).detach()


# lab.py


def test_a_step_of_the_lab_is_a_step_of_train_py(tmp_path):
    """Away from the reference: a run is resumed from a checkpoint that holds another policy."""
    run(*"--pairs 64 --sft-epochs 0.01 --epochs 1 --save-every 1 --out".split(), tmp_path)
    policy = lab.new_gpt(5)
    generator = torch.Generator().manual_seed(0)
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
    drawn = WORLD.draw_pairs(WORLD.logps(reference), 64, torch.Generator().manual_seed(1))
    rows = WORLD.rows(drawn)
    ref_logps = lab.all_logps(reference, rows)
    optimizer = lab.adamw(policy, line["lr"])
    losses, grad_norm = lab.train_step(
        policy, optimizer, rows, torch.arange(64), ref_logps=ref_logps
    )
    assert line["margin"] > 0.1 or line["margin"] < -0.1, "the policy is the reference"
    expect(losses.mean(), line["loss"], "the loss of lab.train_step (got), of train.py", 1e-5)
    expect(grad_norm / line["grad_norm"], 1.0, "the gradient norm, divided by train.py's", 1e-5)
    ours = optimizer.state_dict()["state"]
    for index, state in ours.items():
        moment = state["exp_avg"]
        why = f"AdamW's first moment of parameter {index}: lab's (got), train.py's"
        expect(moment, theirs[index]["exp_avg"], why, 1e-5 * moment.abs().max().item() + 1e-9)


def test_soft_labels_by_hand(sft):
    """p times the loss of the pair and 1 - p times that of the reversed pair, away from ref."""
    _, ref = sft
    drawn = WORLD.draw_pairs(ref, 50, torch.Generator().manual_seed(0))
    policy = ref + 0.5 * torch.randn(ref.shape, generator=torch.Generator().manual_seed(1))
    losses = lab.soft_preferences(dpo.dpo_loss, drawn, ref, beta=0.5)(policy, torch.arange(50))
    for i, (x, w, l) in enumerate(zip(*(column.tolist() for column in drawn))):
        margin = 0.5 * ((policy - ref)[x, w] - (policy - ref)[x, l])
        p = 1 / (1 + (WORLD.rewards[x, l] - WORLD.rewards[x, w]).exp())  # Eq. 1
        by_hand = p * (1 + (-margin).exp()).log() + (1 - p) * (1 + margin.exp()).log()
        expect(losses[i], by_hand, "soft labels: p L(chosen, rejected) + (1 - p) L(reversed)", 1e-6)


def test_training_through_the_table_is_training_on_rows(sft, monkeypatch):
    """The same losses and the same gradient of every weight as data.collate's rows give; a loss
    gets beta, its own settings and the lengths that it names. The reference stays as it is."""
    model, ref = sft
    drawn = WORLD.draw_pairs(ref, 64, torch.Generator().manual_seed(0))
    start = ref - 0.1 * torch.randn(ref.shape, generator=torch.Generator().manual_seed(1))
    x, both = drawn.prompt, torch.stack([drawn.chosen, drawn.rejected])
    ids, mask = data.collate(WORLD.rows(drawn), range(64))
    four = (*dpo.response_logps(model, ids, mask).chunk(2), *start[x, both].float())
    lengths = mask.sum(1).chunk(2)
    for loss, given, wanted in (
        (dpo.dpo_loss, {"beta": 0.7}, dpo.dpo_loss(*four, beta=0.7).losses),
        (dpo.cdpo_loss, {"epsilon": 0.3}, dpo.cdpo_loss(*four, beta=1.0, epsilon=0.3)),
        (losses.simpo_loss, {"gamma": 0.2}, losses.simpo_loss(*four, *lengths, 1.0, 0.2)),
    ):
        places = torch.arange(63, -1, -1)
        got = lab.preferences(loss, drawn, start, **given)(lab.listed(model), places)
        expect(got, wanted[places], f"{loss.__name__} of the table and of plain rows", 1e-5)
        grads = [torch.autograd.grad(y.mean(), list(model.parameters()), retain_graph=True)
                 for y in (got, wanted)]  # fmt: skip
        for a, b in zip(*grads):
            expect(a, b, "gradients through the table and through plain rows", 1e-5)
    monkeypatch.setattr(lab, "reference", lambda seed: sft)
    for kind in ("network", "table"):
        (_, start), _, (_, end) = lab.train_dpo(0, drawn, steps=2, kind=kind)
        expect(start, ref, "the policy starts as the reference")
        assert not torch.equal(start, end) and torch.equal(lab.listed(model), ref), kind


def test_measure_and_the_listed_responses(sft):
    """lab.measure: ToyWorld's numbers, the mass on 16 grammatical responses, and the entropy."""
    expect(sft[1], WORLD.logps(sft[0]), "listed by prefixes, and one row a response", 1e-4)
    wanted = {"": 1, " good": 2, " not good": 3, " not very good": 3}
    got = {y: lab.LENGTHS[PLACE[y]] for y in wanted}
    assert got == wanted, "words and, below K = 3 of them, the end"
    logps = torch.full((2, 1111), -math.log(1111), dtype=torch.float64)
    logps[1] = -torch.inf
    logps[1, [PLACE[" good"], PLACE[" very not good"]]] = torch.tensor([0.75, 0.25]).double().log()
    both = [lab.measure(logps, logps, 2.0, slice(x, x + 1)) for x in (0, 1)]
    assert [row["grammatical"] for row in both] == pytest.approx([16 / 1111, 0.75])
    coin = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert [row["entropy"] for row in both] == pytest.approx([math.log(1111), coin])
    exact, mean = WORLD.measure(logps, logps, 2.0), lab.measure(logps, logps, 2.0)
    assert mean.items() > exact.items() and mean["kl"] == 0
    assert mean["entropy"] == pytest.approx((math.log(1111) + coin) / 2), "means over the prompts"


def test_agreement_by_hand(monkeypatch):
    assert rlhf.mean_ranks(torch.tensor([5.0, 1.0, 5.0])).tolist() == [2.5, 1.0, 2.5]
    ref = torch.full(WORLD.rewards.shape, -math.log(1111), dtype=torch.float64)
    found = rlhf.agreement(WORLD.rewards * 1.0, ref)
    wanted = {"rank_correlation": 1.0, "pair_accuracy": 1.0, "probability_error": 0.0}
    assert found == pytest.approx(wanted, abs=1e-12), "r* agrees with itself"
    found = rlhf.agreement(-WORLD.rewards, ref)
    assert found["rank_correlation"] == pytest.approx(-1) and found["pair_accuracy"] == 0

    # three responses that the reference draws, with true rewards 2, -2, 0 of the film ("" is 0), in
    # shares 0.5, 0.3, 0.2; the rewards found say 0, 1, 2. Pairs: good > dull is missed (0.15 of
    # 0.31), good > "" missed (0.1), dull < "" right (0.06)
    at = [PLACE[" good"], PLACE[" dull"], PLACE[""]]
    assert WORLD.rewards[0, at].tolist() == [2.0, -2.0, 0.0]
    ref = torch.full_like(WORLD.rewards, -torch.inf)
    ref[:, at] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rewards = torch.zeros_like(WORLD.rewards)
    rewards[:, at] = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr(rlhf.WORLD, "rewards", WORLD.rewards[:1])
    found = rlhf.agreement(rewards[:1], ref[:1])
    expect(found["pair_accuracy"], 0.06 / 0.31, "pairs weighed as pi_ref draws them")

    def sigma(m):
        return 1 / (1 + math.exp(-m))

    apart = 0.15 * (sigma(4) - sigma(-1)) + 0.1 * (sigma(2) - sigma(-2))
    apart += 0.06 * (sigma(2) - sigma(1))
    expect(found["probability_error"], apart / 0.31, "|sigma(r - r') - p|, weighed alike")
    rewards[:, at[1]] = 0.0
    tied = rlhf.agreement(rewards[:1], ref[:1])["pair_accuracy"]
    expect(tied, (0.06 + 0.15 / 2) / 0.31, "a tie counts half")


def test_labels_that_are_always_right_and_flipped_ones(monkeypatch, sft):
    monkeypatch.setattr(lab, "reference", lambda seed: sft)
    clean = lab.draw_pairs(0, 4000, "deterministic")
    assert (lab.true_margins(clean) >= 0).all(), "the higher true reward wins every pair"
    noisy = lab.draw_pairs(0, 4000, "deterministic", flip=0.2)
    exchanged = (noisy.chosen == clean.rejected) & (noisy.rejected == clean.chosen)
    differ = clean.chosen != clean.rejected
    assert exchanged[differ].float().mean().item() == pytest.approx(0.2, abs=0.03)
    other = lab.draw_pairs(0, 4000, "deterministic", stream=2000)
    assert not torch.equal(other.chosen, clean.chosen), "another stream draws other pairs"


def test_the_responses_of_pairs():
    """Prompt 0: 5 beats 7. Prompt 1: 7 beats 9, and 9 beats 9."""
    drawn = data.Drawn(*torch.tensor([[0, 1, 1], [5, 7, 9], [7, 9, 9]]))
    values = torch.arange(2 * 1111).view(2, 1111)
    assert lab.of_pairs(values, drawn).tolist() == [[5, 1118, 1120], [7, 1120, 1120]]
    mentioned = lab.mentioned(drawn)
    assert mentioned.nonzero().tolist() == [[0, 5], [0, 7], [1, 7], [1, 9]]


def test_rows_survive_a_file(tmp_path):
    """Numbers come back as numbers, also where rows have different columns."""
    rows = [{"seed": 0, "run": "DPO", "kl": 0.5}, {"seed": 1, "run": "Eq. 4", "beta": 2.0}]
    lab.save_csv(tmp_path / "rows.csv", rows)
    assert lab.load_csv(tmp_path / "rows.csv") == rows
    assert lab.where(rows, beta=2) == rows[1:] and lab.where(rows, kl=1) == []
    assert lab.values(rows, "kl") == [0.5]


def test_means_and_spreads_over_seeds():
    """Each seed counts once, however many rows it has."""
    rows = [{"seed": 0, "x": 1.0}, {"seed": 0, "x": 3.0}, {"seed": 1, "x": 4.0}]
    assert lab.per_seed(rows, "x") == [2.0, 4.0]
    assert lab.mean(rows, "x") == 3.0
    assert lab.spread(rows, "x") == "3.00 ± 1.41", "the standard deviation of a sample of two"
    assert lab.spread(rows[:2], "x", digits=1) == "2.0"
    wanted = ["| seed | X    |", "| ---- | ---- |", "| 0    | 2.00 |", "| 1    | 4.00 |"]
    assert lab.table(rows, "seed", {"x": "X"}).splitlines() == wanted


# rlhf.py: the reward model


def test_reward_model_reads_the_last_token_of_the_response(sft):
    """The reward of a response: the head at its last token, END where there is one, and never what
    fills the row after it."""
    model = rlhf.Scalar(sft[0])
    torch.nn.init.normal_(model.head.weight)
    for y, ids in ((" good", [4, 10]), (" not very good", [8, 9, 4]), ("", [10])):
        alone = model(torch.tensor([WORLD.prompt_ids[1].tolist() + ids]))[0, -1]
        row = rlhf.score(model, torch.tensor([1]), torch.tensor([PLACE[y]]))[0]
        expect(row.detach(), alone.item(), f"reward of {y!r}", 1e-5)


def test_reward_model_starts_at_log_2_and_learns_eq2(sft):
    """A head of zeros ties every pair; on the same pairs Eq. 2 then ranks by r*."""
    model, ref = sft
    zero = rlhf.score(rlhf.Scalar(model), torch.tensor([0, 1]), torch.tensor([5, 900]))
    loss = dpo.reward_model_loss(zero[:1], zero[1:])
    expect(loss.detach(), [math.log(2)], "Eq. 2 where both rewards are 0", 1e-6)
    drawn = WORLD.draw_pairs(ref, 10_000, torch.Generator().manual_seed(0))
    rewards = rlhf.train_reward_model(model, drawn, epochs=1)
    expect((ref.exp() * rewards).sum(-1), [0.0, 0.0], "E_ref[r_phi], section 3")
    found = rlhf.agreement(rewards, ref)
    assert found["pair_accuracy"] > 0.65, f"Eq. 2 has learnt to rank the wrong way round? {found}"


# rlhf.py: PPO


def test_ppo_loss_counts_what_the_mask_counts(sft):
    """Where the policy is still the old one: -mean A, plus mean return^2 for a critic of zeros."""
    model, _ = sft
    critic, places = rlhf.Scalar(model), torch.tensor([0, 7, 55, 1000])  # of 0, 1, 2, 3 words
    ids = torch.cat([WORLD.prompt_ids[torch.tensor([0, 1, 1, 0])], rlhf.RESPONSES[places]], 1)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    old = rlhf.token_logps(model, ids).detach()
    advantages = torch.where(mask, torch.arange(12.0).view(4, 3), 99.0)  # 0, 3, 4, 6, 7, ..., 11
    returns = torch.where(mask, 2.0, 99.0)
    loss = rlhf.ppo_loss(model, critic, ids, old, advantages, returns, mask, 0.2)
    expect(loss, -58 / 9 + 4, "PPO's loss at the old policy; is the filling after END in it?", 1e-5)
    loss.backward()
    assert critic.head.bias.grad.item() == pytest.approx(-4), "d mean (V - 2)^2 / d V at V = 0"
    assert any(parameter.grad.any() for parameter in model.parameters()), "no slope for the policy"
    model.zero_grad()


def test_place_of_finds_every_response():
    places = rlhf.place_of(rlhf.RESPONSES)
    assert places.tolist() == list(range(len(WORLD.responses))), "tokens -> place in the listing"


def test_gae_by_hand():
    """One response of two tokens (a third is filling) and one of three."""
    rewards = torch.tensor([[0.5, 2.0, 9.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[1.0, 0.4, 7.0], [0.2, 0.3, 0.4]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages, returns = rlhf.gae(rewards, values, mask, lam=0.5)
    # row 1: delta_2 = 2 - 0.4 = 1.6, delta_1 = 0.5 + 0.4 - 1 = -0.1; A_1 = -0.1 + 0.5 * 1.6
    # row 2: deltas 0.1, 0.1, 0.6: A_3 = 0.6, A_2 = 0.1 + 0.3 = 0.4, A_1 = 0.1 + 0.2 = 0.3
    expect(advantages, [[0.7, 1.6, 0.0], [0.3, 0.4, 0.6]], "advantages, GAE's Eq. 16", 1e-6)
    expect(returns[mask], [1.7, 2.0, 0.5, 0.7, 1.0], "returns, A + V", 1e-6)
    plain, _ = rlhf.gae(rewards, values, mask, lam=1.0)
    expect(plain[:, 0], [2.5 - 1.0, 1.0 - 0.2], "at lambda 1: the reward to come, minus V", 1e-6)
    one_step, _ = rlhf.gae(rewards, values, mask, lam=0.0)
    expect(one_step[mask], [-0.1, 1.6, 0.1, 0.1, 0.6], "at lambda 0: delta alone", 1e-6)


def test_ppo_clips_on_the_side_that_the_advantage_asks_for():
    """Arxiv 1707.06347, Eq. 7 and its Figure 1, at ratios 0.5, 1.1 and 1.5 with clip 0.2."""
    ratios = torch.tensor([0.5, 1.1, 1.5], dtype=torch.float64)
    for sign, losses, slopes in (
        (1.0, [-0.5, -1.1, -1.2], [-0.5, -1.1, 0.0]),  # better: no more once above 1.2
        (-1.0, [0.8, 1.1, 1.5], [0.0, 1.1, 1.5]),  # worse: no less once below 0.8
    ):
        logps = ratios.log().requires_grad_()
        loss = rlhf.clipped_loss(logps, torch.zeros(3), torch.full((3,), sign), 0.2)
        expect(loss.detach(), losses, f"clipped loss, advantage {sign}")
        (slope,) = torch.autograd.grad(loss.sum(), logps)
        expect(slope, slopes, f"its slope in log pi, advantage {sign}: 0 beyond the clip")


def test_token_rewards_add_up_to_section_3s_reward(sft):
    """r - beta (log pi - log pi_ref) of the whole response; what follows it counts 0."""
    model, ref = sft
    other = lab.new_gpt(3)
    x, y = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 7, 55, 1000])
    ids = torch.cat([WORLD.prompt_ids[x], rlhf.RESPONSES[y]], 1)
    mask = torch.arange(WORLD.K) < rlhf.LENGTHS[y, None]
    with torch.no_grad():
        logps, of_ref = rlhf.token_logps(other, ids), rlhf.token_logps(model, ids)
        table = lab.listed(other)
        expect((logps * mask).sum(1), table[x, y], "token log-probs against the listed ones", 1e-5)
        got = rlhf.token_rewards(WORLD.rewards[x, y].float(), logps, of_ref, mask, 0.3)
    wanted = WORLD.rewards[x, y] - 0.3 * (table - ref)[x, y]
    expect(got.sum(1), wanted, "sum over tokens", 1e-5)
    assert (got[~mask] == 0).all()


def test_ppo_climbs_eq3_and_holds_a_target_kl(sft):
    """On the true rewards J rises well above the start; a low target keeps KL near it."""
    model, ref = sft
    kept = [parameter.clone() for parameter in model.parameters()]
    *_, (_, free) = rlhf.ppo(model, WORLD.rewards, 0, samples=20 * 512)
    start, end = lab.measure(ref, ref), lab.measure(free, ref)
    best = lab.measure(dpo.optimal_policy(ref, WORLD.rewards, 1.0)[0], ref)
    gained = (end["objective"] - start["objective"]) / (best["objective"] - start["objective"])
    assert 0.3 < gained <= 1, f"PPO on r* gained {gained:.0%} of what pi* of Eq. 4 gains"
    assert rlhf.next_beta(2.0, 0.3, 0.3) == 2.0, "KL on its target: beta stays"
    expect(rlhf.next_beta(2.0, 0.33, 0.3), 2.02, "10% above the target: beta 1% up")
    expect(rlhf.next_beta(2.0, 9.0, 0.3), 2.04, "far above: 2%, no more")
    expect(rlhf.next_beta(2.0, 0.0, 0.3), 1.96, "far below: 2% down, no more")
    *_, (_, held) = rlhf.ppo(model, WORLD.rewards, 0, target_kl=0.2, samples=20 * 512)
    assert lab.measure(held, ref)["kl"] < 0.9 * end["kl"], "the adaptive beta holds KL down"
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters())), "reference moved"


# claims.py


def test_leak_says_where_all_the_mass_is_and_draws_from_the_policy(monkeypatch, sft):
    """Three kinds of responses share the mass; each round draws from the policy as it then is."""
    monkeypatch.setattr(claims, "sft", lambda *_: sft[0])
    seen_by, draw_pairs = [], WORLD.draw_pairs

    def spy(logps, *rest):
        seen_by.append(logps)
        return draw_pairs(logps, *rest)

    monkeypatch.setattr(WORLD, "draw_pairs", spy)
    settings = dict(slip=0.0, pairs=2048, lr=1e-2, sft_weight=0.0, rounds=2)
    rows = list(claims.leak(WORLD, 0, 20_480, **settings))
    first, end = rows[0], rows[-1]
    assert (first["margin"], first["accuracy"], first["gap_closed"]) == (0, 0.5, 0), "the reference"
    assert end["pairs_seen"] == 20_480 and end["accuracy"] > 0.6 and end["gap_closed"] != 0
    for row in rows:
        total = row["grammatical"] + row["other_paired"] + row["in_no_pair"]
        assert total == pytest.approx(1, abs=1e-6), row
    assert 0.05 < first["other_paired"] < 0.95, "responses that the first 1,024 pairs mention"
    grammatical = sft[1].exp()[:, WORLD.grammatical].sum(-1).mean()
    expect(first["grammatical"], grammatical, "mass of the reference on [not] [very] opinion", 1e-6)
    assert len(seen_by) == 2 and torch.allclose(seen_by[0], sft[1], atol=1e-4), "the reference"
    assert dpo.kl_divergence(seen_by[1], seen_by[0]).min() > 0.01, "then from the trained policy"


# frontier.py


def test_best_of_n_is_the_law_of_the_best_of_n_draws():
    """Every tuple of n draws listed: the best wins, equal best share."""
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    rewards = torch.tensor([1.0, -2.0, 1.0, 0.0]).double()  # the first and third are equal
    for n in (1, 2, 3, 5):
        law = torch.zeros(4).double()
        for draws in itertools.product(range(4), repeat=n):
            chance = math.prod(probs[i].item() for i in draws)
            best = [i for i in draws if rewards[i] == max(rewards[j] for j in draws)]
            for i in best:
                law[i] += chance / len(best)
        got = frontier.best_of_n(probs.log(), rewards, n)
        expect(got.exp(), law, f"Best-of-{n}: F^n - F(r-)^n", 1e-12)
        kl = dpo.kl_divergence(got, probs.log()).item()
        assert kl <= math.log(n) - (n - 1) / n + 1e-12, "its known bound"


def test_closed_forms_of_preferred_ft_and_unlikelihood():
    """The minimum of the population loss, found by descent, and its threshold."""
    ref = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64)
    p = (rewards[:, None] - rewards).sigmoid() * ref.exp()[:, None] * ref.exp() * 2  # y beats y'
    won, lost = p.sum(1), p.sum(0)
    threshold = frontier.unlikelihood_optimum(ref, rewards, "hard")[1]
    expect(threshold, (won / lost).min(), "alpha up to which unlikelihood has a minimum", 1e-12)
    for alpha in (0.0, threshold / 2):
        found = descend(lambda pi: (alpha * lost * pi - won * pi).sum(), ref)
        got, _ = frontier.unlikelihood_optimum(ref, rewards, "hard", alpha)
        expect(got, found, f"alpha {alpha:.3f}", 1e-7)


def test_preferred_ft_with_deterministic_labels_is_best_of_2(sft):
    ref, rewards = sft[1][0], WORLD.rewards[0]
    preferred, _ = frontier.unlikelihood_optimum(ref, rewards, "deterministic")
    expect(preferred, frontier.best_of_n(ref, rewards, 2), "2 pi_ref s = best of 2", 1e-9)


def test_nothing_lies_above_the_exact_curve_and_the_check_can_fail(sft):
    _, ref = sft
    curve = frontier.frontier(ref)
    noise = torch.randn(30, *ref.shape, generator=torch.Generator().manual_seed(0)).double()
    optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, 0.5)
    for policy in [ref, *(optimum + 0.5 * noise).log_softmax(-1)]:
        found = lab.measure(policy, ref)
        assert frontier.height(found["kl"], found["expected_reward"], curve) <= 1e-9
    on = lab.measure(dpo.optimal_policy(ref, WORLD.rewards, frontier.SWEEP[150])[0], ref)
    assert abs(frontier.height(on["kl"], on["expected_reward"], curve)) < 1e-9, "on the curve"
    above = frontier.height(on["kl"], on["expected_reward"] + 0.01, curve)
    assert above == pytest.approx(0.01, abs=1e-6), "a point 0.01 above must be seen as such"


def test_reached_tosses_coins_between_policies():
    points = [(0.0, 0.0), (1.0, 2.0), (2.0, 1.0), (3.0, 3.0)]
    assert frontier.reached(points, 1.0) == 2.0
    assert frontier.reached(points, 0.5) == 1.0, "half of SFT, half of (1, 2)"
    assert frontier.reached(points, 2.0) == 2.5, "half of (1, 2), half of (3, 3)"
    assert frontier.reached(points, 9.0) == 3.0
