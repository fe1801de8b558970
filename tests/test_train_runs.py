"""A run that is interrupted, killed, resumed, shared among processes, or pointed at a folder."""

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch

import data
import model
import train
from test_dpo import expect
from test_train import ROOT, ROWS, SMALL, assert_same_weights, gpt, lines_of, oracle, run, settings
from test_train import quick, spy, step, summary_of, write_pairs  # noqa: F401

TOY = "--batch-size 32 --pairs 320 --epochs 2 --sft-epochs 0.016".split()  # 10 and 20 steps
TOY += ["--save-every", 8, "--eval-every", 5]


def stopped(monkeypatch, module, name, call, *flags):
    """A run that Ctrl-C stops at this call of a function; a file is half-written then."""
    calls, real = [], getattr(module, name)

    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            if module is torch:
                args[1].write(b"half a file")
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, counted)
        run(*flags)


def assert_same_run(out, whole):
    """Not a bit differs in weights, metrics and table."""
    for name in ("reference", "policy"):
        assert_same_weights(out / name, whole / name)
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert summary_of(out)["rows"] == summary_of(whole)["rows"]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    run(*TOY, "--out", out)
    return out


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


# Resume

POINTS = {  # what stops it -> function, at which call, steps that are left
    "in SFT": (train, "update", 4, 30),
    "while the reference is saved": (torch, "save", 1, 30),
    "in the first pass of the reference": (train, "all_logps", 1, 20),
    "in DPO, before a checkpoint": (train, "update", 10 + 5, 20),
    "right after a checkpoint": (train, "update", 10 + 9, 12),
    "some steps after a checkpoint": (train, "update", 10 + 13, 12),
    "while the second checkpoint is written": (torch, "save", 3, 12),
    "while the policy is saved": (torch, "save", 4, 4),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_stopped_run_is_resumed_to_the_same_weights(point, whole, tmp_path, monkeypatch):
    *where, left = POINTS[point]
    stopped(monkeypatch, *where, *TOY, "--out", tmp_path)
    assert not (tmp_path / "summary.json").exists() and not [*tmp_path.glob("*.tmp")]
    if point == "while the second checkpoint is written":
        assert model.load(tmp_path / "checkpoint.pt")["step"] == 8, "the first is still whole"
    updates = spy(monkeypatch, train, "update")
    run("--resume", "--out", tmp_path)
    assert len(updates) == left, "what is done is not done again"
    assert_same_run(tmp_path, whole)


KILLED = """
import os, signal, sys, torch, train
module, name, calls = {"train": train, "torch": torch}[sys.argv[1]], sys.argv[2], int(sys.argv[3])
real = getattr(module, name)
def counted(*args):
    global calls
    calls -= 1
    if calls == 0:
        if module is torch:
            args[1].write(b"half a file")
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(module, name, counted)
train.main(sys.argv[4:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["train update 4", "train update 23", "torch save 3"])
def test_a_killed_run_is_resumed_to_the_same_weights(where, whole, tmp_path):
    args = [sys.executable, "-c", KILLED, *where.split(), *TOY, "--out", tmp_path]
    killed = subprocess.run([*map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run("--resume", "--out", tmp_path)
    assert_same_run(tmp_path, whole)


def test_resume_refuses_what_is_not_its_run(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config, before = json.loads((tmp_path / "config.json").read_text()), files_of(tmp_path)
    with pytest.raises(SystemExit) as raised:
        run("--resume", "--lr", 0.5, "--out", tmp_path)
    assert raised.value.code == 2 and "own settings" in capsys.readouterr().err
    assert files_of(tmp_path) == before
    for other in ({"model_type": "gpt2"}, config | {"made_by": "somebody"}, config | {"crc": 1}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(data.InputError, match="holds no run of train.py on these pairs"):
            run("--resume", "--out", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"device": "cuda:9"}))
    run("--resume", "--device", "cpu", "--out", tmp_path)  # another device may go on
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("change", ["a pair to train on", "a held-out pair", "one more pair"])
def test_resume_refuses_other_pairs(change, pairs, tmp_path, monkeypatch):
    splits, flags = spy(monkeypatch, data, "split"), ["--data", pairs, *SMALL]
    stopped(monkeypatch, train, "update", 6, *flags, "--out", tmp_path / "out")
    rows = splits[0][1][change == "a held-out pair"]
    prompt, text = bytes(rows[0].prompt), pairs.read_bytes()
    more = b'\n{"prompt": "more", "chosen": "b", "rejected": "c"}'
    changed = text + more if "more" in change else text.replace(prompt, prompt[::-1])
    pairs.write_bytes(changed)
    with pytest.raises(data.InputError, match="these pairs"):
        run("--resume", "--out", tmp_path / "out")


# Folders


def test_a_new_run_leaves_nothing_of_an_old_one_to_be_resumed(whole, tmp_path, monkeypatch):
    """It stops in SFT, in the folder of a finished run. A toy run may be overwritten, too."""
    out, seed = tmp_path / "out", [*TOY, "--seed", 1, "--out"]
    run(*seed, tmp_path / "wanted")
    shutil.copytree(whole, out)
    for again in (["--resume", "--out"], seed):
        stopped(monkeypatch, train, "update", 3, *seed, out)
        assert {path.name for path in out.rglob("*.json")} == {"config.json"}
        assert not (out / "checkpoint.pt").exists()
        run(*again, out)
        assert_same_run(out, tmp_path / "wanted")


def test_an_unfinished_run_on_real_pairs_is_not_overwritten(pairs, tmp_path, monkeypatch):
    """From its first second on, not even where an older one had ended. A finished one may be."""
    out, flags = tmp_path / "out", ["--data", pairs, *SMALL, "--out"]
    run(*flags, out)
    shutil.copytree(out, tmp_path / "whole")
    stopped(monkeypatch, train, "update", 1, *flags, out)
    before = files_of(out)
    for command in (flags, [*TOY, "--out"]):
        with pytest.raises(data.InputError, match="unfinished run: --resume"):
            run(*command, out)
    assert files_of(out) == before
    run("--resume", "--out", out)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("kind", ["toy", "real"])
@pytest.mark.parametrize("what", ["notes.txt", "config.json", "policy/config.json", "is a file"])
def test_files_of_others_stay_as_they_are(what, kind, pairs, tmp_path):
    out = tmp_path / "out"
    (out / what).parent.mkdir(parents=True)
    (out / what).write_text('{"model_type": "gpt2"}')
    out, before = out / what if what == "is a file" else out, files_of(tmp_path)
    with pytest.raises((data.InputError, OSError), match="something else|Not a directory"):
        run(*(TOY if kind == "toy" else ["--data", pairs, *SMALL]), "--out", out)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("init", ["", "policy", "elsewhere/../reference"])
def test_a_run_does_not_overwrite_what_it_starts_from(init, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    if not init:
        shutil.copytree(whole / "policy", out, dirs_exist_ok=True)
    shutil.copy(whole / "config.json", out)
    before = files_of(out)
    with pytest.raises((data.InputError, OSError), match="holds --init|unreadable"):
        run(*TOY, "--init", out / init, "--out", out)
    assert files_of(out) == before


# The command line, in this process


def test_errors_and_ctrl_c_are_one_line(pairs, tmp_path, monkeypatch, capsys):
    """train.py as a script: warnings and errors in one line each; a terminal that cannot show a
    letter costs nothing; Ctrl-C says how to go on."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    warnings.simplefilter("always")

    def script(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().err

    code, err = script("--data", tmp_path / "missing.jsonl")
    assert code == 2 and err.count("\n") == 1 and "missing.jsonl" in err
    assert err.startswith("train.py: ")
    code, err = script("--loss", "nonsense")
    assert code == 2 and err.startswith("train.py: --loss nonsense: not") and err.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_pairs", lambda path: signal.raise_signal(signal.SIGINT))
        code, err = script("--data", pairs)
        assert code == 130 and err.count("\n") == 2 and "--resume continues" in err
    pairs.write_text(pairs.read_text().replace("Say", "Caf\\u00e9"))
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    code, err = script("--data", pairs, *SMALL, "--out", tmp_path / "out")
    assert code == 0 and [line[:9] for line in err.splitlines()] == ["warning: "] * 3, err
    ascii_only.flush()
    assert b"\nCaf? " in ascii_only.buffer.getvalue()


def test_a_terminal_gets_one_changing_line(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        train.progress("first", False)
        train.progress("second", True)
    assert capsys.readouterr().out == "\r\033[Kfirst\r\033[Ksecond\nsecond\n"


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as raised:
        settings("--help")
    printed = capsys.readouterr().out
    assert raised.value.code == 0 and "--warmup-steps" in printed
    assert not [name for name in vars(settings()) if "--" + name.replace("_", "-") not in printed]


# Processes and devices


@pytest.mark.parametrize(
    "env, wanted",
    [
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_rank_and_world_size_count_together(env, wanted, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    module = runpy.run_path(str(ROOT / "train.py"))
    assert (module["RANK"], module["PROCESSES"]) == wanted


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_processes_share_the_pass_of_the_reference(processes, monkeypatch):
    """Each fills in its own pairs; the sum is the whole. Of nine processes two have none."""
    monkeypatch.setattr(train, "PROCESSES", processes)
    monkeypatch.setattr(train.distributed, "all_reduce", lambda tensor: parts.append(tensor))
    args, parts = settings("--micro-batch-size", 2), []
    for rank in range(processes):
        monkeypatch.setattr(train, "RANK", rank)
        last = train.all_logps(gpt(0), ROWS, args)
    assert len(parts) == processes * (processes > 1)
    parts = torch.stack(parts or [last])
    expect(parts.sum(0), oracle(gpt(0), ROWS), "log-probs of all processes", 1e-5)
    assert ((parts != 0).sum(0) == 1).all(), "no pair is scored twice"


def test_every_collective_is_on_the_models_device(monkeypatch):
    """An NCCL group cannot reduce a CPU tensor. The model is on "meta", which holds no numbers."""
    devices = []
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train.distributed, "all_reduce", lambda x: devices.append(x.device.type))
    meta = gpt(0).float().to("meta")
    ref = train.all_logps(meta, ROWS, settings())
    losses, logps, norms = step(meta, ref)
    with pytest.raises((RuntimeError, NotImplementedError)):  # its values cannot be looked at
        train.means({"loss": losses, "logp": logps[0]} | norms)
    assert devices == ["meta", "meta"]


def test_only_the_first_process_writes_and_prints(pairs, tmp_path, monkeypatch):
    """The second of two, whose group and gradients are those of a single one."""
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "PROCESSES", 2)
    for name in ("init_process_group", "destroy_process_group", "all_reduce"):
        monkeypatch.setattr(train.distributed, name, lambda *_: None)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module: module)
    done = run("--data", pairs, *SMALL, "--save-every", 2, "--out", tmp_path / "out")
    assert done.summary["rows"] and done.printed == "" and not (tmp_path / "out").exists()


def torchrun(processes, *flags):
    args = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    args += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """25 pairs to train on in batches of 8, in micro-batches of 3: 4 pairs to a process, in two
    parts, whose gradients are averaged once. The key biases are left out: softmax does not see
    them, and Adam makes steps of mere rounding.
    """
    pairs = write_pairs(tmp_path / "pairs.jsonl", n=27)
    flags = ["--data", pairs, *SMALL, "--lr", 1e-3, "--micro-batch-size", 3, "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*flags, one)
    assert torchrun(2, *flags, two).count("held_out_margin") == 1, "one process prints"
    for line, other in zip(lines_of(one), lines_of(two), strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-5), line["step"]
    for name, tensor in model.load(one / "policy" / "pytorch_model.bin").items():
        other = model.load(two / "policy" / "pytorch_model.bin")[name]
        if name.endswith("c_attn.bias"):
            tensor, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (tensor, other))
        expect(other, tensor, f"{name} of two processes", 1e-5)


@pytest.mark.slow
def test_more_processes_than_held_out_pairs(tmp_path):
    """Two of three processes have nothing to evaluate, and all have a pair to train on."""
    lines = [f'{{"prompt": "{i}", "chosen": "{"Yes." * i}", "rejected": "No."}}' for i in (1, 2, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    torchrun(3, "--data", tmp_path / "pairs.jsonl", *SMALL, "--out", tmp_path / "out")
    assert summary_of(tmp_path / "out")["rows"]["reference"]["held_out_accuracy"] == 0.5


@pytest.mark.slow
def test_compiled_is_the_same_step(pairs, tmp_path, monkeypatch):
    """--compile through torch's tracing and its derived backward; the generated code itself, which
    takes a minute to make, is what `python -m experiments.bench` compares."""
    compile, calls = torch.nn.Module.compile, []

    def traced(self, **kwargs):
        calls.append(kwargs)
        compile(self, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    flags = ["--data", pairs, *SMALL, "--lr", 1e-3, "--out"]
    plain = run(*flags, tmp_path / "plain").summary["rows"]["policy"]
    compiled = run(*flags, tmp_path / "compiled", "--compile").summary["rows"]["policy"]
    assert calls == [{"dynamic": True}], "compiled once, with --compile only"
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-5)


DEVICES = [("cpu", "bfloat16", 0.03)]
for kind in ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available():
    DEVICES += [(kind, "float32", 2e-3), (kind, "bfloat16", 0.03)]


@pytest.mark.parametrize("device, dtype, near", DEVICES)
def test_every_device_and_precision_begins_alike(device, dtype, near, pairs, tmp_path):
    """One seed, one untrained reference: nearly the numbers of the CPU in float32, not those."""
    flags = ["--data", pairs, *SMALL, "--sft-epochs", 0, "--epochs", 0.5, "--device"]
    run(*flags, "cpu", "--out", tmp_path / "cpu")
    run(*flags, device, "--dtype", dtype, "--out", tmp_path / "other")
    for line, other in zip(lines_of(tmp_path / "cpu")[1:], lines_of(tmp_path / "other")[1:]):
        for key in ("loss", "chosen_logp", "rejected_logp", "grad_norm"):
            assert other[key] == pytest.approx(line[key], rel=near), key
        assert dtype == "float32" or other["chosen_logp"] != line["chosen_logp"]
