"""DPO_MODULE=my_dpo: a right solution of the exercises passes, a wrong one is told its mistake."""

import json
import os
import re
import runpy
import subprocess
import sys
import types

import handout
import pytest
import test_logps
import test_losses

import dpo
import test_dpo

RIGHT = """
from dpo import *
from torch import exp, log, no_grad

def bradley_terry(rewards_1, rewards_2):
    return 1 / (1 + exp(rewards_2 - rewards_1))

def reward_model_loss(w, l):
    assert w.shape == l.shape
    return F.softplus(l - w)

def kl_divergence(logps, others):
    return torch.where(logps == -torch.inf, 0, logps.exp() * (logps - others)).sum(-1)

def rlhf_objective(logps, ref_logps, rewards, beta):
    return (logps.exp() * (rewards - beta * (logps - ref_logps))).sum(-1)

def optimal_policy(ref_logps, rewards, beta):
    check_settings(beta)
    Z = (ref_logps.exp() * (rewards / beta).exp()).sum(-1)
    return ref_logps + rewards / beta - log(Z)[..., None], log(Z)

def implicit_reward(logps, ref_logps, beta):
    assert logps.shape == ref_logps.shape
    check_settings(beta)
    return (logps - ref_logps) * beta

def dpo_loss(policy_w, policy_l, ref_w, ref_l, beta=0.1):
    check_shapes(policy_w, policy_l, ref_w, ref_l)
    r_w, r_l = implicit_reward(policy_w, ref_w, beta), implicit_reward(policy_l, ref_l, beta)
    with no_grad():
        weights = 1 / (1 + exp(r_w - r_l))
    return DPOLoss(F.softplus(r_l - r_w), weights, r_w.detach(), r_l.detach())

def reward_margins(w, l, ref_w, ref_l, beta):
    check_shapes(w, l, ref_w, ref_l)
    return implicit_reward(w - l, ref_w - ref_l, beta)

def dpo_gradient(w, l, ref_w, ref_l, beta=0.1):
    weights = dpo_loss(w, l, ref_w, ref_l, beta).weights
    return -beta * weights, weights * beta

def response_logps(model, ids, mask):
    assert ids.shape == mask.shape
    logits = at_least_float32(model(ids))[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(mask[:, 1:], logps, 0).sum(-1)

def plackett_luce_logps(rewards):
    return sum(rewards[..., k] - rewards[..., k:].logsumexp(-1) for k in range(rewards.shape[-1]))

def plackett_luce_loss(policy_logps, ref_logps, beta=0.1):
    check_shapes(policy_logps, ref_logps, dims=2)
    return -plackett_luce_logps(implicit_reward(policy_logps, ref_logps, beta))

def cdpo_loss(*logps, beta=0.1, epsilon=0.1):
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return F.softplus(-m) + epsilon * m

def robust_loss(*logps, beta=0.1, epsilon=0.1):
    check_settings(beta, epsilon)
    m = reward_margins(*logps, beta=beta)
    return F.softplus(-m) - m * epsilon / (1 - 2 * epsilon)

def ipo_loss(*logps, beta=0.1):
    return (reward_margins(*logps, beta=beta) / beta - 1 / (2 * beta)) ** 2

def hinge_loss(*logps, beta=0.1):
    return (1 - reward_margins(*logps, beta=beta)).clamp(min=0)

def my_loss(*logps, beta=0.1):
    m = reward_margins(*logps, beta=beta)
    root = (1 + m**2).sqrt()
    return DPOLoss(root - m, (1 - m / root).detach(), None, None)

LOSSES["my_loss"] = my_loss
"""
HAND, CONVEX = test_losses.test_family_by_hand, test_losses.test_family_is_convex_and_pulls_the_right_way
LOGPS, GRADIENT = test_logps.test_response_logps_is_the_slow_sum, test_dpo.test_gradient_by_hand
PAIRS = test_logps.ROWS, test_logps.ORDERS[1]
WRONG = [  # what stands in RIGHT, what stands there instead, who notices, and what it says
    ("(rewards_2 - rewards_1)", "(rewards_1 - rewards_2)", test_dpo.test_eq1_bradley_terry,
     "the two rewards are exchanged"),
    ("F.softplus(l - w)", "F.softplus(w - l)",
     test_dpo.test_eq2_reward_model_loss_and_its_minimum, "the sign of the margin is inverted"),
    ("torch.where(logps == -torch.inf, 0, logps.exp() * (logps - others))",
     "(logps.exp() * (logps - others))", test_dpo.test_eq3_objective_of_a_coin, "0 log 0 is 0"),
    ("rewards - beta", "rewards + beta", test_dpo.test_eq3_objective_of_a_coin, "the KL is added"),
    ("[..., None], log(Z)", "[..., None], Z", test_dpo.test_eq4_optimal_policy, "not its log"),
    (" - log(Z)[..., None]", "", test_dpo.test_eq4_optimal_policy, "the policy sums to 1"),
    ("(logps - ref_logps) * beta", "logps * beta", test_dpo.test_eq5_reward_from_its_policy,
     "the reference is left out"),
    ("plus(r_l - r_w)", "plus(r_w - r_l)", test_dpo.test_eq7_by_hand, "margin is inverted"),
    ("exp(r_w - r_l)", "exp(r_l - r_w)", test_dpo.test_eq7_by_hand, "as A.4 misprints it"),
    ("r_w.detach()", "r_w", test_dpo.test_eq7_by_hand, "only losses carry a gradient"),
    ("(w - l, ref_w - ref_l, beta)", "(w - l, ref_l - ref_w, beta)", GRADIENT, "reward_margins"),
    ("-beta * weights, weights", "beta * weights, -weights", GRADIENT, "descent must raise"),
    ("(ids))[:, :-1]", "(ids))[:, 1:]", LOGPS, "the logits are not shifted"),
    ("(mask[:, 1:]", "(mask[:, :-1]", LOGPS, "the mask is not shifted"),
    ("torch.where(mask[:, 1:], logps, 0)", "logps", LOGPS, "prompt and padding are counted"),
    ("logps, 0).sum(-1)", "logps, 0).sum(-1) / mask.sum(-1)", LOGPS, "a mean over tokens"),
    ("logps, 0).sum(-1)", "logps, 0).sum(-1).flip(0)", LOGPS, "log pi(y|x)"),
    ("logps, 0).sum(-1)", "logps, 0).sum(-1).roll(len(ids) // 2)", LOGPS, "are exchanged"),
    ("logps, 0).sum(-1)", "logps, 0).sum(-1).detach().requires_grad_()", LOGPS, "a detach"),
    ("at_least_float32(model(ids))", "model(ids).float()", LOGPS, "float64 is cast down"),
    ("at_least_float32(model(ids))", "model(ids)",
     lambda: test_logps.test_low_precision_is_summed_in_float32(torch.bfloat16), "in float32"),
    ("torch.where(mask[:, 1:], logps, 0)", "(logps * mask[:, 1:])",
     test_logps.test_what_is_impossible_where_nothing_is_scored_does_no_harm, "use where"),
    ("rewards[..., k:].log", "rewards[..., :k + 1].log", test_dpo.test_eq18_plackett_luce, "j <= k"),
    ("-plackett_luce_logps(", "plackett_luce_logps(",
     test_dpo.test_eq19_rankings_from_the_optimal_policy, "Eq. 20's minus"),
    ("+ epsilon * m", "- epsilon * m", lambda: HAND("cdpo"), "cdpo: f(m)"),
    (" / (1 - 2 * epsilon)", "", lambda: HAND("robust"), "robust: f(m)"),
    ("/ beta - 1 / (2 * beta)", "- 1 / 2", lambda: HAND("ipo"), "ipo: f(m)"),
    ("(1 - reward_margins", "(-reward_margins", lambda: HAND("hinge"), "hinge: f(m)"),
    ("root - m", "root + m", lambda: CONVEX("my_loss"), "nothing is learnt"),
    ("1 - m / root", "m / root - 1", lambda: CONVEX("my_loss"), "weights must be"),
    ("(1 - m / root).detach()", "1 - m / root", lambda: CONVEX("my_loss"), "no gradient: detach"),
]  # fmt: skip


@pytest.fixture
def graded(monkeypatch):
    """A student's file in place of dpo in the three files of tests, in this process."""

    def put(source):
        student = types.ModuleType("my_dpo")
        monkeypatch.setattr(dpo, "LOSSES", dict(dpo.LOSSES))  # which the file adds to
        exec(source, student.__dict__)
        for tests in (test_dpo, test_logps, test_losses):
            monkeypatch.setattr(tests, "dpo", student)

    return put


def run(test):
    test(*PAIRS) if test is LOGPS else test()


@pytest.mark.parametrize("case", range(len(WRONG)), ids=lambda i: WRONG[i][1])
def test_a_wrong_solution_is_told_its_mistake(graded, case):
    right, wrong, test, says = WRONG[case]
    assert RIGHT.count(right) == 1, right
    graded(RIGHT)
    run(test)
    graded(RIGHT.replace(right, wrong))
    with pytest.raises(AssertionError) as error:
        run(test)
    assert says in str(error.value), error.value


def command(*arguments):
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def test_a_right_solution_passes(root, tmp_path):
    """All that DPO_MODULE can grade, but for a few slow descents, in a process of its own."""
    (tmp_path / "my_dpo.py").write_text(RIGHT)
    env = os.environ | {"DPO_MODULE": "my_dpo", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    paths = "test_dpo.py", "tests/test_logps.py", "tests/test_losses.py"
    words = "not minimum and not ascent and not ends_beside and not ends_at"
    done = subprocess.run(command(*paths, "-k", words), cwd=root, env=env, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_a_file_with_nothing_of_its_own_is_not_graded(root, tmp_path, monkeypatch):
    (tmp_path / "empty_dpo.py").write_text("from dpo import *")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DPO_MODULE", "empty_dpo.py")
    with pytest.raises(ImportError, match="empty_dpo.py defines nothing of its own"):
        runpy.run_path(str(root / "test_dpo.py"))


# The hand-out


def commands(text):
    """What is typed for exercise 1, 2, ...: the arguments of `python -m pytest`."""
    rows = re.findall(r"^\| \d\. .*?`python -m pytest ([^`]*)`", text, re.MULTILINE)
    return [[a.strip('"') for a in re.findall(r'"[^"]+"|\S+', row)] for row in rows]


def test_the_notebook_and_readme_grade_alike(root):
    import nbformat

    cells = nbformat.read(root / "notebook.ipynb", as_version=4).cells
    found = commands((root / "README.md").read_text())
    assert found == commands(cells[-1].source) and len(found) == 8


def test_the_hand_out_holds_no_solution(root):
    """Signature, docstring and NotImplementedError; the rest is dpo.py, without the answers."""
    source = (root / "dpo.py").read_text()
    stubs = handout.without_bodies(source)
    lines = [line for line in stubs.splitlines() if "raise NotImplementedError" not in line]
    for answer, instead in handout.ANSWERS.items():
        assert answer not in stubs
        source = source.replace(answer, instead)
    assert stubs.count("raise NotImplementedError") == 16 and set(lines) <= set(source.splitlines())
    for gone in ("logsigmoid(", "logsumexp", "beta * (policy", "relu", "index_add", "nonzero"):
        assert gone in source and gone not in stubs, gone


DRIVER = """
import json, os, sys
import pytest
for source, arguments in json.load(sys.stdin):
    open("dpo.py", "w").write(source)
    ours = [n for n, m in sys.modules.items() if (getattr(m, "__file__", 0) or "").startswith(os.getcwd())]
    for name in ours:
        del sys.modules[name]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
    print(f"status {int(status)}\\n=====", flush=True)
"""


@pytest.mark.slow
def test_the_exercises_in_their_order(root, tmp_path, monkeypatch):
    """In the hand-out nothing passes; the command of exercise n fails until 1 to n are written."""
    source, every, folder = (root / "dpo.py").read_text(), handout.EXERCISES, tmp_path / "assignment"
    handout.hand_out(folder)
    with pytest.raises(SystemExit, match="exists already"):
        handout.hand_out(folder)
    mine = RIGHT[RIGHT.index("\ndef my_loss") :]
    stages = []  # dpo.py with exercises 1 to n written
    for n in range(9):
        monkeypatch.setattr(handout, "EXERCISES", {m: every[m] for m in every if m > n})
        stages.append(handout.without_bodies(source) + mine * (n == 8))
    typed = commands((root / "README.md").read_text())
    jobs = [(stages[0], ["test_dpo.py"])]
    jobs += [(stages[n + late], typed[n]) for n in range(8) for late in (0, 1)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = dict(capture_output=True, text=True, input=json.dumps(jobs))
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=folder, env=env, **pipes)
    nothing, *found = done.stdout.split("=====\n")[:-1]
    assert len(found) == 16, done.stderr
    assert " passed" not in nothing and " failed" in nothing, nothing
    assert set(re.findall(r"exercise (\d): ", nothing)) == set("123456")
    for n in range(8):
        assert "status 0" not in found[2 * n], f"exercise {n + 1} passes before it is written"
        assert "status 0" in found[2 * n + 1], f"exercise {n + 1}: {found[2 * n + 1]}"
