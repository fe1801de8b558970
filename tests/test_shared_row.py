"""The row that shares its prompt is exact: the log-probs and gradients of two plain rows a pair."""

from typing import NamedTuple

import pytest
import torch

import data
import dpo
from data import TokenPair
from experiments import shared_row
from tests.helpers import END, ORDERS, ROWS, SFT, expect, gpt, one_at_a_time


class ByHand(NamedTuple):
    """A pair and its row. Scored tokens are (target, the place in the row that predicts it)."""

    pair: TokenPair
    ids: list
    positions: list
    chosen: list
    rejected: list


ROW = {
    "they differ at once": ByHand(
        pair=TokenPair([5, 6], [7, 8, 0], [9, 3, 0]),
        ids=[5, 6, 7, 8, 9, 3],
        positions=[0, 1, 2, 3, 2, 3],
        chosen=[(7, 1), (8, 2), (0, 3)],
        rejected=[(9, 1), (3, 4), (0, 5)],
    ),
    "the end token alone": ByHand(
        pair=TokenPair([5], [0], [1, 0]),
        ids=[5, 1],
        positions=[0, 1],
        chosen=[(0, 0)],
        rejected=[(1, 0), (0, 1)],
    ),
    "they begin alike": ByHand(  # 7 is fed once, and predicted once for both
        pair=TokenPair([5], [7, 8, 2, 0], [7, 9, 6, 0]),
        ids=[5, 7, 8, 2, 9, 6],
        positions=[0, 1, 2, 3, 2, 3],
        chosen=[(7, 0), (8, 1), (2, 2), (0, 3)],
        rejected=[(7, 0), (9, 1), (6, 4), (0, 5)],
    ),
    "equal": ByHand(
        pair=TokenPair([5], [7, 0], [7, 0]),
        ids=[5, 7],
        positions=[0, 1],
        chosen=[(7, 0), (0, 1)],
        rejected=[(7, 0), (0, 1)],
    ),
}


@pytest.mark.parametrize("case", ROW)
def test_row_by_hand(case):
    """Positions are those of prompt + response; places count the row. Beside a longer row."""
    row = ROW[case]
    longer = TokenPair([1] * 9, [END], [END])
    batch = shared_row.collate([row.pair, longer], [0, 1])
    T = batch.ids.shape[1]
    padding = [0] * (T - len(row.ids))
    assert batch.ids[0].tolist() == row.ids + padding, "the row is [prompt | chosen | rejected]"
    why = "rejected counts on from the trunk, as chosen does; padding has position 0"
    assert batch.positions[0].tolist() == row.positions + padding, why

    places = batch.at[batch.predicted_by]  # in the two rows, one after the other
    last_of_prompt = T + 8  # of the longer row, whose responses are the end token alone
    wanted = {
        "chosen, pair 0": row.chosen,
        "chosen, pair 1": [(END, last_of_prompt)],
        "rejected, pair 0": row.rejected,
        "rejected, pair 1": [(END, last_of_prompt)],
    }
    for owner, (name, scored) in enumerate(wanted.items()):
        mine = batch.owner == owner
        targets = batch.targets[mine].tolist()
        got = list(zip(targets, places[mine].tolist()))
        assert got == scored, f"{name}: a token is predicted at the place before it in its response"
    assert len(batch.at.unique()) == len(batch.at), "a place gets logits once, also for two targets"


def test_mask_by_hand():
    differ = ROW["they differ at once"].pair
    batch = shared_row.collate([differ, TokenPair([5], [0], [0])], [0, 1])
    wanted = [
        [1, 0, 0, 0, 0, 0],  # the prompt
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # chosen
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # rejected sees the prompt, not chosen
        [1, 1, 0, 0, 1, 1],
    ]
    assert batch.mask[0].int().tolist() == wanted, "who sees whom, row by row"
    assert batch.mask[1].any(-1).all(), "padding that may look at nothing is 0/0, a NaN"


def test_a_batch_moves_as_a_whole():
    batch = shared_row.collate(ROWS, [0, 1])
    for name, tensor in batch.to("meta")._asdict().items():
        assert tensor.device.type == "meta", f"Batch.to() leaves {name} behind"


def test_a_row_needs_a_prompt():
    """Its last token predicts the first one of both responses."""
    with pytest.raises(AssertionError, match="no prompt"):
        shared_row.collate([TokenPair([], [1, END], [2, END])], [0])


def shared(model, rows, order):
    """(2, B): chosen, rejected."""
    batch = shared_row.collate(rows, order)
    return torch.stack(shared_row.response_logps(model, batch))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_equal_to_one_token_at_a_time(order):
    """Log-probs, and the gradient of every weight."""
    model = gpt(0)
    got = shared(model, ROWS, order)
    wanted = one_at_a_time(model, ROWS, order).view(2, -1)
    why = "log pi(y|x) of the shared row: mask, positions or places? See the rows by hand"
    expect(got, wanted, why, 1e-9)

    factors = torch.linspace(-1, 2, wanted.numel(), dtype=torch.float64).view(2, -1)
    weights = list(model.parameters())
    got = torch.autograd.grad(got, weights, factors)
    wanted = torch.autograd.grad(wanted, weights, factors)
    for (name, _), one, other in zip(model.named_parameters(), got, wanted):
        expect(one, other, f"the gradient of {name}: something on the way is detached", 1e-9)


def test_equal_to_two_plain_rows_a_pair():
    """Many drawn rows of two words, so that responses often begin alike."""
    model = gpt(0)
    random = torch.Generator().manual_seed(0)

    def words():
        length = torch.randint(1, 6, (), generator=random)
        return torch.randint(1, 3, (length,), generator=random).tolist()

    rows = []
    for _ in range(50):
        rows.append(TokenPair(words(), words() + [END], words() + [END]))
    everyone = range(len(rows))
    ids, mask = data.collate(rows, everyone)
    wanted = dpo.response_logps(model, ids, mask).view(2, -1)
    expect(shared(model, rows, everyone), wanted, "the shared row and two plain rows", 1e-9)
    alone = torch.cat([shared(model, rows, [i]) for i in everyone], dim=1)
    expect(alone, wanted, "a row alone, which longer rows pad above", 1e-9)


def test_a_row_may_be_longer_than_the_block():
    """Only prompt + response must fit: positions do not count on, in rejected or at padding."""
    model = gpt(0)
    n = model.config.n_positions
    longest = TokenPair([1], [2] * (n - 1), [3] * (n - 1))
    rows = [longest, *ROWS]
    everyone = range(len(rows))
    batch = shared_row.collate(rows, everyone)
    assert batch.ids.shape[1] > n, "this test's row is not longer than the block"
    assert batch.positions.max() < n, "a position beyond the block: wpe has no row for it"
    wanted = one_at_a_time(model, rows, everyone).view(2, -1)
    expect(shared(model, rows, everyone), wanted, "a row longer than the block", 1e-9)


def test_sft_rows():
    model = gpt(0)
    chosen, none = shared(model, SFT, ORDERS[1])
    wanted = one_at_a_time(model, SFT, ORDERS[1])
    expect(chosen, wanted, "log pi(y|x) of a row without a rejected response", 1e-9)
    expect(none, torch.zeros(len(SFT)), "no rejected response: a sum over no tokens is 0")


def test_low_precision_is_summed_in_float32(monkeypatch):
    """A long sum of log-probs, of logits in bfloat16."""
    batch = shared_row.collate([TokenPair([1], [2] * 200, [3] * 100)], [0])
    torch.manual_seed(0)
    logits = (5 * torch.randn(len(batch.at), 5)).bfloat16()

    def forward(model, batch):
        return model

    monkeypatch.setattr(shared_row, "forward", forward)
    got = torch.stack(shared_row.response_logps(logits, batch))
    exact = torch.stack(shared_row.response_logps(logits.double(), batch))
    assert got.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    expect(got / exact, torch.ones(2, 1), "a long sum in bfloat16, relative to float64", 1e-5)
