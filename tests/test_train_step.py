"""A step of DPO, and one of SFT, seen from outside: what train.py writes, against a plain loop.

The policy of a step must differ from the reference: where they are equal, every weight is 1/2, and
many mistakes look right. So a run is resumed from a checkpoint whose weights these tests have put
there. AdamW's first moment then holds the gradient. (The weights after a first step would not do:
AdamW divides by the size of the gradient, so that half a loss makes the same step.)
"""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from data import Pair, TokenPair
from model import GPT, GPTConfig, load
from tests.helpers import before_each_step, expect, lines_of, one_at_a_time, run, write_lines

ROOT = Path(__file__).resolve().parents[1]
BETA = 0.5
LR = 0.002
PAIRS = [  # prompt, chosen, rejected: prompt and responses together are of six different lengths
    ("Say yes. ", "Yes", "No"),
    ("Hi ", "Hello", "?"),
    ("1+1=", "2", "11"),
    ("A or B? ", "B", "A, I say"),
    ("A", "b", "c"),
    ("Go on ", "to C", "to D, E"),
]
END = 256  # of the tokenizer "bytes", in which every other token is a byte
ROWS = []
for prompt, chosen, rejected in PAIRS:
    row = TokenPair(
        list(prompt.encode()), list(chosen.encode()) + [END], list(rejected.encode()) + [END]
    )
    ROWS.append(row)
BY_LENGTH = [4, 2, 1, 0, 5, 3]  # the order of a batch of all pairs; only messages depend on it


def small_gpt(seed):
    """A GPT for bytes, far from GPT-2's small initial weights, with biases that are not 0."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=257, n_positions=24, n_embd=8, n_layer=2, n_head=2))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def both_logps(model, rows=ROWS):
    """log pi(y|x) of both responses of all rows, (2, n), from one token after the other."""
    return one_at_a_time(model, rows, range(len(rows))).view(2, -1)


def eq7(logps, ref_logps, beta=BETA):
    """Eq. 7 written out: two (2, n), chosen first -> (n,)."""
    chosen_rewards, rejected_rewards = beta * (logps - ref_logps)
    return (1 + (rejected_rewards - chosen_rewards).exp()).log()


def gradient(loss, model):
    """Of all parameters, as one vector."""
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def inputs(folder, seed):
    """Write the pairs, and a model to start from. Returns the flags for both."""
    pairs = [Pair(*texts)._asdict() for texts in PAIRS]
    write_lines(folder / "pairs.jsonl", pairs)
    small_gpt(seed).save_pretrained(folder / "init")
    flags = ["--data", folder / "pairs.jsonl", "--init", folder / "init", "--tokenizer", "bytes"]
    return flags + ["--held-out", 0, "--batch-size", len(PAIRS)]


def prepare(folder):
    """A run of one step, in folder/out. Its checkpoint gets another policy, and no step done."""
    flags = inputs(folder, seed=1)
    flags += "--sft-epochs 0 --epochs 1 --save-every 1 --max-grad-norm 1e9".split()
    flags += ["--beta", BETA, "--lr", LR]
    run(*flags, "--out", folder / "out")
    checkpoint = load(folder / "out/checkpoint.pt")
    checkpoint["step"] = 0
    checkpoint["model"] = small_gpt(seed=0).state_dict()
    checkpoint["optimizer"]["state"] = {}
    checkpoint["history"] = checkpoint["history"][:1]
    torch.save(checkpoint, folder / "out/checkpoint.pt")
    return folder / "out"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def away(prepared, tmp_path):
    """A copy of the folder that `prepare` makes, to be resumed."""
    return shutil.copytree(prepared, tmp_path / "away")


class Policy(NamedTuple):
    logps: torch.Tensor  # (2, n), chosen first
    jacobian: torch.Tensor  # (2 n, W): the gradient of each with respect to all W weights


@pytest.fixture(scope="module")
def policy():
    model = small_gpt(seed=0).double()
    logps = both_logps(model)
    grads = [gradient(logp, model) for logp in logps.flatten()]
    return Policy(logps.detach().requires_grad_(), torch.stack(grads))


def weight_gradient(loss, policy):
    """Of a loss that is a function of the policy's log-probs: the chain rule. (W,)."""
    (slope,) = torch.autograd.grad(loss, policy.logps, retain_graph=True)
    return slope.flatten() @ policy.jacobian


@pytest.fixture(scope="module")
def ref_logps():
    return both_logps(small_gpt(seed=1).double()).detach()


def first_moment(out):
    """What AdamW's first moment in checkpoint.pt makes of the gradient of a first step."""
    checkpoint = load(out / "checkpoint.pt")
    assert checkpoint["step"] == 1
    state = checkpoint["optimizer"]["state"]
    moments = [state[index]["exp_avg"].flatten() for index in range(len(state))]
    return torch.cat(moments) / (1 - 0.9)  # beta_1 is GPT-3's 0.9


# Eq. 7


def check_first_step(out, policy, ref_logps, micro, processes=1):
    """All that a first step on all pairs leaves behind, whatever its micro-batches."""
    losses = eq7(policy.logps, ref_logps)
    wanted = weight_gradient(losses.mean(), policy)
    wrong = wrong_losses(policy.logps, ref_logps, micro, processes)
    mistakes = {mistake: weight_gradient(loss, policy) for mistake, loss in wrong.items()}
    why = "The gradient of a step is not that of the mean of Eq. 7 over the batch."
    got = first_moment(out)
    expect(got, wanted, why, 1e-5 * wanted.abs().max(), mistakes)

    _, line = lines_of(out)
    norm = wanted.norm().item()
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5), "of the gradient, before clipping"
    loss = losses.mean().item()
    assert line["loss"] == pytest.approx(loss, rel=1e-5), "the mean of Eq. 7 over the batch"
    chosen_logp, rejected_logp = policy.logps.mean(1).tolist()
    assert line["chosen_logp"] == pytest.approx(chosen_logp, rel=1e-5)
    assert line["rejected_logp"] == pytest.approx(rejected_logp, rel=1e-5)


def wrong_losses(logps, ref_logps, micro, processes):
    """What is minimised instead of the mean if one thing is wrong."""
    n = len(PAIRS)
    losses = eq7(logps, ref_logps)
    own = losses[BY_LENGTH][::processes]  # those of the first process
    parts = own.split(micro)
    means = torch.stack([part.mean() for part in parts])
    by_position = ref_logps[:, [i % micro for i in range(n)]]
    return {
        "the losses are summed, not averaged": losses.sum(),
        "the mean is divided by the number of micro-batches again": losses.mean() / len(parts),
        "a micro-batch is divided by its own pairs, not by those of the batch": means.sum(),
        "a micro-batch is divided by its own pairs and by those of the batch": means.sum() / n,
        "a short last micro-batch weighs as much as a full one": means.mean(),
        "only the last micro-batch counts": parts[-1].sum() / len(own),
        "a process looks at its own pairs only": own.mean(),
        "every process's loss is divided by the pairs of all": losses.mean() / processes,
        "the reference is another pair's": eq7(logps, ref_logps[:, BY_LENGTH]).mean(),
        "the reference's position in the micro-batch counts": eq7(logps, by_position).mean(),
        "chosen and rejected are exchanged": eq7(logps.flip(0), ref_logps.flip(0)).mean(),
        "the reference's chosen and rejected are exchanged": eq7(logps, ref_logps.flip(0)).mean(),
        "the reference is left out": eq7(logps, 0 * ref_logps).mean(),
        "the policy is its own reference, so that every weight is 1/2":
            eq7(logps, logps.detach()).mean(),
        "beta is missing": eq7(logps, ref_logps, beta=1).mean(),
    }  # fmt: skip


@pytest.mark.parametrize("micro", [1, 2, 4, 6, 7])
def test_a_step_takes_the_gradient_of_the_mean_of_eq7(micro, away, policy, ref_logps):
    resumed = run("--resume", "--micro-batch-size", micro, "--out", away)
    assert resumed.warned == []
    check_first_step(away, policy, ref_logps, micro)


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro", [(2, 2), (2, 3), (3, 1)])
def test_so_do_several_processes(processes, micro, away, policy, ref_logps):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py"]
    command += ["--resume", "--micro-batch-size", str(micro), "--out", away]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    check_first_step(away, policy, ref_logps, micro, processes)


def test_the_metrics_of_a_step(away, policy, ref_logps):
    """By hand. The chosen reward of some pairs is the lower one, so the accuracy is a fraction."""
    run("--resume", "--micro-batch-size", 4, "--out", away)
    rewards = BETA * (policy.logps.detach() - ref_logps)  # (5)
    margins = rewards[0] - rewards[1]
    right = (margins > 0).sum().item()
    assert 0 < right < len(PAIRS)
    assert margins.abs().min() > 1e-3, "else rounding would decide"
    wanted = {
        "chosen_reward": rewards[0].mean().item(),
        "rejected_reward": rewards[1].mean().item(),
        "margin": margins.mean().item(),
        "accuracy": right / len(PAIRS),
        "weight": torch.sigmoid(-margins).mean().item(),  # sigma(r_rejected - r_chosen)
        "lr": LR,
        "step": 1,
    }
    _, line = lines_of(away)
    assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_a_long_gradient_is_clipped(away, policy, ref_logps):
    """It keeps its direction. The logged norm is that before clipping."""
    run("--resume", "--max-grad-norm", 0.1, "--out", away)
    whole = weight_gradient(eq7(policy.logps, ref_logps).mean(), policy)
    norm = whole.norm().item()
    assert norm > 0.2, "else there is nothing to clip"
    assert lines_of(away)[1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    clipped = whole * (0.1 / norm)
    mistakes = {
        "it is not clipped": whole,
        "it is scaled up": whole / 0.1,
        "every number is clipped by itself": whole.clamp(-0.1, 0.1),
    }
    why = "The gradient is not scaled to the length of --max-grad-norm."
    tolerance = 1e-4 * clipped.abs().max()
    expect(first_moment(away), clipped, why, tolerance, mistakes)


def adamw_by_hand(model, loss_of, rates, max_norm=1e9):
    """Train a model with AdamW as Loshchilov and Hutter write it, without weight decay.

    GPT-3's betas. Returns the losses and the norms of the gradients before clipping.
    """
    losses = []
    norms = []
    first = 0
    second = 0
    for step, lr in enumerate(rates, start=1):
        loss = loss_of(model)
        grad = gradient(loss, model)
        norm = grad.norm().item()
        losses.append(loss.item())
        norms.append(norm)
        grad = grad * min(1, max_norm / norm)
        first = 0.9 * first + 0.1 * grad
        second = 0.95 * second + 0.05 * grad**2
        size = (second / (1 - 0.95**step)).sqrt() + 1e-8
        change = lr * (first / (1 - 0.9**step)) / size
        for parameter, part in zip(model.parameters(), split_like(change, model)):
            parameter.data -= part
    return losses, norms


def split_like(vector, model):
    """One vector -> tensors of the shapes of the model's parameters."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = vector.split(sizes)
    return [part.view_as(parameter) for part, parameter in zip(parts, model.parameters())]


def expect_weights(folder, model, why):
    """To 1e-4. The biases of the keys are left out: softmax does not see them, so that their
    gradient is mere rounding, of which Adam makes whole steps."""
    written = GPT.from_pretrained(folder).state_dict()
    for name, wanted in model.state_dict().items():
        got = written[name]
        if name.endswith("c_attn.bias"):
            query, _, value = got.chunk(3)
            got = torch.cat([query, value])
            query, _, value = wanted.chunk(3)
            wanted = torch.cat([query, value])
        tolerance = 1e-4 * wanted.abs().max()
        expect(got, wanted, f"{why}: {name}", tolerance)


@pytest.mark.parametrize("max_norm", [1e9, 1.0])
def test_three_steps_of_adamw(max_norm, away, ref_logps):
    """Each with a gradient of its own: nothing of the step before is left in it."""
    flags = ["--epochs", 3, "--micro-batch-size", 4, "--max-grad-norm", max_norm]
    run("--resume", *flags, "--out", away)
    model = small_gpt(seed=0).double()

    def mean_loss(model):
        return eq7(both_logps(model), ref_logps).mean()

    rates = [LR, LR, LR / 2]  # a step of warm-up, then a linear decay
    losses, norms = adamw_by_hand(model, mean_loss, rates, max_norm)
    assert max(norms) > 1.5, "else a norm of 1 would clip nothing"
    lines = lines_of(away)[1:]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    expect_weights(away / "policy", model, "Three steps of AdamW on the mean of Eq. 7")
    first, _ = adamw_by_hand(small_gpt(seed=1).double(), mean_loss, [1e-9])
    assert first == pytest.approx([math.log(2)]), "The run's reference is the model of --init"


# SFT


@pytest.mark.parametrize("micro", [1, 4, 6])
def test_three_steps_of_sft(micro, tmp_path):
    """Minus the mean of log pi(y|x) over the chosen responses: a sum over tokens, in nats."""
    chosen_only = [row._replace(rejected=[]) for row in ROWS]

    def mean_loss(model):
        return -one_at_a_time(model, chosen_only, range(len(PAIRS))).mean()

    flags = inputs(tmp_path, seed=0)
    flags += ["--sft-epochs", 3, "--sft-lr", LR, "--epochs", 1, "--lr", 1e-30]
    flags += ["--max-grad-norm", 3, "--micro-batch-size", micro]
    seen = []

    def look(optimizer):
        grads = [parameter.grad.flatten() for parameter in optimizer.param_groups[0]["params"]]
        seen.append(torch.cat(grads))

    with before_each_step(look):
        printed = run(*flags, "--out", tmp_path / "out").printed
    assert len(seen) == 3 + 1, "three steps of SFT and one of DPO"
    model = small_gpt(seed=0).double()
    whole = gradient(mean_loss(model), model)
    wanted = whole * (3 / whole.norm())
    tolerance = 1e-4 * wanted.abs().max()
    mistakes = {
        "it is not clipped": whole,
        "the loss is a mean over tokens": sft_gradient_per_token(model, chosen_only),
    }
    expect(seen[0], wanted, "SFT's first gradient, clipped", tolerance, mistakes)
    losses, norms = adamw_by_hand(model, mean_loss, [LR, LR, LR / 2], max_norm=3)
    assert norms[0] > 4, "else there is nothing to clip"
    shown = re.findall(r"^SFT ./3.*loss ([\d.]+)", printed, re.MULTILINE)
    shown = [float(number) for number in shown]
    assert shown == pytest.approx(losses, abs=2e-3), "SFT's loss is the mean of -log pi(y|x)"
    expect_weights(tmp_path / "out/reference", model, "Three steps of SFT")


def sft_gradient_per_token(model, rows):
    lengths = torch.tensor([len(row.chosen) for row in rows])
    logps = one_at_a_time(model, rows, range(len(rows)))
    return gradient(-(logps / lengths).mean(), model)


def test_without_steps_that_move_anything_the_model_stays(tmp_path):
    """The reference is what --init names, to the last bit, and so is the policy."""
    flags = inputs(tmp_path, seed=0)
    flags += "--sft-epochs 0 --epochs 2 --lr 1e-30".split()
    run(*flags, "--out", tmp_path / "out")
    for name, wanted in small_gpt(seed=0).state_dict().items():
        for folder in ("reference", "policy"):
            got = GPT.from_pretrained(tmp_path / "out" / folder).state_dict()[name]
            assert torch.equal(got, wanted), f"{folder}: {name}"


@pytest.mark.parametrize("flag", ["adamw", "rmsprop"])
def test_optimizers(flag, tmp_path):
    """AdamW with GPT-3's betas, or the paper's RMSprop. DPO has an optimizer of its own."""
    seen = []
    flags = inputs(tmp_path, seed=0) + "--sft-epochs 1 --epochs 1 --optimizer".split()
    with before_each_step(seen.append):
        run(*flags, flag, "--out", tmp_path / "out")
    sft = seen[0]
    dpo = seen[-1]
    assert sft is not dpo
    kinds = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    for optimizer in (sft, dpo):
        assert type(optimizer) is kinds[flag]
        assert optimizer.defaults["weight_decay"] == 0
        if flag == "adamw":
            assert optimizer.defaults["betas"] == (0.9, 0.95)


# Which pairs are in which step


def pairs_of(line, logps, size):
    """The pairs of a step, recognised by their mean log-probs, which are in metrics.jsonl."""
    wanted = torch.tensor([line["chosen_logp"], line["rejected_logp"]])
    for ids in itertools.combinations_with_replacement(range(len(PAIRS)), size):
        means = logps[:, list(ids)].mean(1)
        if torch.allclose(means.float(), wanted, rtol=1e-5):
            return list(ids)
    raise AssertionError(f"no {size} pairs have the mean log-probs {wanted.tolist()}")


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_every_pair_meets_its_own_reference(micro, away, policy, ref_logps):
    """Three batches of four: two epochs of six pairs. The second begins within the second batch.

    The learning rate is as good as 0, so that every step sees the policy of the checkpoint.
    """
    flags = ["--batch-size", 4, "--micro-batch-size", micro, "--epochs", 2, "--lr", 1e-30]
    run("--resume", *flags, "--out", away)
    logps = policy.logps.detach()
    losses = eq7(logps, ref_logps)
    rewards = BETA * (logps - ref_logps)
    margins = rewards[0] - rewards[1]
    lines = lines_of(away)[1:]
    seen = []
    for line in lines:
        ids = pairs_of(line, logps, size=4)
        seen += ids
        loss = losses[ids].mean().item()
        why = f"not the loss of the pairs {ids}: is the reference that of other pairs?"
        assert line["loss"] == pytest.approx(loss, rel=1e-5), why
        margin = margins[ids].mean().item()
        assert line["margin"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    counts = [seen.count(pair) for pair in range(6)]
    assert counts == [2, 2, 2, 2, 2, 2], "in two epochs every pair comes twice"


def order_of(prepared, folder, policy, seed):
    """The pairs of three epochs, one by one."""
    out = shutil.copytree(prepared, folder)
    flags = ["--batch-size", 1, "--epochs", 3, "--lr", 1e-30, "--seed", seed]
    run("--resume", *flags, "--out", out)
    order = []
    for line in lines_of(out)[1:]:
        order += pairs_of(line, policy.logps.detach(), size=1)
    return order


def test_the_seed_decides_the_order_and_every_epoch_has_every_pair(prepared, tmp_path, policy):
    order = order_of(prepared, tmp_path / "one", policy, seed=0)
    own_stream = torch.Generator().manual_seed(0 + 2)  # corpus and pairs have 0 and 1
    first_epoch = torch.randperm(6, generator=own_stream).tolist()
    assert order[:6] == first_epoch, "the order of batches is drawn with --seed + 2"
    torch.manual_seed(9)  # no other generator has a say
    assert order_of(prepared, tmp_path / "again", policy, seed=0) == order
    assert order_of(prepared, tmp_path / "other", policy, seed=1) != order
    epochs = [order[:6], order[6:12], order[12:]]
    for epoch in epochs:
        assert sorted(epoch) == [0, 1, 2, 3, 4, 5]
    assert epochs[0] != epochs[1] != epochs[2], "every epoch has an order of its own"


# Precision


def test_reference_and_policy_are_scored_in_one_precision(prepared, tmp_path):
    """So that every reward is 0, to the last digit, where policy and reference are the same."""
    lines = {}
    for dtype in ("float32", "bfloat16"):
        out = shutil.copytree(prepared, tmp_path / dtype)
        (out / "checkpoint.pt").unlink()  # the policy is the reference again
        run("--resume", "--dtype", dtype, "--lr", 1e-30, "--epochs", 2, "--out", out)
        lines[dtype] = lines_of(out)[1:]
        for line in lines[dtype]:
            assert line["loss"] == pytest.approx(math.log(2), abs=1e-5), "policy == reference"
            rewards = [line["chosen_reward"], line["rejected_reward"]]
            assert rewards == pytest.approx([0, 0], abs=1e-3)
        for weight in load(out / "checkpoint.pt")["model"].values():
            assert weight.dtype == torch.float32, "the weights stay in float32"
    for line, coarse in zip(lines["float32"], lines["bfloat16"]):
        away = abs(line["chosen_logp"] - coarse["chosen_logp"])
        assert 1e-4 < away < 0.5, "bfloat16 is used, and not for whole log-probs"
