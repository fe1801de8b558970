"""The questions in experiments/: their form, the answers in README, what they measure."""

import math
import sys
from concurrent.futures import Future

import pytest
import torch
from matplotlib.figure import Figure

import data
import dpo
from experiments import lab, rlhf
from experiments.lab import WORLD
from experiments.losses import unlikelihood_loss
from experiments.questions import __main__ as runner
from experiments.questions import coverage, displacement, kl_penalty, label_noise
from experiments.questions import other_losses, over_optimisation, overfitting, ppo
from experiments.questions import reward_model, sft_first, stuck, tuning
from tests.helpers import expect

NAMES = runner.names()


OTHERWISE = {  # what would have to be measured for the other answer
    "overfitting": lambda row: {"held_out_accuracy": row["own_accuracy"]},
    "kl_penalty": lambda row: {"kl": row.get("beta", 1)},
    "over_optimisation": lambda row: {"expected_reward": row["kl"]},
    "ppo": lambda row: {"expected_reward": float(row["method"] == "DPO")},
    "tuning": lambda row: {"gap_closed": 1.0 if row["method"] == "DPO" else row["lr"]},
    "reward_model": lambda row: {"accuracy": 0.9},
    "weight": lambda row: {"objective": 1.0},
}


@pytest.fixture
def sft(monkeypatch):
    """A small network in place of a trained reference, with its exact table."""
    model = lab.new_gpt(0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    found = model, lab.listed(model).detach()
    monkeypatch.setattr(lab, "reference", lambda seed: found)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_question_is_asked_answered_and_drawn(name):
    question = runner.load(name)
    assert runner.asked(question).endswith("?")
    assert "\nFound: " in question.__doc__
    seconds = getattr(question, "PARTS", None) or {"": question.SECONDS}
    assert min(seconds.values()) > 0
    if not (lab.ASSETS / f"{name}.csv").exists():
        return
    rows = lab.saved(name)
    assert lab.values(rows, "seed") == [0, 1, 2, 3, 4]
    answer = question.verdict(rows)
    assert "±" in answer and "|" not in answer and "\n" not in answer
    figure = question.draw(rows)
    assert "5 seeds" in figure.get_suptitle() and "steps" in figure.get_suptitle()
    assert all(ax.get_legend() is None for ax in figure.axes), "a legend inside a panel"
    assert (lab.ASSETS / f"{name}.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_yes_could_be_a_no(name):
    """The answer of a question that has a rule follows from the numbers."""
    if not (lab.ASSETS / f"{name}.csv").exists():
        return
    question = runner.load(name)
    rows = lab.saved(name)
    answer = question.verdict(rows)
    has_a_rule = answer.startswith(("Yes.", "No."))
    why = f"{name}: add to OTHERWISE which numbers would turn its answer"
    assert has_a_rule == (name in OTHERWISE), why
    if name in OTHERWISE:
        changed = [row | OTHERWISE[name](row) for row in rows]
        assert question.verdict(changed).split()[0] != answer.split()[0]


def test_both_readme_files_have_the_answers():
    tables = {runner.README: runner.answers(), runner.ROOT_README: runner.yes_or_no()}
    for path, table in tables.items():
        text = path.read_text(encoding="utf-8")
        why = f"{path} is out of date: python -m experiments.questions --all --redraw"
        assert runner.with_answers(text, table) == text, why


def test_readme_lists_yes_and_no_and_nothing_else(monkeypatch, tmp_path):
    """An answer without a rule has no row, a question that was not measured neither."""
    said = {"kl_penalty": "No. 1 ± 0.", "overfitting": "Yes. 2 ± 0.", "stuck": "None. 3 ± 0."}
    monkeypatch.setattr(lab, "ASSETS", tmp_path)
    for name, answer in said.items():
        lab.save_csv(tmp_path / f"{name}.csv", [{"seed": 0}])
        monkeypatch.setattr(runner.load(name), "verdict", lambda rows, answer=answer: answer)
    assert runner.yes_or_no().splitlines()[2:] == [
        "| Does the KL penalty keep the policy close to the reference? | no |",
        "| Does DPO overfit when there are few pairs? | yes |",
    ]
    text = f"above\n{runner.BEGIN}\nold\n{runner.END}\nbelow"
    wanted = f"above\n{runner.BEGIN}\n\nnew\n\n{runner.END}\nbelow"
    assert runner.with_answers(text, "new") == wanted


def test_a_quick_run_writes_its_files_and_leaves_readme_alone(tmp_path, monkeypatch, capsys):
    rows = lab.where(lab.saved("stuck"), seed=0)
    asked = []

    def run(jobs, workers, folder):
        asked.extend(jobs)
        lab.save_csv(folder / "stuck.csv", rows)
        return []

    def savefig(figure, path):
        path.touch()

    readme = runner.README.read_text(encoding="utf-8")
    root_readme = runner.ROOT_README.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(sys, "argv", ["questions", "stuck", "--quick"])
    runner.main()
    assert [(job.name, job.arguments) for job in asked] == [("stuck", (0, True))]
    assert lab.load_csv(tmp_path / "out-quick" / "stuck.csv") == rows
    assert (tmp_path / "out-quick" / "stuck.png").exists()
    assert stuck.verdict(rows) in capsys.readouterr().out
    assert runner.README.read_text(encoding="utf-8") == readme
    assert runner.ROOT_README.read_text(encoding="utf-8") == root_readme


def test_a_question_in_parts_has_a_job_for_each(monkeypatch):
    monkeypatch.setattr(stuck, "PARTS", {"DPO": 2, "PPO": 9}, raising=False)
    jobs = runner.jobs_of("stuck", 2, False)
    arguments = [job.arguments for job in jobs]
    assert arguments == [(0, False, "DPO"), (0, False, "PPO"), (1, False, "DPO"), (1, False, "PPO")]
    assert [job.seconds for job in jobs] == [2, 9, 2, 9]


def test_a_table_is_saved_when_all_its_seeds_are_done(tmp_path):
    """In the order of the seeds, whichever ends first."""
    first = runner.Job("stuck", 10, (0, False))
    second = runner.Job("stuck", 10, (1, False))
    jobs = [first, runner.Job("displacement", 10, (0, False)), second]
    done = {second: [{"seed": 1}]}
    runner.save_if_complete("stuck", jobs, done, tmp_path)
    assert list(tmp_path.iterdir()) == []
    done[first] = [{"seed": 0}]
    runner.save_if_complete("stuck", jobs, done, tmp_path)
    assert lab.load_csv(tmp_path / "stuck.csv") == [{"seed": 0}, {"seed": 1}]


class AtOnce:
    """A pool of processes that is none: it does each job when it is submitted."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, measure, *arguments):
        future = Future()
        try:
            future.set_result(measure(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_a_question_that_raises_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """Its error is printed, the other's table and figure are made, and the exit status is no 0."""
    rows = lab.where(lab.saved("stuck"), seed=0)

    def fails(seed, quick):
        raise ZeroDivisionError("a slip in displacement.py")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(displacement, "measure", fails)
    monkeypatch.setattr(stuck, "measure", lambda seed, quick: rows)
    monkeypatch.setattr(sys, "argv", ["questions", "displacement", "stuck", "--quick"])
    with pytest.raises(SystemExit, match="displacement") as exit:
        runner.main()
    assert exit.value.code != 0 and "stuck" not in str(exit.value)
    printed = capsys.readouterr()
    assert "a slip in displacement.py" in printed.err, "the traceback is lost"
    assert stuck.verdict(rows) in printed.out, "the other question's answer is lost"
    written = sorted(path.name for path in (tmp_path / "out-quick").iterdir())
    assert written == ["stuck.csv", "stuck.png"]


def test_redraw_measures_nothing_and_mends_readme(tmp_path, monkeypatch, capsys):
    """From the tables that are there; a question without one is named, and is no error."""
    measured = lab.saved("stuck")
    (tmp_path / "assets").mkdir()
    lab.save_csv(tmp_path / "assets" / "stuck.csv", measured)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{runner.BEGIN}\nan old answer\n{runner.END}\n", encoding="utf-8")
    root_readme = tmp_path / "root.md"
    root_readme.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(lab, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(runner, "README", readme)
    monkeypatch.setattr(runner, "ROOT_README", root_readme)
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("--redraw measured"))
    monkeypatch.setattr(sys, "argv", ["questions", "stuck", "displacement", "--redraw"])
    runner.main()
    assert "displacement is not measured yet" in capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "assets").iterdir())
    assert written == ["stuck.csv", "stuck.png"]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and "an old answer" not in text
    assert stuck.verdict(measured) in text
    assert "an old answer" not in root_readme.read_text(encoding="utf-8")


def test_the_time_left(capsys):
    """A job of 10 guessed seconds took 30, 20 are left: 60 seconds more."""
    jobs = [runner.Job("stuck", 10, (0, False)), runner.Job("stuck", 20, (1, False))]
    runner.report(jobs[0], jobs, {jobs[0]: []}, 30.0)
    assert capsys.readouterr().out == "1/2  stuck seed 0  30 s, 60 s left\n"


def test_stopping_early_is_at_the_lowest_held_out_loss_of_each_seed():
    rows = []
    for seed, losses in enumerate([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]):
        for step, loss in enumerate(losses):
            rows.append({"seed": seed, "pairs": 300, "step": step, "held_out_loss": loss})
    assert [row["step"] for row in overfitting.stopped_early(rows, 300)] == [1, 2]
    assert [row["step"] for row in overfitting.at_the_end(rows, 300)] == [2, 2]


def test_a_reference_that_is_the_policy_keeps_the_loss_at_log_2(sft):
    """Copied at every step, the reference is the policy itself: no margin ever, yet it moves."""
    _, ref = sft
    pairs = lab.draw_pairs(0, 500)
    found = list(kl_penalty.train(0, pairs, 6, every=1))
    expect([loss for _, loss, _ in found], [math.log(2)] * 7, "the logged loss", 1e-9)
    assert dpo.kl_divergence(found[-1][2], ref).min() > 0.1
    frozen = [loss for _, loss, _ in kl_penalty.train(0, pairs, 6, every=0)]
    assert frozen[0] == pytest.approx(math.log(2)) and frozen[-1] < 0.67
    copied = [loss for _, loss, _ in kl_penalty.train(0, pairs, 6, every=3)]
    assert copied[:3] == pytest.approx(frozen[:3]) and copied[3] == pytest.approx(math.log(2))


def test_four_numbers_tell_the_mistakes_apart(sft):
    """What each mistake leaves at 0."""
    ends = {case: list(stuck.train(0, case, 5))[-1] for case in stuck.CASES}
    for case, row in ends.items():
        assert (row["loss"] < 0.68) == (case == "healthy"), row
        no_gradient = case in ("nothing trainable", "empty mask")
        assert (row["grad_norm"] == 0) == no_gradient, (case, row)
        moves = case in ("healthy", "the reference is the policy")
        assert (row["kl"] > 1e-3) == moves, (case, row)
        assert (row["chosen_logp"] == 0) == (case == "empty mask"), (case, row)


def test_where_the_probability_went(sft):
    """What one kind of response gains, the others lose; a pair's winner that never lost gains."""
    _, ref = sft
    pairs = lab.draw_pairs(0, 4)
    logps = ref.clone()
    logps[pairs.prompt, pairs.rejected] -= 3.0
    logps[pairs.prompt, pairs.chosen] = ref[pairs.prompt, pairs.chosen] + 1.0
    logps = logps.log_softmax(-1)
    found = displacement.movement(logps, ref, pairs)
    gains = [found[f"gained by {kind}"] for kind in displacement.GAINED]
    assert sum(gains) == pytest.approx(0, abs=1e-12)
    assert gains[0] > 0 > gains[1] and found["chosen"] > 0 > found["rejected"]
    assert found["fallen"] == 0


def test_the_wide_world_starts_at_the_reference_and_pairs_can_follow_the_policy(monkeypatch, sft):
    """Without a step nothing moves; in each round the pairs come from the policy as it then is."""
    drawn_from = []
    draw_pairs = WORLD.draw_pairs

    def spy(logps, *rest):
        drawn_from.append(logps)
        return draw_pairs(logps, *rest)

    monkeypatch.setattr(WORLD, "draw_pairs", spy)
    monkeypatch.setattr(coverage, "WideWorld", lambda: WORLD)
    monkeypatch.setattr(coverage, "wide_sft", lambda *_: sft[0])
    start = coverage.leak(0, 0, pairs=1024)
    assert (start["margin"], start["gap_closed"]) == (0, 0), "no step, no change"
    assert start["in no pair before"] == start["in no pair after"]
    end = coverage.leak(0, 20, pairs=2048, rounds=2)
    first, second = drawn_from[-2:]
    assert torch.allclose(first, sft[1], atol=1e-4), "the first pairs are the reference's"
    assert dpo.kl_divergence(second, first).min() > 0.01, "the second are the trained policy's"
    assert end["margin"] > 0.1 and end["in no pair before"] != end["in no pair after"]


def test_who_writes_the_pairs():
    """Probabilities 0.5, 0.3, 0.2: squared and normalised, 25, 9 and 4 of 38."""
    ref = torch.tensor([[0.5, 0.3, 0.2]]).log()
    policy = torch.tensor([[0.1, 0.1, 0.8]]).log()
    expected = {
        "the reference": [0.5, 0.3, 0.2],
        "a colder sampler": [25 / 38, 9 / 38, 4 / 38],
        "a uniform sampler": [1 / 3, 1 / 3, 1 / 3],
        "the policy itself": [0.1, 0.1, 0.8],
    }
    assert list(expected) == list(coverage.SAMPLERS)
    for sampler, probs in expected.items():
        found = coverage.sampled_from(sampler, ref, policy).exp()
        expect(found[0], probs, f"written by {sampler}", 1e-6)


def test_a_judge_that_knows_the_true_reward_keeps_its_promise(monkeypatch, sft):
    """Then what it promises is E[r*], its optimum is Eq. 4, and a smaller beta gives more."""
    _, ref = sft
    monkeypatch.setattr(rlhf, "train_reward_model", lambda *_, **__: WORLD.rewards)
    rows = list(over_optimisation.judge(0, 0, lab.draw_pairs(0, 300)))
    promised = [row["promised"] for row in rows]
    assert promised == sorted(promised), "less penalty, less reward?"
    expect(promised, [row["expected_reward"] for row in rows], "E[r*]", 1e-9)
    expect([row["gap_closed"] for row in rows], [1.0] * len(rows), "the optimum", 1e-9)
    expect(promised[-1], 4.5, "at beta 0.01 the best response, very very good", 1e-6)


def test_dpo_begins_at_the_reference_for_every_beta(sft):
    _, ref = sft
    rows = list(over_optimisation.train(0, lab.draw_pairs(0, 300), 10))
    starts = lab.where(rows, step=0)
    assert [row["beta"] for row in starts] == over_optimisation.BETAS
    expected = (ref.exp() * WORLD.rewards).sum(-1).mean()
    for row in starts:
        assert row["kl"] == pytest.approx(0, abs=1e-6) and row["own_accuracy"] == 0.5, row
        expect(row["expected_reward"], expected, "E[r*] of the reference", 1e-5)
    ends = lab.where(rows, step=10)
    assert all(row["own_accuracy"] > 0.55 and row["kl"] > 0.01 for row in ends), ends


def test_what_each_reference_has_seen(sft):
    """A hundred times the same pair: SFT on the chosen says it, SFT on both halves says each."""
    x = torch.zeros(100, dtype=torch.long)
    pairs = data.Drawn(x, x + 5, x + 7)
    found = {}
    for start in sft_first.STARTS:
        found[start] = lab.listed(sft_first.reference_of(0, start, pairs, 60)).detach().exp()[0]
    expect(found["untrained"].log(), lab.listed(lab.new_gpt(0)).detach()[0], "no SFT", 1e-6)
    expect(found["author of the pairs"].log(), sft[1][0], "the model that wrote them", 1e-6)
    assert found["SFT on the chosen"][5] > 0.9 and found["SFT on the chosen"][7] < 0.05
    assert 0.4 < found["SFT on both"][5] < 0.6 and 0.4 < found["SFT on both"][7] < 0.6


def test_the_accuracy_of_a_policy_against_its_reference():
    """Chosen above rejected once, below once, equal once: 1, 0 and 1/2."""
    log_ratios = torch.zeros(WORLD.rewards.shape)
    log_ratios[0, 3] = 1.0
    chosen = torch.tensor([3, 4, 5])
    pairs = data.Drawn(torch.zeros(3, dtype=torch.long), chosen, torch.tensor([4, 3, 6]))
    assert sft_first.accuracy(log_ratios, pairs) == 0.5


def test_a_clear_difference_is_more_than_two_standard_errors():
    """Of five differences the standard error is their sd over the root of 5: here 0.5."""
    sd = 0.5 * 5**0.5
    shape = torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]) * sd  # its own sd, too, is sd
    assert lab.is_clear((shape + 1.01).tolist()) and lab.is_clear((shape - 1.01).tolist())
    assert not lab.is_clear((shape + 0.99).tolist())
    assert not lab.is_clear((shape - 0.99).tolist())


def test_dpo_and_ppo_are_compared_seed_by_seed():
    """Seed 1 has more reward than seed 0, whoever trains. DPO is ahead by 0.2 with hard labels, and
    PPO with deterministic ones, except that neither is up to a KL of 1 nat. All from SFT at 0."""
    rows = []
    for seed in (0, 1):
        row = {"seed": seed, "method": "SFT", "labels": "any"}
        rows.append(row | {"kl": 0.0, "expected_reward": 0.0})
        for method, labels, kl, reward in [
            ("DPO", "hard", 1.0, 2.2),
            ("PPO", "hard", 1.0, 2.0),
            ("DPO", "deterministic", 1.0, 2.0),
            ("PPO", "deterministic", 1.0, 2.0),
            ("PPO", "deterministic", 2.0, 2.2),
        ]:
            row = {"seed": seed, "method": method, "labels": labels, "last": 800}
            rows.append(row | {"kl": kl, "expected_reward": reward + seed})
    found = ppo.comparisons(rows)
    ahead = [case["ahead"] for case in found]
    assert ahead[:4] == ["DPO"] * 4, "hard labels: half of 0.2 at a KL of 0.5, then 0.2"
    assert ahead[4:] == ["neither", "neither", "PPO", "PPO"], "deterministic labels"
    expect(found[0]["DPO"], [1.1, 1.6], "a coin between SFT and the policy at a KL of 1", 1e-9)
    expect(found[3]["differences"], [0.2, 0.2], "differences are taken within a seed", 1e-9)
    assert ppo.verdict(rows).startswith("Yes."), "DPO is ahead in four comparisons, PPO in two"
    fewer = [row for row in rows if row["labels"] != "hard" or row["method"] != "DPO"]
    less = {"seed": 0, "method": "DPO", "labels": "hard", "last": 800}
    worse = [less | {"seed": seed, "kl": 1.0, "expected_reward": 1.5 + seed} for seed in (0, 1)]
    assert ppo.verdict(fewer + worse).startswith("No."), "now PPO is ahead in six"


def test_no_measured_policy_lies_above_the_curve():
    """Under each tangent of the curve of Eq. 4, of slope beta; Best-of-N within its bound on KL."""
    if not (lab.ASSETS / "ppo.csv").exists():
        return
    rows = lab.saved("ppo")
    for seed in lab.values(rows, "seed"):
        curve = lab.where(rows, seed=seed, method="Eq. 4")
        for row in lab.where(rows, seed=seed):
            for there in curve:
                tangent = there["expected_reward"] + there["setting"] * (row["kl"] - there["kl"])
                assert row["expected_reward"] <= tangent + 1e-3, row  # the file has six digits
    for row in lab.where(rows, method="Best-of-N"):
        n = row["setting"]
        assert row["kl"] <= math.log(n) - (n - 1) / n + 1e-6, row


def test_settings_near_the_best_are_counted_at_each_beta():
    """Of 0.5, 0.91 and 1.0 two are within a tenth of the best; of 0.10, 0.17 and 0.20 one is."""
    gains = {0.5: [0.5, 0.91, 1.0], 2.0: [0.10, 0.17, 0.20]}
    rows = []
    for beta, column in gains.items():
        for gain in column:
            rows.append({"seed": 0, "method": "DPO", "beta": beta, "gap_closed": gain})
    assert tuning.BETAS == list(gains)
    assert tuning.near_the_best(rows, "DPO") == [{"seed": 0, "fraction": 0.5}]


@pytest.fixture
def three_responses():
    """A reference that says "good", "dull" and nothing, with true rewards 2, -2 and 0 of the film.

    It draws the pairs good-dull, good-nothing and dull-nothing in proportion 0.3, 0.2 and 0.12.
    The rewards 0, 1 and 2 rank only the last of them right.
    """
    said = [WORLD.responses.index(y) for y in (" good", " dull", "")]
    assert WORLD.rewards[0, said].tolist() == [2, -2, 0]
    ref = torch.full_like(WORLD.rewards, -math.inf)
    ref[:, said] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rewards = torch.zeros_like(ref)
    rewards[:, said] = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    return ref[:1], rewards[:1]


def test_agreement_with_the_true_reward_by_hand(three_responses, monkeypatch):
    ref, rewards = three_responses
    expect(reward_model.ranks(torch.tensor([5.0, 1.0, 5.0])), [2.5, 1, 2.5], "ranks with a tie")
    itself = reward_model.agreement(2 * WORLD.rewards + 3, WORLD.rewards.log_softmax(-1))
    assert itself == pytest.approx({"rank_correlation": 1, "accuracy": 1})
    monkeypatch.setattr(WORLD, "rewards", WORLD.rewards[:1])
    found = reward_model.agreement(rewards, ref)["accuracy"]
    expect(found, 0.12 / 0.62, "one of three pairs is right", 1e-6)
    tied = rewards.clamp(min=1)  # good and dull
    found = reward_model.agreement(tied, ref)["accuracy"]
    expect(found, (0.3 / 2 + 0.12) / 0.62, "one pair is right, and one is tied: 1/2", 1e-6)


def test_calibration_by_hand(three_responses, monkeypatch):
    """Margins of 1 (dull over good, nothing over dull) and of 2 (nothing over good)."""
    ref, rewards = three_responses
    monkeypatch.setattr(WORLD, "rewards", WORLD.rewards[:1])
    by_one, by_two = reward_model.calibration(rewards, ref)
    assert (by_one["part"], by_two["part"]) == (4, 7), "0.73 is in [0.7, 0.75], 0.88 in [0.85, 0.9]"
    expect(by_one["says"], 0.731059, "sigma(1)", 1e-6)
    expect(by_two["says"], 0.880797, "sigma(2)", 1e-6)
    dull_over_good = 0.017986  # Eq. 1 on -2 and 2
    nothing_over_dull = 0.880797  # on 0 and -2
    nothing_over_good = 0.119203  # on 0 and 2
    true = (0.3 * dull_over_good + 0.12 * nothing_over_dull) / 0.42
    expect(by_one["is"], true, "the true P of two pairs, by Eq. 1", 1e-6)
    expect(by_two["is"], nothing_over_good, "the true P of the third pair", 1e-6)


def test_unlikelihood_is_dpos_push_without_its_weight():
    """Descent on one moves along that of the other: Eq. 7's gradient is beta * weight times it."""
    logps = torch.tensor([[-3.0, -9.0, -5.0], [-4.0, -2.0, -5.0]], requires_grad=True)
    ref = torch.tensor([[-4.0, -3.0, -5.0], [-6.0, -4.0, -5.0]])
    found = dpo.dpo_loss(*logps, *ref, beta=0.3)
    (ours,) = torch.autograd.grad(found.losses.sum(), logps)
    (theirs,) = torch.autograd.grad(unlikelihood_loss(*logps, *ref).sum(), logps)
    expect(theirs, [[-1, -1, -1], [1, 1, 1]], "the push of unlikelihood: equally hard on all pairs")
    margins = torch.tensor([-0.3, -2.4, 0.0])  # beta times 1 - 2, -6 - 2, 0
    weights = torch.sigmoid(-margins)
    for one, other in zip(ours, theirs):
        expect(one / other, 0.3 * weights, "beta * weight of each pair", 1e-6)


def test_where_a_pair_that_never_flips_comes_to_rest(sft):
    """cDPO: sigma(m) = 1 - e. IPO: m = 1/2. DPO: nowhere."""
    for loss, rest in {"cdpo": math.log(0.9 / 0.1), "ipo": 0.5}.items():
        for beta in (0.3, 1.0, 10.0):
            *_, (_, ratio) = other_losses.certain(0, loss, beta, 260)
            expect(beta * ratio, rest, f"the margin at the end of {loss}, beta {beta}", 0.05)
    for beta in (0.3, 1.0, 10.0):
        ratios = [ratio for _, ratio in other_losses.certain(0, "dpo", beta, 260)]
        assert ratios[0] == 0 and ratios == sorted(ratios), f"DPO turns back at beta {beta}"
        assert beta * ratios[-1] > 3, f"DPO at beta {beta}: {ratios}"


def test_dpo_of_means_by_hand():
    """Log-ratios of 2 nats over 2 tokens and of -3 over 3: a margin of 2 beta, not of 5 beta."""
    logps = torch.tensor([[-4.0], [-9.0], [-6.0], [-6.0]])
    lengths = torch.tensor([[2.0], [3.0]])
    found = other_losses.dpo_of_means(*logps, *lengths, beta=0.5).losses
    mistakes = {"sums are taken": [0.078889]}  # log(1 + exp(-2.5))
    why = "Eq. 7 with means over tokens"
    expect(found, [0.313262], f"{why}: log(1 + exp(-1))", 1e-6, mistakes)


@pytest.fixture
def trained_on(sft, monkeypatch):
    """A function: the losses (200,) that a run of label_noise descends on. Every other response has
    gained a nat over the reference, so the log-ratios of pairs are -1, 0 and 1."""
    _, ref = sft
    moved = ref.clone()
    moved[:, ::2] += 1.0

    def losses(flip, loss, soft=False):
        seen = []

        def descend(policy, losses_of, n, *_):
            seen.append(losses_of(moved, torch.arange(n)))
            yield 0, ref

        monkeypatch.setattr(lab, "descend", descend)
        label_noise.run(0, 200, 5, flip, loss, soft)
        return seen[0]

    return losses


def log_ratios(pairs):
    chosen_moved = pairs.chosen % 2 == 0
    rejected_moved = pairs.rejected % 2 == 0
    return chosen_moved.double() - rejected_moved.double()


def test_a_loss_is_told_the_fraction_of_flipped_labels(trained_on):
    """Two fifths are flipped. The losses by hand; IPO's tau is 1/4."""
    m = log_ratios(lab.draw_pairs(0, 200, flip=0.4))
    assert set(m.tolist()) == {-1, 0, 1}
    ours = (1 + (-m).exp()).log()
    of_reversed = (1 + m.exp()).log()
    wanted = {
        "dpo": ours,
        "cdpo": 0.6 * ours + 0.4 * of_reversed,
        "robust": (0.6 * ours - 0.4 * of_reversed) / 0.2,
        "ipo": (m - 2) ** 2,
    }
    for loss, losses in wanted.items():
        why = f"{loss} with two fifths of the labels flipped"
        expect(trained_on(0.4, loss), losses, why, 1e-9)


def test_soft_labels_are_not_drawn(trained_on):
    pairs = lab.draw_pairs(0, 200)
    m = log_ratios(pairs)
    p = lab.true_margins(pairs).sigmoid()  # Eq. 1
    losses = p * (1 + (-m).exp()).log()
    losses += (1 - p) * (1 + m.exp()).log()
    expect(trained_on(0.0, "dpo", soft=True), losses, "p L(w, l) + (1 - p) L(l, w)", 1e-9)
