"""The road that DPO leaves out: a reward model (Eq. 2), then PPO on Eq. 3, in the toy world.

    python -m experiments.rlhf [--quick]

Section 3 of the paper; PPO is Schulman et al. 2017 (arXiv 1707.06347) with GAE (arXiv 1506.02438),
its set-up for language Ziegler et al. 2019 (arXiv 1909.08593): a critic, the KL term spread over
the tokens, an adaptive beta that holds a target KL. B responses of K tokens at most, T positions.
Left out: a clipped value loss, an entropy bonus, early stopping on KL. TUNED says what was tuned.
"""

import copy

import torch
from matplotlib.figure import Figure
from torch import nn

import dpo
from experiments import lab
from experiments.lab import BETA, LENGTHS, WORLD

SAMPLES = 8 * 48 * 512  # responses that PPO draws: 2% fewer than the 100,000 pairs of DPO hold
EPOCHS = 8  # of the reward model, as many as DPO's


class Scalar(nn.Module):
    """A GPT whose head is one number: token ids (B, T) -> (B, T). The reward model and the critic.

    It starts at the SFT model's weights, with a head of zeros.
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt = copy.deepcopy(gpt)
        self.head = nn.Linear(gpt.config.n_embd, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids):
        return self.head(self.gpt.ln_f(self.gpt.hidden(ids))).squeeze(-1)


# The reward model: Eq. 2


RESPONSES = [(ids + [WORLD.W] * WORLD.K)[: WORLD.K] for ids in WORLD.response_ids]
RESPONSES = torch.tensor(RESPONSES)  # (Y, K) tokens; END fills the rest, LENGTHS says what counts


def score(model, x, y):
    """r_phi(x, y), read at the last token of the response, END included: two (B,) -> (B,)"""
    ids = torch.cat([WORLD.prompt_ids[x], RESPONSES[y]], 1)  # (B, T)
    last = WORLD.prompt_ids.shape[1] + LENGTHS[y] - 1
    return model(ids)[torch.arange(len(ids)), last]


def train_reward_model(sft, drawn, epochs=EPOCHS, seed=0, lr=5e-3, batch=512):
    """Eq. 2 on the pairs, from the SFT model's weights -> r_phi of every response, (P, Y) float64.

    Eq. 2 leaves each prompt's level free; as in section 3, it is set so that E_ref[r_phi] = 0.
    """
    model = Scalar(sft)
    generator = torch.Generator().manual_seed(seed)
    optimizer = lab.adamw(model, lr)
    order = [torch.randperm(len(drawn.prompt), generator=generator) for _ in range(epochs)]
    batches = torch.cat(order).split(batch)
    for step, i in enumerate(batches):
        left = 1 - step / len(batches)
        optimizer.param_groups[0]["lr"] = lr * min((1 - left) * 20 + 0.02, left * 1.05, 1)
        x = drawn.prompt[i]
        rewards = score(model, torch.cat([x, x]), torch.cat([drawn.chosen[i], drawn.rejected[i]]))
        loss = dpo.reward_model_loss(*rewards.chunk(2)).mean()  # (2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        y = torch.arange(len(RESPONSES))
        rewards = [score(model, torch.full_like(y, x), y) for x in range(len(WORLD.prompts))]
        rewards = torch.stack(rewards).double()
        return rewards - (lab.listed(sft).exp() * rewards).sum(-1, keepdim=True)


# Does a reward agree with the true one?


def agreement(rewards, ref):
    """How well rewards (P, Y), a reward model's or a policy's own, agree with r*; means over x.

    rank_correlation: Spearman's, over every response, the rare ones too.
    pair_accuracy: over all pairs that pi_ref would draw and whose true rewards differ.
    probability_error: the mean distance of sigma(r - r') from Bradley-Terry's p, over such pairs.
    """
    columns = {"rank_correlation": [], "pair_accuracy": [], "probability_error": []}
    for found, true, logps in zip(rewards, WORLD.rewards, ref):
        ranks = torch.stack([mean_ranks(found), mean_ranks(true)])
        columns["rank_correlation"].append(ranks.corrcoef()[0, 1])
        margins = found[:, None] - found  # (Y, Y)
        true_margins = true[:, None] - true
        probs = logps.exp()
        odds = probs[:, None] * probs * (true_margins != 0)
        right = dpo.accuracy(margins * true_margins.sign())
        error = (margins.sigmoid() - true_margins.sigmoid()).abs()
        columns["pair_accuracy"].append((odds * right).sum() / odds.sum())
        columns["probability_error"].append((odds * error).sum() / odds.sum())
    return {name: torch.stack(column).mean().item() for name, column in columns.items()}


def mean_ranks(values):
    """Ranks (n,), float64. Equal values share the mean of their ranks, for r* has ties."""
    _, level, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2
    return ranks[level].double()


# PPO: Eq. 3


def gae(rewards, values, mask, lam):
    """Advantages and returns of each token, undiscounted: three (B, K) -> two (B, K).

    delta_t = r_t + V_(t+1) - V_t, A_t = delta_t + lam A_(t+1), return = A_t + V_t; V is 0 after
    the last token of a response (mask True up to it). arXiv 1506.02438, Eq. 11 to 16, gamma = 1.
    """
    advantages, following, ahead = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + following - values[:, t]
        ahead = torch.where(mask[:, t], delta + lam * ahead, 0.0)
        following = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = ahead
    return advantages, advantages + values


def clipped_loss(logps, old_logps, advantages, clip):
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), any equal shapes. arXiv 1707.06347, Eq. 7.

    The gradient is 0 where the ratio has left the clip on the side that A asks for.
    """
    ratio = (logps - old_logps).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def next_beta(beta, kl, target_kl):
    """Ziegler et al.'s controller: beta up to 2% up where KL is above its target, or down."""
    return beta * (1 + 0.1 * min(max(kl / target_kl - 1, -0.2), 0.2))


def token_rewards(rewards, logps, ref_logps, mask, beta):
    """The paper's r - beta (log pi - log pi_ref), token by token: the KL term where it arises, the
    reward (B,) at the last token, 0 after it. The row's sum is the sequence's. (B, K)"""
    out = torch.where(mask, -beta * (logps - ref_logps), 0.0)
    last = mask.sum(1) - 1
    out[torch.arange(len(out)), last] += rewards
    return out


def token_logps(model, ids):
    """log pi of each response token, the ids after the prompt's: (B, T) -> (B, K)"""
    start = WORLD.prompt_ids.shape[1]
    logps = model(ids[:, :-1])[:, start - 1 :].log_softmax(-1)
    return logps.gather(-1, ids[:, start:, None]).squeeze(-1)


def token_values(critic, ids):
    """V before each response token is drawn, read where it is predicted: (B, T) -> (B, K)"""
    return critic(ids[:, :-1])[:, WORLD.prompt_ids.shape[1] - 1 :]


def ppo_loss(policy, critic, ids, old_logps, advantages, returns, mask, clip):
    """The clipped loss of the policy plus the critic's squared error, each a mean over the tokens
    that count: (B, T) and four (B, K) -> a scalar."""
    losses = clipped_loss(token_logps(policy, ids), old_logps, advantages, clip)
    errors = (token_values(critic, ids) - returns) ** 2
    return losses[mask].mean() + errors[mask].mean()


def place_of(tokens):
    """Response tokens (B, K) -> places in WORLD.responses (B,), where shorter ones come first."""
    place, going = torch.zeros(len(tokens), dtype=torch.long), torch.ones(len(tokens)).bool()
    for token in tokens.T:
        going = going & (token != WORLD.W)
        place = torch.where(going, place * WORLD.W + token + 1, place)
    return place


# Found by hand for the best J (seed 0, true rewards, beta 1, four heads, torch's own betas): rate
# 3e-3, 1e-2; the critic's 3e-3, 1e-2, 3e-2; batch 512, 1,024; minibatch 256, 512, 1,024; 1 to 4
# epochs a batch; clip 0.1, 0.2, 0.4; lambda 0.8, 0.95, 1. The reward model (seeds 0 to 4): rate
# 2e-3, 5e-3, 1e-2; 2, 4, 8 epochs; with and without clipped gradients and a warm-up.
TUNED = dict(lr=1e-2, critic_lr=1e-2, batch=512, minibatch=512, epochs=2, clip=0.2, lam=0.95)


def ppo(sft, rewards, seed, beta=BETA, target_kl=None, samples=SAMPLES, **tuned):
    """PPO on Eq. 3 with these rewards (P, Y), from the SFT model. Yields (samples drawn, logps).

    With a target, beta is moved to hold KL(pi || pi_ref) there: Ziegler et al., section 2.2.
    """
    t = {**TUNED, **tuned}
    policy, ref, critic = copy.deepcopy(sft), sft, Scalar(sft)
    actor = lab.adamw(policy, t["lr"])
    critic_opt = lab.adamw(critic, t["critic_lr"])
    generator = torch.Generator().manual_seed(seed)
    start, rounds = WORLD.prompt_ids.shape[1], samples // t["batch"]
    for n in range(rounds):
        yield n * t["batch"], lab.listed(policy).detach()
        actor.param_groups[0]["lr"] = t["lr"] * (1 - n / rounds)
        with torch.no_grad():
            x = torch.randint(len(WORLD.prompts), (t["batch"],), generator=generator)
            ids = WORLD.prompt_ids[x]
            ids = policy.generate(ids, WORLD.K, stop_token=WORLD.W, generator=generator)
            ids = nn.functional.pad(ids, (0, start + WORLD.K - ids.shape[1]), value=WORLD.W)
            y = place_of(ids[:, start:])
            mask = torch.arange(WORLD.K) < LENGTHS[y, None]
            old, of_ref = token_logps(policy, ids), token_logps(ref, ids)
            of_tokens = token_rewards(rewards[x, y].float(), old, of_ref, mask, beta)
            advantages, returns = gae(of_tokens, token_values(critic, ids), mask, t["lam"])
            advantages = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8)
            if target_kl:
                kl = ((old - of_ref) * mask).sum(1).mean().item()
                beta = next_beta(beta, kl, target_kl)
        for _ in range(t["epochs"]):
            for i in torch.randperm(len(x), generator=generator).split(t["minibatch"]):
                batch = [column[i] for column in (ids, old, advantages, returns, mask)]
                loss = ppo_loss(policy, critic, *batch, t["clip"])
                actor.zero_grad()
                critic_opt.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                actor.step()
                critic_opt.step()
    yield rounds * t["batch"], lab.listed(policy).detach()


# The comparison


def work(seed, quick):
    """SFT, reward model, PPO, PPO-GT, DPO on one seed -> rows of three tables."""
    sft, ref = lab.reference(seed)
    drawn = lab.draw(seed, lab.PAIRS)
    samples, steps = (SAMPLES // 4, 200) if quick else (SAMPLES, lab.STEPS)
    learned = train_reward_model(sft, drawn, 1 if quick else EPOCHS, seed)
    *_, (_, of_dpo) = lab.train_dpo(seed, drawn, steps=steps)
    ends = {"SFT": ref, "DPO": of_dpo, "pi* of the reward model": best(ref, learned)}
    curves = []
    for name, rewards in (("PPO", learned), ("PPO-GT", WORLD.rewards)):
        for drawn_so_far, logps in ppo(sft, rewards, seed, samples=samples):
            if drawn_so_far % (samples // 24) == 0:
                row = {"seed": seed, "system": name, "samples": drawn_so_far}
                curves.append(row | numbers(logps, ref, learned))
        ends[name] = logps
    ends["optimum"] = best(ref, WORLD.rewards)
    rows = [{"seed": seed, "system": n} | numbers(logps, ref, learned) for n, logps in ends.items()]
    models = {"reward model": learned, "DPO": dpo.implicit_reward(of_dpo, ref, BETA)}
    found = [{"seed": seed, "rewards": n} | agreement(r, ref) for n, r in models.items()]
    calibrated = [row for name, r in models.items() for row in calibration(name, seed, r, ref)]
    return rows, found, curves, calibrated


def best(ref, rewards):
    return dpo.optimal_policy(ref, rewards, BETA)[0]


def numbers(logps, ref, learned):
    row = lab.measure(logps, ref)
    kept = {key: row[key] for key in ("expected_reward", "kl", "objective", "gap_closed")}
    return kept | {"learned_reward": (logps.exp() * learned).sum(-1).mean().item()}


def calibration(name, seed, rewards, ref):
    """Of the pairs in which the rewards give p from k/20 to (k+1)/20 to the one ahead, its true p
    by Bradley-Terry on r*; pairs as pi_ref draws them."""
    margins, truth = (r[:, :, None] - r[:, None] for r in (rewards, WORLD.rewards))
    odds, rows = ref.exp()[:, :, None] * ref.exp()[:, None], []
    for k in range(10, 20):
        p = margins.sigmoid()
        w = odds * ((margins > 0) & (k <= 20 * p) & (20 * p < k + 1))
        if w.sum() > 0:
            row = {"seed": seed, "rewards": name, "says": ((w * p).sum() / w.sum()).item()}
            rows.append(row | {"is": ((w * truth.sigmoid()).sum() / w.sum()).item()})
    return rows


def draw(curves, calibrated, path):
    fig = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    look = {"PPO": ("#D55E00", "s"), "PPO-GT": ("#E69F00", "D"), "DPO": ("#0072B2", "o")}
    for name in ("PPO", "PPO-GT"):
        for ax, key in ((left, "expected_reward"), (middle, "kl")):
            for seed in sorted({row["seed"] for row in curves}):
                mine = lab.where(curves, seed=seed, system=name)
                x, y = [r["samples"] for r in mine], [r[key] for r in mine]
                ax.plot(x, y, color=look[name][0], alpha=0.8, label=None if seed else name)
                if (name, ax) == ("PPO", left):
                    y, label = [r["learned_reward"] for r in mine], "PPO, by the reward model"
                    ax.plot(x, y, ":", color="#D55E00", alpha=0.8, label=None if seed else label)
    optimum = lab.measure(best(lab.reference(0)[1], WORLD.rewards), lab.reference(0)[1])
    left.axhline(optimum["expected_reward"], color="black", label="pi* of Eq. 4, seed 0")
    middle.axhline(optimum["kl"], color="black", label="pi* of Eq. 4, seed 0")
    left.set(xlabel="responses drawn", ylabel="E[r*], true reward")
    middle.set(xlabel="responses drawn", ylabel="KL(pi || pi_ref), nats")
    for name, (colour, marker) in (("reward model", look["PPO"]), ("DPO", look["DPO"])):
        mine = lab.where(calibrated, rewards=name)
        x, y = [r["says"] for r in mine], [r["is"] for r in mine]
        label = {"DPO": "DPO's implicit reward"}.get(name, name)
        right.plot(x, y, marker, color=colour, alpha=0.6, label=label)
    right.plot([0.5, 1], [0.5, 1], color="black", label="calibrated")
    right.set(xlabel="P(y beats y') by the learned rewards, a dot per seed", ylabel="its true P")
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
        ax.legend()
    fig.savefig(path, dpi=110)


def main():
    quick, folder = lab.parse(__doc__)
    seeds = range(1 if quick else 5)
    results = lab.run_jobs(work, [(seed, quick) for seed in seeds], [1] * len(seeds))
    rows, found, curves, calibrated = (sum(part, []) for part in zip(*results))
    names = "rlhf", "rlhf_reward_model", "rlhf_curves", "rlhf_calibration"
    for name, part in zip(names, (rows, found, curves, calibrated)):
        lab.save_csv(folder / f"{name}.csv", part)
    draw(curves, calibrated, folder / "rlhf.png")
    tables = (lab.table(part, list(part[0])[1], list(part[0])[2:]) for part in (rows, found))
    (folder / "rlhf.md").write_text(text := "\n".join(tables), encoding="utf-8")
    print(f"{text}\nmean ± standard deviation, {len(seeds)} seeds; see {folder}/rlhf.png")


if __name__ == "__main__":
    main()
