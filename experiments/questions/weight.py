"""Does the gradient weight matter?

The gradient of Eq. 7 pushes the chosen log-prob up and the rejected one down, equally hard, with
the weight sigma(r_rejected - r_chosen): the more the policy is already right about a pair, the
weaker the push. Section 4 warns that without the weight the model degenerates (Table 3 in appendix
C.3 shows samples). That objective is what section 6 calls unlikelihood: -log pi(y_w) + alpha log
pi(y_l). With alpha 1 its gradient is DPO's with the weight, and beta, replaced by 1. So the same
loss has one name here, `losses.unlikelihood_loss`. It does not look at the reference.

Found: yes. With the weight the pushes fade: its mean falls from 1/2 to that of Eq. 4, and J rises
to nearly that of Eq. 4. Without it every pair keeps its full push. KL rises far above Eq. 4's until
one response has most of the probability, J falls below the reference's within the first steps, and
all numbers jump from one step to the next.
"""

import dpo
from experiments import lab, plots
from experiments.lab import BETA, PAIRS, STEPS, WORLD
from experiments.losses import unlikelihood_loss

SECONDS = 14
LOSSES = {"DPO": dpo.dpo_loss, "without the weight": unlikelihood_loss}
COLORS = {"DPO": plots.BLUE, "without the weight": plots.RED}
SHOWN = {
    "weight": "mean gradient weight of the pairs",
    "kl": "KL(pi || pi_ref), nats",
    "expected_reward": "E[r*]",
    "objective": "J, units of r*",
    "likeliest": "probability of the likeliest response",
    "grammatical": "probability of grammatical responses",
}


def measure(seed, quick):
    """Both losses on the same pairs, a row for every 20 steps; and Eq. 4."""
    _, ref = lab.reference(seed)
    pairs = lab.draw_pairs(seed, PAIRS)
    steps = STEPS
    if quick:
        steps = STEPS // 4
    rows = []
    for name, loss in LOSSES.items():
        for step, logps in lab.train_dpo(seed, pairs, steps=steps, loss=loss):
            if step % 20 == 0:
                row = {"seed": seed, "run": name, "step": step} | numbers(logps, ref)
                if name == "DPO":
                    row["weight"] = mean_weight(logps, ref, pairs)
                else:
                    row["weight"] = 1.0
                rows.append(row)
    optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, BETA)
    for step in (0, steps):
        row = {"seed": seed, "run": "Eq. 4", "step": step} | numbers(optimum, ref)
        row["weight"] = mean_weight(optimum, ref, pairs)
        rows.append(row)
    return rows


def numbers(logps, ref):
    likeliest = logps.exp().max(-1).values
    return lab.measure(logps, ref) | lab.means({"likeliest": likeliest})


def mean_weight(logps, ref, pairs):
    four_logps = [*lab.of_pairs(logps, pairs), *lab.of_pairs(ref, pairs)]
    return dpo.dpo_loss(*four_logps, beta=BETA).weights.mean().item()


def verdict(rows):
    """Yes, if without the weight J ends below the reference's, and with it above."""
    last = max(lab.values(rows, "step"))
    start = lab.mean(lab.where(rows, run="DPO", step=0), "objective")
    ends = {name: lab.where(rows, run=name, step=last) for name in LOSSES}
    ours, theirs = [lab.mean(end, "objective") for end in ends.values()]
    answer = "No."
    if theirs < start < ours:
        answer = "Yes."
    answer += f" {PAIRS:,} pairs, {last} steps:"
    for name, end in ends.items():
        answer += f" {name}, J {lab.spread(end, 'objective')},"
        answer += f" likeliest response {lab.spread(end, 'likeliest')};"
    return answer + f" the reference's J is {start:.2f}."


def draw(rows):
    steps = max(lab.values(rows, "step"))
    title = f"The gradient weight: {PAIRS:,} pairs, {steps} steps, beta 1, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 6, rows=2)
    for ax, (key, label) in zip(axes, SHOWN.items()):
        optimum = lab.where(rows, run="Eq. 4")
        plots.line(ax, optimum, "step", key, plots.BLACK, linestyle="--", label="pi* of Eq. 4")
        for name, color in COLORS.items():
            plots.line(ax, lab.where(rows, run=name), "step", key, color, label=name)
        ax.set(xlabel="step", ylabel=label)
    plots.legend(figure, axes[0])
    return figure
