"""Is DPO as good as PPO?

Section 6.1 of the paper (Figure 2, left) says that it is better: DPO has the highest reward at
every KL, even against PPO-GT, which sees the true reward. The labels there are deterministic.

Found: no. Up to a KL of 2 nats the rewards differ by less than 0.2, but PPO is clearly ahead more
often. With Bradley-Terry's hard labels DPO stops rising at a KL of some 2.5 nats: a smaller beta
moves the policy further away, but for no more reward. PPO's reward goes on rising. It pays with a
reward model, a critic and as many new responses as the pairs hold. PPO-GT stays close to the curve
of Eq. 4, so what PPO loses, it loses to its reward model. The answer would be "yes" if DPO were
clearly ahead as often as PPO.

Every look at a run counts, so both methods may stop when they are best, and so does a mixture of
two looks. PPO aims at the limits of KL themselves, and DPO ends where beta takes it: on
deterministic labels no beta ends near 0.5. "Clearly" means by more than two standard errors of the
paired differences between runs of the same seed.
"""

from experiments import frontier, lab, plots
from experiments.lab import PAIRS, STEPS
from experiments.rlhf import BATCH, EPOCHS, SAMPLES

PARTS = {"PPO hard": 120, "PPO deterministic": 120, "PPO any": 100, "DPO": 60}  # any: PPO-GT
LABELS = ["hard", "deterministic"]
BUDGETS = [0.5, 1.0, 2.0, 4.0]  # of KL, in nats
COLORS = {
    "DPO": plots.BLUE,
    "PPO": plots.RED,
    "PPO-GT": plots.ORANGE,
    "Best-of-N": plots.GREEN,
    "Preferred-FT": plots.PURPLE,
}


def measure(seed, quick, part):
    """A row for each look at a policy: its method and setting, its KL and E[r*]."""
    steps = STEPS
    samples = SAMPLES
    epochs = EPOCHS
    if quick:
        steps = STEPS // 4
        samples = SAMPLES // 16
        epochs = 1
    if part != "DPO":
        labels = part.removeprefix("PPO ")
        return frontier.ppo_rows(seed, labels, samples, epochs)
    rows = frontier.exact_rows(seed)
    for labels in LABELS:
        rows += frontier.dpo_rows(seed, labels, steps)
    return rows


def reached(rows, method, labels, budget):
    """The most E[r*] at a KL of at most `budget`, a number for each seed. SFT is at a KL of 0."""
    found = []
    for seed in lab.values(rows, "seed"):
        policies = lab.where(rows, seed=seed, method="SFT")
        policies += lab.where(rows, seed=seed, method=method, labels=labels)
        points = [(row["kl"], row["expected_reward"]) for row in policies]
        found.append(frontier.reached(points, budget))
    return found


def comparisons(rows):
    """DPO and PPO for both kinds of labels at each budget of KL, and who is clearly ahead."""
    found = []
    for labels in LABELS:
        for budget in BUDGETS:
            ours = reached(rows, "DPO", labels, budget)
            theirs = reached(rows, "PPO", labels, budget)
            differences = [a - b for a, b in zip(ours, theirs)]
            ahead = "neither"
            if lab.is_clear(differences):
                ahead = "DPO" if lab.mean_sd(differences)[0] > 0 else "PPO"
            case = {"name": f"{labels}, KL at most {budget:g}", "DPO": ours, "PPO": theirs}
            found.append(case | {"differences": differences, "ahead": ahead})
    return found


def highest(rows, method):
    """With hard labels, the policy of each seed that has the most E[r*], at any KL."""
    found = []
    for seed in lab.values(rows, "seed"):
        mine = lab.where(rows, seed=seed, method=method, labels="hard")
        found.append(max(mine, key=lambda row: row["expected_reward"]))
    return found


def verdict(rows):
    """Yes, if PPO is not clearly ahead in more comparisons than DPO."""
    ahead = [case["ahead"] for case in comparisons(rows)]
    answer = "No."
    if ahead.count("PPO") <= ahead.count("DPO"):
        answer = "Yes."
    steps = lab.where(rows, method="DPO")[0]["last"]
    answer += f" {PAIRS:,} pairs, {steps} steps: of {len(ahead)} comparisons at equal KL,"
    answer += f" DPO is clearly ahead in {ahead.count('DPO')}, PPO in {ahead.count('PPO')}."
    ours = highest(rows, "DPO")
    theirs = highest(rows, "PPO")
    answer += f" With hard labels E[r*] is at most {lab.spread(ours, 'expected_reward')} with DPO,"
    answer += f" {lab.spread(theirs, 'expected_reward')} with PPO."
    return answer


def draw(rows):
    steps = lab.where(rows, method="DPO")[0]["last"]
    responses = lab.where(rows, method="PPO")[0]["last"] * BATCH
    title = f"{PAIRS:,} pairs; DPO {steps} steps, PPO {responses:,} responses; {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 3, width=5, height=4.2)
    for ax, labels in zip(axes, LABELS):
        for seed in lab.values(rows, "seed"):
            curve = lab.where(rows, seed=seed, method="Eq. 4")
            label = "pi* of Eq. 4, a line per seed"
            ax.plot(*points(curve), color=plots.BLACK, linewidth=0.8, label=label)
        for method, color in COLORS.items():
            looks = lab.where(rows, method=method, labels=labels)
            looks += lab.where(rows, method=method, labels="any")
            ends = [row for row in looks if row["step"] == row["last"]]
            ax.plot(*points(looks), ".", color=color, markersize=3, alpha=0.5)
            ax.plot(*points(ends), "o", color=color, markersize=6, alpha=0.8, label=method)
        ax.set(xlabel="KL(pi || pi_ref), nats", ylabel="E[r*], the true reward")
        ax.set(title=f"{labels} labels; large: the end of a run")
    draw_differences(axes[2], comparisons(rows))
    plots.legend(figure, axes[0], columns=6)
    return figure


def points(rows):
    return [row["kl"] for row in rows], [row["expected_reward"] for row in rows]


def draw_differences(ax, cases):
    """A point for each comparison, left of it the two numbers, right of it their difference."""
    names = []
    for i, case in enumerate(cases):
        ours = in_words(case["DPO"])
        theirs = in_words(case["PPO"])
        names.append(f"{case['name']}\nDPO {ours}, PPO {theirs}")
        middle, sd = lab.mean_sd(case["differences"])
        color = COLORS.get(case["ahead"], plots.GREY)
        ax.errorbar(middle, i, xerr=sd, fmt="o", color=color, capsize=3)
        style = {"fontsize": 8, "color": color, "transform": ax.get_yaxis_transform()}
        ax.text(1.02, i, in_words(case["differences"]), verticalalignment="center", **style)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(xlabel="E[r*] at equal KL, DPO minus PPO")
    ax.set(title="blue, red: clearly ahead; grey: neither")


def in_words(numbers):
    middle, sd = lab.mean_sd(numbers)
    return f"{middle:.2f} ± {sd:.2f}"
