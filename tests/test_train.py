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
from model import GPT
from test_dpo import expect, gpt
from test_logps import ROWS, one_at_a_time

ROOT = Path(train.__file__).parent
SMALL = "--n-layer 1 --n-embd 8 --block-size 64 --sft-epochs 1 --epochs 2 --batch-size 8".split()
SMALL += ["--lr", 0.1, "--eval-every", 3]


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
    """train.main in this process -> its summary, what it printed, what it warned of."""
    with warnings.catch_warnings(record=True) as warned, io.StringIO() as out:
        warnings.simplefilter("always")
        with contextlib.redirect_stdout(out):
            summary = train.main([*map(str, flags)])
        return summary, out.getvalue(), [str(warning.message) for warning in warned]


def settings(*flags):
    return train.parse_args([*map(str, flags)])


def spy(patch, module, name):
    """A list that gets (arguments, result) of each call from now on."""
    calls, real = [], getattr(module, name)
    patch.setattr(module, name, lambda *args: calls.append((args, real(*args))) or calls[-1][1])
    return calls


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def alike(line, other, **near):
    """Metrics but for the accuracy, which rounding decides where margins are 0."""
    line, other = ({k: x[k] for k in x if k != "accuracy"} for x in (line, other))
    assert line == pytest.approx(other, **near)


def same_weights(folder, other):
    one, two = (torch.load(path / "pytorch_model.bin") for path in (folder, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def write_pairs(path, n=30):
    """n pairs, two to a prompt, the responses of many lengths; then three that warn."""
    pairs = [(f"Say {i // 2} ", f"{i}, please", f"{i}!" * (1 + i % 3)) for i in range(n)]
    pairs += [("a", "b", "b"), ("p" * 99, "b", "c"), ("p", "b", "c" * 99)]
    path.write_text("\n".join(json.dumps(data.Pair(*pair)._asdict()) for pair in pairs))
    return path


# One optimiser step

IDS = [5, 0, 4, 2, 3]  # a batch: some of the pairs, none at its own place
BETA = 0.5


def oracle(model, rows):
    """log pi(y|x) of both responses, (2, n): no batch, no padding, one token after the other."""
    return one_at_a_time(model, rows, range(len(rows))).view(2, -1)


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
    policy, ref, soft = gpt(0), oracle(gpt(1), ROWS).detach(), labels == "soft"
    p = torch.linspace(0.1, 0.8, len(ROWS)) if soft else torch.ones(len(ROWS))
    lengths = torch.tensor([[len(row.chosen), len(row.rejected)] for row in ROWS]).T[:, IDS] ** soft

    def losses_of(logps, ref, swapped_lengths=lengths):
        odds = (BETA * (logps - ref) / lengths).diff(dim=0)[0].exp()  # of the rejected response
        swapped = (BETA * (logps - ref) / swapped_lengths).diff(dim=0)[0].exp()
        return p[IDS] * (1 + odds).log() + (1 - p[IDS]) * (1 + 1 / swapped).log()

    logps = oracle(policy, [ROWS[i] for i in IDS])
    losses = losses_of(logps, ref[:, IDS])
    parts = losses.split(micro)
    means, places = [part.mean() for part in parts], [i % micro for i in range(len(IDS))]
    mistakes = {
        "the losses are summed, not averaged": losses.sum(),
        "the mean is divided by the number of micro-batches again": losses.mean() / len(parts),
        "a micro-batch is divided by its own pairs, not those of the batch": sum(means),
        "a short last micro-batch weighs as much as a full one": sum(means) / len(means),
        "only the last micro-batch counts": parts[-1].sum() / len(IDS),
        "the reference is another pair's": losses_of(logps, ref[:, places]).mean(),
        "chosen and rejected rows are exchanged": losses_of(logps.flip(0), ref[:, IDS]).mean(),
        "soft labels do not exchange the lengths": losses_of(logps, ref[:, IDS], lengths.flip(0)),
    }
    weights, all_losses = [*policy.parameters()], [losses.mean(), *mistakes.values()]
    grads = [torch.autograd.grad(loss.sum(), weights, retain_graph=True) for loss in all_losses]
    wanted, *others = map(flat, grads)
    others[-1] /= len(IDS)
    before, loss = flat(weights), dpo_by_length if soft else dpo.dpo_loss
    flags, soft = ["--micro-batch-size", micro], p if soft else None
    for weight in weights:
        weight.grad = torch.ones_like(weight)  # of the step before
    got = step(policy, ref, IDS, loss, soft, flags)
    why = "the gradient of a step is not that of the mean of Eq. 7 over the batch"
    expect(flat(w.grad for w in weights), wanted, why, 1e-9, dict(zip(mistakes, others)))
    expect(got[0], losses, "losses, in the order of the batch", 1e-9)
    expect(torch.stack(got[1]), logps, "log-probs, in the order of the batch", 1e-9)
    expect(flat(weights), before - 0.01 * wanted, "one step at this learning rate", 1e-9)
    free, model = wanted.norm(), gpt(0)
    *_, norm = step(model, ref, IDS, loss, soft, [*flags, "--max-grad-norm", 0.1])
    clipped = flat(w.grad for w in model.parameters())
    assert free > 0.2 and norm == pytest.approx(free), "the norm before clipping is logged"
    expect(clipped, wanted * 0.1 / free, "clipped, so shorter, in the same direction", 1e-5)


@pytest.mark.parametrize("dtype, least, most", [("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.5)])
def test_reference_and_policy_are_scored_in_one_precision(dtype, least, most):
    """So that every reward is 0, to the last digit, where policy and reference are the same."""
    model, flags = gpt(0).float(), ["--dtype", dtype]
    ref = train.all_logps(model, ROWS, settings(*flags))
    away = (ref - oracle(model, ROWS)).abs().max()
    assert least <= away <= most, f"{away} nats from the oracle"
    losses, logps, _ = step(model, ref, range(len(ROWS)), flags=flags)
    expect(torch.stack(logps), ref, "policy == reference", 0)
    expect(losses, torch.full((len(ROWS),), math.log(2)), "policy == reference", 1e-6)


def test_optimizers_are_adamw_with_the_betas_of_gpt3_and_the_papers_rmsprop():
    made = {name: new([torch.zeros(1)]) for name, new in train.OPTIMIZERS.items()}
    kinds = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    assert {name: type(optimizer) for name, optimizer in made.items()} == kinds
    assert made["adamw"].defaults["betas"] == (0.9, 0.95)
    assert [optimizer.defaults["weight_decay"] for optimizer in made.values()] == [0, 0]


# Learning rates and batches


def test_learning_rates():
    """Linear warm-up of at most a tenth of the steps, then linear decay, the last rate above 0."""
    for n, flags, first, last in (
        (40, ["--warmup-steps", 9], [0.25, 0.5, 0.75, 1, 1, 35 / 36], 1 / 36),
        (40, ["--warmup-steps", 2], [0.5, 1, 1, 37 / 38], 1 / 38),
        (40, ["--warmup-steps", 0], [1, 1, 38 / 39], 1 / 39),
        (40, ["--warmup-steps", 9, "--no-decay"], [0.25, 0.5, 0.75, 1, 1, 1], 1),
        (29, ["--warmup-steps", 9], [0.5, 1, 1, 26 / 27], 1 / 27),
        *((2, ["--warmup-steps", 9], [1, 1], 1), (1, ["--warmup-steps", 9], [1], 1)),
    ):
        args = settings("--batch-size", 1, *flags)
        steps = [*train.schedule(ROWS, n / len(ROWS), 0.3, args)]
        assert [plan[:2] for plan in steps] == [(i + 1, n) for i in range(n)]
        rates = [lr / 0.3 for _, _, lr, _ in steps]
        assert rates[: len(first)] == pytest.approx(first) and rates[-1] == pytest.approx(last)


def planned(n, size, seed=0, done=0):
    """The batches of three epochs of n pairs of equal lengths."""
    args = settings("--batch-size", size, "--seed", seed)
    steps = train.schedule([TokenPair([1], [2], [3])] * n, 3, 1, args, done)
    return [ids.tolist() for *_, ids in steps]


def test_the_seed_decides_the_order_and_every_epoch_has_every_pair():
    """10 pairs in batches of 4: what an epoch leaves over begins the next."""
    order = planned(10, 4)
    torch.manual_seed(9)  # no other generator has a say
    assert planned(10, 4) == order != planned(10, 4, seed=1)
    assert planned(10, 4, done=3) == order[3:], "what a resumed run goes on with"
    assert [*map(len, order)] == [4] * 8, "30 pairs need 8 batches"
    order = sum(order, [])
    epochs = order[:10], order[10:20], order[20:30]
    assert all(sorted(epoch) == [*range(10)] for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("n, size", [(9, 6), (4, 3)])
def test_processes_share_every_batch(n, size, monkeypatch):
    """Batches of 8, or of all n pairs, rounded down to a multiple of 3 processes."""
    alone, shares = planned(n, size), []
    monkeypatch.setattr(train, "PROCESSES", 3)
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(planned(n, 8))
    for batch, *parts in zip(alone, *shares, strict=True):
        assert sorted(sum(parts, [])) == sorted(batch) and {*map(len, parts)} == {size // 3}
    assert {*map(len, planned(2, 8))} == {1}, "never an empty share"


# The toy world


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The one run of the command line as such: what it printed, its folder, and log pi(y|x) of
    every response under the saved reference, the saved policy and the optimum of Eq. 4."""
    out, world = tmp_path_factory.mktemp("toy") / "out", data.ToyWorld()
    flags = "--pairs 5120 --batch-size 128 --epochs 1.6 --sft-epochs 0.5 --beta 1.5 --eval-every 32"
    args = [sys.executable, ROOT / "train.py", *flags.split(), "--out", out]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ref, policy = (world.logps(GPT.from_pretrained(out / x)) for x in ("reference", "policy"))
    weights = ref.exp() * (world.rewards / 1.5).exp()
    best = (weights / weights.sum(-1, keepdim=True)).log()
    logps = {"reference": ref, "policy": policy, "optimum": best}
    return SimpleNamespace(printed=done.stdout, out=out, world=world, logps=logps)


def test_toy_run_writes_and_prints_what_it_promises(toy):
    names = {"config.json", "metrics.jsonl", "summary.json", "curves.png", "reference", "policy"}
    assert {path.name for path in toy.out.iterdir()} == names
    assert (toy.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "beta=1.5" in toy.printed.splitlines()[0] and "SFT 79/79  loss" in toy.printed
    shown = r"first DPO loss is log 2 = 0.6931\nDPO 1/64  loss 0.6931.* s left"
    assert re.search(shown, toy.printed) and "\r" not in toy.printed, "plain lines when piped"
    (first, *lines), rows = lines_of(toy.out), summary_of(toy.out)["rows"]
    assert first["step"] == 0 and [line["step"] for line in lines] == [*range(1, 65)]
    assert [line["step"] for line in lines if "kl" in line] == [32, 64]
    assert rows["reference"].items() <= first.items()
    assert rows["policy"].items() <= lines[-1].items()
    for line in lines:
        rewards = line["chosen_reward"], line["rejected_reward"]
        assert line["margin"] == pytest.approx(rewards[0] - rewards[1], abs=1e-5)
        assert 0 <= line["accuracy"] <= 1


def test_toy_table_is_that_of_the_saved_models_and_obeys_the_theory(toy):
    summary, (ref, _, best) = summary_of(toy.out), toy.logps.values()
    assert list(summary) == ["config", "seconds", "gap_closed", "rows"]
    assert summary["config"]["pairs"] == 5120 and summary["seconds"] > 0
    rows, start = summary["rows"], (ref.exp() * (ref - best)).sum(-1).mean().item()
    for name, table in toy.logps.items():
        columns = toy.world.rewards, table - ref, table - best
        reward, kl, to_best = ((table.exp() * x).sum(-1).mean().item() for x in columns)
        wanted = dict(expected_reward=reward, kl=kl, objective=reward - 1.5 * kl)  # Eq. 3
        wanted |= dict(kl_to_optimum=to_best, gap_closed=1 - to_best / start)
        assert rows[name] == pytest.approx(wanted, abs=1e-4)
        lost = rows["optimum"]["objective"] - rows[name]["objective"]
        assert lost == pytest.approx(1.5 * to_best, abs=1e-4), "J(pi*) - J(pi) = beta KL(pi || pi*)"
    assert summary["gap_closed"] == rows["policy"]["gap_closed"] > 0.1, "it learns"
    head, *table = toy.printed.split("\n\n")[-1].splitlines()[:-1]
    numbers = [[name, *(f"{x:.4f}" for x in row.values())] for name, row in rows.items()]
    assert head.split() == list(wanted) and [line.split() for line in table] == numbers


def test_the_likeliest_responses_of_the_optimum_are_printed(toy):
    for x, prompt in enumerate(toy.world.prompts):
        head, *lines = toy.printed.split(f"\n{prompt.strip()} ")[1].split("\n\n")[0].splitlines()
        assert head.split() == ["r*", *toy.logps] and len(lines) == 6
        probs = [table[x].exp() for table in toy.logps.values()]
        for line, best in zip(lines, probs[-1].sort(descending=True).values):
            text, r, *shown = re.fullmatch(r"  (.*?) +([+-].*?) +(.*?) +(.*?) +(.*)", line).groups()
            y = toy.world.responses.index(text)
            assert r == f"{toy.world.rewards[x, y]:+.2f}"
            assert probs[-1][y].item() == pytest.approx(best.item()), "the likeliest ones"
            wanted = [prob[y].item() for prob in probs]
            assert [*map(float, shown)] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("labels", ["hard", "soft", "deterministic"])
def test_each_step_on_toy_pairs_by_hand(labels, tmp_path, monkeypatch):
    """In batches of one pair every logged number can be followed."""
    updates, made, new = spy(monkeypatch, train, "update"), [], train.OPTIMIZERS["rmsprop"]
    kept = {"rmsprop": lambda parameters: made.append(new(parameters)) or made[-1]}
    monkeypatch.setattr(train, "OPTIMIZERS", kept)
    flags = "--pairs 12 --batch-size 1 --sft-epochs 0.001 --sft-lr 0.002 --lr 0.003 --beta 0.7"
    flags = [*flags.split(), "--labels", labels, "--optimizer", "rmsprop", "--out", tmp_path]
    summary, printed, _ = run(*flags)
    assert [args[1] for args, _ in updates] == [made[0]] * 20 + [made[1]] * 72, "DPO has its own"
    rates = [args[2] for args, _ in updates]
    assert max(rates[:20]) == 0.002 and max(rates[20:]) == 0.003
    assert all(losses == -logps[0] for _, (losses, logps, _) in updates[:20]), "SFT: -log pi(y|x)"
    (first, *lines), world = lines_of(tmp_path), data.ToyWorld()
    rows = [args[4][args[5]] for args, _ in updates[20:]]
    x = [world.prompt_ids.tolist().index(row.prompt) for row in rows]
    y = [[world.response_ids.index(row[side]) for row in rows] for side in (1, 2)]
    better = world.rewards[x, y[0]] - world.rewards[x, y[1]]
    assert labels != "deterministic" or (better >= 0).all()
    p = 1 / (1 + (-better).exp()) if labels == "soft" else torch.ones(72)
    logps = torch.tensor([result[1] for _, result in updates[20:]]).T
    rewards = 0.7 * (logps - oracle(GPT.from_pretrained(tmp_path / "reference"), rows))
    odds = (rewards[0] - rewards[1]).exp()
    assert odds.log().abs().max() > 0.1, "else all that follows would be 0"
    wanted = {"chosen_logp": logps[0], "rejected_logp": logps[1], "margin": odds.log()}
    wanted |= {"chosen_reward": rewards[0], "rejected_reward": rewards[1]}
    wanted["weight"] = 1 / (1 + odds)  # sigma(r_rejected - r_chosen)
    wanted["loss"] = p * (1 + 1 / odds).log() + (1 - p) * (1 + odds).log()
    wanted["grad_norm"] = [result[2] for _, result in updates[20:]]
    wanted["lr"] = rates[20:]
    for name, column in wanted.items():
        expect([line[name] for line in lines], column, name, 1e-4)
    assert all(abs(o - 1) < 1e-4 or line["accuracy"] == (o > 1) for o, line in zip(odds, lines))
    texts = printed, str([first, *lines]), (tmp_path / "summary.json").read_text()
    shown = [bool(re.search(r"gap_closed\W+\d", text)) for text in texts]
    assert shown == [labels != "deterministic"] * 3, "no finite optimum, no gap"
    assert (summary["gap_closed"] is None) == (labels == "deterministic")


def test_the_seed_decides_weights_corpus_and_pairs(toy, tmp_path, monkeypatch):
    updates, weights = spy(monkeypatch, train, "update"), []
    flags = ["--pairs", 99, "--sft-epochs", 1e-5, "--sft-lr", 1e-30, "--epochs", 0.01, "--out"]
    for seed in (0, 0, 1):  # from one model, so that nothing but the seed is different
        run(*flags, tmp_path, "--init", toy.out / "reference", "--seed", seed)
        model = train.build_model(settings("--seed", seed), toy.world.tokenizer)
        weights.append(model.wte.weight.tolist())
    corpora, pairs = ([args[4] for args, _ in updates[k::2]] for k in (0, 1))
    kinds = {"weights": weights, "corpora": corpora, "pairs": pairs}
    for kind, (first, again, other) in kinds.items():
        assert [again == first, other == first] == [True, False], f"{kind}: --seed alone decides"


# Losses

MORE = [f"{ROOT}/experiments/losses.py:{x}_loss" for x in "simpo orpo dpop unlikelihood".split()]


@pytest.mark.parametrize("loss", [*dpo.LOSSES, *MORE], ids=lambda loss: loss.split(":")[-1])
def test_every_loss_trains(loss, toy, tmp_path, monkeypatch):
    """New pairs, drawn here, are ranked better than by chance."""
    updates = spy(monkeypatch, train, "update")
    flags = "--sft-epochs 0 --pairs 3840 --batch-size 128 --epochs 2 --init".split()
    _, printed, _ = run(*flags, toy.out / "reference", "--loss", loss, "--out", tmp_path)
    assert ("log 2" in printed) == (loss == "dpo")
    used = {args[6].__name__.removesuffix("_loss") for args, _ in updates}
    assert used == {loss.split(":")[-1].removesuffix("_loss")}
    ref, generator = toy.logps["reference"], torch.Generator().manual_seed(7)
    x, w, l, _ = toy.world.draw_pairs(ref, 9999, "hard", generator)
    rewards = toy.world.logps(GPT.from_pretrained(tmp_path / "policy")) - ref
    margins = rewards[x, w] - rewards[x, l]
    assert (margins > 0).sum() > 1.1 * (margins < 0).sum()


def test_a_loss_gets_what_its_signature_names():
    """The four log-probs; lengths if named; beta if named and set, else the loss's own default."""
    policy, ref, lengths = (torch.arange(4.0).view(2, 2) + 10 * k for k in range(3))

    def greedy(a, b, c, d, rejected_lengths, beta=7.0, chosen_lengths=None, other=8):
        got = torch.stack([a, b, c, d, chosen_lengths, rejected_lengths])
        assert got.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13], [20, 21], [22, 23]]
        return a * 0 + beta, "only the first item is the loss"

    def strict(a, b, c, d, beta):
        return a * 0 + beta

    cases = (greedy, 3, 3), (greedy, None, 7), (strict, 3, 3), (strict, None, 0.1)
    for loss, beta, wanted in *cases, (lambda a, b, c, d: b - a, 3, 2):
        assert train.call_loss(loss, policy, ref, lengths, beta).tolist() == pytest.approx(
            [wanted] * 2
        )
    assert settings().beta == 1 and settings("--data", "x").beta is None


MINE = """
def mean(w, l, ref_w, ref_l): return (l - w).mean()
def constant(w, l, ref_w, ref_l): return (l - w).detach()
def raises(w, l, ref_w, ref_l): return l - v
def mean_of_many(w, l, ref_w, ref_l): return l - w if len(w) < 3 else (l - w).mean()
"""
WRONG = {  # the function -> its error
    "mean": (AssertionError, "not one loss for each pair"),
    "constant": (RuntimeError, "does not require grad"),
    "raises": (NameError, "name 'v' is not defined"),
    "absent": (KeyError, "absent"),
    "mean_of_many": (AssertionError, "not one loss for each pair"),  # every step looks
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_of_ones_own_shows_its_traceback(name, tmp_path):
    """Before SFT, so before anything is written; with file and line if the error is in there."""
    file, (error, says) = tmp_path / "mine.py", WRONG[name]
    file.write_text(MINE)
    with pytest.raises(error, match=says) as raised:
        flags = ["--pairs", 99, "--sft-epochs", 0.001, "--out", tmp_path / "out"]
        run("--loss", f"{file}:{name}", *flags)
    assert (tmp_path / "out").exists() == (name == "mean_of_many")
    last = traceback.extract_tb(raised.tb)[-1]
    assert name != "raises" or (last.filename, last.lineno) == (str(file), 4)


# Real pairs


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run on a file of pairs, with all that went into its split and its steps."""
    folder = tmp_path_factory.mktemp("real")
    found = SimpleNamespace(out=folder / "out")
    found.flags = ["--data", write_pairs(folder / "pairs.jsonl"), *SMALL, "--seed", 1]
    with pytest.MonkeyPatch.context() as patch:
        sides, found.updates = spy(patch, data, "encode_pairs"), spy(patch, train, "update")
        found.summary, found.printed, found.warned = run(*found.flags, "--out", found.out)
    found.split = [rows for _, rows in sides]
    return found


def test_real_pairs_are_split_by_prompt_and_warned_of(real):
    rows, held_out = real.split
    sides = [{tuple(row.prompt) for row in side} for side in real.split]
    assert not sides[0] & sides[1] and len(sides[1]) == 2, "a tenth of 17 prompts, rounded up"
    sft = [row._replace(rejected=[]) for row in rows]
    assert [call[0][4] for call in real.updates] == [sft] * 4 + [rows] * 7, "with nothing held out"
    assert all(re.search(r": 1\b", text) for text in real.warned) and len(real.warned) == 3
    config = json.loads((real.out / "config.json").read_text())
    assert config["made_by"] == "train.py"
    assert config["encoded_pairs"] == len(rows + held_out), "the pairs of both sides count"


def test_a_prompt_that_is_cut_is_on_one_side(tmp_path, monkeypatch):
    """Responses of many lengths cut it in many ways, so the split comes first."""
    lines = [
        {"prompt": f"{i % 4}" * 99, "chosen": "y" * (1 + i), "rejected": "n"} for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sides = spy(monkeypatch, data, "encode_pairs")
    run("--data", tmp_path / "pairs.jsonl", *SMALL, "--out", tmp_path / "out")
    (rows, held_out), prompts = (result for _, result in sides), "0123".encode()
    there = [{row.prompt[-1] for row in side} for side in (rows, held_out)]
    assert [len(x) for x in there] == [3, 1] and there[0] | there[1] == set(prompts)


def test_held_out_pairs_are_measured_before_and_after(real):
    """Against the slow oracle on the saved models; responses against a plain greedy loop."""
    (_, held_out), tokenizer = real.split, data.get_tokenizer("bytes")
    models = [GPT.from_pretrained(real.out / name) for name in ("reference", "policy")]
    ref, policy = (oracle(model, held_out).detach() for model in models)
    assert list(real.summary["rows"]) == ["reference", "policy"]
    assert real.summary["gap_closed"] is None and real.summary == summary_of(real.out)
    for row, logps in zip(real.summary["rows"].values(), (ref, policy)):
        margins = 0.1 * ((logps - ref)[0] - (logps - ref)[1])  # at the paper's beta
        losses, right = (1 + (-margins).exp()).log(), (margins > 0) + (margins == 0) / 2
        columns = dict(loss=losses, accuracy=right, margin=margins)
        columns |= dict(chosen_logp=logps[0], rejected_logp=logps[1])
        wanted = {f"held_out_{name}": x.float().mean().item() for name, x in columns.items()}
        assert row == pytest.approx(wanted, abs=1e-3)
    steps = [line["step"] for line in lines_of(real.out) if "held_out_loss" in line]
    assert steps == [0, 3, 6, 7] and "held_out_accuracy" in real.printed
    for prompt in dict.fromkeys(tuple(row.prompt) for row in held_out):  # two, with two pairs each
        texts = [tokenizer.decode(prompt)]
        for model in models:
            ids = list(prompt)
            while len(ids) < len(prompt) + 100 and 256 not in ids:
                ids.append(model(torch.tensor([ids[-64:]]))[0, -1].argmax().item())
            texts.append(tokenizer.decode(ids[len(prompt) :]))
        assert "\n{}\nbefore DPO: {}\nafter DPO: {}\n".format(*texts) in real.printed
        assert texts[1] != texts[2]
    assert real.printed.count("before DPO") == 2


@pytest.mark.parametrize("fraction, least", [(0.05, 4), (0.1, 2), (0.3, 1)])
def test_evaluation_costs_at_most_a_tenth(fraction, least, tmp_path, monkeypatch):
    """By default, in pairs: those that are evaluated beside those that are trained on."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 80)
    updates, scores = spy(monkeypatch, train, "update"), spy(monkeypatch, train, "all_logps")
    sides = spy(monkeypatch, data, "encode_pairs")
    flags = [*SMALL[:-2], "--epochs", 4, "--held-out", fraction, "--save-every", 2]
    run("--data", pairs, *flags, "--out", tmp_path / "out")
    held_out, trained = sides[1][1], sum(len(args[5]) for args, _ in updates if len(args) > 7)
    times = sum(args[1] is held_out for args, _ in scores) - 1  # and once before DPO
    share = times * len(held_out) / trained
    assert times >= least and (share <= 0.1 or times == 1), f"{times} times, {share:.0%} of DPO"
    assert "held_out_loss" in lines_of(tmp_path / "out")[-1], "the last step is not evaluated"


def test_from_a_saved_model_with_nothing_held_out(real, tmp_path):
    """--init takes a folder of ours; without steps that move anything, the policy stays there. Each
    loss is log 2 then: every pair in its shuffled batch meets its own reference log-probs."""
    flags = [*real.flags[:2], "--init", real.out / "policy", "--micro-batch-size", 3]
    flags += "--tokenizer bytes --sft-epochs 0 --held-out 0 --lr 1e-30 --batch-size 4".split()
    assert settings("--init", "gpt2").tokenizer == "gpt2" and settings().tokenizer == "bytes"
    summary, _, warned = run(*flags, "--out", tmp_path)
    _, *lines = lines_of(tmp_path)
    assert len(lines) == 4 * 8 - 1 and "held_out" not in str(lines) + str(summary["rows"])
    assert "prompts cut on the left to fit 64 tokens: 1" in warned, "the model's own positions"
    for line in lines:
        assert (line["loss"], line["margin"]) == pytest.approx((math.log(2), 0), abs=1e-5)
    for name in ("reference", "policy"):
        assert same_weights(tmp_path / name, real.out / "policy")


def test_an_unchanged_policy_is_measured_and_sampled_like_the_reference(real, tmp_path):
    flags = [*real.flags, "--init", real.out / "policy", "--tokenizer", "bytes"]
    summary, printed, _ = run(*flags, "--sft-epochs", 0, "--lr", 1e-30, "--out", tmp_path)
    ref, policy = summary["rows"].values()
    assert policy == pytest.approx(ref, abs=1e-5) and ref["held_out_margin"] == 0
    texts = re.findall("^(?:before|after) DPO: (.*)$", printed, re.MULTILINE)
    assert len(texts) == 4 and texts[::2] == texts[1::2] and all(texts)


def test_how_it_is_computed_and_watched_changes_nothing(real, tmp_path):
    """Evaluation and saving do not touch a single bit; micro-batches only round differently."""
    run(*real.flags, "--eval-every", 1, "--save-every", 2, "--out", tmp_path / "watched")
    assert same_weights(tmp_path / "watched/policy", real.out / "policy")
    run(*real.flags, "--micro-batch-size", 3, "--out", tmp_path / "parts")
    outs = real.out, tmp_path / "watched", tmp_path / "parts"
    for line, watched, parts in zip(*map(lines_of, outs), strict=True):
        assert line.items() <= watched.items()
        alike(parts, line, rel=1e-2, abs=1e-3)


# Bad input

BAD_FLAGS = """--beta 0; --beta -1; --beta nan; --beta much; --lr inf; --sft-lr -1; --epochs 0;
    --sft-epochs -1; --batch-size 0; --batch-size 1.5; --micro-batch-size -1; --max-grad-norm 0;
    --seed -1; --save-every 0; --eval-every 0; --n-layer 0; --held-out -0.1; --warmup-steps -1;
    --held-out 1.1; --data=; --init=; --resume; --resume --out nowhere;
    --labels perfect; --optimizer sgd; --dtype float16; --bet 1; --nonsense; surplus"""
BAD_INPUT = {
    "--data missing.jsonl": "missing.jsonl",
    "--data .": "Is a directory",
    "--data torn.jsonl": "torn.jsonl:2: not a line of JSON",
    "--data empty.jsonl": "empty.jsonl: no line has two different responses to one prompt",
    "--data good.jsonl --tokenizer klingon": "tokenizer klingon: not one of bytes",
    "--data good.jsonl --init nowhere --tokenizer bytes": "nowhere is unreadable",
    "--init {saved}": "its vocabulary is not that of the tokenizer",  # bytes in the toy world
    "--loss nonsense": "not dpo, cdpo, robust, ipo, hinge or file.py:function",
    "--loss nowhere.py:f": "nowhere.py",
}


@pytest.mark.parametrize("flags", [*map(str.strip, BAD_FLAGS.split(";")), *BAD_INPUT])
def test_bad_input_is_one_line_and_writes_nothing(flags, real, tmp_path, monkeypatch, capsys):
    """Flags: argparse's own message and exit status 2. All else: one line."""
    monkeypatch.chdir(tmp_path)
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    texts = dict(torn=good + "{", empty="", good=good)
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises((SystemExit, data.InputError, OSError)) as raised:
        train.main(flags.format(saved=real.out / "policy").split())
    if flags in BAD_INPUT:
        assert BAD_INPUT[flags] in str(raised.value) and "\n" not in str(raised.value)
    else:
        assert raised.value.code == 2 and flags.split()[0].rstrip("=") in capsys.readouterr().err
    assert {path.stem for path in tmp_path.iterdir()} == {*texts}


@pytest.mark.parametrize("rate", [1e15, 1e30])
@pytest.mark.parametrize("steps", ["many", "one"])
@pytest.mark.parametrize("kind", ["toy", "real"])
@pytest.mark.parametrize("phase", ["sft-", ""])
def test_a_ruined_model_is_no_success(phase, kind, steps, rate, real, tmp_path):
    """Also if it was the last step that ruined it, and if nothing is held out."""
    flags = ["--pairs", 999, "--batch-size", 8, "--sft-epochs", 0.01, "--epochs", 0.1]
    flags = [*real.flags, "--held-out", 0] if kind == "real" else flags
    flags += [f"--{phase}epochs", 1e-5] if steps == "one" else []
    flags += [f"--{phase}lr", rate, "--save-every", 1, "--eval-every", 99]
    with pytest.raises(data.InputError, match="learning rate"):
        run(*flags, "--out", tmp_path)
    assert not (tmp_path / "policy").exists() and not (tmp_path / "checkpoint.pt").exists()
    assert not (phase and (tmp_path / "reference").exists())
