"""What README names exists: its commands, flags, files, functions and tests."""

import re
from dataclasses import fields

import dpo
import train


def test_commands_flags_and_names(root):
    readme = (root / "README.md").read_text()
    flags = {"--" + field.name.replace("_", "-") for field in fields(train.Config)}
    flags |= {"--no-decay", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= flags
    tests = (root / "test_dpo.py").read_text()
    for function, test in re.findall(r"^\| .* \| `(\w+)` \| `(\w+)` \|$", readme, re.MULTILINE):
        assert hasattr(dpo, function) and f"def {test}(" in tests
    assert len(re.findall(r"^\| .* \| `\w+` \| `test_\w+` \|$", readme, re.MULTILINE)) == 10
    for name in re.findall(r"`(\w+\.(?:py|ipynb|txt))`", readme):
        assert (root / name).exists(), name


def test_every_equation_cited_in_dpo_has_its_test(root):
    cited = set(re.findall(r"# (?:section 4: )?\((\d+)\)", (root / "dpo.py").read_text()))
    assert cited >= {"1", "2", "3", "4", "5", "6", "7", "18", "19"}
    tests = (root / "test_dpo.py").read_text()
    for number in cited - {"19"}:  # Eq. 19 is Eq. 18 at the implicit reward, tested with Eq. 20
        assert f"def test_eq{number}_" in tests, number


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
