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
from test_dpo import dpo, expect, gpt

V, END = 5, 0  # the end token is id 0, which is what collate pads with: pad id == end id
ROWS = [  # prompts and responses of different lengths
    TokenPair([3, 1, 4], [2, 2, 4, END], [1, END]),
    TokenPair([2], [END], [4, 3, END]),  # a response that is the end token alone
    TokenPair([1, 1, 2, 3, 4, 4], [3, END], [END]),
    TokenPair([4, 2], [1, END], [1, 3, 2, 2, 1, END]),
    TokenPair([2, 3], [1, 1, 4, 2, END], [1, 1, 2, END]),  # both begin alike
    TokenPair([1], [4, 2, 3], [4, 2, END]),  # as long as the toy world allows: no end token
    TokenPair([3, 3, 3], [1, 2, END], [1, 2, END]),  # equal
    TokenPair([2], [3], [END]),  # the shortest rows
]
SFT = [row._replace(rejected=[]) for row in ROWS]
ORDERS = [0, 1, 2, 3, 4, 5, 6, 7], [2, 0, 7, 4, 3, 6, 1, 5], [5, 5, 1], [3], [7]


def one_at_a_time(model, rows, order):
    """The slow oracle: no batch, no mask, no padding, a token after the other. All chosen first."""
    texts = [(rows[i].prompt, rows[i].chosen) for i in order]
    texts += [(rows[i].prompt, rows[i].rejected) for i in order if rows[i].rejected]
    totals = []
    for prompt, response in texts:
        total = torch.zeros((), dtype=torch.float64)
        for k, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:k]]))[0, -1]
            total = total + logits[token] - logits.logsumexp(-1)
        totals.append(total)
    return torch.stack(totals)


def mistakes(model, ids, mask, right):
    """What comes out if one thing is wrong."""
    logps = model(ids).log_softmax(-1)
    every = logps[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)  # (R, T-1): of each next token
    same = logps.gather(-1, ids[..., None]).squeeze(-1)
    scored, nowhere = mask[:, 1:], torch.zeros_like(mask[:, :1])
    from_start, up_to_end = scored.cumsum(1) > 0, scored.flip(1).cumsum(1).flip(1) > 0
    last = scored & ~torch.cat([mask[:, 2:], nowhere], 1)
    return {
        "the logits are not shifted: those at t score token t": (same * mask).sum(1),
        "the mask is not shifted with the tokens": (every * mask[:, :-1]).sum(1),
        "the prompt is counted": (every * up_to_end).sum(1),
        "padding is counted": (every * from_start).sum(1),
        "prompt and padding are counted": every.sum(1),
        "the first token is not counted": (every * (scored & mask[:, :-1])).sum(1),
        "the end token is not counted": (every * (scored & ~last)).sum(1),
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
    slow, logps = one_at_a_time(model, rows, order), dpo.response_logps(model, ids, mask)
    why = "log pi(y|x): logits at t predict token t + 1; sum over the response's tokens only"
    expect(logps, slow, why, 1e-9, mistakes(model, ids, mask, slow))
    factors = torch.linspace(-1, 2, len(slow), dtype=torch.float64)
    grads = [torch.autograd.grad(x, list(model.parameters()), factors) for x in (logps, slow)]
    for got, wanted in zip(*grads):
        expect(got, wanted, "the gradient of log pi(y|x): a detach, or another row's?", 1e-9)


def test_all_responses_sum_to_one():
    """Every response there is, among chosen rows and among rejected ones: probability 1 each."""
    model, words = gpt(0), range(1, V)
    responses = [[*y, END] for n in range(3) for y in itertools.product(words, repeat=n)]
    responses += [list(y) for y in itertools.product(words, repeat=3)]  # complete without an end
    for prompt in ([3], [1, 2, 4]):
        rows = [TokenPair(prompt, y, z) for y, z in zip(responses, reversed(responses))]
        logps = dpo.response_logps(model, *data.collate(rows, range(len(rows))))
        why = "pi(y|x) over all y must sum to 1: end token scored? prompt left out? a sum?"
        expect(logps.view(2, -1).exp().sum(1), [1.0, 1.0], why)


def test_padding_changes_nothing():
    """A row alone, beside longer ones, and before more columns, whatever fills them."""
    model, B = gpt(0), len(ROWS)
    ids, mask = data.collate(ROWS, range(B))
    together = dpo.response_logps(model, ids, mask)
    alone = [dpo.response_logps(model, *data.collate(ROWS, [i])) for i in range(B)]
    expect(torch.stack(alone, 1).flatten(), together, "a row alone and beside longer rows")
    filled = torch.where(mask.flip(1).cumsum(1).flip(1) > 0, ids, 3)
    wide = torch.cat([filled, torch.full((2 * B, 2), 4)], 1), torch.nn.functional.pad(mask, (0, 2))
    expect(dpo.response_logps(model, *wide), together, "padding is never scored, nor looked at")


def test_its_arguments_stay_as_they_are():
    ids, mask = data.collate(ROWS, ORDERS[0])
    kept, model = (ids.clone(), mask.clone()), gpt(0)
    first, again = (dpo.response_logps(model, ids, mask) for _ in range(2))
    assert torch.equal(ids, kept[0]) and torch.equal(mask, kept[1]), "it changes ids or mask"
    expect(again, first, "called twice with the same arguments")


class Fixed:
    """A model whose logits (R, T, V) are given, with and without `at`, as model.GPT has it."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, ids, at=None):
        logits = self.logits[:, : ids.shape[1]]
        return logits if at is None else logits.flatten(0, 1)[at]


def test_what_is_impossible_where_nothing_is_scored_does_no_harm():
    """Token 1 of the prompt and the padding have probability 0: neither value nor slope is NaN."""
    ids, mask = torch.tensor([[2, 1, 4, 0]]), torch.tensor([[False, False, True, False]])
    logits = torch.zeros(1, 4, V)
    logits[0, 0, 1] = logits[0, 2, 0] = -torch.inf
    logps = dpo.response_logps(Fixed(logits.requires_grad_()), ids, mask)
    expect(logps.exp(), [1 / V], "a -inf where nothing is scored: use where, 0 * -inf is NaN", 1e-6)
    (slope,) = torch.autograd.grad(logps.sum(), logits)
    wanted = torch.zeros(1, 4, V)
    wanted[0, 1] = torch.tensor([-0.2, -0.2, -0.2, -0.2, 0.8])
    expect(slope, wanted, "the slope of log pi(y|x) where a -inf is not scored", 1e-6)


def test_improbable_tokens_are_summed():
    """Three tokens of probability e^-1000 / (4 + e^-1000): the log of a softmax would be -inf."""
    ids, mask = torch.tensor([[2, 1, 1, 1]]), torch.tensor([[False, True, True, True]])
    logits = torch.zeros(1, 4, V)
    logits[..., 1] = -1000.0
    logps = dpo.response_logps(Fixed(logits.requires_grad_()), ids, mask)
    expect(logps, [3 * (-1000 - math.log(4))], "log_softmax, not log(softmax)", 1e-3)
    (slope,) = torch.autograd.grad(logps.sum(), logits)
    expect(slope[0, 0], [-0.25, 1.0, -0.25, -0.25, -0.25], "its slope", 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_float32(dtype):
    torch.manual_seed(0)
    logits, ids = 5 * torch.randn(2, 400, 50).to(dtype), torch.randint(50, (2, 400))
    mask = torch.arange(400).expand(2, 400) >= 9
    got, exact = (dpo.response_logps(Fixed(x), ids, mask) for x in (logits, logits.double()))
    assert got.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    expect(got / exact, [1.0, 1.0], "bfloat16 is off by whole nats: use at_least_float32", 1e-5)


def test_bfloat16_autocast_gives_the_log_probs_to_1e_3():
    """The whole model under autocast, as --dtype bfloat16 has it, against float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 64, n_layer=2, n_head=2))
    parts = [torch.randint(500, (n,)).tolist() for n in (20, 30, 8, 3, 1, 40)]
    ids, mask = data.collate([TokenPair(*parts[:3]), TokenPair(*parts[3:])], [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        low = dpo.response_logps(model, ids, mask)
    assert low.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    exact = dpo.response_logps(model.double(), ids, mask)
    expect(low / exact, torch.ones(4), "under autocast, relative to float64", 1e-3)
