"""What do cDPO, IPO, hinge and ORPO do differently?

DPO, cDPO, robust DPO, IPO and hinge are functions f of Eq. 7's margin m = r_w - r_l. Descent pushes
with beta (-f'(m)), so a loss is its weight, and a pair comes to rest where that is 0. For DPO that
is nowhere: sigma(-m) is never 0. What stops DPO is that labels disagree, as Bradley-Terry's do: the
pushes of both directions then balance at Eq. 4. With *certain* labels, one pair that never flips,
nothing balances them, and m grows at every beta. This is why IPO exists (arXiv 2310.12036, section
4.2). ORPO (arXiv 2403.07691) is not a function of m: it has no reference, means over tokens, and an
SFT term.

Found: on a pair that never flips, DPO's margin keeps growing at every beta; beta sets the pace, not
an end. cDPO stops at log((1 - e) / e) = 2.2 with e = 0.1, IPO at 1/2, so both stay closer to the
reference when beta is larger. On 100,000 drawn pairs cDPO, IPO and hinge stay closer to the
reference than DPO at the same beta, and robust DPO, told of flips that are not there, goes further.
ORPO ends in about the same place with and without SFT first. Means over tokens in Eq. 7 weaken the
KL penalty and make responses longer.
"""

import torch

import data
import dpo
from experiments import lab, plots
from experiments.lab import LENGTHS, PAIRS, WORLD
from experiments.losses import orpo_loss

SECONDS = 40
STEPS = 1500  # on drawn pairs, in a table of free logits, so that nothing but the loss decides
ORPO_STEPS = 400  # in the network: it also has to learn to write
ONE_PAIR_STEPS = 1000
BETAS = {0.1: ":", 1.0: "-", 10.0: "--"}
CERTAIN = {
    "dpo": "rests nowhere: its weight is never 0",
    "cdpo": "rests at m = 2.2",
    "ipo": "rests at m = 1/2",
}
COLORS = {
    "dpo": plots.BLUE,
    "cdpo": plots.ORANGE,
    "robust": plots.PURPLE,
    "ipo": plots.GREEN,
    "hinge": plots.RED,
}
FORMULAS = {
    "dpo": "DPO: -log sigma(m)",
    "cdpo": "cDPO: -(1-e) log sigma(m) - e log sigma(-m)",
    "robust": "robust: (-(1-e) log sigma(m) + e log sigma(-m)) / (1-2e)",
    "ipo": "IPO: ((m - 1/2) / beta)^2",
    "hinge": "hinge: max(0, 1 - m)",
}
ORPO = "ORPO: -log p_w - log sigma(log odds_w - log odds_l)"  # log p: the mean over tokens


def measure(seed, quick):
    """One pair that never flips, by steps; then where each loss ends on drawn pairs."""
    divisor = 1
    if quick:
        divisor = 5
    rows = []
    for loss in CERTAIN:
        for beta in BETAS:
            for step, ratio in certain(seed, loss, beta, ONE_PAIR_STEPS // divisor):
                row = {"seed": seed, "labels": "certain", "loss": loss, "beta": beta, "step": step}
                rows.append(row | {"log_ratio": ratio, "margin": beta * ratio})
    _, ref = lab.reference(seed)
    for loss, steps, logps in ends(seed, divisor):
        row = {"seed": seed, "labels": "drawn", "loss": loss, "step": steps}
        row["tokens"] = (logps.exp() * LENGTHS).sum(-1).mean().item()
        rows.append(row | lab.measure(logps, ref))
    return rows


def certain(seed, loss, beta, steps):
    """Train on "good" against "dull" alone, of the film. Yields (step, log pi_w / pi_l minus the
    reference's) every 20 steps."""
    chosen = torch.tensor([WORLD.responses.index(" good")])
    rejected = torch.tensor([WORLD.responses.index(" dull")])
    pair = data.Drawn(torch.tensor([0]), chosen, rejected)
    settings = {"loss": dpo.LOSSES[loss], "beta": beta, "kind": "table", "lr": 0.1}
    _, ref = lab.reference(seed)
    for step, logps in lab.train_dpo(seed, pair, steps=steps, **settings):
        if step % 20 == 0:
            moved_chosen, moved_rejected = lab.of_pairs(logps - ref, pair)
            yield step, (moved_chosen - moved_rejected).item()


def ends(seed, divisor):
    """Yields (name, steps, logps) of every loss on the same drawn pairs."""
    _, ref = lab.reference(seed)
    pairs = lab.draw_pairs(seed, PAIRS)
    optimum, _ = dpo.optimal_policy(ref, WORLD.rewards, lab.BETA)
    yield "Eq. 4", 0, optimum
    cases = {name: (loss, 1.0) for name, loss in dpo.LOSSES.items()}
    cases["ipo, beta 0.25"] = (dpo.ipo_loss, 0.25)
    cases["dpo of means"] = (dpo_of_means, 1.0)
    steps = STEPS // divisor
    for name, (loss, beta) in cases.items():
        settings = {"loss": loss, "beta": beta, "kind": "table", "lr": 0.03}
        yield name, steps, lab.last(lab.train_dpo(seed, pairs, steps=steps, **settings))
    losses_of = lab.preferences(orpo_loss, pairs, ref, alpha=1.0)
    trained, _ = lab.start_from(seed)
    steps = ORPO_STEPS // divisor
    for name, policy in {"orpo": trained, "orpo without SFT": lab.new_gpt(seed)}.items():
        yield name, steps, lab.last(lab.descend(policy, losses_of, PAIRS, steps, 1e-2, seed))


def dpo_of_means(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_lengths,
    rejected_lengths,
    beta,
):
    """Eq. 7 with log-probs averaged over the tokens: another loss, often taken for DPO."""
    return dpo.dpo_loss(
        policy_chosen_logps / chosen_lengths,
        policy_rejected_logps / rejected_lengths,
        ref_chosen_logps / chosen_lengths,
        ref_rejected_logps / rejected_lengths,
        beta,
    )


def verdict(rows):
    """There is no rule: the margin of a pair that never flips, and the KL on drawn pairs."""
    one_pair = lab.where(rows, labels="certain")
    steps = max(lab.values(one_pair, "step"))
    low = min(BETAS)
    high = max(BETAS)
    answer = f"Margin of one pair that never flips, {steps} steps, beta {low:g} and {high:g}:"
    for loss in CERTAIN:
        end = lab.where(one_pair, loss=loss, step=steps)
        margins = [lab.spread(lab.where(end, beta=beta), "margin", 1) for beta in (low, high)]
        answer += f" {' and '.join(margins)} ({loss}),"
    drawn = lab.where(rows, labels="drawn")
    steps = lab.where(drawn, loss="dpo")[0]["step"]
    answer = answer.removesuffix(",") + f". KL with {PAIRS:,} drawn pairs, {steps} steps, beta 1:"
    for loss in [*CERTAIN, "hinge"]:
        answer += f" {lab.spread(lab.where(drawn, loss=loss), 'kl')} ({loss}),"
    return answer.removesuffix(",") + "."


def draw(rows):
    one_pair = lab.where(rows, labels="certain")
    drawn = lab.where(rows, labels="drawn")
    steps = lab.where(drawn, loss="dpo")[0]["step"]
    certain_steps = max(lab.values(one_pair, "step"))
    title = f"Above: one pair that never flips, {certain_steps} steps. Below: the losses; then"
    title += f" {PAIRS:,} drawn pairs, {steps} steps, beta 1. {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 8, rows=4, width=5.5)
    for ax, (loss, rest) in zip(axes, CERTAIN.items()):
        for beta, linestyle in BETAS.items():
            mine = lab.where(one_pair, loss=loss, beta=beta)
            plots.line(ax, mine, "step", "margin", COLORS[loss], linestyle=linestyle)
            ax.plot([], [], color=plots.BLACK, linestyle=linestyle, label=f"beta {beta:g}")
        ax.set(xlabel="step", ylabel="margin m", ylim=(0, 28), title=f"{FORMULAS[loss]}\n{rest}")
        end = lab.where(one_pair, loss=loss, step=certain_steps)
        plots.line(axes[3], end, "beta", "log_ratio", COLORS[loss], marker=".")
    axes[3].set(xscale="log", yscale="log", xlabel="beta", ylabel="m / beta at the end, nats")
    axes[3].set(title="how far it went; DPO still moves")
    draw_family(axes[4], axes[5])
    for ax, key in zip(axes[6:], ["kl", "tokens"]):
        names = lab.values(drawn, "loss")
        heights = {}
        for name in names:
            heights[name] = {"end of the run": lab.per_seed(lab.where(drawn, loss=name), key)}
        plots.bars(ax, heights, {"end of the run": plots.GREY})
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right")
    orpo_steps = lab.where(drawn, loss="orpo")[0]["step"]
    axes[6].set(ylabel="KL(pi || pi_ref), nats")
    axes[6].set_title(f"{ORPO}\nin the network, {orpo_steps} steps", fontsize=9)
    axes[7].set(ylabel="tokens of a response, mean")
    plots.legend(figure, axes[0], axes[4], columns=2)
    return figure


def draw_family(of_loss, of_weight):
    """f(m) and -f'(m), with beta 1 and e = 0.1."""
    m = torch.linspace(-3, 5, 161, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(len(m), dtype=torch.float64)
    for name, loss in dpo.LOSSES.items():
        losses = loss(m, zero, zero, zero, beta=1.0)
        if isinstance(losses, tuple):
            losses = losses[0]
        (slope,) = torch.autograd.grad(losses.sum(), m)
        style = {"color": COLORS[name], "label": FORMULAS[name]}
        of_loss.plot(m.detach(), losses.detach(), **style)
        of_weight.plot(m.detach(), -slope, **style)
    of_loss.set(xlabel="margin m", ylabel="loss f(m), beta 1, e = 0.1", ylim=(-1, 4))
    of_weight.set(xlabel="margin m", ylabel="weight -f'(m)", ylim=(-1, 2))
    of_weight.axhline(0, color=plots.BLACK, linewidth=0.8)
