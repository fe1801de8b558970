"""What the README files name exists: commands, flags, files, tests; their numbers are measured."""

import ast
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dpo
import train
from experiments import animate, lab
from tests.helpers import expect

ROW = re.compile(r"^\| (.*) \| `(\w+)` \| `(test_\w+)` \|$", re.MULTILINE)
FOLDERS = ".", "experiments", "tests"
SEEDS = range(5)


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture
def readme(root):
    return read(root / "README.md")


@pytest.fixture
def texts(root):
    return {folder: read(root / folder / "README.md") for folder in FOLDERS}


def numbers(text):
    """The equations that the first part of a row of the table names."""
    text = text.split(",")[0]
    text = re.sub(r"section \d+", "", text)
    return {int(n) for n in re.findall(r"\b\d+\b", text)}


def functions_of(source):
    """Name -> text of each function of a file."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


OTHER_FLAGS = {"--list", "--all", "--quick", "--generated", "--nproc_per_node", "--index-url"}
OTHER_FLAGS |= {"--scale"}  # of experiments/device.py


def test_flags_exist(texts, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for folder, text in texts.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
        unknown = named - flags - OTHER_FLAGS - {"--help"}
        assert not unknown, f"{folder}/README.md names flags that train.py does not take: {unknown}"


def test_files_exist(root, texts):
    for folder, text in texts.items():
        named = re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|txt|md))`", text)
        named += re.findall(r"\b(?:tests|experiments)/\w+\.py\b", text)  # in commands, too
        paths = [root / name for name in named if name != "my_dpo.py"]
        linked = re.findall(r"\]\((?!https:)([^)]+)\)", text)
        paths += [root / folder / name for name in linked]
        for path in paths:
            assert path.exists(), f"{folder}/README.md names {path}"


def test_the_table_of_equations(root, readme):
    """Each row's function and test exist, and the test is named after the row's equations."""
    tests = functions_of(read(root / "test_dpo.py"))
    rows = ROW.findall(readme)
    named = set()
    for what, function, test in rows:
        named |= numbers(what)
        assert callable(getattr(dpo, function)), f"dpo.py has no function {function}"
        assert test in tests, f"test_dpo.py has no {test}"
        in_name = {int(n) for n in re.findall(r"eq(\d+)", test)}
        assert numbers(what) <= in_name, f"{test} is not named after {what}"
        assert f"dpo.{function}" in tests[test], f"{test} does not call {function}"
    assert named == {1, 2, 3, 4, 5, 6, 7, 18, 19, 20}, "the equations that have a row"


def test_every_number_cited_in_dpo_has_its_row_and_its_test(root, readme):
    """A number in brackets at the end of a line belongs to the function that the table names, or
    to one that calls it."""
    tests = read(root / "test_dpo.py")
    rows = ROW.findall(readme)
    cited = set()
    for name, text in functions_of(read(root / "dpo.py")).items():
        for number in re.findall(r"# .*?\((\d+)\)", text):
            number = int(number)
            cited.add(number)
            assert f"def test_eq{number}_" in tests, f"Eq. {number} has no test"
            functions = [function for what, function, _ in rows if number in numbers(what)]
            calls = [function for function in functions if f"{function}(" in text]
            assert calls, f"({number}) stands in {name}, README's table has it in {functions}"
    assert cited >= {1, 2, 3, 4, 5, 6, 7, 18, 19}, "dpo.py must mark each equation on its line"


def test_the_loss_that_readme_shows_is_the_loss(root, readme):
    block = re.search(r"## The loss, in dpo.py\n\n```python\n(.*?)```", readme, re.S)[1]
    source = read(root / "dpo.py")
    for line in block.splitlines():
        assert line in source, f"dpo.py has no line {line}"


def test_the_training_commands_parse(root, texts, tmp_path, monkeypatch):
    """The command line takes every `python train.py ...` of the README files."""
    text = "".join(texts.values())
    commands = re.findall(r"\bpython train\.py( [^`\n|&,]*)?", text)
    assert len(commands) >= 10
    monkeypatch.setitem(dpo.LOSSES, "my_loss", dpo.ipo_loss)  # exercise 8
    source = "from dpo import dpo_loss as my_loss"
    (tmp_path / "my_dpo.py").write_text(source, encoding="utf-8")
    shutil.copytree(root / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if "--help" not in command and "--resume" not in command:  # that one asks for a run
            train.load_loss(train.parse_args(shlex.split(command)))


def test_the_experiments_exist(root, texts):
    """Each `python -m experiments.x` is a file with a main of its own that says how to start it."""
    text = "".join(texts.values())
    names = set(re.findall(r"python -m experiments\.(\w+)", text))
    assert names >= {"questions", "animate", "bench", "sample", "compare", "recipes", "device"}
    for name in names:
        path = root / "experiments" / f"{name}.py"
        if not path.exists():
            path = root / "experiments" / name / "__main__.py"
        source = read(path)
        assert 'if __name__ == "__main__":' in source, f"{name}.py cannot be started"
        assert f"python -m experiments.{name}" in source, f"{name}.py does not say how to start it"


# How the table writes a formula, and what Python makes of it
AS_PYTHON = {
    "log sigma": "logsigmoid",
    "2e": "2 * e",
    "2m": "2 * m",
    ") log": ") * log",
    "e log": "e * log",
    "^": "**",
    "1 if m < 1, else 0": "(m < 1).double()",
}


def value_of(formula, m):
    """A cell of the table of losses at margins m, with beta = 0.5 and epsilon = e = 0.1."""
    for text, code in AS_PYTHON.items():
        formula = formula.replace(text, code)
    names = {
        "logsigmoid": torch.nn.functional.logsigmoid,
        "sigma": torch.sigmoid,
        "max": lambda least, x: x.clamp(min=least),
        "beta": 0.5,
        "e": 0.1,
        "m": m,
    }
    return eval(formula, names)


def test_the_table_of_losses(texts):
    """f(m) and -f'(m), as the table writes them, are what dpo.LOSSES computes."""
    pattern = r"^\| `(\w+)` \| ([^|`]+) \| ([^|`]+) \|"
    rows = re.findall(pattern, texts["experiments"], re.MULTILINE)
    assert [name for name, _, _ in rows] == list(dpo.LOSSES), "a row for each of dpo.LOSSES"
    m = torch.tensor([-3.0, -0.3, 0.2, 0.9, 2.5], dtype=torch.float64)
    zero = torch.zeros_like(m)
    for name, f, pull in rows:
        rho = (m / 0.5).requires_grad_()
        result = dpo.LOSSES[name](rho, zero, zero, zero, beta=0.5)
        losses = getattr(result, "losses", result)
        (grad,) = torch.autograd.grad(losses.sum(), rho)
        expect(losses, value_of(f, m), f"{name}: f(m), as the table writes it (expected)", 1e-7)
        why = f"{name}: -f'(m), as the table writes it (expected)"
        expect(-grad / 0.5, value_of(pull, m), why, 1e-7)


def test_the_example_file_loads(readme, tmp_path):
    lines = [line for line in readme.splitlines() if line.startswith('{"')]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(data.load_pairs(path)) == 3


def test_ci_runs_the_commands_of_the_readme(root, readme):
    ci = read(root / ".ci" / "run")
    for command in ("pip install -r requirements.txt", "python -m pytest"):
        assert f"\n{command}\n" in readme, f"README does not say {command} on a line of its own"
        assert f'"{command}"' in ci, f".ci/run does not run README's {command}"
    assert ci.endswith("python -m pytest -m slow\n")


def without_numbers(line):
    words = re.sub(r"[-+]?\d+\.?\d*", "#", line)
    return " ".join(words.split())


def decimals(line):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]


@pytest.mark.slow
def test_the_first_command_prints_what_readme_shows(root, readme, tmp_path):
    """`python train.py`: the same lines, with the numbers that another machine may get."""
    blocks = re.findall(r"```\n(.*?)```", readme, re.S)
    [block] = [block for block in blocks if "The film was" in block]
    command = [sys.executable, str(root / "train.py")]
    pipes = {"capture_output": True, "encoding": "utf-8"}
    ran = subprocess.run(command, cwd=tmp_path, check=True, **pipes).stdout
    assert "DPO 1/1172  loss 0.6931  margin 0.0000  weight 0.5000" in ran, "the first loss is log 2"

    printed = {}
    for line in ran.splitlines():
        printed.setdefault(without_numbers(line), line)  # the first of equal ones
    for line in block.splitlines():
        assert without_numbers(line) in printed, f"not printed: {line}"
        found = printed[without_numbers(line)]
        for got, wanted in zip(decimals(found), decimals(line)):
            assert abs(got - wanted) < 0.05 * (1 + abs(wanted)), f"{found}, not {line}"


# The animation


def change_over(path):
    """(frames, fraction of the pixels that change from the first frame to the last) of a GIF."""
    with Image.open(path) as gif:
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("RGB")).astype(int)
        changed = abs(first - last).max(-1) > 60
        return gif.n_frames, changed.mean()


def test_the_committed_animation_moves(root):
    frames, changed = change_over(root / "assets/dpo.gif")
    assert frames >= 40
    assert 0.02 < changed < 0.5, "bars and title move, the axes do not"


def test_an_animation_of_three_frames(tmp_path):
    """Bars and trail move from the reference (no gap closed) to pi*."""
    _, ref = lab.reference(0)
    optimum, _ = dpo.optimal_policy(ref, lab.WORLD.rewards, lab.BETA)
    shown = animate.responses_to_show(ref, optimum)
    assert (lab.WORLD.rewards[0, shown].diff() >= 0).all(), "sorted by r*"
    for name, logps in (("the reference", ref), ("pi*", optimum)):
        assert logps[0].argmax() in shown, f"the likeliest response of {name} is not shown"
    halfway = (ref.exp() / 2 + optimum.exp() / 2).log()
    walk = [(0, ref), (1, halfway), (2, optimum)]
    animate.animate(walk, ref, tmp_path / "dpo.gif")
    frames, changed = change_over(tmp_path / "dpo.gif")
    assert frames >= 3
    assert 0.02 < changed < 0.5, "bars and title move, the axes do not"
