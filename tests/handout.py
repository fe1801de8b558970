"""What a class is handed out: the project in a folder, with the bodies in dpo.py removed.

    python tests/handout.py assignment

Signatures and docstrings stay. README says what to write and how it is graded.
"""

import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["README.md", "requirements.txt", "LICENSE", "model.py", "data.py", "train.py",
         "test_dpo.py", "tests/__init__.py", "tests/conftest.py", "tests/helpers.py",
         "tests/mistakes.py", "tests/test_logps.py", "tests/test_losses.py",
         "experiments/__init__.py", "experiments/losses.py"]  # fmt: skip
EXERCISES = {
    1: ("bradley_terry", "reward_model_loss", "kl_divergence", "rlhf_objective"),
    2: ("optimal_policy", "implicit_reward"),
    3: ("dpo_loss",),
    4: ("reward_margins", "dpo_gradient"),
    5: ("response_logps",),
    6: ("plackett_luce_logps", "plackett_luce_loss"),
    7: ("cdpo_loss", "robust_loss", "ipo_loss", "hinge_loss"),
}
ANSWERS = {  # what stays of dpo.py would give these away; what stands there instead
    "# sigma(r_rejected - r_chosen), between 0 and 1": "# exercise 3: of section 4's gradient",
    " At policy == reference both weights are 1/2 and look alike.": "",
    " and every weight is 1/2.": ".",
}


def without_bodies(source):
    """The text of dpo.py with each function of EXERCISES cut down to signature and docstring."""
    for answer, instead in ANSWERS.items():
        assert answer in source, f"dpo.py does not hold this any more: {answer}"
        source = source.replace(answer, instead)
    lines = source.splitlines()
    number = {name: n for n, names in EXERCISES.items() for name in names}
    for node in reversed(ast.parse(source).body):  # from the end, so that line numbers stay right
        if isinstance(node, ast.FunctionDef) and node.name in number:
            stub = f'    raise NotImplementedError("exercise {number.pop(node.name)}: {node.name}")'
            lines[node.body[0].end_lineno : node.end_lineno] = [stub]
    assert not number, f"dpo.py has no {', '.join(number)}"
    return "\n".join(lines) + "\n"


def hand_out(folder):
    if folder.exists():
        sys.exit(f"{folder} exists already; nothing was written")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    source = (ROOT / "dpo.py").read_text(encoding="utf-8")
    (folder / "dpo.py").write_text(without_bodies(source), encoding="utf-8")
    print(f"{folder}/dpo.py has {sum(map(len, EXERCISES.values()))} functions to write")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.reconfigure(errors="replace")  # print "?" for what the console cannot show
    hand_out(Path(sys.argv[1]))
