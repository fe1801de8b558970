"""What the README files name exists: commands, flags, files, tests; their numbers are measured."""

import ast
import csv
import math
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dpo
import train
from experiments import animate, frontier, lab, verdicts

ROW = re.compile(r"^\| (.*) \| `(\w+)` \| `(test_\w+)` \|$", re.MULTILINE)
FOLDERS = ".", "experiments", "tests"


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text()


@pytest.fixture
def texts(root):
    return {folder: (root / folder / "README.md").read_text() for folder in FOLDERS}


def numbers(text):
    """The equations that a cell of the table names."""
    text = re.sub(r"section \d+", "", text)
    return {int(n) for n in re.findall(r"\b\d+\b", text)}


def test_flags_and_names(root, texts, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) | {"--help"}
    flags |= {"--quick", "--generated", "--nproc_per_node", "--index-url"}  # not of train.py
    flags |= {"--list", "--all"}  # of the questions
    flags |= {"--steps", "--shape", "--batch", "--grow", "--scale", "--only"}  # of the bench
    for folder, text in texts.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) <= flags
        named = re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|txt|md))`", text)
        named = [root / name for name in named if name != "my_dpo.py"]
        named += [root / folder / name for name in re.findall(r"\]\((?!https:)([^)]+)\)", text)]
        for path in named:
            assert path.exists(), f"{folder}/README.md names {path}"


def test_the_table_of_equations(root, readme):
    """Each row's function and test exist, and the test is named after the row's equations."""
    tests, rows = (root / "test_dpo.py").read_text(), ROW.findall(readme)
    named = set().union(*(numbers(what.split(",")[0]) for what, *_ in rows))
    assert named == {1, 2, 3, 4, 5, 6, 7, 18, 19, 20}
    for what, function, test in rows:
        assert callable(getattr(dpo, function)), function
        assert f"def {test}(" in tests, test
        body = tests.split(f"def {test}(")[1].split("\ndef ")[0]
        in_name = set(map(int, re.findall(r"eq(\d+)", test)))
        assert numbers(what.split(",")[0]) <= in_name, (what, test)
        assert f"dpo.{function}" in body, f"{test} does not call {function}"


def test_every_number_cited_in_dpo_has_its_row_and_its_test(root, readme):
    """A number in brackets at the end of a line belongs to the function that the table names."""
    source, rows = (root / "dpo.py").read_text(), ROW.findall(readme)
    tests, cited = (root / "test_dpo.py").read_text(), set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            for number in map(int, re.findall(r"# .*?\((\d+)\)", text)):
                cited.add(number)
                assert f"def test_eq{number}_" in tests, f"Eq. {number} has no test"
                holders = [f for what, f, _ in rows if number in numbers(what)]
                calls = [holder for holder in holders if f"{holder}(" in text]
                assert node.name in holders or calls, f"({number}) stands in {node.name}"
    assert cited >= {1, 2, 3, 4, 5, 6, 7, 18, 19}


def test_the_loss_that_readme_shows_is_the_loss(root, readme):
    block = re.search(r"## The loss, in dpo.py\n\n```python\n(.*?)```", readme, re.S)[1]
    source = (root / "dpo.py").read_text()
    for line in block.splitlines():
        assert line in source, f"dpo.py has no line {line}"


def test_the_training_commands_parse(root, texts, tmp_path, monkeypatch):
    """The command line takes every `python train.py ...` of the README files."""
    commands = re.findall(r"\bpython train\.py( [^`\n|&,]*)?", "".join(texts.values()))
    assert len(commands) >= 10
    monkeypatch.setitem(dpo.LOSSES, "my_loss", dpo.ipo_loss)  # exercise 8
    (tmp_path / "my_dpo.py").write_text("from dpo import dpo_loss as my_loss")
    (tmp_path / "experiments").symlink_to(root / "experiments")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if "--help" not in command and "--resume" not in command:  # that one asks for a run
            train.load_loss(train.parse_args(shlex.split(command)))


def test_the_experiments_exist(root, texts):
    """Each `python -m experiments.x` is a file with a main of its own that says how to start it."""
    names = set(re.findall(r"python -m experiments\.(\w+)", "".join(texts.values())))
    assert names >= {"rlhf", "frontier", "claims", "verdicts", "animate", "bench", "sample"}
    for name in names:
        path = root / "experiments" / f"{name}.py"
        if not path.exists():
            path = root / "experiments" / name / "__main__.py"
        source = path.read_text()
        assert 'if __name__ == "__main__":' in source, name
        assert f"python -m experiments.{name}" in source, f"{name}.py says how to start it"


def test_the_table_of_losses(texts):
    """f(m) and -f'(m), as the table writes them, are what dpo.LOSSES computes."""
    text = texts["experiments"]
    rows = re.findall(r"^\| `(\w+)` \| ([^|`]+) \| ([^|`]+) \|", text, re.MULTILINE)
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


def test_the_example_file_loads(readme, tmp_path):
    lines = [line for line in readme.splitlines() if line[:2] == '{"']
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert len(data.load_pairs(tmp_path / "pairs.jsonl")) == 3


def test_ci_runs_the_commands_of_the_readme(root, readme):
    ci = (root / ".ci" / "run").read_text()
    for command in ("pip install -r requirements.txt", "python -m pytest"):
        assert f"\n{command}\n" in readme, f"README does not say {command} on a line of its own"
        assert f'"{command}"' in ci, f".ci/run does not run README's {command}"
    assert ci.endswith("python -m pytest -m slow\n")


@pytest.mark.slow
def test_the_first_command_prints_what_readme_shows(root, readme, tmp_path):
    """`python train.py`: the same lines, with the numbers that another machine may get."""
    block = next(b for b in re.findall(r"```\n(.*?)```", readme, re.S) if "The film was" in b)
    command = [sys.executable, str(root / "train.py")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "DPO 1/1172  loss 0.6931  margin 0.0000  weight 0.5000" in ran, "the first loss is log 2"

    def words(line):
        return " ".join(re.sub(r"[-+]?\d+\.?\d*", "#", line).split())

    printed = {words(line): line for line in reversed(ran.splitlines())}  # the first of equal ones
    for line in block.splitlines():
        assert words(line) in printed, f"not printed: {line}"
        got, wanted = (re.findall(r"[-+]?\d+\.\d+", x) for x in (printed[words(line)], line))
        for a, b in zip(map(float, got), map(float, wanted)):
            assert abs(a - b) < 0.05 * (1 + abs(b)), f"{printed[words(line)]}, not {line}"


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


def test_the_claims_are_as_measured(root, texts):
    """assets/claims.md follows from the CSV files beside it; experiments/README.md has it line for
    line."""
    table = (root / "assets" / "claims.md").read_text().splitlines()
    assert len(table) == 2 + len(verdicts.CLAIMS) == 10
    for claim, line in zip(verdicts.CLAIMS, table[2:]):
        assert line in texts["experiments"], f"the row of {claim.__name__} is out of date"
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


def test_what_the_course_says_holds_for_every_seed():
    """Claims in words of steps 3 and 7 to 10, against assets/course_*.csv."""
    seeds = range(5)

    def by(name, **wanted):
        return [lab.where(lab.saved(f"course_{name}"), seed=seed, **wanted) for seed in seeds]

    for rows in by("over_optimised"):
        promised, true = ([row[key] for row in rows] for key in ("promised", "expected_reward"))
        assert promised == sorted(promised), "a smaller beta: more of the learned reward"
        assert max(true) - true[-1] > 0.1 and true.index(max(true)) > 20, "E[r*] turns over"
        assert rows[-1]["in_no_pair"] > 0.6, "much of the mass ends in no pair"
    table, network = (by("displaced", policy=kind) for kind in ("table", "network"))
    assert all(row["moved"] > -0.1 for rows in table for row in rows)
    fallen = [sum(row["moved"] < 0 for row in rows) for rows in network]
    assert min(fallen) >= 1 and max(fallen) <= 3, "one to three of the four"
    ends = {"DPO": [], "weight left at 1/2": [], "reference copied every quarter": []}
    for run, found in ends.items():
        found += [max(rows, key=lambda row: row["step"])["kl"] for rows in by("held", run=run)]
    held, loose, moving = ends.values()
    assert max(held) < 1 and min(moving) > 2 * max(held) and min(loose) > 2 * max(held)
    starts = "untrained", "SFT on the chosen", "SFT on both"
    for (none,), (chosen,), (both,) in zip(*(by("sft_first", start=name) for name in starts)):
        assert max(abs(row["accuracy"] - 0.8) for row in (none, chosen, both)) < 0.03
        assert none["grammatical"] < 0.1 < 0.6 < min(chosen["grammatical"], both["grammatical"])
    for n in (1_000, 3_000):
        for part in by("samplers", pairs=n):
            closed = {row["sampler"]: row["gap_closed"] for row in part}
            assert max(closed, key=closed.get) == "the policy itself"
    rows = lab.where(lab.saved("course_samplers"), pairs=30_000)
    means = {row["sampler"]: 0.0 for row in rows}
    for row in rows:
        means[row["sampler"]] += row["gap_closed"] / 5
    assert sorted(means, key=means.get) == ["colder", "uniform", "reference", "the policy itself"]
    for rows in by("by_heart"):
        start, *_, end = rows
        assert end["own accuracy"] > 0.88 > 0.72 > end["held out accuracy"]
        assert end["objective"] < start["objective"] - 2 and end["in no pair"] > 0.35
        assert end["grammatical"] < 0.1 < start["grammatical"]
    lengths = {name: by("other_losses", loss=name) for name in ("pi*", "dpo", "dpo of means")}
    for (best,), (sums,), (means,) in zip(*lengths.values()):
        assert abs(sums["tokens"] - best["tokens"]) < 0.03 < means["tokens"] - best["tokens"]
        assert means["kl"] > 1.5 * sums["kl"], "a weaker penalty"


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
    shown = animate.responses_to_show(ref, best)
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
