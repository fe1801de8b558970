"""DPO_MODULE=my_dpo: a right solution of the exercises passes, a wrong one is told its mistake."""

import os
import subprocess
import sys

import pytest

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

def my_loss(*logps, beta=0.1):
    m = reward_margins(*logps, beta=beta)
    return DPOLoss(exp(-m), exp(-m).detach(), None, None)

LOSSES["my_loss"] = my_loss
"""
WRONG = {
    "r_l - r_w": ("r_w - r_l", "the sign of the margin is inverted", "test_dpo.py", "eq7"),
    "beta * (policy_chosen_logps": ("(policy_chosen_logps", "Eq. 7", "test_dpo.py", "eq7"),
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
    for path, words in (("test_dpo.py", ""), ("tests/test_losses.py", "convex")):
        status, printed = grade(root, tmp_path, RIGHT, path, words)
        assert status == 0, printed
    assert "6 passed" in printed, "the five of dpo.LOSSES and my_loss"


@pytest.mark.parametrize("right", WRONG)
def test_a_wrong_solution_is_told_its_mistake(root, tmp_path, right):
    wrong, says, path, words = WRONG[right]
    assert right in RIGHT
    status, printed = grade(root, tmp_path, RIGHT.replace(right, wrong), path, words)
    assert status == 1 and says in printed, printed
