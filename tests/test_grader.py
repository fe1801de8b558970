"""DPO_MODULE=my_dpo: a right solution of the exercises passes, a wrong one is told its mistake."""

import os
import re
import subprocess
import sys

import handout
import pytest

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
RIGHT = """
from dpo import *
from torch import exp, log, no_grad

def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta=0.1):
    if not beta > 0:
        raise ValueError("beta must be over 0")
    r_w = beta * (policy_chosen_logps - ref_chosen_logps)
    r_l = beta * (policy_rejected_logps - ref_rejected_logps)
    losses = torch.logaddexp(torch.zeros_like(r_w), r_l - r_w)
    with no_grad():
        return DPOLoss(losses, 1 / (1 + exp(r_w - r_l)), r_w.detach(), r_l.detach())

def dpo_gradient(w, l, ref_w, ref_l, beta=0.1):
    weights = dpo_loss(w, l, ref_w, ref_l, beta).weights
    return -beta * weights, weights * beta

def optimal_policy(ref_logps, rewards, beta):
    Z = (ref_logps.exp() * (rewards / beta).exp()).sum(-1)
    return ref_logps + rewards / beta - log(Z)[..., None], log(Z)

def implicit_reward(policy_logps, ref_logps, beta):
    assert policy_logps.shape == ref_logps.shape
    return (policy_logps - ref_logps) * beta

def sequence_logps(logits, ids, mask):
    logps = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    sums = logps.masked_fill(~mask[:, 1:], 0).sum(-1)
    return sums.to(torch.promote_types(logits.dtype, torch.float32))

def plackett_luce_logps(rewards):
    return sum(rewards[..., k] - rewards[..., k:].logsumexp(-1) for k in range(rewards.shape[-1]))

def plackett_luce_loss(policy_logps, ref_logps, beta=0.1):
    return -plackett_luce_logps(implicit_reward(policy_logps, ref_logps, beta))

def my_loss(*logps, beta=0.1):
    m = reward_margins(*logps, beta=beta)
    return DPOLoss(exp(-m), exp(-m).detach(), None, None)

LOSSES["my_loss"] = my_loss
"""
WRONG = {
    "r_l - r_w": ("r_w - r_l", "the sign of the margin is inverted", "test_dpo.py", "eq7"),
    "(policy_chosen_logps - ref": ("(policy_chosen_logps + ref", "Eq. 7", "test_dpo.py", "eq7"),
    "-beta * weights, weights": (
        "beta * weights, -weights",
        "descent must",
        "test_dpo.py",
        "gradient",
    ),
    "log(Z)[..., None], log(Z)": ("log(Z)[..., None], Z", "not its log", "test_dpo.py", "eq4_opt"),
    "- log(Z)[..., None]": ("", "the policy sums to 1", "test_dpo.py", "eq4_opt"),
    "(policy_logps - ref_logps)": ("policy_logps", "reference is left out", "test_dpo.py", "eq5"),
    "logits[:, :-1]": (
        "logits[:, 1:]",
        "logits are not shifted",
        "tests/test_logps.py",
        "sequence",
    ),
    "~mask[:, 1:]": ("~mask[:, :-1]", "mask is not shifted", "tests/test_logps.py", "sequence"),
    "rewards[..., k:].log": ("rewards[..., :k + 1].log", "j <= k", "test_dpo.py", "eq18"),
    "exp(r_w - r_l)": ("exp(r_l - r_w)", "as A.4 misprints it", "test_dpo.py", "eq7"),
    "r_w.detach()": ("r_w", "only losses carry a gradient", "test_dpo.py", "eq7"),
    "exp(-m), exp(-m)": ("exp(m), exp(m)", "nothing is learnt", "tests/test_losses.py", "convex"),
    "exp(-m), exp(-m).": ("exp(-m), exp(m).", "weights must be", "tests/test_losses.py", "convex"),
}


def grade(root, folder, source, path, words):
    (folder / "my_dpo.py").write_text(source)
    settings = {**os.environ, "DPO_MODULE": "my_dpo", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", path, "-k", words, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, env=settings, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_right_solution_passes(root, tmp_path):
    paths = "test_dpo.py", "tests/test_logps.py", "tests/test_losses.py"
    for path, words in zip(paths, ("", "sequence", "convex")):
        status, printed = grade(root, tmp_path, RIGHT, path, words)
        assert status == 0, printed
    assert "6 passed" in printed, "the five of dpo.LOSSES and my_loss"


def test_a_file_with_nothing_of_its_own_is_not_graded(root, tmp_path):
    status, printed = grade(root, tmp_path, "from dpo import *", "test_dpo.py", "eq7")
    assert status != 0 and "defines nothing of its own" in printed


@pytest.mark.parametrize("right", WRONG)
def test_a_wrong_solution_is_told_its_mistake(root, tmp_path, right):
    wrong, says, path, words = WRONG[right]
    assert right in RIGHT
    status, printed = grade(root, tmp_path, RIGHT.replace(right, wrong), path, words)
    assert status == 1 and says in printed, printed


# The hand-out


def exercises(root):
    """What README's table types for exercise 1, 2, ...: the arguments of `python -m pytest`."""
    rows = re.findall(r"^\| \d\. .*?`python -m pytest (.*?)`.*\|$", readme(root), re.MULTILINE)
    return [[a.strip('"') for a in re.findall(r'"[^"]+"|\S+', row)] for row in rows]


def readme(root):
    return (root / "README.md").read_text()


def test_the_notebook_and_readme_grade_alike(root):
    import nbformat

    cells = nbformat.read(root / "notebook.ipynb", as_version=4).cells
    commands = re.findall(r"`(python -m pytest [^`]+)`", readme(root).split("## Exercises")[1])
    assert commands[:8] == re.findall(r"`(python -m pytest [^`]+)`", cells[-1].source)


def test_the_hand_out_holds_no_solution(root):
    """Signature, docstring and NotImplementedError; everything else is dpo.py word for word."""
    source = (root / "dpo.py").read_text()
    stubs = handout.without_bodies(source).splitlines()
    raised = [line for line in stubs if "raise NotImplementedError" in line]
    assert len(raised) == sum(map(len, handout.EXERCISES.values())) == 16
    assert not [line for line in stubs if line not in source.splitlines() and line not in raised]
    for gone in (
        "logsigmoid(margins)",
        "logsumexp",
        "logcumsumexp",
        "beta * (policy_logps",
        "relu",
    ):
        assert gone in source and gone not in "\n".join(stubs), gone


def test_the_exercises_in_their_order(root, tmp_path, monkeypatch):
    """In the hand-out nothing passes; exercise n passes once 1 to n are written. Nothing that is
    there already is written over."""
    source, every = (root / "dpo.py").read_text(), handout.EXERCISES
    runs = [(0, ["test_dpo.py"]), *enumerate(exercises(root), start=1)]
    assert len(runs) == 9
    started = []
    for n, arguments in runs:
        folder = tmp_path / str(n)
        handout.hand_out(folder)
        left = {m: names for m, names in every.items() if m > n}
        monkeypatch.setattr(handout, "EXERCISES", left)
        (folder / "dpo.py").write_text(handout.without_bodies(source))
        monkeypatch.setattr(handout, "EXERCISES", every)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(command, cwd=folder, env=ONE_THREAD, **pipes))
    for (n, _), process in zip(runs, started):
        printed, _ = process.communicate()
        assert (process.returncode == 0) == (n > 0), printed
        if n == 0:
            assert " passed" not in printed.splitlines()[-1], printed
            assert {int(m) for m in re.findall(r"exercise (\d): ", printed)} == {1, 2, 3, 4, 6}
    with pytest.raises(SystemExit, match="exists already"):
        handout.hand_out(folder)
