"""What dpo.py refuses, its defaults, and its log-probs in low precision."""

import math

import pytest
import torch

import data
import dpo
from model import GPT, GPTConfig

PAIRS = [torch.tensor(x) for x in ([-2.0, -6.0], [-4.0, -1.0], [-3.0, -3.0], [-3.0, -5.0])]


def test_shapes_that_would_broadcast_are_refused():
    """(B, 1) against (B,) would be B * B pairs and a plausible loss."""
    one_wrong = [PAIRS[0], PAIRS[1], PAIRS[2][:, None], PAIRS[3]]
    for function in (dpo.dpo_loss, dpo.dpo_gradient, dpo.describe):
        for bad in (one_wrong, [x[:, None] for x in PAIRS]):
            with pytest.raises(AssertionError):
                function(*bad, beta=0.5)
    with pytest.raises(AssertionError):
        dpo.reward_model_loss(PAIRS[0], PAIRS[1][:, None])
    with pytest.raises(AssertionError):
        dpo.implicit_reward(PAIRS[0], PAIRS[1][:, None], 0.5)
    with pytest.raises(AssertionError):
        dpo.plackett_luce_loss(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(AssertionError):
        dpo.sequence_logps(torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), torch.ones(1, 3))


def test_default_beta_is_the_papers():
    policy, ref = torch.stack(PAIRS[:2], -1), torch.stack(PAIRS[2:], -1)
    assert torch.equal(dpo.dpo_loss(*PAIRS).losses, dpo.dpo_loss(*PAIRS, beta=0.1).losses)
    assert torch.equal(dpo.dpo_gradient(*PAIRS)[0], dpo.dpo_gradient(*PAIRS, beta=0.1)[0])
    assert torch.equal(
        dpo.plackett_luce_loss(policy, ref), dpo.plackett_luce_loss(policy, ref, 0.1)
    )


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive_everywhere(beta):
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="beta"):
        dpo.optimal_policy(zeros, zeros, beta)
    with pytest.raises(ValueError, match="beta"):
        dpo.plackett_luce_loss(zeros, zeros, beta)
    with pytest.raises(ValueError, match="beta"):
        dpo.implicit_reward(zeros, zeros, beta)


def test_describe_by_hand():
    described = dpo.describe(*PAIRS, beta=0.5)
    for key, wanted in {
        "loss": [0.31326169, 3.5297504],
        "margin": [1.0, -3.5],
        "weight": [0.26894142, 0.97068777],
        "accuracy": [1.0, 0.0],
        "chosen_reward": [0.5, -1.5],
        "rejected_reward": [-0.5, 2.0],
        "chosen_logp": [-2.0, -6.0],
        "rejected_logp": [-4.0, -1.0],
    }.items():
        torch.testing.assert_close(described[key], torch.tensor(wanted), msg=key)


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
