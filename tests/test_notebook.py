"""The notebook runs from top to bottom in a clean kernel, and was saved with its outputs. The
checks of the code that its reader writes name each mistake, and never raise."""

import ast
import math
import re
from itertools import pairwise

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch.nn import functional as F

from experiments import course, lab, rlhf
from experiments.questions import overfitting, ppo
from tests.mistakes import EQ4_MISTAKES, EQ7_MISTAKES

QUESTION = re.compile(
    r"\*\*Question (\d+)\.\*\* (.+?)<details><summary>Answer</summary>\n\n(.+?)\n</details>",
    re.DOTALL,
)
SOLUTION = re.compile(
    r"<details><summary>Solution</summary>\n\n```python\n(.+?)\n```\n</details>", re.DOTALL
)
CORE = range(7)  # the first screen, and steps 1 to 6
STEPS = range(13)  # 7 to 12 are optional


@pytest.fixture
def notebook(root):
    return nbformat.read(root / "notebook.ipynb", as_version=4)


def code_of(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def prose_of(cells):
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def printed_by(cells):
    texts = []
    for cell in code_of(cells):
        texts += [output.get("text", "") for output in cell.outputs]
    return "".join(texts)


def has_picture(cell):
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def steps_of(notebook):
    """Number of a step -> its cells, from the one with its heading on. 0: before the first."""
    steps = {0: []}
    now = 0
    for cell in notebook.cells:
        heading = re.search(r"^## (\d+)\. ", cell.source, flags=re.MULTILINE)
        if heading and cell.cell_type == "markdown":
            now = int(heading[1])
        steps.setdefault(now, []).append(cell)
    return steps


# How it is built


def test_notebook_was_saved_with_its_outputs(notebook):
    code = code_of(notebook.cells)
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    for cell in code[1:]:
        assert cell.outputs, f"only the imports show nothing: {cell.source}"
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data"), output
            assert output.get("name") != "stderr", f"a warning was saved: {output.text}"
            assert len(output.get("text", "").splitlines()) <= 25, "a wall of output"


def test_code_cells_are_short(notebook):
    for cell in code_of(notebook.cells):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 12, cell.source
        assert max(len(line) for line in lines) <= 100, cell.source


def minutes_of(cells):
    """Words at 200 a minute, 1.5 minutes for a question, 1 for a table or a picture."""
    text = prose_of(cells) + printed_by(cells)
    text += "".join(cell.source for cell in code_of(cells))
    minutes = len(text.split()) / 200 + 1.5 * text.count("**Question ")
    for cell in code_of(cells):
        if has_picture(cell) or len(printed_by([cell]).splitlines()) > 2:
            minutes += 1
    return minutes


def test_the_minutes_are_counted(notebook):
    """The first screen's table says what the steps take. More is added for derivations and code."""
    more = {2: 3, 3: 7 + 2, 4: 3, 5: 4 + 5}
    rows = re.findall(r"\| (?:(\d+) [^|]+|this page) \| (\d+) \|", notebook.cells[0].source)
    said = {int(number or 0): int(minutes) for number, minutes in rows}
    assert list(said) == list(STEPS)
    for number, cells in steps_of(notebook).items():
        counted = minutes_of(cells) + more.get(number, 0)
        assert abs(counted - said[number]) <= 1, f"step {number}: {counted:.1f} minutes"
    total = int(re.search(r"\*\*both\*\* \| \*\*(\d+)\*\*", notebook.cells[0].source)[1])
    assert total == sum(said[number] for number in CORE)
    assert total <= 90


def test_every_step_asks_before_it_shows(notebook):
    """Questions with a folded answer, before the cell that shows it."""
    steps = steps_of(notebook)
    assert list(steps) == list(STEPS)
    for before, cell in list(pairwise(notebook.cells)):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", f"nothing is said before: {cell.source[:80]}"
    text = prose_of(notebook.cells)
    asked = [int(number) for number, _, _ in QUESTION.findall(text)]
    assert asked == list(range(1, len(asked) + 1))
    assert text.count("**Question ") == text.count("<summary>Answer</summary>") == len(asked)
    for number in STEPS:
        assert QUESTION.search(prose_of(steps[number])), f"step {number} tells without asking"
    for number in STEPS[1:]:
        pictures = [cell for cell in code_of(steps[number]) if has_picture(cell)]
        assert pictures, f"step {number} has no picture"


def test_notebook_redefines_nothing(notebook, root):
    """A function that a module has is imported. Only the reader's own are defined in a cell."""
    defined = []
    for cell in code_of(notebook.cells):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.append(node.name)
    assert defined == ["my_optimal_policy", "my_dpo_loss"]


def test_files_that_the_notebook_names_exist(notebook, root):
    text = "\n".join(cell.source for cell in notebook.cells)
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb))`", text):
        assert (root / name).exists(), name
    for name in re.findall(r"\]\((\w+/\w+\.\w+)\)", text):
        assert (root / name).exists(), name
    for name in re.findall(r"python -m experiments\.questions (\w+)", text):
        assert (root / "experiments" / "questions" / f"{name}.py").exists(), name
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        path = root / "experiments" / name
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


# What it says


def answers_of(notebook):
    found = QUESTION.findall(prose_of(notebook.cells))
    return {int(number): answer for number, _, answer in found}


def sigmoid(u):
    return 1 / (1 + math.exp(-u))


def test_the_answers_by_hand(notebook):
    """Numbers in the folded answers, from the formulas and not from our code."""
    assert 1 + 10 + 100 + 1000 == 1111
    assert 3 * 3 == 9
    difference_of_log_Z = math.log(3.87) - math.log(3.14)
    logs = [math.log(0.1), (math.log(0.85) + 3 * math.log(0.01)) / 4]
    gigabytes = [bytes_each * 124_439_808 / 1e9 for bytes_each in (4 * 4, 5 * 4)]  # GPT-2
    said = {
        2: ["1,111: 1 + 10 + 100 + 1,000"],
        4: ["Nine to one"],
        5: [f"{sigmoid(2):.2f}", "1/2"],
        10: [f"{math.log(2):.4f}"],
        11: ["1.00", "-0.50", "1.50", f"{-math.log(sigmoid(1.5)):.2f}", "3.0 + 0.5 = 3.50"],
        12: [f"{math.exp(-2.34):.2f}", f"{math.exp(-2.34 - 7):.4f}"],
        13: [f"{sigmoid(6):.3f}, 0.5, {sigmoid(-6):.3f}"],
        14: [r"\beta/2", r"3/\beta"],
        16: [f"{difference_of_log_Z:.2f}"],
        20: [f"from {4 * 0.1:.1f} to {0.85 + 3 * 0.01:.2f}", f"{logs[0]:.1f} to {logs[1]:.1f}"],
        24: ["16, and 20", f"{gigabytes[0]:.1f} GB and {gigabytes[1]:.1f} GB"],
        27: [f"= {math.log((1 - 0.1) / 0.1):.1f}", "at 1/2", r"\frac{1}{2\beta}", "at 1 or above"],
    }
    answers = answers_of(notebook)
    for number, wanted in said.items():
        for text in wanted:
            assert text in answers[number], f"question {number}: {text}"


def test_the_two_directions_of_the_kl(notebook):
    """A policy says half of the time what the reference says once in 10,000."""
    ref = [1e-4, 1 - 1e-4]
    policy = [0.5, 0.5]
    forward = sum(p * math.log(p / q) for p, q in zip(policy, ref))
    reverse = sum(q * math.log(q / p) for p, q in zip(policy, ref))
    assert f"a KL of {forward:.1f} nats" in prose_of(notebook.cells)
    assert f"charges only {reverse:.1f} nats" in prose_of(notebook.cells)


def test_the_numbers_of_step_11(notebook):
    """Rounding in bfloat16, the two best betas of a sweep, and why the toy's do not carry over."""
    text = prose_of(steps_of(notebook)[11])
    numbers = torch.arange(64, 128, 1 / 8).bfloat16().unique()
    assert numbers.diff().unique().tolist() == [0.5]
    assert "between 64 and 128 its numbers are 0.5 apart" in text
    assert f"{0.6 / 0.01:.0f} times" in text
    assert f"{3 / 1:g} nats at beta 1, which is {3 / 1 / 3:g} nat a token" in text
    assert f"it takes {3 / 0.1:g} nats, but only {3 / 0.1 / 300:g} a token over 300" in text
    weights = sum(weight.numel() for weight in lab.new_gpt(0).parameters())
    assert f"{weights:,}"[:2] == "13" and "13,000 weights" in text


def test_the_mean_of_the_logs_falls_and_the_probability_rises(notebook):
    """Step 6 says how many of the five seeds do so."""
    found = lab.where(lab.saved("displacement"), case="4 pairs, beta 0.1", policy="network")
    assert len(found) == 5
    assert sum(row["chosen"] < 0 for row in found) == 4
    assert sum(row["gained by chosen"] > 0 for row in found) == 4
    assert "In four of five seeds" in prose_of(notebook.cells)


# What the optional steps say about their tables, for each seed


def by_seed(name, **wanted):
    """A list of the rows of each of the five seeds."""
    found = lab.where(lab.saved(name), **wanted)
    seeds = [lab.where(found, seed=seed) for seed in range(5)]
    assert all(seeds)
    return seeds


def one(rows, **wanted):
    (row,) = lab.where(rows, **wanted)
    return row


def test_step_7_chosen_responses_fall_in_the_network_and_at_eq_4():
    for rows in by_seed("displacement", case="4 pairs, beta 0.1"):
        assert one(rows, policy="table")["fallen"] == 0
        assert one(rows, policy="Eq. 4")["fallen"] == 1
    for rows in by_seed("displacement", case="2,000 pairs, beta 1"):
        assert one(rows, policy="table")["fallen"] > 0.85
        assert 0.45 < one(rows, policy="Eq. 4")["fallen"] < 0.6
        assert one(rows, policy="network")["gained by in no pair"] > 0
    for rows in by_seed("displacement", case="Eq. 4 by beta"):
        assert -31 < one(rows, beta=0.1)["chosen"] < -28


def test_step_8a_what_holds_the_policy():
    for rows in by_seed("kl_penalty", table="beta"):
        ours = lab.where(rows, run="DPO")
        kls = [row["kl"] for row in ours]
        assert kls == sorted(kls, reverse=True)
        assert kls[0] < one(rows, run="Eq. 4", beta=0.25)["kl"] / 2
        assert all(row["gap_closed"] > 0.97 for row in ours if row["beta"] >= 1)
    for rows in by_seed("kl_penalty", table="reference"):
        start = one(rows, run="frozen", step=0)
        frozen = one(rows, run="frozen", step=800)
        copied = one(rows, run="copied every quarter", step=800)
        assert one(rows, run="the policy itself", step=40)["objective"] < start["objective"]
        assert copied["expected_reward"] > frozen["expected_reward"]
        assert copied["objective"] < frozen["objective"]
        itself = lab.where(rows, run="the policy itself")
        assert {round(row["loss"], 4) for row in itself} == {0.6931}


def test_step_8b_dpo_and_ppo(notebook):
    rows = lab.saved("ppo")
    cases = {case["name"]: case for case in ppo.comparisons(rows)}
    ahead = [case["ahead"] for case in cases.values()]
    assert [ahead.count(name) for name in ("DPO", "PPO", "neither")] == [1, 5, 2]
    largest = min(cases.values(), key=lambda case: sum(case["differences"]))
    assert largest["name"] == "hard, KL at most 4"
    assert ppo.in_words(largest["differences"]) == "-0.42 ± 0.30"
    for name, case in cases.items():
        if not name.endswith(" 4"):
            mean, _ = lab.mean_sd(case["differences"])
            assert abs(mean) < 0.2, name
    both_have_runs = cases["deterministic, KL at most 2"]["differences"]
    assert min(both_have_runs) > 0 and ppo.in_words(both_have_runs).startswith("0.10")
    ends = [row for row in rows if row["step"] == row["last"]]
    for row in lab.where(ends, method="DPO", labels="deterministic"):
        assert row["kl"] > 1.9, "no run near 0.5"
    assert lab.where(ends, method="PPO")[0]["last"] * rlhf.BATCH == 196_608
    assert "196,608 sampled responses" in prose_of(notebook.cells)


def test_step_8c_sft_first():
    for rows in by_seed("sft_first"):
        before = lab.where(rows, policy="reference")
        after = lab.where(rows, policy="after DPO")
        for policies in (before, after):
            best = max(policies, key=lambda row: row["expected_reward"])
            assert best["start"] == "SFT on the chosen"
        untrained = one(after, start="untrained")
        author = one(after, start="author of the pairs")
        assert untrained["grammatical"] < 0.1
        assert untrained["accuracy"] > author["accuracy"] - 0.02
        assert author["grammatical"] > one(before, start="author of the pairs")["grammatical"]


def test_step_9_where_a_pair_rests():
    for rows in by_seed("other_losses", labels="certain"):
        for beta in (0.1, 1.0, 10.0):
            mine = lab.where(rows, beta=beta)
            late = one(mine, loss="dpo", step=900)["margin"]
            assert one(mine, loss="dpo", step=1000)["margin"] > late
            assert abs(one(mine, loss="cdpo", step=1000)["margin"] - math.log(9)) < 0.01
            assert abs(one(mine, loss="ipo", step=1000)["margin"] - 0.5) < 0.01
    for rows in by_seed("other_losses", labels="drawn"):
        kl = {row["loss"]: row["kl"] for row in rows}
        assert max(kl["cdpo"], kl["ipo, beta 0.25"]) < kl["dpo"] < kl["dpo of means"]
        assert abs(kl["orpo"] - kl["orpo without SFT"]) < 0.05


def test_step_9_without_the_weight(notebook):
    ends = lab.where(lab.saved("weight"), step=800)
    without = lab.spread(lab.where(ends, run="without the weight"), "objective", digits=1)
    ours = lab.mean(lab.where(ends, run="DPO"), "objective")
    assert f"a J of {without}, where DPO has {ours:.1f}" in prose_of(notebook.cells)


def test_step_10a_overfitting():
    rows = lab.saved("overfitting")
    for end in lab.where(rows, pairs=300, step=800):
        at_40 = one(rows, pairs=300, step=40, seed=end["seed"])
        assert abs(end["held_out_accuracy"] - at_40["held_out_accuracy"]) < 0.03
        assert end["kl"] > at_40["kl"] > 1
        assert end["held_out_loss"] > 2 * at_40["held_out_loss"]
    for row in overfitting.stopped_early(rows, 300):
        assert row["step"] < 40 and row["gap_closed"] < 0.1
    for row in overfitting.stopped_early(rows, 3_000):
        assert 100 <= row["step"] <= 200 and row["gap_closed"] > 0.6
    assert all(row["gap_closed"] < 0 for row in overfitting.at_the_end(rows, 3_000))
    assert all(row["step"] == 800 for row in overfitting.stopped_early(rows, 100_000))


def test_step_10b_coverage():
    mended = 0
    for rows in by_seed("coverage", part="cases"):
        gaps = {row["case"]: row["gap_closed"] for row in rows}
        assert max(gaps["no slips"], gaps["10 x pairs"]) < 0
        assert min(gaps["slips"], gaps["SFT term"]) > 0.7
        mended += gaps["on-policy"] > 0.7
        leaked = one(rows, case="no slips")
        assert leaked["margin"] > 1.5
        assert leaked["in no pair after"] > 0.1 > leaked["in no pair before"]
    assert mended == 4
    for rows in by_seed("coverage", part="samplers"):
        few = {row["sampler"]: row["gap_closed"] for row in lab.where(rows, pairs=1_000)}
        many = {row["sampler"]: row["gap_closed"] for row in lab.where(rows, pairs=30_000)}
        assert few["the policy itself"] > 0 > few["the reference"]
        assert many["the policy itself"] > many["the reference"] > many["a uniform sampler"]
        assert many["a colder sampler"] < 0.6
    for rows in by_seed("coverage", part="prompts", run="DPO", step=320):
        film, hotel = [one(rows, prompt=noun)["kl"] for noun in ("film", "hotel")]
        assert abs(film - hotel) < 0.1


def test_step_10c_over_optimisation(notebook):
    fallen = 0
    for rows in by_seed("over_optimisation"):
        run = lab.where(rows, policy="DPO", beta=0.3)
        early = lab.where(run, step=100)
        end = lab.where(run, step=400)
        fallen += lab.mean(end, "expected_reward") < lab.mean(early, "expected_reward")
        assert lab.mean(end, "own_accuracy") > lab.mean(early, "own_accuracy")
        assert lab.mean(end, "kl") > lab.mean(early, "kl")
        judged = lab.where(rows, policy="judge")
        by_beta = [lab.mean(lab.where(judged, beta=b), "expected_reward") for b in (0.3, 0.1, 0.01)]
        assert max(by_beta) > by_beta[-1] + 0.1
        promised = [lab.mean(lab.where(judged, beta=b), "promised") for b in (1.0, 0.3, 0.01)]
        assert promised == sorted(promised)
        end = lab.where(rows, policy="DPO", step=400)
        assert 1.7 < lab.mean(lab.where(end, beta=0.3), "kl") / lab.mean(
            lab.where(end, beta=3.0), "kl"
        )
    assert fallen == 4
    assert "(in four of the five seeds)" in prose_of(notebook.cells)


def test_step_12_real_pairs(notebook):
    fallen = []
    for rows in by_seed("real_pairs"):
        before, lowest, after = course.held_out(rows)
        assert round(before["held_out_loss"], 4) == 0.6931 and before["held_out_accuracy"] == 0.5
        late = [row["accuracy"] for row in rows if row["step"] > 93 and "accuracy" in row]
        assert sum(late) / len(late) > 0.9, "the last of four epochs, on the batch"
        assert 0.7 < after["held_out_accuracy"] < 0.85
        early = [row for row in rows if "held_out_loss" in row and row["step"] < 40][-1]
        assert early["held_out_loss"] - lowest["held_out_loss"] < 0.04, "after step 40, hardly"
        assert after["held_out_accuracy"] - early["held_out_accuracy"] < 0.02
        changes = []
        for metric in ("held_out_chosen_logp", "held_out_rejected_logp"):
            assert after[metric] < lowest[metric] < before[metric]
            changes.append(after[metric] - before[metric])
        assert abs(0.1 * (changes[0] - changes[1]) - after["held_out_margin"]) < 0.01
        fallen.append(changes)
    chosen, rejected = torch.tensor(fallen).mean(0)
    said = f"chosen responses by {-chosen:.1f} nats, of the rejected by {-rejected:.1f}"
    assert said in prose_of(notebook.cells)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_first_step_of_adam_does_not_depend_on_beta(beta):
    logps = torch.zeros(2, requires_grad=True)
    loss = -F.logsigmoid(beta * (logps[0] - logps[1]))
    loss.backward()
    assert torch.allclose(logps.grad, torch.tensor([-beta / 2, beta / 2]))
    torch.optim.AdamW([logps], lr=0.01, weight_decay=0.0).step()
    assert torch.allclose(logps, torch.tensor([0.01, -0.01]), atol=1e-6)


def test_the_table_of_a_pair_sums_to_its_log_prob(notebook):
    """Step 1 shows two rows, token by token: the scored log-probs add up to log pi(y|x)."""
    printed = printed_by(steps_of(notebook)[1])
    chosen, rejected = re.split(r"^rejected +scored", printed, flags=re.MULTILINE)
    _, chosen = re.split(r"^chosen +scored", chosen, flags=re.MULTILINE)
    scored = {"not very dull": chosen, "quiet (end)": rejected}
    for response, side in scored.items():
        rows = re.findall(r"^(\S+) +yes +(-[\d.]+)$", side, re.MULTILINE)
        assert " ".join(token for token, _ in rows) == response
        assert re.findall(r"^(\S+) +no", side, re.MULTILINE)[:3] == ["The", "film", "was"]
        total = float(re.search(r"response_logps +(-[\d.]+)", side)[1])
        assert abs(sum(float(logp) for _, logp in rows) - total) < 0.002


# What the reader writes


def right_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    ratio = policy_chosen - policy_rejected
    ref_ratio = ref_chosen - ref_rejected
    return F.softplus(-beta * (ratio - ref_ratio))


EXCHANGED = "chosen and rejected are exchanged"
WRONG_LOSSES = {  # what a check says -> the body of my_dpo_loss
    "it is not filled in": "return ...",
    "it returns nothing": "pass",
    "a line is still `...`": "return -F.logsigmoid(... - ...)",
    "NameError: name 'margin'": "return -F.logsigmoid(margin)",
    "it returns a tuple": "return w, l",
    "it returns a float": "return 0.3133",
    "a mean or sum over pairs": "return -F.logsigmoid(b * (w - rw - l + rl)).mean()",
    f"inverted, or {EXCHANGED}": "return -F.logsigmoid(b * (l - rl - w + rw))",
    "the minus before the log is missing": "return F.logsigmoid(b * (w - rw - l + rl))",
    "the reference is left out": "return -F.logsigmoid(b * (w - l))",
    "the reference is added": "return -F.logsigmoid(b * (w + rw - l - rl))",
    f"the policy's {EXCHANGED}": "return -F.logsigmoid(b * (l - rw - w + rl))",
    "beta is missing": "return -F.logsigmoid(w - rw - l + rl)",
    "beta is applied twice": "return -F.logsigmoid(b * b * (w - rw - l + rl))",
    "beta divides": "return -F.logsigmoid((w - rw - l + rl) / b)",
    "beta stands before the log.": "return -b * F.logsigmoid(w - rw - l + rl)",
    "beta stands before the log as well": "return -b * F.logsigmoid(b * (w - rw - l + rl))",
    "beta multiplies the policy's": "return -F.logsigmoid(b * (w - l) - rw + rl)",
    "are divided, not subtracted": "return -F.logsigmoid(b * (w / rw - l / rl))",
    "the log is missing": "return -torch.sigmoid(b * (w - rw - l + rl))",
    "the log of sigmoid is -inf": "return -torch.sigmoid(b * (w - rw - l + rl)).log()",
    "carry no gradient": "return -F.logsigmoid(b * (w - rw - l + rl).detach())",
    "the gradient: is there": "return -F.logsigmoid(b * (w - rw - l.detach() + rl))",
    "not have been used in the graph": "return right(w, l, rw, rl, b).detach().requires_grad_()",
    "the graph a second time": "y = right(w, l, rw, rl, b); y.sum().backward(); return y",
}
WRONG_POLICIES = {  # the same for my_optimal_policy
    "it is not filled in": "return ...",
    "a line is still `...`": "return ... - ref",
    "it is not divided by Z(x)": "return ref + r / b",
    "beta is missing": "return (ref + r).log_softmax(-1)",
    "beta multiplies the reward": "return (ref + r * b).log_softmax(-1)",
    "the sign of the reward": "return (ref - r / b).log_softmax(-1)",
    "the reference is left out": "return (r / b).log_softmax(-1)",
    "Z(x) is subtracted, not its": "return ref + r / b - (ref + r / b).exp().sum(-1, True)",
    "log Z(x) is added": "return ref + r / b + (ref + r / b).logsumexp(-1, True)",
    "the probability, not its log": "return (ref + r / b).softmax(-1)",
    "runs over the prompts": "return (ref + r / b).log_softmax(0)",
    "the responses to all prompts": "return ref + r / b - (ref + r / b).logsumexp((0, 1))",
    "log pi_ref is used": "x = ref * (r / b).exp(); return (x / x.sum(-1, True)).log()",
    "keepdim=True": "return ref + r / b - (ref + r / b).logsumexp(-1)",
    "use logsumexp": "return ref + r / b - (ref + r / b).exp().sum(-1, True).log()",
}


def function(arguments, body):
    names = {"torch": torch, "F": F, "right": right_loss}
    exec(f"def mine({arguments}):\n    {body}", names)
    return names["mine"]


@pytest.mark.parametrize("says", WRONG_LOSSES)
def test_the_check_names_the_mistake_in_a_loss(says, capsys):
    mine = function("w, l, rw, rl, b", WRONG_LOSSES[says])
    course.check_loss(mine)
    printed = capsys.readouterr().out
    assert printed.startswith("not yet: ") and says in printed, printed
    assert course.loss_to_train(mine) is course.our_dpo_loss
    assert "dpo.dpo_loss is the loss used here" in capsys.readouterr().out


@pytest.mark.parametrize("says", WRONG_POLICIES)
def test_the_check_names_the_mistake_in_an_optimal_policy(says, capsys):
    mine = function("ref, r, b", WRONG_POLICIES[says])
    course.check_optimal_policy(mine)
    printed = capsys.readouterr().out
    assert printed.startswith("not yet: ") and says in printed, printed


def test_every_mistake_of_the_grader_is_tried():
    for listed, tried in [(EQ7_MISTAKES, WRONG_LOSSES), (EQ4_MISTAKES, WRONG_POLICIES)]:
        for mistake in listed:
            assert any(says in f"{mistake}." for says in tried), mistake


def test_the_check_takes_other_forms_of_the_right_loss(capsys):
    course.check_loss(right_loss)
    assert capsys.readouterr().out.startswith("right")
    assert course.loss_to_train(right_loss) is right_loss


def test_the_solutions_are_right(notebook, capsys):
    for solution in SOLUTION.findall(prose_of(notebook.cells)):
        names = {"torch": torch, "F": F}
        exec(solution, names)
        if "my_dpo_loss" in names:
            course.check_loss(names["my_dpo_loss"])
        else:
            course.check_optimal_policy(names["my_optimal_policy"])
    assert capsys.readouterr().out.count("right: ") == 2


# Run all


def run_all(notebook, root, folder):
    """As a reader would run it, but in another folder: nothing is written beside the code."""
    path = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(root)!r})")
    notebook.cells.insert(0, path)
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": folder}}).execute()


@pytest.mark.slow
def test_notebook_runs(notebook, root, tmp_path):
    """With the reader's cells as they are.

    Up to step 4, where only SFT is trained, the saved tables come out within 5%.
    """
    saved = {number: printed_by(cells) for number, cells in steps_of(notebook).items()}
    run_all(notebook, root, tmp_path)
    ran = {number: printed_by(cells) for number, cells in steps_of(notebook).items()}
    number = re.compile(r"-?\d+\.?\d*(?:e-\d+)?")
    for step in saved:
        assert len(ran[step].splitlines()) == len(saved[step].splitlines()), step
        if step <= 4:
            assert number.sub("", ran[step]).split() == number.sub("", saved[step]).split(), step
            got = map(float, number.findall(ran[step]))
            wanted = map(float, number.findall(saved[step]))
            for a, b in zip(got, wanted):
                assert abs(a - b) < 0.05 * (1 + abs(b)), step
    check_step_6(ran[6])
    assert "dpo.dpo_loss is the loss used here" in ran[6]


@pytest.mark.slow
def test_the_readers_loss_is_the_one_that_is_trained(notebook, root, tmp_path):
    """The reader's cells hold the solutions, and the loss counts its calls."""
    solutions = iter(SOLUTION.findall(prose_of(notebook.cells)))
    for cell in code_of(notebook.cells):
        if "def my_" in cell.source:
            check = cell.source.splitlines()[-1]
            solution = next(solutions)
            if "my_dpo_loss" in solution:
                solution = solution.replace("beta):", "beta):\n    calls.append(1)")
                solution = "calls = []\n" + solution
            cell.source = f"{solution}\n\n{check}"
    notebook.cells.append(nbformat.v4.new_code_cell("print('calls', len(calls))"))
    run_all(notebook, root, tmp_path)
    ran = {number: printed_by(cells) for number, cells in steps_of(notebook).items()}
    assert ran[3].startswith("right: ")
    assert "right: " in ran[5]
    assert "my_dpo_loss is right, and is the loss used here" in ran[6]
    check_step_6(ran[6])
    calls = re.search(r"^calls (\d+)$", printed_by(notebook.cells), re.MULTILINE)
    assert int(calls[1]) > 800, "a call for each step"


def check_step_6(printed):
    assert re.search(r"^0 +0\.6931 ", printed, re.MULTILINE), "the first loss is log 2"
    at_800 = re.search(r"^800 .* ([\d.]+) +-?[\d.]+$", printed, re.MULTILINE)
    assert float(at_800[1]) > 0.95, "DPO closes the gap"
