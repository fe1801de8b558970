"""Reading pairs, encoding and splitting them, the rows and the order of batches, the toy world."""

import copy
import itertools
import json
import math
import re
import runpy
import sys
import warnings

import pytest
import torch

import data
import dpo
from data import END, Drawn, InputError, Pair, TokenPair, encode_pairs, load_pairs
from model import GPT, GPTConfig
from test_dpo import expect
from test_model import assert_drawn_from

GOOD = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}
WORLD, BYTES = data.ToyWorld(), data.get_tokenizer("bytes")
WORDS = "The was film hotel good dull quiet funny not very".split()  # token ids 0 to 9; 10 is END
PLACE = {y: i for i, y in enumerate(WORLD.responses)}
seeded = torch.Generator().manual_seed


def write(tmp_path, *lines):
    path = tmp_path / "pairs.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(lines), errors="surrogateescape")
    return path


# Files

NO_JSON = ["{", "[" * 100_000, '{"prompt": "\udcff"}', "[", "1" * 5000]  # \udcff: bytes, no text
UTF16 = [bytes for code in ("utf-16", "utf-16-le") for bytes in ['{"a": 1}\r\n'.encode(code)]]


@pytest.mark.parametrize("line", [*NO_JSON, *UTF16], ids=lambda line: repr(line)[:40])
def test_what_is_not_json_is_named_by_file_and_line(tmp_path, line):
    path = write(tmp_path, *([GOOD, line] if isinstance(line, str) else []))
    if isinstance(line, bytes):  # as PowerShell writes it
        path.write_bytes(line)
    with pytest.raises(InputError) as error:
        load_pairs(path)
    number, said = 1 + isinstance(line, str), str(error.value)
    assert f"{path}:{number}: not a line of JSON" in said and "UTF-8" in said, said
    assert "\n" not in said and len(said) < 300, said


TALK = "\n\nHuman: Hi.\n\nAssistant: Hello. Assistant: here.\n\nHuman: Why?\n\nAssistant:"
HI, YES, NO = ({"role": role, "content": text} for role, text in
               (("user", "Hi?"), ("assistant", "Yes."), ("assistant", "No.")))  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
WAS = "\n\nHuman: Hi?\n\nAssistant:", " Yes.", " No."
LINES = {  # prompt, if any, chosen and rejected -> the pair, or None where the line is dropped
    "three texts": (("Hi", "A", "B"), ("Hi", "A", "B")),
    "texts stay as they are": ((" Hi\r\n", "A\r\n", " B"), (" Hi\r\n", "A\r\n", " B")),
    "a prompt and dialogues": (("Hi", TALK + " A.", "B"), ("Hi", TALK + " A.", "B")),
    "equal texts": (("Hi", "A", "A"), None),
    "a blank prompt": ((" \n", "A", "B"), None),
    "a blank response": (("Hi", " \n", "B"), None),
    "an empty response": (("Hi", "A", ""), None),
    "null": (("Hi", "A", None), None),
    "a number": (("Hi", 4, "B"), None),
    "an object": (({"text": "Hi"}, "A", "B"), None),
    "no prompt and no dialogue": (("A", "B"), None),
    "dialogues": ((TALK + " Yes, A.", TALK + " Yes, B."), (TALK, " Yes, A.", " Yes, B.")),
    "an empty prompt beside them": (("", TALK + " A.", TALK + " B."), (TALK, " A.", " B.")),
    "lines that end as on Windows": ([(TALK + y).replace("\n", "\r\n") for y in (" A.\n", " B.")],
                                     (TALK, " A.\n", " B.")),
    "one response begins the other": ((TALK + " A.", TALK + " A. B"), (TALK, " A.", " A. B")),
    "equal dialogues": ((TALK + " A.", TALK + " A."), None),
    "a blank last response": ((TALK + " \n", TALK + " No."), None),
    "one goes on for a turn": ((TALK + " A.\n\nHuman: B?\n\nAssistant: C.", TALK + " D."), None),
    "they part early": ((TALK + " A.", "\n\nHuman: Hi.\n\nAssistant: Go away."), None),
    "no question in common": (("\n\nAssistant: A.", "?\n\nAssistant: B."), None),
    "a person has the last word": ((TALK + " A.\n\nHuman: Thanks.", TALK + " B."), None),
    "rejected responds twice": ((TALK + " A.", TALK + " B.\n\nAssistant: C."), None),
    "nobody responds": (("\n\nHuman: Hi.", "\n\nHuman: Hi there."), None),
    "one dialogue is a number": ((1, TALK + " A."), None),
    "messages": (([HI, YES], [HI, NO]), WAS),
    "a text and whole dialogues in messages": (("Hi?", [HI, YES], [HI, NO]), WAS),
    "messages everywhere": (([HI], [YES], [NO]), WAS),
    "a text, then messages": (("Hi?", [YES], [NO]), WAS),
    "messages, then texts": (([HI], "Yes.", "No."), WAS),
    "only the rejected response in messages": (("Hi?", "Yes.", [NO]), WAS),
    "a system message": (([SYSTEM, HI], [YES], [NO]), ("\n\nSystem: Be brief." + WAS[0], *WAS[1:])),
    "and in whole dialogues": (("Hi?", [SYSTEM, HI, YES], [SYSTEM, HI, NO]),
                               ("\n\nSystem: Be brief." + WAS[0], *WAS[1:])),
    "a longer talk": (([HI, YES, HI], [YES], [NO]),
                      (WAS[0] + " Yes.\n\nHuman: Hi?\n\nAssistant:", *WAS[1:])),
    "a system message alone": (([SYSTEM], [HI, YES], [HI, NO]),
                               ("\n\nSystem: Be brief." + WAS[0], *WAS[1:])),
    "turns that go on": (([HI, YES], [HI, YES], [HI, NO]), (WAS[0] + " Yes." + WAS[0], *WAS[1:])),
    "equal messages": (([HI], [YES], [YES]), None),
    "a blank message": (([HI], [YES], [NO | {"content": " "}]), None),
    "the person answers": (([HI, YES, HI], [HI, NO, HI]), None),
    "no message": (([HI], [YES], []), None),
    "an unknown role": (([HI], [YES], [NO | {"role": "tool"}]), None),
    "no content": (([HI], [YES], [{"role": "assistant"}]), None),
    "content that is no text": (([HI], [YES], [NO | {"content": [{"text": "No."}]}]), None),
    "content null": (([HI], [YES], [NO | {"content": None}]), None),
    "messages that are none": (([HI], ["Yes."], ["No."]), None),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_every_form_of_a_line(case, tmp_path):
    """Prompt and response together are the text of the line; what is no pair is dropped, counted,
    and alone in its file an error that names its fields."""
    texts, wanted = LINES[case]
    line = dict(zip(Pair._fields[-len(texts) :], texts)) | {"id": 7}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = load_pairs(write(tmp_path, GOOD, line, "", GOOD | {"prompt": "3 + 2 ="}))
    others = Pair(*GOOD.values()), Pair("3 + 2 =", "4", "5")
    assert found == [others[0], *([wanted] if wanted else []), others[1]]
    assert len(warned) == (wanted is None)
    if not wanted:
        assert re.search("dropped, the first is 2, without two.*: 1$", str(warned[0].message))
        with pytest.raises(
            InputError, match=f"no line has two different responses.*found: {', '.join(line)}$"
        ):
            load_pairs(write(tmp_path, line, line))


@pytest.mark.parametrize("line", ["", "7", "null", '["prompt"]', '{"text": "Hi"}'])
def test_a_file_without_a_pair_says_what_it_has(tmp_path, line):
    has = {"": "nothing", "7": "int", "null": "NoneType", '["prompt"]': "list"}.get(line, "text")
    with pytest.raises(
        InputError, match=f"pairs.jsonl: no line has two different responses.*found: {has}$"
    ):
        load_pairs(write(tmp_path, line))


def test_what_looks_odd_is_counted(tmp_path):
    """Repeated pairs, responses that repeat their prompt or spell an end token; none is changed."""
    ends = [GOOD | {"chosen": f"{i}{end}"} for i, end in enumerate((END, "<|im_end|>\n", "</s>"))]
    repeats = [
        GOOD | {"chosen": "2 + 2 = 4"},
        GOOD | {"chosen": "2 + 2 = 4", "rejected": "2 + 2 ="},
    ]
    lines = [*[GOOD] * 3, *ends, *repeats]
    with pytest.warns(UserWarning) as warned:
        assert load_pairs(write(tmp_path, *lines)) == [tuple(line.values()) for line in lines]
    said = [str(warning.message).split("pairs.jsonl: ")[1] for warning in warned]
    assert said == ["pairs that repeat an earlier pair: 2", "responses that repeat their prompt: 3",
                    "end tokens spelled as text: 3"]  # fmt: skip


def test_show_by_hand(tmp_path, capsys, monkeypatch):
    """python data.py pairs.jsonl: the first pair's tokens, [scored] or not."""
    path = write(tmp_path, {"prompt": "Q:", "chosen": "no\n", "rejected": "y"}, GOOD)
    monkeypatch.setattr(sys, "argv", ["data.py", str(path)])
    runpy.run_path(data.__file__, run_name="__main__")
    chosen = f"chosen: 'Q' ':' ['n'] ['o'] ['\\n'] ['{END}'] and 0 of padding\n"
    rejected = f"rejected: 'Q' ':' ['y'] ['{END}'] and 2 of padding\n"
    assert capsys.readouterr().out == f"{chosen}\n{rejected}\n"
    for wrong in ([], ["missing.jsonl"], [str(path), "klingon"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *wrong])
        with pytest.raises(SystemExit, match="^data.py: .*(path|missing.jsonl|klingon)"):
            runpy.run_path(data.__file__, run_name="__main__")


# Tokens


def test_tokenizers(monkeypatch):
    text = "naïve 🙂\n\tx<|endoftext|>"
    assert BYTES.encode_ordinary(text) == list(text.encode()) and BYTES.eot_token == 256
    assert BYTES.decode(list(text.encode())) == text and BYTES.n_vocab == 257
    words = WORLD.tokenizer.encode_ordinary(" The film was not very dull")
    assert words == [0, 2, 1, 8, 9, 5], "a token of the toy world is a word and the space before it"
    with pytest.raises(InputError, match="tokenizer klingon: not one of bytes, .*gpt2"):
        data.get_tokenizer("klingon")
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: 1 / 0)
    with pytest.raises(InputError, match="gpt2: .*download failed .ZeroDivisionError.*use bytes"):
        data.get_tokenizer("gpt2")


def test_encode_pairs_closes_responses_and_cuts_prompts():
    rows = encode_pairs([Pair("ab", "c", ""), Pair("a", "bc", END)], BYTES, 16)
    assert rows[0] == ([97, 98], [99, 256], [256]), "an empty response is the end token alone"
    assert rows[1] == ([97], [98, 99, 256], [*END.encode(), 256]), "and one in a text is text"
    fits = Pair("abcde", "xy", "z"), Pair("a", "z", "x" * 6)
    with pytest.warns(UserWarning, match="cut on the left to fit 8 tokens: 1"):
        rows = encode_pairs([Pair("123abcde", "xy", "z"), fits[1]], BYTES, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what fits exactly is neither cut nor dropped
        assert encode_pairs(fits, BYTES, 8) == rows and bytes(rows[0].prompt) == b"abcde"
    for bad in (Pair("a", "x" * 7, "z"), Pair("a", "z", "x" * 7), Pair("", "x", "z")):
        with pytest.warns(UserWarning, match="pairs dropped.* 8 tokens: 1"):
            assert encode_pairs([bad, *fits], BYTES, 8) == rows
        with pytest.warns(UserWarning), pytest.raises(InputError, match="no pair fits into 8"):
            encode_pairs([bad], BYTES, 8)


# Splits, batches, rows

SPLITS = [(10, 0.0, 0), (10, 0.21, 3), (10, 0.3, 3), (10, 0.95, 9), (10, 1.0, 9), (2, 0.1, 1),
          (1, 0.0, 0), (1, 0.1, 0), (1, 1.0, 0)]  # fmt: skip


@pytest.mark.parametrize("prompts, fraction, n", SPLITS)
def test_split_by_prompt(prompts, fraction, n):
    """n of the prompts are held out, with all their pairs, and at least one never is."""
    pairs, ever = [Pair(f"{i % prompts}", f"{i}", "no") for i in range(25)], set()
    for seed in range(40):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            train, held_out = data.split(pairs, fraction, seeded(seed))
        there = {pair.prompt for pair in held_out}
        assert len(there) == n, "a fraction of the prompts, rounded up, but one is trained on"
        assert held_out == [pair for pair in pairs if pair.prompt in there], "with all its pairs"
        assert train == [pair for pair in pairs if pair.prompt not in there], "one side only"
        odd = fraction > 0 and (n == 0 or len(held_out) > len(train))
        said = f"{prompts} prompts: {len(held_out)} of 25 pairs are held out"
        assert [str(warning.message) for warning in warned] == [said] * odd, "none, or over half"
        assert odd or data.split(pairs, fraction, seeded(seed)) == (train, held_out), "seeded"
        ever |= there
    assert ever == {pair.prompt for pair in pairs} or n == 0, "any prompt may be held out"


@pytest.mark.parametrize("size", [1, 4, 5, 10, 15])
def test_batches_hold_every_pair_once_an_epoch(size):
    """The remainder of an epoch is carried into the next; the order is the seed's alone."""

    def three_epochs(size, seed=0, length=lambda i: 1):
        rows = [TokenPair([1], [0] * length(i), [0]) for i in range(10)]
        stream = data.batches(rows, size, seeded(seed))
        found = [next(stream) for _ in range(math.ceil(30 / size))]
        assert all(batch.shape == (size,) for batch in found), "(batch_size,), the last one too"
        return torch.cat(found)[:30].tolist()

    order = three_epochs(size)
    epochs = [order[:10], order[10:20], order[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3, epochs
    assert epochs[0] != epochs[1] != epochs[2] and list(range(10)) not in epochs, "shuffled anew"
    assert order == three_epochs(1) != three_epochs(size, seed=1), "the order follows from the seed"
    if 30 % size == 0:
        by_length = [sorted(order[i : i + size], key=lambda i: -i) for i in range(0, 30, size)]
        found = three_epochs(size, length=lambda i: 20 - i)
        assert found == sum(by_length, []), "the same batches, rows of similar length together"


PAIRS = [TokenPair([5, 6], [7, 8, 0], [9, 0]), TokenPair([5], [0], [1, 2, 0])]
COLLATED = {  # the pairs -> ids and mask, all chosen rows first, then all rejected rows
    (0, 1): ("56780 50000 56900 51200", "00111 01000 00110 01110"),
    (1, 0): ("50000 56780 51200 56900", "01000 00111 01110 00110"),
    (1, 1): ("5000 5000 5120 5120", "0100 0100 0111 0111"),
}


@pytest.mark.parametrize("pair_ids", COLLATED, ids=str)
def test_collate_by_hand(pair_ids):
    wanted = [[list(map(int, row)) for row in table.split()] for table in COLLATED[pair_ids]]
    ids, mask = data.collate(PAIRS, list(pair_ids))
    assert [ids.tolist(), mask.int().tolist()] == wanted
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)
    ids, mask = data.collate([row._replace(rejected=[]) for row in PAIRS], list(pair_ids))
    longest = max(len(PAIRS[i].prompt + PAIRS[i].chosen) for i in pair_ids)
    cut = [[row[:longest] for row in table[:2]] for table in wanted]
    assert [ids.tolist(), mask.int().tolist()] == cut, "without a rejected response, B rows"


def test_nothing_changes_what_it_is_given():
    pairs = [Pair("ab" * 9, "c", "de"), Pair("f", "g" * 6, "h")]
    rows = encode_pairs([Pair("a", "b", "c"), Pair("d", "ef", "g")], BYTES, 16)
    logps = torch.full((2, 1111), -math.log(1111), dtype=torch.float64)
    drawn = WORLD.draw_pairs(logps, 9, "soft", seeded(0))
    given = pairs, rows, logps, drawn, WORLD.response_ids, WORLD.prompt_ids
    kept = copy.deepcopy(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encode_pairs(pairs, BYTES, 12), data.split(pairs, 0.5, seeded(0))
    data.collate(rows, [1, 0]), next(data.batches(rows, 2, seeded(0)))
    WORLD.draw_pairs(logps, 9, "hard", seeded(0)), WORLD.rows(drawn), WORLD.corpus(seeded(0), n=9)
    WORLD.measure(logps, logps, 1.0)
    same = str(given) == str(kept) and torch.equal(logps, kept[2])
    assert same, "an argument, or the world, is changed in place"


# The toy world

REWARDS = {  # response -> r* after " The film was", after " The hotel was"
    "": (0.0, 0.0), " good": (2.0, 2.0), " dull": (-2.0, -1.0), " quiet": (-0.5, 1.5),
    " funny": (1.5, -0.5), " not dull": (2.0, 1.0), " very quiet": (-0.75, 2.25),
    " not very dull": (3.0, 1.5), " very not good": (-3.0, -3.0), " very very good": (4.5, 4.5),
    " not not good": (2.0, 2.0), " good not": (2.0, 2.0), " The film was": (0.0, 0.0),
    " good dull": (0.0, 0.5),  # the mean of the opinions, not their sum
    " not good funny": (-0.25, -1.25), " good good good": (2.0, 2.0),  # the degree is used up
    " not film good": (2.0, 2.0), " not very film": (0.0, 0.0),  # and is lost on another word
}  # fmt: skip


def test_toy_world_by_hand():
    """1 + 10 + 100 + 1000 different responses; below 3 words with the end token, 10."""
    rewards = {y: tuple(WORLD.rewards[:, PLACE[y]].tolist()) for y in REWARDS}
    assert rewards == REWARDS, [y for y in REWARDS if rewards[y] != REWARDS[y]]
    assert WORLD.rewards.shape == (2, 1111) and len(PLACE) == 1111
    assert WORLD.prompts == [" The film was", " The hotel was"]
    for response, ids in zip(WORLD.responses, WORLD.response_ids):
        words = response.split()
        assert ids == [WORDS.index(word) for word in words] + [10] * (len(words) < 3)
    grammatical = itertools.product(("", " not"), ("", " very"), WORDS[4:8])
    wanted = {f"{no}{very} {word}" for no, very, word in grammatical}
    assert {WORLD.responses[i] for i in WORLD.grammatical.nonzero()} == wanted
    lengths = torch.tensor([len(y.split()) for y in WORLD.responses]).double()
    length_decides = torch.stack([*WORLD.rewards, lengths]).corrcoef()[2, :2]
    assert length_decides.abs().max() < 0.1, "length must not decide the reward"


@pytest.mark.parametrize("slip", [0.2, 0.0, 1.0])
def test_corpus_follows_its_law(slip):
    """16 sentences, equally likely; each of 3 tokens slips, to any of the 11; cut after END."""
    words = itertools.product(([], [8]), ([], [9]), range(4, 8))
    sentences = torch.tensor([[*no, *very, word, 10, 10][:3] for no, very, word in words])
    stay = torch.nn.functional.one_hot(sentences, 11).double()  # (16, 3, 11)
    of_tokens = ((1 - slip) * stay + slip / 11).unbind(1)
    joint = torch.einsum("sa,sb,sc->abc", *of_tokens) / 16
    law = [joint[10].sum()[None], joint[:10, 10].sum(-1), joint[:10, :10, 10].flatten()]
    law = torch.cat([*law, joint[:10, :10, :10].flatten()])  # in the order of WORLD.responses
    given = {} if slip == 0.2 else {"slip": slip}  # the default
    corpus, again, other = (WORLD.corpus(seeded(seed), **given) for seed in (0, 0, 1))
    assert corpus == again != other and not any(row.rejected for row in corpus)
    slipped = sum(row.chosen[0] in (0, 1, 2, 3, 10) for row in corpus) / 20_000
    expect(slipped, slip * 5 / 11, "first tokens that no sentence has: 5 of the 11 slips", 0.007)
    place = {tuple(ids): y for y, ids in enumerate(WORLD.response_ids)}
    for prompt in ([0, 2, 1], [0, 3, 1]):
        drawn = [place[tuple(row.chosen)] for row in corpus if row.prompt == prompt]
        assert len(drawn) == 10_000, "each prompt gets half"
        assert_drawn_from(law, torch.tensor(drawn))


def test_labels():
    uniform = torch.full((2, 1111), -math.log(1111), dtype=torch.float64)
    p, lead = {}, {}
    for labels in ("hard", "soft", "deterministic"):
        x, chosen, rejected, p[labels] = WORLD.draw_pairs(uniform, 200_000, labels, seeded(0))
        lead[labels] = WORLD.rewards[x, chosen] - WORLD.rewards[x, rejected]
        torch.rand(1)  # the global generator has no say
        again = WORLD.draw_pairs(uniform, 200_000, labels, seeded(0))
        assert torch.equal(again.chosen, chosen), f"{labels}: the seed alone decides who wins"
    assert all((p[labels] == 1).all() for labels in ("hard", "deterministic"))
    assert (lead["deterministic"] >= 0).all(), "deterministic: the higher reward wins"
    assert (lead["soft"] < 0).double().mean() > 0.3, "soft: the first is chosen, better or not"
    expect(p["soft"], 1 / (1 + (-lead["soft"]).exp()), "soft: p is Eq. 1's")
    for gap in (0.5, 1.0, 2.0):
        near = lead["hard"][(lead["hard"].abs() - gap).abs() < 0.01]
        noise = 2 / math.sqrt(len(near))  # 4 standard errors of a coin
        why = f"Eq. 1: of two responses {gap} apart the better one wins with sigma({gap})"
        expect((near > 0).double().mean(), 1 / (1 + math.exp(-gap)), why, noise + 0.002)


def test_pairs_come_from_the_policy_and_the_seed():
    logps, law = torch.full((2, 1111), -torch.inf, dtype=torch.float64), {}
    for x, probs in enumerate(({3: 0.75, 7: 0.25}, {53: 0.1, 57: 0.9})):
        logps[x, list(probs)] = torch.tensor(list(probs.values())).double().log()
        both = itertools.product(probs.items(), repeat=2)  # independent, equal ones kept
        law |= {(x, y, z): p * q / 2 for (y, p), (z, q) in both}
    draws = []
    for seed in (0, 0, 1):
        torch.rand(1)  # the global generator has no say
        drawn = WORLD.draw_pairs(logps, 8000, "soft", seeded(seed))
        draws.append(list(zip(*(column.tolist() for column in drawn[:3]))))
    assert draws[0] == draws[1] != draws[2] and set(draws[0]) <= set(law)
    drawn = torch.tensor([list(law).index(pair) for pair in draws[0]])
    assert_drawn_from(torch.tensor(list(law.values())), drawn)
    assert len(WORLD.draw_pairs(logps, 1, "hard", seeded(0)).p) == 1, "a prompt may get no pair"
    places = [[1, 0], [PLACE[" not very dull"], 0], [PLACE[" dull"], 1110], [1, 1]]
    wanted = [([0, 3, 1], [8, 9, 5], [5, 10]), ([0, 2, 1], [10], [9, 9, 9])]
    assert WORLD.rows(Drawn(*torch.tensor(places))) == wanted, "prompt, chosen, rejected"


def test_logps_of_every_response_are_exact():
    """They sum to 1, and each is a sum over its own tokens, computed one response at a time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 8, 16, 1, 2)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    kept, logps = copy.deepcopy(model), WORLD.logps(model)
    assert logps.shape == (2, 1111) and not logps.requires_grad
    expect(logps.exp().sum(-1), [1.0, 1.0], "the listed responses are all there is")
    for x, y in itertools.product((0, 1), range(0, 1111, 10)):
        ids = WORLD.prompt_ids[x].tolist() + WORLD.response_ids[y]
        table = model(torch.tensor([ids]))[0].log_softmax(-1)
        alone = sum(table[t - 1, ids[t]] for t in range(3, len(ids)))
        expect(logps[x, y], alone, f"log pi of {WORLD.responses[y]}", 1e-9)
    assert all(map(torch.equal, model.parameters(), kept.parameters())), "it trains"
    low = WORLD.logps(model.float())
    assert low.dtype == torch.float64, "so that what is computed from them rounds no further"
    expect(low, logps, "a float32 model: to rounding", 1e-4)
    expect(low.exp().sum(-1), [1.0, 1.0], "and yet a distribution in float64")


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_measure_by_hand(beta):
    """After " The film was" only " good" and " dull", after " The hotel was" " good" and ""."""
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)  # policy
    q = torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=torch.float64)  # reference
    r = torch.tensor([[2, -2], [2, 0]])
    logps, ref = torch.full((2, 2, 1111), -torch.inf, dtype=torch.float64)
    for x, two in enumerate(((" good", " dull"), (" good", ""))):
        places = [PLACE[y] for y in two]
        logps[x, places], ref[x, places] = p[x].log(), q[x].log()
    best = q * (r / beta).exp()  # (4), before its normaliser
    best /= best.sum(-1, keepdim=True)
    kl, missing, gap = ((a * (a / b).log()).sum(-1) for a, b in ((p, q), (p, best), (q, best)))
    reward, kept = (p * r).sum(-1), (logps.clone(), ref.clone(), WORLD.rewards.clone())
    for prompts in (slice(None), slice(0, 1), slice(1, 2)):
        wanted = {"expected_reward": reward, "kl": kl, "objective": reward - beta * kl}
        wanted |= {"kl_to_optimum": missing, "gap_closed": gap}
        wanted = {name: column[prompts].mean().item() for name, column in wanted.items()}
        wanted["gap_closed"] = 1 - wanted["kl_to_optimum"] / wanted["gap_closed"]
        assert WORLD.measure(logps, ref, beta, prompts) == pytest.approx(wanted), prompts
    row = WORLD.measure(logps, ref, beta)
    assert row == WORLD.measure(logps, ref, beta, slice(None)) and type(row["kl"]) is float
    assert all(map(torch.equal, kept, (logps, ref, WORLD.rewards))), "an argument is changed"


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_measure_says_what_the_paper_says(beta):
    """J(pi*) - J(pi) = beta KL(pi || pi*), and so gap closed is the fraction of J gained."""
    ref, noise = torch.randn(2, 2, 1111, generator=seeded(0)).double().log_softmax(-1)
    best = (ref + WORLD.rewards / beta).log_softmax(-1)  # (4)
    policies = ref, best, (best + noise).log_softmax(-1)
    start, end, row = (WORLD.measure(policy, ref, beta) for policy in policies)
    assert (start["gap_closed"], start["kl"]) == (0, 0), "the reference has closed nothing"
    expect([end["gap_closed"], end["kl_to_optimum"]], [1.0, 0.0], "pi* has closed all", 1e-12)
    missed = end["objective"] - row["objective"]
    expect(missed, beta * row["kl_to_optimum"], "J(pi*) - J(pi) = beta KL(pi || pi*)", 1e-9)
    gained = 1 - missed / (end["objective"] - start["objective"])
    expect(row["gap_closed"], gained, "gap closed: (J(pi) - J(ref)) / (J(pi*) - J(ref))", 1e-9)
    sure = torch.where(torch.arange(1111) == 7, 0.0, -torch.inf).expand(2, -1).double()
    assert math.isfinite(WORLD.measure(sure, sure, beta)["gap_closed"]), "no gap: no 0 / 0"
