"""What the notebook's later steps show with five seeds, since one seed is an anecdote.

    python -m experiments.course [--quick]

Each function measures one question on one seed and returns the rows of assets/course_<name>.csv.
"""

import torch

import data
import dpo
from experiments import frontier, lab, rlhf
from experiments.claims import unweighted
from experiments.lab import BETA, LENGTHS, WORLD
from experiments.losses import orpo_loss, unlikelihood_loss

FEW = 300  # pairs: for a reward model that is over-optimised, and to be learned by heart
SWEEP = torch.logspace(1.5, -2, 71, dtype=torch.float64).tolist()  # beta, from large to small


def over_optimised(seed, quick):
    """Reward models fitted to few pairs each (Eq. 2), and their own optima (Eq. 4) from a large
    beta to a small one: what they promise, and what r* says. Means over the judges."""
    sft, ref = lab.reference(seed)
    judges = []
    for judge in range(2 if quick else 10):
        generator = torch.Generator().manual_seed(1000 * judge + seed)
        few = WORLD.draw_pairs(ref, FEW, generator)
        settings = dict(epochs=40, seed=judge, lr=1e-2, batch=128)
        judges.append((rlhf.train_reward_model(sft, few, **settings), named_in(few)))
    rows = []
    for beta in SWEEP:
        found = {"expected_reward": [], "kl": [], "promised": [], "in_no_pair": []}
        for learned, named in judges:
            logps, _ = dpo.optimal_policy(ref, learned, beta)
            found["expected_reward"].append((logps.exp() * WORLD.rewards).sum(-1).mean())
            found["kl"].append(dpo.kl_divergence(logps, ref).mean())
            found["promised"].append((logps.exp() * learned).sum(-1).mean())
            found["in_no_pair"].append((logps.exp() * ~named).sum(-1).mean())
        row = {"seed": seed, "beta": beta}
        rows.append(row | {key: torch.stack(each).mean().item() for key, each in found.items()})
    return rows


def named_in(drawn):
    """(P, Y): True for the responses that some pair names."""
    named = torch.zeros(WORLD.rewards.shape, dtype=torch.bool)
    named[drawn.prompt, torch.stack([drawn.chosen, drawn.rejected])] = True
    return named


def displaced(seed, quick):
    """DPO on four pairs at beta 0.1: how far each chosen response moves, and what it then has."""
    rows, (_, ref), few = [], lab.reference(seed), lab.draw(seed, 4)
    for kind, lr in (("table", 0.3), ("network", 1e-2)):
        *_, (_, logps) = lab.train_dpo(seed, few, lr, 200, kind=kind, beta=0.1)
        for x, y in zip(few.prompt, few.chosen):
            row = {"seed": seed, "policy": kind, "moved": (logps - ref)[x, y].item()}
            rows.append(row | {"before": ref[x, y].exp().item(), "after": logps[x, y].exp().item()})
    return rows


def held(seed, quick):
    """What holds the policy: the weight, and a reference that stays where it is."""
    drawn, steps = lab.draw(seed, lab.PAIRS), 40 if quick else 400
    policy, ref = lab.start_from(seed)
    anchor, moving = ref, []
    for part in range(4):  # the reference is copied from the policy after each quarter
        loss = lab.preferences(dpo.dpo_loss, drawn, anchor)
        for step, anchor in lab.descend(policy, loss, lab.PAIRS, steps // 4, 1e-2, seed):
            if step < steps // 4 or part == 3:  # the end of a part is the start of the next
                moving.append((part * steps // 4 + step, anchor))
    runs = {
        "DPO": lab.train_dpo(seed, drawn, steps=steps),
        "weight left at 1/2": lab.train_dpo(seed, drawn, steps=steps, loss=unweighted),
        "reference copied every quarter": moving,
    }
    return [
        {"seed": seed, "run": name, "step": step} | lab.measure(logps, ref)
        for name, run in runs.items()
        for step, logps in run
        if step % (steps // 20) == 0
    ]


def sft_first(seed, quick):
    """DPO from an untrained network, after SFT on the chosen responses or on both, and from the
    model that wrote the responses; each is its own reference. The pairs are the same."""
    rows, drawn = [], lab.draw(seed, lab.PAIRS)
    x, both = drawn.prompt, torch.stack([drawn.chosen, drawn.rejected])
    starts = {"untrained": both[:0], "SFT on the chosen": both[:1], "SFT on both": both}
    for name, taught in (starts | {"author of the pairs": both[:0]}).items():
        policy, steps = lab.new_gpt(seed), 40 if quick else 400
        if name == "author of the pairs":
            policy, _ = lab.start_from(seed)

        def sft(logps, i):
            return -logps[x[i], taught[:, i]].mean(0)

        if len(taught):
            list(lab.descend(policy, sft, lab.PAIRS, steps // 2, 1e-2, seed))
        base = lab.listed(policy).detach()
        loss = lab.preferences(dpo.dpo_loss, drawn, base)
        *_, (_, logps) = lab.descend(policy, loss, lab.PAIRS, steps, 1e-2, seed)
        right = dpo.accuracy((logps - base)[x, both[0]] - (logps - base)[x, both[1]]).mean().item()
        before = lab.measure(base, base)["grammatical"]
        row = {"seed": seed, "start": name, "accuracy": right, "before": before}
        rows.append(row | lab.measure(logps, base))
    return rows


def dpo_of_means(w, l, ref_w, ref_l, chosen_lengths, rejected_lengths, beta):
    """Eq. 7 with log-probs averaged over tokens: not the paper's loss."""
    w, ref_w = w / chosen_lengths, ref_w / chosen_lengths
    return dpo.dpo_loss(w, l / rejected_lengths, ref_w, ref_l / rejected_lengths, beta)


def other_losses(seed, quick):
    """Where each loss ends on the same pairs, in a table of free logits, so that nothing but the
    loss decides; ORPO, which must learn to write, in a network. And how long responses become."""
    (_, ref), drawn = lab.reference(seed), lab.draw(seed, lab.PAIRS)
    free = dict(kind="table", lr=0.03, steps=150 if quick else 1500)
    cases = {name: (loss, BETA) for name, loss in dpo.LOSSES.items()}
    cases["ipo, beta 0.25"] = dpo.ipo_loss, 0.25
    cases["unlikelihood"] = unlikelihood_loss, BETA
    cases["dpo of means"] = dpo_of_means, BETA
    ends = {"reference": ref, "pi*": dpo.optimal_policy(ref, WORLD.rewards, BETA)[0]}
    for name, (loss, beta) in cases.items():
        *_, (_, ends[name]) = lab.train_dpo(seed, drawn, loss=loss, beta=beta, **free)
    losses_of = lab.preferences(orpo_loss, drawn, ref, alpha=1.0)
    for name, policy in (("from SFT", lab.start_from(seed)[0]), ("untrained", lab.new_gpt(seed))):
        run = lab.descend(policy, losses_of, lab.PAIRS, 40 if quick else 400, 1e-2, seed)
        *_, (_, ends[f"orpo, {name}"]) = run
    return [
        {"seed": seed, "loss": name, "tokens": (logps.exp() * LENGTHS).sum(-1).mean().item()}
        | lab.measure(logps, ref)
        for name, logps in ends.items()
    ]


def samplers(seed, quick):
    """Pairs of the reference's responses, of a colder sampler's (probabilities squared), of a
    uniform one's; and of the policy itself, which are drawn in four parts while it trains. All
    train in the same four parts."""
    rows, (_, ref) = [], lab.reference(seed)
    others = {"reference": ref, "colder": (2 * ref).log_softmax(-1)}
    others["uniform"] = torch.zeros_like(ref).log_softmax(-1)
    others["the policy itself"] = None
    for n in (1_000,) if quick else (1_000, 3_000, 10_000, 30_000):
        for name, sampler in others.items():
            policy, now = lab.start_from(seed)
            drawn, generator = [], torch.Generator().manual_seed(seed)
            for part in range(4):
                if sampler is None or part == 0:
                    source, size = (now, n // 4) if sampler is None else (sampler, n)
                    drawn.append(WORLD.draw_pairs(source, size, generator))
                so_far = data.Drawn(*(torch.cat(columns) for columns in zip(*drawn)))
                loss = lab.preferences(dpo.dpo_loss, so_far, ref)
                run = lab.descend(policy, loss, len(so_far.prompt), 60, 1e-2, part)
                *_, (_, now) = run
            row = {"seed": seed, "sampler": name, "pairs": n}
            rows.append(row | {"gap_closed": lab.measure(now, ref)["gap_closed"]})
    return rows


def by_heart(seed, quick):
    """Long training on few pairs: what it says of them, of held-out ones, and where the mass is."""
    (_, ref), few = lab.reference(seed), lab.draw(seed, FEW)
    pairs = {"own": few, "held out": lab.draw(seed, 20_000, stream=2000)}
    named, rows = named_in(few), []
    for step, logps in lab.train_dpo(seed, few, steps=100 if quick else 600):
        if step % 20 == 0:
            row = {"seed": seed, "step": step} | lab.measure(logps, ref)
            for whose, drawn in pairs.items():
                x = drawn.prompt
                both = torch.stack([drawn.chosen, drawn.rejected])
                told = dpo.describe(*logps[x, both], *ref[x, both], beta=BETA)
                row[f"{whose} loss"] = told["loss"].mean().item()
                row[f"{whose} accuracy"] = told["accuracy"].mean().item()
            rows.append(row | {"in no pair": (logps.exp() * ~named).sum(-1).mean().item()})
    return rows


# Exact, without training


def other_direction(ref_logps, rewards, expected_reward):
    """The optimum of E[r] - b KL(pi_ref || pi), with b such that it earns the expected reward:
    pi = b pi_ref / (level - r), the level above every r. (Y,), (Y,), float -> log pi (Y,)"""
    near, far = 1e-9, 1e3  # of the level above the highest reward; nearer is greedier
    for _ in range(100):
        middle = (near * far) ** 0.5
        logps = (ref_logps - (rewards.max() + middle - rewards).log()).log_softmax(-1)
        greedy = (logps.exp() * rewards).sum() > expected_reward
        near, far = (middle, far) if greedy else (near, middle)
    return logps


def chosen_at_the_optimum(ref, beta):
    """The mean of log pi* / pi_ref over the chosen responses of endless pairs, and over the
    rejected ones: pi_ref(y) s(y) is half the probability that y is drawn and wins. (P, Y) -> two
    floats."""
    best, _ = dpo.optimal_policy(ref, WORLD.rewards, beta)
    wins = torch.stack([frontier.win_rate(*each, "hard") for each in zip(ref, WORLD.rewards)])
    chosen, rejected = 2 * ref.exp() * wins, 2 * ref.exp() * (1 - wins)
    return [(p * (best - ref)).sum(-1).mean().item() for p in (chosen, rejected)]


QUESTIONS = {  # and a guess of their seconds, the longest first
    samplers: 17, other_losses: 12, sft_first: 7, over_optimised: 7, held: 5, by_heart: 3,
    displaced: 1,
}  # fmt: skip


def main():
    quick, folder = lab.parse(__doc__)
    lab.run_and_save(QUESTIONS, "course", quick, folder)
    print(f"see {folder}/course_*.csv")


if __name__ == "__main__":
    main()
