"""DPO_MODULE=my_dpo: a right solution of the exercises passes, a wrong one is told its mistake."""

import json
import os
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch

import dpo
import test_dpo
from tests import handout, test_logps, test_losses
from tests.helpers import ORDERS, ROWS

RIGHT = """
from dpo import *

def dpo_loss(policy_w, policy_l, ref_w, ref_l, beta=0.1):
    check_shapes(policy_w, policy_l, ref_w, ref_l)
    r_w, r_l = implicit_reward(policy_w, ref_w, beta), implicit_reward(policy_l, ref_l, beta)
    weights = 1 / (1 + (r_w - r_l).detach().exp())
    return DPOLoss(F.softplus(r_l - r_w), weights, r_w.detach(), r_l.detach())

def dpo_gradient(w, l, ref_w, ref_l, beta=0.1):
    weights = dpo_loss(w, l, ref_w, ref_l, beta).weights
    return -beta * weights, weights * beta

def optimal_policy(ref_logps, rewards, beta):
    check_settings(beta)
    tilted = ref_logps + rewards / beta
    return tilted.log_softmax(-1), tilted.logsumexp(-1)

def response_logps(model, ids, mask):
    assert ids.shape == mask.shape
    logits = at_least_float32(model(ids))[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(mask[:, 1:], logps, 0).sum(-1)

def plackett_luce_logps(rewards):
    return sum(rewards[..., k] - rewards[..., k:].logsumexp(-1) for k in range(rewards.shape[-1]))

def hinge_loss(*logps, beta=0.1):
    return (1 - reward_margins(*logps, beta=beta)).clamp(min=0)

def my_loss(*logps, beta=0.1):
    m = reward_margins(*logps, beta=beta)
    root = (1 + m**2).sqrt()
    return DPOLoss(root - m, (1 - m / root).detach(), None, None)

LOSSES["my_loss"] = my_loss
"""
SLOW_SUM = test_logps.test_response_logps_is_the_slow_sum
CONVEX = test_losses.test_family_is_convex_and_pulls_the_right_way
WHERE = test_logps.test_what_is_impossible_where_nothing_is_scored_does_no_harm
SUM = "torch.where(mask[:, 1:], logps, 0).sum(-1)"
WRONG = {  # who notices: what in RIGHT (None: at its end) becomes what, and the verdict
    test_dpo.test_eq1_bradley_terry: [
        (None, "bradley_terry = lambda a, b: (b - a).sigmoid()", "the two rewards are exchanged")],
    test_dpo.test_eq3_objective_of_a_coin: [
        (None, "kl_divergence = lambda p, q: (p.exp() * (p - q)).sum(-1)", "0 log 0 is 0"),
        (None, "rlhf_objective = lambda p, q, r, beta: (p.exp() * (r + beta * (p - q))).sum(-1)",
         "the KL is added")],
    test_dpo.test_eq4_by_hand: [
        ("tilted.logsumexp(-1)", "tilted.exp().sum(-1)", "not its log"),
        ("tilted.log_softmax(-1)", "tilted", "it is not divided by Z(x)"),
        ("rewards / beta", "rewards * beta", "beta multiplies the reward")],
    test_dpo.test_eq4_optimal_policy: [
        ("tilted.logsumexp(-1)", "tilted.exp().sum(-1).log()", "exp overflows")],
    test_dpo.test_eq5_reward_from_its_policy: [
        (None, "implicit_reward = lambda p, q, b: b * p", "the reference is left out")],
    test_dpo.test_eq7_by_hand: [("plus(r_l - r_w)", "plus(r_w - r_l)", "the margin is inverted"),
                                ("r_w - r_l).det", "r_l - r_w).det", "as A.4 misprints it"),
                                ("r_w.detach(),", "r_w,", "only losses carry a gradient")],
    test_dpo.test_gradient_by_hand: [
        (None, "reward_margins = lambda w, l, *ref, beta: beta * (w - l)", "reward_margins: r_w"),
        ("-beta * weights, w", "beta * weights, -w", "descent must raise the chosen")],
    SLOW_SUM: [("(ids))[:, :-1]", "(ids))[:, 1:]", "the logits are not shifted"),
               ("mask[:, 1:]", "mask[:, :-1]", "the mask is not shifted"),
               (SUM, "logps.sum(-1)", "prompt and padding are counted"),
               (SUM, SUM + " / mask.sum(-1)", "it is a mean over tokens"),
               (SUM, SUM + ".roll(len(ids) // 2)", "chosen and rejected rows are exchanged"),
               (SUM, SUM + ".detach() + 0 * logps.sum(-1)", "the gradient of log pi"),
               ("at_least_float32(model(ids))", "model(ids).float()", "float64 is cast down")],
    WHERE: [(SUM, "(logps * mask[:, 1:]).sum(-1)", "use where")],
    lambda: test_logps.test_low_precision_is_summed_in_float32(torch.bfloat16): [
        ("at_least_float32(model(ids))", "model(ids)", "belong in float32")],
    test_dpo.test_eq18_plackett_luce: [("rewards[..., k:].", "rewards[..., :k + 1].", "j <= k")],
    lambda: test_losses.test_family_by_hand("hinge"): [("(1 - rew", "(-rew", "hinge: f(m)")],
    lambda: test_losses.test_family_by_hand("cdpo"): [(None, "cdpo_loss = robust_loss", "cdpo: f")],
    lambda: CONVEX("my_loss"): [("root - m", "root + m", "nothing is learnt"),
                                ("1 - m / root", "m / root - 1", "weights must be -f'(m)"),
                                (" / root).detach()", " / root)", "no gradient: detach")],
}  # fmt: skip
CASES = [(test, *case) for test, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize("test, right, wrong, says", CASES, ids=[case[-1] for case in CASES])
def test_a_wrong_solution_is_told_its_mistake(monkeypatch, test, right, wrong, says):
    """In this process: the student's file stands in place of dpo in the three files of tests."""
    arguments = (ROWS, ORDERS[1]) if test is SLOW_SUM else ()

    def grade(source):
        student = types.ModuleType("my_dpo")
        monkeypatch.setattr(dpo, "LOSSES", dict(dpo.LOSSES))  # which the file adds to
        exec(source, student.__dict__)
        for tests in (test_dpo, test_logps, test_losses):
            monkeypatch.setattr(tests, "dpo", student)
        test(*arguments)

    assert right is None or RIGHT.count(right) == 1, right
    grade(RIGHT)
    with pytest.raises(AssertionError) as error:
        grade(RIGHT.replace(right, wrong) if right else RIGHT + wrong)
    assert says in str(error.value), error.value


def test_a_right_solution_passes(root, tmp_path):
    """All that DPO_MODULE can grade, but for a few slow descents, in a process of its own."""
    (tmp_path / "my_dpo.py").write_text(RIGHT, encoding="utf-8")
    env = os.environ | {"DPO_MODULE": "my_dpo", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env["PYTHONIOENCODING"] = "utf-8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_dpo.py"]
    command += ["tests/test_logps.py", "tests/test_losses.py"]
    command += ["-k", "not minimum and not ascent and not ends_beside and not ends_at"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


def test_a_file_with_nothing_of_its_own_is_not_graded(root, tmp_path, monkeypatch):
    (tmp_path / "empty_dpo.py").write_text("from dpo import *", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DPO_MODULE", "empty_dpo.py")
    with pytest.raises(ImportError, match="empty_dpo.py defines nothing of its own"):
        runpy.run_path(str(root / "test_dpo.py"))


# The hand-out


def commands(text):
    """What is typed for exercise 1, 2, ...: the arguments of `python -m pytest`."""
    rows = re.findall(r"^\| \d\. .*?`python -m pytest ([^`]*)`", text, re.MULTILINE)
    return [[a.strip('"') for a in re.findall(r'"[^"]+"|\S+', row)] for row in rows]


def test_readme_has_eight_exercises(root):
    assert len(commands((root / "README.md").read_text(encoding="utf-8"))) == 8


def test_the_hand_out_holds_no_solution(root):
    """Signature, docstring and NotImplementedError; the rest is dpo.py, without the answers."""
    source = (root / "dpo.py").read_text(encoding="utf-8")
    stubs = handout.without_bodies(source)
    lines = [line for line in stubs.splitlines() if "raise NotImplementedError" not in line]
    for answer, instead in handout.ANSWERS.items():
        assert answer not in stubs
        source = source.replace(answer, instead)
    assert stubs.count("raise NotImplementedError") == 16 and set(lines) <= set(source.splitlines())
    for gone in ("logsigmoid(", "logsumexp", "beta * (policy", "relu", ".gather(", "[scored]"):
        assert gone in source and gone not in stubs, gone


def test_the_hand_out_on_a_console_that_shows_ascii_alone(root, tmp_path):
    """The folder's name cannot be printed, which is no reason for a traceback after the work."""
    folder = tmp_path / os.fsdecode("Café".encode())
    command = [sys.executable, root / "tests/handout.py", folder]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "has 16 functions to write" in done.stdout
    assert (folder / "dpo.py").exists()


DRIVER = """
import json, os, sys
import pytest
for source, arguments in json.load(sys.stdin):
    open("dpo.py", "w", encoding="utf-8").write(source)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(os.getcwd()):
            del sys.modules[name]  # to be imported anew
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
    print(f"status {int(status)}\\nEND OF A COMMAND", flush=True)
"""


@pytest.mark.slow
def test_the_exercises_in_their_order(root, tmp_path, monkeypatch):
    """In the hand-out nothing passes; the command of exercise n fails until 1 to n are written."""
    source = (root / "dpo.py").read_text(encoding="utf-8")
    every = handout.EXERCISES
    folder = tmp_path / "class"
    handout.hand_out(folder)
    with pytest.raises(SystemExit, match="exists already"):
        handout.hand_out(folder)
    mine, stages = RIGHT[RIGHT.index("\ndef my_loss") :], []  # dpo.py with exercises 1 to n
    for n in range(9):
        monkeypatch.setattr(handout, "EXERCISES", {m: every[m] for m in every if m > n})
        stages.append(handout.without_bodies(source) + mine * (n == 8))
    typed = commands((root / "README.md").read_text(encoding="utf-8"))
    jobs = [(stages[0], ["test_dpo.py"])]
    jobs += [(stages[n + done], typed[n]) for n in range(8) for done in (0, 1)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONIOENCODING"] = "utf-8"
    pipes = dict(capture_output=True, encoding="utf-8", input=json.dumps(jobs))
    run = subprocess.run([sys.executable, "-c", DRIVER], cwd=folder, env=env, **pipes)
    nothing, *found = run.stdout.split("END OF A COMMAND\n")[:-1]
    assert len(found) == 16, run.stderr
    assert " passed" not in nothing and " failed" in nothing, nothing
    assert set(re.findall(r"exercise (\d): ", nothing)) == set("123456")
    for n in range(8):
        assert "status 0" not in found[2 * n], f"exercise {n + 1} passes before it is written"
        assert "status 0" in found[2 * n + 1], f"exercise {n + 1}: {found[2 * n + 1]}"
