"""Training, from the gradient of one step to what a run prints and writes."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import dpo
import train
from data import TokenPair
from model import GPT, GPTConfig
from test_dpo import expect

ROOT = Path(train.__file__).parent
SIDES = "chosen", "rejected"
SMALL = "--n-layer 1 --n-embd 16 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Products this small lose time to threads. Only the run of `toy` draws its curves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot", lambda history, path: None)
        yield
    torch.set_num_threads(threads)


def run(*flags):
    """train.main in this process -> its summary, what it printed and what it warned of."""
    with warnings.catch_warnings(record=True) as caught, io.StringIO() as out:
        warnings.simplefilter("always")
        with contextlib.redirect_stdout(out):
            summary = train.main([*map(str, flags)])
        warned = [str(warning.message) for warning in caught]
        return SimpleNamespace(summary=summary, printed=out.getvalue(), warned=warned)


def settings(*flags):
    return train.parse_args([*map(str, flags)])


def spy(patch, module, name):
    """A list that gets (arguments, result) of each call from now on."""
    calls, real = [], getattr(module, name)

    def spied(*args):
        calls.append((args, real(*args)))
        return calls[-1][1]

    patch.setattr(module, name, spied)
    return calls


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def assert_same_weights(folder, other):
    ours, theirs = (torch.load(path / "pytorch_model.bin") for path in (folder, other))
    for name in ours.keys() | theirs.keys():
        assert torch.equal(ours[name], theirs[name]), f"{name} differs"


def write_pairs(path, n=30):
    """n pairs, two to a prompt, the responses of many lengths; then three that warn."""
    pairs = [(f"Say {i // 2} ", f"{i}, please", f"{i}!" * (1 + i % 3)) for i in range(n)]
    pairs += [("a", "b", "b"), ("p" * 99, "b", "c"), ("p", "b", "c" * 99)]
    records = (dict(zip(data.Pair._fields, pair)) for pair in pairs)
    path.write_text("\n".join(map(json.dumps, records)))
    return path


# One optimiser step

END = 0  # the end token is what collate pads with
ROWS = [
    TokenPair([3, 1, 4], [2, 2, 4, END], [1, END]),
    TokenPair([2], [END], [4, 3, END]),
    TokenPair([1, 1, 2, 3, 4, 4], [3, END], [END]),
    TokenPair([4, 2], [1, END], [1, 3, 2, 2, 1, END]),
    TokenPair([2, 3], [1, 1, 4, 2, END], [1, 1, 2, END]),
    TokenPair([1], [4, 2, 3, END], [4, 2, END]),
    TokenPair([3, 3, 3], [1, 2, 1, 4, END], [3, END]),
]
IDS = [5, 0, 6, 2, 3]  # a batch: some of the pairs, none at its own place
BETA = 0.5


def gpt(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=5, n_positions=12, n_embd=8, n_layer=2, n_head=2)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def oracle(model, rows):
    """log pi(y|x), (2, n), the slow way: no batch, no mask, no padding, one token at a time."""
    logps = torch.zeros(2, len(rows), dtype=torch.float64)
    for side, i in torch.cartesian_prod(torch.arange(2), torch.arange(len(rows))):
        ids = list(rows[i].prompt)
        for token in rows[i][1 + side]:
            one = model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token]
            logps = logps.index_put((side, i), one.double(), accumulate=True)
            ids.append(token)
    return logps


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def step(model, ref, ids=IDS, loss=dpo.dpo_loss, soft=None, flags=()):
    args = settings("--beta", BETA, "--max-grad-norm", 1e9, *flags)
    optimizer = torch.optim.SGD(model.parameters(), lr=9)
    return train.update(model, optimizer, 0.01, args, ROWS, torch.tensor(ids), loss, ref, soft)


def dpo_by_length(w, l, ref_w, ref_l, rejected_lengths, chosen_lengths, beta):
    return -(beta * ((w - ref_w) / chosen_lengths - (l - ref_l) / rejected_lengths)).sigmoid().log()


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_a_step_takes_the_gradient_of_the_mean_of_eq7(micro, labels):
    """collate, response_logps, Eq. 7, its mean, at policy != reference. Soft labels mix both orders
    of a pair, here in a loss that looks at the lengths."""
    policy, ref, n, soft = gpt(0), oracle(gpt(1), ROWS).detach(), len(IDS), labels == "soft"
    p = torch.linspace(0.1, 0.8, len(ROWS)) if soft else torch.ones(len(ROWS))
    lengths = torch.tensor([[len(row.chosen), len(row.rejected)] for row in ROWS]).T[:, IDS] ** soft

    def losses_of(logps, ref, other_lengths=lengths.flip(0)):
        right = BETA * (logps - ref) / lengths
        wrong = BETA * (logps - ref) / other_lengths.flip(0)
        wins, loses = 1 + (right[1] - right[0]).exp(), 1 + (wrong[0] - wrong[1]).exp()
        return p[IDS] * wins.log() + (1 - p[IDS]) * loses.log()

    logps = oracle(policy, [ROWS[i] for i in IDS])
    losses = losses_of(logps, ref[:, IDS])
    means = [part.mean() for part in losses.split(micro)]
    mistakes = {
        "the losses are summed, not averaged": losses.sum(),
        "the mean is divided by the number of micro-batches again": losses.mean() / len(means),
        "a micro-batch is divided by its own pairs, not those of the batch": sum(means),
        "a short last micro-batch weighs as much as a full one": sum(means) / len(means),
        "only the last micro-batch counts": losses.split(micro)[-1].sum() / n,
        "the reference is another pair's": losses_of(logps, ref[:, :n]).mean(),
        "chosen and rejected rows are exchanged": losses_of(logps.flip(0), ref[:, IDS]).mean(),
        "the lengths stay when soft labels exchange the responses": losses_of(
            logps, ref[:, IDS], lengths
        ).mean(),
    }
    weights = [*policy.parameters()]
    wanted, *others = (
        flat(torch.autograd.grad(loss, weights, retain_graph=True))
        for loss in (losses.mean(), *mistakes.values())
    )
    before, loss = flat(weights), dpo_by_length if soft else dpo.dpo_loss
    got = step(policy, ref, IDS, loss, p if soft else None, ["--micro-batch-size", micro])
    why = "the gradient of a step is not that of the mean of Eq. 7 over the batch"
    expect(flat(w.grad for w in weights), wanted, why, 1e-9, dict(zip(mistakes, others)))
    expect(got[0], losses, "losses, in the order of the batch", 1e-9)
    expect(torch.stack(got[1]), logps, "log-probs, in the order of the batch", 1e-9)
    expect(got[2]["grad_norm"], wanted.norm(), "norm of the gradient", 1e-9)
    expect(flat(weights), before - 0.01 * wanted, "one step at this learning rate", 1e-9)


def test_a_long_gradient_is_clipped_and_its_own_norm_logged():
    models, ref = (gpt(0), gpt(0)), torch.zeros(2, len(ROWS))
    flags = [], ["--max-grad-norm", 0.01]
    logged = [step(m, ref, flags=f)[2]["grad_norm"].item() for m, f in zip(models, flags)]
    free, clipped = (flat(w.grad for w in model.parameters()) for model in models)
    assert logged == [pytest.approx(free.norm().item())] * 2 and free.norm() > 0.1
    expect(clipped, free * 0.01 / free.norm(), "shorter, in the same direction", 1e-7)


@pytest.mark.parametrize("dtype, least, most", [("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.5)])
def test_reference_and_policy_are_scored_in_one_precision(dtype, least, most):
    """So that every reward is 0, to the last digit, where policy and reference are the same."""
    model, flags = gpt(0).float(), ["--dtype", dtype]
    ref = train.all_logps(model, ROWS, settings(*flags))
    assert not ref.requires_grad and ref.dtype == torch.float32
    away = (ref - oracle(model, ROWS)).abs().max()
    assert least <= away <= most, f"{away} nats from the oracle"
    losses, logps, _ = step(model, ref, range(len(ROWS)), flags=flags)
    expect(torch.stack(logps), ref, "policy == reference", 0)
    expect(losses, torch.full((len(ROWS),), math.log(2)), "policy == reference", 1e-6)


def test_optimizers_by_hand():
    """Two steps at gradients 1 and -3, of a weight so large that weight decay would show."""
    m, v = 0.9 * 0.1 * 1 - 0.1 * 3, 0.95 * 0.05 * 1 + 0.05 * 9
    wanted = {
        "adamw": 50 - 0.1 - 0.1 * (m / (1 - 0.9**2)) / (v / (1 - 0.95**2)) ** 0.5,
        "rmsprop": 50 - 0.1 * 1 / 0.01**0.5 + 0.1 * 3 / (0.99 * 0.01 + 0.01 * 9) ** 0.5,
    }
    assert wanted.keys() == train.OPTIMIZERS.keys()
    for name, new in train.OPTIMIZERS.items():
        weight = torch.nn.Parameter(torch.tensor(50.0, dtype=torch.float64))
        optimizer = new([weight])
        for weight.grad in (torch.ones_like(weight), torch.full_like(weight, -3)):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
        expect(weight, wanted[name], name, 1e-6)


# Learning rates and batches


@pytest.mark.parametrize(
    "flags, first, last",
    [
        (["--warmup-steps", 9], [0.25, 0.5, 0.75, 1, 1, 35 / 36], 1 / 36),  # at most a tenth
        (["--warmup-steps", 2], [0.5, 1, 1, 37 / 38], 1 / 38),
        (["--warmup-steps", 0], [1, 1, 38 / 39], 1 / 39),
        (["--warmup-steps", 9, "--no-decay"], [0.25, 0.5, 0.75, 1, 1, 1], 1),
    ],
)
def test_learning_rates(flags, first, last):
    """40 steps: linear warm-up, then linear decay, the last rate above 0."""
    steps = [*train.schedule(ROWS[:5] * 2, 4, 0.3, settings("--batch-size", 1, *flags))]
    assert [plan[:2] for plan in steps] == [(i + 1, 40) for i in range(40)]
    rates = [lr / 0.3 for _, _, lr, _ in steps]
    assert rates[: len(first)] == pytest.approx(first) and rates[-1] == pytest.approx(last)


def planned(n, epochs, *flags, done=0):
    """The batches of n pairs of equal lengths."""
    steps = train.schedule([TokenPair([1], [2], [3])] * n, epochs, 1, settings(*flags), done)
    return [ids.tolist() for *_, ids in steps]


def test_the_seed_decides_the_order_and_every_epoch_has_every_pair():
    """10 pairs in batches of 4: what an epoch leaves over begins the next."""
    flags = "--batch-size", 4, "--seed"
    order = planned(10, 3, *flags, 0)
    torch.manual_seed(9)  # no other generator has a say
    assert planned(10, 3, *flags, 0) == order != planned(10, 3, *flags, 1)
    assert planned(10, 3, *flags, 0, done=3) == order[3:], "what a resumed run goes on with"
    assert [len(ids) for ids in order] == [4] * 8, "30 pairs need 8 batches"
    order = sum(order, [])
    epochs = order[:10], order[10:20], order[20:30]
    assert all(sorted(epoch) == [*range(10)] for epoch in epochs) and epochs[0] != epochs[1]
    assert [len(ids) for ids in planned(10, 2, "--batch-size", 99)] == [10, 10]


@pytest.mark.parametrize("n, size", [(9, 6), (4, 3)])
def test_processes_share_every_batch(n, size, monkeypatch):
    """Batches of 8, or of all n pairs, rounded down to a multiple of 3 processes."""
    alone, shares = planned(n, 4, "--batch-size", size), []
    monkeypatch.setattr(train, "PROCESSES", 3)
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(planned(n, 4, "--batch-size", 8))
    for batch, *parts in zip(alone, *shares, strict=True):
        assert sorted(sum(parts, [])) == sorted(batch) and {*map(len, parts)} == {size // 3}
    assert {*map(len, planned(2, 4, "--batch-size", 8))} == {1}, "never an empty share"


# The toy world


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The one run of the command line as such: what it printed, and its folder."""
    out = tmp_path_factory.mktemp("toy") / "out"
    flags = "--pairs 5120 --batch-size 128 --epochs 1.6 --sft-epochs 0.5 --beta 1.5 --eval-every 32"
    args = [sys.executable, ROOT / "train.py", *flags.split(), "--out", out]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout, out


@pytest.fixture(scope="module")
def tables(toy):
    """The world, and log pi(y|x) of every response from the saved models; the optimum by Eq. 4."""
    world = data.ToyWorld()
    models = [GPT.from_pretrained(toy[1] / name) for name in ("reference", "policy")]
    ref, policy = map(world.logps, models)
    weights = ref.exp() * (world.rewards / 1.5).exp()
    best = (weights / weights.sum(-1, keepdim=True)).log()
    return world, {"reference": ref, "policy": policy, "optimum": best}


def test_toy_run_writes_and_prints_what_it_promises(toy):
    printed, out = toy
    names = {"config.json", "metrics.jsonl", "summary.json", "curves.png", "reference", "policy"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(summary_of(out)) == ["config", "seconds", "gap_closed", "rows"]
    assert summary_of(out)["config"]["pairs"] == 5120 and summary_of(out)["seconds"] > 0
    assert "beta=1.5" in printed.splitlines()[0] and "SFT 79/79  loss" in printed
    assert re.search(r"first DPO loss is log 2 = 0.6931\nDPO 1/64  loss 0.6931.* s left", printed)
    assert "\r" not in printed, "plain lines when piped"
    first, *lines = lines_of(out)
    assert first["step"] == 0 and [line["step"] for line in lines] == [*range(1, 65)]
    assert [line["step"] for line in lines if "kl" in line] == [32, 64]
    rows = summary_of(out)["rows"]
    assert rows["reference"].items() <= first.items()
    assert rows["policy"].items() <= lines[-1].items()
    assert lines[0]["lr"] == pytest.approx(1e-2 / 6) and lines[-1]["lr"] == pytest.approx(1e-2 / 58)
    start = {key: lines[0][key] for key in ("loss", "weight", "margin")}
    assert start == pytest.approx({"loss": math.log(2), "weight": 0.5, "margin": 0}, abs=1e-5)
    for line in lines:
        margin = line["chosen_reward"] - line["rejected_reward"]
        assert line["margin"] == pytest.approx(margin, abs=1e-5)
        assert 0 <= line["accuracy"] <= 1 and line["grad_norm"] > 0


def test_toy_table_is_that_of_the_saved_models_and_obeys_the_theory(toy, tables):
    world, logps = tables
    rows, (ref, _, best) = summary_of(toy[1])["rows"], logps.values()
    start = (ref.exp() * (ref - best)).sum(-1).mean().item()
    for name, table in logps.items():
        reward, kl, to_best = (
            (table.exp() * column).sum(-1).mean().item()
            for column in (world.rewards, table - ref, table - best)
        )
        wanted = dict(expected_reward=reward, kl=kl, objective=reward - 1.5 * kl)  # Eq. 3
        wanted |= dict(kl_to_optimum=to_best, gap_closed=1 - to_best / start)
        assert rows[name] == pytest.approx(wanted, abs=1e-4)
        lost = rows["optimum"]["objective"] - rows[name]["objective"]
        assert lost == pytest.approx(1.5 * to_best, abs=1e-4), "J(pi*) - J(pi) = beta KL(pi || pi*)"
    assert list(rows) == list(logps) and rows["reference"]["kl"] == 0
    assert summary_of(toy[1])["gap_closed"] == rows["policy"]["gap_closed"] > 0.1, "it learns"
    head, *table = toy[0].split("\n\n")[-1].splitlines()[:-1]
    assert head.split() == list(wanted)
    numbers = [[name, *(f"{x:.4f}" for x in row.values())] for name, row in rows.items()]
    assert [line.split() for line in table] == numbers


def test_the_likeliest_responses_of_the_optimum_are_printed(toy, tables):
    world, logps = tables
    for x, prompt in enumerate(world.prompts):
        head, *lines = toy[0].split(f"\n{prompt.strip()} ")[1].split("\n\n")[0].splitlines()
        assert head.split() == ["r*", "reference", "policy", "optimum"] and len(lines) == 6
        probs = [table[x].exp() for table in logps.values()]
        for line, best in zip(lines, probs[-1].sort(descending=True).values):
            text, *numbers = re.fullmatch(r"  (.*?) +([+-].*?) +(\S+) +(\S+) +(\S+)", line).groups()
            y = world.responses.index(text)
            assert numbers[0] == f"{world.rewards[x, y]:+.2f}"
            wanted = [prob[y].item() for prob in probs]
            assert [*map(float, numbers[1:])] == pytest.approx(wanted, abs=1e-4)
            assert wanted[-1] == pytest.approx(best.item())


@pytest.mark.parametrize("labels", ["hard", "soft", "deterministic"])
def test_each_step_on_toy_pairs_by_hand(labels, tmp_path, monkeypatch):
    """In batches of one pair every logged number can be followed."""
    updates, made, new = spy(monkeypatch, train, "update"), [], train.OPTIMIZERS["rmsprop"]
    kept = {"rmsprop": lambda parameters: made.append(new(parameters)) or made[-1]}
    monkeypatch.setattr(train, "OPTIMIZERS", kept)
    flags = "--pairs 12 --batch-size 1 --sft-epochs 0.001 --sft-lr 0.002 --lr 0.003 --beta 0.7"
    done = run(*flags.split(), "--labels", labels, "--optimizer", "rmsprop", "--out", tmp_path)
    sft, steps = updates[:20], updates[20:]
    assert [u[0][1] for u in updates] == [made[0]] * 20 + [made[1]] * 72, "DPO has its own"
    assert max(u[0][2] for u in sft) == 0.002 and max(u[0][2] for u in steps) == 0.003
    for (*_, rows, ids, _), (losses, logps, _) in sft:
        expect(losses, -logps[0], "SFT minimises the mean of -log pi(y|x)", 0)
        assert rows[ids[0]].rejected == []
    reference, world = GPT.from_pretrained(tmp_path / "reference"), data.ToyWorld()
    for (args, (_, logps, norms)), line in zip(steps, lines_of(tmp_path)[1:], strict=True):
        (row,), ref, soft = [args[4][i] for i in args[5]], args[7][:, args[5]], args[8]
        expect(ref, oracle(reference, [row]), "the reference is out/reference's", 1e-4)
        assert args[6] is dpo.dpo_loss and not ref.requires_grad
        x = world.prompt_ids.tolist().index(row.prompt)
        r = [world.rewards[x, world.response_ids.index(y)].item() for y in row[1:]]
        assert r[0] >= r[1] or labels != "deterministic"
        p = 1 / (1 + math.exp(r[1] - r[0])) if labels == "soft" else 1
        assert soft is None if p == 1 else soft[args[5]].item() == pytest.approx(p)
        rewards = [0.7 * (logp - r).item() for logp, r in zip(logps, ref)]
        odds = math.exp(rewards[0] - rewards[1])
        wanted = {
            "loss": p * math.log(1 + 1 / odds) + (1 - p) * math.log(1 + odds),
            "weight": 1 / (1 + odds),
            "margin": rewards[0] - rewards[1],
            "chosen_reward": rewards[0],
            "rejected_reward": rewards[1],
            "chosen_logp": logps[0].item(),
            "rejected_logp": logps[1].item(),
            "grad_norm": norms["grad_norm"].item(),
            "lr": args[2],
        }
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, abs=1e-4), line["step"]
        assert abs(math.log(odds)) < 1e-4 or line["accuracy"] == (odds > 1)
    texts = done.printed, str(lines_of(tmp_path)), (tmp_path / "summary.json").read_text()
    shown = [bool(re.search(r"gap_closed\W+\d", text)) for text in texts]
    assert shown == [False] * 3 if labels == "deterministic" else all(shown), "no optimum, no gap"
    assert (done.summary["gap_closed"] is None) == (labels == "deterministic")


# Losses

MORE = [f"{ROOT}/experiments/losses.py:{x}_loss" for x in "simpo orpo dpop unlikelihood".split()]


@pytest.mark.parametrize("loss", [*dpo.LOSSES, *MORE], ids=lambda loss: loss.split(":")[-1])
def test_every_loss_trains(loss, toy, tables, tmp_path):
    """New pairs, drawn here, are ranked better than by chance."""
    flags = "--sft-epochs 0 --pairs 2560 --batch-size 128 --epochs 2 --init".split()
    done = run(*flags, toy[1] / "reference", "--loss", loss, "--out", tmp_path)
    assert ("log 2" in done.printed) == (loss == "dpo")
    world, logps = tables
    rewards = world.logps(GPT.from_pretrained(tmp_path / "policy")) - logps["reference"]
    drawn = world.draw_pairs(logps["reference"], 9999, "hard", torch.Generator().manual_seed(7))
    margins = rewards[drawn.prompt, drawn.chosen] - rewards[drawn.prompt, drawn.rejected]
    right = (margins > 0).sum() / (margins != 0).sum()
    assert right > 0.53, f"{right:.1%} of the pairs"


def test_a_loss_gets_what_its_signature_names():
    """The four log-probs; lengths if named; beta if named and set, else the loss's own default."""
    policy, ref, lengths = (torch.arange(4.0).view(2, 2) + 10 * k for k in range(3))

    def everything(a, b, c, d, rejected_lengths, beta=7.0, chosen_lengths=None, other=8):
        got = torch.stack([a, b, c, d, chosen_lengths, rejected_lengths])
        assert got.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13], [20, 21], [22, 23]]
        return a * 0 + beta, "only the first item is the loss"

    for beta, wanted in ((3.0, 3), (None, 7)):
        assert train.call_loss(everything, policy, ref, lengths, beta).tolist() == [wanted] * 2
    plain = train.call_loss(lambda a, b, c, d: b - a, policy, ref, lengths, 3.0)
    assert plain.tolist() == [2, 2]
    assert settings().beta == 1 and settings("--data", "x").beta is None


MINE = """
def mean(w, l, ref_w, ref_l): return (l - w).mean()
def constant(w, l, ref_w, ref_l): return (l - w).detach()
def raises(w, l, ref_w, ref_l): return l - v
def mean_of_many(w, l, ref_w, ref_l): return l - w if len(w) < 3 else (l - w).mean()
def own_beta(w, l, ref_w, ref_l, beta=7.0): return (l - w) * {7.0: 1}[beta]
"""
WRONG = {  # the function -> the error
    "mean": (AssertionError, "not one loss for each pair"),
    "constant": (RuntimeError, "does not require grad"),
    "raises": (NameError, "name 'v' is not defined"),
    "own_beta": (KeyError, "1.0"),  # the toy's
    "absent": (KeyError, "absent"),
    "mean_of_many": (AssertionError, "not one loss for each pair"),  # every step looks
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_of_ones_own_shows_its_traceback(name, tmp_path):
    """Before SFT, so before anything is written; with file and line if the error is in there."""
    file, (error, says) = tmp_path / "mine.py", WRONG[name]
    file.write_text(MINE)
    with pytest.raises(error, match=says) as raised:
        run("--loss", f"{file}:{name}", "--sft-epochs", 0.001, "--out", tmp_path / "out")
    assert (tmp_path / "out").exists() == (name == "mean_of_many")
    last = traceback.extract_tb(raised.tb)[-1]
    if name in ("raises", "own_beta"):
        assert last.filename == str(file) and f"def {name}(" in MINE.splitlines()[last.lineno - 1]
    if name == "own_beta":  # with --data its own default holds
        assert train.load_loss(settings("--data", "x", "--loss", f"{file}:own_beta"))


# Real pairs


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run on a file of pairs, with all that went into its splits and steps."""
    folder = tmp_path_factory.mktemp("real")
    flags = ["--data", write_pairs(folder / "pairs.jsonl"), *SMALL, "--lr", 0.02, "--n-embd", 8]
    with pytest.MonkeyPatch.context() as patch:
        splits, updates = spy(patch, data, "split"), spy(patch, train, "update")
        done = run(*flags, "--eval-every", 3, "--out", folder / "out")
    return SimpleNamespace(out=folder / "out", splits=splits, updates=updates, **vars(done))


def test_real_pairs_are_split_by_prompt_and_warned_of(real):
    ((_, (rows, held_out)),) = real.splits
    sides = [{tuple(row.prompt) for row in side} for side in (rows, held_out)]
    assert not sides[0] & sides[1] and len(sides[1]) == 2, "a tenth of 16 prompts, rounded up"
    assert len(rows + held_out) == 31
    for args, _ in real.updates:
        (seen,) = {tuple(map(str, args[4]))}
        sft = len(args) == 7
        wanted = [row._replace(rejected=[]) if sft else row for row in rows]
        assert seen == tuple(map(str, wanted)), "trained on what is not held out, all of it"
    counted = [re.search(r": 1\b", text) is not None for text in real.warned]
    assert counted == [True] * 3, real.warned
    config = json.loads((real.out / "config.json").read_text())
    assert (config["made_by"], config["encoded_pairs"]) == ("train.py", 31)


def test_held_out_pairs_are_measured_before_and_after(real):
    """Against the slow oracle on the saved models; responses against a plain greedy loop."""
    held_out, tokenizer = real.splits[0][1][1], data.get_tokenizer("bytes")
    models = [GPT.from_pretrained(real.out / name) for name in ("reference", "policy")]
    ref, policy = (oracle(model, held_out).detach() for model in models)
    assert list(real.summary["rows"]) == ["reference", "policy"]
    assert real.summary["gap_closed"] is None and real.summary == summary_of(real.out)
    for row, logps in zip(real.summary["rows"].values(), (ref, policy)):
        margins = 0.1 * ((logps - ref)[0] - (logps - ref)[1])  # Eq. 7 at the paper's beta
        losses, right = (1 + (-margins).exp()).log(), (margins > 0) + (margins == 0) / 2
        columns = dict(loss=losses, accuracy=right, margin=margins)
        columns |= dict(chosen_logp=logps[0], rejected_logp=logps[1])
        wanted = {f"held_out_{name}": x.float().mean().item() for name, x in columns.items()}
        assert row == pytest.approx(wanted, abs=1e-3)
    steps = [line["step"] for line in lines_of(real.out) if "held_out_loss" in line]
    assert steps == [0, 3, 6, 7] and "held_out_accuracy" in real.printed
    changed = 0
    for row in held_out[:2]:
        texts = []
        for model in models:
            ids = list(row.prompt)
            while len(ids) < len(row.prompt) + 100 and 256 not in ids:
                ids.append(model(torch.tensor([ids[-64:]]))[0, -1].argmax().item())
            texts.append(tokenizer.decode(ids[len(row.prompt) :]))
        prompt = tokenizer.decode(row.prompt)
        assert "\n{}\nbefore DPO: {}\nafter DPO: {}\n".format(prompt, *texts) in real.printed
        changed += texts[0] != texts[1]
    assert changed and real.printed.count("before DPO") == 2


def test_from_a_saved_model_with_nothing_held_out(real, tmp_path):
    """--init takes a folder of ours; without steps that move anything, the policy stays there. Each
    loss is log 2 then: every pair in its shuffled batch meets its own reference log-probs."""
    flags = ["--data", real.out.parent / "pairs.jsonl", "--init", real.out / "policy"]
    flags += "--tokenizer bytes --sft-epochs 0 --held-out 0 --lr 1e-30 --batch-size 4".split()
    done = run(*flags, "--micro-batch-size", 3, "--out", tmp_path)
    assert not any("held_out" in str(text) for text in (lines_of(tmp_path), done.summary["rows"]))
    assert "prompts cut on the left to fit 64 tokens: 1" in done.warned, "the model's own positions"
    lines = lines_of(tmp_path)[1:]
    assert len(lines) == 31, "4 epochs of 31 pairs: all of them"
    for line in lines:
        assert (line["loss"], line["margin"]) == pytest.approx((math.log(2), 0), abs=1e-5)
    for name in ("reference", "policy"):
        assert_same_weights(tmp_path / name, real.out / "policy")


def test_how_it_is_computed_and_watched_changes_nothing(real, tmp_path):
    """Evaluation and saving do not touch a single bit; micro-batches only round differently."""
    flags = ["--data", real.out.parent / "pairs.jsonl", *SMALL, "--lr", 0.02, "--n-embd", 8]
    run(*flags, "--eval-every", 1, "--save-every", 2, "--out", tmp_path / "watched")
    assert_same_weights(tmp_path / "watched/policy", real.out / "policy")
    run(*flags, "--micro-batch-size", 3, "--eval-every", 3, "--out", tmp_path / "parts")
    lines = zip(lines_of(real.out), lines_of(tmp_path / "watched"), lines_of(tmp_path / "parts"))
    for line, watched, parts in lines:
        assert line.items() <= watched.items()
        assert parts == pytest.approx(line, rel=0.02, abs=1e-3), "independent of micro-batches"


# Bad input

BAD_FLAGS = """--beta 0; --beta -1; --beta nan; --beta much; --lr inf; --sft-lr -1; --epochs 0;
    --sft-epochs -1; --batch-size 0; --batch-size 1.5; --micro-batch-size -1; --max-grad-norm 0;
    --seed -1; --save-every 0; --eval-every 0; --n-layer 0; --held-out -0.1; --warmup-steps -1;
    --labels perfect; --optimizer sgd; --dtype float16; --bet 1; --nonsense; surplus"""
BAD_INPUT = {
    "--data missing.jsonl": "missing.jsonl",
    "--data .": "Is a directory",
    "--data torn.jsonl": "torn.jsonl:2: not a line of JSON",
    "--data field.jsonl": 'field.jsonl:1: "rejected"',
    "--data empty.jsonl": "empty.jsonl: no usable pair",
    "--data good.jsonl --block-size 2": "no pair fits into 2 tokens",
    "--data good.jsonl --tokenizer klingon": 'unknown tokenizer "klingon"',
    "--data good.jsonl --init nowhere --tokenizer bytes": "nowhere is unreadable",
    "--init {saved}": "its vocabulary is not that of the tokenizer",  # bytes in the toy world
    "--loss nonsense": "not dpo, cdpo, robust, ipo, hinge or file.py:function",
    "--loss nowhere.py:f": "nowhere.py",
    "--resume": "holds no run of train.py",
    "--resume --out nowhere": "nowhere holds no run of train.py",
}


@pytest.mark.parametrize("flags", [*map(str.strip, BAD_FLAGS.split(";")), *BAD_INPUT])
def test_bad_input_is_one_line_and_writes_nothing(flags, real, tmp_path, monkeypatch, capsys):
    """Flags: argparse's own message and exit status 2. All else: one line."""
    monkeypatch.chdir(tmp_path)
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    for name, text in dict(torn=good + "{", field='{"prompt": "a"}', empty="", good=good).items():
        (tmp_path / f"{name}.jsonl").write_text(text.replace('"a"}', '"a", "chosen": "b"}'))
    before = {*tmp_path.iterdir()}
    with pytest.raises((SystemExit, data.InputError, OSError)) as raised:
        train.main(flags.format(saved=real.out / "policy").split())
    if flags in BAD_INPUT:
        assert BAD_INPUT[flags] in str(raised.value) and "\n" not in str(raised.value)
    else:
        assert raised.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("rate", [1e15, 1e30])
@pytest.mark.parametrize("steps", ["many", "one"])
@pytest.mark.parametrize("kind", ["toy", "real"])
@pytest.mark.parametrize("phase", ["sft-", ""])
def test_a_ruined_model_is_no_success(phase, kind, steps, rate, real, tmp_path):
    """Also if it was the last step that ruined it, and if nothing is held out."""
    flags = ["--sft-epochs", 0.01, "--epochs", 0.5, f"--{phase}lr", rate, "--out", tmp_path / "out"]
    if kind == "real":
        flags = ["--data", real.out.parent / "pairs.jsonl", *SMALL, "--held-out", 0, *flags]
    flags += [f"--{phase}epochs", 1e-5] if steps == "one" else []
    with pytest.raises(data.InputError, match="learning rate"):
        run("--pairs", 999, "--batch-size", 8, *flags)
    assert not (tmp_path / "out" / "policy").exists()
    assert not (phase and (tmp_path / "out" / "reference").exists())
