"""The command line: what is refused, the exit status, what a terminal, a pipe or Jupyter gets."""

import io
import json
import os
import re
import runpy
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import data
import train
from tests.helpers import before_each_step, json_of, run, stop_before_step, write_pairs

ROOT = Path(train.__file__).parent
SMALL = "--n-layer 1 --n-embd 8 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()
TOY = "--pairs 64 --batch-size 32 --epochs 2 --sft-epochs 0.005".split()  # 4 and 4 steps


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


# What is refused


BAD_FLAGS = """--beta 0; --beta -1; --beta nan; --beta much; --lr inf; --sft-lr -1; --epochs 0;
    --sft-epochs -1; --batch-size 0; --batch-size 1.5; --micro-batch-size -1; --max-grad-norm 0;
    --seed -1; --save-every 0; --evaluations 0; --n-layer 0; --held-out -0.1; --held-out 1.1;
    --warmup-steps -1; --pairs 0; --data=; --init=; --out=; --optimizer sgd; --dtype float16;
    --n-head 3; --n-embd 33;
    --bet 1; --nonsense; surplus; --labels soft; --eval-every 5"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in BAD_FLAGS.split(";")])
def test_bad_flags_have_exit_status_2(flags, tmp_path, monkeypatch, capsys):
    """And argparse's own message, which names the flag."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        train.main(flags.split())
    assert raised.value.code == 2
    assert flags.split()[0].rstrip("=") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
BAD_INPUT = {
    "--data missing.jsonl": "missing.jsonl",
    "--data .": "Is a directory",
    "--data torn.jsonl": "torn.jsonl:2: not a line of JSON",
    "--data empty.jsonl": "empty.jsonl: no line has two different responses to one prompt",
    "--data good.jsonl --tokenizer klingon": "tokenizer klingon: not one of bytes",
    "--data good.jsonl --init gpt3": "gpt3 is neither a folder nor one of distilgpt2, gpt2, ",
    "--data good.jsonl --block-size 1": "--block-size",
    "--init saved": "vocabulary",  # a model of bytes in the toy world
    "--loss nonsense": "dpo, cdpo, robust, ipo, hinge",
    "--loss nowhere.py:f": "nowhere.py",
    "--device nonsense": "--device nonsense cannot be used here: Expected one of cpu",
    "--data good.jsonl --tokenizer bytes --init theirs": "was trained with another tokenizer than",
    "--data good.jsonl --init ended --tokenizer bytes": "its end token is 0, not 256",
}
if not torch.cuda.is_available():
    BAD_INPUT["--device cuda"] = "--device cuda cannot be used here"


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(GOOD, encoding="utf-8")
    Path("torn.jsonl").write_text(GOOD + "{", encoding="utf-8")
    Path("empty.jsonl").write_text("", encoding="utf-8")
    args = train.parse_args([*SMALL, "--seed", "0"])
    model = train.build_model(args, data.get_tokenizer("bytes"))
    for folder in ["saved", "theirs", "ended"]:
        model.save_pretrained(folder)
    Path("theirs/vocab.json").write_text('{"a": 98, "b": 97}', encoding="utf-8")
    config = json_of(Path("ended/config.json")) | {"eos_token_id": 0}
    Path("ended/config.json").write_text(json.dumps(config), encoding="utf-8")
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises((data.InputError, OSError)) as raised:
        run(*flags.split())
    assert BAD_INPUT[flags] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == there


def test_defaults_are_those_of_the_toy_world_or_of_real_pairs():
    """What --help says, and README. --init chooses the tokenizer."""
    toy = train.parse_args([])
    real = train.parse_args(["--data", "x"])
    assert (toy.beta, toy.batch_size, toy.epochs) == (1.0, 512, 6.0)
    assert (real.beta, real.batch_size, real.epochs) == (None, 32, 4.0)
    assert real.tokenizer == "bytes"
    assert train.parse_args(["--data", "x", "--init", "gpt2"]).tokenizer == "gpt2"
    assert train.parse_args(["--init", "x", "--tokenizer", "bytes"]).tokenizer == "bytes"


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit) as raised:
        train.parse_args(["--help"])
    assert raised.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "(default: 512; 32 with --data)" in text
    assert "(default: 0.01; 0.0005 with --data)" in text


def test_the_settings_are_written_and_hold_for_the_run(pairs, tmp_path):
    flags = "--beta 0.7 --seed 3 --warmup-steps 2 --no-decay --max-grad-norm 5".split()
    result = run("--data", pairs, *SMALL, *flags, "--out", tmp_path)
    for config in (json_of(tmp_path / "config.json"), result.summary["config"]):
        assert config["beta"] == 0.7
        assert config["seed"] == 3
        assert config["decay"] is False
        assert config["max_grad_norm"] == 5
        assert config["data"] == str(pairs)
    assert json_of(tmp_path / "config.json")["made_by"] == "train.py"
    for shown in ("beta=0.7", "seed=3", "decay=False"):
        assert shown in result.printed.splitlines()[0]


# Several processes need torchrun


def test_world_size_without_torchrun_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(data.InputError) as raised:
        run(*TOY, "--out", tmp_path / "out")
    assert "torchrun --nproc_per_node" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


LEFT = [{"RANK": "1"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "", "RANK": ""}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("left", LEFT)
def test_variables_that_others_have_left_do_no_harm(left, pairs, tmp_path, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: None)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    main(["--data", str(pairs), *SMALL, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/policy").exists()


# The script


def script(monkeypatch, *flags):
    """`python train.py ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *[str(flag) for flag in flags]])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: None)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch):
    """The script changes how warnings look."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "flags, says", [("--data missing.jsonl", "missing.jsonl"), ("--loss nonsense", "dpo, cdpo")]
)
def test_the_script_says_what_is_wrong_in_one_line(flags, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as raised:
        script(monkeypatch, *flags.split())
    assert raised.value.code == 2
    assert re.fullmatch(f"train.py: .*{says}.*\n", capsys.readouterr().err)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step, resumable", [(2, False), (6, True)])
def test_ctrl_c_promises_to_resume_only_if_there_is_something(
    step, resumable, pairs, tmp_path, monkeypatch, capsys
):
    """In SFT there is nothing yet. After it there is the reference."""
    steps = []

    def look(optimizer):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt

    with before_each_step(look), pytest.raises(SystemExit) as raised:
        script(monkeypatch, "--data", pairs, *SMALL, "--out", tmp_path / "out")
    assert raised.value.code == 130
    error = capsys.readouterr().err
    assert re.fullmatch("\ninterrupted.*\n", error)
    assert ("--resume continues" in error) == resumable


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.getfilesystemencoding() == "ascii", reason="no folder has such a name here")
def test_a_letter_that_the_terminal_cannot_show_loses_nothing(pairs, tmp_path, monkeypatch):
    """The name of the folder is printed, with ? in place of the letter."""
    out = tmp_path / "Café"
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    script(monkeypatch, "--data", pairs, *SMALL, "--out", out)
    assert b"Caf?/" in stdout.buffer.getvalue()
    assert (out / "policy").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stdout", [io.StringIO(), None], ids=["Jupyter", "closed"])
def test_other_kinds_of_stdout(stdout, pairs, tmp_path, monkeypatch):
    """Jupyter's cannot be reconfigured. After `>&-` there is none."""
    monkeypatch.setattr(sys, "stdout", stdout)
    script(monkeypatch, "--data", pairs, *SMALL, "--out", tmp_path / "out")
    assert (tmp_path / "out/policy").exists()
    if stdout is not None:
        assert "held_out_loss" in stdout.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_warnings_of_the_script_are_one_line(monkeypatch):
    """Without the line of code that Python adds."""
    with pytest.raises(SystemExit):
        script(monkeypatch, "--data", "missing.jsonl")
    assert warnings.formatwarning("text", UserWarning, "file", 1) == "warning: text\n"


# What is shown on the way


def visible(text):
    """What stays on a terminal: of each line what follows the last return to its beginning."""
    lines = [line.rpartition("\r")[2].removeprefix("\033[K") for line in text.split("\n")]
    return [re.sub(r"\d+ s\b", "", line) for line in lines]


def test_a_terminal_gets_one_line_that_changes_in_place(pairs, tmp_path):
    """What stays of it is what a pipe gets, a line now and then."""
    flags = ["--data", pairs, *SMALL, "--out", tmp_path / "out", "--evaluations", 2]
    piped = run(*flags).printed
    again = ["--resume", *flags]
    (tmp_path / "out/reference/config.json").unlink()  # so that it begins anew
    shown = run(*again, terminal=True).printed
    steps = re.findall(r"\r\033\[K(SFT|DPO) (\d+)/", shown)
    sft = [int(step) for phase, step in steps if phase == "SFT"]
    dpo = [int(step) for phase, step in steps if phase == "DPO"]
    assert sft == list(range(1, max(sft) + 1)), "every step is shown"
    assert dpo == list(range(1, max(dpo) + 1))
    kept = [line for line in visible(shown) if line.startswith(("SFT", "DPO"))]
    assert kept == [line for line in visible(piped) if line.startswith(("SFT", "DPO"))]
    assert "\r" not in piped
    assert len(kept) < len(steps)


def test_a_line_of_dpo_shows_loss_margin_weight_and_the_time_left(pairs, tmp_path):
    printed = run("--data", pairs, *SMALL, "--out", tmp_path).printed
    for line in re.findall("^DPO.*", printed, re.MULTILINE):
        assert re.search(r"loss -?\d.*margin -?\d.*weight \d.*\d s left", line)


def set_clock(monkeypatch, seconds):
    """seconds() is what every clock shows."""
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, seconds)


def test_the_time_left_is_that_of_the_steps_to_come(pairs, tmp_path, monkeypatch):
    """By a clock that shows how many steps were made: a step takes a second."""
    steps = []
    set_clock(monkeypatch, lambda: float(len(steps)))
    with before_each_step(steps.append):
        printed = run("--data", pairs, *SMALL, "--out", tmp_path / "out").printed
    shown = re.findall(r"^DPO (\d)/(\d) .* (\d+) s left", printed, re.MULTILINE)
    assert len(shown) > 2
    for step, total, left in shown:
        assert int(left) == int(total) - int(step)


def test_after_a_resume_only_the_steps_of_this_run_count(pairs, tmp_path, monkeypatch):
    """They take a second each. Those that were made before took no time of this run."""
    flags = ["--data", pairs, *SMALL, "--save-every", 3, "--evaluations", 7, "--out", tmp_path]
    stop_before_step(4 + 5, *flags)  # four of SFT
    steps = []
    set_clock(monkeypatch, lambda: float(len(steps)))
    with before_each_step(steps.append):
        printed = run("--resume", "--out", tmp_path).printed
    shown = re.findall(r"^DPO (\d)/7 .* (\d+) s left", printed, re.MULTILINE)
    assert shown == [("4", "3"), ("5", "2"), ("6", "1"), ("7", "0")]


def test_a_clock_may_stand_still(pairs, tmp_path, monkeypatch):
    """Some tick every 16 ms only: no time may seem to have passed between two steps."""
    set_clock(monkeypatch, lambda: 1.0)
    assert run("--data", pairs, *SMALL, "--out", tmp_path / "out").summary["seconds"] == 0


def test_the_number_of_threads_is_given_back(tmp_path):
    """The toy world runs on one thread. A notebook goes on with as many as it had."""
    seen = []
    torch.set_num_threads(2)
    try:
        with before_each_step(lambda optimizer: seen.append(torch.get_num_threads())):
            run(*TOY, "--out", tmp_path)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_so_it_is_after_ctrl_c(tmp_path):
    torch.set_num_threads(2)
    try:
        stop_before_step(2, *TOY, "--out", tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_compiled_is_the_same_step(pairs, tmp_path, monkeypatch):
    """--compile through torch's tracing and its derived backward pass. The generated code itself,
    which takes a minute to make, is what `python -m experiments.bench` compares."""
    compile = torch.nn.Module.compile
    used = []

    def traced(model, **options):
        used.append(options)
        compile(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    flags = ["--data", pairs, *SMALL, "--lr", 1e-3, "--out"]
    plain = run(*flags, tmp_path / "plain").summary["rows"]["policy"]
    assert used == [], "not without --compile"
    compiled = run(*flags, tmp_path / "compiled", "--compile").summary["rows"]["policy"]
    assert len(used) == 1
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-5)
    names = os.listdir(tmp_path / "compiled/policy")
    assert sorted(names) == ["config.json", "pytorch_model.bin"]
