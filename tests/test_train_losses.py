"""--loss: the names of dpo.LOSSES, those of experiments/losses.py, and functions of one's own."""

import inspect
import json
import math
import traceback
from pathlib import Path

import pytest
import torch

import data
import dpo
import train
from experiments import losses
from model import GPT, load
from tests.helpers import (
    before_each_step,
    json_of,
    lines_of,
    one_at_a_time,
    run,
    weights_of,
    write_lines,
)

ROOT = Path(train.__file__).parent
LOSSES = dict(dpo.LOSSES)
for loss in (losses.simpo_loss, losses.orpo_loss, losses.dpop_loss, losses.unlikelihood_loss):
    LOSSES[f"{ROOT}/experiments/losses.py:{loss.__name__}"] = loss


@pytest.mark.parametrize("name", LOSSES, ids=lambda name: name.split(":")[-1])
def test_every_loss_trains(name, mine):
    """On one pair, whose log-probs are in metrics.jsonl: the loss is that of this name, at its own
    default settings, and it raises the margin."""
    write_lines(Path("pairs.jsonl"), [data.Pair(*PAIRS[0])._asdict()])
    warned = run(*mine, "--epochs", 12, "--lr", 0.003, "--loss", name).warned
    assert warned == []
    lines = lines_of(Path("out"))[1:]
    ref = [lines[0]["chosen_logp"], lines[0]["rejected_logp"]]
    given = {}
    if "chosen_lengths" in inspect.signature(LOSSES[name]).parameters:
        given["chosen_lengths"] = torch.tensor([4])  # "Yes" and the end token
        given["rejected_lengths"] = torch.tensor([3])
    for line in lines:
        logps = torch.tensor([line["chosen_logp"], line["rejected_logp"], *ref])
        wanted = LOSSES[name](*logps[:, None], **given)
        if isinstance(wanted, tuple):
            wanted = wanted[0]
        assert line["loss"] == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    last = lines[-1]
    gap = ref[0] - ref[1]
    assert last["chosen_logp"] - last["rejected_logp"] > gap + 1


# What a loss is given


PAIRS = [  # prompt, chosen, rejected
    ("Say yes. ", "Yes", "No"),
    ("Hi ", "Hello", "?"),
    ("1+1=", "2", "11"),
    ("A or B? ", "B", "A, I say"),
    ("A", "b", "c"),
]
SETTINGS = "--n-layer 1 --n-embd 8 --block-size 32 --held-out 0 --batch-size 5 --epochs 1".split()
SETTINGS += "--sft-epochs 1 --save-every 1 --lr 0.01".split()
MINE = """
import json

def record(path, **given):
    lists = {name: value.tolist() for name, value in given.items()}
    with open(path, "a") as file:
        file.write(json.dumps(lists) + "\\n")

def all_of_it(w, l, ref_w, ref_l, rejected_lengths, beta=7.0, chosen_lengths=None, other=8):
    record("given", w=w, l=l, ref_w=ref_w, ref_l=ref_l, lengths_w=chosen_lengths,
           lengths_l=rejected_lengths)
    return 0 * w + 2 * l + beta, "only the first item is the loss"

def own_beta(w, l, ref_w, ref_l, beta=7):
    return 0 * w + beta

def needs_beta(w, l, ref_w, ref_l, beta):
    return 0 * w + beta

def no_beta(w, l, ref_w, ref_l):
    return 0 * w + 5

def mean(w, l, ref_w, ref_l):
    return (l - w).mean()

def constant(w, l, ref_w, ref_l):
    return (l - w).detach()

def raises(w, l, ref_w, ref_l):
    return l - v  # the line of this error is known

calls = []

def mean_in_the_third_step(w, l, ref_w, ref_l):
    calls.append(1)
    return (l - w).mean() if len(calls) == 3 else l - w

def nan_in_the_third_step(w, l, ref_w, ref_l):
    calls.append(1)
    return (l - w) * float("nan" if len(calls) == 3 else 1)

def infinite_in_the_third_step(w, l, ref_w, ref_l):
    calls.append(1)
    return l - w + float("inf" if len(calls) == 3 else 0)  # with a finite gradient

def infinite_slope_in_the_third_step(w, l, ref_w, ref_l):
    calls.append(1)
    return (w - w.detach()).sqrt() if len(calls) == 3 else l - w
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Flags for a run in the folder of the test, with losses of one's own in mine.py."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    write_lines(Path("pairs.jsonl"), [data.Pair(*texts)._asdict() for texts in PAIRS])
    return ["--data", "pairs.jsonl", *SETTINGS]


def test_a_loss_is_given_the_log_probs_and_the_lengths_of_its_pairs(mine):
    """In the second epoch, so that the policy is not the reference. Each pair has its own."""
    run(*mine, "--epochs", 2, "--micro-batch-size", 2, "--loss", "mine.py:all_of_it")
    policy = GPT.from_pretrained("out/reference")  # the first step's model
    rows = []
    for prompt, chosen, rejected in PAIRS:
        chosen = list(chosen.encode()) + [256]
        rejected = list(rejected.encode()) + [256]
        rows.append(data.TokenPair(list(prompt.encode()), chosen, rejected))
    ref = one_at_a_time(policy.double(), rows, range(5)).view(2, -1)
    wanted = set()
    for row, w, l in zip(rows, *ref.tolist()):
        lengths = (len(row.chosen), len(row.rejected))
        wanted.add((round(w, 3), round(l, 3), *lengths))

    calls = [json.loads(line) for line in Path("given").read_text().splitlines()]
    assert [len(call["w"]) for call in calls] == [2, 2, 1, 2, 2, 1], "two steps, two pairs a part"
    largest = []
    for step in (calls[:3], calls[3:]):
        given = set()
        moves = []
        for call in step:
            for policy, reference in (("w", "ref_w"), ("l", "ref_l")):
                moves += [abs(p - r) for p, r in zip(call[policy], call[reference])]
            columns = [call["ref_w"], call["ref_l"], call["lengths_w"], call["lengths_l"]]
            for w, l, length_w, length_l in zip(*columns):
                given.add((round(w, 3), round(l, 3), length_w, length_l))
        assert given == wanted, "the reference's log-probs and the lengths belong together"
        largest.append(max(moves))
    assert largest[0] < 1e-4, "in the first step the policy is the reference"
    assert largest[1] > 0.01, "then it moves, and the reference does not"
    for line in lines_of(Path("out"))[1:]:
        assert line["loss"] == pytest.approx(2 * line["rejected_logp"] + 7), "the mean of --loss"


@pytest.mark.parametrize(
    "name, flags, beta",
    [
        ("own_beta", [], 7),
        ("own_beta", ["--beta", 3], 3),
        ("needs_beta", [], 0.1),
        ("needs_beta", ["--beta", 3], 3),
        ("no_beta", [], 5),
    ],
)
def test_beta_is_that_of_the_flag_or_the_losss_own(name, flags, beta, mine):
    result = run(*mine, *flags, "--loss", f"mine.py:{name}")
    assert lines_of(Path("out"))[1]["loss"] == pytest.approx(beta)
    assert result.warned == []


def test_the_toy_worlds_beta_is_1(mine):
    flags = "--pairs 32 --sft-epochs 0 --epochs 1 --loss".split()
    result = run(*flags, "mine.py:own_beta")
    assert lines_of(Path("out"))[1]["loss"] == 1
    assert result.warned == []
    assert run(*flags, "mine.py:no_beta").warned == [], "nobody has asked for a beta"


def test_the_summary_says_which_beta_was_used(mine):
    result = run(*mine, "--loss", "mine.py:own_beta")
    assert result.summary["config"]["beta"] == 7


@pytest.mark.parametrize("beta", [1, 3])
def test_beta_for_a_loss_without_it_is_one_warning(beta, mine):
    """Which scales the logged rewards all the same."""
    [warning] = run(*mine, "--beta", beta, "--loss", "mine.py:no_beta").warned
    assert "beta" in warning
    assert "no_beta" in warning
    assert "\n" not in warning


# What goes wrong


def test_a_misspelt_name_lists_what_there_is(mine):
    """Before anything is written."""
    with pytest.raises(data.InputError) as raised:
        run(*mine, "--loss", "mine.py:meen")
    for name in ("meen", "mean", "constant", "all_of_it"):
        assert name in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(data.InputError) as raised:
        run(*mine, "--loss", "dpoo")
    for name in ("dpoo", *dpo.LOSSES, "file.py:function"):
        assert name in str(raised.value)
    assert not Path("out").exists()


def test_an_error_in_the_file_itself_is_there_before_anything_is_written(mine):
    Path("mine.py").write_text("x = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        run(*mine, "--loss", "mine.py:mean")
    assert not Path("out").exists()


WRONG = {  # the function -> its error, and the steps of DPO before it
    "mean": (AssertionError, "not one loss for each pair", 0),
    "constant": (RuntimeError, "does not require grad", 0),
    "raises": (NameError, "name 'v' is not defined", 0),
    "mean_in_the_third_step": (AssertionError, "not one loss for each pair", 2),
    "nan_in_the_third_step": (data.InputError, "DPO step 3: .*nan", 2),
    "infinite_in_the_third_step": (data.InputError, "DPO step 3: .*inf", 2),
    "infinite_slope_in_the_third_step": (data.InputError, "DPO step 3: .*(inf|nan)", 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_stops_the_run(name, mine):
    """With its own traceback. The weights are those of the step before."""
    error, says, steps = WRONG[name]
    rates = []
    with (
        before_each_step(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])),
        pytest.raises(error, match=says) as raised,
    ):
        run(*mine, "--epochs", 5, "--loss", f"mine.py:{name}")
    assert len(rates) == 1 + steps, "one step of SFT, and as many of DPO"
    assert not Path("out/policy").exists()
    assert not Path("out/summary.json").exists()
    if name == "raises":
        last = traceback.extract_tb(raised.tb)[-1]
        lines = MINE.splitlines()
        assert last.filename.endswith("mine.py")
        assert "the line of this error" in lines[last.lineno - 1]
    if steps:
        checkpoint = load("out/checkpoint.pt")
        assert checkpoint["step"] == steps
        for weight in checkpoint["model"].values():
            assert weight.isfinite().all()


@pytest.mark.parametrize("phase", ["SFT", "DPO"])
def test_a_learning_rate_that_ruins_the_model_stops_the_run(phase, mine):
    """At the first step whose loss or gradient is not finite, which is named. The optimizer's step
    is not made; the weights of the step before, with which it was computed, are in the checkpoint.
    """
    rates = []
    flags = ["--sft-epochs", 4, "--epochs", 4]
    flags += ["--sft-lr" if phase == "SFT" else "--lr", 1e30]
    with (
        before_each_step(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])),
        pytest.raises(data.InputError, match="learning rate") as raised,
    ):
        run(*mine, *flags)
    made = len(rates)
    if phase == "DPO":
        made -= 4
        checkpoint = load("out/checkpoint.pt")
        assert checkpoint["step"] == made
        assert weights_of(Path("out/reference")), "SFT's result is kept"
    else:
        assert not Path("out/reference").exists()
    assert 1 <= made < 4
    assert f"{phase} step {made + 1}" in str(raised.value)
    assert not Path("out/policy").exists()


def test_a_finite_loss_of_minus_infinity_probability(mine):
    """Margins of thousands of nats are finite: log sigmoid, not the log of a sigmoid."""
    summary = run(*mine, "--beta", 1e6, "--epochs", 3, "--max-grad-norm", 1).summary
    assert math.isfinite(lines_of(Path("out"))[-1]["loss"])
    assert summary["config"]["beta"] == 1e6
    assert json_of(Path("out/summary.json"))["config"]["loss"] == "dpo"
