"""My loss stays at 0.6931: what is wrong?

Before the first step it has to: the policy is the reference, every margin is 0, and Eq. 7 gives
-log sigma(0) = log 2. Afterwards it should fall. Four mistakes keep it there, and the loss alone
does not tell them apart. Log three more numbers: the gradient norm, the KL from the model at the
start, and the mean log-prob of the chosen responses.

Found: with an empty mask the log-probs are exactly 0. If the weights are frozen they are not, but
the gradient norm is 0. A learning rate far too small has a healthy gradient norm and a KL near 0.
If the reference is the policy itself, the gradient norm is healthy and the policy moves away.
"""

import torch

import data
import dpo
from experiments import lab, plots
from experiments.lab import BETA

SECONDS = 11
PAIRS = 2_000
STEPS = 50
BATCH = 512
CASES = {  # and how they are drawn, so that equal curves are seen beside each other
    "healthy": {"color": plots.BLUE},
    "the reference is the policy": {"color": plots.RED},
    "learning rate 1e-7": {"color": plots.GREEN, "linewidth": 5, "alpha": 0.6},
    "nothing trainable": {"color": plots.GREY, "linewidth": 3},
    "empty mask": {"color": plots.ORANGE, "linestyle": ":", "linewidth": 2.5},
}
TELLTALES = {  # the number to look at, in this order
    "empty mask": ("chosen_logp", "chosen log-prob"),
    "nothing trainable": ("grad_norm", "gradient norm"),
    "learning rate 1e-7": ("kl", "KL"),
    "the reference is the policy": ("kl", "KL"),
}
SHOWN = {
    "loss": "loss, nats",
    "grad_norm": "gradient norm",
    "kl": "KL from the start, nats",
    "chosen_logp": "mean log-prob of chosen, nats",
}


def measure(seed, quick):
    """A short run for each mistake; a row for every step."""
    rows = []
    steps = STEPS
    if quick:
        steps = 20
    for case in CASES:
        for row in train(seed, case, steps):
            rows.append({"seed": seed, "case": case} | row)
    return rows


def train(seed, case, steps):
    """The plain DPO loop with one mistake. Yields what a log should have, before each step."""
    policy, ref = lab.start_from(seed)
    rows = lab.WORLD.rows(lab.draw_pairs(seed, PAIRS))
    lr = 3e-3
    if case == "learning rate 1e-7":
        lr = 1e-7
    if case == "nothing trainable":
        policy.requires_grad_(False)
    reference, _ = lab.reference(seed)
    if case == "the reference is the policy":
        reference = policy  # another name, not a copy
    optimizer = lab.adamw(policy, lr)
    batches = data.batches(rows, BATCH, torch.Generator().manual_seed(seed))
    for step in range(steps + 1):
        ids, mask = data.collate(rows, next(batches).tolist())
        if case == "empty mask":
            mask = torch.zeros_like(mask)  # no token of a response is scored
        policy_chosen, policy_rejected = dpo.response_logps(policy, ids, mask).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = dpo.response_logps(reference, ids, mask).chunk(2)
        losses = dpo.dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, BETA).losses
        loss = losses.mean()
        optimizer.zero_grad()
        if case == "nothing trainable":
            loss.requires_grad_()  # else backward() raises. Some trainers silence it in this way
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        kl = dpo.kl_divergence(lab.listed(policy).detach(), ref).mean()
        yield {
            "step": step,
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "kl": kl.item(),
            "chosen_logp": policy_chosen.mean().item(),
        }
        optimizer.step()


def verdict(rows):
    """There is no rule: what a healthy run logs, and the number that gives each mistake away."""
    last = max(lab.values(rows, "step"))
    ends = lab.where(rows, step=last)
    healthy = lab.where(ends, case="healthy")
    answer = f"{PAIRS:,} pairs, {last} steps. A healthy run has a loss of"
    answer += f" {lab.spread(healthy, 'loss')} and a KL of {lab.spread(healthy, 'kl')}."
    answer += " Where the loss stays"
    answer += f" {lab.spread(lab.where(ends, case='empty mask'), 'loss', digits=4)}, in this order:"
    for case, (key, name) in TELLTALES.items():
        answer += f" {case}, {name} {lab.spread(lab.where(ends, case=case), key)};"
    return answer.removesuffix(";") + "."


def draw(rows):
    steps = max(lab.values(rows, "step"))
    title = f"A loss that stays at 0.6931: {PAIRS:,} pairs, {steps} steps, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 4, rows=2, width=5)
    for ax, (key, label) in zip(axes, SHOWN.items()):
        for case, style in CASES.items():
            plots.line(ax, lab.where(rows, case=case), "step", key, label=case, **style)
        ax.set(xlabel="step", ylabel=label)
    plots.legend(figure, axes[0], columns=3)
    return figure
