"""What happens to responses that no pair mentions?

Eq. 7 looks at pairs only, and the paper draws its pairs from the reference (section 4). A response
that no pair mentions has no term in the loss. The weights that the pairs push move it all the same.

Found: what is taken from the rejected responses can flow there. With a reference that hardly ever
leaves its grammar, in a world of 11,111 responses to a prompt, the margins of the pairs look
healthy while nonsense that no pair mentions gains probability, and the policy ends further from the
optimum than it began. With ten times the pairs from the same reference it still does. A reference
with slips prevents it, and so does an SFT term in the loss. Pairs that the policy itself writes
round by round did in four of five seeds; in the other it ended far from the optimum. Who writes the
pairs matters for the same reason: a colder sampler leaves out what the policy then finds. A prompt
in no pair moves as far as that of the pairs, whose weights it shares: by less with DPO than without
what does the work of its KL penalty, the gradient weight.
"""

import copy
import functools

import torch

import data
import dpo
from experiments import lab, losses, plots
from experiments.lab import BETA, PAIRS, WORLD

PARTS = {"cases": 75, "samplers": 30, "prompts": 10}
STEPS = 320
LR = 1e-2
CASES = {  # changed settings of `leak`
    "no slips": {},
    "10 x pairs": {"pairs": 200_000},
    "slips": {"slip": 0.2},
    "on-policy": {"rounds": 8},
    "SFT term": {"sft_weight": 1.0},
}
SIZES = [1_000, 3_000, 10_000, 30_000]  # pairs
SAMPLERS = {
    "the reference": plots.BLUE,
    "a colder sampler": plots.SKY,
    "a uniform sampler": plots.PURPLE,
    "the policy itself": plots.GREEN,
}
OBJECTIVES = {"DPO": dpo.dpo_loss, "no KL penalty": losses.unlikelihood_loss}
STYLES = {"DPO": plots.BLACK, "no KL penalty": plots.RED}


class WideWorld(data.ToyWorld):
    """The toy world with responses of up to K = 4 words, 11,111 to a prompt."""

    K = 4


def measure(seed, quick, part):
    steps = STEPS
    if quick:
        steps = STEPS // 4
    rows = []
    if part == "cases":
        for case, settings in CASES.items():
            row = {"seed": seed, "part": part, "case": case, "steps": steps}
            rows.append(row | leak(seed, steps, **settings))
    elif part == "samplers":
        for size in SIZES:
            for sampler in SAMPLERS:
                logps, ref = train_on(seed, sampler, size, steps)
                row = {"seed": seed, "part": part, "sampler": sampler, "pairs": size}
                rows.append(row | lab.measure(logps, ref))
    else:
        rows = at_each_prompt(seed, steps)
    return rows


def at_each_prompt(seed, steps):
    """DPO on pairs of the film only, with and without a KL penalty, by steps and prompt."""
    _, ref = lab.reference(seed)
    pairs = lab.draw_pairs(seed, PAIRS)
    film_only = data.Drawn(*(column[pairs.prompt == 0] for column in pairs))
    rows = []
    for name, loss in OBJECTIVES.items():
        for step, logps in lab.train_dpo(seed, film_only, steps=steps, loss=loss):
            if step % 20 > 0:
                continue
            for x, noun in enumerate(data.NOUNS):
                row = {"seed": seed, "part": "prompts", "run": name, "prompt": noun, "step": step}
                rows.append(row | lab.measure(logps, ref, prompts=slice(x, x + 1)))
    return rows


def leak(seed, steps, slip=0.0, pairs=20_000, sft_weight=0.0, rounds=1):
    """DPO in the wide world -> where it ends. In each round the policy writes its share of the
    pairs; before the first it is the reference."""
    world = WideWorld()
    model = copy.deepcopy(wide_sft(seed, slip))
    ref = world.logps(model)
    policy = ref
    generator = torch.Generator().manual_seed(seed)
    mentioned = torch.zeros(ref.shape, dtype=torch.bool)

    def loss(chosen, *others, beta):
        return dpo.dpo_loss(chosen, *others, beta=beta).losses - sft_weight * chosen

    for _ in range(rounds):
        drawn = world.draw_pairs(policy, pairs // rounds, generator)
        mentioned[drawn.prompt, drawn.chosen] = True
        mentioned[drawn.prompt, drawn.rejected] = True
        ref_logps = lab.of_pairs(ref, drawn).float()
        train(model, world.rows(drawn), loss, steps // rounds, seed, ref_logps)
        policy = world.logps(model)
    chosen, rejected = lab.of_pairs(policy - ref, drawn)
    numbers = {
        "margin": BETA * (chosen - rejected),
        "in no pair before": (ref.exp() * ~mentioned).sum(-1),
        "in no pair after": (policy.exp() * ~mentioned).sum(-1),
    }
    return world.measure(policy, ref, BETA) | lab.means(numbers)


@functools.cache
def wide_sft(seed, slip):
    """SFT in the wide world on a corpus with this fraction of slips. Train a copy, never this."""
    model = lab.new_gpt(seed)
    corpus = WideWorld().corpus(torch.Generator().manual_seed(seed), slip=slip)
    train(model, corpus, lambda chosen: -chosen, 400, seed)
    return model


def train(model, rows, loss, steps, seed, ref_logps=None):
    optimizer = lab.adamw(model, LR)
    batches = data.batches(rows, 512, torch.Generator().manual_seed(seed))
    for step in range(1, steps + 1):
        lab.set_learning_rate(optimizer, LR, step, steps, warmup=steps // 10)
        lab.train_step(model, optimizer, rows, next(batches), loss=loss, ref_logps=ref_logps)


def train_on(seed, sampler, size, steps):
    """DPO in four parts -> logps, log pi_ref. Before each the sampler writes a quarter of the
    pairs; only the policy itself writes others than it did before."""
    policy, ref = lab.start_from(seed)
    logps = ref
    generator = torch.Generator().manual_seed(seed)
    written = []
    for part in range(4):
        source = sampled_from(sampler, ref, logps)
        written.append(WORLD.draw_pairs(source, size // 4, generator))
        pairs = data.Drawn(*(torch.cat(columns) for columns in zip(*written)))
        losses_of = lab.preferences(dpo.dpo_loss, pairs, ref)
        logps = lab.last(
            lab.descend(policy, losses_of, len(pairs.prompt), steps // 4, LR, seed=part)
        )
    return logps, ref


def sampled_from(sampler, ref, policy):
    """The log-probs (P, Y) from which the sampler draws responses."""
    if sampler == "a colder sampler":
        return (2 * ref).log_softmax(-1)
    if sampler == "a uniform sampler":
        return torch.zeros_like(ref).log_softmax(-1)
    if sampler == "the policy itself":
        return policy
    return ref


def verdict(rows):
    """There is no rule: what leaks in the wide world, and what moves at a prompt in no pair."""
    cases = lab.where(rows, part="cases")
    last = max(lab.values(rows, "step"))
    prompts = lab.where(rows, part="prompts", run="DPO", step=last)
    answer = f"They may gain. 20,000 pairs, {last} steps, their probability:"
    for case in ("no slips", "slips"):
        mine = lab.where(cases, case=case)
        answer += f" {lab.spread(mine, 'in no pair before')} to"
        answer += f" {lab.spread(mine, 'in no pair after')} (reference with {case}),"
    answer = answer.removesuffix(",") + ". Pairs of the film only, KL:"
    for prompt in ("film", "hotel"):
        answer += f" {lab.spread(lab.where(prompts, prompt=prompt), 'kl')} ({prompt}),"
    return answer.removesuffix(",") + "."


def draw(rows):
    cases = lab.where(rows, part="cases")
    steps = cases[0]["steps"]
    title = f"Responses and prompts in no pair: {steps} steps, beta 1, {plots.seeds(rows)}"
    figure, axes = plots.panels(title, 4, rows=2, width=5.5)
    colors = {"before DPO": plots.GREY, "after DPO": plots.BLACK}
    in_no_pair = {}
    gap_closed = {}
    for case in CASES:
        mine = lab.where(cases, case=case)
        in_no_pair[case] = {
            "before DPO": lab.per_seed(mine, "in no pair before"),
            "after DPO": lab.per_seed(mine, "in no pair after"),
        }
        gap_closed[case] = {"after DPO": lab.per_seed(mine, "gap_closed")}
    plots.bars(axes[0], in_no_pair, colors)
    plots.bars(axes[1], gap_closed, {"after DPO": plots.BLACK})
    axes[0].set(ylabel="probability of responses in no pair")
    axes[1].set(ylabel="gap closed (1: the optimum of Eq. 4)")
    for ax in axes[:2]:
        ax.set(title="11,111 responses, 20,000 pairs (10 x: 200,000)")
    for sampler, color in SAMPLERS.items():
        mine = lab.where(rows, part="samplers", sampler=sampler)
        plots.line(axes[2], mine, "pairs", "gap_closed", color, label=f"pairs by {sampler}")
    axes[2].set(title="1,111 responses: who wrote the pairs", xscale="log", xlabel="pairs")
    axes[2].set(ylabel="gap closed")
    for run, color in STYLES.items():
        mine = lab.where(rows, part="prompts", run=run)
        film = {"linestyle": "--", "label": f"{run}, the film"}
        plots.line(axes[3], lab.where(mine, prompt="film"), "step", "kl", color, **film)
        hotel = lab.where(mine, prompt="hotel")
        plots.line(axes[3], hotel, "step", "kl", color, label=f"{run}, the hotel")
    axes[3].set(title=f"{PAIRS // 2:,} pairs, all of the film", xlabel="step")
    axes[3].set(ylabel="KL(pi || pi_ref), nats")
    plots.legend(figure, *axes)
    return figure
