"""From the numbers of claims.py and frontier.py to a figure and a row for each claim.

    python -m experiments.verdicts

draws anew from the CSV files in assets/, without training; writes assets/claims.md, README's table.
"Holds" is decided by a rule that stands in the function. Bands and ± are a standard deviation.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from experiments import lab
from experiments.lab import where

BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#777777"
COLOURS = BLUE, RED, GREEN, ORANGE, "#CC79A7", GREY  # of Okabe and Ito; with a dash each
DASHES = "-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))


def last(rows, by="step"):
    return where(rows, **{by: max(row[by] for row in rows)})


def values(rows, key):
    return [row[key] for row in rows]


def mean(rows, key):
    return sum(values(rows, key)) / len(rows)


def said(rows, key):
    """Mean and spread over the seeds, each the mean of its rows."""
    return lab.spread([mean(where(rows, seed=seed), key) for seed in {row["seed"] for row in rows}])


def told(rows, **keys):
    """Several of these: told(rows, kl="KL")."""
    return ", ".join(f"{name} {said(rows, key)}" for key, name in keys.items())


def lines(ax, rows, x, y, by, names=None):
    """A line with its band for each value of `by`."""
    for i, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        mine = where(rows, **{by: name})
        places = sorted({row[x] for row in mine})
        found = [lab.mean_sd(values(where(mine, **{x: place}), y)) for place in places]
        middle, width = torch.tensor(found).T
        label = names[name] if names else str(name)
        ax.plot(places, middle, ls=DASHES[i], color=COLOURS[i], label=label, marker=".")
        ax.fill_between(places, middle - width, middle + width, color=COLOURS[i], alpha=0.15)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))


def bars(ax, groups, bar_names, height):
    """Groups of bars with their spread: height(group, bar) -> the seeds' numbers."""
    for i, bar in enumerate(bar_names):
        for j, group in enumerate(groups):
            middle, sd = lab.mean_sd(height(group, bar))
            at = j + 0.8 * (i - (len(bar_names) - 1) / 2) / len(bar_names)
            style = dict(color=COLOURS[i], width=0.75 / len(bar_names), edgecolor="black")
            style |= {"hatch": ("", "//", "..")[i % 3], "label": None if j else bar}
            ax.bar(at, middle, yerr=sd, capsize=3, **style)
    ax.set_xticks(range(len(groups)), groups)
    ax.axhline(0, color="black", linewidth=0.8)


def panels(n, width=13):
    fig = Figure(figsize=(width, 4), layout="constrained")
    return fig, list(fig.subplots(1, n, squeeze=False)[0])


def no_reward_model_needed(rows):
    fig, axes = panels(3)
    for ax, key in zip(axes, ("rank_correlation", "pair_accuracy", "probability_error")):
        names = list(dict.fromkeys(values(rows, "rewards")))
        sizes = {f"{pairs:,.0f} pairs": pairs for pairs in dict.fromkeys(values(rows, "pairs"))}
        bars(ax, list(sizes), names, lambda size, name: values(
            where(rows, rewards=name, pairs=sizes[size]), key))  # fmt: skip
        ax.set(ylabel=key.replace("_", " ") + " against r*")
    axes[0].legend(loc="lower right")
    most = max(values(rows, "pairs"))
    ours, theirs = (where(rows, rewards=name, pairs=most) for name in names)
    holds = mean(ours, "pair_accuracy") > mean(theirs, "pair_accuracy") - 0.01
    text = "pairs ranked right: " + ", ".join(
        f"{part[0]['rewards']} {said(part, 'pair_accuracy')}" for part in (ours, theirs)
    )
    return fig, "no reward model needed: the policy is one", text, holds


def the_weight_matters(rows):
    fig, axes = panels(3)
    for ax, key in zip(axes, ("grammatical", "entropy", "expected_reward")):
        lines(ax, rows, "step", key, "weight", {"with": "DPO", "without": "weight left at 1/2"})
    axes[0].set(ylabel="mass on grammatical responses", ylim=(0, 1))
    axes[0].legend()
    with_it, without = (where(last(rows), weight=name) for name in ("with", "without"))
    worse = (mean(without, k) < mean(with_it, k) for k in ("grammatical", "expected_reward"))
    keys = dict(expected_reward="E[r*]", entropy="entropy")
    text = f"with it: {told(with_it, **keys)}; without: {told(without, **keys)}"
    return fig, "the weight matters", text, all(worse)


def little_tuning(rows):
    betas = sorted(set(values(rows, "beta")))
    fig, axes = panels(len(betas))
    for ax, beta in zip(axes, betas):
        lines(ax, where(rows, beta=beta), "lr", "gained", "method")
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", title=f"beta = {beta:g}", ylim=(-0.5, 1.1), xlabel="learning rate")
        ax.set(ylabel="J gained, of what pi* of Eq. 4 gains")
    axes[0].legend(loc="lower left")
    shares, texts = {"DPO": [], "PPO": []}, []
    for name, share in shares.items():
        for seed in sorted(set(values(rows, "seed"))):
            mine = where(rows, seed=seed, method=name)
            best = {beta: max(values(where(mine, beta=beta), "gained")) for beta in betas}
            share.append(sum(r["gained"] >= 0.9 * best[r["beta"]] for r in mine) / len(mine))
        texts.append(f"{name} {lab.spread(share)}")
    (ours, sd), (theirs, their_sd) = (lab.mean_sd(share) for share in shares.values())
    text = "share of the grid within 10% of its own best J: " + ", ".join(texts)
    return fig, "stable, little tuning", text, ours - sd > theirs + their_sd


def as_good_or_better(rows):
    labels = {"hard": "Bradley-Terry labels", "deterministic": "deterministic labels"}
    budgets = sorted(set(values(rows, "budget")))
    fig, axes = panels(2)
    for ax, (kind, title) in zip(axes, labels.items()):
        at = {f"KL <= {budget:g}": where(rows, labels=kind, budget=budget) for budget in budgets}
        bars(ax, list(at), ("DPO", "PPO", "PPO-GT"),
             lambda group, name: values(where(at[group], method=name), "share"))  # fmt: skip
        ax.set(title=title, ylabel="share of what the exact curve gains", ylim=(0, 1.05))
    axes[0].legend(loc="lower left")
    texts, wins = [], []
    for kind, title in labels.items():
        found = {name: where(rows, labels=kind, method=name, budget=2.0)
                 for name in ("DPO", "PPO", "PPO-GT")}  # fmt: skip
        texts.append(f"{title}, KL <= 2: " + ", ".join(
            f"{name} {said(part, 'best')}" for name, part in found.items()))  # fmt: skip
        for budget in budgets:
            pair = [where(rows, labels=kind, method=m, budget=budget) for m in ("DPO", "PPO")]
            wins.append(mean(pair[0], "best") > mean(pair[1], "best"))
    text = "E[r*]: " + "; ".join(texts) + f"; DPO ahead of PPO in {sum(wins)} of {len(wins)}"
    return fig, "as good as PPO or better, at equal KL", text, all(wins)


def close_to_the_reference(rows):
    fig, axes = panels(4, 17)
    betas = sorted({row["beta"] for row in rows if row["run"] != "reference"})
    trained = [row for row in rows if row["run"] in ("pi*", "all pairs")]
    hotel = [row for row in where(rows, prompt="hotel") if row["run"].startswith("film")]
    for ax, part, key in zip(axes, (trained, trained, hotel, hotel), ("kl", "grammatical") * 2):
        lines(ax, part, "beta", key, "run")
        ax.set_xscale("log", base=2)
        ax.legend()
        title = "both prompts" if part is trained else "the hotel, which no pair mentions"
        ax.set(title=title, ylabel="KL(pi || pi_ref), nats")
        if key == "grammatical":
            ax.set(ylabel="mass on grammatical responses", ylim=(0, 1))
    drift = [where(rows, run="all pairs", beta=beta) for beta in betas]
    kls = [mean(part, "kl") for part in drift]
    least = betas[len(betas) // 2]
    names = "film pairs only", "film, no KL penalty"
    held, loose = (where(hotel, run=name, beta=least) for name in names)
    text = ", ".join(f"KL {said(d, 'kl')} at beta {b:g}" for b, d in zip(betas[::4], drift[::4]))
    text += f"; at the prompt in no pair, beta {least:g}: {said(held, 'kl')}, without KL penalty "
    text += said(loose, "kl")
    holds = kls == sorted(kls, reverse=True) and mean(held, "kl") < mean(loose, "kl")
    return fig, "the KL penalty keeps the policy close to the reference", text, holds


def over_fitting(rows):
    fig, axes = panels(3, 14)
    runs = where(rows, loss="dpo", flipped=0.0)
    sizes = sorted(set(values(runs, "pairs")))
    shown = [row for row in runs if row["pairs"] in (1_000, 10_000, 100_000)]
    names = {size: f"{size:,.0f} pairs" for size in sorted(set(values(shown, "pairs")))}
    lines(axes[0], shown, "step", "held_out_accuracy", "pairs", names)
    lines(axes[1], shown, "step", "kl", "pairs", names)
    axes[0].set(ylabel="accuracy (thin: own pairs, seed 0)", title="DPO, clean labels")
    for i, size in enumerate(names):
        mine = where(shown, pairs=size, seed=0)
        axes[0].plot(values(mine, "step"), values(mine, "train_accuracy"), color=COLOURS[i], lw=0.7)
    axes[0].legend()
    axes[1].set(ylabel="KL(pi || pi_ref), nats", title="DPO, clean labels")
    ends = last(rows)
    for i, loss in enumerate(("dpo", "cdpo", "robust", "ipo")):
        for flip, style in ((0.0, "-"), (0.2, ":")):
            mine = where(ends, loss=loss, flipped=flip)
            at = sorted(set(values(mine, "pairs")))
            middle = [mean(where(mine, pairs=n), "objective") for n in at]
            label = f"{loss}, {'a fifth flipped' if flip else 'clean'}"
            axes[2].plot(at, middle, style, color=COLOURS[i], marker="osvD"[i], label=label)
    axes[2].set(xscale="log", xlabel="pairs", ylabel="J at beta 1, at the end", ylim=(-6, 1.6))
    axes[2].legend(fontsize=8)
    clean = where(ends, loss="dpo", flipped=0.0)
    keys = dict(train_accuracy="accuracy", held_out_accuracy="held out", gap_closed="gap closed")
    ends_shown = (1_000, 100_000)
    text = "; ".join(f"{n:,} pairs: {told(where(clean, pairs=n), **keys)}" for n in ends_shown)
    few, many = (where(clean, pairs=n) for n in (sizes[0], sizes[-1]))
    gaps = [mean(x, "train_accuracy") - mean(x, "held_out_accuracy") for x in (few, many)]
    holds = gaps[0] > 0.1 > 0.02 > gaps[1] and mean(few, "gap_closed") < 0
    return fig, "offline: few pairs, trained for long, are overfitted", text, holds


def coverage(rows):
    fig, axes = panels(4, 17)
    for ax, key in zip(axes, ("margin", "accuracy", "gap_closed")):
        lines(ax, rows, "pairs_seen", key, "case")
        ax.locator_params(axis="x", nbins=4)
    axes[0].set(ylabel="margin of its own pairs")
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[0].legend(fontsize=8)
    ends = last(rows, "pairs_seen")
    cases = list(dict.fromkeys(values(rows, "case")))
    floor = [0.0] * len(cases)
    names = dict(
        grammatical="grammatical", other_paired="not, but in some pair", in_no_pair="neither"
    )
    for i, (key, label) in enumerate(names.items()):
        height = [mean(where(ends, case=case), key) for case in cases]
        style = dict(color=COLOURS[i], edgecolor="black", hatch=("", "//", "..")[i], label=label)
        axes[3].barh(cases, height, left=floor, **style)
        floor = [low + more for low, more in zip(floor, height)]
    axes[3].invert_yaxis()
    axes[3].set(xlabel="mass at the end")
    axes[3].legend(loc="lower center", bbox_to_anchor=(0.4, 1), fontsize=8, ncols=3)
    keys = dict(gap_closed="gap closed", in_no_pair="mass on nonsense in no pair")
    text = "; ".join(f"{c}: {told(where(ends, case=c), **keys)}" for c in cases[:2])
    peaked, start = where(ends, case=cases[0]), where(rows, case=cases[0], pairs_seen=0.0)
    leaked = mean(peaked, "in_no_pair") - mean(start, "in_no_pair")
    holds = mean(peaked, "gap_closed") < 0 < mean(peaked, "margin") and leaked > 0.1
    return fig, "the loss says nothing of responses in no pair", text, holds


def both_log_probs_fall(rows):
    fig = Figure(figsize=(15, 7), layout="constrained")
    upper, lower = fig.subplots(2, 4, sharey="row")
    cases = [(pairs, beta) for pairs in (4, 2_000) for beta in (0.1, 1.0)]
    masses = {"chosen in a pair": "mass_chosen", "only rejected": "mass_only_rejected"}
    masses["in no pair"] = "mass_in_no_pair"
    for above, below, (pairs, beta) in zip(upper, lower, cases):
        mine = where(rows, pairs=pairs, beta=beta)
        bars(above, ("table", "network", "pi*"), ("chosen", "rejected"),
             lambda policy, key: values(where(mine, policy=policy), key))  # fmt: skip
        bars(below, ("table", "network", "pi*"), list(masses),
             lambda policy, key: values(where(mine, policy=policy), masses[key]))  # fmt: skip
        above.set(title=f"{pairs:,} pairs, beta {beta:g}", yscale="symlog")
    upper[0].set(ylabel="mean log pi / pi_ref, nats")
    lower[0].set(ylabel="mass gained or lost, by kind of response")
    upper[0].legend(loc="lower left")
    lower[0].legend(loc="lower right")
    texts = []
    for pairs, beta in (cases[0], cases[-1]):
        found = [where(rows, pairs=pairs, beta=beta, policy=p) for p in ("table", "network", "pi*")]
        texts.append(f"{pairs:,} pairs, beta {beta:g}: " + ", ".join(
            f"{part[0]['policy']} {said(part, 'chosen')}" for part in found))  # fmt: skip
    text = "log pi / pi_ref of chosen: " + "; ".join(texts)
    network = [where(rows, pairs=pairs, beta=beta, policy="network") for pairs, beta in cases]
    falls = all(mean(part, key) < 0 for part in network for key in ("chosen", "rejected"))
    return fig, "both log-probs fall in the network", text, falls


CLAIMS = (no_reward_model_needed, the_weight_matters, little_tuning, as_good_or_better,
          close_to_the_reference, over_fitting, coverage, both_log_probs_fall)  # fmt: skip


def verdict(claim, folder):
    """(Figure, row of the table) of a claim, from its CSV file."""
    name = "frontier_shares" if claim is as_good_or_better else f"claims_{claim.__name__}"
    fig, title, text, holds = claim(lab.load_csv(folder / f"{name}.csv"))
    command = f"`python -m experiments.{name.split('_')[0]}`"
    return fig, f"| {title} | {command} | {text} | {'yes' if holds else 'no'} |"


def main(folder=Path("assets")):
    table = ["| claim | command | measured | holds |", "|---|---|---|---|"]
    for claim in CLAIMS:
        try:
            fig, row = verdict(claim, folder)
        except FileNotFoundError as error:  # frontier.py makes its own
            print(f"{error.filename} is missing: run the experiment that makes it first")
            continue
        fig.savefig(folder / f"claims_{claim.__name__}.png", dpi=100)
        table.append(row)
    (folder / "claims.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the table's ± on an ASCII console
    main()
