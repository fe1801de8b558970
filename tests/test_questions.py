"""The questions in experiments/: their form, the answers in README, what they measure."""

import math
import sys

import pytest
import torch
from matplotlib.figure import Figure

import dpo
from experiments import lab
from experiments.questions import __main__ as runner
from experiments.questions import displacement, kl_penalty, overfitting, ppo, stuck, tuning
from tests.helpers import expect

NAMES = runner.names()


OTHERWISE = {  # what would have to be measured for the other answer
    "overfitting": lambda row: {"held_out_accuracy": row["own_accuracy"]},
    "kl_penalty": lambda row: {"kl": row.get("beta", 1)},
    "ppo": lambda row: {"expected_reward": float(row["method"] == "DPO")},
    "tuning": lambda row: {"gap_closed": 1.0 if row["method"] == "DPO" else row["lr"]},
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
    assert answer.startswith(("Yes.", "No.")) == (name in OTHERWISE)
    if name in OTHERWISE:
        changed = [row | OTHERWISE[name](row) for row in rows]
        assert question.verdict(changed).split()[0] != answer.split()[0]


def test_readme_has_the_answers():
    text = runner.README.read_text()
    why = "run: python -m experiments.questions --all --redraw"
    assert runner.with_answers(text) == text, why


def test_a_quick_run_writes_its_files_and_leaves_readme_alone(tmp_path, monkeypatch, capsys):
    rows = lab.where(lab.saved("stuck"), seed=0)
    asked = []

    def run(jobs, workers, folder):
        asked.extend(jobs)
        lab.save_csv(folder / "stuck.csv", rows)

    def savefig(figure, path):
        path.touch()

    readme = runner.README.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(sys, "argv", ["questions", "stuck", "--quick"])
    runner.main()
    assert [(job.name, job.arguments) for job in asked] == [("stuck", (0, True))]
    assert lab.load_csv(tmp_path / "out-quick" / "stuck.csv") == rows
    assert (tmp_path / "out-quick" / "stuck.png").exists()
    assert stuck.verdict(rows) in capsys.readouterr().out
    assert runner.README.read_text() == readme


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
