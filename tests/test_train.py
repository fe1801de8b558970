"""The command line end to end, what it writes, and what it says to bad input."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cli
import data
import dpo
import train
from model import GPT
from test_dpo import BETA, expect
from test_logps import ROWS, one_at_a_time, tiny_gpt

QUICK = "--world small --pairs 20000 --epochs 1.6 --sft-epochs 2 --beta 1.5".split()
ROW = "expected_reward kl_to_reference objective kl_to_optimum pair_accuracy gap_closed".split()


# The step itself


FREED = """
import resource, torch, train
train.keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(25_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept(root):
    """100 MB are 24,000 pages new to the process; later blocks are those just freed. With another
    C library than glibc it does nothing, and no harm."""
    args = [sys.executable, "-c", FREED]
    done = subprocess.run(args, cwd=root, capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    if platform.libc_ver()[0] == "glibc":
        assert first > 20_000 and min(later) < 200, f"page faults of equal blocks: {first}, {later}"


def dpo_losses(ref):
    return lambda chosen, rejected, ids: dpo.dpo_loss(chosen, rejected, *ref[:, ids], BETA).losses


def test_gradient_of_the_whole_pipeline():
    """collate, response_logps, Eq. 7 and its backward against the oracle's, policy != reference."""
    model, reference = tiny_gpt(0), tiny_gpt(1)
    oracle = [
        torch.stack([one_at_a_time(m, row.prompt, getattr(row, side)) for row in ROWS])
        for m in (model, reference)
        for side in ("chosen", "rejected")
    ]
    r_w, r_l = BETA * (oracle[0] - oracle[2]), BETA * (oracle[1] - oracle[3])
    (1 + (r_l - r_w).exp()).log().mean().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ref = train.all_logps(reference, ROWS, cli.TOY)
    train.backward(model, ROWS, torch.arange(len(ROWS)), dpo_losses(ref), cli.TOY)
    for parameter, gradient in zip(model.parameters(), wanted):
        expect(parameter.grad, gradient, "the training step's gradient is not Eq. 7's", 1e-9)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_gradient_is_the_batch_gradient(micro):
    """Of 7 pairs in parts of 1, of 2 (the last short) and of 3 (the last a single pair)."""
    model, reference = tiny_gpt(0), tiny_gpt(1)
    rows = ROWS + ROWS[:3]
    ref = train.all_logps(reference, rows, cli.TOY)
    results = []
    for size in (0, micro):
        model.zero_grad()
        config = dataclasses.replace(cli.TOY, micro_batch_size=size)
        record = train.backward(model, rows, torch.randperm(7), dpo_losses(ref), config)
        losses = record["loss"].sum()
        results.append((losses, *(parameter.grad.clone() for parameter in model.parameters())))
    why = f"parts of {micro}: divide by the pairs of the batch, not of the part or by the parts"
    for whole, parts in zip(*results):
        expect(parts, whole, why, 1e-10)


def test_long_gradients_are_cut_and_their_length_is_logged():
    model, ref = tiny_gpt(0), train.all_logps(tiny_gpt(1), ROWS, cli.TOY)
    config = dataclasses.replace(cli.TOY, batch_size=4, max_grad_norm=0.01)
    *_, record, _ = next(train.updates(model, ROWS, dpo_losses(ref), config, 1, 1e-2))
    cut = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert record["grad_norm"] > 0.1 and cut == pytest.approx(0.01, rel=1e-3)


def test_the_seed_decides_the_order_of_the_pairs():
    rows = [data.TokenPair([1], [2], [])] * 40

    def order(seed):
        config = dataclasses.replace(cli.TOY, batch_size=4, seed=seed)
        steps = train.updates(tiny_gpt(0), rows, lambda y, *_: -y, config, 1, 1e-3)
        return [i for *_, pair_ids in steps for i in pair_ids.tolist()]

    assert order(0) == order(0) != order(1) and sorted(order(0)) == list(range(40))


def test_reference_and_policy_are_scored_in_one_precision():
    """Under autocast too: where they are the same, every reward is 0 to the last digit."""
    model = tiny_gpt(0).float()
    low = dataclasses.replace(cli.TOY, dtype="bfloat16")
    policy = torch.stack(train.logps_of(model, data.collate(ROWS, range(len(ROWS))), low))
    expect(train.all_logps(model, ROWS, low), policy, "reference in the policy's precision", 0)
    exact = train.all_logps(model, ROWS, cli.TOY)
    assert 1e-4 < (policy - exact).abs().max() < 0.5, "bfloat16 is not float32"


def test_reference_is_untouched_and_unshared():
    reference = tiny_gpt(1)
    before = copy.deepcopy(reference.state_dict())
    policy = copy.deepcopy(reference)
    ref = train.all_logps(reference, ROWS, cli.TOY)
    assert not ref.requires_grad, "the reference's log-probs are numbers, with no gradient"
    config = dataclasses.replace(cli.TOY, batch_size=4, warmup_steps=1, beta=BETA)
    losses = [
        record["loss"].mean().item()
        for *_, record, _ in train.updates(policy, ROWS, dpo_losses(ref), config, 5, 1e-2)
    ]
    expect(losses[0], math.log(2), "the first loss: policy and reference are still the same")
    assert losses[-1] < losses[0], f"Eq. 7 must fall under training, but went {losses}"
    assert all(parameter.grad is None for parameter in reference.parameters())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the reference has moved"
    moved = [not torch.equal(t, before[name]) for name, t in policy.state_dict().items()]
    assert all(moved), "every weight of the policy must move"


def test_logged_weight_is_the_weight():
    """The weight that train.py logs comes from autograd, for DPO it is sigma(r_l - r_w)."""
    model, ref = tiny_gpt(0), train.all_logps(tiny_gpt(1), ROWS, cli.TOY)
    record = train.backward(model, ROWS, torch.arange(len(ROWS)), dpo_losses(ref), cli.TOY)
    described = dpo.describe(record["chosen_logp"], record["rejected_logp"], *ref, beta=BETA)
    why = "the logged weight: -(1/beta) d loss / d log pi(y_w)"
    expect(-record["chosen_grad"] / BETA, described["weight"], why)


# The command line


def command(root, *flags, **kwargs):
    return subprocess.run(
        [sys.executable, root / "train.py", *map(str, flags)],
        capture_output=True,
        text=True,
        **kwargs,
    )


def here(*flags):
    """The same in this process, which has torch imported already."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main([*map(str, flags)])
        except SystemExit as exit:
            status = exit.code
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def toy(tmp_path_factory, pytestconfig):
    """One quick run on the small toy world: what it printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("toy") / "out"
    done = command(pytestconfig.rootpath, *QUICK, "--out", out, "--eval-every", 32)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_toy_run_writes_what_it_promises(toy):
    printed, out = toy
    names = {"curves.png", "metrics.jsonl", "summary.json", "reference", "policy"}
    names |= {"config.json", "reference_logps.pt"}  # and checkpoint.pt, in longer runs
    assert {path.name for path in out.iterdir()} == names
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "DPO 1/64  loss 0.6931" in printed and "log 2" in printed and "gap closed" in printed


def test_toy_summary_obeys_the_theory(toy):
    summary = json.loads((toy[1] / "summary.json").read_text())
    assert list(summary) == ["config", "seconds", "gap_closed", "rows"]
    rows, beta = summary["rows"], summary["config"]["beta"]
    assert list(rows) == ["reference", "dpo", "optimum"]
    for row in rows.values():
        assert list(row) == ROW
        gap = rows["optimum"]["objective"] - row["objective"]
        assert abs(gap - beta * row["kl_to_optimum"]) < 1e-4, "J(pi*) - J(pi) = beta KL(pi || pi*)"
        J = row["expected_reward"] - beta * row["kl_to_reference"]
        assert abs(row["objective"] - J) < 1e-9, "Eq. 3"
    assert rows["reference"]["kl_to_reference"] == 0 and rows["reference"]["pair_accuracy"] == 0.5
    assert abs(rows["optimum"]["kl_to_optimum"]) < 1e-12
    closed = 1 - rows["dpo"]["kl_to_optimum"] / rows["reference"]["kl_to_optimum"]
    assert abs(summary["gap_closed"] - closed) < 1e-12 and closed > 0.3
    assert [rows[name]["gap_closed"] for name in rows] == [0, summary["gap_closed"], 1]


def test_saved_models_are_those_of_the_table(toy):
    """out/reference and out/policy, read back, have the table's expected rewards."""
    world = data.ToyWorld("small")
    rows = json.loads((toy[1] / "summary.json").read_text())["rows"]
    for folder, name in (("reference", "reference"), ("policy", "dpo")):
        logps = world.logps(GPT.from_pretrained(str(toy[1] / folder)))
        reward = (logps.exp() * world.rewards).sum(-1).mean().item()
        assert reward == pytest.approx(rows[name]["expected_reward"], abs=1e-6), folder


def test_toy_metrics(toy):
    lines = [json.loads(line) for line in (toy[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 20, 30, 32, 40, 50, 60, 64]
    always = (
        "step loss margin weight accuracy chosen_reward rejected_reward chosen_logp rejected_logp"
    )
    for line in lines:
        assert set(always.split()) | {"grad_norm", "lr", "pairs_per_second"} <= set(line)
        assert abs(line["margin"] - line["chosen_reward"] + line["rejected_reward"]) < 1e-5
        assert 0 <= line["accuracy"] <= 1
    assert abs(lines[0]["loss"] - math.log(2)) < 1e-5 and abs(lines[0]["weight"] - 0.5) < 1e-5
    assert lines[0]["lr"] == pytest.approx(1e-2 / 6), "linear warm-up over 64 // 10 steps"
    assert lines[-1]["lr"] == pytest.approx(1e-2 / 58), "then linear decay"
    assert [line["step"] for line in lines if "kl_to_optimum" in line] == [32, 64]


def test_evaluation_never_changes_training(toy, tmp_path):
    """The same seed gives the same weights, whatever is evaluated and logged on the way."""
    flags = "--eval-every", 3, "--log-every", 1
    assert here(*QUICK, "--out", tmp_path, *flags).returncode == 0
    first, again = (torch.load(out / "policy" / "pytorch_model.bin") for out in (toy[1], tmp_path))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_micro_batches_change_nothing_that_is_logged(tmp_path):
    """Parts of 200, the last of a batch short: same loss, weight and gradient norm."""
    lines = []
    for micro in (0, 200):
        out = tmp_path / str(micro)
        flags = "--sft-epochs", 0, "--micro-batch-size", micro, "--out", out
        assert here(*QUICK, *flags).returncode == 0
        lines.append(json.loads((out / "metrics.jsonl").read_text().split("\n")[1]))
    for key in set(lines[0]) - {"pairs_per_second"}:
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-2, abs=1e-4), key


@pytest.mark.parametrize(
    "flags, gap", [(["--labels", "soft"], True), (["--labels", "deterministic"], False)]
)
def test_labels(tmp_path, flags, gap):
    done = here(*QUICK, *flags, "--optimizer", "rmsprop", "--lr", 1e-3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["gap_closed"] is not None) == gap
    assert ("gap closed: -\n" in done.stdout) == (not gap)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    if gap:  # soft: the weight is p - sigma(margin), on average 0 before the policy knows anything
        assert abs(line["weight"]) < 0.1


def write_pairs(path, n=30):
    with open(path, "w") as file:
        for i in range(n):
            pair = {
                "prompt": f"Say {i} ",
                "chosen": f"{i}, please",
                "rejected": f"{i}!" * (1 + i % 3),
            }
            print(json.dumps(pair), file=file)
        print('{"prompt": "a", "chosen": "b", "rejected": "b"}', file=file)
        print(json.dumps({"prompt": "p" * 99, "chosen": "b", "rejected": "c"}), file=file)
        print(json.dumps({"prompt": "p", "chosen": "b", "rejected": "c" * 99}), file=file)


SMALL = ["--n-layer", 1, "--n-embd", 16, "--epochs", 2, "--sft-epochs", 1, "--block-size", 64]


def test_real_pairs(root, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    out = tmp_path / "out"
    done = command(
        root, "--data", tmp_path / "pairs.jsonl", *SMALL, "--dtype", "bfloat16", "--out", out
    )
    assert done.returncode == 0, done.stderr
    warned = done.stderr.splitlines()
    one = re.compile(r"warning: .*: 1(, first in line \d+)?")
    assert len(warned) == 3 and all(map(one.fullmatch, warned)), warned
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gap_closed"] is None and list(summary["rows"]) == ["reference", "dpo"]
    assert summary["rows"]["reference"]["held_out_accuracy"] == 0.5
    assert abs(summary["rows"]["reference"]["held_out_loss"] - math.log(2)) < 1e-6
    assert "raw log-prob" in done.stdout

    more = ["--init", out / "policy", "--tokenizer", "bytes", "--sft-epochs", 0, "--epochs", 1]
    done = command(
        root,
        "--data",
        tmp_path / "pairs.jsonl",
        "--block-size",
        64,
        *more,
        "--out",
        tmp_path / "more",
    )
    assert done.returncode == 0, done.stderr
    saved = [
        torch.load(tmp_path / name / "pytorch_model.bin")
        for name in ("out/policy", "more/reference")
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_reference_logps_belong_to_their_pair():
    """Computed once in file order, looked up by pair id in shuffled batches."""
    task = train.ToyTask(dataclasses.replace(cli.TOY, world="small", pairs=500, n_embd=16))
    model = train.build_model(dataclasses.replace(task.config, device="cpu"), task.tokenizer)
    task.use_reference(model)
    ref = train.all_logps(model, task.rows, dataclasses.replace(task.config, batch_size=64))
    stream = data.batches(task.rows, 32, torch.Generator().manual_seed(5))
    for _, pair_ids in zip(range(5), stream):
        batch = data.collate(task.rows, pair_ids)
        fresh = torch.stack(train.logps_of(model, batch, task.config))
        torch.testing.assert_close(ref[:, pair_ids], fresh.detach(), rtol=1e-5, atol=1e-5)


MINE = """
def f(a, b, c, d): return (b - a).mean()
def detached(a, b, c, d): return (b - a).detach()
def squeezed(a, b, c, d): return (b - a).squeeze()
def two(a, b, c, d): return (b - a) * a.new_tensor([1, 2])
def of_the_reference(a, b, c, d): return c.requires_grad_() - d
def infinite(a, b, c, d): return (b - a) / 0
def kinked(a, b, c, d): return (a - b - c + d).square().sqrt()
def needs_delta(a, b, c, d, delta): return b - a
def raises(a, b, c, d): raise RuntimeError("oh\\ndear")
def no_beta(a, b, c, d): return b - a
def word(a, b, c, d, alpha="large"): return b - a
def negative(a, b, c, d, beta=-1.0): return b - a
def of_few(a, b, c, d):
    assert len(a) < 4
    return b - a
"""
BAD = [
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--data", ""], "--data is empty"),
    (["--data", "good.jsonl", "--init", "out/policy"], "lies in --out"),
    (["--loss", "mine.py:word"], "large"),
    (["--loss", "mine.py:negative", "--data", "good.jsonl"], "must be over 0"),
    (["--loss", "mine.py:of_few"], "AssertionError"),
    (["--batch-size", "9000000000000000000"], "--batch-size"),
    (["--data", "."], "."),
    (["--data", "bad.jsonl"], "bad.jsonl:2"),
    (["--data", "field.jsonl"], 'field.jsonl:1: "rejected"'),
    (["--data", "empty.jsonl"], "empty.jsonl"),
    (["--data", "one.jsonl"], "one.jsonl"),
    (["--data", "good.jsonl", "--tokenizer", "toy"], 'unknown tokenizer "toy"'),
    (["--data", "good.jsonl", "--tokenizer", "klingon"], "klingon"),
    (["--data", "good.jsonl", "--init", "nowhere", "--tokenizer", "bytes"], "nowhere"),
    (["--data", "good.jsonl", "--pairs", "10"], "--pairs"),
    (["--data", "good.jsonl", "--block-size", "2"], "no pair fits"),
    (["--loss", "nonsense"], "there are dpo, cdpo, robust, ipo, hinge, or file.py:function"),
    (["--loss", "mine.py"], "or file.py:function"),
    (["--loss", "mine:f"], "or file.py:function"),
    (["--loss", "nowhere.py:f"], "nowhere"),
    (["--loss", "mine.py:g"], "no attribute 'g'"),
    (["--loss", "mine.py:f"], "one loss for each pair"),
    (["--loss", "mine.py:two"], "one loss for each pair"),
    (["--loss", "mine.py:detached"], "does not require grad"),
    (["--loss", "mine.py:of_the_reference"], "not have been used"),
    (["--loss", "mine.py:infinite"], "not finite where policy == reference"),
    (["--loss", "mine.py:kinked"], "not finite where policy == reference"),
    (["--loss", "exits.py:f"], "SystemExit"),
    (["--loss", "model.py:f"], "this file, not ours"),
    (["--loss", "mine.py:needs_delta"], "delta"),
    (["--loss", "mine.py:raises"], "oh"),
    (["--loss", "torn.py:f"], "SyntaxError"),
    (["--loss", "ipo", "--epsilon", "0.1"], "--epsilon"),
    (["--gamma", "1"], "--gamma"),
    (["--alpha", "1", "--data", "good.jsonl"], "--alpha"),
    (["--loss", "cdpo", "--epsilon", "0.5"], "epsilon"),
    (["--loss", "cdpo", "--epsilon", "-0.1"], "--epsilon"),
    (["--loss", "mine.py:no_beta", "--beta", "1"], "--beta"),
    (["--beta", "0"], "--beta"),
    (["--beta", "-1"], "--beta"),
    (["--beta", "nan"], "--beta"),
    (["--beta", "much"], "--beta"),
    (["--lr", "inf"], "--lr"),
    (["--batch-size", "0"], "--batch-size"),
    (["--micro-batch-size", "-1"], "--micro-batch-size"),
    (["--epochs", "0"], "--epochs"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "99999999999999999999999"], "--seed"),
    (["--save-every", "0"], "--save-every"),
    (["--show", "-1"], "--show"),
    (["--show", "9", "--data", "good.jsonl"], "--show 9: there are 8 pairs"),
    (["--resume"], "there is no run in out"),
    (["--resume", "--out", "nowhere"], "there is no run in nowhere"),
    (["--loss", "mine.py:squeezed"], "one loss for each pair"),
    (["--n-embd", "31"], "--n-embd"),
    (["--labels", "perfect"], "--labels"),
    (["--device", "tpu"], "--device"),
    (["--tokenizer", "bytes"], "--tokenizer"),
    (["--bet", "1"], "--bet"),
    (["--nonsense"], "--nonsense"),
    (["surplus"], "surplus"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line(flags, says, tmp_path, monkeypatch, capsys):
    """Exit status 2, one line, no traceback, nothing overwritten."""
    monkeypatch.chdir(tmp_path)
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    for name, text in {
        "good.jsonl": good * 9,
        "bad.jsonl": good + "{",
        "field.jsonl": '{"prompt": "a", "chosen": "b"}',
        "empty.jsonl": "",
        "one.jsonl": good,
        "mine.py": MINE,
        "torn.py": "def f(:",
        "exits.py": "raise SystemExit(0)",
        "model.py": "raise ValueError('this file, not ours')",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        train.main(flags)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert printed.err.startswith("train.py: ") and printed.err.count("\n") == 1, printed.err
    assert says in printed.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]
    assert (tmp_path / "out" / "summary.json").read_text() == "precious"


def test_a_loss_file_may_be_in_any_encoding_and_its_defaults_of_any_number(tmp_path):
    text = "# -*- coding: latin-1 -*-\n# \xe9\nimport torch\n"
    text += "def f(a, b, c, d, alpha=torch.tensor(0.5)): return b - a"
    (tmp_path / "latin.py").write_bytes(text.encode("latin-1"))
    config = train.parse_args(["--loss", f"{tmp_path}/latin.py:f"])
    assert config.alpha == 0.5 and type(config.alpha) is float, "JSON takes nothing else"
    assert train.mark_of_run(SimpleNamespace(rows=(), held_out=()), config)


def test_a_last_step_that_ruins_the_policy_is_no_success(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([*QUICK, "--epochs", "0.001", "--lr", "1e30", "--out", str(tmp_path)])
    assert exit.value.code == 2 and "step 1: not finite" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_tokenizer_files_without_network_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(OSError("no network"))
    )
    data.tiktoken.registry.ENCODINGS.pop("gpt2", None)
    with pytest.raises(data.InputError, match="TIKTOKEN_CACHE_DIR"):
        data.get_tokenizer("gpt2")


def cuda_is_full(config):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fills", [cuda_is_full, lambda config: torch.empty(10**15)])
def test_out_of_memory_is_one_line(fills, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", fills)
    with pytest.raises(SystemExit) as exit:
        train.main([])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "--micro-batch-size" in error and error.count("\n") == 1, error


def illegal_access(config):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("bug", [illegal_access, lambda config: torch.ones(2) @ torch.ones(3)])
def test_other_errors_of_torch_are_shown_whole(bug, monkeypatch):
    monkeypatch.setattr(train, "run", bug)
    with pytest.raises(RuntimeError, match="illegal|size"):  # a bug wants its traceback
        train.main([])


@pytest.mark.parametrize("flag", ["--lr", "--sft-lr"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, flag):
    done = here(*QUICK, flag, 1e30, "--log-every", 1, "--out", tmp_path)
    assert done.returncode == 2 and "not finite" in done.stderr and done.stderr.count("\n") == 1
    assert "1e+30" in done.stderr


def test_help_names_every_flag(root):
    shown = command(root, "--help", env={**os.environ, "COLUMNS": "200"}).stdout
    for field in dataclasses.fields(cli.Config):
        assert "--" + field.name.replace("_", "-") in shown


LOSS_FLAGS = {name: [] for name in ("dpo", "cdpo", "robust", "ipo", "hinge")}
LOSS_FLAGS |= {
    "cdpo": ["--epsilon", "0.2"],
    "experiments/losses.py:simpo_loss": ["--beta", "2", "--gamma", "0.5"],
    "experiments/losses.py:orpo_loss": ["--alpha", "0.2"],
    "experiments/losses.py:dpop_loss": ["--alpha", "1"],
    "experiments/losses.py:unlikelihood_loss": ["--alpha", "0.05"],
}


@pytest.mark.parametrize("loss", LOSS_FLAGS)
def test_every_loss_trains(loss, root, tmp_path, monkeypatch, capsys):
    """The policy learns which answers win, whatever the loss; its settings are printed."""
    monkeypatch.chdir(root)
    flags = ["--loss", loss, *LOSS_FLAGS[loss], "--out", str(tmp_path)]
    quick = [*QUICK[:4], "--sft-epochs", "1", "--epochs", "0.8", "--held-out", "0.8"]
    summary = train.main(quick + flags)
    name = loss if ":" not in loss else "policy"
    assert list(summary["rows"]) == ["reference", name, "optimum"]
    accuracy = summary["rows"][name]["pair_accuracy"]
    assert accuracy > 0.53, f"{loss} ranks held-out pairs no better than a coin: {accuracy}"
    printed = capsys.readouterr().out.split("\n")[0].split()
    for flag, value in zip(LOSS_FLAGS[loss][::2], LOSS_FLAGS[loss][1::2]):
        assert f"{flag[2:]}={float(value)}" in printed


def test_settings_reach_the_loss_and_only_by_name():
    """A loss from a file gets what its signature names, lengths of its own pairs among them."""
    seen = {}

    def loss(a, b, c, d, chosen_lengths, rejected_lengths, gamma, beta=7.0):
        seen.update(locals())
        return b - a

    config = dataclasses.replace(cli.TOY, beta=3.0, gamma=0.5, epsilon=0.1)
    policy, ref, lengths = (torch.arange(4.0).view(2, 2) + 10 * k for k in range(3))
    losses = cli.call_loss(loss, config, policy, ref, lengths)
    assert losses.tolist() == [2, 2] and seen["beta"] == 3 and seen["gamma"] == 0.5
    rows = [seen[key].tolist() for key in ("a", "b", "c", "d")]
    assert rows == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert seen["chosen_lengths"].tolist() == [20, 21]
    assert seen["rejected_lengths"].tolist() == [22, 23]


def test_a_loss_brings_its_own_defaults(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    real = ["--data", str(tmp_path / "pairs.jsonl")]
    simpo = ["--loss", "experiments/losses.py:simpo_loss"]
    for flags, beta, gamma, epsilon in (
        (["--loss", "cdpo"], 1.0, None, 0.1),  # the toy's own beta
        (real, 0.1, None, None),  # the paper's
        (["--loss", "cdpo", "--beta", "0.3", "--epsilon", "0", *real], 0.3, None, 0.0),
        (simpo + real, 2.0, 1.0, None),  # means over tokens: not DPO's 0.1
        (simpo + real + ["--gamma", "0.3"], 2.0, 0.3, None),
        (["--loss", "experiments/losses.py:orpo_loss", *real], 0.1, None, None),
    ):
        config = cli.parse_args(flags)
        assert (config.beta, config.gamma, config.epsilon) == (beta, gamma, epsilon), flags


@pytest.mark.parametrize("loss", ["dpo", "experiments/losses.py:simpo_loss"])
def test_soft_labels_mix_both_orders(loss, root, monkeypatch, tmp_path):
    """p f(chosen, rejected) + (1 - p) f(rejected, chosen), with the p and lengths of the pair."""
    kept = []
    monkeypatch.chdir(root)
    monkeypatch.setattr(train, "updates", lambda m, rows, f, *_: kept.append(f) or iter(()))
    settings = {"loss": loss, "labels": "soft", "beta": 0.5, "gamma": 0.3, "out": str(tmp_path)}
    config = dataclasses.replace(cli.TOY, **settings)
    p = torch.tensor([0.9, 0.2, 0.6])
    ref = torch.tensor([[-3.0, -1.0, -4.0], [-2.0, -5.0, -1.0]])
    rows = [data.TokenPair([1], [1] * n, [1] * m) for n, m in ((1, 2), (3, 3), (2, 4))]
    task = SimpleNamespace(p=p, rows=rows, evaluate=lambda model: {})
    train.train_dpo(SimpleNamespace(device="cpu"), task, ref, config)
    ids, w, l = torch.tensor([2, 0]), torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
    if loss == "dpo":
        margin = 0.5 * ((w - ref[0, ids]) - (l - ref[1, ids]))
        wins, loses = (1 + (-margin).exp()).log(), (1 + margin.exp()).log()
    else:  # lengths 2 and 4, then 1 and 2
        margin = 0.5 * (w / torch.tensor([2.0, 1.0]) - l / torch.tensor([4.0, 2.0]))
        wins, loses = (1 + (0.3 - margin).exp()).log(), (1 + (0.3 + margin).exp()).log()
    wanted = p[ids] * wins + (1 - p[ids]) * loses
    torch.testing.assert_close(kept[0](w, l, ids), wanted)


def test_no_gap_to_close_is_no_division_by_0(tmp_path):
    """beta so large that the optimum is the reference itself, yet the gradient is finite."""
    summary = train.main(
        [*QUICK[:6], "--sft-epochs", "1", "--beta", "1e10", "--out", str(tmp_path)]
    )
    assert summary["gap_closed"] is None


def test_pair_accuracy_by_hand():
    """A policy that prefers answer 1 is right in 0.8 where 0.8 of the annotators prefer it."""
    task = train.ToyTask(dataclasses.replace(cli.TOY, world="small"))
    task.ref = task.best = torch.zeros(2, 1111, dtype=torch.float64).log_softmax(-1)
    task.gap = 1.0
    better = task.ref.clone()
    better[0, 1] += 1
    one = torch.tensor([1])
    task.held_out = data.Drawn(one * 0, one, one * 2, torch.tensor([0.8], dtype=torch.float64))
    assert task.exact(better.log_softmax(-1))["pair_accuracy"] == pytest.approx(0.8)


@pytest.mark.filterwarnings("ignore")
def test_held_out_pairs_are_never_trained_on(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    config = dataclasses.replace(cli.REAL, data=str(tmp_path / "pairs.jsonl"), tokenizer="bytes")
    task = train.RealTask(config)
    seen = [str(row) for row in task.rows + task.held_out]
    assert len(seen) == len(set(seen)) == 32 and len(task.held_out) == 4


def test_optimizers_and_schedule():
    """Adam's first step is lr times the sign of the gradient; the schedule is the flags' own."""
    rows = [data.TokenPair([1], [2], [])] * 10
    for decay, last in ((True, 0.1 / 36), (False, 0.1)):
        config = dataclasses.replace(cli.TOY, batch_size=1, warmup_steps=9, decay=decay)
        model = train.GPT(train.GPTConfig(5, 4, 8, 1, 1))
        before = model.wte.weight.detach().clone()
        lrs = []
        for step, steps, record, _ in train.updates(model, rows, lambda y, *_: -y, config, 4, 0.1):
            lrs.append(record["lr"])
            if step == 1:
                moved = (model.wte.weight - before).abs().max().item()
        assert len(lrs) == 40 and lrs[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
        assert lrs[-1] == pytest.approx(last) and moved == pytest.approx(0.025, rel=1e-3)
