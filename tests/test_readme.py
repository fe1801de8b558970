"""What README names exists: its commands, flags, files, functions and tests."""

import ast
import csv
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import cli
import data
import dpo
from experiments import animate, frontier, lab, verdicts
from experiments import losses as more
from test_notebook import printed_by, steps_of


ROW = re.compile(r"^\| (.*) \| `(\w+)` \| `(test_\w+)` \|$", re.MULTILINE)


def numbers(text):
    """The equations that a cell of the table names: "11 to 15" are five."""
    text = re.sub(r"(Definition|Lemma|Theorem|Proposition|section|footnote) \d+", "", text)
    text = re.sub(
        r"(\d+) to (\d+)", lambda m: " ".join(map(str, range(int(m[1]), int(m[2]) + 1))), text
    )
    return {int(n) for n in re.findall(r"\b\d+\b", text.replace("A.4", ""))}


def test_commands_flags_and_names(root):
    readme = (root / "README.md").read_text()
    flags = {"--" + field.name.replace("_", "-") for field in fields(cli.Config)}
    flags |= {"--no-decay", "--help", "--generated", "--quick"}
    flags |= {"--steps", "--only", "--shape", "--grow"}  # of experiments/bench.py
    flags |= {"--nproc_per_node", "--nnodes", "--rdzv-endpoint"}  # of torchrun
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", readme)) <= flags
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|txt|md))`", readme)
    linked = re.findall(r"\]\((?!https:)([^)]+)\)", readme)
    for name in named + linked:
        assert name in ("my_dpo.py", "grading/dpo.py") or (root / name).exists(), name
    assert not re.search(r"@[A-Z]+@", readme), "a number was never filled in"
    for name in re.findall(r"`(\w+_loss)`", readme):
        assert name == "my_loss" or hasattr(dpo, name) or hasattr(more, name), name


def test_the_table_of_equations(root):
    """Each row's function and test exist, and the test is named after the row's equations."""
    tests = (root / "test_dpo.py").read_text()
    rows = ROW.findall((root / "README.md").read_text())
    assert set().union(*(numbers(what.split(",")[0]) for what, *_ in rows)) >= set(range(1, 21))
    for what, function, test in rows:
        assert callable(getattr(dpo, function)), function
        assert f"def {test}(" in tests, test
        body = tests.split(f"def {test}(")[1].split("\ndef ")[0]
        named = set(map(int, re.findall(r"eq(\d+)", test)))
        if re.search(r"eq(\d+)_to_eq(\d+)", test):
            named |= set(range(min(named), max(named) + 1))
        assert numbers(what.split(",")[0]) <= named, (what, test)
        used = f"dpo.{function}" in body or "slopes(" in body or "projected(" in body
        assert used, f"{test} does not call {function}"


def test_every_number_cited_in_dpo_has_its_row_and_its_test(root):
    """A number in brackets at the end of a line belongs to the function that the table names."""
    source = (root / "dpo.py").read_text()
    rows = ROW.findall((root / "README.md").read_text())
    tests = (root / "test_dpo.py").read_text()
    cited = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            for number in map(int, re.findall(r"# .*?\((\d+)\)", "\n".join(lines))):
                cited.add(number)
                assert f"def test_eq{number}_" in tests, f"Eq. {number} has no test"
                holders = [f for what, f, _ in rows if number in numbers(what)]
                calls = [holder for holder in holders if f"{holder}(" in "\n".join(lines)]
                assert node.name in holders or calls, f"({number}) stands in {node.name}"
    assert cited >= {1, 2, 3, 4, 5, 6, 7, 18, 19}


def test_the_training_commands_parse(root, tmp_path, monkeypatch):
    """The command line takes every `python train.py ...` of README."""
    text = (root / "README.md").read_text()
    commands = re.findall(r"\bpython train\.py( [^`\n|&,]*)?", text)
    assert len(commands) >= 10
    monkeypatch.setitem(dpo.LOSSES, "my_loss", dpo.ipo_loss)  # exercise 8
    (tmp_path / "my_dpo.py").write_text("from dpo import dpo_loss as my_loss")
    (tmp_path / "experiments").symlink_to(root / "experiments")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if "--help" not in command and "--resume" not in command:  # that one asks for a run
            cli.parse_args(shlex.split(command))


def test_the_experiments_exist_and_take_quick(root):
    """Each `python -m experiments.x [--quick]` of README is a file with a main of its own."""
    readme = (root / "README.md").read_text()
    names = set(re.findall(r"python -m experiments\.(\w+)", readme))
    assert names >= {"rlhf", "frontier", "claims", "verdicts"}
    for name in names:
        source = (root / "experiments" / f"{name}.py").read_text()
        assert 'if __name__ == "__main__":' in source, name
        assert f"python -m experiments.{name}" in source, f"{name}.py says how to start it"


def test_the_table_of_losses(root):
    """f(m) and -f'(m), as README writes them, are what dpo.LOSSES computes."""
    readme = (root / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|`]+) \| ([^|`]+) \|", readme, re.MULTILINE)
    assert [name for name, *_ in rows] == list(dpo.LOSSES)
    m, zero = torch.tensor([-3.0, -0.3, 0.2, 0.9, 2.5]).double(), torch.zeros(5).double()
    python = {" log sigma": " * logsig", "log sigma": "logsig", "2e": "2 * e", "2m": "2 * m"}
    python |= {"^": "**", "1 if m < 1, else 0": "(m < 1).double()"}
    names = {"logsig": torch.nn.functional.logsigmoid, "sigma": torch.sigmoid, "m": m, "e": 0.1}
    names |= {"max": lambda least, x: x.clamp(min=least), "beta": 0.5}
    for name, *cells in rows:
        for text, code in python.items():
            cells = [cell.replace(text, code) for cell in cells]
        f, pull = (eval(cell, names) for cell in cells)
        rho = (m / 0.5).requires_grad_()
        result = dpo.LOSSES[name](rho, zero, zero, zero, beta=0.5)
        losses = getattr(result, "losses", result)
        (grad,) = torch.autograd.grad(losses.sum(), rho)
        torch.testing.assert_close(losses.detach(), f, msg=f"{name}: f(m)")
        torch.testing.assert_close(-grad / 0.5, pull, msg=f"{name}: -f'(m)")


def test_the_example_file_loads(root, tmp_path):
    from data import load_pairs

    lines = [line for line in (root / "README.md").read_text().splitlines() if line[:2] == '{"']
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert len(load_pairs(tmp_path / "pairs.jsonl")) == 3


def test_ci_runs_the_test_command_of_the_readme(root):
    commands = re.findall(r"^python3 -m venv .*$", (root / "README.md").read_text(), re.MULTILINE)
    assert [command.split("&& ")[-1] for command in commands] == [
        ".venv/bin/python train.py",
        ".venv/bin/python -m pytest",
    ]
    ci = (root / ".ci" / "run").read_text()
    assert "command=$(grep --max-count=1 -- '-m pytest$' README.md)" in ci
    assert ci.rstrip().endswith('bash -c "$command"')


# What assets/ holds


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_committed_dots_lie_below_the_curve(root):
    """assets/frontier.csv against the tangents of assets/frontier_curve.csv, of slope beta; and
    Best-of-N within its bound on KL."""
    rows, curve = (read(root / "assets" / f"frontier{end}.csv") for end in ("", "_curve"))
    assert {row["method"] for row in rows} == set(frontier.STYLE)
    for seed in "01234":
        points = [list(map(float, list(row.values())[1:])) for row in curve if row["seed"] == seed]
        for row in (row for row in rows if row["seed"] == seed):
            kl, reward, n = float(row["kl"]), float(row["expected_reward"]), float(row["setting"])
            for beta, kl_there, reward_there in points:
                assert reward <= reward_there + beta * (kl - kl_there) + 1e-3, row  # 6 digits
            if row["method"] == "Best-of-N":
                assert kl <= math.log(n) - (n - 1) / n + 1e-6, row


def test_readme_shows_the_claims_as_measured(root):
    """README has assets/claims.md line for line, and that follows from the CSV files beside it."""
    readme = (root / "README.md").read_text()
    table = (root / "assets" / "claims.md").read_text().splitlines()
    assert len(table) == 2 + len(verdicts.CLAIMS) == 10
    for claim, line in zip(verdicts.CLAIMS, table[2:]):
        assert line in readme, f"README's row of {claim.__name__} is out of date"
        _, row = verdicts.verdict(claim, root / "assets")
        assert row == line, f"assets/claims.md is out of date: {claim.__name__}"


def test_the_tables_in_assets_are_as_measured(root):
    """The Markdown that README links to follows from the CSV files beside it."""
    assets = root / "assets"
    shares = lab.load_csv(assets / "frontier_shares.csv")
    text = frontier.markdown(shares, 5)
    assert (assets / "frontier.md").read_text() == text
    assert text.count("\n| ") == 2 * (1 + len(frontier.STYLE))
    files = "rlhf.csv", "rlhf_reward_model.csv"
    parts = [lab.load_csv(assets / name) for name in files]
    tables = [
        lab.table(rows, by, list(rows[0])[2:]) for rows, by in zip(parts, ("system", "rewards"))
    ]
    assert (assets / "rlhf.md").read_text() == "\n".join(tables)


DOCTORED = {  # what would have to be measured for the other verdict
    "no_reward_model_needed": lambda r: {"pair_accuracy": 0.6 if "DPO" in r["rewards"] else 0.9},
    "the_weight_matters": lambda r: {"grammatical": 0.5},
    "little_tuning": lambda r: {"gained": 1.0 if r["method"] == "DPO" else r["lr"]},
    "as_good_or_better": lambda r: {"best": 1.0 if r["method"] == "DPO" else 0.5},
    "close_to_the_reference": lambda r: {"kl": r["beta"]},
    "over_fitting": lambda r: {"held_out_accuracy": r["train_accuracy"]},
    "coverage": lambda r: {"in_no_pair": 0.01},
    "both_log_probs_fall": lambda r: {"chosen": 1.0},
}


def test_the_verdicts_can_be_the_other_ones(root):
    """With other numbers each rule says no; and yes, where it says no or might have."""
    for claim in verdicts.CLAIMS:
        name = "frontier_shares" if claim.__name__ == "as_good_or_better" else None
        rows = lab.load_csv(root / "assets" / f"{name or 'claims_' + claim.__name__}.csv")
        changed = [row | DOCTORED[claim.__name__](row) for row in rows]
        wanted = claim.__name__ in ("little_tuning", "as_good_or_better")
        assert bool(claim(changed)[3]) == wanted, claim.__name__


def test_the_animation_ends_near_the_optimum(root, tmp_path):
    """Bars and trail move from the reference (no gap closed) to pi*; the committed one likewise."""
    _, ref = lab.reference(0)
    best, _ = dpo.optimal_policy(ref, lab.WORLD.rewards, lab.BETA)
    shown = animate.answers_to_show(ref, best)
    assert (lab.WORLD.rewards[0, shown].diff() >= 0).all(), "sorted by r*"
    assert {ref[0].argmax().item(), best[0].argmax().item()} <= set(shown.tolist())
    halfway = (ref.exp() / 2 + best.exp() / 2).log()
    animate.animate([(0, ref), (1, halfway), (2, best)], ref, tmp_path / "dpo.gif")
    for path, frames in ((tmp_path / "dpo.gif", 3), (root / "assets" / "dpo.gif", 40)):
        with Image.open(path) as gif:
            assert gif.n_frames >= frames
            gif.seek(0)
            first = np.asarray(gif.convert("RGB")).astype(int)
            gif.seek(gif.n_frames - 1)
            last = np.asarray(gif.convert("RGB")).astype(int)
        assert 0.02 < (abs(first - last).max(-1) > 60).mean() < 0.5, "bars and title have moved"


# What a reader is promised


def test_the_questions_are_answered_by_the_notebook(root):
    """Ten answers; each names its steps, and its numbers are what the notebook printed there."""
    readme = (root / "README.md").read_text()
    section = readme.split("## Questions that everyone asks")[1].split("\n## ")[0]
    answers = re.findall(
        r"^\d+\. \*\*(.*?)\*\* \(steps? ([\d, ]+)\)(.*?)(?=^\d+\. |\Z)", section, re.M | re.S
    )
    assert len(answers) == 10
    notebook = nbformat.read(root / "notebook.ipynb", as_version=4)
    printed = {step: printed_by(cells) for step, cells in steps_of(notebook).items()}
    for question, steps, answer in answers:
        known = [
            float(n) for s in steps.split(", ") for n in re.findall(r"-?\d+\.\d+", printed[int(s)])
        ]
        for number in re.findall(r"-?\d+\.\d+", answer):
            digits = len(number.split(".")[1])
            near = {round(abs(value), digits) for value in known} | {
                round(v, digits) for v in known
            }
            assert float(number) in near, f"{question} {number} is not printed in steps {steps}"


def test_the_recipes_for_other_forms(root, tmp_path, monkeypatch, capsys):
    """README's lines of Python turn lists of messages and a JSON array into pairs."""
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    asked = [*said, {"role": "user", "content": "Why?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Since.", "No.")]
    row = dict(zip(("prompt", "chosen", "rejected"), (asked, *answers)))
    (tmp_path / "messages.jsonl").write_text(json.dumps(row) + "\n")
    pairs = [data.Pair("2 + 2 =", "4", "5"), data.Pair("3 + 3 =", "6", "7")]
    (tmp_path / "array.json").write_text(json.dumps([pair._asdict() for pair in pairs]))
    monkeypatch.chdir(tmp_path)
    recipes = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)
    talk = "\n\nUser: Hi.\n\nAssistant: Hello.\n\nUser: Why?\n\nAssistant:"
    for recipe, wanted in zip(recipes, ([(talk, " Since.", " No.")], pairs), strict=True):
        exec(recipe, {})
        (tmp_path / "pairs.jsonl").write_text(capsys.readouterr().out)
        assert data.load_pairs(tmp_path / "pairs.jsonl") == wanted


@pytest.mark.notebook
def test_the_first_command_prints_what_readme_shows(root, tmp_path):
    """`python train.py`, with the numbers that another machine may get; samples are free."""
    readme = (root / "README.md").read_text()
    block = next(b for b in re.findall(r"```\n(.*?)```", readme, re.S) if "samples before" in b)
    command = [sys.executable, str(root / "train.py")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    shown, printed = (
        {" ".join(re.sub(r"-?\d+\.?\d*", "#", line).split()) for line in text.splitlines()}
        for text in (block, ran)
    )
    for line in shown - {"..."}:
        assert line.startswith("The ") or line in printed, f"not printed: {line}"  # or a sample
    first = "DPO 1/2352  loss 0.6931  margin 0.0000  weight 0.5000  "
    assert first in block and first in ran, "log 2"
    for row in ("reference", "dpo", "optimum"):
        got, wanted = (
            list(map(float, next(re.finditer(rf"^{row} .*$", text, re.M))[0].split()[1:]))
            for text in (ran, block)
        )
        assert all(abs(a - b) < 0.03 * (1 + abs(b)) for a, b in zip(got, wanted)), (row, got)
