"""The bench compares equal work: the same losses, and arithmetic counted as on paper."""

import torch

import data
from experiments import bench
from model import GPT, GPTConfig
from test_dpo import expect


def test_the_contenders_train_alike(tmp_path, monkeypatch):
    """Losses of four steps on equal batches, the remainder of an epoch among them."""
    monkeypatch.setattr(bench, "VOCAB", 300)
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
    prompt, chosen, rejected = (sum(map(len, part)) / 2000 for part in zip(*rows))
    for got, wanted in ((prompt, 44), (chosen, 17), (rejected, 17)):  # the end token is counted
        assert abs(got - wanted) < 1.5, (got, wanted)
    fixed = bench.made_up(2, prompt=5, response=3)
    assert [list(map(len, row)) for row in fixed] == [[5, 3, 3]] * 2


def test_useful_arithmetic_by_hand():
    """A prompt of 2 and responses of 1 and 2 tokens feed 2 + 0 + 1 tokens, and score 3.

    A layer: 24 C^2 a token (12 C^2 weights, multiply and add), and 4 C for each of the 1 + 2 + 3
    looks that the tokens take. The head: 2 C V for each scored token. Backward costs two forwards.
    """
    row, config = data.TokenPair([1, 2], [3], [4, 5]), GPTConfig(bench.VOCAB, 16, 8, 2, 2)
    forward = 2 * (24 * 3 * 8**2 + 4 * 6 * 8) + 2 * 3 * 8 * bench.VOCAB
    expect(bench.useful_flops([row, row], config), 3 * bench.BATCH * forward, "useful flops")
