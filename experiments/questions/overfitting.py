"""Does DPO overfit when there are few pairs?

The paper's pairs are fixed before training starts ("offline", section 4), and the minimum of Eq. 7
is Eq. 4 only with infinitely many of them. With few, a response that happened never to lose keeps
being pushed up, and the loss says nothing of responses that no pair mentions.

Found: yes. With 300 pairs the loss and the accuracy on the pairs themselves soon say "done", while
held-out loss rises, J falls, and most of the probability moves to responses in no pair. Stopping
where held-out loss is lowest saves nearly all that 3,000 pairs can give; with 300 it only limits
the harm. With 100,000 pairs there is nothing to save. All runs have the same number of steps.
"""

import dpo
from experiments import lab, plots
from experiments.lab import BETA, STEPS

SECONDS = 55
SIZES = [300, 1_000, 3_000, 10_000, 100_000]  # pairs
SHOWN = {300: plots.RED, 3_000: plots.ORANGE, 100_000: plots.BLUE}
HELD_OUT = 20_000  # pairs
LOOKS = [0, 5, 10, 15, 20, 30, 40, 60, 80, 100, 150]  # steps, then every 50


def measure(seed, quick):
    """A row for some steps of a run on each number of pairs."""
    _, ref = lab.reference(seed)
    held_out = lab.draw_pairs(seed, HELD_OUT, stream=2000)
    sizes = SIZES
    steps = STEPS
    if quick:
        sizes = SHOWN
        steps = 200
    rows = []
    for size in sizes:
        pairs = lab.draw_pairs(seed, size)
        mentioned = lab.mentioned(pairs)
        for step, logps in lab.train_dpo(seed, pairs, steps=steps):
            if step not in LOOKS and step % 50 > 0:
                continue
            row = {"seed": seed, "pairs": size, "step": step}
            row |= lab.measure(logps, ref)
            row["own_loss"], row["own_accuracy"] = loss_and_accuracy(logps, ref, pairs)
            row["held_out_loss"], row["held_out_accuracy"] = loss_and_accuracy(logps, ref, held_out)
            row["in_no_pair"] = (logps.exp() * ~mentioned).sum(-1).mean().item()
            rows.append(row)
    return rows


def loss_and_accuracy(logps, ref, pairs):
    """Means over the pairs. A pair is right if its winner has the higher implicit reward."""
    policy_logps = lab.of_pairs(logps, pairs)
    ref_logps = lab.of_pairs(ref, pairs)
    metrics = dpo.describe(*policy_logps, *ref_logps, beta=BETA)
    return metrics["loss"].mean().item(), metrics["accuracy"].mean().item()


def at_the_end(rows, size):
    """The last row of each seed."""
    last = max(lab.values(rows, "step"))
    return lab.where(rows, pairs=size, step=last)


def stopped_early(rows, size):
    """The row of each seed whose held-out loss is lowest."""
    found = []
    for seed in lab.values(rows, "seed"):
        run = lab.where(rows, pairs=size, seed=seed)
        found.append(min(run, key=lambda row: row["held_out_loss"]))
    return found


def verdict(rows):
    """Yes, if the smallest set is memorised and ends below the reference, but not the largest."""
    few = at_the_end(rows, min(lab.values(rows, "pairs")))
    many = at_the_end(rows, max(lab.values(rows, "pairs")))
    few_are_memorised = excess_accuracy(few) > 0.1 and lab.mean(few, "gap_closed") < 0
    answer = "No."
    if few_are_memorised and excess_accuracy(many) < 0.02:
        answer = "Yes."
    answer += f" {few[0]['step']} steps, gap closed at the end and at the lowest held-out loss:"
    for size in SHOWN:
        end = lab.spread(at_the_end(rows, size), "gap_closed")
        early = lab.spread(stopped_early(rows, size), "gap_closed")
        answer += f" {end} and {early} ({size:,} pairs),"
    answer = answer.removesuffix(",")
    answer += f". With {few[0]['pairs']} pairs, accuracy {lab.spread(few, 'own_accuracy')},"
    answer += f" held out {lab.spread(few, 'held_out_accuracy')}."
    return answer


def excess_accuracy(rows):
    return lab.mean(rows, "own_accuracy") - lab.mean(rows, "held_out_accuracy")


def draw(rows):
    sizes = lab.values(rows, "pairs")
    steps = max(lab.values(rows, "step"))
    title = f"DPO on few and on many pairs: {steps} steps, beta 1, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 6, rows=2)
    loss, accuracy, objective, kl, mass, saved = axes
    for size, color in SHOWN.items():
        mine = lab.where(rows, pairs=size)
        own = {"color": color, "linestyle": "--", "label": f"{size:,} pairs, scored on them"}
        held_out = {"color": color, "label": f"{size:,} pairs, held out or exact"}
        plots.line(loss, mine, "step", "own_loss", **own)
        plots.line(loss, mine, "step", "held_out_loss", **held_out)
        plots.line(accuracy, mine, "step", "own_accuracy", **own)
        plots.line(accuracy, mine, "step", "held_out_accuracy", **held_out)
        plots.line(objective, mine, "step", "objective", **held_out)
        plots.line(kl, mine, "step", "kl", **held_out)
        plots.line(mass, mine, "step", "in_no_pair", **held_out)
    loss.set(ylabel="loss, nats", xlabel="step")
    accuracy.set(ylabel="accuracy", xlabel="step")
    objective.set(ylabel="J, units of r*", xlabel="step")
    kl.set(ylabel="KL(pi || pi_ref), nats", xlabel="step")
    mass.set(ylabel="probability of responses in no pair", xlabel="step")

    heights = {}
    for size in sizes:
        heights[f"{size:,}"] = {
            "at the end": lab.per_seed(at_the_end(rows, size), "gap_closed"),
            "at the lowest held-out loss": lab.per_seed(stopped_early(rows, size), "gap_closed"),
        }
    colors = {"at the end": plots.GREY, "at the lowest held-out loss": plots.GREEN}
    plots.bars(saved, heights, colors)
    saved.set(ylabel="gap closed (1: the optimum of Eq. 4)", xlabel="pairs")
    plots.legend(figure, loss, saved)
    return figure
