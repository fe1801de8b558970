"""README's pictures. assets/dpo.gif: DPO moves the policy from the reference to the exact optimum
of Eq. 4. assets/pipeline.png: RLHF beside DPO.

    python -m experiments.animate

In the animation, left, what it says after one prompt; right, its reward and its KL, which no policy
can do better than the black curve. Seed 0, 100,000 pairs labelled by Bradley-Terry.
"""

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

import dpo
from experiments import frontier, lab
from experiments.lab import BETA, WORLD
from experiments.plots import BLUE, GREY, RED

FILM = 0  # the prompt
FRAMES = 48


def responses_to_show(ref, best):
    """The responses to FILM that most matter in one of the two, places sorted by r*."""
    before = ref[FILM].topk(10).indices
    after = best[FILM].topk(8).indices
    likely = torch.cat([before, after]).unique()
    by_reward = WORLD.rewards[FILM, likely].argsort(stable=True)
    return likely[by_reward]


def animate(walk, ref, path):
    """walk: (step, log pi (P, Y)) of each frame, the reference first -> a GIF at path."""
    best, _ = dpo.optimal_policy(ref, WORLD.rewards, BETA)
    shown = responses_to_show(ref, best)
    before = ref[FILM, shown].exp().tolist()
    after = best[FILM, shown].exp().tolist()
    probs = torch.stack([logps[FILM, shown].exp() for _, logps in walk])  # a row for each frame
    measured = [lab.measure(logps, ref) for _, logps in walk]
    fig = Figure(figsize=(9.6, 4.0), dpi=80, layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))

    places = range(len(shown))
    names = [f"{WORLD.responses[y]} {WORLD.rewards[FILM, y]:+.1f}" for y in shown]
    widest = max(probs.max().item(), *after)
    bars = left.barh(places, before, color=BLUE, label="policy")
    left.plot(before, places, "|", color=GREY, markersize=11, mew=2, label="reference")
    left.plot(after, places, "|", color=RED, markersize=11, mew=3, label="exact optimum, Eq. 4")
    left.set_yticks(places, names)
    left.set(xlabel='probability after "The film was"', xlim=(0, 1.03 * widest))
    left.set(ylabel="response and its true reward r*")
    left.legend(loc="lower right")

    kl, height, _ = frontier.frontier(ref)
    right.plot(kl, height, color="black", label="Eq. 4 for every beta: the most there is")
    (trail,) = right.plot([], [], ".-", color=BLUE, label="policy")
    goal = lab.measure(best, ref)
    right.plot(goal["kl"], goal["expected_reward"], "*", color=RED, markersize=14)
    right.set(xlabel="KL(pi || pi_ref), nats", ylabel="E[r*], true reward")
    right.set(xlim=(-0.03, 1.3), ylim=(-0.5, 2.7))
    right.legend(loc="lower right", fontsize=9)

    def frame(i):
        for bar, p in zip(bars, probs[i].tolist()):
            bar.set_width(p)
        so_far = measured[: i + 1]
        kls = [row["kl"] for row in so_far]
        rewards = [row["expected_reward"] for row in so_far]
        trail.set_data(kls, rewards)
        step, _ = walk[i]
        closed = f"{measured[i]['gap_closed']:.0%} of the gap closed"
        fig.suptitle(f"DPO, step {step}: {closed}", family="monospace")

    last = len(walk) - 1
    frames = [0] * 8 + list(range(last)) + [last] * 21  # a while at either end
    FuncAnimation(fig, frame, frames).save(path, PillowWriter(fps=10))


def pipelines(path):
    """What RLHF trains and what DPO trains, from the same reference and the same pairs."""
    fig = Figure(figsize=(10, 3.6), dpi=100)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 100), ylim=(0, 36))
    ax.axis("off")
    boxes = [  # x, y, text, colour
        (11, 18, "reference, after SFT;\npairs that it wrote\nand people labelled", GREY),
        (37, 27, "reward model\nEq. 2", RED),
        (63, 27, "PPO on Eq. 3: sample, score;\ntrain policy and critic", RED),
        (50, 9, "DPO on Eq. 7, one loss on the pairs:\nthe policy is the reward model", BLUE),
        (88, 18, "a policy near pi*,\nthe optimum of Eq. 4", GREY),
    ]
    for x, y, text, colour in boxes:
        box = dict(boxstyle="round,pad=0.7", facecolor="white", edgecolor=colour, linewidth=2)
        ax.text(x, y, text, ha="center", va="center", fontsize=11, bbox=box)
    ax.text(50, 34, "RLHF", ha="center", color=RED, fontsize=13, weight="bold")
    ax.text(50, 1, "DPO", ha="center", color=BLUE, fontsize=13, weight="bold")
    arrows = [  # start, end
        ((21, 22), (30, 26)),
        ((44, 27), (50, 27)),
        ((76, 26), (82, 22)),
        ((21, 14), (33, 10)),
        ((67, 10), (82, 14)),
    ]
    style = dict(arrowstyle="-|>", color=GREY, lw=1.5)
    for start, end in arrows:
        ax.annotate("", end, start, arrowprops=style)
    fig.savefig(path)


def main():
    pipelines("assets/pipeline.png")
    _, ref = lab.reference(0)
    pairs = lab.draw_pairs(0, lab.PAIRS)
    last = FRAMES - 1
    looks = {round(lab.STEPS * (i / last) ** 2.5) for i in range(FRAMES)}
    walk = [(step, logps) for step, logps in lab.train_dpo(0, pairs) if step in looks]
    animate(walk, ref, "assets/dpo.gif")


if __name__ == "__main__":
    main()
