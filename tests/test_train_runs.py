"""A run that is stopped and resumed, started in a folder that is taken, shared among processes."""

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch

import data
import train
from model import load
from test_dpo import expect, gpt
from test_logps import ROWS
from test_train import ROOT, SMALL, alike, lines_of, oracle, run, same_weights, settings, spy
from test_train import quick, step, summary_of, write_pairs  # noqa: F401

TOY = "--batch-size 32 --pairs 320 --epochs 2 --sft-epochs 0.016".split()  # 10 and 20 steps
TOY += ["--save-every", 8, "--eval-every", 5]


def stop(patch, where, *flags, kill=False):
    """A run that ends at one call of a function, by Ctrl-C or kill -9; half a file is written."""
    (module, name, call), calls = where, []
    real = getattr(module, name)

    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            if module is torch:
                args[1].write(b"half a file")
                args[1].flush()
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return real(*args)

    with patch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(module, name, counted)
        run(*flags)


def assert_same_run(out, whole):
    """Not a bit differs in weights, metrics and table."""
    for name in ("reference", "policy"):
        assert same_weights(out / name, whole / name), f"{name} is not that of a whole run"
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

POINTS = {  # where a run stops: the function, at which call -> steps that are left
    (train, "update", 4): 30,  # in SFT
    (torch, "save", 1): 30,  # while the reference is written
    (train, "all_logps", 2): 20,
    (train, "update", 10 + 5): 20,  # in DPO, before a checkpoint
    (train, "update", 10 + 9): 12,  # right after one
    (train, "update", 10 + 13): 12,  # some steps after
    (torch, "save", 3): 12,  # while the second one is written
    (torch, "save", 4): 4,  # while the policy is
}


@pytest.mark.parametrize("where", POINTS, ids=lambda where: f"{where[1]} {where[2]}")
def test_a_stopped_run_is_resumed_to_the_same_weights(where, whole, tmp_path, monkeypatch):
    stop(monkeypatch, where, *TOY, "--out", tmp_path)
    assert not (tmp_path / "summary.json").exists()
    if where == (torch, "save", 3):
        assert load(tmp_path / "checkpoint.pt")["step"] == 8, "the first one is still whole"
    updates = spy(monkeypatch, train, "update")
    run("--resume", "--out", tmp_path)
    assert len(updates) == POINTS[where], "what is done is not done again"
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["train, 'update', 4", "train, 'update', 23", "torch, 'save', 3"])
def test_a_killed_run_is_resumed_to_the_same_weights(where, whole, tmp_path):
    flags = [*map(str, TOY), "--out", str(tmp_path)]
    code = "import pytest, torch, train; from test_train_runs import stop\n"
    code += f"stop(pytest.MonkeyPatch(), ({where}), *{flags}, kill=True)"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run("--resume", "--out", tmp_path)
    assert_same_run(tmp_path, whole)


def test_resume_refuses_what_is_not_its_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config, before = json.loads((tmp_path / "config.json").read_text()), files_of(tmp_path)
    with pytest.raises(SystemExit):
        run("--resume", "--lr", 0.5, "--out", tmp_path)
    assert files_of(tmp_path) == before
    for other in ({"model_type": "gpt2"}, config | {"made_by": "somebody"}, config | {"crc": 1}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises((data.InputError, SystemExit), match="2|no run of train.py on these"):
            run("--resume", "--out", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"device": "cuda:9"}))
    run("--resume", "--device", "cpu", "--out", tmp_path)  # another device is no other run
    assert_same_run(tmp_path, whole)


# Folders


def test_a_new_run_leaves_nothing_of_an_old_one_to_be_resumed(whole, tmp_path, monkeypatch):
    """It stops in SFT, in the folder of a finished run. A toy run may also be begun anew."""
    out, flags = tmp_path / "out", [*TOY, "--seed", 1, "--out"]
    run(*flags, tmp_path / "wanted")
    shutil.copytree(whole, out)
    for again in (["--resume", "--out"], flags):
        stop(monkeypatch, (train, "update", 3), *flags, out)
        left = {str(path.relative_to(out)) for path in out.rglob("*.*") if path.suffix != ".bin"}
        assert left == {"config.json", "metrics.jsonl"}
        run(*again, out)
        assert_same_run(out, tmp_path / "wanted")


def test_a_run_on_real_pairs_is_kept(pairs, tmp_path, monkeypatch):
    """It is not overwritten, from its first second on and when it has ended, and not resumed on
    other pairs, held-out ones included."""
    out, flags, text = tmp_path / "out", ["--data", pairs, *SMALL, "--out"], pairs.read_text()
    run(*flags, tmp_path / "whole")
    stop(monkeypatch, (train, "update", 1), *flags, out)
    before = files_of(out)
    for command, where in itertools.product((flags, [*TOY, "--out"]), (out, tmp_path / "whole")):
        with pytest.raises(data.InputError, match="holds a run on pairs: --resume"):
            run(*command, where)
    for other in (*(text.replace(f"Say {i} ", "Tell ") for i in range(15)), f"{text}\n{text}"):
        pairs.write_text(other)
        with pytest.raises(data.InputError, match="on these pairs"):
            run("--resume", "--out", out)
    assert files_of(out) == before
    pairs.write_text(text)
    run("--resume", "--out", out)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("kind", ["toy", "real"])
@pytest.mark.parametrize("what", ["notes.txt", "config.json", "policy/config.json", "is a file"])
def test_files_of_others_stay_as_they_are(what, kind, pairs, tmp_path):
    out = tmp_path / "out"
    (out / what).parent.mkdir(parents=True)
    (out / what).write_text('{"model_type": "gpt2"}')
    before = files_of(tmp_path)
    with pytest.raises((data.InputError, OSError), match="something else|Not a directory"):
        flags = TOY if kind == "toy" else ["--data", pairs, *SMALL]
        run(*flags, "--out", out / what if what == "is a file" else out)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("init", ["", "policy", "policy/../reference"])
def test_a_run_does_not_overwrite_what_it_starts_from(init, whole, tmp_path):
    shutil.copytree(whole / "policy", tmp_path, dirs_exist_ok=True)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = (tmp_path / "policy/config.json").read_text()  # of a model, and of a run
    config = json.loads(config) | json.loads((whole / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = files_of(tmp_path)
    with pytest.raises(data.InputError, match="holds --init"):
        run(*TOY, "--init", tmp_path / init, "--out", tmp_path)
    assert files_of(tmp_path) == before


# The command line


@pytest.mark.filterwarnings("ignore")
def test_the_script_says_it_in_one_line(pairs, tmp_path, monkeypatch, capsys):
    """Exit status 2, or 130 after Ctrl-C. A letter that a terminal cannot show loses nothing."""
    monkeypatch.setattr(warnings, "formatwarning", None)

    def ctrl_c(*_):
        raise KeyboardInterrupt

    def script(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    for flags, code, says in (
        (["--data", tmp_path / "missing.jsonl"], 2, "train.py: .*missing.jsonl.*\n"),
        (["--loss", "nonsense"], 2, "train.py: --loss nonsense: not dpo, .*\n"),
        (["--data", pairs], 130, "\ninterrupted: .* --resume continues\n"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as raised:
            patch.setattr(data, "split", ctrl_c)
            script(*flags)
        assert raised.value.code == code and re.fullmatch(says, capsys.readouterr().err)
    pairs.write_text(pairs.read_text().replace("Say", "Caf\\u00e9"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    script("--data", pairs, *SMALL, "--out", tmp_path / "out")
    assert b"\nCaf? " in sys.stdout.buffer.getvalue() and (tmp_path / "out/policy").exists()
    assert warnings.formatwarning("text", UserWarning, "file", 1) == "warning: text\n"
    for i, stdout in enumerate((io.StringIO(), None)):  # as in Jupyter, and closed as by >&-
        monkeypatch.setattr(sys, "stdout", stdout)
        script("--data", pairs, *SMALL, "--out", tmp_path / f"{i}")
        assert (tmp_path / f"{i}/policy").exists() and (i or "after DPO" in stdout.getvalue())


def test_a_clock_may_stand_still(pairs, tmp_path, monkeypatch):
    """Some tick every 16 ms: no time may seem to have passed between two steps."""
    monkeypatch.setattr(train.time, "perf_counter", lambda: 1.0)
    assert run("--data", pairs, *SMALL, "--out", tmp_path / "out")[0]["seconds"] == 0


def test_no_compiler_is_one_line(pairs, tmp_path, monkeypatch):
    """Before anything is written."""

    def compile(model, **_):
        model.forward = lambda *_: 1 / 0

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    for flags in (TOY, ["--data", pairs, *SMALL]):
        with pytest.raises(OSError, match="--compile: division by zero"):
            run(*flags, "--compile", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_terminal_gets_one_changing_line(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        train.progress("first", False)
        train.progress("second", True)
    assert capsys.readouterr().out == "\r\033[Kfirst\r\033[Ksecond\nsecond\n"


# Processes


def test_rank_and_world_size_count_as_torchrun_sets_them(monkeypatch):
    both = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    empty, left = {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "1", "WORLD_SIZE": "2"}
    for env in (both, {"RANK": "1"}, {"WORLD_SIZE": "2"}, empty, left):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", env)
            module = runpy.run_path(str(ROOT / "train.py"))
        assert (module["RANK"], module["PROCESSES"]) == ((1, 2) if env == both else (0, 1))


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_processes_share_the_pass_of_the_reference(processes, monkeypatch):
    """Each fills in its own pairs; the sum is the whole. Of nine processes some have no pair."""
    monkeypatch.setattr(train, "PROCESSES", processes)
    monkeypatch.setattr(train.distributed, "all_reduce", lambda tensor: reduced.append(tensor))
    model, args, parts, reduced = gpt(0).float(), settings("--micro-batch-size", 2), [], []
    for rank in range(processes):
        monkeypatch.setattr(train, "RANK", rank)
        parts.append(train.all_logps(model, ROWS, args))
    parts, once = torch.stack(parts), processes * (processes > 1)
    expect(parts.sum(0), oracle(model, ROWS), "log-probs of all processes", 1e-5)
    assert ((parts != 0).sum(0) == 1).all() and not parts.requires_grad and len(reduced) == once


def test_every_collective_is_on_the_models_device(monkeypatch):
    """An NCCL group cannot reduce a CPU tensor. The model is on "meta", which holds no numbers."""
    devices, model = [], gpt(0).float().to("meta")
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train.distributed, "all_reduce", lambda x: devices.append(x.device.type))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    losses, logps, norm = step(model, train.all_logps(model, ROWS, settings()))
    with pytest.raises((RuntimeError, NotImplementedError)):  # its values cannot be looked at
        train.means({"loss": losses, "logp": logps[0]} | {"grad_norm": norm})
    assert devices == ["meta", "meta"]


def test_only_the_first_process_writes_and_prints(pairs, tmp_path, monkeypatch):
    """The second of two, whose group and gradients are those of a single one."""
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "PROCESSES", 2)
    for name in ("init_process_group", "destroy_process_group", "all_reduce"):
        monkeypatch.setattr(train.distributed, name, lambda *_: None)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module: module)
    summary, printed, _ = run("--data", pairs, *SMALL, "--save-every", 2, "--out", tmp_path / "out")
    assert summary["rows"] and printed == "" and not (tmp_path / "out").exists()


def torchrun(processes, *flags):
    args = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    args += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """25 pairs in batches of 8: four to a process, in micro-batches of 3 and 1, whose gradients are
    averaged once. The key biases are left out: softmax does not see them, and Adam makes steps of
    mere rounding.
    """
    flags = ["--data", write_pairs(tmp_path / "pairs.jsonl", n=25), *SMALL, "--lr", 1e-3]
    flags += ["--micro-batch-size", 3, "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*flags, one)
    assert torchrun(2, *flags, two).count("held_out_margin") == 1, "one process prints"
    for line, other in zip(lines_of(one), lines_of(two), strict=True):
        alike(line, other, rel=1e-4, abs=1e-5)
    weights = [load(out / "policy" / "pytorch_model.bin") for out in (one, two)]
    for name, tensor in weights[0].items():
        other = weights[1][name]
        if name.endswith("c_attn.bias"):
            tensor, other = (torch.cat(x.chunk(3)[::2]) for x in (tensor, other))
        expect(other, tensor, f"{name} of two processes", 1e-5)


@pytest.mark.slow
def test_more_processes_than_held_out_pairs(tmp_path):
    """Two of three processes have nothing to evaluate and, of two pairs, one nothing to score."""
    lines = [f'{{"prompt": "{i}", "chosen": "{"Yes." * i}", "rejected": "No."}}' for i in (1, 2, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    torchrun(3, "--data", tmp_path / "pairs.jsonl", *SMALL, "--out", tmp_path / "out")
    assert summary_of(tmp_path / "out")["rows"]["reference"]["held_out_accuracy"] == 0.5


@pytest.mark.slow
def test_compiled_is_the_same_step(pairs, tmp_path, monkeypatch):
    """--compile through torch's tracing and its derived backward; the generated code itself, which
    takes a minute to make, is what `python -m experiments.bench` compares."""
    compile, used = torch.nn.Module.compile, []

    def traced(model, **kwargs):
        used.append(kwargs)
        compile(model, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    flags = ["--data", pairs, *SMALL, "--lr", 1e-3, "--out"]
    plain, *_ = run(*flags, tmp_path / "plain")
    compiled, *_ = run(*flags, tmp_path / "compiled", "--compile")
    assert used == [{"dynamic": True}], "compiled once, with --compile only"
    assert compiled["rows"]["policy"] == pytest.approx(plain["rows"]["policy"], rel=1e-4, abs=1e-5)
