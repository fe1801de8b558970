"""The transformer: causality, the pair row's arguments, sampling, files."""

import json

import pytest
import torch

from model import GPT, GPTConfig


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
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    refused("another shape")
    (tmp_path / "config.json").write_text("{")
    refused("unreadable")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"torn")
    refused("unreadable")
