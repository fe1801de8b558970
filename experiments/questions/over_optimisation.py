"""DPO has no reward model: can it be over-optimised all the same?

A learned judge (Eq. 2) rates some responses too high, and what is optimised against it (Eq. 3)
finds them: its reward rises, the true one falls. The paper asks how this shows in DPO (section 7).
arXiv 2406.02900 found it on real models, often before the end of the first epoch.

Found: yes. "No reward model" does not mean "no over-optimisation": the policy is one (Eq. 5) of the
same few pairs. At beta 0.3, E[r*] falls after step 100 in four of five seeds, while the accuracy on
the pairs and the KL still rise. From beta 3 to 0.3 the policy goes twice as far from the reference
for little more reward. Seeds and sets of pairs differ much.
"""

import dpo
from experiments import lab, plots, rlhf

SECONDS = 100
PAIRS = 300
SETS = 5  # of pairs, for each seed
STEPS = 400
LOOKS = [0, 10, 20, 30, 50, 100, 150, 200, 300, 400]  # steps
EARLY = 100
LR = 3e-3  # with a larger one, as in the other questions, runs on 300 pairs are rough
BETAS = [3.0, 1.0, 0.3, 0.1]
STRONG = 0.3  # the beta that is shown by steps
JUDGED = [10.0, *BETAS, 0.03, 0.01]


def measure(seed, quick):
    """For each set of pairs: a judge's optima, and DPO on the same pairs, by beta."""
    sets = SETS
    steps = STEPS
    if quick:
        sets = 1
        steps = STEPS // 2
    rows = []
    for i in range(sets):
        pairs = lab.draw_pairs(seed, PAIRS, stream=3000 + 1000 * i)
        found = list(judge(seed, i, pairs))
        found += train(seed, pairs, steps)
        for row in found:
            rows.append({"seed": seed, "set": i} | row)
    return rows


def judge(seed, i, pairs):
    """A reward model fitted to the pairs, and its optimum (Eq. 4) from a large beta to a small one:
    what the judge promises, and what r* says."""
    sft, ref = lab.reference(seed)
    learned = rlhf.train_reward_model(sft, pairs, epochs=40, seed=i, lr=1e-2, batch=128)
    for beta in JUDGED:
        logps, _ = dpo.optimal_policy(ref, learned, beta)
        promised = (logps.exp() * learned).sum(-1).mean().item()
        row = {"policy": "judge", "beta": beta, "promised": promised}
        yield row | lab.measure(logps, ref, beta)


def train(seed, pairs, steps):
    """DPO on the pairs for each beta, at some of its steps."""
    _, ref = lab.reference(seed)
    for beta in BETAS:
        for step, logps in lab.train_dpo(seed, pairs, steps=steps, lr=LR, beta=beta):
            if step not in LOOKS:
                continue
            chosen, rejected = lab.of_pairs(logps - ref, pairs)
            accuracy = dpo.accuracy(chosen - rejected).mean().item()
            row = {"policy": "DPO", "beta": beta, "step": step, "own_accuracy": accuracy}
            yield row | lab.measure(logps, ref, beta)


def verdict(rows):
    """Yes, if E[r*] falls while a log looks better and better: with DPO from the early look to the
    end, with the judge from its highest point to the smallest beta."""
    last = max(lab.values(rows, "step"))
    run = lab.where(rows, policy="DPO", beta=STRONG)
    early = lab.where(run, step=EARLY)
    end = lab.where(run, step=last)
    judged = [lab.where(rows, policy="judge", beta=beta) for beta in JUDGED]
    best = max(judged, key=expected_reward)
    worst = judged[-1]
    judge_falls = expected_reward(best) - expected_reward(worst) > 0.1
    dpo_falls = expected_reward(end) < expected_reward(early)
    more_accurate = lab.mean(end, "own_accuracy") > lab.mean(early, "own_accuracy")
    answer = "No."
    if judge_falls and dpo_falls and more_accurate:
        answer = "Yes."
    answer += f" {PAIRS} pairs. E[r*] of a judge's optimum:"
    answer += f" {lab.spread(best, 'expected_reward')} at beta {best[0]['beta']:g},"
    answer += f" {lab.spread(worst, 'expected_reward')} at beta {JUDGED[-1]:g}."
    before = lab.per_seed(early, "expected_reward")
    after = lab.per_seed(end, "expected_reward")
    change, sd = lab.mean_sd([new - old for old, new in zip(before, after)])
    answer += f" DPO at beta {STRONG:g}, from step {EARLY} to {last}: E[r*]"
    answer += f" changes by {change:.2f} ± {sd:.2f}"
    answer += f" (from {lab.mean(early, 'expected_reward'):.2f}),"
    answer += f" accuracy from {lab.mean(early, 'own_accuracy'):.2f}"
    answer += f" to {lab.spread(end, 'own_accuracy')}."
    return answer


def expected_reward(rows):
    return lab.mean(rows, "expected_reward")


def draw(rows):
    last = max(lab.values(rows, "step"))
    sets = len(lab.values(rows, "set"))
    title = f"A judge and DPO on the same {PAIRS} pairs: {last} steps, {plots.seeds(rows)}"
    figure, axes = plots.panels(f"{title}, {sets} sets of pairs each", 4, rows=2, width=5)
    judged = lab.where(rows, policy="judge")
    dpo_runs = lab.where(rows, policy="DPO")
    promised = {
        "color": plots.ORANGE,
        "linestyle": "--",
        "label": "the judge's optimum, as it rates it",
    }
    plots.line(axes[0], judged, "beta", "promised", **promised)
    for ax, key in zip(axes, ["expected_reward", "kl"]):
        plots.line(ax, judged, "beta", key, plots.ORANGE, label="the judge's optimum, by r*")
        for step, color in [(EARLY, plots.SKY), (last, plots.BLUE)]:
            mine = lab.where(dpo_runs, step=step)
            plots.line(ax, mine, "beta", key, color, label=f"DPO, {step} steps", marker=".")
        ax.set(xscale="log", xlabel="beta (falls to the right)")
        ax.set_xticks(JUDGED, [f"{beta:g}" for beta in JUDGED])
        ax.minorticks_off()
        ax.invert_xaxis()
    shown = lab.where(dpo_runs, beta=STRONG)
    label = f"DPO, beta {STRONG:g}"
    plots.line(axes[2], shown, "step", "expected_reward", plots.GREEN, label=label)
    plots.line(axes[3], shown, "step", "own_accuracy", plots.GREEN)
    axes[0].set(ylabel="reward (true: E[r*]), units of r*")
    axes[1].set(ylabel="KL(pi || pi_ref), nats")
    axes[2].set(ylabel="E[r*]", xlabel="step")
    axes[3].set(ylabel="accuracy on its own pairs", xlabel="step")
    plots.legend(figure, *axes, columns=3)
    return figure
