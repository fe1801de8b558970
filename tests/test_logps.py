"""log pi(y|x) from a real GPT: the plain way, the pair row, and a slow oracle.

DPO_MODULE=my_dpo python -m pytest tests/test_logps.py   grades the log-probs of my_dpo.py
"""

import itertools
import math

import torch

import data
from model import GPT, GPTConfig
from test_dpo import dpo, expect
from test_dpo import gpt as tiny_gpt

V, END = 5, 0  # the end token is id 0, which is what collate pads with: pad id == end id


ROWS = [  # prompts and answers of different lengths; answers that are the end token alone
    data.TokenPair([3, 1, 4], [2, 2, 4, END], [1, END]),
    data.TokenPair([2], [END], [4, 3, END]),
    data.TokenPair([1, 1, 2, 3, 4, 4], [3, END], [END]),
    data.TokenPair([4, 2], [1, END], [1, 3, 2, 2, 1, END]),
    data.TokenPair([2, 3], [1, 1, 4, 2, END], [1, 1, 2, END]),  # both begin alike, then part
    data.TokenPair([1], [4, 2, 3, END], [4, 2, END]),  # one goes on where the other ends
    data.TokenPair([3, 3, 3], [1, 2, END], [1, 2, END]),  # equal
]


def one_at_a_time(model, prompt, answer):
    """The slow oracle: no batch, no mask, no padding, a token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for k, token in enumerate(answer):
        logits = model(torch.tensor([prompt + answer[:k]]))[0, -1]
        total = total + logits[token] - logits.logsumexp(-1)
    return total


def two_rows(model, rows, side):
    """The plain way: a padded row for each answer, then dpo.sequence_logps."""
    texts = [row.prompt + getattr(row, side) for row in rows]
    ids = torch.tensor([text + [END] * (12 - len(text)) for text in texts])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, len(row.prompt) : len(texts[i])] = 1
    return dpo.sequence_logps(model(ids), ids, mask)


def unshifted(model, side):
    """The classic mistake: the logits at t, which predict token t + 1, score token t itself."""
    sums = []
    for row in ROWS:
        ids = torch.tensor(row.prompt + getattr(row, side))
        logps = model(ids[None])[0].log_softmax(-1)
        sums.append(sum(logps[t, ids[t]] for t in range(len(row.prompt), len(ids))))
    return torch.stack(sums)


def test_sequence_logps_is_the_slow_sum():
    model = tiny_gpt(0)

    def slow(cut):
        """The oracle on all rows; `cut` says which part of a row is the answer."""
        parts = [cut(row.prompt, getattr(row, side)) for row in ROWS]
        return torch.stack([one_at_a_time(model, *part) for part in parts])

    for side in ("chosen", "rejected"):
        wanted = slow(lambda x, y: (x, y))
        lengths = torch.tensor([len(getattr(row, side)) for row in ROWS])
        mistakes = {
            "the mask is not shifted with the tokens": slow(
                lambda x, y: (x + y[:1], y[1:] + [END])
            ),
            "the prompt is counted": slow(lambda x, y: (x[:1], x[1:] + y)),
            "the end token is not counted": slow(lambda x, y: (x, y[:-1])),
            "it is a mean over tokens": wanted / lengths,
            "float64 is cast down on the way: see at_least_float32": wanted.float(),
            "the logits are not shifted: those at t score token t": unshifted(model, side),
        }
        why = f"log pi(y|x), {side}: logits at t predict token t + 1; sum the answer's tokens only"
        expect(two_rows(model, ROWS, side), wanted, why, mistakes=mistakes)


def test_sequence_logps_ignores_what_is_masked():
    logits = torch.zeros(1, 3, V)
    logits[0, 0, 1] = -torch.inf  # the prompt's second token is impossible, and nobody asks
    logps = dpo.sequence_logps(
        logits, torch.tensor([[2, 1, 4]]), torch.tensor([[False, False, True]])
    )
    assert not logps.isnan(), "a masked -inf must not turn into NaN: use where, not *"
    expect(logps, [-math.log(V)], "one answer token out of 5 equally likely ones", 1e-6)


def test_sequence_logps_of_bfloat16_are_summed_in_float32():
    torch.manual_seed(0)
    logits, ids = 5 * torch.randn(2, 400, 50).bfloat16(), torch.randint(50, (2, 400))
    mask = torch.ones_like(ids, dtype=torch.bool)
    got, exact = (dpo.sequence_logps(x, ids, mask) for x in (logits, logits.double()))
    assert got.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    expect(got / exact, [1.0, 1.0], "a log-softmax in bfloat16 is off by whole nats", 1e-5)


def test_pair_rows_equal_plain_sequences():
    """One row [prompt | chosen | rejected] gives what two sequences give: values, gradients."""
    model, order, results = tiny_gpt(0), [2, 0, 4, 3, 6, 1, 5], []
    for logps in (
        dpo.response_logps(model, data.collate(ROWS, order)),
        [
            torch.stack(
                [one_at_a_time(model, ROWS[i].prompt, getattr(ROWS[i], side)) for i in order]
            )
            for side in ("chosen", "rejected")
        ],
    ):
        model.zero_grad()
        factors = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.4, 0.9, 1.7])
        factors = torch.stack([factors, -1.3 * factors.flip(0)])
        (factors * torch.stack(list(logps))).sum().backward()
        results.append((*logps, *(parameter.grad.clone() for parameter in model.parameters())))
    why = "the pair row: each answer sees the prompt and itself, positions restart, nothing else"
    for one_row, plain in zip(*results):
        expect(one_row, plain, why, 1e-9)


def test_pair_rows_in_float32():
    results = dpo.response_logps(tiny_gpt(0).float(), data.collate(ROWS, range(len(ROWS))))
    exact = dpo.response_logps(tiny_gpt(0), data.collate(ROWS, range(len(ROWS))))
    for got, wanted in zip(results, exact):
        assert got.dtype == torch.float32
        expect(got / wanted, [1.0] * len(ROWS), "the pair row in float32 against float64", 1e-6)


def test_padding_changes_nothing():
    model = tiny_gpt(0)
    together = torch.stack(dpo.response_logps(model, data.collate(ROWS, range(len(ROWS)))))
    alone = [
        torch.stack(dpo.response_logps(model, data.collate(ROWS, [i]))) for i in range(len(ROWS))
    ]
    expect(together, torch.cat(alone, 1), "a row alone and beside longer rows is the same row")


def test_all_answers_sum_to_one():
    """Every answer there is, through pair rows, chosen and rejected side: probability 1 each."""
    model = tiny_gpt(0)
    words = [token for token in range(V) if token != END]
    answers = [[*y, END] for n in range(3) for y in itertools.product(words, repeat=n)]
    answers += [list(y) for y in itertools.product(words, repeat=3)]  # the world's K: over, no end
    for prompt in ([3], [1, 2, 4]):
        rows = [data.TokenPair(prompt, y, z) for y, z in zip(answers, reversed(answers))]
        for logps in dpo.response_logps(model, data.collate(rows, range(len(rows)))):
            why = "pi(y|x) over all y must sum to 1: end token scored? prompt left out? summed?"
            expect(logps.exp().sum(), 1.0, why)


def test_pair_rows_of_bfloat16_logits_are_summed_in_float32():
    rows = [data.TokenPair([1], [2] * 200, [3] * 100)]
    batch = data.collate(rows, [0])
    torch.manual_seed(0)
    logits = (5 * torch.randn(len(batch.targets), 5)).bfloat16()
    got = dpo.response_logps(lambda *_: logits, batch)
    exact = dpo.response_logps(lambda *_: logits.double(), batch)
    for a, b in zip(got, exact):
        assert a.dtype == torch.float32 and b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


def test_a_row_without_a_second_answer_is_the_plain_sequence():
    """SFT rows: the chosen answer's log-prob is what it is beside a rejected one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(5, 12, 16, 1, 2)).double()
    rows = [data.TokenPair([1, 2], [3, 4, 0], [2, 2, 2, 0]), data.TokenPair([3], [0], [1, 0])]
    alone = [row._replace(rejected=[]) for row in rows]
    both, _ = dpo.response_logps(model, data.collate(rows, [0, 1]))
    chosen, none = dpo.response_logps(model, data.collate(alone, [0, 1]))
    torch.testing.assert_close(chosen, both, rtol=1e-12, atol=0)
    assert not none.any()
    batch = data.collate(alone, [0, 1])
    assert batch.ids.tolist() == [[1, 2, 3, 4], [3, 0, 0, 0]], "nothing is fed but the sequence"


def test_bfloat16_hidden_states_give_the_log_probs_to_1e_3():
    """The head under autocast, on bfloat16 states, against float64 on the very same states."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(5000, 128, 256, 2, 4))
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter) * (parameter.dim() == 2)
    lengths = [(20, 30, 8), (3, 1, 90), (40, 12, 12)]
    rows = [data.TokenPair(*(torch.randint(5000, (n,)).tolist() for n in row)) for row in lengths]
    batch = data.collate(rows, range(3))
    states = model.hidden(batch.ids, batch.positions, batch.mask).detach().bfloat16()
    model.hidden = lambda *_: states
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.stack(dpo.response_logps(model, batch))
    model.double().hidden = lambda *_: states.double()
    exact = torch.stack(dpo.response_logps(model, batch))
    why = "sums of log-probs from bfloat16 states, relative to float64"
    expect(low / exact, torch.ones(2, 3), why, 1e-3)
