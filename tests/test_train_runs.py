"""A run that is killed, interrupted, out of disk or shared among processes: nothing is lost."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
import data
import model
import train
from experiments import sample
from test_dpo import expect
from test_logps import ROWS, tiny_gpt
from test_train import SMALL, command, dpo_losses, write_pairs

TOY = "--world small --pairs 2000 --sft-epochs 0.5 --epochs 8 --beta 0.5 --save-every 8".split()
TIMES = "pairs_per_second", "seconds", "config"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# Python that runs train.py with these flags and is killed as `kill -9` would, at a chosen call
KILLED = """
import os, signal, sys, model, train
module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = {"train": train, "model": model, "torch": model.torch}[module]
real = getattr(module, name)
def counted(*args, **kwargs):
    global calls
    calls -= 1
    if calls == 0:
        if name == "save" and module is model.torch:  # in the middle of writing
            args[1].write(b"half a file")
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, name, counted)
train.main(sys.argv[4:])
"""
POINTS = {  # module, function, at which call; 20 steps of SFT, then 32 of DPO
    "in SFT": ("train", "backward", 11),
    "in the reference's pass": ("train", "all_logps", 1),
    "in DPO, before a checkpoint": ("train", "backward", 20 + 5),
    "in DPO, three steps after a checkpoint": ("train", "backward", 20 + 20),
    "while a checkpoint is written": ("torch", "save", 4),  # after reference, its sums, step 8
}


def weights(out):
    return torch.load(Path(out) / "policy" / "pytorch_model.bin")


def assert_same_run(out, whole):
    """Weights and metrics to the last bit, but for what is a time; the table."""
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(out)[name], tensor), f"{name} differs from that of a whole run"
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, whole)
    ]
    for resumed, wanted in zip(*lines, strict=True):
        for key in wanted.keys() - set(TIMES):
            assert resumed[key] == wanted[key], f"{key} at step {wanted['step']}"
    tables = [json.loads((folder / "summary.json").read_text()) for folder in (out, whole)]
    assert tables[0]["rows"] == tables[1]["rows"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    train.main([*TOY, "--out", str(out)])
    return out


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_is_resumed_to_the_same_weights(point, whole, root, tmp_path):
    args = [sys.executable, "-c", KILLED, *map(str, POINTS[point]), *TOY, "--out", tmp_path]
    killed = subprocess.run(args, cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "summary.json").exists()
    train.main(["--resume", "--out", str(tmp_path)])
    assert_same_run(tmp_path, whole)


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    """In step 10, between two checkpoints: it is finished, logged and saved."""
    measure, handler = train.measure, signal.getsignal(signal.SIGINT)
    logged = iter((1, 10))

    def interrupted(*args):
        if next(logged) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*args)

    monkeypatch.setattr(train, "measure", interrupted)
    with pytest.raises(SystemExit) as exit:
        train.main([*TOY, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert exit.value.code == 130 and "--resume" in err and "Traceback" not in err
    assert model.load(tmp_path / "checkpoint.pt")["step"] == 10
    monkeypatch.setattr(train, "measure", measure)
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C is what it was before"
    train.main(["--resume", "--out", str(tmp_path)])
    assert "going on after step 10" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


def spoil(out, name):
    (out / name).write_bytes((out / name).read_bytes()[:-100])


RESUMED = {  # what has happened to the folder, further flags, what the line says
    "no run": (lambda out: (out / "config.json").unlink(), [], "no run in"),
    "torn settings": (lambda out: spoil(out, "config.json"), [], "does not hold the settings"),
    "settings of something else": (
        lambda out: (out / "config.json").write_text('{"model_type": "gpt2"}'),
        [],
        "does not hold the settings",
    ),
    "another rate": (lambda out: None, ["--lr", "0.5"], "begun with lr=0.01, not 0.5"),
    "torn checkpoint": (lambda out: spoil(out, "checkpoint.pt"), [], "checkpoint.pt: unreadable"),
    "torn sums": (lambda out: spoil(out, "reference_logps.pt"), [], "logps.pt: unreadable"),
    "torn reference": (lambda out: spoil(out, "reference/pytorch_model.bin"), [], "unreadable"),
    "sums of other pairs": (
        lambda out: model.save({"mark": 0, "logps": 0}, out / "reference_logps.pt"),
        [],
        "logps.pt is not of this run",
    ),
    "a checkpoint of another run": (
        lambda out: model.save(
            model.load(out / "checkpoint.pt") | {"mark": 1, "model": tiny_gpt(0).state_dict()},
            out / "checkpoint.pt",
        ),
        [],
        "checkpoint.pt is not of this run",
    ),
    "a checkpoint of something else": (
        lambda out: model.save([1], out / "checkpoint.pt"),
        [],
        "checkpoint.pt is not of this run",
    ),
    "code in a checkpoint": (
        lambda out: torch.save({"step": print}, out / "checkpoint.pt"),
        [],
        "checkpoint.pt: unreadable",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_what_cannot_be_resumed_is_one_line(case, whole, tmp_path, capsys):
    """Exit status 2, and the folder is as it was."""
    change, flags, says = RESUMED[case]
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", whole, out], check=True)
    change(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit:
        train.main(["--resume", "--out", str(out), *flags])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith("train.py: ") and err.count("\n") == 1, err
    assert says in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("killed", ["after SFT", "in DPO"])
@pytest.mark.parametrize("changed", ["loss", "held-out pair"])
def test_a_run_is_not_resumed_with_another_loss_or_other_pairs(changed, killed, tmp_path, capsys):
    """The loss file, or a pair that is only evaluated on, is edited between the two."""
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "mine.py").write_text("def f(w, l, ref_w, ref_l): return l - w")
    flags = ["--data", tmp_path / "pairs.jsonl", *SMALL, "--loss", f"{tmp_path}/mine.py:f"]
    flags = [*map(str, [*flags, "--save-every", 1, "--lr", 1e-4, "--out", tmp_path / "out"])]
    with pytest.warns(UserWarning, match="dropped"):
        train.main(flags)
        if changed == "loss":
            (tmp_path / "mine.py").write_text("def f(w, l, ref_w, ref_l): return 5 * (l - w)")
        else:
            config = train.parse_args(flags)
            prompt = bytes(train.RealTask(config).held_out[0].prompt)
            text = (tmp_path / "pairs.jsonl").read_bytes()
            (tmp_path / "pairs.jsonl").write_bytes(text.replace(prompt, prompt[::-1]))
        if killed == "after SFT":
            (tmp_path / "out" / "checkpoint.pt").unlink()
            (tmp_path / "out" / "reference_logps.pt").unlink()
        with pytest.raises(SystemExit):
            train.main([*flags, "--resume"])
    assert "the pairs or the loss are not those of the run" in capsys.readouterr().err


def test_answers_that_a_terminal_cannot_show_lose_nothing(root, tmp_path):
    pairs = [{"prompt": f"caf\xe9 {i}", "chosen": "b", "rejected": "c"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    args = [root / "train.py", "--data", tmp_path / "pairs.jsonl", *SMALL, "--out", tmp_path / "o"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True)
    assert done.returncode == 0 and b"caf? " in done.stdout, done.stderr.decode()
    assert (tmp_path / "o" / "policy" / "config.json").exists()


def test_another_device_may_go_on(whole, tmp_path, capsys):
    """A run begun on a GPU, on a machine without: --device auto finds what is there."""
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", whole, out], check=True)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"device": "cuda:9"}))
    for flags in ([], ["--device", "cpu"], ["--device", "auto", "--tokenizer", "auto"][:2]):
        assert train.main(["--resume", "--out", str(out), *flags])["gap_closed"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(out), "--device", "tpu"])
    assert "--device" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["its own command", "the toy world"])
def test_an_unfinished_run_on_real_pairs_is_not_overwritten(by, tmp_path, capsys):
    """Forgetting --resume must not cost the hours that went into SFT, or more."""
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "out" / "reference").mkdir(parents=True)
    (tmp_path / "out" / "reference" / "config.json").write_text("hours of work")
    model.save_json({"data": "pairs.jsonl"}, tmp_path / "out" / "config.json")
    flags = TOY if by == "the toy world" else ["--data", tmp_path / "pairs.jsonl", *SMALL]
    with pytest.raises(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pairs were dropped
        train.main([*map(str, flags), "--out", str(tmp_path / "out")])
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "out" / "reference" / "config.json").read_text() == "hours of work"


def test_a_new_run_leaves_nothing_of_an_old_one_to_be_resumed(whole, tmp_path, monkeypatch):
    """Interrupted before it has a reference of its own, in a folder where another run ended."""
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", whole, out], check=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_sft", interrupted)
    with pytest.raises(SystemExit):
        train.main([*TOY, "--seed", "1", "--out", str(out)])
    kept = "reference/config.json reference_logps.pt checkpoint.pt policy/config.json".split()
    kept = [out / name for name in kept]
    assert not [path for path in kept if path.exists()], "a resumed run would begin with these"
    assert json.loads((out / "config.json").read_text())["seed"] == 1


SAVED_TWICE = """
import torch, model
model.save({"step": 1}, "checkpoint.pt")
try:
    model.save({"step": 2, "model": torch.zeros(100_000)}, "checkpoint.pt")
except OSError as error:
    print(error)
print(model.load("checkpoint.pt"))
"""


def on_a_small_disk(args, root, folder):
    """A process whose files may not grow beyond 20 kB: Python gets an error, as of a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return subprocess.run(
        [sys.executable, *args],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_a_full_disk_leaves_the_last_good_file(root, tmp_path):
    done = on_a_small_disk(["-c", SAVED_TWICE], root, tmp_path)
    said, kept = done.stdout.splitlines()
    assert said.startswith("checkpoint.pt: not written") and kept == "{'step': 1}", done
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"], "no half file is left"


def test_a_run_on_a_full_disk_is_one_line(root, tmp_path):
    done = on_a_small_disk([root / "train.py", *TOY], root, tmp_path)
    assert done.returncode == 2 and "not written" in done.stderr, done.stderr
    assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_names_step_and_pairs_and_changes_nothing(what):
    """Pair 3, in the first batch that holds it; the weights are those of the step before."""
    policy, ref = tiny_gpt(0), train.all_logps(tiny_gpt(1), ROWS, cli.TOY)
    config = dataclasses.replace(cli.TOY, batch_size=1)

    def losses_of(chosen, rejected, pair_ids):
        losses = dpo_losses(ref)(chosen, rejected, pair_ids)
        if what == "loss":
            return torch.where(pair_ids == 2, torch.nan, losses)
        return losses + torch.where(pair_ids == 2, chosen - chosen.detach(), 1).abs().sqrt()

    with pytest.raises(data.InputError, match=r"step \d.* pairs 3 is not finite.*rate 0.01"):
        for _ in train.updates(policy, ROWS, losses_of, config, 2, 1e-2):
            after = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for name, tensor in policy.state_dict().items():
        assert tensor.isfinite().all() and torch.equal(tensor, after[name]), name


# What can be looked at


SHOWN = """\
place  position  token             looks at         scored here
    0         0  'h'               0-0
    1         1  'i'               0-1              chosen 'a', rejected 'a'
    2         2  'a'               0-2              chosen 'b', rejected 'c'
    3         3  'b'               0-3              chosen '<|endoftext|>'
    4         3  'c'               0-2, 4-4         rejected '<|endoftext|>'
    5  padding from here to 8
"""


def test_show_is_the_row_by_hand(capsys):
    """Prompt "hi", answers "ab" and "ac": what both begin with is one place; then they part."""
    rows = [
        data.TokenPair([1], [2] * 5, [3] * 5),
        data.TokenPair(*map(list, (b"hi", b"ab", b"ac"))),
    ]
    rows[1].chosen.append(256), rows[1].rejected.append(256)
    bytes_ = data.get_tokenizer("bytes")
    task = SimpleNamespace(rows=rows, tokenizer=bytes_, config=SimpleNamespace(data="a file"))
    cli.show(task, None, 2)
    assert capsys.readouterr().out == SHOWN
    with pytest.raises(data.InputError, match="--show 3: there are 2 pairs"):
        cli.show(task, None, 3)


def test_show_is_all_that_it_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--show", "1"]) is None
    assert "scored here" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_samples_of_policy_and_reference(whole):
    """At temperature 0: at each place the likeliest token of the saved model."""
    answers = sample.sample(whole, "The film was", temperature=0, n=2)
    world = data.ToyWorld("small")
    for name in ("reference", "policy"):
        gpt, ids = model.GPT.from_pretrained(whole / name), world.prompt_ids[:1].clone()
        for _ in range(world.K):
            ids = torch.cat([ids, gpt(ids)[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == world.W:
                break
        text = world.tokenizer.decode(ids[0, 3:].tolist()).removesuffix(data.END).strip()
        assert answers[name] == [text, text]


@pytest.mark.parametrize(
    "prompt, folder, says",
    [
        ("The boat was", "", "boat"),
        ("x", "policy", "does not hold"),
        ("x", "nowhere", "nowhere"),
        ("x --n 0", "", "--n"),
        ("x --temperature nan", "", "--temperature"),
    ],
)
def test_samples_refuse_in_one_line(prompt, folder, says, whole, capsys):
    words = prompt.split(" --")
    with pytest.raises(SystemExit) as exit:
        sample.main([str(whole / folder), *words[:1], *" --".join(["", *words[1:]]).split()])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and err.count("\n") == 1


DEVICES = ["cpu"]
DEVICES += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, near", [("float32", 1e-3), ("bfloat16", 0.03)])
def test_every_device_and_precision_begins_alike(device, dtype, near, tmp_path):
    """One seed, one untrained reference: nearly the numbers of the CPU in float32."""
    write_pairs(tmp_path / "pairs.jsonl")
    flags = ["--data", tmp_path / "pairs.jsonl", *SMALL, "--sft-epochs", 0, "--epochs", 1]
    rows = []
    for name, *more in (("wanted", "cpu", "float32"), ("got", device, dtype)):
        out = tmp_path / name
        settings = ["--device", more[0], "--dtype", more[1], "--out", out]
        with pytest.warns(UserWarning, match="dropped"):
            train.main([*map(str, flags + settings)])
        rows.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))
    for key in ("loss", "chosen_logp", "rejected_logp", "grad_norm"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=near), key


# Many processes


def test_two_processes_are_one(root, tmp_path):
    """torchrun on 25 pairs in batches of 8: the last batch is one pair, and one process is idle.
    Micro-batches of 3 make parts of 6 and 2 pairs, whose gradients are averaged once.
    The key biases are left out: softmax does not see them, and Adam makes steps of mere rounding.
    """
    write_pairs(tmp_path / "pairs.jsonl", n=27)
    flags = ["--data", tmp_path / "pairs.jsonl", *SMALL, "--batch-size", 8, "--lr", 1e-3]
    flags += ["--micro-batch-size", 3, "--held-out", 0.1]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = command(root, *flags, "--out", one)
    assert alone.returncode == 0 and "25 pairs to train on" in alone.stdout, alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    port = "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
    args = [*torchrun, *port, root / "train.py", *flags, "--out", two]
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples after DPO") == 1, "one process prints"
    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    for ours, theirs in zip(*lines, strict=True):
        for key in ours.keys() - set(TIMES):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5), (key, ours["step"])
    for name, tensor in weights(one).items():
        other = weights(two)[name]
        if name.endswith("c_attn.bias"):
            q, _, v = tensor.chunk(3)
            tensor, other = torch.cat([q, v]), torch.cat([*other.chunk(3)[::2]])
        expect(other, tensor, f"{name} of two processes", 1e-5)


def test_compiled_is_the_same_step(tmp_path, monkeypatch):
    """--compile: through torch's tracing and its derived backward; the generated code itself, which
    takes a minute to make, is what `python -m experiments.bench` compares."""
    write_pairs(tmp_path / "pairs.jsonl", n=12)
    compile = torch.nn.Module.compile
    calls = []

    def traced(self, **settings):
        calls.append(settings)
        compile(self, backend="aot_eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    flags = ["--data", tmp_path / "pairs.jsonl", *SMALL, "--lr", 1e-3, "--out"]
    with pytest.warns(UserWarning, match="dropped"):
        plain, compiled = (
            train.main([*map(str, flags), str(tmp_path / name), *more])["rows"]["dpo"]
            for name, more in (("plain", []), ("compiled", ["--compile"]))
        )
    assert calls == [{"dynamic": True}], "compiled once, with --compile only"
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-5)


def test_more_processes_than_held_out_pairs(root, tmp_path):
    """Two pairs to train on and one held out, so that two of three processes have none of it."""
    pair = {"prompt": "Say it. ", "chosen": "Yes.", "rejected": "No."}
    lines = [json.dumps(pair | {"chosen": "Yes." * i}) for i in (1, 2, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    args = "-m torch.distributed.run --nproc_per_node=3 --rdzv-backend=c10d".split()
    args += ["--rdzv-endpoint=localhost:0", root / "train.py", "--data", tmp_path / "pairs.jsonl"]
    args = [sys.executable, *args, *SMALL, "--out", tmp_path / "out"]
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"]["reference"]["held_out_accuracy"] == 0.5
