"""The bench compares equal work: the same losses, and arithmetic counted as on paper."""

import pytest
import torch

import data
import dpo
from experiments import bench, device
from model import GPT, GPTConfig
from tests.helpers import expect


@pytest.mark.parametrize("batch_size", [8, 16])
def test_the_contenders_train_alike(batch_size, tmp_path, monkeypatch):
    """Losses of four steps on equal batches, eight pairs at a time; the third batch of 8 begins in
    one epoch and ends in the next."""
    monkeypatch.setattr(bench, "VOCAB", 300)
    monkeypatch.setattr(bench, "LR", 1e-3)  # a hundred times the usual, so that a slip shows
    torch.manual_seed(0)
    GPT(GPTConfig(300, 256, 16, 2, 2)).save_pretrained(tmp_path)
    rows = bench.made_up(20)

    def four_losses(contender):
        steps = contender(rows, tmp_path, batch_size, "float32")
        return [next(steps).item() for _ in range(4)]

    ours = four_losses(bench.ours)
    expect(ours[0], 0.6931, "Eq. 7 where policy == reference: log 2", 1e-4)
    assert abs(ours[-1] - ours[0]) > 0.01, f"the policy does not move, so nothing is shown: {ours}"
    for contender in (bench.shared, bench.authors):
        why = f"bench.{contender.__name__} (got) must train on the loss of bench.ours (expected)"
        expect(four_losses(contender), ours, why, 2e-5)


def test_made_up_pairs_are_as_long_as_instructions():
    rows = bench.made_up(2000)
    wanted = {"prompt": 44, "chosen": 17, "rejected": 17}  # the end token is counted
    for part, length in wanted.items():
        mean = sum(len(getattr(row, part)) for row in rows) / len(rows)
        assert abs(mean - length) < 1.5, f"{part}: {mean:.1f} tokens on average, not {length}"


@pytest.mark.parametrize("known", [True, False])
def test_the_column_of_peak_memory_is_left_out_where_it_is_unknown(known, monkeypatch, capsys):
    """As on Windows, which has no module `resource`."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    if known:
        pytest.importorskip("resource", reason="this platform does not tell a process its memory")
        assert bench.peak() > 2**20, "this process fits in a megabyte?"
    else:
        monkeypatch.setattr(bench, "resource", None)
        assert bench.peak() is None
    found = {"ours": {"seconds": [2.0, 2.0], "losses": [0.7, 0.6], "peak": bench.peak()}}
    bench.show(found, speed=1e9, flops=1e9 / 8, batch_size=8, dtype="float32")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, ours = rows
    assert ("peak GB" in head) == known
    assert "| 50% |" in ours, "useful: 8 times 1e9 / 8 flop in 2 seconds, of 1e9 in one"
    for row in rows:
        assert row.count("|") == head.count("|"), f"not as many cells as heads: {row}"


def test_useful_arithmetic_by_hand():
    """A prompt of 2 and responses of 1 and 2 tokens feed 2 + 0 + 1 tokens, and score 3.

    A layer: 24 C^2 a token (12 C^2 weights, multiply and add), and 4 C for each of the 1 + 2 + 3
    looks that the tokens take. The head: 2 C V for each scored token. Backward costs two forwards.
    """
    row = data.TokenPair([1, 2], [3], [4, 5])
    C = 8
    config = GPTConfig(bench.VOCAB, 16, C, n_layer=2, n_head=2)
    layer = 24 * 3 * C**2 + 4 * 6 * C
    head = 2 * 3 * C * bench.VOCAB
    wanted = 3 * (2 * layer + head)
    why = "useful flops of a pair: a mean over rows, times 3 for forward and backward"
    expect(bench.useful_flops([row, row], config), wanted, why)


def test_the_device_check_passes_here_and_can_fail(monkeypatch, capsys):
    """Log-probs and gradients on the CPU, in each dtype; then with a mean in place of sums."""
    monkeypatch.setattr(bench, "VOCAB", 300)
    monkeypatch.setattr(device, "failed", [])
    device.exact("cpu")
    assert device.failed == []
    assert capsys.readouterr().out.count("ok ") == 6, "log-probs and gradients, in three dtypes"
    right = dpo.response_logps

    def mean_in_float32(model, ids, mask):
        logps = right(model, ids, mask)
        if next(model.parameters()).dtype == torch.float32:
            logps = logps / mask.sum(1)
        return logps

    monkeypatch.setattr(dpo, "response_logps", mean_in_float32)
    device.exact("cpu")
    assert len(device.failed) == 6, f"means pass as sums; only these were found: {device.failed}"


@pytest.mark.parametrize("name, n", [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_parameters_of_the_published_models(name, n):
    n_embd, n_layer, _ = device.PUBLISHED[name]
    assert device.parameters(n_embd, n_layer) == n, "12 C^2 + 13 C a layer, (V + T) C, 2 C"


def kept_for_backward(n_layer, ids, mask):
    """Bytes that autograd keeps in a forward pass, the weights apart, counted by its hooks."""
    model = GPT(GPTConfig(300, 64, 128, n_layer, 2))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}
    alive = []  # so that no address is used twice

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        dpo.response_logps(model, ids, mask)
    return sum(sizes.values())


def test_memory_of_a_step_by_formula():
    """Two layers more, so that what the embeddings and the head keep cancels."""
    ids = torch.randint(300, (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, -16:] = True
    measured = kept_for_backward(4, ids, mask) - kept_for_backward(2, ids, mask)
    tokens = 4 * 63  # the last token is fed to nothing
    _, of_four = device.step_bytes(128, 4, tokens, 0, "float32")
    _, of_two = device.step_bytes(128, 2, tokens, 0, "float32")
    why = "bytes that a layer keeps, measured by autograd's hooks, over device.step_bytes"
    expect(measured / (of_four - of_two), 1.0, why, 0.01)


def test_the_check_of_deep_logits_passes_here_and_can_fail(monkeypatch, capsys):
    monkeypatch.setattr(bench, "VOCAB", 300)
    monkeypatch.setattr(device, "failed", [])
    device.masks("cpu")
    device.deep_logits("cpu")
    assert device.failed == []
    assert capsys.readouterr().out.count("ok ") == 5

    def head_in_autocast(self, x):
        return self.ln_f(x) @ self.wte.weight.T

    monkeypatch.setattr(GPT, "head", head_in_autocast)
    device.deep_logits("cpu")  # under autocast the product is in bfloat16
    assert "logits near -100, bfloat16, log-probs, nats" in device.failed
