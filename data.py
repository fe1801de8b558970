"""From text to the rows that the model eats, and the toy world in which everything is known.

text pair -> token ids -> one row a pair -> Batch -> dpo.response_logps -> log-probs.
B pairs, T positions, N scored tokens; in the toy world P prompts, W words, Y answers to each.
"""

import itertools
import json
import re
import warnings
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

END = "<|endoftext|>"  # every tokenizer here has it: the token that says an answer is over
ASSISTANT = "\n\nAssistant:"  # begins an answer in Anthropic's dialogues


class InputError(ValueError):
    """A mistake in what the user gave us: one line that says where and what to do."""


class Pair(NamedTuple):
    """A prompt and two answers, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(path):
    """A file of JSON lines {"prompt": ..., "chosen": ..., "rejected": ...} or, without a prompt, of
    dialogues (see `split_dialogues`) -> list of Pair.

    What is not two different answers to one prompt is dropped, with a warning that counts it.
    InputError names the file, the line and the field; OSError if the file cannot be read.
    """
    pairs, dropped = [], []
    with open(path, "rb") as file:  # bytes: text that is not UTF-8 is then an error of its line
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not a line of JSON ({error})") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: not a JSON object ({', '.join(Pair._fields)})")
            whole = "prompt" not in record and ASSISTANT in "".join(map(str, record.values()))
            texts = {field: record.get(field) for field in Pair._fields[whole:]}
            for field, text in texts.items():
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f'{path}:{number}: "{field}" must be a string, and not empty')
            pair = split_dialogues(**texts) if whole else Pair(**texts)
            if pair and pair.chosen != pair.rejected:
                pairs.append(pair)
            else:
                dropped.append(number)
    if dropped:
        odd = f"not two different answers to one prompt: {len(dropped)}, first in line {dropped[0]}"
        warnings.warn(f"{path}: pairs dropped, {odd}", stacklevel=2)
    if not pairs:
        raise InputError(f"{path}: holds no usable pair")
    return pairs


def split_dialogues(chosen, rejected):
    """Anthropic's form (HH): two whole dialogues -> Pair. All that both share, up to its last
    "Assistant:", is the prompt. None if more than the last answer differs, or one is empty.
    """
    before, turn, _ = commonprefix([chosen, rejected]).rpartition(ASSISTANT)
    answers = [text.removeprefix(before + turn) for text in (chosen, rejected)]
    one_turn = all(x.strip() and not re.search(r"\n\n(Human|Assistant):", x) for x in answers)
    return Pair(before + turn, *answers) if one_turn else None


# Text -> token ids


def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" (any text, no download), or one of tiktoken's own such as
    "gpt2", downloaded once. InputError if it can't be had.
    """
    if name == "bytes":  # one character at a time and nothing to merge: every token is a byte
        ranks = {bytes([byte]): byte for byte in range(256)}
        end = {END: 256}
        return tiktoken.Encoding(name, pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens=end)
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        raise InputError(f'unknown tokenizer "{name}"; there are {", ".join(known)}')
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever its download library raises
        raise InputError(
            f'tokenizer "{name}": no download ({type(error).__name__}); run once with a network '
            "and TIKTOKEN_CACHE_DIR set and bring that folder here, or use --tokenizer bytes"
        ) from None


class WordEncoding(tiktoken.Encoding):
    """A closed vocabulary, a token for each word with the space before it."""

    def __init__(self, words):
        self.ranks = {f" {word}".encode(): rank for rank, word in enumerate(words)}
        end = {END: len(words)}
        super().__init__("toy", pat_str=r" ?\S+|\s", mergeable_ranks=self.ranks, special_tokens=end)

    def encode_ordinary(self, text):
        for word in re.findall(r" ?\S+|\s", text):  # tiktoken itself would panic on an unknown one
            if word.encode() not in self.ranks:
                raise InputError(f'"{word}" is not a word of the toy world, with its space')
        return super().encode_ordinary(text)


class TokenPair(NamedTuple):
    """Token ids of a Pair. An empty `rejected` makes it a plain sequence, as SFT wants it."""

    prompt: list
    chosen: list
    rejected: list


def encode_pairs(pairs, tokenizer, block_size):
    """Pairs -> list of TokenPair, each prompt and answer encoded by itself, answers closed by the
    end token, so that no token straddles the boundary and the policy is taught to stop.

    A prompt is cut on its left until the longer answer fits into the block beside it; a pair with
    no prompt, or an answer that leaves no room for one, is dropped. Both are warned of and counted.
    InputError if no pair is left.
    """
    rows, cut, dropped = [], 0, 0
    for pair in pairs:
        prompt, *answers = [tokenizer.encode_ordinary(text) for text in pair]
        chosen, rejected = [ids + [tokenizer.eot_token] for ids in answers]
        room = block_size - max(len(chosen), len(rejected))
        if room < 1 or not prompt:  # the prompt's last token predicts the answer's first
            dropped += 1
            continue
        cut += len(prompt) > room
        rows.append(TokenPair(prompt[-room:], chosen, rejected))
    block = f"the block of {block_size} tokens"
    if cut:
        warnings.warn(f"prompts cut on the left to fit into {block}: {cut}", stacklevel=2)
    if dropped:
        warnings.warn(f"pairs dropped, an answer fills {block}: {dropped}", stacklevel=2)
    if not rows:
        raise InputError(f"no pair fits into {block}: raise --block-size")
    return rows


# Token ids -> one row a pair


class Batch(NamedTuple):
    """B pairs as B rows, and for each of N answer tokens where it is predicted and whose it is."""

    ids: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T, T), True where position i may look at position j
    score_at: torch.Tensor  # (M,), M <= N places in the flattened (B * T), which get logits
    logits_row: torch.Tensor  # (N,), in which of the M rows of logits a target is predicted
    targets: torch.Tensor  # (N,), the token predicted there
    owner: torch.Tensor  # (N,), i for chosen answer i, B + i for rejected answer i
    pair_ids: torch.Tensor  # (B,), which pair each row is, for its reference log-probs

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in self))


def collate(rows, pair_ids):
    """The TokenPairs rows[i] for i in pair_ids -> Batch, each row [prompt | chosen | rejected].

    Both answers hang off one prompt: each sees it and itself, never the other. What both answers
    begin with is computed once, like the prompt, and scored for both. The mask, in blocks:

                   prompt  chosen  rejected
        prompt       \\                            \\ = causal: itself and what came before
        chosen       all     \\
        rejected     all     -        \\           - = nothing

    Three traps. (1) The last prompt token predicts the first token of both answers: one row of
    logits, two targets. (2) An answer's last token is scored but never fed: nothing follows it.
    (3) Padding may look at itself: a position that may look at nothing is 0/0, a NaN.
    """
    pair_ids = torch.as_tensor(pair_ids)
    picked = [rows[i] for i in pair_ids.tolist()]
    B = len(picked)
    begin = [commonprefix([row.chosen[:-1], row.rejected[:-1]]) for row in picked]
    fed = [x + w[:-1] + l[len(both) : -1] for (x, w, l), both in zip(picked, begin)]
    lengths = np.array([[*map(len, [*row, *more])] for row, *more in zip(picked, begin, fed)])
    prompt, chosen, rejected, shared, row_end = torch.from_numpy(lengths).T[:, :, None]  # (B, 1)
    trunk, skip = prompt + shared, chosen - 1 - shared  # what both hang off; the rest of chosen

    place = torch.arange(int(row_end.max()))  # (T,)
    block = 0 + (place >= trunk) + (place >= trunk + skip) + (place >= row_end)  # 3: padding
    ids = torch.zeros_like(block)
    ids[block < 3] = torch.from_numpy(np.array([*itertools.chain(*fed)]))
    positions = torch.where(block == 3, 0, place - skip * (block == 2))  # rejected restarts
    same = block[:, :, None] == block[:, None, :]
    mask = (same | (block == 0)[:, None, :]) & (place[:, None] >= place)

    counts = torch.cat([chosen, rejected]).flatten()  # (2B,), scored tokens of each answer
    owner = torch.arange(2 * B).repeat_interleave(counts)
    pair = owner % B
    k = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]  # k-th token of its answer
    places = pair * len(place) + prompt[pair, 0] - 1 + k  # as if chosen followed the prompt
    places += torch.where((owner >= B) & (k > shared[pair, 0]), skip[pair, 0], 0)
    score_at, logits_row = places.unique(return_inverse=True)
    targets = np.array([t for part in (1, 2) for row in picked for t in row[part]])
    targets = torch.from_numpy(targets)
    return Batch(ids, positions, mask, score_at, logits_row, targets, owner, pair_ids)


def batches(rows, batch_size, generator):
    """Batches of indices, epoch after epoch, each in an order drawn anew; one of them may be short.
    Rows of similar length share a batch, so that little is padded."""
    lengths = torch.tensor([sum(map(len, row)) for row in rows])
    while True:
        epoch = []
        for pool in torch.randperm(len(rows), generator=generator).split(16 * batch_size):
            epoch += pool[lengths[pool].argsort(stable=True)].split(batch_size)
        for i in torch.randperm(len(epoch), generator=generator):
            yield epoch[i]


# The toy world

NOUNS = ["film", "hotel", "curry"]
OPINIONS = {  # what an adjective says of a film, a hotel, a curry
    "good": (2.0, 2.0, 2.0),
    "dull": (-2.0, -1.0, -1.5),
    "quiet": (-0.5, 1.5, 0.0),
    "funny": (1.5, -0.5, -2.0),
    "hot": (0.0, -1.5, 1.5),
    "cheap": (-1.5, 1.0, 0.5),
}
DEGREES = {"not": -1.0, "very": 1.5, "quite": 0.5}


class Drawn(NamedTuple):
    """n preferences in the toy world: places in its prompts and answers, each (n,)."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    p: torch.Tensor  # the share of endless annotators who prefer `chosen`; 1 unless soft


class ToyWorld:
    """A language of reviews so small that every answer is listed: " The film was" " not very dull".

    Any up to K = 3 of the W words make an answer, nonsense included, so a prompt has
    Y = 1 + W + W^2 + W^3 of them: 2,955 for W = 14, or 1,111 for size="small", W = 10. Fewer than
    K words are followed by the end token; after the K-th word the answer is over without one.

    prompts: P texts; answers: Y texts; prompt_ids, answer_ids: their tokens; grammatical (Y,): what
    the corpus says but for its slips; rewards: the true r*, (P, Y) float64. The world is fixed;
    what is drawn in it comes from a torch.Generator.
    """

    K = 3

    def __init__(self, size="default"):
        nouns, opinions, degrees = {"default": (3, 6, 3), "small": (2, 4, 2)}[size]
        self.opinions, self.degrees = list(OPINIONS)[:opinions], list(DEGREES)[:degrees]
        words = ["The", "was", *NOUNS[:nouns], *self.opinions, *self.degrees]
        self.tokenizer = WordEncoding(words)
        self.W = self.tokenizer.eot_token  # token ids 0 .. W-1 are words, W is the end
        self.prompts = [f" The {noun} was" for noun in NOUNS[:nouns]]
        self.prompt_ids = torch.tensor([self.tokenizer.encode_ordinary(x) for x in self.prompts])
        listed = [y for n in range(self.K + 1) for y in itertools.product(range(self.W), repeat=n)]
        self.answers = [self.tokenizer.decode(y) for y in listed]
        self.answer_ids = [[*y, self.W][: self.K] for y in listed]
        grammar = f"( not)?( {'| '.join(self.degrees[1:])})?( {'| '.join(self.opinions)})"
        self.grammatical = torch.tensor([bool(re.fullmatch(grammar, y)) for y in self.answers])
        rewards = [[self.reward(x, y) for y in self.answers] for x in self.prompts]
        self.rewards = torch.tensor(rewards, dtype=torch.float64)

    def reward(self, prompt, answer):
        """r*(x, y): the mean of its opinions, so that length does not decide; 0 without any. Each
        is turned by the degrees before it and depends on the noun: no sum over words gives that.
        """
        noun = NOUNS.index(prompt.split()[1])
        opinions, degree = [], 1.0
        for word in answer.split():
            if word in OPINIONS:
                opinions.append(degree * OPINIONS[word][noun])
            degree = degree * DEGREES[word] if word in DEGREES else 1.0
        return sum(opinions) / max(len(opinions), 1)

    def corpus(self, generator, n=20_000, slip=0.2):
        """n sentences to teach the reference, TokenPairs with no second answer. Grammatical,
        [not] [very | quite] opinion, but for the share `slip` of tokens drawn from all W + 1: with
        no slips the reference would cover too little of its space for Eq. 7 to find the optimum.
        """
        sentences = itertools.compress(self.answer_ids, self.grammatical)
        sentences = torch.tensor([(ids + [self.W] * self.K)[: self.K] for ids in sentences])
        tokens = sentences[torch.randint(len(sentences), (n,), generator=generator)]
        slips = torch.rand(n, self.K, generator=generator) < slip
        slip_to = torch.randint(self.W + 1, (n, self.K), generator=generator)
        tokens = torch.where(slips, slip_to, tokens).tolist()
        answers = [y[: (y + [self.W]).index(self.W) + 1] for y in tokens]  # what an end closes
        prompts = itertools.cycle(self.prompt_ids.tolist())
        return [TokenPair(x, y, []) for x, y in zip(prompts, answers)]

    def draw_pairs(self, logps, n, labels, generator):
        """n preferences between two answers drawn from the policy with these logps (P, Y).

        labels: "hard" draws the winner by Bradley-Terry (Eq. 1) on r*; "soft" keeps that
        probability p; "deterministic" lets the higher reward win. Equal answers are kept.
        """
        prompt = torch.randint(len(self.prompts), (n,), generator=generator)
        both = logps.exp().multinomial(2 * n, replacement=True, generator=generator)  # (P, 2n)
        first, second = both.view(-1, 2, n)[prompt, :, torch.arange(n)].T
        margins = self.rewards[prompt, first] - self.rewards[prompt, second]
        p = torch.sigmoid(margins)  # (1)
        coin = torch.rand(n, generator=generator)
        flip = {"hard": coin > p, "soft": coin > 1, "deterministic": margins < 0}[labels]
        chosen, rejected = torch.where(flip, second, first), torch.where(flip, first, second)
        return Drawn(prompt, chosen, rejected, p if labels == "soft" else torch.ones_like(p))

    def rows(self, drawn):
        """What was drawn, as a list of TokenPair."""
        prompts, answers = self.prompt_ids.tolist(), self.answer_ids
        places = zip(*(column.tolist() for column in drawn[:3]))
        return [TokenPair(prompts[x], answers[y], answers[z]) for x, y, z in places]

    @torch.no_grad()
    def logps(self, model):
        """log pi(y|x) of every answer to every prompt under the model: (P, Y) float64, exactly.

        Only the W^(K-1) longest prefixes are fed: causality gives the shorter ones on the way.
        """
        K, W, P = self.K, self.W, len(self.prompts)
        prefixes = torch.tensor(list(itertools.product(range(W), repeat=K - 1)))
        prompts = self.prompt_ids.repeat_interleave(len(prefixes), 0)
        ids = torch.cat([prompts, prefixes.repeat(P, 1)], 1).to(model.device)  # (P * W^(K-1), T)
        logits = model(ids)[:, -K:].cpu()  # from the last prompt token on
        logps = logits.double().log_softmax(-1).unflatten(0, (P, -1))  # (P, W^(K-1), K, W + 1)
        so_far, listed = torch.zeros(P, 1, dtype=torch.float64), []
        for k in range(K):  # so_far (P, W^k): log-probs of the k-word beginnings
            longer = so_far[..., None] + logps[:, :: W ** (K - 1 - k), k]  # (P, W^k, W + 1)
            listed.append(longer[..., W])  # the end: an answer of k words
            so_far = longer[..., :W].flatten(1)
        return torch.cat([*listed, so_far], 1)  # K words: over without an end
