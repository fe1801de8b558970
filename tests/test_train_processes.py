"""train.py under torchrun. A step of several processes is checked in test_train_step.py, too."""

import contextlib
import io
import os
import runpy
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import train
from tests.helpers import expect, json_of, lines_of, run, weights_of, write_lines, write_pairs

ROOT = Path(train.__file__).parent
SMALL = "--n-layer 1 --n-embd 8 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()
SMALL += ["--lr", "0.001", "--evaluations", "3"]


def torchrun(processes, *flags):
    """What it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py"]
    command += [str(flag) for flag in flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_alike(line, other):
    """Metrics but for the accuracy, which rounding decides where margins are 0."""
    assert line.keys() == other.keys()
    for name in line.keys() - {"accuracy", "held_out_accuracy"}:
        assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5), name


def assert_same_weights(one, two):
    """The biases of the keys are left out: softmax does not see them, so that their gradient is
    mere rounding, of which Adam makes whole steps."""
    others = weights_of(two)
    for name, wanted in weights_of(one).items():
        got = others[name]
        if name.endswith("c_attn.bias"):
            query, _, value = wanted.chunk(3)
            wanted = torch.cat([query, value])
            query, _, value = got.chunk(3)
            got = torch.cat([query, value])
        expect(got, wanted, f"{name} of several processes", 1e-5)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """25 pairs in batches of 8: four to a process, in micro-batches of 3 and 1. SFT, reference,
    held-out pairs, DPO, and its order."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", n=25)
    flags = ["--data", pairs, *SMALL, "--micro-batch-size", 3, "--out"]
    one = tmp_path / "one"
    two = tmp_path / "two"
    run(*flags, one)
    printed = torchrun(2, *flags, two)
    assert printed.count("held_out_margin") == 1, "one process prints"
    for line, other in zip(lines_of(one), lines_of(two), strict=True):
        assert_alike(line, other)
    rows = json_of(one / "summary.json")["rows"]
    for name, row in json_of(two / "summary.json")["rows"].items():
        assert_alike(rows[name], row)
    for name in ("reference", "policy"):
        assert_same_weights(one / name, two / name)


@pytest.mark.slow
def test_more_processes_than_held_out_pairs(tmp_path):
    """Two of three processes have nothing to evaluate and, of two pairs, one nothing to score."""
    pairs = []
    for i in (1, 2, 3):
        pairs.append({"prompt": f"{i}", "chosen": "Yes." * i, "rejected": "No."})
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    torchrun(3, "--data", path, *SMALL, "--out", tmp_path / "out")
    rows = json_of(tmp_path / "out/summary.json")["rows"]
    assert rows["reference"]["held_out_accuracy"] == 0.5, "each margin is 0"


@pytest.mark.slow
def test_the_toy_world_and_a_resume(tmp_path):
    """Both processes draw the same pairs. Three are no part of a batch of 32, but of one of 30."""
    flags = "--batch-size 32 --pairs 300 --epochs 2 --sft-epochs 0.01 --save-every 8".split()
    flags += ["--evaluations", "2", "--out"]
    run(*flags, tmp_path / "one", "--batch-size", 30)
    torchrun(3, *flags, tmp_path / "three")
    wanted = lines_of(tmp_path / "one")
    for line, other in zip(wanted, lines_of(tmp_path / "three"), strict=True):
        assert_alike(line, other)
    (tmp_path / "three/metrics.jsonl").unlink()
    torchrun(3, "--resume", "--out", tmp_path / "three")  # from the checkpoint at 16 of 20
    for line, other in zip(wanted, lines_of(tmp_path / "three"), strict=True):
        assert_alike(line, other)


@pytest.mark.slow
def test_only_the_first_process_writes_and_prints(tmp_path):
    """Both are started by hand, each in a folder of its own."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        env = os.environ | {name: str(value) for name, value in env.items()}
        command = [sys.executable, ROOT / "train.py", "--data", pairs, *SMALL, "--save-every", "2"]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
    printed = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "held_out_margin" in printed[0][0]
    assert "dropped" in printed[0][1], "its warnings"
    assert printed[1][0] == ""
    assert "dropped" not in printed[1][1]
    assert (tmp_path / "0/out/policy").exists()
    assert list((tmp_path / "1").iterdir()) == []


@pytest.fixture
def second_of_two(monkeypatch):
    """train.main of the second of two processes, whose group consists of itself, and a list that
    gets the device of every tensor that is reduced."""
    settings = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    devices = []
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "init_process_group", lambda *args: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda *args: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda x: devices.append(x.device.type))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module: module)
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield runpy.run_path(str(ROOT / "train.py"))["main"], devices
    assert printed.getvalue() == "", "only the first process prints"


def test_the_second_process_writes_nothing(second_of_two, tmp_path):
    main, devices = second_of_two
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    flags = ["--data", str(pairs), *SMALL, "--save-every", "2"]
    assert main([*flags, "--out", str(tmp_path / "out")])["rows"]
    assert not (tmp_path / "out").exists()
    assert len(devices) > 7, "a step's metrics are means over all processes"


def test_every_collective_is_on_the_models_device(second_of_two, tmp_path, monkeypatch):
    """An NCCL group cannot reduce a tensor of the CPU. The model is on "meta", a device that holds
    no numbers: the run ends where a number is looked at, after the first step's backward pass."""
    main, devices = second_of_two
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    flags = ["--data", str(pairs), *SMALL, "--device", "meta", "--optimizer", "rmsprop"]
    flags += ["--sft-epochs", "0", "--held-out", "0", "--out", str(tmp_path / "out")]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        main(flags)
    assert set(devices) == {"meta"}
    assert len(devices) >= 2, "the reference's log-probs, and the metrics of a step"
