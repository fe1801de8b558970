"""log pi(y|x) from a real GPT, against one token at a time; and what the usual mistakes give.

DPO_MODULE=my_dpo python -m pytest tests/test_logps.py     grades response_logps of my_dpo.py
"""

import itertools
import math

import pytest
import torch

import data
from data import TokenPair
from model import GPT, GPTConfig
from tests.helpers import END, ORDERS, ROWS, SFT, Fixed, expect, gpt, load_dpo, one_at_a_time

dpo = load_dpo()
V = 5


def mistakes(model, ids, mask, right):
    """What comes out if one thing is wrong."""
    logps = model(ids).log_softmax(-1)
    following = ids[:, 1:, None]
    every = logps[:, :-1].gather(-1, following).squeeze(-1)  # (R, T-1): of each next token
    unshifted = logps.gather(-1, ids[..., None]).squeeze(-1)
    before = mask[:, :-1]
    scored = mask[:, 1:]
    after = torch.nn.functional.pad(mask[:, 2:], (0, 1))
    from_its_start = scored.cumsum(1) > 0
    up_to_its_end = scored.flip(1).cumsum(1).flip(1) > 0
    return {
        "the logits are not shifted: those at t score token t": (unshifted * mask).sum(1),
        "the mask is not shifted with the tokens": (every * before).sum(1),
        "the prompt is counted": (every * up_to_its_end).sum(1),
        "padding is counted": (every * from_its_start).sum(1),
        "prompt and padding are counted": every.sum(1),
        "the first token is not counted": (every * (scored & before)).sum(1),
        "the end token is not counted": (every * (scored & after)).sum(1),
        "it is a mean over tokens": right / mask.sum(1),
        "the minus of a loss is before it": -right,
        "float64 is cast down on the way: see at_least_float32": right.float(),
        "chosen and rejected rows are exchanged": right.roll(len(right) // 2),
    }


@pytest.mark.parametrize("rows", [ROWS, SFT], ids=["pairs", "SFT"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_response_logps_is_the_slow_sum(rows, order):
    """Values, and the gradient of every weight."""
    model = gpt(0)
    ids, mask = data.collate(rows, order)
    slow = one_at_a_time(model, rows, order)
    logps = dpo.response_logps(model, ids, mask)
    why = "log pi(y|x): logits at t predict token t + 1; sum over the response's tokens only"
    expect(logps, slow, why, 1e-9, mistakes(model, ids, mask, slow))
    weights = list(model.parameters())
    factors = torch.linspace(-1, 2, len(slow), dtype=torch.float64)
    grads = torch.autograd.grad(logps, weights, factors)
    slow_grads = torch.autograd.grad(slow, weights, factors)
    for grad, wanted in zip(grads, slow_grads):
        expect(grad, wanted, "the gradient of log pi(y|x): a detach, or another row's?", 1e-9)


def test_float64_stays_float64():
    model = gpt(0)
    ids, mask = data.collate(ROWS, [0, 1])
    assert dpo.response_logps(model, ids, mask).dtype == torch.float64, "see at_least_float32"


def test_all_responses_sum_to_one():
    """Every response there is, among chosen rows and among rejected ones: probability 1 each."""
    model = gpt(0)
    words = range(1, V)
    responses = []
    for n in range(3):
        for response in itertools.product(words, repeat=n):
            responses.append([*response, END])
    for response in itertools.product(words, repeat=3):
        responses.append(list(response))  # complete without an end
    for prompt in ([3], [1, 2, 4]):
        rows = []
        for chosen, rejected in zip(responses, reversed(responses)):
            rows.append(TokenPair(prompt, chosen, rejected))
        ids, mask = data.collate(rows, range(len(rows)))
        total = dpo.response_logps(model, ids, mask).view(2, -1).exp().sum(1)
        why = "pi(y|x) over all y must sum to 1: end token scored? prompt left out? a sum?"
        expect(total, [1.0, 1.0], why)


def test_padding_changes_nothing():
    """A row alone, beside longer ones, and before more columns, whatever fills them."""
    model = gpt(0)
    B = len(ROWS)
    ids, mask = data.collate(ROWS, range(B))
    together = dpo.response_logps(model, ids, mask)
    for i in range(B):
        alone_ids, alone_mask = data.collate(ROWS, [i])
        alone = dpo.response_logps(model, alone_ids, alone_mask)
        expect(alone, together[[i, B + i]], "a row alone and beside longer rows")
    is_padding = mask.flip(1).cumsum(1).flip(1) == 0
    filled = ids.masked_fill(is_padding, 3)
    wide_ids = torch.nn.functional.pad(filled, (0, 2), value=4)
    wide_mask = torch.nn.functional.pad(mask, (0, 2))
    wide = dpo.response_logps(model, wide_ids, wide_mask)
    expect(wide, together, "padding is never scored, nor looked at")


def test_its_arguments_stay_as_they_are():
    ids, mask = data.collate(ROWS, ORDERS[0])
    kept_ids = ids.clone()
    kept_mask = mask.clone()
    model = gpt(0)
    first = dpo.response_logps(model, ids, mask)
    again = dpo.response_logps(model, ids, mask)
    assert torch.equal(ids, kept_ids), "it changes ids"
    assert torch.equal(mask, kept_mask), "it changes mask"
    expect(again, first, "called twice with the same arguments")


def test_a_row_without_a_response_is_0():
    """Beside another row, and alone: a sum over no tokens."""
    model = gpt(0)
    ids = torch.tensor([[2, 3, 4], [2, 3, 1]])
    mask = torch.tensor([[False, False, False], [False, True, True]])
    logps = dpo.response_logps(model, ids, mask)
    expect(logps[0], 0.0, "a sum over no tokens")
    beside = one_at_a_time(model, [TokenPair([2], [3, 1], [])], [0])
    expect(logps[1:], beside, "a row beside one without a response", 1e-9)
    expect(dpo.response_logps(model, ids[:1], mask[:1]), [0.0], "no token in the whole batch")


def test_what_is_impossible_where_nothing_is_scored_does_no_harm():
    """Token 1 of the prompt and the padding have probability 0: neither value nor slope is NaN."""
    ids = torch.tensor([[2, 1, 4, 0]])
    mask = torch.tensor([[False, False, True, False]])
    logits = torch.zeros(1, 4, V)
    logits[0, 0, 1] = -torch.inf
    logits[0, 2, 0] = -torch.inf
    logits.requires_grad_()
    logps = dpo.response_logps(Fixed(logits), ids, mask)
    expect(logps.exp(), [1 / V], "a -inf where nothing is scored: use where, 0 * -inf is NaN", 1e-6)
    (slope,) = torch.autograd.grad(logps.sum(), logits)
    wanted = torch.zeros(1, 4, V)
    wanted[0, 1] = torch.tensor([-0.2, -0.2, -0.2, -0.2, 0.8])
    expect(slope, wanted, "the slope of log pi(y|x) where a -inf is not scored", 1e-6)


def test_improbable_tokens_are_summed():
    """Three tokens of probability e^-1000 / (4 + e^-1000): the log of a softmax would be -inf."""
    ids = torch.tensor([[2, 1, 1, 1]])
    mask = torch.tensor([[False, True, True, True]])
    logits = torch.zeros(1, 4, V)
    logits[..., 1] = -1000.0
    logits.requires_grad_()
    logps = dpo.response_logps(Fixed(logits), ids, mask)
    expect(logps, [3 * (-1000 - math.log(4))], "log_softmax, not log(softmax)", 1e-3)
    (slope,) = torch.autograd.grad(logps.sum(), logits)
    expect(slope[0, 0], [-0.25, 1.0, -0.25, -0.25, -0.25], "its slope", 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_float32(dtype):
    torch.manual_seed(0)
    logits = 5 * torch.randn(2, 400, 50).to(dtype)
    ids = torch.randint(50, (2, 400))
    mask = torch.arange(400).expand(2, 400) >= 9
    got = dpo.response_logps(Fixed(logits), ids, mask)
    exact = dpo.response_logps(Fixed(logits.double()), ids, mask)
    assert got.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    expect(got / exact, [1.0, 1.0], "bfloat16 is off by whole nats: use at_least_float32", 1e-5)


def test_bfloat16_autocast_gives_the_log_probs_to_1e_3():
    """The whole model under autocast, as --dtype bfloat16 has it, against float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 64, n_layer=2, n_head=2))
    parts = [torch.randint(500, (n,)).tolist() for n in (20, 30, 8, 3, 1, 40)]
    rows = [TokenPair(*parts[:3]), TokenPair(*parts[3:])]
    ids, mask = data.collate(rows, [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        low = dpo.response_logps(model, ids, mask)
    assert low.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    exact = dpo.response_logps(model.double(), ids, mask)
    expect(low / exact, torch.ones(4), "under autocast, relative to float64", 1e-3)
