"""Which model should be the reference?

The paper takes the SFT model that wrote the responses, and where there is none, SFT on the chosen
responses (section 4), so that the reference is close to what the pairs were drawn from. The
reference is also where training starts, and what the KL penalty holds on to.

Found: the author of the pairs, or SFT on the responses of the pairs, which comes as close to it as
one can see. SFT on the chosen responses alone starts higher: the better response is chosen more
often, so the reward is in them before DPO begins, and DPO adds to it. From an untrained network the
pairs are ranked almost as well, but what it writes stays nonsense: DPO moves it only as far as beta
allows, and its own optimum, Eq. 4, is nonsense as well.
"""

import dpo
from experiments import lab, plots
from experiments.lab import BETA, PAIRS, WORLD

SECONDS = 20
STEPS = 400
STARTS = ["untrained", "SFT on both", "SFT on the chosen", "author of the pairs"]
POLICIES = {"reference": plots.GREY, "after DPO": plots.BLUE, "its Eq. 4": plots.GREEN}
SHOWN = {
    "expected_reward": "E[r*]",
    "grammatical": "probability of grammatical responses",
}


def measure(seed, quick):
    """Each start is its own reference. All see the same pairs, which the author wrote."""
    pairs = lab.draw_pairs(seed, PAIRS)
    steps = STEPS
    if quick:
        steps = STEPS // 10
    rows = []
    for start in STARTS:
        model = reference_of(seed, start, pairs, steps // 2)
        ref = lab.listed(model).detach()
        losses_of = lab.preferences(dpo.dpo_loss, pairs, ref)
        policy = lab.last(lab.descend(model, losses_of, PAIRS, steps, 1e-2, seed))
        optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, BETA)
        for name, logps in [("reference", ref), ("after DPO", policy), ("its Eq. 4", optimum)]:
            row = {"seed": seed, "start": start, "policy": name, "steps": steps}
            row["accuracy"] = accuracy(logps - ref, pairs)
            rows.append(row | lab.measure(logps, ref))
    return rows


def reference_of(seed, start, pairs, steps):
    """The model that DPO starts from."""
    if start == "author of the pairs":
        model, _ = lab.start_from(seed)
        return model
    model = lab.new_gpt(seed)
    if start == "untrained":
        return model

    def sft_losses(logps, batch):
        chosen, rejected = lab.of_pairs(logps, pairs)[:, batch]
        if start == "SFT on the chosen":
            return -chosen
        return -(chosen + rejected) / 2

    lab.last(lab.descend(model, sft_losses, len(pairs.prompt), steps, 1e-2, seed))
    return model


def accuracy(log_ratios, pairs):
    """The fraction of the pairs whose winner has the higher implicit reward."""
    chosen, rejected = lab.of_pairs(log_ratios, pairs)
    return dpo.accuracy(chosen - rejected).mean().item()


def verdict(rows):
    """There is no rule: E[r*] after DPO from each reference."""
    answer = f"{PAIRS:,} pairs, {rows[0]['steps']} steps, E[r*] after DPO by the reference:"
    for start in STARTS:
        after = lab.where(rows, start=start, policy="after DPO")
        answer += f" {start} {lab.spread(after, 'expected_reward')},"
    return answer.removesuffix(",") + "."


def draw(rows):
    steps = rows[0]["steps"]
    title = f"DPO from four references: {PAIRS:,} pairs, {steps} steps, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 4, rows=2, width=5.5)
    for ax, (key, label) in zip(axes, SHOWN.items()):
        plots.bars(ax, heights(rows, key, POLICIES), POLICIES)
        ax.set(ylabel=label)
    after = {"after DPO": plots.BLUE}
    plots.bars(axes[2], heights(rows, "accuracy", after), after)
    axes[2].axhline(0.5, color="black", linestyle=":")
    axes[2].set(ylabel="accuracy on the pairs")
    plots.bars(axes[3], heights(rows, "gap_closed", after), after)
    axes[3].set(ylabel="gap closed, to its own Eq. 4")
    plots.legend(figure, axes[0])
    return figure


def heights(rows, key, policies):
    """For plots.bars: {start: {policy: numbers of the seeds}}."""
    found = {}
    for start in STARTS:
        mine = lab.where(rows, start=start)
        name = start.replace(" ", "\n", 1)
        found[name] = {p: lab.per_seed(lab.where(mine, policy=p), key) for p in policies}
    return found
