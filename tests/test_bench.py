"""The bench compares equal work: the same losses, and arithmetic counted as on paper."""

import torch

import data
import dpo
from experiments import bench, device
from model import GPT, GPTConfig
from tests.helpers import expect


def test_the_contenders_train_alike(tmp_path, monkeypatch):
    """Losses of four steps on equal batches, the remainder of an epoch among them."""
    monkeypatch.setattr(bench, "VOCAB", 300)
    monkeypatch.setattr(bench, "MICRO", 3)  # pairs at a time
    monkeypatch.setattr(bench, "LR", 1e-3)  # a hundred times the usual, so that a slip shows
    torch.manual_seed(0)
    GPT(GPTConfig(300, 256, 16, 2, 2)).save_pretrained(tmp_path)
    rows = bench.made_up(20)
    runs = [contender(rows, tmp_path, 8) for contender in (bench.ours, bench.shared, bench.authors)]
    ours, shared, theirs = ([next(run).item() for _ in range(4)] for run in runs)
    expect(ours[0], 0.6931, "policy == reference: log 2", 1e-4)
    assert abs(ours[-1] - ours[0]) > 0.01, f"the policy has moved: {ours}"
    for other in (shared, theirs):
        expect(other, ours, "two rows a pair and one row a pair are one method", 2e-5)


def test_made_up_pairs_are_as_long_as_instructions():
    rows = bench.made_up(2000)
    prompt, chosen, rejected = (sum(map(len, part)) / 2000 for part in list(zip(*rows))[:3])
    for got, wanted in ((prompt, 44), (chosen, 17), (rejected, 17)):  # the end token is counted
        assert abs(got - wanted) < 1.5, (got, wanted)
    fixed = bench.made_up(2, prompt=5, response=3)
    assert [list(map(len, row[:3])) for row in fixed] == [[5, 3, 3]] * 2


def test_useful_arithmetic_by_hand():
    """A prompt of 2 and responses of 1 and 2 tokens feed 2 + 0 + 1 tokens, and score 3.

    A layer: 24 C^2 a token (12 C^2 weights, multiply and add), and 4 C for each of the 1 + 2 + 3
    looks that the tokens take. The head: 2 C V for each scored token. Backward costs two forwards.
    """
    row, config = data.TokenPair([1, 2], [3], [4, 5]), GPTConfig(bench.VOCAB, 16, 8, 2, 2)
    forward = 2 * (24 * 3 * 8**2 + 4 * 6 * 8) + 2 * 3 * 8 * bench.VOCAB
    expect(bench.useful_flops([row, row], config), 3 * bench.BATCH * forward, "useful flops")


def test_the_device_check_passes_here_and_can_fail(monkeypatch, capsys):
    """Log-probs and gradients on the CPU, in each dtype; then with a mean in place of sums."""
    monkeypatch.setattr(bench, "VOCAB", 300)
    monkeypatch.setattr(device, "failed", [])
    device.exact("cpu")
    assert not device.failed and capsys.readouterr().out.count("ok ") == 6
    right = dpo.response_logps

    def mean(model, ids, mask):
        wrong = next(model.parameters()).dtype == torch.float32
        return right(model, ids, mask) / (mask.sum(1) if wrong else 1)

    monkeypatch.setattr(dpo, "response_logps", mean)
    device.exact("cpu")
    assert len(device.failed) == 6, "log-probs and gradients, three times"


def test_memory_of_a_step_by_formula():
    """Parameters of the published models; what autograd keeps in a layer, counted by its hooks."""
    for name, n in (("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)):
        n_embd, n_layer, _ = device.PUBLISHED[name]
        assert device.parameters(n_embd, n_layer) == n
    ids = torch.randint(300, (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, -16:] = True

    def kept(n_layer):
        model, sizes = GPT(GPTConfig(300, 64, 128, n_layer, 2)), {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        alive = []  # so that no address is used twice

        def pack(tensor):
            alive.append(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dpo.response_logps(model, ids, mask)
        return sum(sizes.values())

    tokens = 4 * 63
    two_layers = [device.step_bytes(128, n_layer, tokens, 0, "float32")[1] for n_layer in (2, 4)]
    expect((kept(4) - kept(2)) / (two_layers[1] - two_layers[0]), 1.0, "bytes a layer keeps", 0.01)


def test_the_check_of_deep_logits_passes_here_and_can_fail(monkeypatch, capsys):
    monkeypatch.setattr(bench, "VOCAB", 300)
    monkeypatch.setattr(device, "failed", [])
    device.masks("cpu")
    device.deep_logits("cpu")
    assert not device.failed and capsys.readouterr().out.count("ok ") == 5
    monkeypatch.setattr(GPT, "head", lambda self, x: self.ln_f(x) @ self.wte.weight.T)
    device.deep_logits("cpu")  # under autocast the product is in bfloat16
    assert "logits near -100, bfloat16, log-probs, nats" in device.failed
