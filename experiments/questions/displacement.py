"""Why do the log-probs of the chosen responses fall?

Eq. 7 looks at differences only: its loss falls if both log-probs fall, as long as the rejected one
falls faster. The paper does not mention it, but every training log shows it.

Found: for three reasons. *Shared weights*: with four pairs a table of free logits lowers no chosen
response, but the network lowers some together with the rejected ones, whose words they share. *Few
labels*: with 2,000 pairs most responses appear once or twice. The table gives the probability of
all others to the few that never lost. *Eq. 4 itself*: at a small beta the optimum says one response
nearly always, so the average chosen response falls by tens of nats. A falling mean is no loss of
probability: four chosen responses at 0.1 each that end at 0.85, 0.01, 0.01 and 0.01 gain together,
and the mean of their logs falls from -2.3 to -3.5. Look where the probability went.
"""

import dpo
from experiments import lab, plots
from experiments.lab import PAIRS, WORLD

SECONDS = 9
STEPS = 200
CASES = {"4 pairs, beta 0.1": (4, 0.1), "2,000 pairs, beta 1": (2_000, 1.0)}
POLICIES = ["table", "network", "Eq. 4"]
LR = {"table": 0.3, "network": 1e-2}
BETAS = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
MOVED = {"chosen": plots.BLUE, "rejected": plots.RED}
GAINED = {"chosen": plots.BLUE, "rejected": plots.RED, "in no pair": plots.GREEN}


def measure(seed, quick):
    """What moved after DPO in a table and in the network, and at Eq. 4; then Eq. 4 by beta."""
    _, ref = lab.reference(seed)
    steps = STEPS
    if quick:
        steps = STEPS // 2
    rows = []
    for case, (n, beta) in CASES.items():
        pairs = lab.draw_pairs(seed, n)
        optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, beta)
        ends = {"Eq. 4": optimum}
        for kind, lr in LR.items():
            run = lab.train_dpo(seed, pairs, steps=steps, lr=lr, kind=kind, beta=beta)
            ends[kind] = lab.last(run)
        for policy, logps in ends.items():
            row = {"seed": seed, "case": case, "policy": policy, "steps": steps}
            rows.append(row | movement(logps, ref, pairs))
    pairs = lab.draw_pairs(seed, PAIRS)
    for beta in BETAS:
        optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, beta)
        row = {"seed": seed, "case": "Eq. 4 by beta", "beta": beta}
        rows.append(row | movement(optimum, ref, pairs))
    return rows


def movement(logps, ref, pairs):
    """log pi / pi_ref of chosen and rejected responses, and where the probability went."""
    chosen, rejected = lab.of_pairs(logps - ref, pairs)
    gained = logps.exp() - ref.exp()
    mentioned = lab.mentioned(pairs)
    won = lab.mentioned(pairs._replace(rejected=pairs.chosen))
    never_won = mentioned & ~won
    columns = {
        "chosen": chosen,
        "rejected": rejected,
        "fallen": (chosen < 0).double(),
        "gained by chosen": (gained * won).sum(-1),
        "gained by rejected": (gained * never_won).sum(-1),
        "gained by in no pair": (gained * ~mentioned).sum(-1),
    }
    return lab.means(columns)


def verdict(rows):
    """There is no rule: the three causes in numbers."""
    few, many = [lab.where(rows, case=case) for case in CASES]

    def number(part, policy, key):
        return lab.spread(lab.where(part, policy=policy), key)

    answer = f"Three causes. Shared weights (4 pairs, {few[0]['steps']} steps): of the chosen,"
    answer += f" {number(few, 'network', 'fallen')} fall in a network,"
    answer += f" {number(few, 'table', 'fallen')} in a table. Few labels (2,000 pairs, beta 1):"
    answer += f" mean log pi / pi_ref {number(many, 'network', 'chosen')} (network),"
    answer += f" {number(many, 'table', 'chosen')} (table). Eq. 4, the optimum itself:"
    answer += f" {number(many, 'Eq. 4', 'chosen')}."
    return answer


def draw(rows):
    steps = rows[0]["steps"]
    title = f"Where log-probs and probability go: {steps} steps, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 5, rows=2)
    for i, case in enumerate(CASES):
        mine = lab.where(rows, case=case)
        plots.bars(axes[i], heights(mine, MOVED, "{}"), MOVED)
        plots.bars(axes[3 + i], heights(mine, GAINED, "gained by {}"), GAINED)
        axes[i].set(title=case, ylabel="mean log pi / pi_ref, nats")
        axes[3 + i].set(title=case, ylabel="probability gained or lost")
        axes[3 + i].set(xlabel="rejected: responses that never won")
    by_beta = lab.where(rows, case="Eq. 4 by beta")
    for key, color in MOVED.items():
        plots.line(axes[2], by_beta, "beta", key, color, marker=".")
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[2].set(title=f"Eq. 4, {PAIRS:,} pairs", xscale="log", xlabel="beta")
    axes[2].set(ylabel="mean log pi / pi_ref, nats")
    plots.legend(figure, axes[3])
    return figure


def heights(rows, kinds, column):
    """For plots.bars: {policy: {kind: numbers of the seeds}}."""
    found = {}
    for policy in POLICIES:
        mine = lab.where(rows, policy=policy)
        found[policy] = {kind: lab.per_seed(mine, column.format(kind)) for kind in kinds}
    return found
