"""What reads the folders of runs: samples of a policy and its reference, runs beside each other."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import data
from experiments import compare, lab, sample
from model import GPT, GPTConfig
from tests.helpers import json_of, lines_of, run, write_lines, write_pairs

SMALL = "--n-layer 1 --n-embd 8 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()
TOY = "--pairs 64 --batch-size 32 --epochs 3 --sft-epochs 0.005".split()


@torch.no_grad()
def always(text, folder):
    """A model that says this text whatever it is asked: each byte follows from the one before.

    The text must not repeat a byte. After it comes the end token.
    """
    ids = [*text.encode(), 256]
    model = GPT(GPTConfig(257, 128, n_embd=257, n_layer=1, n_head=1, eos_token_id=256))
    for parameter in model.parameters():
        parameter.zero_()
    model.wte.weight += torch.eye(257)
    model.ln_f.weight.fill_(1.0)
    follows = torch.zeros(257, 257)  # [before, after]
    follows[:, ids[0]] = 1
    for before, after in zip(ids, ids[1:]):
        follows[before] = 0
        follows[before, after] = 1
    # The residual stream is one-hot, so the MLP can look the next byte up in a table.
    model.h[0].ln_2.weight.fill_(1.0)
    model.h[0].mlp.c_fc.weight[:257] = torch.eye(257)
    model.h[0].mlp.c_fc.bias[:257] = -5.0  # of the normalised stream, only the one is above
    model.h[0].mlp.c_proj.weight[:, :257] = 10 * follows.T
    model.save_pretrained(folder)


@pytest.fixture
def talker(tmp_path):
    """A run on dialogues whose reference says "No" and whose policy says "Yes!"."""
    folder = tmp_path / "talker"
    always("No", folder / "reference")
    always("Yes!", folder / "policy")
    settings = {"data": "pairs.jsonl", "tokenizer": "bytes", "dialogues": True}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_each_model_is_asked_and_its_end_token_ends_the_response(talker):
    responses = sample.sample(talker, "Hi?", n=2, temperature=0)
    assert responses == {"reference": ["No", "No"], "policy": ["Yes!", "Yes!"]}


def test_side_by_side(talker, capsys):
    sample.main([str(talker), "Hi?", "--n", "2", "--temperature", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["reference", "policy"],
        [],
        ["No", "Yes!"],
        [],
        ["No", "Yes!"],
    ]
    columns = [line.index("Yes!") for line in lines if "Yes!" in line]
    assert columns == [lines[0].index("policy")] * 2


ASKED = "\n\nHuman: Hi?\n\nAssistant:"


@pytest.mark.parametrize(
    "dialogues, prompt, wanted",
    [
        (True, "Hi?", ASKED),
        (True, ASKED, ASKED),
        (True, "\n\nHuman: Hi?", ASKED),
        (False, "Hi? ", "Hi? "),
    ],
)
def test_a_model_of_dialogues_is_asked_in_their_form(
    dialogues, prompt, wanted, talker, monkeypatch
):
    path = talker / "config.json"
    path.write_text(json.dumps(json_of(path) | {"dialogues": dialogues}), encoding="utf-8")
    seen = []
    generate = GPT.generate

    def spy(model, ids, *arguments, **settings):
        seen.append(bytes(ids[0].tolist()).decode())
        return generate(model, ids, *arguments, **settings)

    monkeypatch.setattr(GPT, "generate", spy)
    sample.sample(talker, prompt, n=1)
    assert seen == [wanted, wanted]


@pytest.mark.parametrize("form", ["dialogues", "texts", "mixed"])
def test_a_run_says_whether_its_pairs_were_dialogues(form, tmp_path):
    lines = []
    for i in range(8):
        prompt = f"Say {i} "
        if form == "dialogues" or (form == "mixed" and i == 3):
            prompt = [{"role": "user", "content": prompt}]
        lines.append({"prompt": prompt, "chosen": f"{i}", "rejected": f"{i + 1}"})
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    run("--data", path, *SMALL, "--out", tmp_path / "out")
    assert json_of(tmp_path / "out/config.json")["dialogues"] == (form == "dialogues")
    responses = sample.sample(tmp_path / "out", "Say 3", n=2, max_new_tokens=5)
    assert [len(texts) for texts in responses.values()] == [2, 2]


def test_samples_of_the_toy_world(tmp_path):
    """Up to three of its words, and the same with the same seed."""
    run(*TOY, "--out", tmp_path)
    first = sample.sample(tmp_path, "The  film was ", n=20, seed=1)
    assert sample.sample(tmp_path, "The film was", n=20, seed=1) == first
    assert sample.sample(tmp_path, "The film was", n=20, seed=2) != first
    responses = [response.strip() for response in data.ToyWorld().responses]
    assert all(text in responses for texts in first.values() for text in texts)


WRONG = {
    "no folder": (["nowhere", "Hi?"], "nowhere"),
    "no run": (["empty", "Hi?"], "does not hold a run's settings"),
    "no prompt": (["talker", ""], "the prompt is empty"),
    "no response": (["talker", "Hi?", "--n", "0"], "--n must be at least 1"),
    "below zero": (["talker", "Hi?", "--temperature", "-1"], "--temperature"),
    "not a number": (["talker", "Hi?", "--temperature", "nan"], "--temperature"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_sampled_is_one_line(case, talker, monkeypatch, capsys):
    monkeypatch.chdir(talker.parent)
    Path("empty").mkdir()
    Path("empty/config.json").write_text("{}", encoding="utf-8")
    settings = {"data": "pairs.jsonl", "tokenizer": "bytes"}
    (talker / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    arguments, says = WRONG[case]
    with pytest.raises(SystemExit) as raised:
        sample.main(arguments)
    assert raised.value.code == 2
    assert re.fullmatch(f"sample: .*{re.escape(says)}.*\n", capsys.readouterr().err)


def test_a_word_of_another_world_is_named(tmp_path):
    run(*TOY, "--out", tmp_path)
    with pytest.raises(data.InputError, match="^book is not a word of the toy world: The, was"):
        sample.sample(tmp_path, "The book was")


# Runs beside each other


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of DPO and one of IPO."""
    folder = tmp_path_factory.mktemp("two")
    for loss in ["dpo", "ipo"]:
        run(*TOY, "--loss", loss, "--out", folder / loss)
    return [str(folder / "dpo"), str(folder / "ipo")]


def test_the_table_has_the_final_policy_of_each_run(two, capsys):
    compare.compare(two)
    head, *lines = capsys.readouterr().out.splitlines()
    columns = head.split()
    assert columns == ["expected_reward", "kl", "objective", "kl_to_optimum", "gap_closed"]
    assert len(lines) == 2
    for folder, line in zip(two, lines):
        name, *numbers = line.split()
        assert name == folder
        row = json_of(Path(folder) / "summary.json")["rows"]["policy"]
        for column, number in zip(columns, numbers):
            assert float(number) == pytest.approx(row[column], abs=6e-5)


def test_the_curves_are_those_of_metrics_jsonl(two):
    figure = compare.draw(compare.compare(two))
    panels = {ax.get_ylabel(): ax for ax in figure.axes}
    assert len(panels) == 6
    for metric in ["objective", "kl", "gap_closed", "margin", "chosen_logp", "rejected_logp"]:
        ax = panels[compare.PANELS[metric]]
        assert ax.get_xlabel() == "DPO step"
        for folder, curve in zip(two, ax.get_lines(), strict=True):
            lines = [line for line in lines_of(Path(folder)) if metric in line]
            assert curve.get_label() == folder
            assert list(curve.get_xdata()) == [line["step"] for line in lines]
            assert list(curve.get_ydata()) == [line[metric] for line in lines]


def test_a_toy_run_beside_one_on_pairs_shows_what_both_have(two, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    run("--data", pairs, *SMALL, "--out", tmp_path / "real")
    figure = compare.draw(compare.compare([two[0], str(tmp_path / "real")]))
    common = ["margin", "chosen_logp", "rejected_logp", "accuracy"]
    wanted = [compare.PANELS[name] for name in common]
    assert [ax.get_ylabel() for ax in figure.axes] == wanted
    said = capsys.readouterr().out
    assert "gap_closed" not in said and "no results in common" in said


def test_the_picture_and_a_folder_without_a_finished_run(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: written.append(path))
    compare.main(two)
    assert written == ["compare.png"]
    rows = lab.load_csv("compare.csv")
    assert lab.values(rows, "run") == two
    for folder in two:
        steps = [line for line in lines_of(Path(folder)) if "step" in line]
        mine = lab.where(rows, run=folder, seed=0)
        assert [row["step"] for row in mine] == [line["step"] for line in steps]
        assert mine[-1]["margin"] == pytest.approx(steps[-1]["margin"], rel=1e-5)
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        compare.main([two[0], "nowhere"])
    assert raised.value.code == 2
    assert re.fullmatch("compare: .*nowhere/summary.json.*\n", capsys.readouterr().err)
