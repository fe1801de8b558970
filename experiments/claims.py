"""The paper's claims, and what its readers ask, measured in the toy world where all is exact.

    python -m experiments.claims [--quick]

Each function measures one claim on one seed and returns rows; verdicts.py draws them and makes the
table. Beta 1 and train.py's network unless said. *As good or better* comes
from frontier.py's table.
"""

import copy
import functools

import torch

import data
import dpo
from experiments import lab, rlhf, verdicts
from experiments.lab import BETA, WORLD


def no_reward_model_needed(seed, quick):
    """The policy's implicit reward (Eq. 5) beside an explicit reward model's, for equal pairs."""
    sft, ref = lab.reference(seed)
    rows = []
    for pairs, steps, epochs in ((10_000, 200, 20), (100_000, 800, rlhf.EPOCHS)):
        steps, epochs = (steps // 4, epochs // 4) if quick else (steps, epochs)
        drawn = lab.draw(seed, pairs)
        *_, (_, logps) = lab.train_dpo(seed, drawn, steps=steps)
        implicit = dpo.implicit_reward(logps, ref, BETA)
        explicit = rlhf.train_reward_model(sft, drawn, epochs, seed)
        for name, rewards in (("implicit (DPO)", implicit), ("explicit (Eq. 2)", explicit)):
            row = {"seed": seed, "rewards": name, "pairs": pairs}
            rows.append(row | rlhf.agreement(rewards, ref))
    return rows


def unweighted(*logps, beta):
    """DPO's push, beta (grad log pi_w - grad log pi_l), with its weight left at 1/2."""
    return -dpo.reward_margins(*logps, beta=beta) / 2


def the_weight_matters(seed, quick):
    """DPO with its gradient weight sigma(r_rejected - r_chosen), and without."""
    rows, (_, ref) = [], lab.reference(seed)
    for name, loss in (("with", dpo.dpo_loss), ("without", unweighted)):
        run = lab.train_dpo(seed, loss=loss, steps=200 if quick else lab.STEPS)
        for step, logps in run:
            if step % 20 == 0:
                row = {"seed": seed, "weight": name, "step": step}
                rows.append(row | lab.measure(logps, ref))
    return rows


def little_tuning(seed, quick):
    """J over a grid of learning rate and beta: DPO, and PPO on a reward model of the same pairs,
    for which it draws as many responses (half as many as elsewhere). The grid's middle is tuned."""
    sft, ref = lab.reference(seed)
    drawn, rows = lab.draw(seed, lab.PAIRS // 2), []
    samples, steps = rlhf.SAMPLES // (8 if quick else 2), lab.STEPS // (8 if quick else 2)
    learned = rlhf.train_reward_model(sft, drawn, 1 if quick else rlhf.EPOCHS, seed)
    for beta in (1.0,) if quick else (0.5, 1.0, 2.0):
        least = lab.measure(ref, ref, beta)["objective"]
        most = lab.measure(dpo.optimal_policy(ref, WORLD.rewards, beta)[0], ref, beta)["objective"]
        for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
            runs = {"DPO": lab.train_dpo(seed, drawn, lr, steps, beta=beta)}
            runs["PPO"] = rlhf.ppo(sft, learned, seed, beta, samples=samples, lr=lr)
            for name, run in runs.items():
                *_, (_, logps) = run
                found = lab.measure(logps, ref, beta)
                row = {"seed": seed, "method": name, "beta": beta, "lr": lr, "kl": found["kl"]}
                gained = (found["objective"] - least) / (most - least)  # 0: reference, 1: pi*
                rows.append(row | {"objective": found["objective"], "gained": gained})
    return rows


def close_to_the_reference(seed, quick):
    """The KL to the reference as beta varies; and the hotel prompt, when all pairs are of the film,
    with DPO and with a loss without a KL penalty (DPO's without its weight)."""
    rows, (_, ref) = [], lab.reference(seed)
    all_pairs = lab.draw(seed, lab.PAIRS)
    film_pairs = lab.draw(seed, 2 * lab.PAIRS, among=0)
    for beta in (0.5, 2.0) if quick else (0.25, 0.5, 1.0, 2.0, 4.0):
        runs = {"pi*": [(0, dpo.optimal_policy(ref, WORLD.rewards, beta)[0])]}
        settings = {"beta": beta, "steps": 200 if quick else lab.STEPS}
        runs["all pairs"] = lab.train_dpo(seed, all_pairs, **settings)
        runs["film pairs only"] = lab.train_dpo(seed, film_pairs, **settings)
        runs["film, no KL penalty"] = lab.train_dpo(seed, film_pairs, loss=unweighted, **settings)
        rows += of_each_prompt(seed, runs, beta, ref)
    return rows + of_each_prompt(seed, {"reference": [(0, ref)]}, 0.0, ref)


def of_each_prompt(seed, runs, beta, ref):
    """The end of each run, film and hotel by themselves."""
    rows = []
    for name, run in runs.items():
        *_, (_, logps) = run
        for x, noun in enumerate(data.NOUNS[: len(ref)]):
            found = lab.measure(logps, ref, prompts=slice(x, x + 1))
            row = {"seed": seed, "run": name, "beta": beta, "prompt": noun}
            rows.append(row | {key: found[key] for key in ("kl", "grammatical", "expected_reward")})
    return rows


def over_fitting(seed, quick):
    """Long training on few and many pairs, clean or a fifth of them flipped, by four losses.

    Accuracy: the share of pairs whose winner has the higher implicit reward; held-out pairs are
    never flipped. epsilon is the true 0.2 on flipped pairs, 0.1 on clean ones. IPO's tau is 0.25.
    """
    rows, (_, ref) = [], lab.reference(seed)
    held_out = lab.draw(seed, 20_000, stream=2000)
    losses = dict(dpo.LOSSES)
    del losses["hinge"]
    steps = 200 if quick else lab.STEPS
    cases = [(pairs, 0.0, "dpo") for pairs in (3_000, 30_000, 300_000)]
    cases += [(pairs, flip, name) for pairs in (1_000, 10_000, 100_000) for flip in (0.0, 0.2)
              for name in losses]  # fmt: skip
    for pairs, flip, name in cases[3:11] if quick else cases:
        settings = {"beta": 0.25 if name == "ipo" else BETA}
        settings |= {"epsilon": flip or 0.1} if name in ("cdpo", "robust") else {}
        drawn = lab.draw(seed, pairs, flip=flip)
        run = lab.train_dpo(seed, drawn, steps=steps, loss=losses[name], **settings)
        for step, logps in run:
            if step in (0, 10, 25, 50) or step % 100 == 0:
                rewards = logps - ref
                won = [dpo.accuracy(rewards[d.prompt, d.chosen] - rewards[d.prompt, d.rejected])
                       for d in (drawn, held_out)]  # fmt: skip
                row = {"seed": seed, "loss": name, "pairs": pairs, "flipped": flip, "step": step}
                row |= {"train_accuracy": won[0].mean().item()}
                row |= {"held_out_accuracy": won[1].mean().item()}
                rows.append(row | lab.measure(logps, ref))
    return rows


class WideWorld(data.ToyWorld):
    """The toy world with responses of up to K = 4 words, 11,111 to a prompt."""

    K = 4


def coverage(seed, quick):
    """The loss says nothing of responses that no pair mentions. A reference peaked on its grammar
    (an SFT corpus without slips) among 11,111 possible responses, and five attempts to mend it."""
    world = WideWorld()
    usual = dict(slip=0.0, pairs=20_000, lr=1e-2, sft_weight=0.0, rounds=1)
    cases = {
        "peaked reference": {},
        "broad reference": {"slip": 0.2},
        "ten times the pairs": {"pairs": 200_000},
        "a tenth of the step": {"lr": 1e-3},
        "on-policy pairs": {"rounds": 8},
        "with an SFT term": {"sft_weight": 1.0},
    }
    rows = []
    for name, changed in cases.items():
        for row in leak(world, seed, 160_000 // (4 if quick else 1), **usual | changed):
            rows.append({"seed": seed, "case": name} | row)
    return rows


def leak(world, seed, seen, slip, pairs, lr, sft_weight, rounds):
    """SFT on a corpus, DPO as train.py does it -> rows of margin, accuracy, gap closed
    and of where the mass is. In each round the pairs are drawn anew, from the policy as it is."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(sft(world, seed, slip))
    policy = ref = world.logps(model)
    best, _ = dpo.optimal_policy(ref, world.rewards, BETA)
    paired = torch.zeros(ref.shape, dtype=torch.bool)  # responses that some pair has mentioned
    grammatical = world.grammatical

    def row(of_mass, seen, margins):
        probs, kl = of_mass.exp(), dpo.kl_divergence(of_mass, best).mean()
        return lab.means({
            "pairs_seen": torch.tensor([float(seen)]),
            "margin": margins, "accuracy": dpo.accuracy(margins),
            "gap_closed": 1 - kl / dpo.kl_divergence(ref, best).mean(),
            "expected_reward": (probs * world.rewards).sum(-1),
            "grammatical": (probs * grammatical).sum(-1),
            "other_paired": (probs * (paired & ~grammatical)).sum(-1),
            "in_no_pair": (probs * ~(paired | grammatical)).sum(-1),
        })  # fmt: skip

    for turn in range(rounds):
        drawn = world.draw_pairs(policy, pairs // rounds, generator)
        x, both = drawn.prompt, torch.stack([drawn.chosen, drawn.rejected])
        paired[x, both] = True
        of_ref = ref[x, both].float()  # (2, n)
        if turn == 0:
            yield row(ref, 0, torch.zeros(1))

        def loss(chosen, *others, beta):
            return dpo.dpo_loss(chosen, *others, beta=beta).losses - sft_weight * chosen

        rows = world.rows(drawn)
        optimizer = lab.adamw(model, lr)
        schedule = lab.schedule(
            optimizer, rows, epochs=seen / rounds / len(rows), peak_lr=lr, seed=seed
        )
        for step, steps, ids in schedule:
            lab.train_step(model, optimizer, rows, ids, loss=loss, ref_logps=of_ref)
            if step % (steps * rounds // 8) and step < steps:
                continue
            policy = world.logps(model)
            margins = BETA * (policy - ref)[x, both].diff(dim=0).neg()
            yield row(policy, seen * (turn + step / steps) / rounds, margins)


@functools.cache
def sft(world, seed, slip):
    model = lab.new_gpt(seed)
    corpus = world.corpus(torch.Generator().manual_seed(seed), slip=slip)
    optimizer = lab.adamw(model, lr=1e-2)
    schedule = lab.schedule(optimizer, corpus, epochs=10, peak_lr=1e-2, seed=seed)
    for _, _, ids in schedule:
        lab.train_step(model, optimizer, corpus, ids, loss=sft_loss)
    return model


def sft_loss(chosen_logps):
    return -chosen_logps


def both_log_probs_fall(seed, quick):
    """log pi / pi_ref of chosen and rejected responses, and where the mass went: a table of free
    logits, the network that shares its weights, and the exact optimum, all for the same pairs."""
    rows, (_, ref) = [], lab.reference(seed)
    for beta in (0.1, 1.0):
        for pairs in (4, 2_000):
            drawn = lab.draw(seed, pairs)
            runs, steps = {}, 100 if quick else 200
            for kind, lr in (("table", 0.3), ("network", 1e-2)):
                runs[kind] = lab.train_dpo(seed, drawn, lr, steps, kind=kind, beta=beta)
            runs["pi*"] = [(0, dpo.optimal_policy(ref, WORLD.rewards, beta)[0])]
            won, named = torch.zeros(2, *ref.shape, dtype=torch.bool)
            won[drawn.prompt, drawn.chosen] = True
            named[drawn.prompt, torch.stack([drawn.chosen, drawn.rejected])] = True
            for kind, run in runs.items():
                *_, (_, logps) = run
                moved, mass = logps - ref, logps.exp() - ref.exp()
                row = {"seed": seed, "policy": kind, "beta": beta, "pairs": pairs}
                rows.append(row | lab.means({
                    "chosen": moved[drawn.prompt, drawn.chosen],
                    "rejected": moved[drawn.prompt, drawn.rejected],
                    "mass_chosen": (mass * won).sum(-1),
                    "mass_only_rejected": (mass * (named & ~won)).sum(-1),
                    "mass_in_no_pair": (mass * ~named).sum(-1),
                }))  # fmt: skip
    return rows


CLAIMS = {  # and a guess of their seconds, the longest first
    little_tuning: 200, over_fitting: 100, coverage: 80, close_to_the_reference: 40,
    no_reward_model_needed: 32, both_log_probs_fall: 15, the_weight_matters: 8,
}  # fmt: skip


def main():
    quick, folder = lab.parse(__doc__)
    lab.run_and_save(CLAIMS, "claims", quick, folder)
    verdicts.main(folder)


if __name__ == "__main__":
    main()
