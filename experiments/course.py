"""What the notebook needs: checks of the code that its reader writes, tables and pictures.

Nothing is trained here. P = 2 prompts, Y = 1,111 responses; logps and rewards are (P, Y), and x is
the index of a prompt.
"""

import io

import torch
from IPython.display import Image, display
from matplotlib import colormaps

import dpo
from experiments import lab, plots
from experiments.lab import WORLD
from tests.mistakes import (
    BETA,
    EQ4_MISTAKES,
    EQ4_OPTIMUM,
    EQ4_REF,
    EQ4_REWARDS,
    EQ7_MISTAKES,
    LOSSES,
    PAIRS,
    WEIGHTS,
    complaint,
)

# What the reader writes


def check_optimal_policy(function):
    """Print "right", or what is wrong with a reader's Eq. 4. Never raises."""
    report(optimal_policy_fault(function), "right: Eq. 4 for two prompts with three responses each")


def check_loss(function):
    """Print "right", or what is wrong with a reader's Eq. 7. Never raises."""
    report(loss_fault(function), "right: two losses by hand, their gradients, and a huge margin")


def report(fault, praise):
    if fault:
        print(f"not yet: {fault}")
    else:
        print(praise)


def loss_to_train(function):
    """The reader's loss if it is right, else Eq. 7 of dpo.py. Prints which one it is."""
    if loss_fault(function):
        print("my_dpo_loss is not right yet, so dpo.dpo_loss is the loss used here")
        return our_dpo_loss
    print("my_dpo_loss is right, and is the loss used here")
    return function


def our_dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """dpo.dpo_loss as the reader writes it: the losses alone, (B,)."""
    return dpo.dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta).losses


def optimal_policy_fault(function):
    """What is wrong with a reader's Eq. 4, as text; "" if nothing is."""
    got, fault = call(function, EQ4_REF, EQ4_REWARDS, BETA)
    if not fault:
        fault = complaint(got, EQ4_OPTIMUM, "two prompts, beta 1/2", 1e-6, EQ4_MISTAKES)
    if fault:
        return fault
    coin = torch.tensor([0.5, 0.5]).log()
    got, fault = call(function, coin, torch.tensor([1e4, 0.0]), 1.0)
    if not fault:
        fault = complaint(got.exp(), [1.0, 0.0], "a reward of 10,000: use logsumexp", 1e-3)
    return fault


def loss_fault(function):
    """What is wrong with a reader's Eq. 7, as text; "" if nothing is."""
    policy = PAIRS[:2].clone().requires_grad_()
    losses, fault = call(function, *policy, *PAIRS[2:], BETA)
    if not fault:
        fault = complaint(losses, LOSSES, "two pairs, beta 1/2", 1e-6, EQ7_MISTAKES)
    if fault:
        return fault
    if not losses.requires_grad:
        return "the losses are right, but carry no gradient: is there a detach?"

    def gradient():
        return torch.autograd.grad(losses.sum(), policy)[0]

    got, fault = call(gradient)
    if not fault:
        wanted = BETA * torch.stack([-WEIGHTS, WEIGHTS])
        fault = complaint(got, wanted, "the gradient: is there a detach?", 1e-6)
    if fault:
        return fault
    zero = torch.zeros(1)
    losses, fault = call(function, zero - 8000, zero - 4000, zero, zero, 0.3)
    if not fault:
        why = "a margin of -1200: use logsigmoid, for the log of sigmoid is -inf there"
        fault = complaint(losses, [1200.0], why, 1e-3)
    return fault


def call(function, *arguments):
    """(what a reader's function returns, "") or (None, what is wrong with that)."""
    try:
        result = function(*arguments)
    except Exception as error:  # whatever it is, Run all goes on
        if "ellipsis" in str(error):
            return None, "a line is still `...`"
        fault = f"it stops with {type(error).__name__}: {error}"
        if "must match the size" in fault:
            fault += "\n  Has a sum dropped its dimension? keepdim=True keeps it."
        return None, fault
    if result is None:
        return None, "it returns nothing"
    if result is Ellipsis:
        return None, "it is not filled in"
    if not isinstance(result, torch.Tensor):
        return None, f"it returns a {type(result).__name__} and not a tensor"
    if not result.is_floating_point():
        return None, f"it returns {result.dtype} numbers"
    return result, ""


# Tables


def table(*rows, digits=2):
    """Print rows of words and numbers, in columns as wide as they need."""
    texts = []
    for row in rows:
        texts.append([to_text(cell, digits) for cell in row])
    widths = [max(len(text) for text in column) for column in zip(*texts)]
    for first, *others in texts:
        cells = [first.ljust(widths[0])]
        for text, width in zip(others, widths[1:]):
            cells.append(text.rjust(width))
        print("   ".join(cells).rstrip())


def to_text(cell, digits):
    if isinstance(cell, torch.Tensor):
        cell = cell.item()
    if not isinstance(cell, float):
        return str(cell)
    if 0 < abs(cell) < 1e-6:
        return f"{cell:.0e}"
    return f"{cell:.{digits}f}"


def find(texts):
    """The indices of responses, from texts such as " not dull"."""
    return [WORLD.responses.index(text) for text in texts]


def word(y):
    """The text of response y."""
    text = WORLD.responses[y].strip()
    if not text:
        return "(nothing)"
    return text


def true_rewards():
    """r* of some responses, the four opinions first."""
    shown = [" good", " dull", " quiet", " funny", " very good", " not very dull"]
    shown += [" quiet good dull", " was", ""]
    rows = []
    for y in find(shown):
        rows.append((word(y), *WORLD.rewards[:, y]))
    table(("r* of", "The film was", "The hotel was"), *rows)
    print()


def tokens(ids, mask, logits, sums):
    """A pair's two rows, token by token. logits (2, T - 1, V): position t predicts token t + 1;
    sums (2,): what dpo.response_logps makes of them."""
    logps = logits.log_softmax(-1)
    for i, side in enumerate(["chosen", "rejected"]):
        rows = []
        for t, token in enumerate(ids[i].tolist()):
            text = WORLD.tokenizer.decode([token]).strip().replace("<|endoftext|>", "(end)")
            if mask[i, t]:
                rows.append((text, "yes", logps[i, t - 1, token]))
            elif mask[i, t:].any():
                rows.append((text, "no", ""))
            else:
                rows.append(("(padding)", "no", ""))
        rows.append(("log pi(y|x), by dpo.response_logps", "", sums[i]))
        table((side, "scored", "log-prob"), *rows, digits=3)
        print()


def compare(policies, ref):
    """KL, E[r*] and variety of each policy, means over both prompts. policies: {name: logps}."""
    rows = []
    for name, logps in policies.items():
        exact = lab.measure(logps, ref)
        varied = torch.tensor(exact["entropy"]).exp()
        rows.append((name, exact["kl"], exact["expected_reward"], varied))
    table(("pi* at", "KL", "E[r*]", "exp(entropy)"), *rows)


def pushes(margin, losses, push):
    """The loss, the weight and the push on both log-probs, push (2, n), at each margin (n,)."""
    rows = zip(margin, losses, torch.sigmoid(-margin), *push)
    heads = "margin", "loss", "weight", "push on chosen, beta 0.5", "push on rejected"
    table(heads, *rows, digits=3)


def progress(policies, ref, pairs):
    """What a log shows of each policy, its exact numbers, and how much more "quiet" is worth to it
    in a hotel. policies: {step: logps}."""
    (quiet,) = find([" quiet"])
    of_ref = lab.of_pairs(ref, pairs)
    rows = []
    for step, logps in policies.items():
        logged = dpo.describe(*lab.of_pairs(logps, pairs), *of_ref, beta=lab.BETA)
        exact = lab.measure(logps, ref)
        row = [step, f"{logged['loss'].mean():.4f}", logged["accuracy"].mean()]
        for key in ("objective", "kl", "expected_reward", "gap_closed"):
            row.append(exact[key])
        film, hotel = dpo.implicit_reward(logps, ref, lab.BETA)[:, quiet]
        row.append(hotel - film)
        rows.append(row)
    heads = "step", "loss", "accuracy", "J", "KL", "E[r*]", "gap closed"
    table((*heads, "r-hat of quiet: hotel - film"), *rows)


def mentions(pairs):
    """How many pairs mention each response: (P, Y)."""
    counts = torch.zeros(WORLD.rewards.shape, dtype=torch.long)
    for responses_of_pairs in (pairs.chosen, pairs.rejected):
        ones = torch.ones_like(responses_of_pairs)
        counts.index_put_((pairs.prompt, responses_of_pairs), ones, accumulate=True)
    return counts


def of_response(text, numbers):
    """What is known of one response, for both prompts. numbers: {name: (P, Y)}."""
    (y,) = find([text])
    rows = []
    for name, values in numbers.items():
        rows.append((name, *values[:, y]))
    table((text.strip(), "film", "hotel"), *rows, digits=4)


def by_seed(rows, heads):
    """A row for each seed, and mean ± standard deviation. heads: {column: its heading}."""
    lines = [("seed", *heads.values())]
    for row in rows:
        lines.append((row["seed"], *[row[key] for key in heads]))
    lines.append(("mean", *[lab.spread(rows, key) for key in heads]))
    table(*lines)


def by_value(rows, by, heads, digits=2):
    """A row for each value of the column `by`: mean ± standard deviation over the seeds of other
    columns. heads: {column: its heading}."""
    lines = [(by, *heads.values())]
    for value in lab.values(rows, by):
        mine = lab.where(rows, **{by: value})
        name = value
        if not isinstance(value, str):
            name = f"{value:,}"
        lines.append((name, *[lab.spread(mine, key, digits) for key in heads]))
    table(*lines)


def held_out(rows):
    """Three evaluations of each run on held-out pairs: before, at the lowest loss, after. rows:
    those of experiments/compare.py."""
    found = []
    for run in lab.values(rows, "run"):
        mine = [row for row in lab.where(rows, run=run) if "held_out_loss" in row]
        lowest = min(mine, key=lambda row: row["held_out_loss"])
        stages = {"before DPO": mine[0], "lowest loss": lowest, "after DPO": mine[-1]}
        for stage, row in stages.items():
            found.append(row | {"held out": stage})
    return found


def disturb(logps, n=1000):
    """n policies around this one (P, Y), with noise of many sizes in their logits: (n, P, Y)."""
    generator = torch.Generator().manual_seed(0)
    size = 0.1 + 1.9 * torch.rand(n, 1, 1, generator=generator).double()
    noise = torch.randn(n, *logps.shape, generator=generator)
    return (logps + size * noise).log_softmax(-1)


# Pictures


def show(figure):
    """Show a figure below the cell, as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    display(Image(file.getvalue()))


def name_with_reward(x, y):
    return f"{word(y)}  {WORLD.rewards[x, y]:+.2f}"


def likeliest(x, ref):
    """The reference's 20 likeliest responses to a prompt."""
    top = ref[x].argsort(descending=True)[:20]
    rest = 1 - ref[x, top].exp().sum()
    title = f"after '{WORLD.prompts[x].strip()}'; the other {len(ref[x]) - 20:,} have {rest:.0%}"
    figure, (ax,) = plots.panels(title, 1, width=9)
    shades = colormaps["cividis"]((WORLD.rewards[x, top] + 4.5) / 9)
    ax.bar(range(20), ref[x, top].exp(), color=shades, edgecolor="black", linewidth=0.6)
    names = [name_with_reward(x, y) for y in top]
    ax.set_xticks(range(20), names, rotation=50, ha="right")
    ax.set(xlabel="the 20 likeliest responses and their r* (brighter: higher)")
    ax.set(ylabel="probability")
    show(figure)


def counted(gap):
    """How often the better response won, by its lead. gap (n,): r*(chosen) - r*(rejected)."""
    sizes, which = gap.abs().round(decimals=2).unique(return_inverse=True)
    n = which.bincount()
    won = torch.zeros(len(sizes)).index_add(0, which, dpo.accuracy(gap)) / n
    error = 2 * (won * (1 - won) / n) ** 0.5
    often = (n >= 200) & (sizes > 0)
    figure, (ax,) = plots.panels("200,000 pairs, counted", 1, width=9, height=2.8)
    axis = torch.linspace(0, 6, 100)
    ax.plot(axis, dpo.bradley_terry(axis, torch.zeros(100)), color=plots.BLUE, label="Eq. 1")
    style = {"fmt": "o", "color": "black", "markersize": 3, "linewidth": 1}
    label = "counted, with two standard errors"
    ax.errorbar(sizes[often], won[often], error[often], label=label, **style)
    ax.set(xlabel="|r*(y1) - r*(y2)|", ylabel="fraction won by the better")
    ax.legend(loc="lower right")
    show(figure)


def responses(x, policies, ref, limit):
    """The likeliest responses under each policy. policies: {title: logps, normalised or not}.

    All panels with probabilities end at `limit`; a bar that is cut there shows its number. A panel
    whose bars are not probabilities says what all 1,111 sum to.
    """
    found = [logps[x].topk(8).indices for logps in policies.values()]
    shown = torch.cat(found).unique()
    shown = shown[WORLD.rewards[x, shown].argsort(stable=True)]
    rows = range(len(shown))
    title = f"the likeliest responses after '{WORLD.prompts[x].strip()}', sorted by r*"
    figure, axes = plots.panels(title, len(policies), width=13 / len(policies), height=4.2)
    for ax, (name, logps) in zip(axes, policies.items()):
        heights = logps[x, shown].exp()
        total = logps[x].exp().sum().item()
        if abs(total - 1) < 1e-6:
            color = plots.BLUE
            label = "probability"
            ax.set_xlim(0, limit)
        else:
            color = plots.ORANGE
            label = f"not probabilities: all sum to {total:.2f}"
        ax.barh(rows, heights, color=color, edgecolor="black", linewidth=0.6)
        ticks = {"color": plots.RED, "markersize": 9, "markeredgewidth": 2, "label": "reference"}
        ax.plot(ref[x, shown].exp(), rows, "|", **ticks)
        for row, height in zip(rows, heights.tolist()):
            if color == plots.BLUE and height > limit:
                ax.text(0.9 * limit, row, f"{height:.2f}", ha="right", va="center", color="white")
        ax.set_yticks(rows, [])
        ax.set(title=name, xlabel=label)
    axes[0].set_yticks(rows, [name_with_reward(x, y) for y in shown])
    plots.legend(figure, axes[0])
    show(figure)


def regret(away, J, top, ref):
    """J against KL(pi || pi*) of random policies, (n,) each, of the optimum and the reference."""
    at_ref = lab.measure(ref, ref)
    figure, (ax,) = plots.panels("J of Eq. 3 against the distance from Eq. 4", 1, width=9)
    end = max(away.max().item(), at_ref["kl_to_optimum"])
    line = "beta log Z - beta KL(pi || pi*)"
    ax.plot([0, end], [top, top - end], color=plots.BLUE, label=line)
    ax.scatter(away, J, 8, color="black", zorder=3, label=f"{len(J):,} random policies")
    point = at_ref["kl_to_optimum"], at_ref["objective"]
    ax.plot(*point, "s", color=plots.RED, zorder=4, label="the reference")
    ax.plot(0, top, "*", color=plots.BLUE, markersize=16, label="Eq. 4")
    ax.set(xlabel="KL(pi || pi*), nats", ylabel="J, in units of r*")
    ax.legend(loc="lower left")
    show(figure)


def preferences(x, r, shifted, r_hat):
    """P(row beats column) by Eq. 1 for six responses, by three tables of rewards (P, Y)."""
    shown = find([" dull", " not good", " quiet", " funny", " good", " very good"])
    tables = {"r*, Eq. 1": r, "r* + 5, Eq. 1": shifted, "pi* alone, Eq. 6": r_hat}
    figure, axes = plots.panels("P(this row's response beats this column's)", len(tables))
    for ax, (title, rewards) in zip(axes, tables.items()):
        r = rewards[x, shown]
        p = torch.sigmoid(r[:, None] - r)  # (1)
        ax.imshow(p, cmap="cividis", vmin=0, vmax=1)
        for i, row in enumerate(p.tolist()):
            for j, value in enumerate(row):
                color = "black"
                if value < 0.55:
                    color = "white"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
        names = [f"{word(y)}\n{rewards[x, y]:+.1f}" for y in shown]
        ax.set_xticks(range(len(shown)), names, fontsize=8)
        ax.set_yticks(range(len(shown)), [])
        ax.set(title=title, xlabel="with its reward")
        ax.grid(False)
    axes[0].set_yticks(range(len(shown)), [word(y) for y in shown])
    show(figure)


def loss_and_weight():
    """The loss and the weight over the margin; the push over the log-ratio, for three betas."""
    figure, axes = plots.panels("Eq. 7 and its gradient", 3, height=3)
    m = torch.linspace(-6, 6, 241, dtype=torch.float64)
    zero = torch.zeros_like(m)
    result = dpo.dpo_loss(m, zero, zero, zero, 1.0)
    curves = {"loss": (result.losses, 0.6931), "weight": (result.weights, 0.5)}
    for ax, (name, (values, at_0)) in zip(axes, curves.items()):
        ax.plot(m, values, color=plots.BLUE)
        ax.plot(0, at_0, "o", color=plots.RED)
        ax.annotate(f"policy = reference: {at_0}", (0.4, at_0 + 0.02), color=plots.RED)
        ax.set(xlabel="margin", ylabel=name)
    for beta, color in [(0.1, plots.BLUE), (0.5, plots.ORANGE), (2.0, plots.GREEN)]:
        slope, _ = dpo.dpo_gradient(m, zero, zero, zero, beta)
        axes[2].plot(m, -slope, color=color, label=f"beta = {beta:g}")
    axes[2].set(xlabel="log-ratio of chosen minus that of rejected, nats", ylabel="beta * weight")
    axes[2].legend()
    show(figure)


LABELS = {  # r*(chosen) - r*(rejected), from and to, and the colour
    "label wrong by more than 2": (-9, -2.005, plots.RED),
    "label wrong by up to 2": (-2.005, -0.005, plots.ORANGE),
    "equal rewards": (-0.005, 0.005, plots.GREY),
    "label right by up to 2": (0.005, 2.005, plots.SKY),
    "label right by more than 2": (2.005, 9, plots.BLUE),
}


def weights_by_label(steps, weights, truth):
    """weights: those of all pairs (n,) at each step. truth (n,): r*(chosen) - r*(rejected)."""
    wrong = truth < 0
    of_weight = weights[-1][wrong].sum() / weights[-1].sum()
    print(f"wrong labels: {wrong.double().mean():.0%} of the pairs, {of_weight:.0%} of the weight")
    title = "The weights of the pairs; thin lines: mean sigma(-m)"
    figure, (left, right) = plots.panels(title, 2, width=6.3)
    sums = []
    colors = []
    for name, (low, high, color) in LABELS.items():
        mine = (low <= truth) & (truth <= high)
        total = torch.stack([w[mine].sum() for w in weights])
        label = f"{name}: {mine.sum():,} pairs"
        left.plot(steps, total / mine.sum(), color=color, label=label)
        left.axhline((-truth[mine]).sigmoid().mean(), color="black", linewidth=0.6)
        sums.append(total)
        colors.append(color)
    parts = torch.stack(sums)
    parts = parts / parts.sum(0)
    right.stackplot(steps, parts, colors=colors, alpha=0.8)
    middle = len(steps) // 2
    ends = parts[:, middle].cumsum(0)
    for name, end, part in zip(LABELS, ends, parts[:, middle]):
        right.text(steps[middle], end - part / 2, name, ha="center", va="center", fontsize=8)
    left.set(xlabel="step", ylabel="mean weight", ylim=(0, 1))
    right.set(xlabel="step", ylabel="fraction of all weight")
    plots.legend(figure, left, columns=3)
    show(figure)


def real_runs(rows):
    """Runs of train.py on real pairs: metrics on the batch and held out, a line for each run.
    rows: those of experiments/compare.py."""
    pairs = {
        "loss": ("loss", "held_out_loss"),
        "accuracy": ("accuracy", "held_out_accuracy"),
        "log-prob of held-out responses, nats": ("held_out_rejected_logp", "held_out_chosen_logp"),
    }
    labels = [("on the batch", "held out"), ("on the batch", "held out"), ("rejected", "chosen")]
    steps = max(lab.values(rows, "step"))
    title = f"1,094 real pairs, {steps} steps, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, len(pairs))
    for ax, (ylabel, names), texts in zip(axes, pairs.items(), labels):
        for name, text, color in zip(names, texts, (plots.ORANGE, plots.BLUE)):
            for run in lab.values(rows, "run"):
                mine = [row for row in lab.where(rows, run=run) if name in row]
                positions = [row["step"] for row in mine]
                ax.plot(positions, [row[name] for row in mine], color=color, linewidth=1)
            ax.plot([], [], color=color, label=text)
        ax.set(xlabel="step", ylabel=ylabel)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    show(figure)


def rewards_learned(rewards, ref, log_Z, text):
    """Implicit against true rewards of all responses; the one with this text has circles."""
    (marked,) = find([text])
    figure, (ax,) = plots.panels("Implicit and true rewards, all 2,222", 1, width=9, height=4.2)
    for x, (color, marker) in enumerate([(plots.BLUE, "o"), (plots.ORANGE, "^")]):
        name = WORLD.prompts[x].strip()
        style = {"color": color, "marker": marker, "alpha": 0.5, "linewidth": 0}
        ax.scatter(WORLD.rewards[x], rewards[x], 250 * ref[x].exp() ** 0.5, label=name, **style)
        ax.axline((0, -lab.BETA * log_Z[x].item()), slope=1, color=color, linewidth=1)
        ring = {"facecolors": "none", "edgecolors": plots.RED, "linewidth": 1.5}
        ax.scatter(WORLD.rewards[x, marked], rewards[x, marked], 150, **ring)
    ax.annotate(word(marked), (WORLD.rewards[0, marked] - 0.6, rewards[:, marked].min() - 0.9))
    ax.set_ylim(-5.2, 3.8)
    ax.set(xlabel="true reward r*", ylabel="implicit reward r-hat, in units of r*")
    ax.legend(title="lines: r* - beta log Z(x); larger: likelier under pi_ref")
    show(figure)
