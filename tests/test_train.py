"""A whole run, in the toy world and on a file of pairs: its steps, its numbers, its files."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import data
import train
from data import TokenPair
from model import GPT
from tests.helpers import (
    Run,
    json_of,
    lines_of,
    one_at_a_time,
    run,
    same_weights,
    sft_lines_of,
    write_lines,
    write_pairs,
)

ROOT = Path(train.__file__).parent
# A GPT for a tenth of a second, on the 30 pairs of write_pairs
SMALL = "--n-layer 1 --n-embd 8 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()
SMALL += ["--lr", 0.1, "--evaluations", 3]


# The toy world


class Toy(NamedTuple):
    printed: str
    out: Path
    world: data.ToyWorld
    logps: dict  # log pi(y|x) of every response, (P, Y), by the names of the table's rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The one run of the command line as such: 40 steps of SFT, 48 of DPO."""
    out = tmp_path_factory.mktemp("toy") / "out"
    flags = "--pairs 3840 --batch-size 128 --epochs 1.6 --sft-epochs 0.25 --beta 1.5"
    flags += " --evaluations 2"
    command = [sys.executable, ROOT / "train.py", *flags.split(), "--out", out]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    world = data.ToyWorld()
    reference = world.logps(GPT.from_pretrained(out / "reference"))
    policy = world.logps(GPT.from_pretrained(out / "policy"))
    weights = reference.exp() * (world.rewards / 1.5).exp()  # Eq. 4, which is not yet normalised
    optimum = (weights / weights.sum(-1, keepdim=True)).log()
    logps = {"reference": reference, "policy": policy, "optimum": optimum}
    return Toy(done.stdout, out, world, logps)


def test_a_toy_run_writes_what_it_promises(toy):
    names = {path.name for path in toy.out.iterdir()}
    files = {"config.json", "metrics.jsonl", "summary.json", "curves.png"}
    assert names == files | {"reference", "policy"}, (
        "and no checkpoint, which comes every 100 steps"
    )
    assert (toy.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("reference", "policy"):
        files = {path.name for path in (toy.out / name).iterdir()}
        assert files == {"config.json", "pytorch_model.bin"}
        config = json_of(toy.out / name / "config.json")
        assert config["eos_token_id"] == toy.world.tokenizer.eot_token


def test_a_piped_run_prints_a_line_now_and_then(toy):
    assert "beta=1.5" in toy.printed.splitlines()[0], "the settings come first"
    assert "\r" not in toy.printed
    assert len(re.findall(r"^SFT \d+/40 .*nats$", toy.printed, re.MULTILINE)) == 10
    assert "SFT 40/40" in toy.printed
    dpo = re.findall(r"^DPO (\d+)/48 .* s left$", toy.printed, re.MULTILINE)
    assert dpo == ["1", "24", "48"], "the first step, and each that is evaluated"
    first = re.search(r"^DPO 1/48 .*", toy.printed, re.MULTILINE).group()
    for shown in ("loss 0.6931", "margin 0.0000", "weight 0.5000"):
        assert shown in first


def test_metrics_of_sft(toy):
    """Perplexity's logarithm: at first about that of a guess among the 11 tokens."""
    lines = sft_lines_of(toy.out)
    assert [line["sft_step"] for line in lines] == list(range(1, 41))
    assert all(set(line) == {"sft_step", "sft_loss"} for line in lines)
    printed = re.findall(r"^SFT (\d+)/40  loss (\S+) nats$", toy.printed, re.MULTILINE)
    for step, loss in printed:
        assert lines[int(step) - 1]["sft_loss"] == pytest.approx(float(loss), abs=6e-4)
    assert lines[-1]["sft_loss"] < lines[0]["sft_loss"] - 1, "it learns"


def test_metrics_of_a_toy_run(toy):
    first, *lines = lines_of(toy.out)
    assert first["step"] == 0
    assert [line["step"] for line in lines] == list(range(1, 49))
    assert [line["step"] for line in lines if "kl" in line] == [24, 48]
    rows = json_of(toy.out / "summary.json")["rows"]
    assert rows["reference"].items() <= first.items(), "step 0 is the reference"
    assert rows["policy"].items() <= lines[-1].items(), "the last step is the policy"
    for line in lines:
        margin = line["chosen_reward"] - line["rejected_reward"]
        assert line["margin"] == pytest.approx(margin, abs=1e-5)
        assert 0 <= line["accuracy"] <= 1
        assert 0 < line["weight"] < 1
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < 0.65, "it learns"


def test_the_summary_is_that_of_the_saved_models_and_obeys_the_theory(toy):
    """Eq. 3 and 4 written out, from log pi(y|x) of every response under the saved weights."""
    summary = json_of(toy.out / "summary.json")
    assert list(summary) == ["config", "seconds", "gap_closed", "rows"]
    assert summary["config"]["pairs"] == 3840
    assert summary["seconds"] > 0
    rows = summary["rows"]
    assert list(rows) == ["reference", "policy", "optimum"]
    ref = toy.logps["reference"]
    best = toy.logps["optimum"]

    def mean(logps, numbers):
        """E over the responses, and the mean over the prompts."""
        return (logps.exp() * numbers).sum(-1).mean().item()

    for name, logps in toy.logps.items():
        reward = mean(logps, toy.world.rewards)
        kl = mean(logps, logps - ref)
        to_best = mean(logps, logps - best)
        wanted = {
            "expected_reward": reward,
            "kl": kl,
            "objective": reward - 1.5 * kl,  # (3)
            "kl_to_optimum": to_best,
            "gap_closed": 1 - to_best / mean(ref, ref - best),
        }
        assert rows[name] == pytest.approx(wanted, abs=1e-4)
        lost = rows["optimum"]["objective"] - rows[name]["objective"]
        assert lost == pytest.approx(1.5 * to_best, abs=1e-4), "J(pi*) - J(pi) = beta KL(pi || pi*)"
    assert summary["gap_closed"] == rows["policy"]["gap_closed"]
    assert summary["gap_closed"] > 0.1, "it learns"


NUMBER = re.compile(r"[+-]?\d+\.\d+")


def numbers_by_head(head, line):
    """{head: number}, for a line whose numbers end in the same column of the screen as a head."""
    ends = {match.end(): match.group() for match in re.finditer(r"\S+", head)}
    numbers = {}
    for match in NUMBER.finditer(line):
        assert match.end() in ends, f"a number is not under its head:\n{head}\n{line}"
        numbers[ends[match.end()]] = float(match.group())
    return numbers


def test_in_the_table_every_number_stands_under_its_head(toy):
    head, *lines = toy.printed.split("\n\n")[-2].splitlines()
    rows = json_of(toy.out / "summary.json")["rows"]
    assert [line.split()[0] for line in lines] == list(rows)
    for line, row in zip(lines, rows.values()):
        assert numbers_by_head(head, line) == pytest.approx(row, abs=6e-5)


def test_the_likeliest_responses_of_the_optimum_are_printed(toy):
    """Each with its true reward, and its probability under reference, policy and optimum."""
    for x, prompt in enumerate(toy.world.prompts):
        start = toy.printed.index(f"\n{prompt.strip()} ") + 1
        end = toy.printed.index("\n\n", start)
        head, *lines = toy.printed[start:end].splitlines()
        assert head.endswith("optimum")
        optimum = toy.logps["optimum"][x].exp()
        best = optimum.sort(descending=True).values[: len(lines)]
        assert len(lines) > 3
        for line, likely in zip(lines, best):
            text = NUMBER.split(line)[0].strip()
            y = toy.world.responses.index(f" {text}")
            assert optimum[y].item() == pytest.approx(likely.item()), "the likeliest, in order"
            wanted = {name: logps[x, y].exp().item() for name, logps in toy.logps.items()}
            wanted["r*"] = toy.world.rewards[x, y].item()
            assert numbers_by_head(head, line) == pytest.approx(wanted, abs=6e-3)


def test_toy_pairs_are_drawn_from_the_reference(toy):
    """The mean log-prob of a drawn response is minus the reference's entropy, here to 5 sigma."""
    logps = toy.logps["reference"]
    wanted = (logps.exp() * logps).sum(-1).mean().item()
    line = lines_of(toy.out)[1]  # of 128 pairs
    assert (line["chosen_logp"] + line["rejected_logp"]) / 2 == pytest.approx(wanted, abs=0.4)
    assert logps.mean().item() < wanted - 1, "else any response would do"


def test_the_seed_decides_weights_and_pairs(toy, tmp_path):
    """(Runs that are resumed show that nothing else decides.)"""
    weights = []
    pairs = []
    flags = "--sft-epochs 0 --pairs 99 --batch-size 99 --epochs 1 --out".split()
    for seed in (0, 1):
        args = train.parse_args(["--seed", str(seed)])
        model = train.build_model(args, toy.world.tokenizer)
        weights.append(model.wte.weight.tolist())
        run("--init", toy.out / "reference", "--seed", seed, *flags, tmp_path)
        pairs.append(lines_of(tmp_path)[1]["chosen_logp"])  # the mean of all pairs
    assert weights[0] != weights[1]
    assert abs(pairs[0] - pairs[1]) > 1e-3


@pytest.mark.slow
def test_the_seed_decides_the_corpus(toy, tmp_path):
    """All of it is one batch, so that its order does not matter."""
    losses = []
    flags = "--sft-epochs 1 --batch-size 20000 --pairs 99 --epochs 1 --out".split()
    for seed in (0, 1):
        printed = run("--init", toy.out / "reference", "--seed", seed, *flags, tmp_path).printed
        losses.append(re.search("SFT 1/1.*", printed).group())
    assert losses[0] != losses[1]


# Learning rates


RATES = [  # steps, flags, the rates of the first steps and of the last one: fractions of the peak
    (40, "--warmup-steps 9", [0.25, 0.5, 0.75, 1, 1, 35 / 36], 1 / 36),
    (40, "--warmup-steps 2", [0.5, 1, 1, 37 / 38], 1 / 38),
    (40, "--warmup-steps 0", [1, 1, 38 / 39], 1 / 39),
    (40, "--warmup-steps 9 --no-decay", [0.25, 0.5, 0.75, 1, 1, 1], 1),
    (29, "--warmup-steps 9 --micro-batch-size 1", [0.5, 1, 1, 26 / 27], 1 / 27),
    (2, "--warmup-steps 9", [1, 1], 1),
    (1, "--warmup-steps 9", [1], 1),
]


@pytest.mark.parametrize("steps, flags, first, last", RATES, ids=[str(case[:2]) for case in RATES])
def test_learning_rates(steps, flags, first, last, tmp_path):
    """Linear warm-up of at most a tenth of the steps, then linear decay; the last rate is not 0.

    The rates are those of the optimizer, in SFT too; metrics.jsonl has those of DPO.
    """
    pairs = write_pairs(tmp_path / "pairs.jsonl", n=19)  # and one more, whose prompt is cut
    flags = flags.split() + "--n-embd 8 --n-layer 1 --block-size 32 --held-out 0".split()
    flags += ["--data", pairs, "--batch-size", 2, "--evaluations", 1]
    epochs = steps / 10
    flags += ["--epochs", epochs, "--sft-epochs", epochs, "--lr", 0.3e-3, "--sft-lr", 0.2e-3]
    rates = run(*flags, "--out", tmp_path / "out").rates
    assert len(rates) == 2 * steps
    logged = [line["lr"] for line in lines_of(tmp_path / "out")[1:]]
    assert logged == rates[steps:], "metrics.jsonl has the rates that are used"
    for phase, peak in ((rates[:steps], 0.2e-3), (rates[steps:], 0.3e-3)):
        fractions = [rate / peak for rate in phase]
        assert fractions[: len(first)] == pytest.approx(first)
        assert fractions[-1] == pytest.approx(last)


# Real pairs


def encode(text):
    return list(text.encode())


def rows_of(path):
    """The pairs of a file as tokens, by hand: bytes, and the end token 256 after each response."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        chosen = encode(pair["chosen"]) + [256]
        rejected = encode(pair["rejected"]) + [256]
        rows.append(TokenPair(encode(pair["prompt"]), chosen, rejected, pair["prompt"]))
    return rows


def both_logps(folder, rows):
    """log pi(y|x) of both responses under a saved model, (2, n), from one token after the other."""
    model = GPT.from_pretrained(folder).double()
    return one_at_a_time(model, rows, range(len(rows))).view(2, -1).detach()


class Real(NamedTuple):
    flags: list
    out: Path
    run: Run
    rows: list  # of all pairs that fit


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    pairs = write_pairs(folder / "pairs.jsonl")
    flags = ["--data", pairs, *SMALL, "--seed", 1, "--beta", 0.3]
    rows = rows_of(pairs)[:30]
    cut = encode("p" * 62)  # beside a response of two tokens, in a block of 64
    rows.append(TokenPair(cut, encode("b") + [256], encode("c") + [256], "p" * 99))
    return Real(flags, folder / "out", run(*flags, "--out", folder / "out"), rows)


def test_real_pairs_are_warned_of(real):
    """Equal responses, a prompt that is cut, a pair that is too long: one of each."""
    for text in real.run.warned:
        assert re.search(r": 1\b", text)
    assert len(real.run.warned) == 3


def held_out_rows(row, logps, rows):
    """The indices of the pairs of two prompts whose mean log-probs these are."""
    prompts = sorted({row.text for row in rows})
    for two in itertools.combinations(prompts, 2):
        ids = [i for i, one in enumerate(rows) if one.text in two]
        chosen, rejected = logps[:, ids].mean(1).tolist()
        same = abs(chosen - row["held_out_chosen_logp"]) < 1e-4
        if same and abs(rejected - row["held_out_rejected_logp"]) < 1e-4:
            return ids
    raise AssertionError("no two prompts have these mean log-probs")


def test_held_out_pairs_are_measured_before_and_after(real):
    """Two of sixteen prompts: a tenth, rounded up. Against the slow oracle on the saved models."""
    ref = both_logps(real.out / "reference", real.rows)
    policy = both_logps(real.out / "policy", real.rows)
    summary = real.run.summary
    assert summary == json_of(real.out / "summary.json")
    assert list(summary["rows"]) == ["reference", "policy"]
    assert summary["gap_closed"] is None
    ids = held_out_rows(summary["rows"]["reference"], ref, real.rows)
    for row, logps in zip(summary["rows"].values(), (ref, policy)):
        rewards = 0.3 * (logps - ref)[:, ids]  # at the beta of the run
        margins = rewards[0] - rewards[1]
        right = (margins > 0).double() + (margins == 0).double() / 2
        wanted = {
            "held_out_loss": (1 + (-margins).exp()).log().mean().item(),
            "held_out_accuracy": right.mean().item(),
            "held_out_margin": margins.mean().item(),
            "held_out_chosen_logp": logps[0, ids].mean().item(),
            "held_out_rejected_logp": logps[1, ids].mean().item(),
        }
        assert row == pytest.approx(wanted, abs=1e-3)
    lines = lines_of(real.out)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 3, 5, 7]
    assert summary["rows"]["policy"].items() <= lines[-1].items()
    assert "held_out_accuracy" in real.run.printed
    assert f"experiments.sample {real.out}" in real.run.printed
    shown = re.findall(r"^(?:reference|policy) .*", real.run.printed, re.MULTILINE)
    heads = re.findall(r"^ .*held_out_loss.*", real.run.printed, re.MULTILINE)
    for line, row in zip(shown, summary["rows"].values(), strict=True):
        assert numbers_by_head(heads[0], line) == pytest.approx(row, abs=6e-5)


def test_held_out_prompts_are_trained_on_in_neither_phase(real, tmp_path):
    """The steps are of one pair, which its log-probs give away: nothing moves the model. On a
    terminal every step of SFT is shown."""
    flags = ["--init", real.out / "reference", "--tokenizer", "bytes", "--epochs", 1]
    flags += "--batch-size 1 --sft-lr 1e-30 --lr 1e-30".split()
    result = run(*real.flags, *flags, "--out", tmp_path / "out", terminal=True)
    logps = both_logps(real.out / "reference", real.rows)
    held_out = held_out_rows(result.summary["rows"]["reference"], logps, real.rows)
    kept = [i for i in range(31) if i not in held_out]

    seen = [line["chosen_logp"] for line in lines_of(tmp_path / "out")[1:]]
    assert len(seen) == len(kept)
    wanted = sorted(logps[0, kept].tolist())
    assert sorted(seen) == pytest.approx(wanted, abs=1e-4), "each once in an epoch, no others"

    sft = re.findall(r"SFT \d+/\d+.*?loss ([\d.]+) nats", result.printed)
    sft = sorted(-float(loss) for loss in sft)
    assert sft == pytest.approx(wanted, abs=1e-3), "SFT has the same pairs"


def test_pairs_of_one_prompt_are_on_one_side_however_it_is_cut(tmp_path):
    """Four prompts of five pairs each, cut to many lengths: one prompt is held out. Its 200 first
    letters are the same, so that only the whole text can tell."""
    pairs = []
    for i in range(20):
        prompt = f"{i % 4}" + "p" * 60
        pairs.append({"prompt": prompt, "chosen": "y" * (1 + i), "rejected": "n"})
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    flags = [*SMALL, "--batch-size", 1, "--epochs", 1, "--lr", 1e-30, "--sft-epochs", 0]
    run("--data", path, *flags, "--out", tmp_path / "out")
    assert len(lines_of(tmp_path / "out")) == 1 + 15


@pytest.mark.parametrize("n, scored", [(420, 200), (60, 30)])
def test_at_most_200_held_out_pairs_are_scored(n, scored, tmp_path):
    """Two more evaluations cost so many rows. A hook of torch counts what goes into the model."""
    pairs = [{"prompt": f"{i}", "chosen": "y", "rejected": "n"} for i in range(n)]
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    flags = [*SMALL, "--data", path, "--held-out", 0.5, "--epochs", 1, "--sft-epochs", 0]
    counts = []
    for evaluations in (1, 3):
        rows = []

        def count(module, inputs):
            if isinstance(module, GPT) and not torch.is_grad_enabled():
                rows.append(len(inputs[0]))

        handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        run(*flags, "--evaluations", evaluations, "--out", tmp_path / str(evaluations))
        handle.remove()
        counts.append(sum(rows))
    assert counts[1] - counts[0] == 2 * 2 * scored, "two evaluations, two responses"


def test_those_that_are_scored_are_drawn_at_random(tmp_path):
    """Not the first 200 of the file: there the chosen responses have 2 tokens, later 9.

    An untrained model gives each of 257 tokens about the same probability.
    """
    lines = []
    for i in range(440):
        chosen = "y"
        if i >= 220:
            chosen = "yesyesye"
        lines.append({"prompt": f"{i}", "chosen": chosen, "rejected": "no"})
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    flags = ["--data", path, *SMALL, "--held-out", 0.95, "--sft-epochs", 0]
    row = run(*flags, "--out", tmp_path / "out").summary["rows"]["reference"]
    mean_length = -row["held_out_chosen_logp"] / math.log(257)
    assert 4.5 < mean_length < 6.5, "half of them, of 5.5 tokens on average"


@pytest.mark.parametrize(
    "evaluations, wanted", [(1, [7]), (2, [4, 7]), (10, [1, 2, 3, 4, 5, 6, 7])]
)
def test_evaluations_are_spread_evenly_up_to_the_last_step(evaluations, wanted, real, tmp_path):
    run(*real.flags, "--evaluations", evaluations, "--out", tmp_path)
    steps = [line["step"] for line in lines_of(tmp_path) if "held_out_loss" in line]
    assert steps == [0, *wanted]


def test_how_often_it_is_watched_changes_nothing(real, tmp_path):
    """Evaluation and saving do not touch a single bit. Micro-batches only round differently."""
    run(*real.flags, "--evaluations", 7, "--save-every", 2, "--out", tmp_path / "watched")
    assert same_weights(tmp_path / "watched/policy", real.out / "policy")
    run(*real.flags, "--micro-batch-size", 3, "--out", tmp_path / "parts")
    lines = lines_of(real.out)
    watched = lines_of(tmp_path / "watched")
    parts = lines_of(tmp_path / "parts")
    for line, other, part in zip(lines, watched, parts, strict=True):
        assert line.items() <= other.items()
        for name in ("loss", "chosen_logp", "grad_norm", "margin"):
            if name in line:
                assert part[name] == pytest.approx(line[name], rel=1e-2, abs=1e-3)


def test_a_model_of_fewer_positions_and_nothing_held_out(real, tmp_path):
    """The block is that of the model that --init names, 64, though --block-size would be 1024."""
    flags = [*real.flags[:2], "--init", real.out / "policy", "--tokenizer", "bytes"]
    flags += "--sft-epochs 0 --held-out 0 --lr 1e-30 --epochs 1 --batch-size 4".split()
    result = run(*flags, "--out", tmp_path)
    assert "prompts cut on the left to fit 64 tokens: 1" in result.warned
    assert "held_out" not in json.dumps([lines_of(tmp_path), result.summary["rows"]])
    assert "held_out_" not in result.printed


# Curves


def panels_of(figure):
    """{label of the y axis: {label of a line: (steps, values)}}."""
    panels = {}
    for ax in figure.axes:
        lines = {}
        for line in ax.get_lines():
            lines[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
        if lines:
            phase = "SFT" if "sft loss" in lines else "DPO"
            assert ax.get_xlabel() == f"{phase} step"
            assert ax.get_legend() is not None
            panels[ax.get_ylabel()] = lines
    return panels


@pytest.mark.parametrize("kind", ["toy", "real"])
def test_curves_show_what_metrics_have(kind, real, tmp_path):
    if kind == "real":
        result = real.run
        out = real.out
        names = ["held_out_loss", "held_out_accuracy"]
    else:
        out = tmp_path
        flags = "--pairs 64 --batch-size 32 --epochs 3 --sft-epochs 0.005".split()
        result = run(*flags, "--evaluations", 3, "--out", out)
        names = ["expected_reward", "kl", "objective", "gap_closed"]
    names += ["sft_loss", "loss", "weight", "margin", "chosen_reward", "rejected_reward"]
    names += ["chosen_logp", "rejected_logp"]
    panels = panels_of(result.figure)
    drawn = {}
    for lines in panels.values():
        drawn |= lines
    assert sorted(drawn) == sorted(name.replace("_", " ") for name in names)
    for name in names:
        steps, values = drawn[name.replace("_", " ")]
        if name == "sft_loss":
            there = sft_lines_of(out)
            assert steps == [line["sft_step"] for line in there]
        else:
            there = [line for line in lines_of(out) if name in line]
            assert steps == [line["step"] for line in there]
        assert len(steps) > 1
        assert values == [line[name] for line in there]
