"""The transformer: causality, the pair row's arguments, sampling, files."""

import json

import pytest
import torch
from torch.nn import functional as F

from model import PUBLISHED, GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=7, n_positions=10, n_embd=16, n_layer=2, n_head=2))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_a_later_token_changes_no_earlier_logits(model):
    ids = torch.randint(7, (2, 8))
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 7
    assert torch.equal(model(ids)[:, :5], model(other)[:, :5])
    assert not torch.allclose(model(ids)[:, 5], model(other)[:, 5])


def test_plain_mask_positions_and_places_change_nothing(model):
    ids = torch.randint(7, (2, 8))
    causal = torch.ones(8, 8).tril().bool().expand(2, 8, 8)
    plain = model(ids)
    positions = torch.arange(8).expand(2, 8)
    torch.testing.assert_close(model(ids, positions, causal), plain)
    at = torch.tensor([3, 0, 15, 8])
    torch.testing.assert_close(model(ids, score_at=at), plain.flatten(0, 1)[at])


def test_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_samples_follow_the_policy(model):
    """20,000 samples of two tokens against the 49 probabilities, by chi-square."""
    prompt = torch.tensor([[1, 2, 3]])
    drawn = model.generate(prompt.expand(20_000, -1), 2)[:, 3:]
    assert torch.equal(
        prompt.expand(20_000, -1), model.generate(prompt.expand(20_000, -1), 1)[:, :3]
    )
    first = model(prompt)[0, -1].softmax(-1)
    longer = torch.cat([prompt.expand(7, -1), torch.arange(7)[:, None]], 1)
    expected = (20_000 * first[:, None] * model(longer)[:, -1].softmax(-1)).flatten().detach()
    counts = (7 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=49)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 90, (
        f"{chi_square:.0f}; 48 is expected and 84 is exceeded once in 1000 times"
    )


def test_nothing_follows_the_stop_token(model):
    drawn = model.generate(torch.tensor([[1]]).expand(200, -1), 8, stop_token=4)[:, 1:]
    assert drawn.shape == (200, 8)
    for row in drawn.tolist():
        if 4 in row:
            assert set(row[row.index(4) :]) == {4}
    assert any(4 in row for row in drawn.tolist())


def test_temperature_and_top_k(model):
    ids = torch.tensor([[1, 2, 3]])
    logits = model(ids)[0, -1]
    assert model.generate(ids, 1, temperature=0)[0, -1] == logits.argmax()
    many = ids.expand(2000, -1)
    assert set(model.generate(many, 1, top_k=2)[:, -1].tolist()) == set(
        logits.topk(2).indices.tolist()
    )
    share = (model.generate(many, 1, temperature=0.5)[:, -1] == logits.argmax()).double().mean()
    assert abs(share - (2 * logits).softmax(-1).max()) < 0.05
    one = model.generate(many, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, model.generate(many, 3, generator=torch.Generator().manual_seed(3)))


def test_a_batch_is_its_rows_and_the_block_slides(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    together = model.generate(ids, 12, temperature=0)
    assert together.shape == (2, 15), "past n_positions = 10 the oldest tokens are forgotten"
    for i in range(2):
        assert torch.equal(model.generate(ids[i : i + 1], 12, temperature=0)[0], together[i])


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == model.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64), "GPT-2 stores (in, out)"


def test_unreadable_checkpoints_are_one_line(model, tmp_path):
    def refused(says):
        with pytest.raises(OSError) as error:
            GPT.from_pretrained(str(tmp_path))
        assert says in str(error.value) and "\n" not in str(error.value), error.value

    refused("neither a folder")
    (tmp_path / "config.json").write_text("{}")
    refused("neither pytorch_model.bin")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, says in (
        ({"n_embd": 32}, "size mismatch for wte.weight"),
        ({"n_layer": 9}, "h.2.ln_1.weight"),
        ({"n_head": 3}, "n_head"),
        ({"n_head": 0}, "unreadable"),
        ({"n_embd": "16"}, "unreadable"),
        ({"n_embd": -16}, "unreadable"),
        ({"activation_function": "relu"}, "not GPT-2's architecture"),
        ({"tie_word_embeddings": False}, "not GPT-2's architecture"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        refused(says)
    (tmp_path / "config.json").write_text("{")
    refused("unreadable")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"torn")
    refused("unreadable")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("unreadable")
    torch.save([1], tmp_path / "pytorch_model.bin")
    refused("unreadable")


def test_a_torn_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "gpt2.bin").write_bytes(b"torn")
    with pytest.raises(OSError, match="gpt2: unreadable") as error:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value), "which to delete"


def plain_gpt2(weights, ids, heads, layers):
    """GPT-2 written down once more, straight from weights as its checkpoints hold them."""
    C = weights["wte.weight"].shape[1]

    def norm(x, name):
        return F.layer_norm(x, (C,), weights[name + ".weight"], weights[name + ".bias"])

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


def checkpoint(C, layers):
    """Random weights under the names and in the layout of GPT-2's published checkpoints."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (7, C), "wpe.weight": (10, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(layers):
        for name, d_in, d_out in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[f"h.{i}.{name}"] = (C,)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published_shapes(C, layers):
    shapes = {name: tensor.shape for name, tensor in checkpoint(C, layers).items()}
    return shapes | {"wte.weight": (50257, C), "wpe.weight": (1024, C)}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_checkpoints_mean_what_they_say(tmp_path, prefix):
    weights = checkpoint(16, 2)
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    stored |= {
        prefix + "h.0.attn.bias": torch.ones(10, 10),
        "lm_head.weight": weights["wte.weight"],
    }
    torch.save(stored, tmp_path / "pytorch_model.bin")
    shape = {"vocab_size": 7, "n_positions": 10, "n_embd": 16, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"resid_pdrop": 0.1}))
    ids = torch.tensor([1, 5, 2, 6, 0])
    got = GPT.from_pretrained(str(tmp_path))(ids[None])[0]
    torch.testing.assert_close(got, plain_gpt2(weights, ids, 2, 2), rtol=1e-4, atol=1e-4)


def test_published_names(monkeypatch):
    assert all(n_embd // n_head == 64 for n_embd, _, n_head in PUBLISHED.values())
    layers = {name: n_layer for name, (_, n_layer, _) in PUBLISHED.items()}
    assert layers == {"gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48}
    asked = []

    def download(url, **settings):
        asked.append((url, settings["weights_only"]))
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    with pytest.raises(OSError, match="no network"):
        GPT.from_pretrained("gpt2")
    shapes = {name: torch.zeros(shape) for name, shape in published_shapes(8, 3).items()}
    monkeypatch.setitem(PUBLISHED, "tiny", (8, 3, 4))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: shapes)
    tiny = GPT.from_pretrained("tiny").config
    assert (tiny.n_embd, tiny.n_layer, tiny.n_head) == (8, 3, 4)
    assert asked[0][0].endswith("/gpt2/resolve/main/pytorch_model.bin") and asked[0][1]


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    weights = GPT(GPTConfig(500, 64, 64, 2, 2)).state_dict()
    assert abs(weights["wte.weight"].std() - 0.02) < 0.001
    assert abs(weights["h.1.mlp.c_proj.weight"].std() - 0.01) < 0.001, "0.02 / sqrt(2 n_layer)"
    assert not weights["h.0.attn.c_attn.bias"].any() and (weights["ln_f.weight"] == 1).all()


def test_generate_against_a_plain_loop(model):
    ids = wanted = torch.tensor([[1, 2, 3]])
    for _ in range(12):
        likeliest = model(wanted[:, -10:])[:, -1].argmax(-1, keepdim=True)
        wanted = torch.cat([wanted, likeliest], 1)
    assert torch.equal(model.generate(ids, 12, temperature=0), wanted)
    assert model.generate(ids, 1, top_k=100).shape == (1, 4), "more than there are is all"
    stopped = model.generate(ids, 8, temperature=0, stop_token=wanted[0, 3].item())
    assert stopped.shape == (1, 4), "all rows have stopped"
