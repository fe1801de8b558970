"""The command line end to end, what it writes, and what it says to bad input."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import train

QUICK = "--world small --pairs 4000 --epochs 8 --sft-epochs 2 --beta 0.5".split()
ROW = ["expected_reward", "kl_to_reference", "objective", "kl_to_optimum", "pair_accuracy"]


def command(root, *flags, **kwargs):
    return subprocess.run(
        [sys.executable, root / "train.py", *map(str, flags)],
        capture_output=True,
        text=True,
        **kwargs,
    )


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


def test_evaluation_never_changes_training(toy, root, tmp_path):
    """The same seed gives the same weights, whatever is evaluated and logged on the way."""
    flags = "--eval-every", 3, "--log-every", 1
    assert command(root, *QUICK, "--out", tmp_path, *flags).returncode == 0
    first, again = (torch.load(out / "policy" / "pytorch_model.bin") for out in (toy[1], tmp_path))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_micro_batches_change_nothing_that_is_logged(root, tmp_path):
    """Parts of 200, the last of a batch short: same loss, weight and gradient norm."""
    lines = []
    for micro in (0, 200):
        out = tmp_path / str(micro)
        flags = "--sft-epochs", 0, "--micro-batch-size", micro, "--out", out
        assert command(root, *QUICK, *flags).returncode == 0
        lines.append(json.loads((out / "metrics.jsonl").read_text().split("\n")[1]))
    for key in set(lines[0]) - {"pairs_per_second"}:
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-2, abs=1e-4), key


@pytest.mark.parametrize(
    "flags, gap", [(["--labels", "soft"], True), (["--labels", "deterministic"], False)]
)
def test_labels(root, tmp_path, flags, gap):
    done = command(root, *QUICK, *flags, "--optimizer", "rmsprop", "--lr", 1e-3, "--out", tmp_path)
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
    assert [line.startswith("warning: ") and line.endswith(": 1") for line in warned] == [True] * 3
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
    task = train.ToyTask(dataclasses.replace(train.TOY, world="small", pairs=500, n_embd=16))
    model = train.build_model(dataclasses.replace(task.config, device="cpu"), task.tokenizer)
    task.use_reference(model)
    ref = train.all_logps(model, task.rows, dataclasses.replace(task.config, batch_size=64))
    stream = data.batches(task.rows, 32, torch.Generator().manual_seed(5))
    for _, pair_ids in zip(range(5), stream):
        batch = data.collate(task.rows, pair_ids)
        fresh = torch.stack(train.logps_of(model, batch, task.config))
        torch.testing.assert_close(ref[:, pair_ids], fresh.detach(), rtol=1e-5, atol=1e-5)


BAD = [
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--data", "."], "."),
    (["--data", "bad.jsonl"], "bad.jsonl:2"),
    (["--data", "field.jsonl"], 'field.jsonl:1: "rejected"'),
    (["--data", "empty.jsonl"], "empty.jsonl"),
    (["--data", "one.jsonl"], "one.jsonl"),
    (["--data", "good.jsonl", "--tokenizer", "toy"], "not a word of the toy world"),
    (["--data", "good.jsonl", "--tokenizer", "klingon"], "klingon"),
    (["--data", "good.jsonl", "--init", "nowhere", "--tokenizer", "bytes"], "nowhere"),
    (["--data", "good.jsonl", "--pairs", "10"], "--pairs"),
    (["--data", "good.jsonl", "--block-size", "2"], "no pair fits"),
    (["--loss", "nonsense"], "nonsense"),
    (["--beta", "0"], "--beta"),
    (["--beta", "-1"], "--beta"),
    (["--beta", "nan"], "--beta"),
    (["--beta", "much"], "--beta"),
    (["--lr", "inf"], "--lr"),
    (["--batch-size", "0"], "--batch-size"),
    (["--micro-batch-size", "-1"], "--micro-batch-size"),
    (["--epochs", "0"], "--epochs"),
    (["--n-embd", "30"], "--n-embd"),
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


def test_tokenizer_files_without_network_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(OSError("no network"))
    )
    data.tiktoken.registry.ENCODINGS.pop("gpt2", None)
    with pytest.raises(data.InputError, match="TIKTOKEN_CACHE_DIR"):
        data.get_tokenizer("gpt2")


@pytest.mark.parametrize("flag", ["--lr", "--sft-lr"])
def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path, flag):
    done = command(root, *QUICK, flag, 1e30, "--log-every", 1, "--out", tmp_path)
    assert done.returncode == 2 and "not finite" in done.stderr and done.stderr.count("\n") == 1
    assert "1e+30" in done.stderr


def test_help_names_every_flag(root):
    shown = command(root, "--help", env={**os.environ, "COLUMNS": "200"}).stdout
    for field in dataclasses.fields(train.Config):
        assert "--" + field.name.replace("_", "-") in shown


def test_soft_labels_mix_both_orders(monkeypatch, tmp_path):
    """p f(chosen, rejected) + (1 - p) f(rejected, chosen), with the p of the pair."""
    kept = []
    monkeypatch.setattr(train, "updates", lambda m, rows, f, *_: kept.append(f) or iter(()))
    config = dataclasses.replace(train.TOY, labels="soft", beta=0.5, out=str(tmp_path))
    p = torch.tensor([0.9, 0.2, 0.6])
    ref = torch.tensor([[-3.0, -1.0, -4.0], [-2.0, -5.0, -1.0]])
    task = SimpleNamespace(p=p, rows=[])
    train.train_dpo(SimpleNamespace(device="cpu"), task, ref, {}, config)
    ids, chosen, rejected = (
        torch.tensor([2, 0]),
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-3.0, -1.0]),
    )
    margin = 0.5 * ((chosen - ref[0, ids]) - (rejected - ref[1, ids]))
    wanted = p[ids] * (1 + (-margin).exp()).log() + (1 - p[ids]) * (1 + margin.exp()).log()
    torch.testing.assert_close(kept[0](chosen, rejected, ids), wanted)


def test_pair_accuracy_by_hand():
    """A policy that prefers answer 1 is right in 0.8 where 0.8 of the annotators prefer it."""
    task = train.ToyTask(dataclasses.replace(train.TOY, world="small"))
    task.ref = task.best = torch.zeros(2, 1111, dtype=torch.float64).log_softmax(-1)
    better = task.ref.clone()
    better[0, 1] += 1
    one = torch.tensor([1])
    task.held_out = data.Drawn(one * 0, one, one * 2, torch.tensor([0.8], dtype=torch.float64))
    assert task.exact(better.log_softmax(-1))["pair_accuracy"] == pytest.approx(0.8)


@pytest.mark.filterwarnings("ignore")
def test_held_out_pairs_are_never_trained_on(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    config = dataclasses.replace(train.REAL, data=str(tmp_path / "pairs.jsonl"), tokenizer="bytes")
    task = train.RealTask(config)
    seen = [str(row) for row in task.rows + task.held_out]
    assert len(seen) == len(set(seen)) == 32 and len(task.held_out) == 4


def test_optimizers_and_schedule():
    """Adam's first step is lr times the sign of the gradient; the schedule is the flags' own."""
    rows = [data.TokenPair([1], [2], [])] * 10
    for decay, last in ((True, 0.1 / 36), (False, 0.1)):
        config = dataclasses.replace(train.TOY, batch_size=1, warmup_steps=9, decay=decay)
        model = train.GPT(train.GPTConfig(5, 4, 8, 1, 1))
        before = model.wte.weight.detach().clone()
        lrs = []
        for step, steps, record, _ in train.updates(model, rows, lambda y, *_: -y, config, 4, 0.1):
            lrs.append(record["lr"])
            if step == 1:
                moved = (model.wte.weight - before).abs().max().item()
        assert len(lrs) == 40 and lrs[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
        assert lrs[-1] == pytest.approx(last) and moved == pytest.approx(0.025, rel=1e-3)
