"""The transformer: causality, its head, initialisation, sampling, and files in and out."""

import errno
import json
import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import data
import dpo
import train
from data import TokenPair
from model import GPT, MLP, PUBLISHED, GPTConfig, load, save, save_json, save_text, transposed
from tests.helpers import assert_drawn_from, deep_gpt, expect, write_half

TINY = GPTConfig(vocab_size=7, n_positions=10, n_embd=16, n_layer=2, n_head=2, eos_token_id=3)


def tiny(seed=0, layers=2):
    torch.manual_seed(seed)
    model = GPT(replace(TINY, n_layer=layers))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# The transformer


def test_a_token_changes_what_follows_and_nothing_before():
    model = tiny()
    ids = torch.randint(7, (2, 8))
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 7
    changed = (model(ids) - model(other)).abs().amax(-1) > 1e-4
    assert changed.tolist() == [[False] * 5 + [True] * 3] * 2, "token 5 of 0 to 7 was changed"
    torch.testing.assert_close(model(ids[:, :5]), model(ids)[:, :5])
    assert model(torch.zeros(1, 10, dtype=torch.long)).shape == (1, 10, 7)
    with pytest.raises(AssertionError, match="11.*10"):
        model(torch.zeros(1, 11, dtype=torch.long))


SCORED = {  # which of 2 rows of 8 positions
    "some": ["00010010", "10000001"],
    "of one row": ["00000000", "01100000"],
    "all": ["11111111", "11111111"],
    "none": ["00000000", "00000000"],
}


def as_mask(rows):
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


@pytest.mark.parametrize("case", SCORED)
def test_scored_gives_the_logits_there_and_computes_no_others(case):
    model = tiny()
    ids = torch.randint(7, (2, 8))
    scored = as_mask(SCORED[case])
    everywhere = model(ids)
    assert everywhere.shape == (2, 8, 7)
    states = model.hidden(ids)
    assert states.shape == (2, 8, 16)
    torch.testing.assert_close(model.head(states), everywhere)
    seen = []
    model.ln_f.register_forward_hook(lambda *args: seen.append(args[-1].shape))
    torch.testing.assert_close(model(ids, scored), everywhere[scored])
    assert seen == [(scored.sum(), 16)], "the head looks at the scored positions only"


def test_log_probs_need_logits_at_the_response_only():
    model = tiny()
    seen = []
    model.ln_f.register_forward_hook(lambda *args: seen.append(args[-1].shape))
    first = TokenPair([1, 2, 4], [5, 5, 3], [3])
    second = TokenPair([6], [3], [1, 3])
    ids, mask = data.collate([first, second], [0, 1])
    dpo.response_logps(model, ids, mask)
    assert seen == [(7, 16)], "4 rows of 6 tokens, 7 of them scored"


def test_every_new_tensor_is_made_on_the_models_device():
    """Here "meta" stands for a device that is not the model's. What is made without a device would
    go there, and could not be used together with the model's tensors."""
    model = tiny()
    ids = torch.randint(7, (2, 5))
    mask = as_mask(["00110", "01000"])
    pair_logps = torch.zeros(4, 3)
    with torch.device("meta"):
        for temperature in (0, 1):
            drawn = model.generate(ids, 3, temperature, stop_token=3)
        logps = dpo.response_logps(model, ids, mask)
        result = dpo.dpo_loss(*pair_logps, beta=0.1)
        metrics = dpo.describe(*pair_logps, beta=0.1)
    for found in (drawn, logps, *result, *metrics.values()):
        assert found.device.type == "cpu", "a tensor was made on the default device"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_mask_may_lie_on_the_cpu():
    """Or beside the model: the same logits, the same log-probs."""
    device = torch.accelerator.current_accelerator()
    model = tiny().to(device)
    ids = torch.randint(7, (2, 8)).to(device)
    for rows in SCORED.values():
        mask = as_mask(rows)
        torch.testing.assert_close(model(ids, mask), model(ids, mask.to(device)))
        logps = dpo.response_logps(model, ids, mask)
        assert logps.device == ids.device
        torch.testing.assert_close(logps, dpo.response_logps(model, ids, mask.to(device)))


def test_initial_weights_are_gpt2s():
    """N(0, 0.02), the projections into the residual stream divided by sqrt(2 n_layer = 6)."""
    torch.manual_seed(0)
    for name, weight in GPT(GPTConfig(500, 64, 64, n_layer=3, n_head=2)).named_parameters():
        layer, kind = name.split(".")[-2:]
        if kind == "bias":
            assert (weight == 0).all(), name
        elif layer.startswith("ln_"):
            assert (weight == 1).all(), name
        else:
            std = 0.02
            if layer == "c_proj":
                std = 0.02 / 6**0.5
            assert abs(weight.std() / std - 1) < 0.05, f"{name}: {weight.std()}, not {std}"
            assert abs(weight.mean()) < 0.1 * std, f"{name}: {weight.mean()}, not 0"


def size_by_hand(config):
    """The number of parameters: embeddings, layers, the last norm; the head is an embedding."""
    C = config.n_embd
    layer = 12 * C**2 + 13 * C  # weights; biases and norms
    return (config.vocab_size + config.n_positions) * C + config.n_layer * layer + 2 * C


def test_the_defaults_are_gpt2s():
    assert sum(parameter.numel() for parameter in tiny().parameters()) == size_by_hand(TINY)
    assert size_by_hand(GPTConfig()) == 124_439_808
    assert GPTConfig() == GPTConfig(50257, 1024, 768, 12, 12, 50256)


# The head, in at least float32: GPT-2's logits lie near -100, where bfloat16 has steps of 0.5


@pytest.fixture(scope="module")
def deep():
    """A model whose logits lie there, and pairs with responses of 50 tokens, and others."""
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 50, 50), (8, 50, 50), (11, 50, 50), (60, 90, 20)]
    rows = []
    for row in lengths:
        parts = [torch.randint(256, (n,), generator=generator).tolist() for n in row]
        rows.append(TokenPair(parts[0], parts[1], parts[2]))
    model = deep_gpt()
    ids, mask = data.collate(rows, [0, 1])
    logits = model(ids, mask)
    assert -110 < logits.mean() < -80
    assert 0.2 < logits.std(-1).mean() < 20, "and yet tokens differ"
    return model, rows


@torch.no_grad()
def under_autocast(model, rows, order):
    ids, mask = data.collate(rows, order)
    with torch.autocast("cpu", torch.bfloat16):
        return dpo.response_logps(model, ids, mask).view(2, -1)


def test_autocast_gives_the_log_probs_of_float32(deep):
    model, rows = deep
    ids, mask = data.collate(rows, [0, 1, 2])
    exact = dpo.response_logps(model, ids, mask).view(2, -1)
    low = under_autocast(model, rows, [0, 1, 2])
    assert low.dtype == torch.float32
    expect(low, exact, "log pi of 50 tokens in bfloat16: is the head's product in float32?", 0.1)


def test_autocast_gives_them_whatever_else_is_in_the_batch(deep):
    model, rows = deep
    together = under_autocast(model, rows, [0, 1, 2])
    beside_longer = under_autocast(model, rows, [3, 0, 1, 2])[:, 1:]
    alone = [under_autocast(model, rows, [i]) for i in (0, 1, 2)]
    alone = torch.cat(alone, dim=1)
    expect(beside_longer, together, "log pi of a row beside longer ones", 0.05)
    expect(alone, together, "log pi of a row alone", 0.05)
    losses = dpo.dpo_loss(alone[0], alone[1], together[0], together[1]).losses
    expect(losses.mean(), math.log(2), "policy == reference costs log 2", 5e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_in_at_least_float32(dtype):
    """Of weights in any precision. float64 stays, in the log-probs as well."""
    model = tiny().to(dtype)
    ids = torch.randint(7, (2, 8))
    mask = as_mask(SCORED["some"])
    wanted = torch.float32
    if dtype == torch.float64:
        wanted = torch.float64
    assert model.hidden(ids).dtype == dtype
    assert model(ids).dtype == wanted
    assert model(ids, mask).dtype == wanted
    assert dpo.response_logps(model, ids, mask).dtype == wanted


def write_polite_pairs(path, n):
    """A preference that can be learnt, the polite response, in lines of many lengths."""
    draw = random.Random(0)
    words = "red blue tall small old new warm cold quick slow calm loud".split()

    def some(n):
        return " ".join(draw.choice(words) for _ in range(n))

    lines = []
    for i in range(n):
        length = draw.choice([1, 2, 4])
        pair = {
            "prompt": f"Q{i}: {some(draw.choice([1, 3]))}? ",
            "chosen": some(length) + ", please.",
            "rejected": some(length) + ", whatever.",
        }
        lines.append(json.dumps(pair))
    path.write_text("\n".join(lines), encoding="utf-8")


@torch.no_grad()
def in_float32(folder, rows):
    ids, mask = data.collate(rows, range(len(rows)))
    return dpo.response_logps(GPT.from_pretrained(folder), ids, mask).view(2, -1)


def test_a_run_in_bfloat16_measures_what_float32_does(tmp_path, monkeypatch):
    """From a folder whose logits lie near -100: the first loss, and what summary.json says of the
    held-out pairs, computed anew in float32 from the weights that the run has saved."""
    monkeypatch.setattr(train, "plot", lambda history, path: None)
    sides = []
    split = data.split

    def remember(*arguments):
        sides.extend(split(*arguments))
        return sides

    monkeypatch.setattr(data, "split", remember)
    monkeypatch.chdir(tmp_path)
    deep_gpt(layers=1).save_pretrained("init")
    write_polite_pairs(tmp_path / "pairs.jsonl", 100)
    flags = "--data pairs.jsonl --init init --tokenizer bytes --dtype bfloat16 --device cpu"
    flags += " --sft-epochs 0 --lr 1e-6 --epochs 1 --batch-size 10 --held-out 0.5 --evaluations 1"
    train.main(flags.split())
    out = tmp_path / "out"
    first = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1])
    expect(first["loss"], math.log(2), "the first loss: policy == reference", 2e-4)

    held_out = sides[1]
    assert len(held_out) == 50
    policy = in_float32(out / "policy", held_out)
    reference = in_float32(out / "reference", held_out)
    chosen, rejected = 0.1 * (policy - reference)
    margins = chosen - rejected
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    said = summary["rows"]["policy"]
    right = (margins > 0).float().mean()
    expect(said["held_out_accuracy"], right, "held-out accuracy, to one pair in 50", 0.021)
    expect(said["held_out_margin"] / margins.mean(), 1.0, "held-out margin, to 10%", 0.1)


# Sampling


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_policy(temperature):
    """The first, and the second given the first."""
    model = tiny()
    prompt = torch.tensor([[1, 2, 3]])
    drawn = model.generate(prompt.expand(10_000, -1), 2, temperature)
    assert (drawn[:, :3] == prompt).all(), "the prompt is changed"
    longer = torch.cat([prompt.expand(7, -1), torch.arange(7)[:, None]], 1)
    first = model(prompt)[:, -1].double() / temperature
    second = model(longer)[:, -1].double() / temperature
    law = first.softmax(-1).T * second.softmax(-1)  # (7, 7)
    assert_drawn_from(law.flatten(), 7 * drawn[:, 3] + drawn[:, 4])


def test_greedy_against_a_plain_loop():
    """Past n_positions = 10 the oldest tokens are forgotten; each row is what it is alone."""
    model = tiny()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    wanted = ids
    for _ in range(40):
        likeliest = model(wanted[:, -10:])[:, -1].argmax(-1, keepdim=True)
        wanted = torch.cat([wanted, likeliest], 1)
    grads = []
    model.ln_f.register_forward_hook(lambda *args: grads.append(args[-1].requires_grad))
    found = model.generate(ids, 40, temperature=0)
    assert found.tolist() == wanted.tolist(), "the likeliest after the last n_positions tokens"
    assert grads == [False] * 40, "sampling keeps a graph for gradients"


@pytest.mark.parametrize("stop", [0, 4])
@pytest.mark.parametrize("case", ["plain", "ends in stop", "holds stop"])
def test_after_a_drawn_stop_token_there_are_only_stop_tokens(case, stop):
    """Draws with and without a stop token agree up to it. One in the prompt stops nothing."""
    prompt = {"plain": [1], "ends in stop": [stop], "holds stop": [stop, 1]}[case]
    model = tiny()
    ids = torch.tensor([prompt]).expand(200, -1)
    free = model.generate(ids, 8, generator=torch.Generator().manual_seed(1))
    torch.rand(1)  # the global generator has no say
    stopped = model.generate(ids, 8, stop_token=stop, generator=torch.Generator().manual_seed(1))
    assert free.shape == (200, len(prompt) + 8)
    assert stopped.shape == free.shape
    free = free[:, len(prompt) :].tolist()
    stopped = stopped[:, len(prompt) :].tolist()
    for was, row in zip(free, stopped):
        n = 8
        if stop in was:
            n = was.index(stop) + 1
        assert row == was[:n] + [stop] * (8 - n), f"{row} with the stop token {stop}, {was} without"


def test_sampling_ends_when_every_row_has_stopped():
    model = tiny()
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    drawn = model.generate(ids, 40, temperature=0)[0, 3:].tolist()
    last = next(token for token in drawn if token != drawn[0])
    n = drawn.index(last) + 1
    found = model.generate(ids, 40, temperature=0, stop_token=last)
    assert found.tolist() == [[1, 2, 3] + drawn[:n]] * 2


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
        u = norm(x, f"h.{i}.ln_1")
        q, k, v = linear(u, f"h.{i}.attn.c_attn").split(C, -1)
        mixed = []
        for head in torch.arange(C).chunk(heads):
            scores = q[:, head] @ k[:, head].T / (C // heads) ** 0.5
            later = torch.ones_like(scores).triu(1).bool()
            mixed.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, head])
        x = x + linear(torch.cat(mixed, -1), f"h.{i}.attn.c_proj")
        u = norm(x, f"h.{i}.ln_2")
        u = linear(u, f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


@pytest.mark.parametrize("prefix, layers", [("", 1), ("transformer.", 2), ("", 3)])
@pytest.mark.parametrize("stream", [1, 1e-3], ids=["", "epsilon matters"])
def test_gpt2_checkpoints_mean_what_they_say(tmp_path, prefix, layers, stream):
    """In float64. With a residual stream of size 1e-3, its variance is below LayerNorm's 1e-5."""
    weights = transposed(tiny(layers=layers).state_dict())
    stored = {}
    for name, weight in weights.items():
        if name.startswith(("wte", "wpe")) or "c_proj" in name:
            weight *= stream
        stored[prefix + name] = weight
    stored[f"{prefix}h.0.attn.bias"] = torch.ones(10, 10)
    stored[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    stored["lm_head.weight"] = weights["wte.weight"]
    torch.save(stored, tmp_path / "pytorch_model.bin")
    shape = {"vocab_size": 7, "n_positions": 10, "n_embd": 16, "n_layer": layers, "n_head": 2}
    text = json.dumps(shape | {"resid_pdrop": 0.1})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    model = GPT.from_pretrained(str(tmp_path))
    wanted = replace(TINY, n_layer=layers, eos_token_id=50256)
    assert model.config == wanted, "what is absent is GPT-2's"
    ids = torch.tensor([1, 5, 2, 6, 0])
    weights = {name: tensor.double() for name, tensor in weights.items()}
    wanted = plain_gpt2(weights, ids, layers)
    torch.testing.assert_close(model.double()(ids[None])[0], wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_low_precision_are_loaded_as_float32(tmp_path, dtype):
    model = tiny()
    model.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    state = torch.load(path)
    torch.save({name: weight.to(dtype) for name, weight in state.items()}, path)
    found = GPT.from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in found.parameters())
    assert same_weights(found, model.to(dtype).float())


class Evil:
    """In a file: code that makes a folder when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def refused(name, path, caused=True):
    """from_pretrained(name) raises an OSError in one line that names the file or folder `path`."""
    with pytest.raises(OSError) as error:
        GPT.from_pretrained(name)
    said = str(error.value)
    assert str(path) in said
    assert "\n" not in said
    if caused is not None:
        assert caused == (error.value.__cause__ is not None), "raise ... from error"
    return said


URLS = {  # name -> where its weights are
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "openai-community/gpt2": "openai-community/gpt2",
    "openai-community/gpt2-xl": "openai-community/gpt2-xl",
    "distilbert/distilgpt2": "distilbert/distilgpt2",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Small networks under the published names, in place of a download: the list of URLs asked."""
    asked = []

    def download(url, path, *_, **__):
        asked.append(url)
        torch.save(transposed(GPT(GPTConfig(50257, 1024, 8, 3, 2)).state_dict()), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in PUBLISHED:
        monkeypatch.setitem(PUBLISHED, name, (8, 3, 2))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    return asked


def test_the_published_shapes():
    assert PUBLISHED == {
        "distilgpt2": (768, 6, 12),
        "gpt2": (768, 12, 12),
        "gpt2-medium": (1024, 24, 16),
        "gpt2-large": (1280, 36, 20),
        "gpt2-xl": (1600, 48, 25),
    }


@pytest.mark.parametrize("name", URLS)
def test_published_weights_are_downloaded_once(name, hub, tmp_path):
    """And kept under a name of their own."""
    assert GPT.from_pretrained(name).config == GPTConfig(50257, 1024, 8, 3, 2)
    assert GPT.from_pretrained(name).config == GPTConfig(50257, 1024, 8, 3, 2)
    assert hub == [f"https://huggingface.co/{URLS[name]}/resolve/main/pytorch_model.bin"]
    kept = list((tmp_path / "hub" / "checkpoints").iterdir())
    assert [path.name for path in kept] == [name.split("/")[-1] + ".bin"]


@pytest.mark.parametrize("name", ["gpt3", "distilbert/gpt2", "openai-community/distilgpt2"])
def test_any_other_name_is_a_folder(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(name, name, caused=False)
    assert hub == []
    tiny().save_pretrained(name)
    assert same_weights(GPT.from_pretrained(name), tiny())


def test_a_damaged_download_is_named(hub, tmp_path):
    kept = tmp_path / "hub" / "checkpoints" / "gpt2-medium.bin"
    kept.parent.mkdir(parents=True)
    torch.save({"wte.weight": Evil(str(tmp_path / "it ran"))}, kept)
    refused("gpt2-medium", kept)
    assert not (tmp_path / "it ran").exists(), "the file's code ran"
    kept.write_bytes(b"torn")
    said = refused("openai-community/gpt2-medium", kept)
    assert "delete it" in said


def test_a_failed_download_names_the_address(hub, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    refused("gpt2", "https://huggingface.co/openai-community/gpt2/")


def test_save_and_load(tmp_path):
    folder = tmp_path / "new" / "folder"
    model = tiny()
    model.save_pretrained(str(folder))
    again = GPT.from_pretrained(str(folder))
    assert again.config == model.config
    assert same_weights(again, model)
    assert sorted(os.listdir(folder)) == ["config.json", "pytorch_model.bin"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["eos_token_id"] == 3, "transformers stops at it"
    assert config["bos_token_id"] == 3
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64), "GPT-2 stores (in, out)"
    assert all(tensor.is_contiguous() for tensor in stored.values()), "safetensors needs it"


@pytest.mark.parametrize("names", [["lm_head.weight"], ["lm_head.weight", "wte.weight"]])
def test_the_tied_weight_under_either_name(tmp_path, names):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    stored = torch.load(path)
    embedding = stored.pop("transformer.wte.weight")
    for name in names:
        stored[name] = embedding
    torch.save(stored, path)
    assert same_weights(GPT.from_pretrained(tmp_path), tiny())


def write_safetensors(model, folder):
    """The folder of the model with model.safetensors in place of pytorch_model.bin."""
    safetensors = pytest.importorskip("safetensors.torch")
    model.save_pretrained(folder)
    path = folder / "pytorch_model.bin"
    safetensors.save_file(torch.load(path), folder / "model.safetensors")
    path.unlink()


def test_safetensors_are_preferred_and_never_passed_over(tmp_path, monkeypatch):
    write_safetensors(tiny(2), tmp_path)
    assert same_weights(GPT.from_pretrained(tmp_path), tiny(2)), "model.safetensors alone"
    tiny(1).save_pretrained(tmp_path / "older")
    (tmp_path / "older" / "pytorch_model.bin").rename(tmp_path / "pytorch_model.bin")
    assert same_weights(GPT.from_pretrained(tmp_path), tiny(2)), "pytorch_model.bin was read"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    with pytest.raises(ImportError, match="safetensors"):
        GPT.from_pretrained(tmp_path)


def test_damaged_safetensors_are_refused(tmp_path):
    write_safetensors(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", b"torn", whole[:99], whole[:-99]):
        path.write_bytes(damaged)
        refused(tmp_path, path)


STALE = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
         "generation_config.json"]  # fmt: skip


def test_what_transformers_would_prefer_is_removed_once_ours_is_there(tmp_path, monkeypatch):
    """config.json comes last: where it is, the weights are complete."""
    for name in [*STALE, "tokenizer.json"]:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    present = {}
    replace_file = os.replace

    def spy(source, target):
        present[Path(target).name] = set(os.listdir(tmp_path))
        replace_file(source, target)

    monkeypatch.setattr("os.replace", spy)
    tiny().save_pretrained(tmp_path)
    assert list(present) == ["pytorch_model.bin", "config.json"]
    assert set(STALE) < present["pytorch_model.bin"], "removed before ours is there"
    assert "pytorch_model.bin" in present["config.json"]
    assert set(os.listdir(tmp_path)) == {"config.json", "pytorch_model.bin", "tokenizer.json"}


BIN = "pytorch_model.bin"
CONFIG = "config.json"
NOT_GPT2 = {  # what is changed in config.json, and whether Python's error is behind it (or either)
    "another width": ({"n_embd": 32}, True),
    "more layers": ({"n_layer": 9}, True),
    "fewer layers": ({"n_layer": 1}, True),
    "heads that do not divide the width": ({"n_head": 3}, None),
    "a width that is a text": ({"n_embd": "16"}, None),
    "no heads": ({"n_head": 0}, None),
    "another activation": ({"activation_function": "relu"}, False),
    "the exact GELU": ({"activation_function": "gelu"}, False),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, False),
    "an untied head": ({"tie_word_embeddings": False}, False),
    "attention without its scale": ({"scale_attn_weights": False}, False),
    "attention with another scale": ({"scale_attn_by_inverse_layer_idx": True}, False),
}


@pytest.mark.parametrize("case", NOT_GPT2)
def test_another_config_is_refused(case, tmp_path):
    change, caused = NOT_GPT2[case]
    tiny().save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(config), encoding="utf-8")
    said = refused(tmp_path, tmp_path, caused)
    if caused is False:
        assert str(path) in said
        for key, value in change.items():
            assert key in said
            assert str(value) in said


def test_one_activation_has_two_names(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["activation_function"] = "gelu_pytorch_tanh"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert same_weights(GPT.from_pretrained(tmp_path), tiny())


@pytest.mark.parametrize("content", [b"", b"torn", b"[1]", b"{", b"\xff", b"7", b"null"])
def test_a_damaged_config_is_refused(content, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    refused(tmp_path, tmp_path / CONFIG)


@pytest.mark.parametrize("name", [BIN, CONFIG])
def test_a_missing_file_is_named(name, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        GPT.from_pretrained(tmp_path)
    assert error.value.filename == str(tmp_path / name)


WRONG_WEIGHTS = {  # what is changed among the weights, and whether Python's error is behind it
    "a missing one": ({"transformer.ln_f.bias": None}, True),
    "one too many": ({"transformer.h.0.more": torch.ones(1)}, True),
    "a text": ({"transformer.wpe.weight": "text"}, True),
    "an untied head": ({"lm_head.weight": torch.ones(7, 16)}, False),
    "a head of another size": ({"lm_head.weight": torch.ones(8, 16)}, False),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_other_weights_are_refused(case, tmp_path):
    change, caused = WRONG_WEIGHTS[case]
    tiny().save_pretrained(tmp_path)
    state = torch.load(tmp_path / BIN) | change
    kept = {name: value for name, value in state.items() if value is not None}
    torch.save(kept, tmp_path / BIN)
    said = refused(tmp_path, tmp_path, caused)
    if not caused:
        assert "lm_head" in said


@pytest.mark.parametrize("damage", ["empty", "torn", "half", "code"])
def test_damaged_weights_are_refused(damage, tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / BIN
    whole = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "torn":
        path.write_bytes(b"torn")
    elif damage == "half":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save({"code": Evil(str(tmp_path / "it ran"))}, path)
    refused(tmp_path, path)
    assert not (tmp_path / "it ran").exists(), "the file's code ran: weights_only is off"


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_a_programming_error_keeps_its_traceback(method, tmp_path, monkeypatch):
    """A class rewrites a layer; its TypeError is not a file that cannot be read."""
    tiny().save_pretrained(tmp_path)

    def mine(*_):
        return "a text" + 1

    monkeypatch.setattr(MLP, method, mine)
    with pytest.raises(TypeError, match="str"):
        GPT.from_pretrained(tmp_path)(torch.tensor([[1]]))


# save, save_text, save_json, load

WRITERS = {  # what is written first, and then
    save: ({"step": 1}, {"step": 2}),
    save_text: ("1", "2"),
    save_json: ([1], [2]),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(write, error, tmp_path, monkeypatch):
    """Whether it fails while it writes, here after half of it, or when it renames."""
    path = tmp_path / "file"
    old, new = WRITERS[write]
    write(old, path)
    assert os.listdir(tmp_path) == ["file"]
    before = path.read_bytes()

    def half(_, target):
        write_half(target)
        raise error

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", half)
        patch.setattr("os.replace", fail)
        with pytest.raises(type(error)):
            write(new, str(path))
    assert path.read_bytes() == before, "the old file is damaged"
    write(new, path)
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["file"], "what the crash left is gone"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_named(write, tmp_path):
    """Torch closes a file that it could not write, and its second error hides the first."""
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    state = {"weights": torch.zeros(100_000)}
    with pytest.raises(OSError, match="No space left on device") as raised:
        write({save: state, save_text: "1", save_json: 1}[write], tmp_path / "file")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "file").exists()


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "file"
    save({"step": 1, "weight": torch.ones(2)}, path)
    found = load(path)
    assert found["step"] == 1
    assert found["weight"].tolist() == [1.0, 1.0]
    save_json({"loss": "ünlikely"}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": "ünlikely"}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    save_text("naïve\n", path)
    assert path.read_text(encoding="utf-8") == "naïve\n"


def test_what_cannot_be_loaded_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="checkpoint.pt"):
        load(path)
    torch.save({"code": Evil(str(tmp_path / "it ran"))}, path)
    for content in (path.read_bytes(), b"", b"torn\n" * 99):
        path.write_bytes(content)
        with pytest.raises(OSError) as error:
            load(path)
        assert str(error.value).startswith(f"{path} cannot be read: ")
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is not None
    assert not (tmp_path / "it ran").exists(), "the file's code ran"
