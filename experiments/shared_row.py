"""One row a pair: the prompt is computed once, and both responses hang off it.

The root gives a pair two plain rows, so its prompt runs through the model twice. Here a pair is one
row, [prompt | chosen | rejected], and the tokens with which both responses begin are shared too.
How much faster that makes a training step is measured by experiments/bench.py.

The price is three times the code, most of it index arithmetic, and a forward pass of its own with
positions and a mask. The mask is dense, which rules out the flash kernel on a GPU.
tests/test_shared_row.py proves that log-probs and gradients equal those of the plain rows.

B pairs, T places in a row, C channels, V vocabulary, N scored tokens, M places that predict them.
A *place* counts the tokens of a row, a *position* those of prompt + response, as wpe wants it.
"""

from os.path import commonprefix
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import dpo


class Batch(NamedTuple):
    """B pairs as B rows; for each of N response tokens, where it is predicted and whose it is."""

    ids: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T, T), True where place i sees place j
    at: torch.Tensor  # (M,), places in the flattened (B * T), which alone get logits; M <= N
    predicted_by: torch.Tensor  # (N,), which of the M rows of logits scores the target
    targets: torch.Tensor  # (N,), token ids
    owner: torch.Tensor  # (N,), i for chosen response i, B + i for rejected response i

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in self))


def collate(rows, pair_ids):
    """The TokenPairs rows[i] for i in pair_ids -> Batch, each row [prompt | chosen | rejected].

    The trunk is the prompt and the tokens with which both responses begin. A response sees the
    trunk and itself, never the other response. Its positions continue the trunk's. The mask:

                   trunk  chosen  rejected
        trunk        \\                           \\ = causal: itself and what came before
        chosen      all      \\
        rejected    all      -       \\           - = nothing

    Four traps. (1) The last prompt token predicts the first token of both responses: one row of
    logits, two targets. So does each shared token. (2) A response's last token is scored but never
    fed, since nothing follows it. (3) Padding must see something: attention to nothing is 0/0, a
    NaN. (4) T may exceed the model's block. Positions do not, if padding does not count on.
    """
    B = len(pair_ids)
    ids = []
    positions = []
    forks = []
    places = []
    targets = []
    owner = []
    for i, pair_id in enumerate(pair_ids):
        pair = rows[pair_id]
        prompt = pair.prompt
        chosen = pair.chosen
        rejected = pair.rejected
        assert prompt, "the last prompt token predicts the first response token: no prompt, no row"
        begin = commonprefix([chosen[:-1], rejected[:-1]])
        rest_of_chosen = chosen[len(begin) : -1]
        rest_of_rejected = rejected[len(begin) : -1]
        row = prompt + begin + rest_of_chosen + rest_of_rejected
        trunk = len(prompt) + len(begin)
        fork = trunk + len(rest_of_chosen)  # here rejected leaves the trunk
        position = torch.arange(len(row))
        position[fork:] -= len(rest_of_chosen)
        ids.append(torch.tensor(row))
        positions.append(position)
        forks.append((trunk, fork))

        path_of_chosen = list(range(fork))
        path_of_rejected = list(range(trunk)) + list(range(fork, len(row)))
        paths = [(i, path_of_chosen, chosen), (B + i, path_of_rejected, rejected)]
        for whose, path, response in paths:
            predicting = path[len(prompt) - 1 :]  # each place predicts the next token
            places += predicting[: len(response)]
            targets += response
            owner += [whose] * len(response)

    ids = pad_sequence(ids, batch_first=True)  # with zeros
    positions = pad_sequence(positions, batch_first=True)
    T = ids.shape[1]
    mask = torch.ones(B, T, T, dtype=torch.bool).tril()
    for i, (trunk, fork) in enumerate(forks):
        mask[i, fork:, trunk:fork] = False  # rejected does not see chosen
    owner = torch.tensor(owner)
    flattened = owner % B * T + torch.tensor(places)
    at, predicted_by = flattened.unique(return_inverse=True)
    return Batch(ids, positions, mask, at, predicted_by, torch.tensor(targets), owner)


def response_logps(model, batch):
    """log pi(y|x), summed over response tokens, in nats: chosen (B,), rejected (B,); 0 where a pair
    has no rejected response. In at least float32.
    """
    B = len(batch.ids)
    logits = dpo.at_least_float32(forward(model, batch))  # (M, V)
    logps = logits.log_softmax(-1)
    logps = logps[batch.predicted_by, batch.targets]  # (N,)
    sums = logps.new_zeros(2 * B).index_add(0, batch.owner, logps)
    return sums.chunk(2)


def forward(model, batch):
    """model.GPT's forward pass, written out for positions and a mask: logits (M, V) at batch.at."""
    x = model.wte(batch.ids) + model.wpe(batch.positions)  # (B, T, C)
    mask = batch.mask[:, None]  # (B, 1, T, T): the same for all heads
    heads = (3, model.config.n_head, -1)
    for block in model.h:
        qkv = block.attn.c_attn(block.ln_1(x)).unflatten(-1, heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, C / n_head)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.head(x.flatten(0, 1)[batch.at])
