"""The notebook's pictures and tables; nothing is trained here. The notebook shows open figures at
the end of a cell.

P = 2 prompts, Y = 1,111 responses; logps and rewards are (P, Y), x is a prompt's place.
"""

import matplotlib.pyplot as plt
import torch

import dpo
from experiments import frontier, lab
from experiments.lab import WORLD, where
from experiments.verdicts import BLUE, COLOURS, DASHES, ORANGE, RED, bars, lines, said


def start():
    """For the notebook's first cell: one look for all pictures; one thread, as in experiments/."""
    torch.set_num_threads(1)
    plt.rc("figure", dpi=80)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("axes", grid=True, axisbelow=True)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", alpha=0.25)
    plt.rc("legend", fontsize=9)


def table(head, *rows, digits=2):
    """Print rows of words and numbers under their heads, in columns as wide as they need."""
    texts = [[f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in (head, *rows)]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*texts)]
    for first, *others in texts:
        cells = [first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:]))]
        print("   ".join(cells).rstrip())


def over_seeds(rows, by, heads, title):
    """A table of means ± standard deviations for each value of `by`; heads: column -> its head."""
    groups = {name: where(rows, **{by: name}) for name in dict.fromkeys(row[by] for row in rows)}
    spreads = [(name, *(said(mine, key) for key in heads)) for name, mine in groups.items()]
    print(f"{title}, five seeds")
    table(("", *heads.values()), *spreads)


def word(y):
    """Response number y, as one would write it."""
    return WORLD.responses[y].strip() or "(nothing)"


def names(x, shown):
    return [f"{word(y)}  {WORLD.rewards[x, y]:+.1f}" for y in shown]


def panels(n, height=3.5, **keys):
    return plt.subplots(1, n, figsize=(13 if n > 1 else 9, height), **keys)


# Steps 1 to 4


def likeliest(x, ref):
    _, ax = panels(1)
    top = ref[x].argsort(descending=True)[:20]
    shade = plt.cm.cividis((WORLD.rewards[x, top] + 4.5) / 9)
    ax.bar(range(20), ref[x, top].exp(), color=shade, edgecolor="black", linewidth=0.6)
    ax.set_xticks(range(20), names(x, top), rotation=50, ha="right")
    rest = f"the other {len(ref[x]) - 20:,} share {1 - ref[x, top].exp().sum():.0%}"
    ax.set(title=f"after '{WORLD.prompts[x].strip()}' (brighter: higher r*); {rest}")
    ax.set(xlabel="the 20 likeliest responses and their r*", ylabel="probability")


def pair(ids, mask, logps, sums, listed):
    """A pair's two rows token by token; position t of logps predicts token t + 1."""
    for i, side in enumerate(("chosen", "rejected")):
        rows = []
        for t, token in enumerate(ids[i].tolist()):
            text = WORLD.tokenizer.decode([token]).strip().replace("<|endoftext|>", "(end)")
            text = text if mask[i, t:].any() else "(padding)"
            rows.append((text, "yes", logps[i, t - 1].item()) if mask[i, t] else (text, "no", ""))
        rows.append(("sum: log pi(y|x)", "", sums[i].item()))
        table((side, "scored", "log-prob"), *rows, ("listed", "", listed[i].item()), digits=3)
        print()


def counted(gap):
    """gap (n,): r*(chosen) - r*(rejected) of drawn pairs."""
    sizes, of_size, n = gap.abs().round(decimals=2).unique(return_inverse=True, return_counts=True)
    won = torch.zeros(len(sizes)).index_add(0, of_size, dpo.accuracy(gap)) / n
    _, ax = panels(1)
    axis, often = torch.linspace(0, 6, 100), (n >= 200) & (sizes > 0)
    ax.plot(axis, dpo.bradley_terry(axis, torch.zeros(100)), color=BLUE, label="Eq. 1")
    error = 2 * (won * (1 - won) / n) ** 0.5
    style = dict(fmt="o", color="black", markersize=3, lw=1)
    label = "counted, with two standard errors"
    ax.errorbar(sizes[often], won[often], error[often], label=label, **style)
    ax.set(xlabel="|r*(y1) - r*(y2)|", ylabel="fraction won by the better response")
    ax.legend(loc="lower right")


def responses(x, policies, ref):
    """policies: title -> logps, normalised or not. A panel for each; the reference as ticks."""
    shown = torch.cat([logps[x].topk(8).indices for logps in policies.values()]).unique()
    shown = shown[WORLD.rewards[x, shown].argsort(stable=True)]
    sums = [logps[x].exp().sum() for logps in policies.values()]
    normalised = all(abs(total - 1) < 1e-6 for total in sums)
    fig, axes = panels(len(policies), 4.4, sharey=True)
    for ax, (title, logps), total in zip(axes, policies.items(), sums):
        colour = BLUE if abs(total - 1) < 1e-6 else ORANGE
        ax.barh(
            range(len(shown)), logps[x, shown].exp(), color=colour, edgecolor="black", linewidth=0.6
        )
        style = dict(color=RED, markersize=9, mew=2, label="reference")
        ax.plot(ref[x, shown].exp(), range(len(shown)), "|", **style)
        ax.set(title=title if normalised else f"{title}\nall 1,111 sum to {total:.2f}")
        ax.set(xlabel="probability (scales differ)" if colour == BLUE else "not yet a probability")
    axes[0].set_yticks(range(len(shown)), names(x, shown))
    axes[0].set(ylabel="response and its r*, sorted by r*")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower right")


def regret(away, J, top_J, of_ref):
    """1,000 policies' KL(pi || pi*) and J, the optimum's J, and the reference's (KL, J)."""
    _, ax = panels(1)
    end = float(max(away.max(), of_ref[0]))
    ax.plot([0, end], [top_J, top_J - end], color=BLUE, label="beta log Z - beta KL(pi || pi*)")
    ax.scatter(away, J, 8, color="black", zorder=3, label=f"{len(J):,} random policies")
    ax.plot(*of_ref, "s", color=RED, zorder=4, label="the reference")
    ax.plot(0, top_J, "*", color=BLUE, markersize=16, label="Eq. 4")
    ax.set(xlabel="KL(pi || pi*), nats", ylabel="J, in units of r*")
    ax.legend(loc="lower left")


def judged(rows):
    """course.over_optimised: what the reward model promises, and what r* says."""
    _, ax = panels(1)
    for seed in sorted({row["seed"] for row in rows}):
        mine = where(rows, seed=seed)
        for key, name, colour, ls in (
            ("promised", "E of the learned reward", ORANGE, "--"),
            ("expected_reward", "E[r*], the true reward", BLUE, "-"),
        ):
            points = [row["kl"] for row in mine], [row[key] for row in mine]
            ax.plot(*points, color=colour, ls=ls, lw=1.2, label=None if seed else name)
    ax.set(xlabel="KL(pi || pi_ref), nats: beta falls to the right", ylabel="units of r*")
    ax.legend(loc="upper left")


def heat_maps(x, tables, shown):
    """tables: title -> rewards; P(row beats column) by Eq. 1, for six responses."""
    fig, axes = panels(len(tables), 4)
    for ax, (title, rewards) in zip(axes, tables.items()):
        r = rewards[x, shown]
        p = dpo.bradley_terry(*torch.broadcast_tensors(r[:, None], r[None, :]))
        ax.imshow(p, cmap="cividis", vmin=0, vmax=1)
        for i, row in enumerate(p):
            for j, value in enumerate(row):
                style = dict(ha="center", va="center", color="white" if value < 0.55 else "black")
                ax.text(j, i, f"{value:.2f}", **style)
        ticks = [f"{word(y)}\n{rewards[x, y]:+.1f}" for y in shown]
        ax.set_xticks(range(len(shown)), ticks, fontsize=8)
        ax.set_yticks(range(len(shown)), [word(y) for y in shown])
        ax.set(title=title, xlabel="... this one), with its reward")
        ax.grid(False)
    axes[0].set(ylabel="P(this response beats ...")


# Steps 5 and 6


def loss_and_weight():
    m = torch.linspace(-6, 6, 241, dtype=torch.float64)
    none = torch.zeros_like(m)
    loss, weight, *_ = dpo.dpo_loss(m, none, none, none, 1.0)
    _, axes = panels(3)
    for ax, y, at_0, name in zip(axes, (loss, weight), (0.6931, 0.5), ("loss", "weight")):
        ax.plot(m, y, color=BLUE)
        ax.plot(0, at_0, "o", color=RED)
        ax.annotate(f"policy = reference: {at_0}", (0, at_0), (-0.5, 1.3 * at_0 + 0.08), color=RED)
        ax.set(xlabel="margin", ylabel=name)
    for b, colour, ls in zip((0.1, 0.5, 2.0), COLOURS, DASHES):
        pull = -dpo.dpo_gradient(m, none, none, none, b)[0]
        axes[2].plot(m, pull, color=colour, ls=ls, label=f"beta = {b:g}")
    axes[2].set(xlabel="log-ratio of chosen minus that of rejected, nats", ylabel="beta * weight")
    axes[2].legend()


def weights_by_label(steps, weights, truth):
    """weights: of every pair (n,) at each step; truth (n,): r*(chosen) - r*(rejected)."""
    kinds = {
        "label wrong by more than 2": truth < -2, "wrong by up to 2": (truth >= -2) & (truth < 0),
        "equal rewards": truth == 0, "right by up to 2": (truth > 0) & (truth <= 2),
        "right by more than 2": truth > 2,
    }  # fmt: skip
    fig, (left, right) = panels(2, 4.2)
    parts = torch.stack([torch.stack([w[mine].sum() for w in weights]) for mine in kinds.values()])
    for (name, mine), part, colour, ls in zip(kinds.items(), parts, COLOURS, DASHES):
        label = f"{name} ({mine.double().mean():.0%} of the pairs)"
        left.plot(steps, part / mine.sum(), color=colour, ls=ls, label=label)
        left.axhline((-truth[mine]).sigmoid().mean(), color="black", lw=0.6)
    parts = parts / parts.sum(0)
    right.stackplot(steps, parts, colors=COLOURS, alpha=0.8)
    half = len(steps) // 2
    for name, middle in zip(kinds, parts.cumsum(0)[:, half] - parts[:, half] / 2):
        right.text(steps[half], middle, name, ha="center", va="center", fontsize=8)
    left.set(xlabel="step", ylabel="mean gradient weight", ylim=(0, 1))
    right.set(xlabel="step", ylabel="fraction of all weight")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def rewards_learned(implicit, ref, log_Z, beta, steps, curves):
    """Left: implicit against true reward. Right: accuracy of the first n pairs at each step."""
    _, (left, right) = panels(2, 3.8)
    for i, (prompt, colour, marker) in enumerate(zip(WORLD.prompts, (BLUE, ORANGE), "o^")):
        dots = dict(s=250 * ref[i].exp() ** 0.5, color=colour, marker=marker, alpha=0.5)
        left.scatter(WORLD.rewards[i], implicit[i], label=prompt.strip(), **dots)
        left.axline((0, -beta * log_Z[i]), slope=1, color=colour, lw=1)
    left.set(xlabel="true reward r*", ylabel="implicit reward, in units of r*")
    left.legend(title="lines: r* - beta log Z(x)")
    for (n, curve), colour, ls in zip(curves.items(), COLOURS, DASHES):
        right.plot(steps, curve, color=colour, ls=ls, label=f"{n:,} pair{'s' * (n > 1)}")
    right.set(xlabel="step", ylabel="accuracy")
    right.legend()


# Steps 7 to 10: mostly five seeds, from the CSV files in assets/


def displacement(moved, falls, at_optimum):
    """A panel for each cause: course.displaced, claims.both_log_probs_fall, and pi* for each beta:
    (beta, mean of chosen, of rejected)."""
    _, axes = panels(3, 3.8)
    for i, kind in enumerate(("table", "network")):
        mine = where(moved, policy=kind)
        at = [i + 0.08 * (row["seed"] - 2) for row in mine]
        axes[0].plot(at, [row["moved"] for row in mine], "o", color=COLOURS[i], alpha=0.7)
    axes[0].set_xticks((0, 1), ("table", "network"))
    axes[0].set(title="1. four pairs, beta 0.1: each chosen one", xlabel="a column for each seed")
    mine = where(falls, pairs=2_000, beta=1.0)
    bars(axes[1], ("table", "network", "pi*"), ("chosen", "rejected"),
         lambda policy, key: [row[key] for row in where(mine, policy=policy)])  # fmt: skip
    axes[1].set(title="2. 2,000 pairs, beta 1: means")
    betas, *means = zip(*at_optimum)
    for mean, name, colour, ls in zip(means, ("chosen", "rejected"), COLOURS, DASHES):
        axes[2].plot(betas, mean, color=colour, ls=ls, label=name)
    axes[2].set(title="3. pi* of Eq. 4, seed 0: means", xscale="log", xlabel="beta")
    for ax in axes:
        ax.axhline(0, color="black", lw=0.8)
        ax.set(ylabel="log pi / pi_ref, nats")
    axes[1].legend(loc="lower right")
    axes[2].legend(loc="lower right")


def over_steps(rows, shown, by=None):
    """Bands over seeds, a panel for each label -> its columns; a line for each column, or for each
    value of `by`."""
    fig, axes = panels(len(shown), 3.8)
    for ax, (label, keys) in zip(axes, shown.items()):
        points = [{"step": row["step"], "seed": row["seed"], label: row[key],
                   "line": row[by] if by else key.replace("_", " ")}
                  for key in keys for row in rows]  # fmt: skip
        lines(ax, points, "step", label, "line")
        ax.set(ylabel=label)
        if len(keys) > 1:
            ax.legend()
    if by:
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def reward_against_kl(dots, curves):
    _, ax = panels(1, 5)
    for seed in range(5):
        mine = where(curves, seed=seed)
        label = None if seed else "pi* of Eq. 4 for every beta, each seed"
        xy = [row["kl"] for row in mine], [row["expected_reward"] for row in mine]
        ax.plot(*xy, color="black", lw=0.8, label=label)
    for method in ("DPO", "PPO", "PPO-GT", "Best-of-N", "Unlikelihood", "ORPO from SFT"):
        colour, marker = frontier.STYLE[method]
        mine = where(dots, method=method, labels="hard")
        ends = {(row["setting"], row["seed"]): row for row in mine}.values()  # the last of each run
        xy = [row["kl"] for row in ends], [row["expected_reward"] for row in ends]
        ax.scatter(*xy, 45, label=method, color=colour, marker=marker, edgecolors="white")
    ax.set(xlabel="KL(pi || pi_ref), nats", ylabel="E[r*]", title="labels by Bradley-Terry")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def family(losses, beta=1.0):
    m = torch.linspace(-3, 5, 161, dtype=torch.float64, requires_grad=True)
    none = torch.zeros_like(m).detach()
    _, axes = panels(2, 3.8)
    for (name, loss), colour, ls in zip(losses.items(), COLOURS, DASHES):
        f = loss(m, none, none, none, beta=beta)
        f = getattr(f, "losses", f)
        (slope,) = torch.autograd.grad(f.sum(), m)
        for ax, y in zip(axes, (f.detach(), -slope)):
            ax.plot(m.detach(), y, color=colour, ls=ls, label=name, lw=2)
    axes[0].set(xlabel="margin m", ylabel="loss f(m)", ylim=(-1, 4))
    axes[1].set(xlabel="margin m", ylabel="weight -f'(m)", ylim=(-1, 2))
    axes[1].axhline(0, color="black", lw=0.8)
    axes[1].legend(loc="upper right")
