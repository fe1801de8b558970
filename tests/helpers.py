"""What the test files share: the module under test, a comparison, a small GPT, rows of tokens."""

import contextlib
import importlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data import TokenPair
from model import GPT, GPTConfig
from tests.mistakes import complaint


def load_dpo():
    """The module under test: dpo.py, or the file that the environment variable DPO_MODULE names."""
    name = os.environ.get("DPO_MODULE", "dpo").removesuffix(".py")
    module = importlib.import_module(name)
    for value in vars(module).values():
        if getattr(value, "__module__", "") == name:  # a function or class that this file defines
            return module
    raise ImportError(f"{name}.py defines nothing of its own to grade")


def expect(got, expected, why, tolerance=1e-12, mistakes=None):
    """Assert that `got` equals `expected`, entry by entry, to within `tolerance`.

    The message of a failure begins with `why`, which names the equation, and names the mistake if
    `got` is what one of the usual `mistakes` gives: see `complaint`.
    """
    __tracebackhide__ = True  # pytest then points at the line of the test
    message = complaint(got, expected, why, tolerance, mistakes)
    if message:
        raise AssertionError(message)


def descend(loss_of, start):
    """The policy at which a loss is lowest: log-probs (..., Y), found by descent from `start`.

    Adam comes close to the minimum from any start, and Newton's method then finds it to twelve
    digits. Adding a constant to all logits of a policy changes nothing, so the Hessian is singular.
    The step therefore uses its pseudo-inverse.
    """

    def loss_of_logits(logits):
        return loss_of(logits.view_as(start).log_softmax(-1))

    logits = start.flatten().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of_logits(logits).backward()
        optimizer.step()

    logits = logits.detach()
    for _ in range(4):
        gradient = torch.autograd.functional.jacobian(loss_of_logits, logits)
        hessian = torch.autograd.functional.hessian(loss_of_logits, logits)
        logits = logits - torch.linalg.pinv(hessian, rtol=1e-10) @ gradient
    return logits.view_as(start).log_softmax(-1)


def gpt(seed):
    """A tiny GPT in float64, far from GPT-2's small initial weights, with biases that are not 0."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=5, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    model = GPT(config).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def deep_gpt(layers=2):
    """A GPT over bytes whose logits lie near -100, as GPT-2's do. A softmax ignores the shift."""
    torch.manual_seed(0)
    config = GPTConfig(257, 256, n_embd=272, n_layer=layers, n_head=4, eos_token_id=256)
    model = GPT(config)
    directions = torch.linalg.svd(model.wte.weight, full_matrices=True).Vh
    free = directions[-1]  # orthogonal to all 257 embeddings, for there are 272 dimensions
    model.wte.weight += free
    model.ln_f.bias -= 100 * free
    return model


def assert_drawn_from(law, places):
    """Pearson's chi-square test: were `places`, indices (n,), drawn with the probabilities `law`?

    Up to four standard deviations are accepted. Places that are rare are counted together.
    """
    counts = places.bincount(minlength=len(law))
    impossible = counts[law == 0]
    assert not impossible.any(), f"drawn, though impossible: {impossible.tolist()}"
    expected = len(places) * law.double()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=0.1)).sum()
    degrees = len(counts) - 1
    limit = degrees + 4 * (2 * degrees) ** 0.5
    assert chi_square < limit, f"chi-square {chi_square:.0f}, not about {degrees}"


# The vocabulary of `gpt` has five tokens. The end token is id 0, with which collate also pads.
END = 0
ROWS = [  # prompts and responses of different lengths
    TokenPair([3, 1, 4], [2, 2, 4, END], [1, END]),
    TokenPair([2], [END], [4, 3, END]),  # the chosen response is the end token alone
    TokenPair([1, 1, 2, 3, 4, 4], [3, END], [END]),
    TokenPair([4, 2], [1, END], [1, 3, 2, 2, 1, END]),
    TokenPair([2, 3], [1, 1, 4, 2, END], [1, 1, 2, END]),  # both responses begin alike
    TokenPair([1], [4, 2, 3], [4, 2, END]),  # a toy response of full length has no end token
    TokenPair([3, 3, 3], [1, 2, END], [1, 2, END]),  # both responses are equal
    TokenPair([2], [3], [END]),  # the shortest rows
]

SFT = [row._replace(rejected=[]) for row in ROWS]
ORDERS = [  # the rows of a batch
    [0, 1, 2, 3, 4, 5, 6, 7],
    [2, 0, 7, 4, 3, 6, 1, 5],
    [5, 5, 1],
    [3],
    [7],
]


class Fixed:
    """In place of a model: given logits (R, T, V), of every position or of the scored ones."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, ids, scored=None):
        logits = self.logits[:, : ids.shape[1]]
        if scored is None:
            return logits
        return logits[scored]


def one_at_a_time(model, rows, order):
    """log pi(y|x) of every response, without batch, mask or padding: (R,), chosen responses first.

    `order` lists the indices of the rows. A row for SFT has no rejected response.
    """
    pairs = [rows[i] for i in order]
    logps = [token_by_token(model, pair.prompt, pair.chosen) for pair in pairs]
    for pair in pairs:
        if pair.rejected:
            logps.append(token_by_token(model, pair.prompt, pair.rejected))
    return torch.stack(logps)


def token_by_token(model, prompt, response):
    """log pi(y|x) of one response, with a forward pass for each of its tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for position, token in enumerate(response):
        context = torch.tensor([prompt + response[:position]])
        logits = model(context)[0, -1]
        total = total + logits[token] - logits.logsumexp(-1)
    return total


# train.py, seen from outside


class Run(NamedTuple):
    summary: dict  # what train.main returns
    printed: str
    warned: list  # of texts
    rates: list  # the learning rate of every optimizer step, those of SFT first
    figure: Figure  # what curves.png would show; drawing it takes longer than the training


def run(*flags, terminal=False):
    """train.main in this process, which may print to a terminal or not."""
    import train  # here, because most test files do without it

    printed = Terminal() if terminal else io.StringIO()
    rates = []
    figures = []

    def look(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    def savefig(figure, path, **options):
        figures.append(figure)
        Path(path).touch()

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as warned,
        before_each_step(look),
    ):
        warnings.simplefilter("always")
        patch.setattr(Figure, "savefig", savefig)
        patch.setattr(sys, "stdout", printed)
        summary = train.main([str(flag) for flag in flags])
    texts = [str(warning.message) for warning in warned]
    return Run(summary, printed.getvalue(), texts, rates, figures[-1])


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self):
        return True


@contextlib.contextmanager
def before_each_step(look):
    """Within this block, torch calls look(optimizer) before each step of any optimizer."""

    def hook(optimizer, args, kwargs):
        look(optimizer)

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def stop_before_step(number, *flags):
    """A run that Ctrl-C ends before an optimizer step. The steps of SFT count too."""
    steps = []

    def look(optimizer):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt

    with before_each_step(look), pytest.raises(KeyboardInterrupt):
        run(*flags)


def stop_in_save(number, *flags):
    """A run that ends in the middle of a call of torch.save: half a file is written."""
    calls = []
    save = torch.save

    def half(state, path):
        calls.append(path)
        if len(calls) == number:
            write_half(path)
            raise KeyboardInterrupt
        save(state, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        run(*flags)


def write_half(target):
    """What torch.save leaves if it is stopped. Its target is a path or an open file."""
    if hasattr(target, "write"):
        target.write(b"half a file")
    else:
        Path(target).write_bytes(b"half a file")


def stop_before_rename(name, *flags):
    """A run that ends when a file is complete, but has not got its name yet."""
    replace = os.replace

    def stop(old, new):
        if str(new).endswith(name):
            raise KeyboardInterrupt
        replace(old, new)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        run(*flags)


def lines_of(out):
    """metrics.jsonl: a dict for each step of DPO, that of the reference first."""
    return [line for line in all_lines_of(out) if "step" in line]


def sft_lines_of(out):
    """metrics.jsonl: a dict for each step of SFT."""
    return [line for line in all_lines_of(out) if "sft_step" in line]


def all_lines_of(out):
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def json_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def weights_of(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def same_weights(folder, other):
    """Bit for bit."""
    weights = weights_of(folder)
    others = weights_of(other)
    assert weights.keys() == others.keys()
    return all(torch.equal(weights[name], others[name]) for name in weights)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_lines(path, records):
    """Records as a file of JSON lines. Returns the path."""
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_pairs(path, n=30):
    """n pairs, two to a prompt, with responses of many lengths; then three to be warned of."""
    records = []
    for i in range(n):
        prompt = f"Say {i // 2} "
        rejected = f"{i}!" * (1 + i % 3)
        records.append({"prompt": prompt, "chosen": f"{i}, please", "rejected": rejected})
    records.append({"prompt": "a", "chosen": "b", "rejected": "b"})  # equal
    records.append({"prompt": "p" * 99, "chosen": "b", "rejected": "c"})  # cut on the left
    records.append({"prompt": "p", "chosen": "b", "rejected": "c" * 99})  # too long
    return write_lines(path, records)
