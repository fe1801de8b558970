"""Is DPO stable, with little tuning?

The paper's abstract says that DPO is stable and needs no significant hyperparameter tuning, unlike
PPO. Here the learning rate and beta vary, for DPO and for PPO on a reward model of the same pairs.
PPO's other settings (critic, clip, lambda, steps per batch) are tuned beforehand, and DPO has none.

Found: no. Both work over a decade of learning rates, and fail at the largest. At beta 2 DPO gets
closer to the optimum and bears a learning rate of 0.03 better, PPO bears 0.001 better, so that the
fractions of the grid within a tenth of the best J are about equal. The answer would be "yes" if
DPO's fraction were clearly larger; it might be if PPO's other settings were in the grid, too.
"""

from experiments import lab, plots, rlhf

PARTS = {"PPO": 190, "DPO": 60}
PAIRS = 50_000
SAMPLES = rlhf.SAMPLES // 2  # responses that PPO draws, about as many as the pairs hold
STEPS = 400  # of DPO: eight passes over the pairs
BETAS = [0.5, 2.0]
LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
COLORS = {"DPO": plots.BLUE, "PPO": plots.RED}


def measure(seed, quick, part):
    """The end of a run for each learning rate and beta."""
    sft, ref = lab.reference(seed)
    pairs = lab.draw_pairs(seed, PAIRS)
    steps = STEPS
    samples = SAMPLES
    epochs = rlhf.EPOCHS
    if quick:
        steps = STEPS // 4
        samples = SAMPLES // 8
        epochs = 1
    if part == "PPO":
        learned = rlhf.train_reward_model(sft, pairs, epochs, seed)
    rows = []
    for beta in BETAS:
        for lr in LEARNING_RATES:
            row = {"seed": seed, "method": part, "beta": beta, "lr": lr}
            if part == "DPO":
                run = lab.train_dpo(seed, pairs, steps=steps, lr=lr, beta=beta)
                row["steps"] = steps
            else:
                run = rlhf.ppo(sft, learned, seed, beta, samples=samples, lr=lr)
                row["responses"] = samples
            found = lab.measure(lab.last(run), ref, beta)
            rows.append(row | {"kl": found["kl"], "gap_closed": found["gap_closed"]})
    return rows


def near_the_best(rows, method):
    """For each seed, the fraction of the grid where a method gains at least 0.9 of the most that it
    gains at this beta. `gap_closed` is what is gained of J(pi*) - J(pi_ref)."""
    found = []
    for seed in lab.values(rows, "seed"):
        near = []
        for beta in BETAS:
            mine = lab.where(rows, seed=seed, method=method, beta=beta)
            gains = [row["gap_closed"] for row in mine]
            near += [gain >= 0.9 * max(gains) for gain in gains]
        found.append({"seed": seed, "fraction": sum(near) / len(near)})
    return found


def verdict(rows):
    """Yes, if DPO's fraction is clearly larger than PPO's, by the paired differences."""
    ours = near_the_best(rows, "DPO")
    theirs = near_the_best(rows, "PPO")
    difference = []
    for a, b in zip(ours, theirs):
        difference.append({"seed": a["seed"], "fraction": a["fraction"] - b["fraction"]})
    answer = "No."
    if lab.mean(difference, "fraction") > 0 and lab.is_clear(lab.per_seed(difference, "fraction")):
        answer = "Yes."
    answer += f" {PAIRS:,} pairs, {amounts(rows)}. Fraction of settings within 10% of the best J:"
    answer += f" DPO {lab.spread(ours, 'fraction')}, PPO {lab.spread(theirs, 'fraction')};"
    answer += f" paired difference {lab.spread(difference, 'fraction')}."
    return answer


def amounts(rows):
    steps = lab.values(rows, "steps")[0]
    responses = lab.values(rows, "responses")[0]
    return f"DPO {steps} steps, PPO {responses:,} responses"


def draw(rows):
    title = f"J by learning rate: {PAIRS:,} pairs; {amounts(rows)}; {plots.seeds(rows)}"
    figure, axes = plots.panels(title, len(BETAS))
    for ax, beta in zip(axes, BETAS):
        for method, color in COLORS.items():
            mine = lab.where(rows, beta=beta, method=method)
            plots.line(ax, mine, "lr", "gap_closed", color, label=method, marker=".")
        ax.axhline(1, color=plots.BLACK, linestyle="--", label="pi* of Eq. 4")
        ax.set(xscale="log", xlabel="learning rate", ylim=(-0.5, 1.1), title=f"beta {beta:g}")
        ax.set(ylabel="fraction of J(pi*) - J(pi_ref) gained")
    plots.legend(figure, axes[0])
    return figure
