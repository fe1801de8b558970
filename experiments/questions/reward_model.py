"""Is the policy a reward model?

The title says so. Theorem 1 (section 5.1): every reward can be written as beta log(pi / pi_ref), up
to a term that depends on the prompt alone and cancels in each pair. That is Eq. 5, and putting it
into Eq. 2, the loss of a reward model, gives Eq. 7. So DPO fits rewards to the pairs as a reward
model does, and the policy that is optimal for its rewards (Eq. 4) is the policy itself. An explicit
reward model leaves that policy to be found: DPO removes the reward model and, with it, the RL that
would follow, with its critic and its sampling.

Found: yes. Trained on 100,000 pairs, the implicit reward ranks the pairs that the reference would
draw as well as an explicit reward model does, and both give nearly the right probabilities. Eq. 4
of either reward closes about as much of the gap; for the explicit one it can be computed only
because this world lists every response. The rank correlation over all responses is lower than the
accuracy: most responses are nonsense that few pairs mention.
"""

import torch

import dpo
from experiments import lab, plots, rlhf
from experiments.lab import BATCH, BETA, STEPS, WORLD

SECONDS = 90
SIZES = {10_000: 200, 100_000: STEPS}  # pairs: steps of DPO
LOOKS = {"implicit (DPO, Eq. 5)": plots.BLUE, "explicit (Eq. 2)": plots.RED}
SHOWN = {
    "rank_correlation": "rank correlation with r*, all responses",
    "accuracy": "fraction of pairs ranked as r* does",
    "gap_closed": "gap closed by Eq. 4 of the learned reward",
}
EDGES = torch.linspace(0.5, 1, 11, dtype=torch.float64)  # of the learned probabilities


def measure(seed, quick):
    """Both rewards on the same pairs, with as many passes over them."""
    sft, ref = lab.reference(seed)
    rows = []
    for size, steps in SIZES.items():
        if quick:
            steps = steps // 4
        pairs = lab.draw_pairs(seed, size)
        policy = lab.last(lab.train_dpo(seed, pairs, steps=steps))
        passes = round(steps * BATCH / size)
        learned = {
            "implicit (DPO, Eq. 5)": dpo.implicit_reward(policy, ref, BETA),
            "explicit (Eq. 2)": rlhf.train_reward_model(sft, pairs, passes, seed),
        }
        for name, rewards in learned.items():
            setting = {"seed": seed, "pairs": size, "steps": steps, "rewards": name}
            optimum, _ = dpo.optimal_policy(ref, rewards, BETA)  # for DPO this is the policy
            row = {"gap_closed": lab.measure(optimum, ref)["gap_closed"]}
            rows.append(setting | row | agreement(rewards, ref))
            for row in calibration(rewards, ref):
                rows.append(setting | row)
    return rows


def agreement(rewards, ref):
    """Spearman's rank correlation with r* over all responses. Accuracy over all pairs as the
    reference draws them whose true rewards differ; a tie counts 1/2. Rewards and ref are (P, Y)."""
    margins, true_margins, weight = all_pairs(rewards, ref)
    weight = weight * (true_margins != 0)
    right = dpo.accuracy(margins * true_margins.sign())
    correlations = []
    for mine, true in zip(rewards, WORLD.rewards):
        both = torch.stack([ranks(mine), ranks(true)])
        correlations.append(both.corrcoef()[0, 1])
    columns = {
        "rank_correlation": torch.stack(correlations),
        "accuracy": (weight * right).sum((1, 2)) / weight.sum((1, 2)),
    }
    return lab.means(columns)


def all_pairs(rewards, ref):
    """Learned margins, true margins, and the probability that the reference draws the pair: each
    (P, Y, Y)."""
    margins = rewards[:, :, None] - rewards[:, None]
    true_margins = WORLD.rewards[:, :, None] - WORLD.rewards[:, None]
    weight = ref.exp()[:, :, None] * ref.exp()[:, None]
    return margins, true_margins, weight


def ranks(values):
    """Ranks (n,) from 1, float64. Equal values share the mean of their ranks: r* has many ties."""
    _, level, counts = values.unique(return_inverse=True, return_counts=True)
    of_level = counts.cumsum(0) - (counts - 1) / 2
    return of_level[level].double()


def calibration(rewards, ref):
    """For each tenth of [1/2, 1]: the mean probability that the learned rewards give to the better
    response, and its true one, by Eq. 1 on r*. Over all pairs as the reference draws them."""
    margins, true_margins, weight = all_pairs(rewards, ref)
    ahead = margins > 0
    says = margins[ahead].sigmoid()  # (1)
    true = true_margins[ahead].sigmoid()
    weight = weight[ahead]
    part = torch.bucketize(says, EDGES[1:-1])
    rows = []
    for i in range(len(EDGES) - 1):
        mine = weight * (part == i)
        total = mine.sum().item()
        if total > 0:
            row = {"part": i, "says": (mine * says).sum().item() / total}
            rows.append(row | {"is": (mine * true).sum().item() / total})
    return rows


def verdict(rows):
    """Yes, if on the most pairs DPO's accuracy is at least 0.95 and at most 0.02 below Eq. 2's."""
    most = max(SIZES)
    accuracies = {}
    for name in LOOKS:
        accuracies[name] = [row for row in lab.where(rows, rewards=name) if "accuracy" in row]
    ours, theirs = [lab.where(mine, pairs=most) for mine in accuracies.values()]
    least = max(0.95, lab.mean(theirs, "accuracy") - 0.02)
    answer = "No."
    if lab.mean(ours, "accuracy") >= least:
        answer = "Yes."
    answer += " Pairs ranked as r* does, by the policy and by a reward model:"
    for size in SIZES:
        implicit, explicit = [lab.where(mine, pairs=size) for mine in accuracies.values()]
        answer += f" {lab.spread(implicit, 'accuracy')} and {lab.spread(explicit, 'accuracy')}"
        answer += f" ({size:,} pairs, {implicit[0]['steps']} steps),"
    return answer.removesuffix(",") + "."


def draw(rows):
    sizes = []
    for size in SIZES:
        sizes.append(f"{size:,} pairs in {lab.where(rows, pairs=size)[0]['steps']} steps")
    title = f"Implicit and explicit rewards: {', '.join(sizes)}, beta 1, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 4)
    for ax, (key, label) in zip(axes, SHOWN.items()):
        measured = [row for row in rows if key in row]
        heights = {}
        for size in SIZES:
            here = lab.where(measured, pairs=size)
            bars = {name: lab.per_seed(lab.where(here, rewards=name), key) for name in LOOKS}
            heights[f"{size:,}"] = bars
        plots.bars(ax, heights, LOOKS)
        ax.set(xlabel="pairs", ylabel=label)
    for name, color in LOOKS.items():
        dots = [row for row in lab.where(rows, rewards=name, pairs=max(SIZES)) if "part" in row]
        says = [row["says"] for row in dots]
        axes[3].plot(says, [row["is"] for row in dots], "o", color=color, alpha=0.6)
    axes[3].plot([0.5, 1], [0.5, 1], color=plots.BLACK, linewidth=0.8, label="calibrated")
    axes[3].set(xlabel="P(y beats y') by learned rewards", ylabel="its true P, by Eq. 1 on r*")
    axes[3].set(title=f"{max(SIZES):,} pairs, a dot for each seed")
    plots.legend(figure, axes[0], axes[3])
    return figure
