"""From text to batches, and the toy world, in which every response is listed.

text pair -> token ids -> two padded rows and a mask -> dpo.response_logps -> log-probs -> loss.
B pairs, R rows, T positions; in the toy world P prompts, W words, Y responses to each prompt.

    python data.py pairs.jsonl [tokenizer]    shows the tokens of the first pair, [scored] or not
"""

import itertools
import json
import math
import re
import sys
import warnings
from os.path import commonprefix
from typing import NamedTuple

import tiktoken
import torch

import dpo

END = "<|endoftext|>"  # the end token, which every tokenizer here has
ROLES = {"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"}


class InputError(ValueError):
    """A mistake in the user's input: one line that says where it is and what to do."""


class Pair(NamedTuple):
    """A prompt and two responses, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(path):
    """A file of JSON lines -> list of Pair. A line holds `prompt`, `chosen` and `rejected`, or two
    whole dialogues and no prompt. Each is a text or a list of messages with `role` and `content`.

    Lines without two different responses to one prompt are dropped. Warnings count these and what
    looks odd. InputError if a line is not JSON or no pair is left, OSError if there is no file.
    """
    pairs, dropped, record = [], [], {}
    with open(path, "rb") as file:  # as bytes: text that is not UTF-8 is then an error of its line
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                pair = to_pair(record)
            except (ValueError, RecursionError) as error:
                why = f"not a line of JSON ({error}); save it as UTF-8, one object a line"
                raise InputError(f"{path}:{number}: {why}") from None
            except (AttributeError, KeyError, TypeError):  # some other form
                pair = None
            (pairs if pair else dropped).append(pair or number)
    needs = 'two different responses to one prompt, as texts, or after the same last "Assistant:"'
    if not pairs:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{path}: no line has {needs}; found: {found or 'nothing'}")
    texts = [(prompt, response) for prompt, *both in pairs for response in both]
    odd = {
        f"lines dropped, the first is {min(dropped, default=0)}, without {needs}": len(dropped),
        "pairs that repeat an earlier pair": len(pairs) - len(set(pairs)),
        "responses that repeat their prompt": sum(y.startswith(x) for x, y in texts),
        "end tokens spelled as text": sum(y.rstrip().endswith(("|>", "</s>")) for _, y in texts),
    }
    for what in filter(odd.get, odd):
        warnings.warn(f"{path}: {what}: {odd[what]}", stacklevel=2)
    return pairs


def to_pair(record):
    """A line in any form -> Pair; None, or a KeyError or the like, if it holds none. Messages are
    written as dialogues in Anthropic's form (HH), whose prompt ends in the last "Assistant:" that
    both share. If more than a response follows, there is no pair."""
    prompt, *both = [record.get(field) or "" for field in Pair._fields]
    if list in map(type, (prompt, *both)):
        prompt, *both = map(as_dialogue, (prompt, *both), ("user", "assistant", "assistant"))
        prompt, both = "", both if all(prompt in y for y in both) else [prompt + y for y in both]
    if not prompt:
        both = [text.replace("\r\n", "\n") for text in both]
        prompt = "".join(commonprefix(both).rpartition(ROLES["assistant"])[:2])
        both = [text.removeprefix(prompt) for text in both]
        if any(re.search("\n\n(Human|Assistant):", text) for text in both):
            return None
    pair = Pair(prompt, *both)
    return pair if all(map(str.strip, pair)) and pair.chosen != pair.rejected else None


def as_dialogue(turns, role):
    """Messages, or a text that `role` wrote, as a dialogue in Anthropic's form."""
    if isinstance(turns, str):
        turns = [{"role": role, "content": turns}] * bool(turns)
    return "".join(f"{ROLES[turn['role']]} " + turn["content"] for turn in turns)


# Text -> token ids


def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" (any text, no download) or one of tiktoken's own, which are
    downloaded once. InputError if there is no such tokenizer or no download.
    """
    if name == "bytes":  # nothing to merge: every token is a byte
        ranks = {bytes([byte]): byte for byte in range(256)}
        end = {END: 256}
        return tiktoken.Encoding(name, pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens=end)
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever its download library raises
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        why = f"not one of {known}, or its download failed ({type(error).__name__})"
        help = "without a network use bytes, or copy the folder TIKTOKEN_CACHE_DIR from elsewhere"
        raise InputError(f"tokenizer {name}: {why}; {help}") from None


class TokenPair(NamedTuple):
    """Token ids of a Pair. SFT's have an empty `rejected`."""

    prompt: list
    chosen: list
    rejected: list


def encode_pairs(pairs, tokenizer, block_size):
    """Pairs -> list of TokenPair. Prompt and responses are encoded separately, so that no token
    straddles their boundary. Responses end in the end token, so that the policy learns to stop.

    A prompt is cut on the left until it fits into the block beside the longer response. A pair is
    dropped if its prompt is empty or a response fills the block. Warnings count both. InputError if
    no pair is left.
    """
    rows, cut, dropped = [], 0, 0
    for pair in pairs:
        prompt, *responses = [tokenizer.encode_ordinary(text) for text in pair]
        chosen, rejected = [ids + [tokenizer.eot_token] for ids in responses]
        room = block_size - max(len(chosen), len(rejected))
        if room < 1 or not prompt:  # the prompt's last token predicts the first of the response
            dropped += 1
            continue
        cut += len(prompt) > room
        rows.append(TokenPair(prompt[-room:], chosen, rejected))
    if cut:
        warnings.warn(f"prompts cut on the left to fit {block_size} tokens: {cut}", stacklevel=2)
    if dropped:
        warnings.warn(f"pairs dropped, too long for {block_size} tokens: {dropped}", stacklevel=2)
    if not rows:
        raise InputError(f"no pair fits into {block_size} tokens: raise --block-size")
    return rows


def show(path, name="bytes"):
    """Print the first pair of a file as two rows of tokens, those that are scored in brackets."""
    tokenizer = get_tokenizer(name)
    ids, mask = collate(encode_pairs(load_pairs(path), tokenizer, block_size=1024), [0])
    for side, row, scored in zip(("chosen", "rejected"), ids.tolist(), mask.tolist()):
        tokens = [repr(tokenizer.decode([token])) for token in row]
        end = len(row) - scored[::-1].index(True)
        shown = [f"[{token}]" if s else token for token, s in zip(tokens[:end], scored)]
        print(f"{side}:", *shown, f"and {len(row) - end} of padding\n")


# Token ids -> batches


def split(pairs, fraction, generator):
    """Pairs -> (to train on, held out). A prompt is on one side only, with all its pairs.

    `fraction` of the prompts is held out, rounded up, but at least one prompt is left to train on.
    A warning says if that leaves no pair to hold out, or less than half of the pairs to train on.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    n = min(math.ceil(fraction * len(prompts)), len(prompts) - 1)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held_out = {prompts[i] for i in order[:n]}
    sides = [], []
    for pair in pairs:
        sides[pair.prompt in held_out].append(pair)
    if fraction > 0 and not 0 < len(sides[1]) <= len(sides[0]):
        warnings.warn(f"{len(prompts)} prompts: {len(sides[1])} of {len(pairs)} pairs are held out")
    return sides


def batches(rows, batch_size, generator):
    """Endless batches of indices, (batch_size,). Every epoch is shuffled anew, and what is left
    over at its end starts the next. Within a batch, rows of similar length are neighbours.
    """
    lengths = torch.tensor([sum(map(len, row)) for row in rows])
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(len(rows), generator=generator)])
        batch, left = left[:batch_size], left[batch_size:]
        yield batch[lengths[batch].argsort(stable=True)]  # so micro-batches hold little padding


def collate(rows, pair_ids):
    """The TokenPairs rows[i] for i in pair_ids -> (ids, mask), (R, T) each, padded on the right.

    All chosen rows come first, then all rejected rows: R = 2B, or B without rejected responses.
    `mask` is True at the tokens of the response. Attention needs no mask: it is causal, so it never
    looks at padding on the right.
    """
    pairs = [rows[i] for i in pair_ids]
    texts = [(pair.prompt, pair.chosen) for pair in pairs]
    texts += [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]
    start = torch.tensor([len(x) for x, _ in texts])[:, None]
    end = torch.tensor([len(x) + len(y) for x, y in texts])[:, None]
    place = torch.arange(int(end.max()))  # (T,)
    ids = torch.zeros(len(texts), len(place), dtype=torch.long)
    ids[place < end] = torch.tensor([token for x, y in texts for token in x + y])  # row by row
    return ids, (start <= place) & (place < end)


# The toy world

NOUNS = ["film", "hotel"]
# What an opinion is worth of a film, of a hotel
OPINIONS = {"good": (2.0, 2.0), "dull": (-2.0, -1.0), "quiet": (-0.5, 1.5), "funny": (1.5, -0.5)}
DEGREES = {"not": -1.0, "very": 1.5}


class Drawn(NamedTuple):
    """n preferences in the toy world: indices into its prompts and responses, each (n,)."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    p: torch.Tensor  # P(chosen beats rejected) by Eq. 1 for soft labels, else 1


class ToyWorld:
    """Reviews in a language so small that every response is listed: " The film was" " not dull".

    Up to K = 3 of the W = 10 words make a response, nonsense included, so each of the P = 2 prompts
    has Y = 1 + 10 + 100 + 1000 = 1,111. A response of fewer than K words ends in the end token; one
    of K words does not.

    prompts: P texts; responses: Y texts; prompt_ids, response_ids: their tokens; grammatical (Y,):
    True for sentences of the corpus without slips; rewards: the true r*, (P, Y) float64.
    """

    K = 3

    def __init__(self):
        words = ["The", "was", *NOUNS, *OPINIONS, *DEGREES]
        self.W = len(words)  # token ids 0 .. W-1 are words, W is the end token
        ranks, end = {f" {word}".encode(): rank for rank, word in enumerate(words)}, {END: self.W}
        self.tokenizer = tiktoken.Encoding(  # a token is a word with the space before it
            "toy", pat_str=r" \S+", mergeable_ranks=ranks, special_tokens=end
        )
        self.prompts = [f" The {noun} was" for noun in NOUNS]
        self.prompt_ids = torch.tensor([self.tokenizer.encode_ordinary(x) for x in self.prompts])
        listed = [y for n in range(self.K + 1) for y in itertools.product(range(self.W), repeat=n)]
        self.responses = [self.tokenizer.decode(y) for y in listed]
        self.response_ids = [[*y, self.W][: self.K] for y in listed]
        grammar = f"( not)?( very)?( {'| '.join(OPINIONS)})"
        self.grammatical = torch.tensor([bool(re.fullmatch(grammar, y)) for y in self.responses])
        rewards = [[self.reward(x, y) for y in self.responses] for x in self.prompts]
        self.rewards = torch.tensor(rewards, dtype=torch.float64)

    def reward(self, prompt, response):
        """r*(x, y): the mean of the opinions in y, so that length does not decide; 0 without any.
        Degrees multiply the next opinion, and opinions depend on the noun: r* is no sum over words.
        """
        noun = NOUNS.index(prompt.split()[1])
        opinions, degree = [], 1.0
        for word in response.split():
            if word in OPINIONS:
                opinions.append(degree * OPINIONS[word][noun])
            degree = degree * DEGREES[word] if word in DEGREES else 1.0
        return sum(opinions) / max(len(opinions), 1)

    def corpus(self, generator, n=20_000, slip=0.2):
        """n sentences for SFT, as TokenPairs without a rejected response: [not] [very] opinion.
        A fraction `slip` of the tokens is replaced by any of the W + 1. Without slips the reference
        would cover too little of its space for Eq. 7 to find the optimum.
        """
        sentences = itertools.compress(self.response_ids, self.grammatical)
        sentences = torch.tensor([(ids + [self.W] * self.K)[: self.K] for ids in sentences])
        tokens = sentences[torch.randint(len(sentences), (n,), generator=generator)]
        slips = torch.rand(n, self.K, generator=generator) < slip
        slip_to = torch.randint(self.W + 1, (n, self.K), generator=generator)
        tokens = torch.where(slips, slip_to, tokens).tolist()
        responses = [y[: (y + [self.W]).index(self.W) + 1] for y in tokens]  # cut after the end
        prompts = itertools.cycle(self.prompt_ids.tolist())
        return [TokenPair(x, y, []) for x, y in zip(prompts, responses)]

    def draw_pairs(self, logps, n, labels, generator):
        """n preferences between two responses drawn from the policy with these logps (P, Y).

        labels: "hard" draws the winner by Bradley-Terry (Eq. 1) on r*; "soft" keeps that
        probability as p; "deterministic" lets the higher reward win. Equal responses are kept.
        """
        prompt = torch.randint(len(self.prompts), (n,), generator=generator)
        both = logps.exp().multinomial(2 * n, replacement=True, generator=generator)  # (P, 2n)
        first, second = both.view(-1, 2, n)[prompt, :, torch.arange(n)].T
        rewards = self.rewards[prompt, first], self.rewards[prompt, second]
        p = dpo.bradley_terry(*rewards)  # (1)
        coin = torch.rand(n, generator=generator)
        first_wins = {"hard": coin <= p, "soft": coin <= 1, "deterministic": p >= 0.5}[labels]
        chosen = torch.where(first_wins, first, second)
        rejected = torch.where(first_wins, second, first)
        return Drawn(prompt, chosen, rejected, p if labels == "soft" else torch.ones_like(p))

    def rows(self, drawn):
        """Drawn preferences as a list of TokenPair."""
        x, y = self.prompt_ids.tolist(), self.response_ids
        drawn = zip(*(column.tolist() for column in drawn[:3]))
        return [TokenPair(x[prompt], y[chosen], y[rejected]) for prompt, chosen, rejected in drawn]

    @torch.no_grad()
    def logps(self, model):
        """log pi(y|x) of every response to every prompt under the model: (P, Y) float64."""
        listed = itertools.product(self.prompt_ids.tolist(), self.response_ids)
        rows = [TokenPair(prompt, response, []) for prompt, response in listed]
        ids, mask = collate(rows, range(len(rows)))
        logps = dpo.response_logps(model, ids.to(model.device), mask)
        return logps.cpu().double().view(self.rewards.shape).log_softmax(-1)  # a sum of 1, exactly

    def measure(self, logps, ref_logps, beta, prompts=slice(None)):
        """The exact numbers of a policy, means over `prompts`: two (P, Y) -> a dict of floats.

        expected_reward: E[r*]. kl: KL(pi || pi_ref) in nats. objective: J of Eq. 3. kl_to_optimum:
        KL(pi || pi*), with pi* of Eq. 4. gap_closed: 1 - kl_to_optimum / KL(pi_ref || pi*), which
        is also the fraction of J(pi*) - J(pi_ref) that the policy has gained.
        """
        logps, ref_logps, rewards = logps[prompts], ref_logps[prompts], self.rewards[prompts]
        best, _ = dpo.optimal_policy(ref_logps, rewards, beta)
        row = {
            "expected_reward": (logps.exp() * rewards).sum(-1),
            "kl": dpo.kl_divergence(logps, ref_logps),
            "objective": dpo.rlhf_objective(logps, ref_logps, rewards, beta),
            "kl_to_optimum": dpo.kl_divergence(logps, best),
        }
        row = {name: column.mean().item() for name, column in row.items()}
        gap = dpo.kl_divergence(ref_logps, best).mean().item()
        return row | {"gap_closed": 1 - row["kl_to_optimum"] / max(gap, 1e-12)}


if __name__ == "__main__":
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="replace")  # Jupyter has none
    try:
        show(*sys.argv[1:])
    except (InputError, OSError, TypeError) as error:
        sys.exit(f"data.py: {error}")
