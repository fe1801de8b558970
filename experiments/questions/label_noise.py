"""What does label noise cost?

Bradley-Terry (Eq. 1) is noisy: even an annotator who knows r* picks the worse of two close
responses nearly half of the time. If every pair came with its probability p ("soft" labels), the
loss p L(w, l) + (1 - p) L(l, w) would have the same minimum, Eq. 4, without that noise. Real labels
are also wrong: here a fraction of them is flipped. cDPO and robust DPO are told the fraction e;
IPO bounds the margin instead (dpo.py has all three).

Found: what few pairs lack is mostly clean labels. With soft labels 1,000 pairs close nearly the
whole gap; with hard ones DPO then ends far below the reference, and needs 100,000 to come as close.
Flipped labels are another cost, which more pairs do not pay: they move the minimum of Eq. 7, so
that DPO is too timid even with 100,000 pairs, and cDPO and IPO more so. Robust DPO undoes the flips
on average and comes close to Eq. 4 again. Its price is variance: with 10,000 pairs and a fifth
flipped it ends below the reference.
"""

import dpo
from experiments import lab, plots
from experiments.lab import STEPS

PARTS = {"number of pairs": 80, "losses": 110}
SIZES = [1_000, 3_000, 10_000, 100_000]  # pairs
LABELS = {"soft": 0.0, "hard": 0.0, "hard, a fifth flipped": 0.2}  # and the fraction flipped
LABEL_LOOKS = {"soft": ":", "hard": "-", "hard, a fifth flipped": "--"}
FLIPS = [0.0, 0.2]
TICKS = [-4, -2, -1, -0.5, 0, 0.5, 1]
IPO_BETA = 0.25  # at 1, the others' beta, it hardly leaves the reference
FEW = 10_000
MANY = 100_000
LOSS_COLORS = {
    "dpo": plots.BLUE,
    "cdpo": plots.ORANGE,
    "robust": plots.PURPLE,
    "ipo": plots.GREEN,
}


def measure(seed, quick, part):
    """The end of a run for each number of pairs and kind of label, or for each loss and flip."""
    steps = STEPS
    if quick:
        steps = STEPS // 8
    rows = []
    if part == "number of pairs":
        for size in SIZES:
            for labels, flip in LABELS.items():
                row = {"seed": seed, "part": part, "pairs": size, "labels": labels, "steps": steps}
                rows.append(row | run(seed, size, steps, flip, "dpo", soft=labels == "soft"))
    else:
        for size in [FEW, MANY]:
            for flip in FLIPS:
                for loss in LOSS_COLORS:
                    row = {"seed": seed, "part": part, "pairs": size, "loss": loss, "flip": flip}
                    rows.append(row | {"steps": steps} | run(seed, size, steps, flip, loss))
    return rows


def run(seed, size, steps, flip, loss, soft=False):
    """Train in the network, from the reference -> exact numbers at the end."""
    policy, ref = lab.start_from(seed)
    pairs = lab.draw_pairs(seed, size, flip=flip)
    settings = {}
    if loss in ("cdpo", "robust"):
        settings["epsilon"] = flip  # at 0 both are DPO
    if loss == "ipo":
        settings["beta"] = IPO_BETA
    if soft:
        losses_of = lab.soft_preferences(dpo.LOSSES[loss], pairs, ref, **settings)
    else:
        losses_of = lab.preferences(dpo.LOSSES[loss], pairs, ref, **settings)
    logps = lab.last(lab.descend(policy, losses_of, size, steps, 1e-2, seed))
    return lab.measure(logps, ref)


def verdict(rows):
    """There is no rule: what DPO closes of the gap with each kind of label, and each loss."""
    of_pairs = lab.where(rows, part="number of pairs", pairs=SIZES[0])
    flip = FLIPS[1]
    flipped = lab.where(rows, part="losses", pairs=MANY, flip=flip)
    answer = f"{rows[0]['steps']} steps, gap closed. {SIZES[0]:,} pairs:"
    for labels in ("soft", "hard"):
        answer += f" {lab.spread(lab.where(of_pairs, labels=labels), 'gap_closed')} ({labels}),"
    answer = answer.removesuffix(",") + f". {MANY:,} pairs with {flip:.0%} flipped:"
    for loss in LOSS_COLORS:
        answer += f" {lab.spread(lab.where(flipped, loss=loss), 'gap_closed')} ({loss}),"
    return answer.removesuffix("),") + f" at beta {IPO_BETA})."


def draw(rows):
    steps = rows[0]["steps"]
    title = f"What label noise costs: {SIZES[0]:,} to {SIZES[-1]:,} pairs, {steps} steps, beta 1,"
    figure, axes = plots.panels(f"{title} {plots.seeds(rows)}", 4, rows=2, width=5)
    of_pairs = lab.where(rows, part="number of pairs")
    for ax, key in zip(axes, ["gap_closed", "kl"]):
        for labels, linestyle in LABEL_LOOKS.items():
            style = {"linestyle": linestyle, "marker": ".", "label": f"dpo, {labels}"}
            mine = lab.where(of_pairs, labels=labels)
            plots.line(ax, mine, "pairs", key, LOSS_COLORS["dpo"], **style)
        ax.set(xscale="log", xlabel="pairs")
    axes[1].set(ylabel="KL(pi || pi_ref), nats")
    for ax, size in zip(axes[2:], [FEW, MANY]):
        for loss, color in LOSS_COLORS.items():
            mine = lab.where(rows, part="losses", pairs=size, loss=loss)
            plots.line(ax, mine, "flip", "gap_closed", color, marker=".", label=f"{loss}, hard")
        ax.set(xlabel="fraction of labels flipped", title=f"{size:,} pairs")
    for ax in (axes[0], *axes[2:]):
        ax.set_yscale("symlog", linthresh=1)  # linear from -1 to 1
        ax.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        ax.set(ylabel="gap closed (1: the optimum of Eq. 4)")
        ax.axhline(0, color=plots.BLACK, linewidth=0.8)
    plots.legend(figure, axes[0], axes[2])
    return figure
