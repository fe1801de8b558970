"""The notebook runs from top to bottom in a clean kernel, and was saved with its outputs."""

import ast
import math
import re
import statistics
from itertools import pairwise

import nbformat
import pytest
from nbclient import NotebookClient

MODULES = ["dpo", "model", "data", "train"]
for name in ("lab", "rlhf", "frontier", "claims", "verdicts", "losses", "course", "draw"):
    MODULES.append(f"experiments/{name}")
QUESTION = re.compile(
    r"\*\*Question (\d+)\.\*\* (.+?)\n\n<details><summary>Answer</summary>\n\n(.+?)\n</details>",
    re.DOTALL,
)


@pytest.fixture
def notebook(root):
    return nbformat.read(root / "notebook.ipynb", as_version=4)


def code_of(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def text_of(cells):
    """The prose of some cells."""
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def outputs_of(cells):
    return [output for cell in code_of(cells) for output in cell.outputs]


def printed_by(cells):
    return "".join(output.get("text", "") for output in outputs_of(cells))


def steps_of(notebook):
    """Number of a step -> the cells from its heading on; 0 is what stands before the first."""
    number = 0
    steps = {}
    for cell in notebook.cells:
        heading = re.search(r"^## (\d+)\. ", cell.source, flags=re.MULTILINE)
        if heading and cell.cell_type == "markdown":
            number = int(heading[1])
        steps.setdefault(number, []).append(cell)
    return steps


def test_notebook_was_saved_with_its_outputs(notebook):
    code = code_of(notebook.cells)
    numbers = [cell.execution_count for cell in code]
    assert numbers == list(range(1, len(code) + 1)), "run it from top to bottom, then save it"
    for cell in code[1:]:
        assert cell.outputs, f"but for the imports every cell shows something: {cell.source}"
    for output in outputs_of(code):
        assert output.output_type in ("stream", "display_data"), output
        assert output.get("name") != "stderr", f"a warning was saved: {output.text}"
        assert len(output.get("text", "").splitlines()) <= 25, "a wall of output"


def test_the_course_keeps_to_its_budget(notebook):
    """An hour: 45 cells, 3,600 words, 12 lines a code cell, none of them long."""
    assert len(notebook.cells) <= 45
    assert len(text_of(notebook.cells).split()) <= 3600
    for cell in code_of(notebook.cells):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 12, f"a cell of {len(lines)} lines: {cell.source}"
        for line in lines:
            assert len(line) <= 100, f"a long line: {line}"


def test_every_step_shows_a_picture(notebook):
    steps = steps_of(notebook)
    assert list(steps) == list(range(12))
    for number in range(1, 11):
        pictures = ["image/png" in output.get("data", {}) for output in outputs_of(steps[number])]
        assert any(pictures), f"step {number} shows no picture"


def test_every_step_asks_before_it_shows(notebook):
    """At most 20 questions, each with a folded answer, before the cell that shows it."""
    for before, cell in list(pairwise(notebook.cells))[1:]:
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", f"nothing is said before: {cell.source[:80]}"
    text = text_of(notebook.cells)
    asked = [int(number) for number, _, _ in QUESTION.findall(text)]
    assert asked == list(range(1, len(asked) + 1)), "questions are numbered from 1"
    assert 15 <= len(asked) <= 20
    assert text.count("**Question ") == len(asked), "a question without a folded answer"
    assert text.count("</details>") == len(asked), "a folded text without a question"
    steps = steps_of(notebook)
    for number in range(1, 7):  # the paper
        assert QUESTION.search(text_of(steps[number])), f"step {number} tells without asking"


def test_the_answers_by_hand(notebook):
    """Numbers in the folded answers, from the formulas and not from our code."""
    answers = {}
    for number, _, answer in QUESTION.findall(text_of(notebook.cells)):
        answers[int(number)] = answer

    def sigmoid(u):
        return 1 / (1 + math.exp(-u))

    responses = sum(10**k for k in range(4))  # of 0 to 3 words out of 10
    words = {9: "Nine", 10: "ten"}
    bradley_terry = 3 * 3  # odds of 3 to 1, twice
    normal = statistics.NormalDist()
    p = normal.cdf(2 * normal.inv_cdf(0.75))
    thurstone = round(p / (1 - p))
    mean_log_before = math.log(0.1)
    mean_log_after = (math.log(0.85) + 3 * math.log(0.01)) / 4
    said = {
        1: [f"{responses:,}"],
        3: [f"{words[bradley_terry]} to one", f"{words[thurstone]} to one"],
        4: [f"{sigmoid(2):.2f}", "1/2"],
        11: [f"{math.log(2):.4f}", r"\beta/2"],
        12: [f"{sigmoid(6):.3f}", "0.5", f"{sigmoid(-6):.3f}"],
        13: [r"\beta/2", r"3/\beta"],
        18: [
            f"from {4 * 0.1:.1f} to {0.85 + 3 * 0.01:.2f}",
            f"from {mean_log_before:.1f} to {mean_log_after:.1f}",
        ],
        19: [f"{4 * (1 + 1 + 2)}, and {4 * (1 + 1 + 2 + 1)}"],
        20: [f"m = {math.log(0.9 / 0.1):.1f}", "1/2", "1 or above"],
    }
    for number, wanted in said.items():
        for text in wanted:
            assert text in answers[number], f"the answer to question {number} must say {text}"


def test_notebook_redefines_nothing(notebook, root):
    """A function that a module has is imported, not written again."""
    known = set()
    for name in MODULES:
        tree = ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))
        known |= {node.name for node in tree.body if hasattr(node, "name")}
    for cell in code_of(notebook.cells):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.name not in known, f"{node.name} is a function of ours: import it"


def test_files_that_the_notebook_names_exist(notebook, root):
    text = "\n".join(cell.source for cell in notebook.cells)
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    named += re.findall(r"\]\((\w+/\w+\.\w+)\)", text)
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        named.append(f"experiments/{name}.py")
    for name in named:
        assert (root / name).exists(), f"the notebook names {name}"


SCORED = {"chosen": ["not", "very", "dull"], "rejected": ["quiet", "(end)"]}


@pytest.mark.parametrize("side", SCORED)
def test_the_table_of_a_pair_sums_to_its_log_prob(side, notebook):
    """Step 1 shows two rows, token by token: the scored log-probs add up to the listed log pi."""
    printed = printed_by(steps_of(notebook)[1])
    [table] = re.findall(rf"^{side} +scored.*?listed +-[\d.]+$", printed, re.S | re.M)
    scored = re.findall(r"^(\S+) +yes +(-[\d.]+)$", table, re.MULTILINE)
    tokens = [token for token, _ in scored]
    assert tokens == SCORED[side], "the tokens of the response are scored"
    not_scored = re.findall(r"^(\S+) +no", table, re.MULTILINE)
    assert not_scored[:3] == ["The", "film", "was"], "the prompt is not scored"
    total = float(re.search(r"pi\(y\|x\) +(-[\d.]+)", table)[1])
    listed = float(re.search(r"listed +(-[\d.]+)", table)[1])
    by_hand = sum(float(logp) for _, logp in scored)
    assert abs(by_hand - total) < 0.002, f"the scored tokens sum to {by_hand}, not {total}"
    assert abs(total - listed) < 0.002, f"the table of all responses says {listed}, not {total}"


def test_the_questions_name_their_steps(notebook):
    section = notebook.cells[-1].source.split("## Questions that everyone asks")[1]
    answers = re.findall(r"^\d+\. \*\*.*\?\*\*.*\(steps? ([\d, ]+)\)", section, re.MULTILINE)
    assert len(answers) == 10
    for steps in answers:
        for step in steps.split(", "):
            assert 1 <= int(step) <= 10, f"the notebook has no step {step}"


NUMBER = re.compile(r"-?\d+\.?\d*(?:e-\d+)?")


@pytest.mark.slow
def test_notebook_runs(notebook, root, tmp_path):
    """As a reader would run it, but in a folder of its own: nothing is written beside the code.
    Up to step 4, where only SFT is trained, the saved tables come out within 5%.
    """
    saved = {step: printed_by(cells) for step, cells in steps_of(notebook).items()}
    path = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(root)!r})")
    notebook.cells.insert(0, path)
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=180, resources=resources).execute()
    ran = {step: printed_by(cells) for step, cells in steps_of(notebook).items()}
    for step, text in saved.items():
        assert len(ran[step].splitlines()) == len(text.splitlines()), f"step {step}: lines printed"
        if step <= 4:
            assert_same_text(ran[step], text, step)
    assert re.search(r"^0 +0\.6931 ", ran[6], re.MULTILINE), "the first loss is log 2"
    at_800 = re.search(r"^800 .* ([\d.]+)$", ran[6], re.MULTILINE)
    assert float(at_800[1]) > 0.95, "DPO closes the gap"


def assert_same_text(ran, saved, step):
    """The same words, and numbers within 5%."""
    assert NUMBER.sub("", ran).split() == NUMBER.sub("", saved).split(), f"step {step}: its words"
    for got, wanted in zip(NUMBER.findall(ran), NUMBER.findall(saved)):
        limit = 0.05 * (1 + abs(float(wanted)))
        assert abs(float(got) - float(wanted)) < limit, f"step {step}: {got}, saved as {wanted}"
