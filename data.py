"""From text to batches, and the toy world, in which every response is listed.

text pair -> token ids -> two padded rows and a mask -> dpo.response_logps -> log-probs -> loss.
B pairs, R rows, T positions; in the toy world P prompts, W words, Y responses to each prompt.

    python data.py pairs.jsonl    prints the tokens of the first pair, the scored ones in brackets
"""

import codecs
import io
import itertools
import json
import math
import re
import sys
import unicodedata
import warnings
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch

import dpo

END = "<|endoftext|>"  # the end token, which every tokenizer here has
ROLES = {"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
TURNS = tuple(ROLES.values())  # how a turn begins


class InputError(ValueError):
    """Raised for bad user input. The message is one line: what is wrong, where, and what to do."""


class Pair(NamedTuple):
    """A prompt and two responses, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


# Text


def load_pairs(path):
    """A file of JSON lines, or of one JSON array -> list of Pair.

    A line is a JSON object with `prompt`, `chosen` and `rejected`. Each is a string, or a list of
    messages with `role` and `content`. Whole dialogues, which begin with the user's or the system's
    turn, need no `prompt`. If there is one, its turns must occur in what the two dialogues share.

    Lines without two different responses to one prompt are dropped. One warning counts them,
    further warnings name other fields and count pairs that look odd. InputError if a line is not
    JSON or no pair is left, OSError if there is no file.
    """
    pairs = []
    dropped = []
    fields = {}  # of all lines, in order of first appearance
    for place, record in read_records(path):
        try:
            pairs.append(to_pair(record))
        except InputError as reason:  # this line is skipped, other lines may be fine
            dropped.append(f"{place}: {reason}")
        else:
            fields |= dict.fromkeys(record)
    if not pairs:
        reason = dropped[0] if dropped else "the file is empty"
        raise InputError(f"{path}: no line has two different responses to one prompt; {reason}")
    if dropped:
        warnings.warn(f"{path}: lines dropped: {len(dropped)}; the first is {dropped[0]}")
    not_read = [field for field in fields if field not in Pair._fields]
    if not_read:
        warnings.warn(f"{path}: fields that are not read: {not_read!r:.200}")
    warn_of_odd_pairs(path, pairs)
    return pairs


def read_records(path):
    """Yields ("line 7", what JSON says there), or ("item 7", ...) of an array."""
    content = Path(path).read_bytes()  # as bytes, so that bad UTF-8 is reported with its line
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        items = parse_json(content, path, 1)
        for number, item in enumerate(items, start=1):
            yield f"item {number}", item
        return
    for number, line in enumerate(io.BytesIO(content), start=1):
        if line.strip():
            yield f"line {number}", parse_json(line, path, number)


def parse_json(content, path, number):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        why = f"not a line of JSON ({error}); save it as UTF-8, one object per line"
        if str(path).endswith(".csv"):
            why = "not JSON: python -m experiments.recipes makes a file of pairs from a CSV file"
        raise InputError(f"{path}:{number}: {why}") from None


def to_pair(record):
    """One line that `load_pairs` has parsed -> Pair. InputError, with the reason, if not a pair."""
    if not isinstance(record, dict):
        raise InputError("it is not a JSON object")
    prompt = record.get("prompt") or ""  # absent, null and [] count as empty
    chosen = record.get("chosen") or ""
    rejected = record.get("rejected") or ""
    for part in (prompt, chosen, rejected):
        if not isinstance(part, (str, list)):
            raise InputError(f"{part!r:.40} is neither a text nor a list of messages")
    in_messages = isinstance(prompt, list) or isinstance(chosen, list) or isinstance(rejected, list)
    if in_messages:
        prompt = as_dialogue(prompt, "user")
        chosen = as_dialogue(chosen, "assistant")
        rejected = as_dialogue(rejected, "assistant")
    whole = [is_whole(chosen), is_whole(rejected)]
    if any(whole):
        if not all(whole):
            raise InputError("only one of its two responses is a whole dialogue")
        pair = split_dialogues(chosen, rejected)
        check_prompt(prompt, pair)
    elif prompt and not in_messages:
        pair = Pair(prompt, chosen, rejected)
    else:
        pair = split_dialogues(prompt + chosen, prompt + rejected)
    for name, text in pair._asdict().items():
        if not text.strip():
            raise InputError(f"its {name} is empty; its fields are {list(record)}")
    if pair.chosen == pair.rejected:
        raise InputError("its two responses are the same")
    return pair


def as_dialogue(messages, author):
    """Messages, or a text by `author`, as one text in the form of Anthropic's HH dialogues."""
    if isinstance(messages, str):
        text = messages.replace("\r\n", "\n")
        if text.startswith(TURNS):  # it has that form already; the last turn may have no content
            return re.sub("\n\nAssistant:\\s*$", "", text)
        if not text:
            return ""
        messages = [{"role": author, "content": text}]
    dialogue = ""
    for message in messages:
        if not isinstance(message, dict):
            raise InputError("a message is not an object with role and content")
        role = message.get("role")
        content = message.get("content")
        if role not in list(ROLES):
            raise InputError(f"a message has the role {role!r}, not {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"the content of a message is {content!r:.40}, not a text")
        dialogue += f"{ROLES[role]} {content}"
    return dialogue


def is_whole(dialogue):
    """Does it begin with a turn of the user or of the system?"""
    text = dialogue.replace("\r\n", "\n")
    return text.startswith((ROLES["user"], ROLES["system"]))


def split_dialogues(chosen, rejected):
    """Two whole dialogues -> Pair. The prompt is what they share, up to its last "Assistant:"."""
    chosen = chosen.replace("\r\n", "\n")
    rejected = rejected.replace("\r\n", "\n")
    shared = commonprefix([chosen, rejected])
    before, assistant, _ = shared.rpartition(ROLES["assistant"])
    prompt = before + assistant  # empty if there is no "Assistant:"
    chosen = chosen.removeprefix(prompt)
    rejected = rejected.removeprefix(prompt)
    for turn in TURNS:
        if turn in chosen or turn in rejected:
            raise InputError("its two dialogues differ in more than their last response")
    return Pair(prompt, chosen, rejected)


def check_prompt(prompt, pair):
    """InputError unless the turns of the prompt occur, in order, in the prompt of the pair.

    A system turn may be in one of them only. The pair is trained on as its dialogues have it.
    """
    missing = turns_of(as_dialogue(prompt, "user"))
    for turn in turns_of(pair.prompt):
        if missing and turn == missing[0]:
            missing = missing[1:]
    if missing:
        raise InputError("its prompt is not in the turns that its two dialogues share")


def turns_of(dialogue):
    """Its turns as (role, comparable content), without the system's and those without content."""
    any_role = "|".join(TURNS)
    pieces = re.split(f"({any_role})", dialogue)  # text before the first turn, role, content, ...
    turns = []
    for role, content in zip(pieces[1::2], pieces[2::2]):
        if role != ROLES["system"] and content.strip():
            turns.append((role, comparable(content)))
    return turns


def comparable(text):
    """The text without white space, case, and the choice between two encodings of an accent."""
    return unicodedata.normalize("NFC", "".join(text.split()).casefold())


def warn_of_odd_pairs(path, pairs):
    repeated_pairs = 0
    reversed_pairs = 0
    repeated_prompts = 0
    end_tokens = 0
    earlier = set()
    for pair in pairs:
        in_the_other_order = Pair(pair.prompt, pair.rejected, pair.chosen)
        if pair in earlier:
            repeated_pairs += 1
        elif in_the_other_order in earlier:
            reversed_pairs += 1
        earlier.add(pair)
        for response in (pair.chosen, pair.rejected):
            if response.startswith(pair.prompt):
                repeated_prompts += 1
            if response.rstrip().endswith(("|>", "</s>")):  # such as <|im_end|>
                end_tokens += 1
    if repeated_pairs:
        warnings.warn(f"{path}: pairs that repeat an earlier pair: {repeated_pairs}")
    if reversed_pairs:
        warnings.warn(f"{path}: pairs that contradict an earlier pair: {reversed_pairs}")
    if repeated_prompts:
        warnings.warn(f"{path}: responses that repeat their prompt: {repeated_prompts}")
    if end_tokens:
        warnings.warn(f"{path}: end tokens spelled as text: {end_tokens}")


# Text -> token ids


def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" (any text, no download) or one of tiktoken's own.

    tiktoken downloads a tokenizer once. InputError if there is none of this name, or no download.
    """
    if name == "bytes":  # a BPE without merges: every token is a byte
        return tiktoken.Encoding(
            name,
            pat_str="(?s:.)",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={END: 256},
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever its download library raises
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise InputError(
            f"tokenizer {name}: not one of {known}, or its download failed "
            f"({type(error).__name__}); without a network use bytes, or point "
            f"TIKTOKEN_CACHE_DIR to a folder that holds its files"
        ) from None


# GPT-2's files spell each byte as one visible character. Those that are none follow at 256.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ! to ~, ¡ to ¬, ® to ÿ
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SPELLING = {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}  # the space is "Ġ"


def check_tokenizer(folder, config, tokenizer):
    """InputError if a folder in Hugging Face's format was made for another tokenizer.

    Its vocab.json or tokenizer.json, if there is one, must give every id the same bytes, and its
    config the same end token. An end token outside the vocabulary counts as none.
    """
    another = f"{folder} was trained with another tokenizer than {tokenizer.name}"
    for token, text in read_vocabulary(Path(folder)).items():
        if token not in range(config.vocab_size):
            continue  # no text is ever encoded as this token
        try:
            token_bytes = tokenizer.decode_single_token_bytes(token)
            expected = token_bytes.decode("latin-1").translate(SPELLING)
        except KeyError:
            expected = None  # the tokenizer has no such id
        if text != expected:
            raise InputError(f"{another}: its token {token} is {text!r}, not {expected!r}")
    end = config.eos_token_id
    if end in range(config.vocab_size) and end != tokenizer.eot_token:
        raise InputError(f"{another}: its end token is {end}, not {tokenizer.eot_token}")


def read_vocabulary(folder):
    """{id: text} of the tokenizer in this folder; {} if it has none."""
    for name in ["vocab.json", "tokenizer.json"]:
        path = folder / name
        if not path.exists():
            continue
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if name == "tokenizer.json":
                stored = stored["model"]["vocab"]
            return {int(token): text for text, token in stored.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not the vocabulary of a GPT-2") from error
    return {}


class TokenPair(NamedTuple):
    """Token ids of a Pair. In SFT `rejected` is empty."""

    prompt: list
    chosen: list
    rejected: list
    text: str = ""  # the prompt before it was cut, by which `split` groups the pairs


def encode_pairs(pairs, tokenizer, block_size):
    """Pairs -> list of TokenPair.

    Prompt and responses are encoded separately, so that no token straddles their boundary. Every
    response ends in the end token, so that the policy learns to stop.

    A prompt is cut on the left until it fits into the block beside the longer response. A pair is
    dropped if its prompt is empty or a response fills the block. One warning counts the cut
    prompts, another the dropped pairs. InputError if no pair is left.
    """
    rows = []
    cut = 0
    dropped = 0
    for pair in pairs:
        prompt = tokenizer.encode_ordinary(pair.prompt)
        chosen = tokenizer.encode_ordinary(pair.chosen) + [tokenizer.eot_token]
        rejected = tokenizer.encode_ordinary(pair.rejected) + [tokenizer.eot_token]
        room = block_size - max(len(chosen), len(rejected))
        if room < 1 or not prompt:
            dropped += 1  # one token of the prompt must remain, to predict the first of a response
            continue
        if len(prompt) > room:
            cut += 1
        rows.append(TokenPair(prompt[-room:], chosen, rejected, pair.prompt))
    if cut:
        warnings.warn(f"prompts cut on the left to fit {block_size} tokens: {cut}")
    if dropped:
        warnings.warn(f"pairs dropped, too long for {block_size} tokens: {dropped}")
    if not rows:
        raise InputError(f"no pair fits into {block_size} tokens: use a larger --block-size")
    return rows


def show(path, name="bytes"):
    """Print the tokens of a file's first pair, as they are batched, the scored ones in brackets.

    Tokens that are parts of one character are shown together, as that character.
    """
    tokenizer = get_tokenizer(name)
    pairs = load_pairs(path)
    rows = encode_pairs(pairs, tokenizer, block_size=1024)
    ids, mask = collate(rows, [0])
    for i, label in enumerate(["chosen", "rejected"]):
        length = len(rows[0].prompt) + int(mask[i].sum())
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown = []
        for token, is_scored in zip(ids[i, :length].tolist(), mask[i].tolist()):
            text = decoder.decode(tokenizer.decode_single_token_bytes(token))
            if not text:
                continue  # the character goes on in the next token, and is shown there
            shown.append(f"[{text!r}]" if is_scored else repr(text))
        padding = len(ids[i]) - length
        print(f"{label}:", *shown, f"and {padding} of padding\n")


# Token ids -> batches


def split(rows, fraction, generator):
    """TokenPairs -> (to train on, held out). A prompt is on one side only, with all its pairs.

    Prompts that differ only in case, white space or the encoding of accents count as one.
    `fraction` of them is held out, rounded up, but at least one is left to train on. Warns if
    nothing is held out though it should be, and if more is held out than trained on.
    """
    keys = [comparable(row.text) for row in rows]
    prompts = list(dict.fromkeys(keys))  # each once, in order of first appearance
    n_held_out = min(math.ceil(fraction * len(prompts)), len(prompts) - 1)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held_out_prompts = {prompts[i] for i in order[:n_held_out]}
    train = []
    held_out = []
    for row, key in zip(rows, keys):
        if key in held_out_prompts:
            held_out.append(row)
        else:
            train.append(row)
    if fraction > 0 and not held_out:
        warnings.warn("there is only one prompt, so no pair is held out")
    if len(held_out) > len(train):
        warnings.warn(f"{len(held_out)} of {len(rows)} pairs are held out, more than half")
    return train, held_out


def batches(rows, batch_size, generator):
    """Endless batches of indices into `rows`, (batch_size,).

    Each epoch is shuffled anew. A batch may begin in one epoch and end in the next. Within a batch,
    rows of similar length are neighbours.
    """
    lengths = [len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rows]
    lengths = torch.tensor(lengths)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch_size:
            epoch = torch.randperm(len(rows), generator=generator)
            waiting = torch.cat([waiting, epoch])
        batch = waiting[:batch_size]
        waiting = waiting[batch_size:]
        by_length = lengths[batch].argsort(stable=True)
        yield batch[by_length]  # its micro-batches need little padding


def collate(rows, pair_ids):
    """The pairs rows[i] for i in pair_ids as a batch: ids and mask (R, T), padded on the right.

    All chosen responses come first, then all rejected ones: R = 2B, or B if there are none.
    `mask` is True at the tokens of the response. Attention needs no mask: it is causal, so it never
    looks at padding on the right.
    """
    pairs = [rows[i] for i in pair_ids]
    sequences = [(pair.prompt, pair.chosen) for pair in pairs]
    sequences += [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])  # of the responses, (R,)
    ends = torch.tensor([len(prompt) + len(response) for prompt, response in sequences])
    T = int(ends.max())
    ids = []
    for prompt, response in sequences:
        padding = [0] * (T - len(prompt) - len(response))
        ids.append(prompt + response + padding)
    position = torch.arange(T)
    mask = (starts[:, None] <= position) & (position < ends[:, None])
    return torch.tensor(ids), mask


# The toy world

NOUNS = ["film", "hotel"]
# The value of each opinion: (of a film, of a hotel)
OPINIONS = {"good": (2.0, 2.0), "dull": (-2.0, -1.0), "quiet": (-0.5, 1.5), "funny": (1.5, -0.5)}
DEGREES = {"not": -1.0, "very": 1.5}


class Drawn(NamedTuple):
    """n preferences in the toy world: indices into its prompts and responses, each (n,)."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


class ToyWorld:
    """Reviews in a language so small that every response is listed, such as " not dull" to the
    prompt " The film was".

    Up to K = 3 of the W = 10 words make a response, nonsense included, so each of the P = 2 prompts
    has Y = 1 + 10 + 100 + 1000 = 1,111. A response of fewer than K words ends in the end token. One
    of K words needs none: nothing can follow it.

    prompts: P texts; responses: Y texts; prompt_ids, response_ids: their tokens; grammatical (Y,):
    True for responses of the form [not] [very] opinion; rewards: the true r*, (P, Y) float64.
    """

    K = 3

    def __init__(self):
        words = ["The", "was", *NOUNS, *OPINIONS, *DEGREES]
        self.W = len(words)  # token ids 0 .. W-1 are words, W is the end token
        self.tokenizer = tiktoken.Encoding(  # a token is a word with the space before it
            "toy",
            pat_str=r" \S+",
            mergeable_ranks={f" {word}".encode(): token for token, word in enumerate(words)},
            special_tokens={END: self.W},
        )
        self.prompts = [f" The {noun} was" for noun in NOUNS]
        self.prompt_ids = torch.tensor([self.tokenizer.encode_ordinary(x) for x in self.prompts])
        self.responses = []
        self.response_ids = []
        for length in range(self.K + 1):
            for ids in itertools.product(range(self.W), repeat=length):
                self.responses.append(self.tokenizer.decode(ids))
                end = [self.W] if length < self.K else []
                self.response_ids.append([*ids, *end])
        grammar = f"( not)?( very)?( {'| '.join(OPINIONS)})"
        self.grammatical = torch.tensor([bool(re.fullmatch(grammar, y)) for y in self.responses])
        rewards = [[self.reward(x, y) for y in self.responses] for x in self.prompts]
        self.rewards = torch.tensor(rewards, dtype=torch.float64)

    def reward(self, prompt, response):
        """r*(x, y): the mean of the opinions in y, so that longer is not better; 0 if none.

        Degrees multiply the opinion that follows them. What an opinion is worth depends on the
        noun. So r* is not a sum over words.
        """
        noun = NOUNS.index(prompt.split()[1])
        opinions = []
        degree = 1.0
        for word in response.split():
            if word in DEGREES:
                degree *= DEGREES[word]
            elif word in OPINIONS:
                opinions.append(degree * OPINIONS[word][noun])
                degree = 1.0
            else:
                degree = 1.0
        if not opinions:
            return 0.0
        return sum(opinions) / len(opinions)

    def corpus(self, generator, n=20_000, slip=0.2):
        """n sentences for SFT, as TokenPairs without a rejected response: [not] [very] opinion.

        A fraction `slip` of the tokens is replaced by a random one of the W + 1. Without slips the
        reference would give most responses almost no probability. They would hardly ever be drawn
        into a pair, so DPO could learn nothing about them.
        """
        padded = []  # with the end token, to K tokens
        for ids, grammatical in zip(self.response_ids, self.grammatical):
            if grammatical:
                padded.append(ids + [self.W] * (self.K - len(ids)))
        sentences = torch.tensor(padded)
        tokens = sentences[torch.randint(len(sentences), (n,), generator=generator)]  # (n, K)
        slips = torch.rand(n, self.K, generator=generator) < slip
        any_token = torch.randint(self.W + 1, (n, self.K), generator=generator)
        tokens = torch.where(slips, any_token, tokens)

        rows = []
        prompts = itertools.cycle(self.prompt_ids.tolist())
        for prompt, response in zip(prompts, tokens.tolist()):
            if self.W in response:  # cut it after its first end token
                response = response[: response.index(self.W) + 1]
            rows.append(TokenPair(prompt, response, rejected=[]))
        return rows

    def draw_pairs(self, logps, n, generator):
        """n preferences between two responses, drawn from the policy with these logps (P, Y).

        The winner is drawn by Bradley-Terry (Eq. 1) on r*. The two responses may be equal.
        """
        prompt = torch.randint(len(self.prompts), (n,), generator=generator)
        # (P, 2n): for each pair two responses to every prompt. Those to its own prompt are kept.
        drawn = logps.exp().multinomial(2 * n, replacement=True, generator=generator)
        i = torch.arange(n)
        first = drawn[prompt, i]
        second = drawn[prompt, n + i]
        p = dpo.bradley_terry(self.rewards[prompt, first], self.rewards[prompt, second])  # Eq. 1
        first_wins = torch.rand(n, generator=generator) < p
        chosen = torch.where(first_wins, first, second)
        rejected = torch.where(first_wins, second, first)
        return Drawn(prompt, chosen, rejected)

    def rows(self, drawn):
        """Drawn preferences as a list of TokenPair."""
        prompts = self.prompt_ids.tolist()
        responses = self.response_ids
        rows = []
        for x, w, l in zip(drawn.prompt.tolist(), drawn.chosen.tolist(), drawn.rejected.tolist()):
            rows.append(TokenPair(prompts[x], responses[w], responses[l]))
        return rows

    @torch.no_grad()
    def logps(self, model):
        """log pi(y|x) of every response to every prompt under the model: (P, Y) float64."""
        rows = []
        for prompt in self.prompt_ids.tolist():
            for response in self.response_ids:
                rows.append(TokenPair(prompt, response, rejected=[]))
        ids, mask = collate(rows, range(len(rows)))
        logps = dpo.response_logps(model, ids.to(model.device), mask)
        logps = logps.cpu().double().view(self.rewards.shape)
        # Normalised again: the probabilities of a float32 model sum to 1 only to about 1e-7.
        return logps - logps.logsumexp(-1, keepdim=True)

    def measure(self, logps, ref_logps, beta, prompts=slice(None)):
        """The exact numbers of a policy, averaged over `prompts`, from two tables of log pi (P, Y).

        expected_reward: E[r*]. kl: KL(pi || pi_ref) in nats. objective: J of Eq. 3. kl_to_optimum:
        KL(pi || pi*), with pi* of Eq. 4. gap_closed: 1 - kl_to_optimum / KL(pi_ref || pi*), which
        is also the fraction of J(pi*) - J(pi_ref) that the policy has gained.
        """
        logps = logps[prompts]
        ref_logps = ref_logps[prompts]
        rewards = self.rewards[prompts]
        optimum, _ = dpo.optimal_policy(ref_logps, rewards, beta)
        kl_to_optimum = dpo.kl_divergence(logps, optimum).mean().item()
        gap = dpo.kl_divergence(ref_logps, optimum).mean().item()
        return {
            "expected_reward": (logps.exp() * rewards).sum(-1).mean().item(),
            "kl": dpo.kl_divergence(logps, ref_logps).mean().item(),
            "objective": dpo.rlhf_objective(logps, ref_logps, rewards, beta).mean().item(),
            "kl_to_optimum": kl_to_optimum,
            "gap_closed": 1 - kl_to_optimum / max(gap, 1e-12),
        }


def short_warning(message, *_):
    """How a command of ours prints a warning: without file and line."""
    return f"warning: {message}\n"


if __name__ == "__main__":
    warnings.formatwarning = short_warning
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python data.py pairs.jsonl [tokenizer]")
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's stdout has no such method
        sys.stdout.reconfigure(errors="replace")
    try:
        show(*sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(f"data.py: {error}")
