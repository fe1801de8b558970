"""A run that is stopped and resumed, and the folders that it may write to."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
from model import load
from tests.helpers import (
    files_of,
    json_of,
    run,
    same_weights,
    stop_before_rename,
    stop_before_step,
    stop_in_save,
    write_pairs,
)

ROOT = Path(train.__file__).parent
# 27 pairs or so in batches of 8: 4 steps of SFT and 7 of DPO, with checkpoints at 3 and 6
SMALL = "--n-layer 1 --n-embd 8 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()
SMALL += ["--lr", 0.1, "--evaluations", 3, "--save-every", 3]
# 10 steps of SFT and 20 of DPO, with checkpoints at 8 and 16
TOY = "--batch-size 32 --pairs 320 --epochs 2 --sft-epochs 0.016 --save-every 8".split()
TOY += ["--evaluations", 2]


def assert_same_run(out, whole):
    """Not a bit differs in weights, metrics and table."""
    for name in ("reference", "policy"):
        assert same_weights(out / name, whole / name), f"{name} is not that of a whole run"
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json_of(out / "summary.json")["rows"] == json_of(whole / "summary.json")["rows"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of 30 pairs that nothing is to be warned of."""
    path = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()[:30]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """A run on pairs that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert len(run("--data", pairs, *SMALL, "--out", out).rates) == 4 + 7
    return out


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "out"
    assert len(run(*TOY, "--out", out).rates) == 10 + 20
    return out


# Resume


POINTS = [  # how and where a run stops, and the steps that are then left
    (stop_before_step, 3, 11),  # in SFT
    (stop_in_save, 1, 11),  # while the reference is written
    (stop_before_rename, "reference/config.json", 11),
    (stop_before_step, 4 + 1, 7),  # the reference is there, no step of DPO is
    (stop_before_step, 4 + 3, 7),  # before the first checkpoint
    (stop_in_save, 2, 7),  # while it is written
    (stop_before_rename, "checkpoint.pt", 7),
    (stop_before_step, 4 + 4, 4),  # right after it
    (stop_before_step, 4 + 6, 4),  # some steps after
    (stop_in_save, 3, 4),  # while the second one is written
    (stop_before_step, 4 + 7, 1),
    (stop_in_save, 4, 1),  # while the policy is written
    (stop_before_rename, "policy/config.json", 1),
    (stop_before_rename, "summary.json", 1),
]


@pytest.mark.parametrize("stop, where, left", POINTS)
def test_a_stopped_run_is_resumed_to_the_same_weights(stop, where, left, whole, pairs, tmp_path):
    """With its own settings, and nothing that is done is done again."""
    out = tmp_path / "out"
    stop(where, "--data", pairs, *SMALL, "--out", out)
    assert not (out / "summary.json").exists()
    if left == 4:
        assert load(out / "checkpoint.pt")["step"] == 3, "the first checkpoint is whole"
    resumed = run("--resume", "--out", out)
    assert len(resumed.rates) == left
    assert ("beginning a new run" in resumed.printed) == (left == 11)
    assert resumed.warned == []
    assert_same_run(out, whole)


@pytest.mark.parametrize("where, left", [(10 + 1, 20), (10 + 13, 12)])
def test_so_is_a_toy_run(where, left, whole_toy, tmp_path):
    """Its pairs are drawn again, from the reference: the half-trained policy would draw others."""
    stop_before_step(where, *TOY, "--out", tmp_path)
    assert len(run("--resume", "--out", tmp_path).rates) == left
    assert_same_run(tmp_path, whole_toy)


def test_a_run_is_stopped_twice(whole, pairs, tmp_path):
    stop_before_step(4 + 5, "--data", pairs, *SMALL, "--out", tmp_path)
    stop_before_step(4, "--resume", "--out", tmp_path)  # after the checkpoint at 6
    assert load(tmp_path / "checkpoint.pt")["step"] == 6
    assert len(run("--resume", "--out", tmp_path).rates) == 1
    assert_same_run(tmp_path, whole)


def test_a_finished_run_is_resumed_without_a_step(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    checkpoint = load(out / "checkpoint.pt")
    run("--resume", "--save-every", 1, "--out", out)
    assert load(out / "checkpoint.pt")["step"] == checkpoint["step"] + 1
    assert run("--resume", "--out", out).rates == []
    assert_same_run(out, whole)


LONG = "--batch-size 32 --pairs 6400 --epochs 2 --sft-epochs 0.1 --save-every 30".split()
LONG += ["--evaluations", "20"]  # 63 steps of SFT, and 400 of DPO


@pytest.fixture(scope="module")
def whole_long(tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "out"
    run(*LONG, "--out", out)
    return out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no kill -9")
@pytest.mark.parametrize("phase, number", [("SFT", 5), ("DPO", 4), ("DPO", 13)])
def test_a_killed_run_is_resumed_to_the_same_weights(phase, number, whole_long, tmp_path):
    """kill -9, as soon as so many lines of this phase are printed."""
    command = [sys.executable, ROOT / "train.py", *LONG, "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    lines = 0
    while lines < number:
        lines += process.stdout.readline().startswith(phase)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not (tmp_path / "out/summary.json").exists()
    run("--resume", "--out", tmp_path / "out")
    assert_same_run(tmp_path / "out", whole_long)


# What --resume takes, warns of, and refuses


@pytest.fixture
def stopped(pairs, tmp_path):
    """A run that has stopped in DPO, after the checkpoint at 3."""
    out = tmp_path / "stopped"
    stop_before_step(4 + 5, "--data", pairs, *SMALL, "--out", out)
    return out


def test_with_nothing_to_resume_a_new_run_begins(whole, pairs, tmp_path):
    """So that a job that is queued again needs one command."""
    command = ["--resume", "--data", pairs, *SMALL, "--out", tmp_path / "out"]
    begun = run(*command)
    assert f"beginning a new run in {tmp_path / 'out'}" in begun.printed
    assert begun.warned == []
    assert_same_run(tmp_path / "out", whole)
    again = run(*command)
    assert len(again.rates) == 1
    assert "beginning" not in again.printed
    assert again.warned == []


def test_some_flags_may_change_without_a_word(stopped, pairs, tmp_path):
    """How it is computed and watched, and where the pairs lie."""
    moved = shutil.copy(pairs, tmp_path / "moved.jsonl")
    flags = "--micro-batch-size 3 --device cpu --dtype bfloat16 --evaluations 1 --save-every 1"
    resumed = run("--resume", "--data", moved, *flags.split(), "--out", stopped)
    assert resumed.warned == []
    assert len(resumed.rates) == 4
    assert load(stopped / "checkpoint.pt")["step"] == 7
    config = json_of(stopped / "config.json")
    assert config["micro_batch_size"] == 3, "config.json holds what is in force"
    assert config["data"] == str(moved)
    assert config["lr"] == 0.1


def test_other_flags_are_named_in_one_warning(stopped):
    """With the settings as they were. What is given again as it was is no change."""
    resumed = run("--resume", "--lr", 0.02, "--beta", 0.3, "--seed", 0, "--out", stopped)
    [warning] = resumed.warned
    assert "\n" not in warning
    for part in ("lr", "(was 0.1)", "beta", "(was None)"):
        assert part in warning
    assert "seed" not in warning
    assert resumed.rates[0] == pytest.approx(0.02 * 4 / 6), "the new rate, in step 4 of 7"
    assert json_of(stopped / "config.json")["lr"] == 0.02
    assert run("--resume", "--lr", 0.02, "--out", stopped).warned == [], "that is now its own"


@pytest.mark.parametrize(
    "flags, own",
    [
        ("--n-embd 16", 8),
        ("--n-layer 2", 1),
        ("--n-head 2", 4),
        ("--block-size 32", 64),
        ("--optimizer rmsprop", "adamw"),
    ],
)
def test_what_does_not_fit_is_refused(flags, own, stopped, capsys):
    """In one line, with exit status 2, before anything is written."""
    before = files_of(stopped)
    with pytest.raises(SystemExit) as raised:
        run("--resume", *flags.split(), "--out", stopped)
    assert raised.value.code == 2
    error = capsys.readouterr().err.strip()
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    last = error.splitlines()[-1]
    assert name in last.replace("-", "_")
    assert f" {own}, which cannot change" in last, "it names the value of the run"
    assert files_of(stopped) == before


def test_a_toy_run_is_not_resumed_on_pairs(whole_toy, pairs, tmp_path):
    """Its model knows other tokens."""
    out = shutil.copytree(whole_toy, tmp_path / "out")
    before = files_of(out)
    with pytest.raises((SystemExit, data.InputError)):
        run("--resume", "--data", pairs, "--out", out)
    assert files_of(out) == before


def test_other_pairs_are_warned_of(stopped, pairs, tmp_path):
    """If one of them differs, in one letter. That may be what the user wants.

    Of the 16 prompts two are held out, with at most two of the first ten lines each. Those lines do
    not matter, the others do.
    """
    warned = 0
    for changed in range(10):
        lines = pairs.read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[changed])
        record["chosen"] += "!"
        lines[changed] = json.dumps(record)
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join(lines), encoding="utf-8")
        out = shutil.copytree(stopped, tmp_path / f"{changed}")
        for warning in run("--resume", "--data", other, "--out", out).warned:
            assert "not the pairs" in warning
            warned += 1
    assert 6 <= warned <= 10


@pytest.mark.parametrize("change", ["another order", "a pair twice"])
def test_other_pairs_are_warned_of_though_each_was_there(change, pairs, tmp_path):
    """The order of the batches follows from the file, so the steps that are skipped were others."""
    out = tmp_path / "out"
    run("--data", pairs, *SMALL, "--held-out", 0, "--out", out)
    lines = pairs.read_text(encoding="utf-8").splitlines()
    lines = {"another order": lines[::-1], "a pair twice": [*lines, lines[0], lines[0]]}[change]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines), encoding="utf-8")
    warned = run("--resume", "--data", other, "--out", out).warned
    assert any("not the pairs" in warning for warning in warned)


def test_what_init_names_is_not_read_again(whole, pairs, tmp_path):
    init = shutil.copytree(whole / "policy", tmp_path / "init")
    flags = ["--data", pairs, *SMALL, "--tokenizer", "bytes", "--init", init, "--out"]
    run(*flags, tmp_path / "whole")
    stop_before_step(4 + 5, *flags, tmp_path / "out")
    shutil.rmtree(init)
    run("--resume", "--out", tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_folder_that_has_moved_is_resumed(stopped, whole, tmp_path):
    moved = stopped.rename(tmp_path / "moved")
    run("--resume", "--out", moved)
    assert_same_run(moved, whole)
    assert not stopped.exists()


def test_a_damaged_checkpoint_is_named(stopped):
    (stopped / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(OSError, match="checkpoint.pt"):
        run("--resume", "--out", stopped)


# Folders


def assert_refused(says, *flags):
    """In one line, before anything is written: no file in the folder of --out changes."""
    folder = Path(flags[-1]).parent
    before = files_of(folder)
    with pytest.raises((data.InputError, OSError), match=says) as raised:
        run(*flags)
    assert "\n" not in str(raised.value)
    assert files_of(folder) == before


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_run_on_pairs_is_never_overwritten(state, whole, stopped, pairs):
    out = {"finished": whole, "stopped": stopped}[state]
    for command in (["--data", pairs, *SMALL], TOY, []):
        assert_refused("--resume", *command, "--out", out)


def test_before_its_reference_is_complete_it_is_no_run(whole, pairs, tmp_path):
    """Nothing is lost. config.json alone is no run."""
    flags = ["--data", pairs, *SMALL, "--out", tmp_path]
    stop_before_step(3, *flags)
    assert (tmp_path / "config.json").exists()
    run(*flags)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("kind", ["toy", "pairs"])
def test_a_toy_run_may_be_overwritten(kind, whole, whole_toy, pairs, tmp_path):
    out = shutil.copytree(whole_toy, tmp_path / "out")
    if kind == "toy":
        run(*TOY, "--seed", 1, "--out", out)
        assert not same_weights(out / "policy", whole_toy / "policy")
    else:
        run("--data", pairs, *SMALL, "--out", out)
        assert_same_run(out, whole)


def test_a_new_run_leaves_nothing_of_an_old_one_to_be_resumed(whole, whole_toy, pairs, tmp_path):
    """It stops in SFT, in the folder of a finished run."""
    out = shutil.copytree(whole_toy, tmp_path / "out")
    stop_before_step(3, "--data", pairs, *SMALL, "--out", out)
    for stale in ("summary.json", "checkpoint.pt", "policy/config.json"):
        assert not (out / stale).exists(), "nobody shall take it for the new run's"
    resumed = run("--resume", "--out", out)
    assert len(resumed.rates) == 4 + 7
    assert_same_run(out, whole)


@pytest.mark.parametrize("kind", ["toy", "pairs"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "policy/config.json",
        "reference/pytorch_model.bin",
        "metrics.jsonl",
        "checkpoint.pt",
        "curves.png",
        "summary.json",
    ],
)
def test_files_of_others_stay_as_they_are(name, kind, pairs, tmp_path):
    """Of every name that a run writes, in a folder that train.py has not made."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"model_type": "gpt2"}', encoding="utf-8")
    flags = TOY if kind == "toy" else ["--data", pairs, *SMALL]
    assert_refused(name.split("/")[0], *flags, "--out", tmp_path / "out")
    assert_refused(name.split("/")[0], "--resume", *flags, "--out", tmp_path / "out")


def test_the_config_of_another_program_is_not_ours(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    config = json_of(out / "config.json")
    (out / "config.json").write_text(json.dumps(config | {"made_by": "somebody"}), encoding="utf-8")
    assert_refused("config.json", "--out", out)


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert_refused("file", *TOY, "--out", tmp_path / "file")
    assert_refused("file", *TOY, "--out", tmp_path / "file/out")


def test_a_log_is_no_reason(whole, pairs, tmp_path):
    """`python train.py | tee out/log` makes the folder before the run does."""
    (tmp_path / "log").write_text("a line\n", encoding="utf-8")
    (tmp_path / ".gitkeep").touch()
    run("--data", pairs, *SMALL, "--out", tmp_path)
    assert_same_run(tmp_path, whole)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a line\n"


@pytest.mark.parametrize("named", ["in full", "from here", "by a link"])
@pytest.mark.parametrize("init", ["", "policy", "policy/../reference"])
def test_a_run_does_not_overwrite_what_it_starts_from(
    init, named, whole_toy, tmp_path, monkeypatch
):
    """Though it would be a toy run, which may be overwritten. However the folder is named."""
    out = shutil.copytree(whole_toy, tmp_path / "out")
    config = json_of(out / "policy/config.json")  # of a model, and of a run
    config |= json_of(out / "config.json")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(out / "policy/pytorch_model.bin", out)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(out)
    folder = {"in full": out, "from here": Path("out"), "by a link": tmp_path / "link"}[named]
    assert_refused("holds --init", *TOY, "--init", folder / init, "--out", out)


def test_init_may_lie_beside_out_or_above_it(whole, pairs, tmp_path):
    """And a name that only begins alike is another folder."""
    init = shutil.copytree(whole / "policy", tmp_path / "out-init")
    flags = ["--data", pairs, *SMALL, "--tokenizer", "bytes", "--sft-epochs", 0, "--init", init]
    run(*flags, "--out", tmp_path / "out")
    run(*flags, "--out", init / "out")
    assert same_weights(tmp_path / "out/reference", init)
