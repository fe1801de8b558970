"""What README names exists: its commands, flags, files, functions and tests."""

import ast
import re
from dataclasses import fields

import dpo
import train
from experiments import losses as more


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
    flags = {"--" + field.name.replace("_", "-") for field in fields(train.Config)}
    flags |= {"--no-decay", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= flags
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|txt|md))`", readme):
        assert name == "my_dpo.py" or (root / name).exists(), name
    losses = re.findall(r"^\| `(\w+)` \| .*f?\(?m", readme, re.MULTILINE)
    assert losses == list(dpo.LOSSES), "the table of losses"
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


def test_every_test_of_an_equation_is_run_by_an_exercise_or_named(root):
    """The commands under Exercises pick at least one test each."""
    readme = (root / "README.md").read_text()
    names = {
        path: re.findall(r"^def (test_\w+)", (root / path).read_text(), re.MULTILINE)
        for path in ("test_dpo.py", "tests/test_logps.py", "tests/test_losses.py")
    }
    commands = re.findall(r"DPO_MODULE=my_dpo python -m pytest (\S+) -k \"?([\w ]+?)\"?`", readme)
    assert len(commands) == 6
    for path, wanted in commands:
        for word in wanted.split(" or "):
            assert any(word in name for name in names[path]), (path, word)


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
