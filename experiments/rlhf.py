"""The two stages that DPO removes: a reward model (Eq. 2), then PPO on Eq. 3, in the toy world.

Section 3 of the paper. PPO is Schulman et al. 2017 (arXiv 1707.06347) with GAE (arXiv 1506.02438),
set up for language as in Ziegler et al. 2019 (arXiv 1909.08593): a critic, the KL term spread over
the tokens, and a beta that is adapted where a target KL is wanted. Left out: a clipped value loss,
an entropy bonus, early stopping on KL.

P = 2 prompts, Y = 1,111 responses; B responses in a batch, K = 3 tokens, T with their prompt.
"""

import copy

import torch
from torch import nn

import dpo
from experiments import lab
from experiments.lab import BETA, LENGTHS, WORLD

EPOCHS = 8  # of the reward model, as many as DPO's


class Scalar(nn.Module):
    """A GPT whose head is one number: token ids (B, T) -> (B, T). The reward model and the critic.

    It starts with the weights of the SFT model and a head of zeros.
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt = copy.deepcopy(gpt)
        self.head = nn.Linear(gpt.config.n_embd, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids):
        hidden = self.gpt.ln_f(self.gpt.hidden(ids))
        return self.head(hidden).squeeze(-1)


def padded_responses():
    """The tokens of every response, (Y, K). END fills the rest: LENGTHS says which ones count."""
    rows = []
    for ids in WORLD.response_ids:
        filled = ids + [WORLD.W] * WORLD.K
        rows.append(filled[: WORLD.K])
    return torch.tensor(rows)


START = WORLD.prompt_ids.shape[1]  # position of the first response token
RESPONSES = padded_responses()


# Stage 1: the reward model, Eq. 2


def score(model, x, y):
    """r_phi(x, y), read at the last token of the response, END included: two (B,) -> (B,)

    Some responses are in many pairs. Each is scored once.
    """
    both, index = torch.stack([x, y]).unique(dim=1, return_inverse=True)
    x, y = both
    ids = torch.cat([WORLD.prompt_ids[x], RESPONSES[y]], dim=1)  # (B, T)
    last = START + LENGTHS[y] - 1
    scores = model(ids)[torch.arange(len(ids)), last]
    return scores[index]


def train_reward_model(sft, drawn, epochs=EPOCHS, seed=0, lr=5e-3, batch=512):
    """Eq. 2 on the pairs, from the SFT model's weights -> r_phi of every response, (P, Y) float64.

    Eq. 2 says nothing of each prompt's mean reward. As in section 3, it is set so that
    E_ref[r_phi] = 0.
    """
    model = Scalar(sft)
    optimizer = lab.adamw(model, lr)
    generator = torch.Generator().manual_seed(seed)
    n = len(drawn.prompt)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    batches = order.split(batch)
    steps = len(batches)
    for step, i in enumerate(batches, start=1):
        lab.set_learning_rate(optimizer, lr, step, steps, warmup=steps // 20 + 1)
        x = drawn.prompt[i]
        chosen_rewards = score(model, x, drawn.chosen[i])
        rejected_rewards = score(model, x, drawn.rejected[i])
        loss = dpo.reward_model_loss(chosen_rewards, rejected_rewards).mean()  # (2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return all_scores(model, sft)


@torch.no_grad()
def all_scores(model, sft):
    """r_phi of every response (P, Y) float64, with E_ref[r_phi] = 0 for each prompt."""
    y = torch.arange(len(RESPONSES))
    rows = [score(model, torch.full_like(y, x), y) for x in range(len(WORLD.prompts))]
    rewards = torch.stack(rows).double()
    probs = lab.listed(sft).exp()
    return rewards - (probs * rewards).sum(-1, keepdim=True)


# Stage 2: PPO on Eq. 3

# Chosen by hand for the best J (seed 0, true rewards, beta 1): learning rate 3e-3, 1e-2; the
# critic's 3e-3, 1e-2, 3e-2; batch 512, 1,024; 1 to 4 steps a batch; clip 0.1, 0.2, 0.4; lambda 0.8,
# 0.95, 1. The reward model's (seeds 0 to 4): learning rate 2e-3, 5e-3, 1e-2; 2, 4, 8 epochs.
BATCH = 512  # responses, drawn anew for every batch
SAMPLES = 384 * BATCH  # responses in all: about as many as 100,000 pairs hold
STEPS_PER_BATCH = 2
CRITIC_LR = 1e-2
CLIP = 0.2
LAMBDA = 0.95


def ppo(sft, rewards, seed, beta=BETA, target_kl=None, samples=SAMPLES, lr=1e-2):
    """PPO on Eq. 3 with these rewards (P, Y), from the SFT model, which is also the reference.

    With a target, beta is adapted to hold KL(pi || pi_ref) there: Ziegler et al., section 2.2.
    Yields (responses drawn, log pi (P, Y)) before each batch and after the last.
    """
    policy = copy.deepcopy(sft)
    critic = Scalar(sft)
    optimizer = lab.adamw(policy, lr)
    critic_optimizer = lab.adamw(critic, CRITIC_LR)
    generator = torch.Generator().manual_seed(seed)
    batches = samples // BATCH
    for n in range(batches):
        yield n * BATCH, lab.listed(policy).detach()
        optimizer.param_groups[0]["lr"] = lr * (1 - n / batches)

        # The policy writes responses. Rewards and critic say which tokens were better than expected
        with torch.no_grad():
            x, y, ids = draw_responses(policy, generator)
            mask = torch.arange(WORLD.K) < LENGTHS[y, None]  # (B, K)
            old_logps = token_logps(policy, ids)
            ref_logps = token_logps(sft, ids)
            per_token = token_rewards(rewards[x, y].float(), old_logps, ref_logps, mask, beta)
            advantages, returns = gae(per_token, token_values(critic, ids), mask, LAMBDA)
            counted = advantages[mask]
            advantages = (advantages - counted.mean()) / (counted.std() + 1e-8)
        if target_kl is not None:
            kl = ((old_logps - ref_logps) * mask).sum(1).mean().item()
            beta = next_beta(beta, kl, target_kl)

        # Policy and critic learn from them
        for _ in range(STEPS_PER_BATCH):
            loss = ppo_loss(policy, critic, ids, old_logps, advantages, returns, mask, CLIP)
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            critic_optimizer.step()
    yield batches * BATCH, lab.listed(policy).detach()


def draw_responses(policy, generator):
    """A batch written by the policy: prompts and responses by number, (B,) each, ids (B, T)."""
    x = torch.randint(len(WORLD.prompts), (BATCH,), generator=generator)
    prompts = WORLD.prompt_ids[x]
    ids = policy.generate(prompts, WORLD.K, stop_token=WORLD.W, generator=generator)
    missing = START + WORLD.K - ids.shape[1]  # if all of them ended early
    ids = nn.functional.pad(ids, (0, missing), value=WORLD.W)
    return x, number_of(ids[:, START:]), ids


def number_of(tokens):
    """Response tokens (B, K) -> their indices into WORLD.responses, (B,).

    Shorter responses come first there, and those of one length are in the order of their tokens.
    """
    number = torch.zeros(len(tokens), dtype=torch.long)
    going_on = torch.ones(len(tokens), dtype=torch.bool)
    for token in tokens.T:
        going_on = going_on & (token != WORLD.W)
        number = torch.where(going_on, number * WORLD.W + token + 1, number)
    return number


def token_logps(model, ids):
    """log pi of each response token: (B, T) -> (B, K)"""
    logits = model(ids[:, :-1])[:, START - 1 :]  # position t predicts token t + 1
    logps = logits.log_softmax(-1)
    return logps.gather(-1, ids[:, START:, None]).squeeze(-1)


def token_values(critic, ids):
    """V before each response token is drawn, read where it is predicted: (B, T) -> (B, K)"""
    return critic(ids[:, :-1])[:, START - 1 :]


def token_rewards(rewards, logps, ref_logps, mask, beta):
    """r - beta (log pi - log pi_ref) of section 3, token by token: (B,), three (B, K) -> (B, K).

    The KL term is paid where it arises, the reward (B,) at the last token. Both add up to the
    reward of the whole response.
    """
    per_token = torch.where(mask, -beta * (logps - ref_logps), 0.0)
    last = mask.sum(1) - 1
    per_token[torch.arange(len(mask)), last] += rewards
    return per_token


def gae(rewards, values, mask, lam):
    """Advantages and returns of each token, undiscounted: three (B, K) -> two (B, K).

    delta_t = r_t + V_(t+1) - V_t, A_t = delta_t + lam A_(t+1), return = A_t + V_t. V is 0 after
    the last token of a response (mask True up to it). arXiv 1506.02438, Eq. 11 to 16, gamma = 1.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros(len(rewards))
    next_advantage = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + next_value - values[:, t]
        next_advantage = torch.where(counts, delta + lam * next_advantage, 0.0)
        next_value = torch.where(counts, values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def ppo_loss(policy, critic, ids, old_logps, advantages, returns, mask, clip):
    """The policy's clipped loss plus the critic's squared error, means over the tokens that count:
    (B, T) and four (B, K) -> a scalar."""
    losses = clipped_loss(token_logps(policy, ids), old_logps, advantages, clip)
    errors = (token_values(critic, ids) - returns) ** 2
    return losses[mask].mean() + errors[mask].mean()


def clipped_loss(logps, old_logps, advantages, clip):
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), any equal shapes. arXiv 1707.06347, Eq. 7.

    The gradient is 0 where the ratio has left the clip on the side that A asks for.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages)


def next_beta(beta, kl, target_kl):
    """Ziegler et al.'s controller: beta rises where KL is above its target, by at most 2%."""
    error = kl / target_kl - 1
    error = min(max(error, -0.2), 0.2)
    return beta * (1 + 0.1 * error)
