"""The transformer: causality, places, initialisation, sampling, and files in and out."""

import errno
import io
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import data
import dpo
from model import PUBLISHED, GPT, GPTConfig, load, save, save_json, transposed

TINY = GPTConfig(vocab_size=7, n_positions=10, n_embd=16, n_layer=2, n_head=2, eos_token_id=3)
FULL = OSError(errno.ENOSPC, "No space left\non device")


def gpt(seed=0, layers=2):
    torch.manual_seed(seed)
    model = GPT(replace(TINY, n_layer=layers))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


# The transformer


def test_a_token_changes_what_follows_and_nothing_before():
    model, ids = gpt(), torch.randint(7, (2, 8))
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 7
    changed = (model(ids) - model(other)).abs().amax(-1) > 1e-4
    assert changed.tolist() == [[False] * 5 + [True] * 3] * 2, "token 5 of 0 to 7 was changed"
    torch.testing.assert_close(model(ids[:, :5]), model(ids)[:, :5])
    with pytest.raises(AssertionError, match="11.*10"):
        model(torch.zeros(1, 11, dtype=torch.long))


@pytest.mark.parametrize("at", [[3, 0, 15, 8], [7], [2, 2], []], ids=str)
def test_at_gives_the_logits_there_and_computes_no_others(at):
    model, ids, at = gpt(), torch.randint(7, (2, 8)), torch.tensor(at, dtype=torch.long)
    everywhere, states, seen = model(ids), model.hidden(ids), []
    torch.testing.assert_close(model.ln_f(states) @ model.wte.weight.T, everywhere)  # (B, T, V)
    torch.testing.assert_close(model.hidden(ids, at), states.flatten(0, 1)[at])
    for part in (model.h[0].mlp.c_proj, model.h[1].mlp.c_proj, model.ln_f):
        part.register_forward_hook(lambda *args: seen.append(tuple(args[-1].shape)))
    torch.testing.assert_close(model(ids, at), everywhere.flatten(0, 1)[at])
    assert seen == [(2, 8, 16), (len(at), 16), (len(at), 16)], "MLP of block 0, of the last; ln_f"
    seen.clear()
    rows = [data.TokenPair([1, 2, 4], [5, 5, 3], [3]), data.TokenPair([6], [3], [1, 3])]
    dpo.response_logps(model, *data.collate(rows, [0, 1]))
    assert seen[::2] == [(4, 5, 16), (7, 16)], "log pi(y|x): 4 rows of 6 tokens, 7 of them scored"


def test_initial_weights_are_gpt2s():
    """N(0, 0.02), the projections into the residual stream divided by sqrt(2 n_layer = 6)."""
    torch.manual_seed(0)
    for name, weight in GPT(GPTConfig(500, 64, 64, n_layer=3, n_head=2)).named_parameters():
        layer, kind = name.split(".")[-2:]
        if kind == "bias" or layer.startswith("ln_"):
            assert (weight == (kind == "weight")).all(), f"{name}: a bias is 0, a gain 1"
        else:
            std = 0.02 / 6**0.5 if layer == "c_proj" else 0.02
            found = f"{name}: N({weight.mean():.4f}, {weight.std():.4f}), not N(0, {std:.4f})"
            assert abs(weight.std() / std - 1) < 0.05 and abs(weight.mean()) < 0.1 * std, found
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters())
    assert size == 124_439_808, "the defaults are GPT-2's"


# Sampling


def assert_drawn_from(law, places):
    """Pearson's chi-square, up to four standard deviations; rare places are counted together."""
    counts, expected = places.bincount(minlength=len(law)), len(places) * law.double()
    assert not counts[law == 0].any(), f"drawn, though impossible: {counts[law == 0].tolist()}"
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=0.1)).sum()
    degrees = len(counts) - 1
    limit = degrees + 4 * (2 * degrees) ** 0.5
    assert chi_square < limit, f"chi-square {chi_square:.0f}, not about {degrees}"


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_policy(temperature):
    """The first, and the second given the first."""
    model, prompt = gpt(), torch.tensor([[1, 2, 3]])
    drawn = model.generate(prompt.expand(20_000, -1), 2, temperature)
    assert (drawn[:, :3] == prompt).all(), "the prompt is changed"
    longer = torch.cat([prompt.expand(7, -1), torch.arange(7)[:, None]], 1)
    first, second = (model(ids)[:, -1].double() / temperature for ids in (prompt, longer))
    law = first.softmax(-1).T * second.softmax(-1)  # (7, 7)
    assert_drawn_from(law.flatten(), 7 * drawn[:, 3] + drawn[:, 4])


def test_greedy_against_a_plain_loop():
    """Past n_positions = 10 the oldest tokens are forgotten; each row is what it is alone."""
    model, grads, ids = gpt(), [], torch.tensor([[1, 2, 3], [4, 5, 6]])
    wanted = ids
    for _ in range(100):
        likeliest = model(wanted[:, -10:])[:, -1].argmax(-1, keepdim=True)
        wanted = torch.cat([wanted, likeliest], 1)
    model.ln_f.register_forward_hook(lambda *args: grads.append(args[-1].requires_grad))
    got = model.generate(ids, 100, temperature=0).tolist()
    assert got == wanted.tolist(), "the likeliest token after the last n_positions tokens"
    assert grads == [False] * 100, "sampling keeps a graph for gradients"
    drawn = wanted[0, 3:].tolist()
    end = next(token for token in drawn if token != drawn[0])
    for eot, text in ((end, drawn[: drawn.index(end) + 1]), (7, drawn)):  # 7 is never drawn
        names = {i: b"<%d>" % i for i in range(8)} | dict(zip((drawn[0], end), (b"\xc3", b"\xa9")))
        for lost in (None, drawn[0]):  # vocabularies may hold ids without a text, as cl100k_base
            known = {i: name for i, name in names.items() if i != lost}
            tokenizer = types.SimpleNamespace(eot_token=eot)
            tokenizer.decode_single_token_bytes = known.__getitem__
            said = b"".join(known.get(i, b"") for i in text).decode(errors="replace")
            assert ("\xe9" in said) == (lost is None), "two tokens together are one letter"
            assert model.complete([1, 2, 3], tokenizer) == said, "up to the end, or 100 tokens"


@pytest.mark.parametrize("prompt", [[1], [4], [4, 1]], ids=["plain", "ends in stop", "holds stop"])
def test_after_a_drawn_stop_token_there_are_only_stop_tokens(prompt):
    """Draws with and without a stop token agree up to it. One in the prompt stops nothing."""
    model, ids = gpt(), torch.tensor([prompt]).expand(200, -1)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]  # the global one has no say
    free = model.generate(ids, 8, generator=seeds[0])
    stopped = model.generate(ids, 8, stop_token=4, generator=seeds[1])
    assert free.shape == stopped.shape == (200, len(prompt) + 8)
    for was, row in zip(free[:, len(prompt) :].tolist(), stopped[:, len(prompt) :].tolist()):
        n = was.index(4) + 1 if 4 in was else 8
        assert row == was[:n] + [4] * (8 - n), f"{row} with the stop token 4, {was} without"


# GPT-2's files


def plain_gpt2(weights, ids, layers, heads=2):
    """GPT-2 written down once more, straight from weights as its checkpoints hold them."""
    C = weights["wte.weight"].shape[1]

    def norm(x, name):
        return F.layer_norm(x, (C,), weights[name + ".weight"], weights[name + ".bias"], 1e-5)

    def linear(x, name):
        return x @ weights[name + ".weight"] + weights[name + ".bias"]

    x = weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)]
    for i in range(layers):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, -1)
        mixed = []
        for q, k, v in zip(*(part.split(C // heads, -1) for part in qkv)):
            scores = q @ k.T / (C // heads) ** 0.5
            later = torch.ones_like(scores).triu(1).bool()
            mixed.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(mixed, -1), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


@pytest.mark.parametrize("prefix, layers", [("", 1), ("transformer.", 2), ("", 3)])
@pytest.mark.parametrize("stream", [1, 1e-3], ids=["", "epsilon matters"])
def test_gpt2_checkpoints_mean_what_they_say(tmp_path, prefix, layers, stream):
    """In float64. With a residual stream of size 1e-3, its variance is below LayerNorm's 1e-5."""
    weights = transposed(gpt(layers=layers).state_dict())
    for name in weights:
        if name.startswith(("wte", "wpe")) or "c_proj" in name:
            weights[name] *= stream
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    stored |= {prefix + f"h.0.attn.{name}": torch.ones(10, 10) for name in ("bias", "masked_bias")}
    torch.save(stored | {"lm_head.weight": weights["wte.weight"]}, tmp_path / "pytorch_model.bin")
    shape = {"vocab_size": 7, "n_positions": 10, "n_embd": 16, "n_layer": layers, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"resid_pdrop": 0.1}))
    model = GPT.from_pretrained(str(tmp_path))
    wanted = replace(TINY, n_layer=layers, eos_token_id=50256)
    assert model.config == wanted, "what is absent is GPT-2's"
    ids = torch.tensor([1, 5, 2, 6, 0])
    weights = {name: tensor.double() for name, tensor in weights.items()}
    wanted = plain_gpt2(weights, ids, layers)
    torch.testing.assert_close(model.double()(ids[None])[0], wanted, rtol=1e-9, atol=1e-11)


class Evil:
    """In a file: code that makes a folder when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def refused(folder, *says):
    with pytest.raises(OSError) as error:
        GPT.from_pretrained(folder)
    said = str(error.value)
    assert said.startswith(f"{folder} is unreadable: ") and "\n" not in said, said
    assert all(words in said for words in says), f"{said}: nothing of {says}"


def test_published_names(tmp_path, monkeypatch):
    """Each size is downloaded once, and kept under its own name."""
    sizes = (768, 12, 12), (1024, 24, 16), (1280, 36, 20), (1600, 48, 25)
    assert PUBLISHED == dict(zip(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), sizes))
    config, asked = GPTConfig(50257, 1024, 8, 3, 2), []

    def download(url, path, *_, **__):
        asked.append(url)
        torch.save(transposed(GPT(config).state_dict()), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(PUBLISHED, "gpt2-medium", (8, 3, 2))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    assert all(GPT.from_pretrained("gpt2-medium").config == config for _ in range(2))
    folder = "https://huggingface.co/openai-community/gpt2-medium/resolve/main/"
    assert asked == [folder + "pytorch_model.bin"]
    kept = tmp_path / "hub" / "checkpoints" / "gpt2-medium.bin"
    torch.save({"wte.weight": Evil(str(tmp_path / "it ran"))}, kept)
    refused("gpt2-medium")
    kept.write_bytes(b"torn")
    refused("gpt2-medium", f"{kept} (if torn, delete it): ")
    assert not (tmp_path / "it ran").exists(), "the file's code ran"


def test_save_and_load(tmp_path):
    folder, model = tmp_path / "new" / "folder", gpt()
    model.save_pretrained(str(folder))
    again = GPT.from_pretrained(str(folder))
    assert again.config == model.config and same_weights(again, model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["eos_token_id"] == config["bos_token_id"] == 3, "transformers stops at it"
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64), "GPT-2 stores (in, out)"
    assert all(tensor.is_contiguous() for tensor in stored.values()), "safetensors needs it"
    for names in (["lm_head.weight"], ["lm_head.weight", "transformer.wte.weight"]):
        embedding = stored.pop("transformer.wte.weight")
        torch.save(stored | dict.fromkeys(names, embedding), folder / "pytorch_model.bin")
        assert same_weights(GPT.from_pretrained(folder), model), f"the tied weight under {names}"
        stored["transformer.wte.weight"] = embedding


def test_safetensors_are_preferred_and_never_passed_over(tmp_path, monkeypatch):
    """torch.load stands in for the package. tests/peers/check_gpt2.py has the real one."""
    package = types.ModuleType("safetensors.torch")
    package.load_file = lambda path: torch.load(io.BytesIO(path.read_bytes()))
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    gpt(1).save_pretrained(tmp_path / "older")
    gpt(2).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    assert same_weights(GPT.from_pretrained(tmp_path), gpt(2)), "model.safetensors alone"
    (tmp_path / "older" / "pytorch_model.bin").rename(tmp_path / "pytorch_model.bin")
    assert same_weights(GPT.from_pretrained(tmp_path), gpt(2)), "pytorch_model.bin was read"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    refused(tmp_path, "safetensors")


@pytest.mark.parametrize("fails", ["pytorch_model.bin", "config.json"])
def test_what_transformers_would_prefer_is_removed_once_ours_is_there(tmp_path, monkeypatch, fails):
    def move(source, target):
        os.rename(source, target if Path(target).name != fails else tmp_path / "no" / "folder")

    stale, kept = {"model.safetensors", "generation_config.json"}, {"tokenizer.json"}
    for name in stale | kept:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("os.replace", move)
    with pytest.raises(OSError):
        gpt().save_pretrained(tmp_path)
    assert stale <= {path.name for path in tmp_path.iterdir()}, "the old weights are lost"
    monkeypatch.undo()
    gpt().save_pretrained(tmp_path)
    ours = {"config.json", "pytorch_model.bin"}
    assert {path.name for path in tmp_path.iterdir()} == ours | kept, "what is stale, or others'"


BIN, CONFIG = "pytorch_model.bin", "config.json"
REFUSED = [  # a file, what is changed in it, or what is in its place, and what is said
    (CONFIG, {"n_embd": 32}, "size mismatch for wte.weight"),
    (CONFIG, {"n_layer": 9}, "h.2.ln_1.weight"),
    (CONFIG, {"n_layer": 1}, "h.1.ln_1.weight"),
    (CONFIG, {"n_head": 3}, "not a multiple of n_head"),
    (CONFIG, {"n_embd": "16"}, ""),
    (CONFIG, {"activation_function": "relu"}, "architecture: {'activation_function': 'relu'}"),
    (CONFIG, {"layer_norm_epsilon": 1e-6}, "architecture"),
    (CONFIG, {"tie_word_embeddings": False}, "architecture"),
    (CONFIG, {"scale_attn_weights": False}, "architecture"),
    (CONFIG, {"scale_attn_by_inverse_layer_idx": True}, "architecture"),
    (CONFIG, None, "No such file"), (CONFIG, b"", ""), (CONFIG, b"torn", ""), (CONFIG, b"[1]", ""),
    (BIN, {"transformer.ln_f.bias": None}, "ln_f.bias"),
    (BIN, {"transformer.h.0.more": torch.ones(1)}, "h.0.more"),
    (BIN, {"transformer.wte.weight": "text"}, "wte.weight"),
    (BIN, {"lm_head.weight": torch.ones(7, 16)}, "lm_head.weight differs from the embedding"),
    (BIN, {"lm_head.weight": torch.ones(8, 16)}, "lm_head.weight differs from the embedding"),
    (BIN, {"code": Evil("it ran")}, BIN),
    (BIN, None, "No such file"), (BIN, b"", BIN), (BIN, b"torn", BIN), (BIN, "half", BIN),
]  # fmt: skip


@pytest.mark.parametrize("file, change, says", REFUSED, ids=lambda x: str(x)[:30])
def test_other_or_damaged_files_are_refused_in_one_line(tmp_path, monkeypatch, file, change, says):
    monkeypatch.chdir(tmp_path)
    gpt().save_pretrained(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    path.unlink()
    if isinstance(change, dict) and file == CONFIG:
        path.write_text(json.dumps(json.loads(whole) | change))
    elif isinstance(change, dict):
        state = torch.load(io.BytesIO(whole)) | change
        torch.save({name: value for name, value in state.items() if value is not None}, path)
    elif change is not None:
        path.write_bytes(whole[: len(whole) // 2] if change == "half" else change)
    refused(tmp_path, says)
    assert not Path("it ran").exists(), "the file's code ran: weights_only is off"


# save, save_json


@pytest.mark.parametrize("what, error", [
    ("torch.save", FULL), ("torch.save", RuntimeError("[enforce fail]\nunexpected pos")),  # torch's
    ("torch.save", KeyboardInterrupt()), ("os.replace", FULL),
], ids=str)  # fmt: skip
def test_a_failed_save_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch, what, error):
    path = tmp_path / "file"
    for write in (save, save_json) if what == "os.replace" else (save,):
        write({"step": 1}, path)
        before = path.read_bytes()
        monkeypatch.setattr(what, raising(error))
        with pytest.raises((OSError, KeyboardInterrupt)) as found:
            write({"step": 2}, str(path))
        monkeypatch.undo()
        assert what == "os.replace" or "\n" not in str(found.value)
        assert path.read_bytes() == before, "the old file is damaged"
        assert list(tmp_path.iterdir()) == [path], "half a file is left"


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr("os.fsync", raising(OSError(refusal, "refused")))
    save({"step": 1}, tmp_path / "file.pt")
    assert load(tmp_path / "file.pt") == {"step": 1}
