"""Does the KL penalty keep the policy close to the reference?

Beta is the strength of the penalty in Eq. 3, so at its optimum, Eq. 4, a larger beta stays closer
to the reference. DPO's loss (Eq. 7) has no such term. What holds the policy is the gradient weight
(section 4): the further the policy has moved from the reference in the direction of a label, the
weaker the push. This only works if the reference stays where it is.

Found: yes. The KL falls as beta grows, and follows Eq. 4's except at the smallest betas, whose
optimum wants responses that hardly any pair mentions. If the reference is the policy itself (two
names for one model), every margin is 0: the logged loss stays at 0.6931, the weight at 1/2, and
nothing stops the policy. Copying the policy into the reference now and then gains reward, but each
copy allows another drift, and J falls.
"""

import dpo
from experiments import lab, plots
from experiments.lab import BETA, PAIRS, STEPS, WORLD

SECONDS = 55
BETAS = [0.25, 0.5, 1.0, 2.0, 4.0]
REFERENCES = {  # how many times the policy is copied into the reference
    "frozen": 0,
    "copied every quarter": 4,
    "the policy itself": STEPS,
}
COLORS = {
    "frozen": plots.BLUE,
    "copied every quarter": plots.ORANGE,
    "the policy itself": plots.RED,
}


def measure(seed, quick):
    """The end of a run for each beta, beside Eq. 4; at beta 1 some steps with each reference."""
    _, ref = lab.reference(seed)
    pairs = lab.draw_pairs(seed, PAIRS)
    steps = STEPS
    if quick:
        steps = STEPS // 8
    rows = []
    for beta in BETAS:
        optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, beta)
        policy = lab.last(lab.train_dpo(seed, pairs, steps=steps, beta=beta))
        for name, logps in [("Eq. 4", optimum), ("DPO", policy)]:
            row = {"seed": seed, "table": "beta", "run": name, "beta": beta, "steps": steps}
            rows.append(row | lab.measure(logps, ref, beta))
    for name, copies in REFERENCES.items():
        every = 0
        if copies:
            every = max(1, steps // copies)
        for step, loss, logps in train(seed, pairs, steps, every):
            if step % (steps // 20) == 0:
                row = {"seed": seed, "table": "reference", "run": name, "step": step}
                rows.append(row | {"loss": loss} | lab.measure(logps, ref))
    return rows


def train(seed, pairs, steps, every):
    """DPO that copies the policy into the reference `every` so many steps, never if 0.

    Yields (step, loss of all pairs as a log would show it, logps).
    """
    policy, ref = lab.start_from(seed)
    reference = ref.clone()
    losses_of = lab.preferences(dpo.dpo_loss, pairs, reference)
    for step, logps in lab.descend(policy, losses_of, len(pairs.prompt), steps, 1e-2, seed):
        if every and step % every == 0:
            reference.copy_(logps)  # from here on the penalty pulls to this policy
        four_logps = [*lab.of_pairs(logps, pairs), *lab.of_pairs(reference, pairs)]
        loss = dpo.dpo_loss(*four_logps, beta=BETA).losses.mean().item()
        yield step, loss, logps


def verdict(rows):
    """Yes, if the KL falls with beta, and J is highest with a frozen reference."""
    ends = lab.where(rows, table="beta", run="DPO")
    betas = sorted(lab.values(ends, "beta"))
    kls = [lab.mean(lab.where(ends, beta=beta), "kl") for beta in betas]
    steps = ends[0]["steps"]
    last = {}
    for name in REFERENCES:
        last[name] = lab.where(rows, table="reference", run=name, step=steps)
    objectives = [lab.mean(mine, "objective") for mine in last.values()]
    answer = "No."
    if kls == sorted(kls, reverse=True) and objectives[0] == max(objectives):
        answer = "Yes."
    low = lab.spread(lab.where(ends, beta=betas[0]), "kl")
    high = lab.spread(lab.where(ends, beta=betas[-1]), "kl")
    answer += f" {PAIRS:,} pairs, {steps} steps: KL {low} at beta {betas[0]:g},"
    answer += f" {high} at beta {betas[-1]:g}. J at beta 1, by the reference:"
    numbers = []
    for name, mine in last.items():
        numbers.append(f"{name} {lab.spread(mine, 'objective')}")
    answer += f" {', '.join(numbers)}."
    return answer


def draw(rows):
    by_beta = lab.where(rows, table="beta")
    steps = by_beta[0]["steps"]
    title = f"What holds the policy: {PAIRS:,} pairs, {steps} steps, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 4, rows=2, width=5)
    by_steps = axes[1:]
    eq_4 = {"color": plots.BLACK, "linestyle": "--", "label": "pi* of Eq. 4"}
    ours = {"color": plots.BLUE, "label": "DPO, reference: frozen", "marker": "."}
    plots.line(axes[0], lab.where(by_beta, run="Eq. 4"), "beta", "kl", **eq_4)
    plots.line(axes[0], lab.where(by_beta, run="DPO"), "beta", "kl", **ours)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(BETAS, [f"{beta:g}" for beta in BETAS])
    axes[0].set(xlabel="beta", ylabel="KL(pi || pi_ref), nats", title="at the end")
    shown = {
        "loss": "logged loss, nats",
        "kl": "KL(pi || first reference), nats",
        "objective": "J with the first reference",
    }
    for ax, (key, label) in zip(by_steps, shown.items()):
        for name, color in COLORS.items():
            mine = lab.where(rows, table="reference", run=name)
            plots.line(ax, mine, "step", key, color, label=f"DPO, reference: {name}")
        ax.set(xlabel="step", ylabel=label, title="beta 1")
    plots.legend(figure, *axes, columns=2)
    return figure
