"""The row that shares its prompt is exact: the log-probs and gradients of plain sequences."""

import itertools

import pytest
import torch

import data
import dpo
from data import TokenPair
from experiments import shared_row
from model import GPT, GPTConfig

V, END = 5, 0  # the end token is id 0, which is what rows are padded with
ROWS = [
    TokenPair([3, 1, 4], [2, 2, 4, END], [1, END]),
    TokenPair([2], [END], [4, 3, END]),  # a response that is the end token alone
    TokenPair([1, 1, 2, 3, 4, 4], [3, END], [END]),
    TokenPair([4, 2], [1, END], [1, 3, 2, 2, 1, END]),
    TokenPair([2, 3], [1, 1, 4, 2, END], [1, 1, 2, END]),  # both begin alike, then part
    TokenPair([1], [4, 2, 3, END], [4, 2, END]),  # one goes on where the other ends
    TokenPair([3, 3, 3], [1, 2, END], [1, 2, END]),  # equal
    TokenPair([1, 2], [3, 3, 1, 4, 1, 2, 2, 4, 1, END], [1, 4, 3, 1, 2, 3, 4, 2, 3, END]),
]
ORDER = [2, 0, 4, 7, 3, 6, 1, 5]


def tiny_gpt(block=24):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, n_positions=block, n_embd=16, n_layer=2, n_head=2)).double()
    for parameter in model.parameters():  # far from the small initialisation, biases included
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def expect(got, wanted, why, mistakes, tolerance=1e-9):
    """Compare; on failure name each mistake that would give what we got."""
    __tracebackhide__ = True  # pytest then points at the test
    got, wanted = torch.as_tensor(got).double(), torch.as_tensor(wanted).double()
    if got.shape == wanted.shape and (got - wanted).abs().max() <= tolerance:  # NaN is no success
        return
    message = f"{why}\n  expected {wanted.tolist()}\n  got      {got.tolist()}"
    for mistake, wrong in mistakes.items():
        wrong = torch.as_tensor(wrong).double()
        if got.shape == wrong.shape and torch.allclose(got, wrong, rtol=0, atol=1e-5):
            message += f"\n  This is what comes out if {mistake}."
    raise AssertionError(message)


def scored(batch):
    """Whose -> [(target, the place in its row that predicts it)], in any order of responses."""
    found, T = {}, batch.ids.shape[1]
    for whose, target, m in zip(batch.owner, batch.targets, batch.predicted_by):
        place = batch.at[m].item() - whose.item() % len(batch.ids) * T
        found.setdefault(whose.item(), []).append((target.item(), place))
    return found


def same_table(got, wanted, mistakes):
    __tracebackhide__ = True
    if got != wanted:
        named = [mistake for mistake, wrong in mistakes.items() if got == wrong]
        why = f"This is what comes out if {named[0]}." if named else "No usual mistake."
        raise AssertionError(f"whose: [(target, place)]\n  expected {wanted}\n  got {got}\n  {why}")


# By hand


def test_row_by_hand():
    """Prompt of 2 tokens, chosen of 3, rejected of 2, beside a shorter row."""
    rows = [TokenPair([5, 6], [7, 8, 0], [9, 0]), TokenPair([5], [0], [1, 0])]
    batch = shared_row.collate(rows, [0, 1])
    mistakes = {
        "the last token of a response is fed: nothing follows it": [
            [5, 6, 7, 8, 0, 9, 0],
            [5, 0, 1, 0, 0, 0, 0],
        ],
        "rejected stands before chosen": [[5, 6, 9, 7, 8], [5, 1, 0, 0, 0]],
    }
    expect(batch.ids, [[5, 6, 7, 8, 9], [5, 1, 0, 0, 0]], "ids: prompt, chosen, rejected", mistakes)
    mistakes = {
        "positions do not restart: rejected follows the prompt, not chosen": (
            [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
        ),
        "positions restart at 0 and not after the prompt": [[0, 1, 2, 3, 0], [0, 0, 0, 0, 0]],
        "positions restart at the last prompt token": [[0, 1, 2, 3, 1], [0, 0, 0, 0, 0]],
        "positions restart one late": [[0, 1, 2, 3, 3], [0, 2, 0, 0, 0]],
        "padding counts on: it leaves the block where a row is long": (
            [[0, 1, 2, 3, 2], [0, 1, 2, 3, 4]]
        ),
    }
    why = "positions: those of prompt + response, 0 at padding"
    expect(batch.positions, [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]], why, mistakes)
    wanted = {
        0: [(7, 1), (8, 2), (0, 3)],
        1: [(0, 0)],
        2: [(9, 1), (0, 4)],
        3: [(1, 0), (0, 1)],
    }

    def moved(by):
        return {whose: [(t, place + by) for t, place in pairs] for whose, pairs in wanted.items()}

    mistakes = {
        "a token is scored where it is fed, one place late": moved(1),
        "a token is scored one place early": moved(-1),
        "the end of chosen predicts the start of rejected: the prompt's last token does": (
            wanted | {2: [(9, 3), (0, 4)]}
        ),
        "rejected is scored as if chosen were not before it": wanted | {2: [(9, 1), (0, 2)]},
        "chosen and rejected are exchanged": {(k + 2) % 4: pairs for k, pairs in wanted.items()},
        "owners alternate: chosen i is i, rejected i is B + i": (
            {0: wanted[0], 1: wanted[2], 2: wanted[1], 3: wanted[3]}
        ),
        "the end token is not scored": {0: wanted[0][:2], 2: wanted[2][:1], 3: wanted[3][:1]},
        "the first token is not scored": {0: wanted[0][1:], 2: wanted[2][1:], 3: wanted[3][1:]},
    }
    same_table(scored(batch), wanted, mistakes)
    why = "at: places that predict, each once, row 1 beginning at 5"
    mistakes = {"a place that predicts two targets is listed twice": [1, 1, 2, 3, 4, 5, 5, 6]}
    expect(batch.at.sort().values, [1, 2, 3, 4, 5, 6], why, mistakes)


def test_mask_by_hand():
    rows = [TokenPair([5, 6], [7, 8, 0], [9, 3, 0]), TokenPair([5], [0], [0])]
    batch = shared_row.collate(rows, [0, 1])
    wanted = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    causal, wanted = torch.ones(6, 6).tril(), torch.tensor(wanted)
    blocks, no_prompt, one_less, one_more, both_ways = (wanted.clone() for _ in range(5))
    blocks[:2, :2] = blocks[2:4, 2:4] = blocks[4:, 4:] = 1
    no_prompt[2:, :2] = 0
    one_less[4:, 1] = 0
    one_more[4:, 3] = 1
    both_ways[:4] = both_ways[4:, 4:] = 1
    mistakes = {
        "rejected sees chosen": causal,
        "everything sees everything": torch.ones(6, 6),
        "it is not causal: a token sees what it is to predict": both_ways,
        "it is not causal inside a block: a token sees what it is to predict": blocks,
        "a response does not see the prompt": no_prompt,
        "rejected does not see the last prompt token": one_less,
        "rejected sees the last token of chosen": one_more,
        "rows and columns are exchanged": wanted.T,
        "a token does not see itself": wanted - torch.eye(6),
    }
    expect(batch.mask[0], wanted, "mask[i, j]: place i sees place j", mistakes)
    assert batch.mask[1].any(-1).all(), "padding that may look at nothing is 0/0, a NaN"


def test_row_whose_responses_begin_alike_by_hand():
    """Prompt 5, responses 7 8 2 0 and 7 9 6 0: 7 is fed once, and predicted once for both."""
    batch = shared_row.collate([TokenPair([5], [7, 8, 2, 0], [7, 9, 6, 0])], [0])
    mistakes = {"the shared beginning is fed twice": [[5, 7, 8, 2, 7, 9, 6]]}
    expect(batch.ids, [[5, 7, 8, 2, 9, 6]], "ids: the shared 7 once", mistakes)
    mistakes = {
        "positions do not restart": [[0, 1, 2, 3, 4, 5]],
        "positions restart after the prompt, not after the shared beginning": [[0, 1, 2, 3, 1, 2]],
        "positions restart one late": [[0, 1, 2, 3, 3, 4]],
    }
    why = "positions: rejected continues the shared beginning"
    expect(batch.positions, [[0, 1, 2, 3, 2, 3]], why, mistakes)
    wanted = {0: [(7, 0), (8, 1), (2, 2), (0, 3)], 1: [(7, 0), (9, 1), (6, 4), (0, 5)]}
    mistakes = {
        "rejected is scored as if it left chosen at once": (
            wanted | {1: [(7, 0), (9, 4), (6, 5), (0, 6)]}
        ),
        "rejected is scored as if chosen were not before it": (
            wanted | {1: [(7, 0), (9, 1), (6, 2), (0, 3)]}
        ),
        "the end of chosen predicts where rejected parts from it": (
            wanted | {1: [(7, 0), (9, 3), (6, 4), (0, 5)]}
        ),
        "the shared beginning is not scored for rejected": wanted | {1: wanted[1][1:]},
        "it is scored for neither": {whose: pairs[1:] for whose, pairs in wanted.items()},
    }
    same_table(scored(batch), wanted, mistakes)
    mistakes = {"a place that predicts two targets is listed twice": [0, 0, 1, 1, 2, 3, 4, 5]}
    expect(batch.at.sort().values, [0, 1, 2, 3, 4, 5], "at: each place once", mistakes)
    wanted = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    no_seven = torch.tensor(wanted)
    no_seven[4:, 1] = 0
    mistakes = {
        "rejected sees the rest of chosen": torch.ones(6, 6).tril(),
        "rejected does not see the shared beginning": no_seven,
    }
    expect(batch.mask[0], wanted, "mask: the shared 7 belongs to both", mistakes)
    equal = shared_row.collate([TokenPair([5], [7, 0], [7, 0])], [0])
    mistakes = {"equal responses share their last token, which is never fed": [[5, 7, 0]]}
    expect(equal.ids, [[5, 7]], "ids: equal responses are one", mistakes)


def test_the_batch_moves_as_a_whole():
    batch = shared_row.collate(ROWS, ORDER).to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch), "a tensor stays behind in .to()"


def test_a_pair_without_a_prompt_is_refused():
    with pytest.raises(AssertionError, match="no prompt"):
        shared_row.collate([TokenPair([], [1, END], [2, END])], [0])


def test_forward_by_hand():
    """Prompt 1 2, chosen 3 4, rejected 2 1, no collate: at each place the logits of model.GPT."""
    model = tiny_gpt()
    chosen, rejected = (model(torch.tensor([ids]))[0] for ids in ([1, 2, 3, 4], [1, 2, 2, 1]))
    wanted = torch.cat([chosen, rejected[2:]])  # (6, V)
    ids, places = torch.tensor([[1, 2, 3, 4, 2, 1]]), torch.arange(6)
    causal = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    mask = causal.clone()
    mask[:, 4:, 2:4] = False
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    unused = dict(predicted_by=None, targets=None, owner=None)

    def logits(**changed):
        batch = shared_row.Batch(ids, positions, mask, at=places, **unused)._replace(**changed)
        return shared_row.forward(model, batch)

    mistakes = {
        "the mask is ignored: rejected sees chosen": logits(mask=causal),
        "positions are ignored": logits(positions=places[None]),
        "mask and positions are ignored": model(ids)[0],
    }
    why = "forward must do as model.GPT does, but for mask and positions: has one of them changed?"
    expect(logits(), wanted, why, mistakes)
    expect(logits(at=places[[4, 1]]), wanted[[4, 1]], "logits at batch.at, in its order", {})


# Log-probs and gradients


def one_at_a_time(model, prompt, response):
    """The slow oracle: no batch, no mask, no padding, one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for k, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:k]]))[0, -1]
        total = total + logits[token] - logits.logsumexp(-1)
    return total


def slow(model, rows, cut=lambda response: response):
    """The oracle on both sides: (2, B)."""
    return torch.stack(
        [
            torch.stack([one_at_a_time(model, row.prompt, cut(row[side])) for row in rows])
            for side in (1, 2)
        ]
    )


def fast(model, rows, pair_ids):
    return torch.stack(shared_row.response_logps(model, shared_row.collate(rows, pair_ids)))


def gradients(model, logps):
    """Of a weighted sum of log-probs (2, B), whose weights let no two terms cancel."""
    factors = torch.linspace(1, 3, logps.numel(), dtype=torch.float64).view_as(logps)
    signs = torch.tensor([[1.0], [-1.0]])  # as in DPO
    return torch.autograd.grad((signs * factors * logps).sum(), list(model.parameters()))


def compare(got, wanted, model, rows, pair_ids, than):
    """Log-probs (2, B) within 1e-9, then the gradients in every parameter."""
    __tracebackhide__ = True
    picked = [rows[i] for i in pair_ids]
    lengths = torch.tensor([[len(row[side]) for row in picked] for side in (1, 2)])
    mistakes = {
        "the end token is not counted": slow(model, picked, lambda response: response[:-1]),
        "chosen and rejected are exchanged": wanted.flip(0),
        "log-probs are averaged, not summed": wanted / lengths,
        "log-probs are negated": -wanted,
        "float64 is cast down on the way: see dpo.at_least_float32": wanted.float(),
        "pair_ids is ignored: row i is not rows[pair_ids[i]]": slow(model, rows[: len(picked)]),
    }
    close = tuple(((got - wanted).abs().amax(1) <= 1e-9).tolist())
    sides = {(True, False): "only rejected is wrong", (False, True): "only chosen is wrong"}
    why = f"log pi(y|x), chosen and rejected: the shared row (got), {than} (expected): "
    why += sides.get(close, "both are wrong") + "; mask, positions or places? See the tests by hand"
    expect(got, wanted, why, mistakes)
    names = [name for name, _ in model.named_parameters()]
    for name, one, other in zip(names, gradients(model, got), gradients(model, wanted)):
        why = f"gradient in {name}; the log-probs are right, so something on the way is detached"
        expect(one, other, why, {})


def test_equal_to_the_slow_sum():
    model = tiny_gpt()
    wanted = slow(model, [ROWS[i] for i in ORDER])
    compare(fast(model, ROWS, ORDER), wanted, model, ROWS, ORDER, "one token at a time")


def test_equal_to_the_plain_rows_of_the_root():
    """On the rows above and on many drawn ones; two words, so that responses often begin alike."""
    model, random = tiny_gpt(), torch.Generator().manual_seed(0)

    def part():
        length = torch.randint(1, 6, (), generator=random)
        return torch.randint(1, 3, (length,), generator=random).tolist()

    rows = ROWS + [TokenPair(part(), part() + [END], part() + [END]) for _ in range(30)]
    pair_ids = torch.randperm(len(rows), generator=random)
    plain = dpo.response_logps(model, *data.collate(rows, pair_ids)).view(2, -1)
    compare(fast(model, rows, pair_ids), plain, model, rows, pair_ids, "two plain rows a pair")


def test_padding_changes_nothing():
    """Also in a batch whose rows are longer than the block: only prompt + response must fit."""
    model, batch = tiny_gpt(block=12), shared_row.collate(ROWS, ORDER)
    assert batch.ids.shape[1] == 20
    why = "positions must not count on, in rejected or at padding: the block has no more"
    assert batch.positions.max() < 12, why
    alone = torch.cat([fast(model, ROWS, [i]) for i in ORDER], 1)
    assert not alone.isnan().any(), "NaN in a row alone"
    why = "a row beside longer rows (got), the same row alone (expected): padding is seen or scored"
    expect(fast(model, ROWS, ORDER), alone, why, {}, 1e-12)


def test_all_responses_sum_to_one():
    """Every response there is, on the chosen and on the rejected side: probability 1 each."""
    model = tiny_gpt()
    words = [token for token in range(V) if token != END]
    responses = [[*y, END] for n in range(3) for y in itertools.product(words, repeat=n)]
    responses += [list(y) for y in itertools.product(words, repeat=3)]  # over without an end
    for prompt in ([3], [1, 2, 4]):
        rows = [TokenPair(prompt, y, z) for y, z in zip(responses, reversed(responses))]
        for side, logps in zip(("chosen", "rejected"), fast(model, rows, range(len(rows)))):
            ends = sum(y[-1] == END for y in responses)
            mistakes = {"every response has probability 1": len(rows), "one with an end": ends}
            why = f"{side}: pi(y|x) over all y must be 1. More: a token unscored, or a mean."
            expect(logps.exp().sum(), 1.0, why + " Less: the prompt is scored.", mistakes)


def test_a_row_without_a_rejected_response_is_the_plain_sequence():
    """SFT rows: the chosen log-prob is what it is beside a rejected response."""
    model, alone = tiny_gpt(), [row._replace(rejected=[]) for row in ROWS]
    batch = shared_row.collate(alone, [0, 1])
    fed = [[3, 1, 4, 2, 2, 4], [2, 0, 0, 0, 0, 0]]
    expect(batch.ids, fed, "nothing is fed but prompt and response, its last token left out", {})
    chosen, none = fast(model, alone, ORDER)
    wanted = dpo.response_logps(model, *data.collate(alone, ORDER))
    expect(chosen, wanted, "the chosen log-prob (got), the plain row's (expected)", {})
    expect(none, torch.zeros(len(ORDER)), "no rejected response, so a sum over no tokens: 0", {})


# Precision


def test_float32_stays_close():
    exact, got = (fast(model, ROWS, ORDER) for model in (tiny_gpt(), tiny_gpt().float()))
    assert got.dtype == torch.float32, got.dtype
    expect(got / exact, torch.ones(2, len(ROWS)), "float32 relative to float64", {}, 1e-5)


def test_bfloat16_logits_are_summed_in_float32(monkeypatch):
    batch = shared_row.collate([TokenPair([1], [2] * 200, [3] * 100)], [0])
    torch.manual_seed(0)
    logits = (5 * torch.randn(len(batch.at), V)).bfloat16()
    monkeypatch.setattr(shared_row, "forward", lambda model, batch: model)
    got, exact = (shared_row.response_logps(x, batch) for x in (logits, logits.double()))
    got, exact = torch.stack(got), torch.stack(exact)
    assert got.dtype == torch.float32, "log-softmax and sums belong in float32 at least"
    why = "a log-softmax in bfloat16 is off by whole nats in a long sum"
    expect(got / exact, torch.ones(2, 1), why, {}, 1e-5)
