"""The row that shares its prompt is exact: the log-probs and gradients of two plain rows a pair."""

import pytest
import torch

import data
import dpo
from data import TokenPair
from experiments import shared_row
from tests.helpers import END, ORDERS, ROWS, SFT, expect, gpt, one_at_a_time

ROW = {  # the pair -> ids, positions, and (target, place that predicts it) of chosen, of rejected
    "they differ at once": (
        TokenPair([5, 6], [7, 8, 0], [9, 3, 0]),
        ("567893", "012323", [(7, 1), (8, 2), (0, 3)], [(9, 1), (3, 4), (0, 5)]),
    ),
    "the end token alone": (TokenPair([5], [0], [1, 0]), ("51", "01", [(0, 0)], [(1, 0), (0, 1)])),
    "they begin alike": (  # 7 is fed once, and predicted once for both
        TokenPair([5], [7, 8, 2, 0], [7, 9, 6, 0]),
        ("578296", "012323", [(7, 0), (8, 1), (2, 2), (0, 3)], [(7, 0), (9, 1), (6, 4), (0, 5)]),
    ),
    "equal": (TokenPair([5], [7, 0], [7, 0]), ("57", "01", [(7, 0), (0, 1)], [(7, 0), (0, 1)])),
}


@pytest.mark.parametrize("case", ROW)
def test_row_by_hand(case):
    """Positions are those of prompt + response; places count the row. Alone and beside another."""
    pair, (ids, positions, chosen, rejected) = ROW[case]
    batch = shared_row.collate([pair, TokenPair([1] * 9, [END], [END])], [0, 1])
    T, wide = batch.ids.shape[1], len(ids)
    assert "".join(map(str, batch.ids[0, :wide].tolist())) == ids
    assert "".join(map(str, batch.positions[0, :wide].tolist())) == positions
    assert not batch.positions[0, wide:].any() and not batch.ids[0, wide:].any(), "padding: zeros"
    places = batch.at[batch.predicted_by]
    for whose, wanted in ((0, chosen), (2, rejected), (1, [(END, T + 8)]), (3, [(END, T + 8)])):
        mine = batch.owner == whose
        assert list(zip(batch.targets[mine].tolist(), places[mine].tolist())) == wanted, whose
    assert len(set(batch.at.tolist())) == len(batch.at), "each place gets logits once"


def test_mask_by_hand():
    batch = shared_row.collate([ROW["they differ at once"][0], TokenPair([5], [0], [0])], [0, 1])
    wanted = "100000 110000 111000 111100 110010 110011"  # rejected sees the prompt, not chosen
    assert batch.mask[0].int().tolist() == [list(map(int, row)) for row in wanted.split()]
    assert batch.mask[1].any(-1).all(), "padding that may look at nothing is 0/0, a NaN"
    assert all(x.device.type == "meta" for x in batch.to("meta")), "a tensor stays behind in .to()"
    with pytest.raises(AssertionError, match="no prompt"):
        shared_row.collate([TokenPair([], [1, END], [2, END])], [0])


def shared(model, rows, order):
    """(2, B): chosen, rejected."""
    return torch.stack(shared_row.response_logps(model, shared_row.collate(rows, order)))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_equal_to_one_token_at_a_time(order):
    """Log-probs, and the gradient of every weight."""
    model = gpt(0)
    got, wanted = shared(model, ROWS, order), one_at_a_time(model, ROWS, order).view(2, -1)
    expect(got, wanted, "log pi(y|x): mask, positions or places? See the rows by hand", 1e-9)
    factors = torch.linspace(-1, 2, wanted.numel(), dtype=torch.float64).view(2, -1)
    grads = [torch.autograd.grad(x, list(model.parameters()), factors) for x in (got, wanted)]
    for one, other in zip(*grads):
        expect(one, other, "the gradient: something on the way is detached", 1e-9)


def test_equal_to_two_plain_rows_a_pair():
    """Many drawn rows of two words, so that responses often begin alike."""
    model, random = gpt(0), torch.Generator().manual_seed(0)

    def part():
        length = torch.randint(1, 6, (), generator=random)
        return torch.randint(1, 3, (length,), generator=random).tolist()

    rows = [TokenPair(part(), part() + [END], part() + [END]) for _ in range(50)]
    wanted = dpo.response_logps(model, *data.collate(rows, range(50))).view(2, -1)
    expect(shared(model, rows, range(50)), wanted, "the shared row and two plain rows", 1e-9)
    alone = torch.cat([shared(model, rows, [i]) for i in range(50)], 1)
    expect(alone, wanted, "a row alone and beside longer ones", 1e-9)


def test_a_row_may_be_longer_than_the_block():
    """Only prompt + response must fit: positions do not count on, in rejected or at padding."""
    model = gpt(0)
    n = model.config.n_positions
    rows = [TokenPair([1], [2] * (n - 1), [3] * (n - 1)), *ROWS]
    batch = shared_row.collate(rows, range(len(rows)))
    assert batch.ids.shape[1] > n > batch.positions.max()
    wanted = one_at_a_time(model, rows, range(len(rows))).view(2, -1)
    expect(shared(model, rows, range(len(rows))), wanted, "a row longer than the block", 1e-9)


def test_sft_rows():
    chosen, none = shared(gpt(0), SFT, ORDERS[1])
    expect(chosen, one_at_a_time(gpt(0), SFT, ORDERS[1]), "the plain row's", 1e-9)
    assert not none.any(), "no rejected response, so a sum over no tokens: 0"


def test_low_precision_is_summed_in_float32(monkeypatch):
    exact, got = (shared(model, ROWS, ORDERS[0]) for model in (gpt(0), gpt(0).float()))
    expect(got / exact, torch.ones(2, len(ROWS)), "float32 relative to float64", 1e-5)
    batch = shared_row.collate([TokenPair([1], [2] * 200, [3] * 100)], [0])
    logits = (5 * torch.randn(len(batch.at), 5)).bfloat16()
    monkeypatch.setattr(shared_row, "forward", lambda model, batch: model)
    got, exact = (shared_row.response_logps(x, batch) for x in (logits, logits.double()))
    assert got[0].dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    expect(torch.stack(got) / torch.stack(exact), torch.ones(2, 1), "a long sum in bfloat16", 1e-5)
