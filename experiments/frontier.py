"""The paper's Figure 2, left, in the toy world, with the curve it could not draw: pi*_beta.

    python -m experiments.frontier [--quick]

Each dot is a policy at an evaluation, at its exact KL(pi || pi_ref) and E[r*]. Two panels: pairs
labelled by Bradley-Terry, and the paper's own deterministic labels. Scaled from the paper's grid:
beta 0.05, 0.1, 1, 5 to 0.25, 0.5, 1, 2, and PPO's target KL of 3, 6, 9, 12 on an axis of 20 nats to
the same shares of where the exact curve ends (7.3 nats), since a response of three words cannot be
pushed further, and one of 1/20, for the low end; alpha of unlikelihood as there, and one that
leaves its loss bounded. The paper looks every 100 steps; here a run has 14 looks, most of them
early, where the policy moves fastest.
"""

import functools
import itertools

import numpy as np
import torch
from matplotlib.figure import Figure

import dpo
from experiments import lab, rlhf
from experiments.lab import WORLD
from experiments.losses import orpo_loss, unlikelihood_loss

BETAS = 0.25, 0.5, 1.0, 2.0
TARGET_KL = 1 / 20, 3 / 20, 6 / 20, 9 / 20, 12 / 20  # shares of where the exact curve ends
TAUS = 0.05, 0.1, 0.25, 1.0  # IPO
ALPHAS = 0.05, 0.1, 0.5, 1.0  # unlikelihood
LAMBDAS = 0.2, 1.0, 5.0  # ORPO
BEST_OF = 1, 4, 16, 64, 128
BUDGETS = 0.5, 1.0, 2.0, 4.0  # nats of KL, for the table
SWEEP = torch.logspace(2, -2, 400, dtype=torch.float64)  # beta along the exact curve


# Exact: the curve, and what some methods converge to


def frontier(ref):
    """The exact curve from beta = 100 to 0.01: KL and E[r*] of pi*_beta (Eq. 4), log Z; (400,)."""
    optima = [dpo.optimal_policy(ref, WORLD.rewards, beta) for beta in SWEEP]
    rows = [lab.measure(logps, ref) for logps, _ in optima]
    kl, expected_reward = ([row[key] for row in rows] for key in ("kl", "expected_reward"))
    log_Z = [log_Z.mean().item() for _, log_Z in optima]
    return torch.tensor([kl, expected_reward, log_Z], dtype=torch.float64)


def height(kl, expected_reward, curve):
    """How far a policy lies above the exact curve, in units of r*: at most 0, but for rounding.

    Nothing lies above: every policy has E[r] - beta KL <= beta log Z, for every beta (Eq. 14).
    """
    return (expected_reward - SWEEP * kl - SWEEP * curve[2]).max().item()


def best_of_n(ref_logps, rewards, n):
    """The best of n responses drawn from pi_ref, exactly: two (Y,) -> log-probs (Y,).

    P(best has reward r) = F(r)^n - F(r-)^n with F its distribution; responses of equal reward share
    it as pi_ref does. KL(pi || pi_ref) is at most log n - (n - 1) / n.
    """
    probs = ref_logps.exp()
    levels, level = rewards.unique(return_inverse=True)  # ascending
    of_level = torch.zeros(len(levels), dtype=probs.dtype).index_add(0, level, probs)
    up_to = of_level.cumsum(0) / of_level.sum()  # F(r)
    below = up_to - of_level / of_level.sum()  # F(r-)
    ratio = (up_to**n - below.clamp(min=0) ** n) / of_level
    return (probs * ratio[level]).log()


def win_rate(ref_logps, rewards, labels):
    """s(y): the share of pairs with y, against responses of pi_ref, that y wins. (Y,) -> (Y,)"""
    margins = rewards[:, None] - rewards
    wins = margins.sigmoid() if labels == "hard" else (margins > 0) + (margins == 0) / 2
    return wins.double() @ ref_logps.exp()


def unlikelihood_optimum(ref_logps, rewards, labels, alpha=0.0):
    """Where -log pi(y_w) + alpha log pi(y_l) ends with infinite pairs, and the alpha up to which it
    ends anywhere: (Y,), (Y,) -> log-probs (Y,), float. alpha = 0 is Preferred-FT, 2 pi_ref s.
    """
    s = win_rate(ref_logps, rewards, labels)
    logps = ref_logps + (2 * (s - alpha * (1 - s)) / (1 - alpha)).log()
    return logps, (s / (1 - s)).min().item()


# Runs


def exact_rows(labels, seed, curve):
    """SFT (Best-of-1), Best-of-N and what the two closed forms say, without any training."""
    _, ref = lab.reference(seed)
    both = list(zip(ref, WORLD.rewards))
    policies = {("Best-of-N", n): [best_of_n(*each, n) for each in both] for n in BEST_OF}
    half = min(unlikelihood_optimum(*each, labels)[1] for each in both) / 2
    for alpha, method in ((0.0, "Preferred-FT, exact"), (half, "Unlikelihood, exact")):
        policies[method, alpha] = [unlikelihood_optimum(*each, labels, alpha)[0] for each in both]
    runs = [(name, [(1, torch.stack(logps))]) for name, logps in policies.items()]
    return [row for name, run in runs for row in evaluations(run, 1, (labels, *name, seed), curve)]


def evaluations(run, last, who, curve):
    """A run's (step, logps), at steps that grow by the root of 2 up to the last -> rows, for most
    of the way is made in the first steps. None may lie above the exact curve."""
    rows, looks = [], [last / 2 ** (k / 2) for k in range(14)]
    for step, logps in run:
        if looks and step >= looks[-1]:
            while looks and step >= looks[-1]:
                looks.pop()
            row = dict(zip(("labels", "method", "setting", "seed"), who)) | {"step": step}
            found = lab.measure(logps, lab.reference(who[-1])[1])
            row |= {key: found[key] for key in ("kl", "expected_reward")}
            assert height(row["kl"], row["expected_reward"], curve) < 1e-9, f"above pi*: {row}"
            rows.append(row)
    return rows


def work(kind, labels, seed, quick):
    """All the runs of one kind of method -> rows, one for each evaluation."""
    model, ref = lab.reference(seed)
    curve, drawn = frontier(ref), lab.draw(seed, lab.PAIRS, labels)
    steps, samples = (200, rlhf.SAMPLES // 8) if quick else (lab.STEPS, rlhf.SAMPLES)
    some = slice(1, 3) if quick else slice(None)
    dpo_run = functools.partial(lab.train_dpo, seed, drawn, steps=steps)
    runs, last = {}, steps
    if kind == "DPO":
        runs = {("DPO", beta): dpo_run(beta=beta) for beta in BETAS[some]}
    if kind == "IPO":
        runs = {("IPO", tau): dpo_run(loss=dpo.ipo_loss, beta=tau) for tau in TAUS[some]}
    if kind == "Unlikelihood":
        bounds = [unlikelihood_optimum(*each, labels)[1] for each in zip(ref, WORLD.rewards)]
        for alpha in (0.0, min(bounds) / 2, *ALPHAS[some]):
            name = "Unlikelihood" if alpha else "Preferred-FT"
            runs[name, alpha] = dpo_run(loss=unlikelihood_loss, alpha=alpha)
    if kind == "ORPO":
        for alpha in LAMBDAS[some]:
            losses = lab.preferences(orpo_loss, drawn, ref, alpha=alpha)
            for start, policy in (("base", lab.new_gpt(seed)), ("SFT", lab.start_from(seed)[0])):
                run = lab.descend(policy, losses, len(drawn.prompt), steps, 1e-2, seed)
                runs[f"ORPO from {start}", alpha] = run
    if kind in ("PPO", "PPO-GT"):
        rewards, last = WORLD.rewards, samples
        if kind == "PPO":
            rewards = rlhf.train_reward_model(model, drawn, 1 if quick else rlhf.EPOCHS, seed)
        for share in TARGET_KL[some]:
            target = share * curve[0, -1].item()
            runs[kind, share] = rlhf.ppo(model, rewards, seed, target_kl=target, samples=samples)
    made = [evaluations(run, last, (labels, *name, seed), curve) for name, run in runs.items()]
    return sum(made, exact_rows(labels, seed, curve) if kind == "DPO" else [])


# The table and the picture

STYLE = {  # colours of Okabe and Ito, told apart by the colour-blind; and a marker each
    "DPO": ("#0072B2", "o"),
    "PPO": ("#D55E00", "s"),
    "PPO-GT": ("#E69F00", "D"),
    "IPO": ("#56B4E9", "v"),
    "Unlikelihood": ("#CC79A7", "X"),
    "Unlikelihood, exact": ("#CC79A7", "*"),
    "Preferred-FT": ("#009E73", "P"),
    "Preferred-FT, exact": ("#009E73", "*"),
    "ORPO from SFT": ("#999999", ">"),
    "ORPO from base": ("#999999", "<"),
    "Best-of-N": ("black", "d"),
}


def reached(points, budget):
    """The most E[r*] with this much KL, from (KL, E[r*]) of policies: tossing a coin between two
    of them has the mean of their rewards, and at most the mean of their KLs (KL is convex)."""
    best = max(reward for kl, reward in points if kl <= budget)
    for kl, reward in points:
        for more_kl, more in points:
            if kl <= budget < more_kl:
                best = max(best, reward + (more - reward) * (budget - kl) / (more_kl - kl))
    return best


def table(rows, curves):
    """`reached` from SFT and every look, and the share of what is possible: of the exact curve's
    rise over SFT at that KL. A row for each of labels, method, budget and seed."""
    out = []
    names = itertools.product(("hard", "deterministic"), STYLE, curves)
    for labels, method, seed in names:
        kl, height, _ = curves[seed]
        sft = lab.measure(*2 * lab.reference(seed)[1:])["expected_reward"]
        wanted = {"labels": labels, "method": method, "seed": seed}
        mine = [(row["kl"], row["expected_reward"]) for row in lab.where(rows, **wanted)]
        for budget in BUDGETS:
            best, limit = reached([(0.0, sft), *mine], budget), float(np.interp(budget, kl, height))
            share = (best - sft) / (limit - sft)
            out.append(wanted | {"budget": budget, "best": best, "share": share})
    return out


def markdown(shares, seeds):
    """Both tables: mean over seeds of the best E[r*], and its share of the exact curve's rise."""
    lines = []
    for labels in ("hard", "deterministic"):
        title = f"{labels} labels; best E[r*] and share of the exact curve's rise, {seeds} seeds"
        budgets = " | ".join(f"KL at most {budget:g}" for budget in BUDGETS)
        lines += [title, "", f"| method | {budgets} |", "|---" * (len(BUDGETS) + 1) + "|"]
        for method in STYLE:
            cells = []
            for budget in BUDGETS:
                mine = lab.where(shares, labels=labels, method=method, budget=budget)
                best, share = (lab.spread([s[key] for s in mine]) for key in ("best", "share"))
                cells.append(f"{best} ({share})")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows, curves, path):
    fig = Figure(figsize=(13, 7), layout="constrained")
    titles = {"hard": "Bradley-Terry labels", "deterministic": "deterministic labels"}
    for ax, (labels, title) in zip(fig.subplots(1, 2, sharey=True), titles.items()):
        for kl, height, _ in curves.values():
            ax.plot(kl, height, color="black", linewidth=1.5, zorder=1)
        for method, (colour, marker) in STYLE.items():
            mine = lab.where(rows, labels=labels, method=method)
            ends = {(r["setting"], r["seed"]): r for r in mine}.values()  # the last of each run
            size = 110 if marker == "*" else 44
            for dots, area, alpha in ((mine, 9, 0.3), (ends, size, 0.95)):
                x, y = [r["kl"] for r in dots], [r["expected_reward"] for r in dots]
                label = method if dots is ends else None
                face = dict(c=colour, edgecolors="white", linewidths=0.4)
                ax.scatter(x, y, area, marker=marker, alpha=alpha, label=label, zorder=2, **face)
        end = next(iter(curves.values()))[0, -1]
        ax.set(title=title, xlabel="KL(pi || pi_ref), nats", xlim=(-0.15, 1.08 * end))
        ax.grid(alpha=0.25)
    fig.axes[0].set(ylabel="E[r*], true reward", ylim=(-0.4, 4.8))
    fig.axes[0].plot([], [], color="black", label="exact optimum of Eq. 4, a line per seed")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    note = "Small: each evaluation.  Large: the end of each run.  Black: nothing can lie above it."
    fig.suptitle(note, fontsize=10)
    fig.savefig(path, dpi=110)


def main():
    quick, folder = lab.parse(__doc__)
    seeds = range(1 if quick else 5)
    kinds = {"PPO": 115, "PPO-GT": 100, "Unlikelihood": 22, "ORPO": 22, "DPO": 16, "IPO": 15}
    jobs = [(k, labels, s, quick) for k in kinds for labels in ("hard", "deterministic")
            for s in seeds if (k, labels) != ("PPO-GT", "deterministic")]  # fmt: skip
    rows = sum(lab.run_jobs(work, jobs, [kinds[kind] for kind, *_ in jobs]), [])
    truth = lab.where(rows, method="PPO-GT")  # it sees r*, not the labels
    rows += [row | {"labels": "deterministic"} for row in truth]
    curves = {seed: frontier(lab.reference(seed)[1]) for seed in seeds}
    shares = table(rows, curves)
    lab.save_csv(folder / "frontier.csv", rows)
    lab.save_csv(folder / "frontier_shares.csv", shares)
    points = [
        (seed, beta.item(), *(v.item() for v in curve[:2, i]))
        for seed, curve in curves.items()
        for i, beta in enumerate(SWEEP)
        if i % 8 == 0
    ]
    names = "seed", "beta", "kl", "expected_reward"
    lab.save_csv(folder / "frontier_curve.csv", [dict(zip(names, point)) for point in points])
    draw(rows, curves, folder / "frontier.png")
    (folder / "frontier.md").write_text(markdown(shares, len(seeds)), encoding="utf-8")
    print((folder / "frontier.md").read_text(encoding="utf-8"))
    print(f"{len(rows)} policies, none above the exact curve; see {folder}/frontier.png")


if __name__ == "__main__":
    main()
