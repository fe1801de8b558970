"""Reading pairs, encoding and splitting them, the rows and the order of batches, the toy world."""

import copy
import itertools
import json
import math
import re
import runpy
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

import data
from data import END, Drawn, InputError, Pair, TokenPair, encode_pairs, load_pairs
from model import GPT, GPTConfig
from tests.helpers import assert_drawn_from, expect

GOOD = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}
OTHER = {"prompt": "3 + 2 =", "chosen": "5", "rejected": "6"}
WORLD = data.ToyWorld()
BYTES = data.get_tokenizer("bytes")
WORDS = "The was film hotel good dull quiet funny not very".split()  # token ids 0 to 9; 10 is END
PLACE = {y: i for i, y in enumerate(WORLD.responses)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def write(tmp_path, *lines):
    """A file of pairs. A line is a text, or the object that stands there as JSON."""
    path = tmp_path / "pairs.jsonl"
    texts = []
    for line in lines:
        if not isinstance(line, str):
            line = json.dumps(line)
        texts.append(line)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def with_warnings(function, *arguments):
    """What the function returns, and the warnings that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments)
    return result, [str(warning.message) for warning in caught]


# Files

FIRST = json.dumps(GOOD).encode() + b"\n"
NOT_JSON = {  # the file, and the number of the line that is not JSON
    "half an object": (FIRST + b"{", 2),
    "half a list": (FIRST + b"\n[", 3),
    "too deep": (FIRST + b"[" * 100_000, 2),
    "a number of 5000 digits": (FIRST + b"1" * 5000, 2),
    "not UTF-8": (FIRST + b'{"prompt": "\xff"}', 2),
    "two objects": (FIRST + FIRST.strip() + FIRST, 2),
    "UTF-16, as PowerShell writes it": ('{"a": 1}\r\n'.encode("utf-16"), 1),
    "UTF-16 without its mark": ('{"a": 1}\r\n'.encode("utf-16-le"), 1),
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_not_json_is_named_by_file_and_line(case, tmp_path):
    content, number = NOT_JSON[case]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_pairs(path)
    said = str(error.value)
    assert said.startswith(f"{path}:{number}: not a line of JSON")
    assert "UTF-8" in said
    assert "\n" not in said
    assert len(said) < 300


TALK = "\n\nHuman: Hi.\n\nAssistant: Hello. Assistant: here.\n\nHuman: Why?\n\nAssistant:"
WINDOWS = TALK.replace("\n", "\r\n")
BACK = "\n\nHuman: B?\n\nAssistant: C."
HI = {"role": "user", "content": "Hi?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
BRIEF = {"role": "system", "content": "Be brief."}
ASKED = "\n\nHuman: Hi?\n\nAssistant:"
TOLD = "\n\nSystem: Be brief." + ASKED
TWICE = ASKED + " Yes." + ASKED

PAIRS = {  # prompt, if any, chosen and rejected -> the pair
    "three texts": (("Hi", "A", "B"), ("Hi", "A", "B")),
    "texts stay as they are": ((" Hi\r\n", "A\r\n", " B"), (" Hi\r\n", "A\r\n", " B")),
    "dialogues": ((TALK + " Yes, A.", TALK + " Yes, B."), (TALK, " Yes, A.", " Yes, B.")),
    "an empty prompt beside them": (("", TALK + " A.", TALK + " B."), (TALK, " A.", " B.")),
    "a null prompt beside them": ((None, TALK + " A.", TALK + " B."), (TALK, " A.", " B.")),
    "line ends of Windows": ((WINDOWS + " A.\r\n", WINDOWS + " B."), (TALK, " A.\n", " B.")),
    "one response begins the other": ((TALK + " A.", TALK + " A. B"), (TALK, " A.", " A. B")),
    "messages": (([HI, YES], [HI, NO]), (ASKED, " Yes.", " No.")),
    "a text, whole dialogues": (("Hi?", [HI, YES], [HI, NO]), (ASKED, " Yes.", " No.")),
    "messages everywhere": (([HI], [YES], [NO]), (ASKED, " Yes.", " No.")),
    "a text, then messages": (("Hi?", [YES], [NO]), (ASKED, " Yes.", " No.")),
    "messages, then texts": (([HI], "Yes.", "No."), (ASKED, " Yes.", " No.")),
    "only chosen in messages": (("Hi?", [YES], "No."), (ASKED, " Yes.", " No.")),
    "only rejected in messages": (("Hi?", "Yes.", [NO]), (ASKED, " Yes.", " No.")),
    "a system message": (([BRIEF, HI], [YES], [NO]), (TOLD, " Yes.", " No.")),
    "and whole dialogues": (("Hi?", [BRIEF, HI, YES], [BRIEF, HI, NO]), (TOLD, " Yes.", " No.")),
    "a longer talk": (([HI, YES, HI], [YES], [NO]), (TWICE, " Yes.", " No.")),
}

# Whole dialogues beside a prompt that they hold: it is not put in twice, whatever its spelling.
# The pair is always (ASKED, " Yes.", " No.").
SPELLED = {
    "the same": "Hi?",
    "a space more": " Hi? ",
    "a line end more": "Hi?\r\n",
    "a message": [HI],
    "a message with a line end": [HI | {"content": "Hi?\n"}],
    "HH's form": "\n\nHuman: Hi?\n\nAssistant:",
    "HH's form without an open turn": "\n\nHuman: Hi?",
    "HH's form, with a space more": "\n\nHuman: Hi?\n\nAssistant: ",
    "HH's form, line ends of Windows": "\r\n\r\nHuman: Hi?\r\n\r\nAssistant:",
    "an instruction that they lack": [BRIEF, HI],
    "an empty instruction": [BRIEF | {"content": ""}, HI],
    "that alone": [BRIEF],
}
IN_MESSAGES = ([HI, YES], [HI, NO])
IN_TEXTS = (ASKED + " Yes.", ASKED + " No.")
AGAIN = {"role": "user", "content": "And now?"}
LONG = ASKED + " Yes.\n\nHuman: And now?\n\nAssistant:"
COFFEE = {"role": "user", "content": "Caf\u00e9?"}  # the accent is part of the letter
PAIRS |= {
    "only their first turn": (
        ("Hi?", [HI, YES, AGAIN, YES], [HI, YES, AGAIN, NO]),
        (LONG, " Yes.", " No."),
    ),
    "only their last turn": (
        ("And now?", [HI, YES, AGAIN, YES], [HI, YES, AGAIN, NO]),
        (LONG, " Yes.", " No."),
    ),
    "all their turns": (
        ([HI, YES, AGAIN], [HI, YES, AGAIN, YES], [HI, YES, AGAIN, NO]),
        (LONG, " Yes.", " No."),
    ),
    "an accent by itself": (
        ("Cafe\u0301?", [COFFEE, YES], [COFFEE, NO]),
        ("\n\nHuman: Caf\u00e9?\n\nAssistant:", " Yes.", " No."),
    ),
    "an empty instruction in them": (
        ("Hi?", [BRIEF | {"content": ""}, HI, YES], [BRIEF | {"content": ""}, HI, NO]),
        ("\n\nSystem: " + ASKED, " Yes.", " No."),
    ),
    "HH's form, then messages": ((ASKED, [YES], [NO]), (ASKED, " Yes.", " No.")),
    "HH's form, then messages and texts": ((ASKED + " ", [YES], "No."), (ASKED, " Yes.", " No.")),
    "HH's form, then answers in it": (
        (ASKED, "\n\nAssistant: Yes.", [NO]),
        (ASKED, " Yes.", " No."),
    ),
    "HH's form, then texts": ((ASKED, " Yes.", " No."), (ASKED, " Yes.", " No.")),
}
WINDOWS_TEXTS = tuple(text.replace("\n", "\r\n") for text in IN_TEXTS)
PAIRS["in HH's form, with line ends of Windows"] = (
    ("Hi?", *WINDOWS_TEXTS),
    (ASKED, " Yes.", " No."),
)
for name, prompt in SPELLED.items():
    PAIRS[f"in messages, {name}"] = ((prompt, *IN_MESSAGES), (ASKED, " Yes.", " No."))
    PAIRS[f"in HH's form, {name}"] = ((prompt, *IN_TEXTS), (ASKED, " Yes.", " No."))

NO_FORM = "neither a text nor a list of messages"
NO_MESSAGE = "role and content"
NO_TEXT = "content of a message"
ROLES = "system, user, assistant"
TWO = "two dialogues"
SAME = "the same"
WHOLE = "only one of its two responses is a whole dialogue"
APART = "prompt is not in the turns"
NO_PAIRS = {  # prompt, if any, chosen and rejected -> words of the reason why the line is dropped
    "equal texts": (("Hi", "A", "A"), SAME),
    "equal dialogues": ((TALK + " A.", TALK + " A."), SAME),
    "equal messages": (([HI], [YES], [YES]), SAME),
    "a blank prompt": ((" \n", "A", "B"), "prompt is empty.*'prompt', 'chosen', 'rejected'"),
    "a blank response": (
        ("Hi", " \n", "B"),
        "chosen is empty.*'prompt', 'chosen', 'rejected'",
    ),
    "an empty response": (("Hi", "A", ""), "rejected is empty"),
    "null": (("Hi", "A", None), "rejected is empty"),
    "no prompt and no dialogue": (("A", "B"), "prompt is empty.*.'chosen', 'rejected'"),
    "a blank last response": ((TALK + " \n", TALK + " No."), "chosen is empty"),
    "a blank message": (([HI], [YES], [NO | {"content": " "}]), "rejected is empty"),
    "no message": (([HI], [YES], []), ""),  # whatever is said
    "nobody responds": (("\n\nHuman: Hi.", "\n\nHuman: Hi there."), ""),
    "no question in common": (("\n\nAssistant: A.", "?\n\nAssistant: B."), TWO),
    "a prompt that is a number": ((4, "A", "B"), NO_FORM),
    "a number": (("Hi", 4, "B"), NO_FORM),
    "an object": (("Hi", "A", {"text": "B"}), NO_FORM),
    "one dialogue is a number": ((TALK + " A.", 1), NO_FORM),
    "a number beside messages": (([HI], [YES], 7), ""),
    "one goes on for a turn": ((TALK + " A." + BACK, TALK + " D."), TWO),
    "the other goes on for a turn": ((TALK + " D.", TALK + " A." + BACK), TWO),
    "a person has the last word": ((TALK + " A.\n\nHuman: Thanks.", TALK + " B."), TWO),
    "rejected responds twice": ((TALK + " A.", TALK + " B.\n\nAssistant: C."), TWO),
    "chosen repeats the dialogue": ((ASKED + " A." + ASKED + " B.", ASKED + " C."), TWO),
    "they part early": ((TALK + " A.", "\n\nHuman: Hi.\n\nAssistant: Go away."), TWO),
    "the person answers": (([HI, YES, HI], [HI, NO, HI]), TWO),
    "only chosen is whole": (([HI], [HI, YES], [NO]), WHOLE),
    "only rejected is whole": (("Hi?", "Yes.", [HI, NO]), WHOLE),
    "only chosen is in HH's form": (("Hi?", ASKED + " Yes.", "No."), WHOLE),
    "only one, and no prompt": (([HI, YES], [NO]), WHOLE),
    "another question": (("Ho?", *IN_MESSAGES), APART),
    "another question in messages": (([AGAIN], *IN_MESSAGES), APART),
    "another question in HH's form": (("\n\nHuman: Ho?\n\nAssistant:", *IN_TEXTS), APART),
    "only part of the question": (("Hi", *IN_MESSAGES), APART),
    "a turn more": (([HI, YES, AGAIN], *IN_MESSAGES), APART),
    "turns that go on": (([HI, YES], *IN_MESSAGES), APART),
    "another order": (
        ([AGAIN, YES, HI], [HI, YES, AGAIN, YES], [HI, YES, AGAIN, NO]),
        APART,
    ),
    "the same turn twice": (([HI, HI], *IN_MESSAGES), APART),
    "said by somebody else": (([HI | {"role": "assistant"}], *IN_MESSAGES), APART),
    "whole, with an instruction for one": (("Hi?", [BRIEF, HI, YES], [HI, NO]), TWO),
    "an unknown role": (([HI], [YES], [NO | {"role": "tool"}]), f"role 'tool'.*{ROLES}"),
    "a role that is a list": (([HI], [YES], [NO | {"role": ["user"]}]), f"role .*{ROLES}"),
    "no role": (([HI], [YES], [{"content": "No."}]), f"role None.*{ROLES}"),
    "no content": (([HI], [YES], [{"role": "assistant"}]), NO_TEXT),
    "content that is no text": (([HI], [YES], [NO | {"content": [{"text": "No."}]}]), NO_TEXT),
    "content null": (([HI], [YES], [NO | {"content": None}]), NO_TEXT),
    "messages that are texts": (([HI], ["Yes."], ["No."]), NO_MESSAGE),
}


def as_line(texts):
    """Two texts are chosen and rejected, three begin with the prompt."""
    fields = ["prompt", "chosen", "rejected"]
    return dict(zip(fields[-len(texts) :], texts))


@pytest.mark.parametrize("case", PAIRS)
def test_every_form_of_a_pair(case, tmp_path):
    texts, wanted = PAIRS[case]
    path = write(tmp_path, GOOD, as_line(texts), "", OTHER)
    found, warned = with_warnings(load_pairs, path)
    assert found == [tuple(GOOD.values()), wanted, tuple(OTHER.values())]
    assert warned == []


@pytest.mark.parametrize("case", NO_PAIRS)
def test_a_line_without_a_pair_is_dropped_and_counted(case, tmp_path):
    """With the reason. If no other line is in the file, the reason is that of an error."""
    texts, reason = NO_PAIRS[case]
    line = as_line(texts)
    path = write(tmp_path, GOOD, "", line, line, OTHER)
    found, warned = with_warnings(load_pairs, path)
    assert found == [tuple(GOOD.values()), tuple(OTHER.values())]
    assert len(warned) == 1
    assert warned[0].startswith(f"{path}: lines dropped: 2; the first is line 3: ")
    assert re.search(reason, warned[0]), warned[0]
    path = write(tmp_path, "", line, line)
    with pytest.raises(InputError) as error:
        load_pairs(path)
    said = str(error.value)
    nothing = "no line has two different responses to one prompt"
    assert said.startswith(f"{path}: {nothing}; line 2: ")
    assert re.search(reason, said), said
    assert "\n" not in said


NOTHING = {  # a file -> words that are said of it
    "": "the file is empty",
    "\n \n": "the file is empty",
    "7": "line 1: .*not a JSON object",
    "null": "line 1: .*not a JSON object",
    '["prompt"]': "item 1: .*not a JSON object",
    '{"text": "Hi", "score": 7}': "line 1: .*prompt is empty.*'text', 'score'",
}


@pytest.mark.parametrize("content", NOTHING)
def test_a_file_without_a_pair_says_what_it_has(content, tmp_path):
    with pytest.raises(InputError, match=f"one prompt; {NOTHING[content]}"):
        load_pairs(write(tmp_path, content))


@pytest.mark.parametrize("start", ["", "\ufeff", " \n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_like_its_lines(start, indent, tmp_path):
    """As many data sets are stored. A line that holds a list is no array, but no pair either."""
    path = tmp_path / "pairs.json"
    array = json.dumps([GOOD, {"text": "no pair"}, OTHER], indent=indent)
    path.write_text(start + array, encoding="utf-8")
    found, warned = with_warnings(load_pairs, path)
    assert found == [tuple(GOOD.values()), tuple(OTHER.values())]
    assert len(warned) == 1
    assert "lines dropped: 1; the first is item 2: its prompt is empty" in warned[0]
    path.write_text(start + array[:-9], encoding="utf-8")
    with pytest.raises(InputError, match="pairs.json:1: not a line of JSON"):
        load_pairs(path)


def test_a_byte_order_mark_is_no_error(tmp_path):
    """Windows puts one before UTF-8."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + FIRST)
    assert load_pairs(path) == [tuple(GOOD.values())]


def test_fields_that_are_not_read_are_named_once(tmp_path):
    """An instruction in a field of its own changes what the better response is."""
    first = GOOD | {"system": "Be brief.", "score": 7}
    second = OTHER | {"history": [], "system": "Be long."}
    dropped = {"text": "no pair"}
    found, warned = with_warnings(load_pairs, write(tmp_path, first, dropped, second))
    assert found == [tuple(GOOD.values()), tuple(OTHER.values())]
    assert len(warned) == 2
    assert warned[1].endswith("fields that are not read: ['system', 'score', 'history']")


def test_many_fields_are_one_short_line(tmp_path):
    line = GOOD | {f"field\n{i}": i for i in range(1000)}
    _, warned = with_warnings(load_pairs, write(tmp_path, line))
    assert len(warned) == 1
    assert "\n" not in warned[0]
    assert len(warned[0]) < 400


def test_what_looks_odd_is_counted(tmp_path):
    """Repeated pairs, responses that repeat their prompt or spell an end token; none is changed."""
    reversed_pair = GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    lines = [GOOD, GOOD, GOOD, reversed_pair, reversed_pair]
    lines.append(GOOD | {"chosen": "0" + END})
    lines.append(GOOD | {"chosen": "1<|im_end|>\n"})
    lines.append(GOOD | {"rejected": "2</s>"})
    lines.append(GOOD | {"chosen": "2 + 2 = 4"})
    lines.append(GOOD | {"chosen": "2 + 2 = 4", "rejected": "2 + 2 ="})
    path = write(tmp_path, *lines)
    found, warned = with_warnings(load_pairs, path)
    assert found == [tuple(line.values()) for line in lines]
    assert warned == [
        f"{path}: pairs that repeat an earlier pair: 3",
        f"{path}: pairs that contradict an earlier pair: 1",
        f"{path}: responses that repeat their prompt: 3",
        f"{path}: end tokens spelled as text: 3",
    ]


SPACED = {  # prompt, if any, chosen and rejected -> the texts that reach the tokens
    "texts": ((" \tQ: \n", "\n A\r\n\n", " \u00a0B "), (" \tQ: \n", "\n A\r\n\n", " \u00a0B ")),
    "messages": (
        ([HI | {"content": "\n Hi? \n"}], [YES | {"content": " A\n\n"}], [NO | {"content": "B "}]),
        ("\n\nHuman: \n Hi? \n\n\nAssistant:", "  A\n\n", " B "),
    ),
    "a text and a message": (
        (" Hi? ", "\tA ", [NO | {"content": " B\n"}]),
        ("\n\nHuman:  Hi? \n\nAssistant:", " \tA ", "  B\n"),
    ),
    "dialogues": (
        ("\n\nHuman:  Hi? \n\n\nAssistant:  A \n", "\n\nHuman:  Hi? \n\n\nAssistant:\tB\n\n"),
        ("\n\nHuman:  Hi? \n\n\nAssistant:", "  A \n", "\tB\n\n"),
    ),
}


@pytest.mark.parametrize("case", SPACED)
def test_white_space_at_the_ends_reaches_the_tokens(case, tmp_path):
    texts, wanted = SPACED[case]
    pairs = load_pairs(write(tmp_path, as_line(texts)))
    row = encode_pairs(pairs, BYTES, 64)[0]
    prompt, chosen, rejected = wanted
    assert row.prompt == list(prompt.encode())
    assert row.chosen == list(chosen.encode()) + [256]
    assert row.rejected == list(rejected.encode()) + [256]
    assert row.text == prompt


def test_show_by_hand(tmp_path, capsys, monkeypatch):
    """python data.py pairs.jsonl: the first pair's tokens, [scored] or not."""
    path = write(tmp_path, {"prompt": "Q:", "chosen": "no\n", "rejected": "y"}, GOOD)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored afterwards
    monkeypatch.setattr(sys, "argv", ["data.py", str(path)])
    runpy.run_path(data.__file__, run_name="__main__")
    chosen = f"chosen: 'Q' ':' ['n'] ['o'] ['\\n'] ['{END}'] and 0 of padding\n"
    rejected = f"rejected: 'Q' ':' ['y'] ['{END}'] and 2 of padding\n"
    assert capsys.readouterr().out == f"{chosen}\n{rejected}\n"
    for arguments, says in (
        ([], "^usage: python data.py pairs.jsonl .tokenizer.$"),
        ([str(path), "bytes", "more"], "^usage: "),
        (["missing.jsonl"], "^data.py: .*missing.jsonl"),
        ([str(path), "klingon"], "^data.py: tokenizer klingon"),
        ([str(write(tmp_path, "{"))], "^data.py: .*pairs.jsonl:1: not a line of JSON"),
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
        with pytest.raises(SystemExit, match=says):
            runpy.run_path(data.__file__, run_name="__main__")


def test_show_warns_in_one_line(tmp_path):
    """Without the line of Python that called."""
    path = write(tmp_path, GOOD, {"prompt": "Q:"})
    command = [sys.executable, data.__file__, path]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {path}: lines dropped: 1; the first is line 2"), line


def test_a_csv_file_is_told_of_the_recipe(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,chosen,rejected\nQ:,yes,no\n", encoding="utf-8")
    with pytest.raises(InputError, match="mine.csv:1: not JSON: python -m experiments.recipes"):
        load_pairs(path)


def test_show_puts_bytes_together_to_characters(tmp_path, capsys):
    """A letter of Hebrew has two bytes, of Thai three, an emoji four."""
    pair = {"prompt": "\u05d0:", "chosen": "\u0e01\u0e01", "rejected": "\U0001f642!"}
    data.show(write(tmp_path, pair))
    chosen, rejected = capsys.readouterr().out.strip().split("\n\n")
    assert chosen == f"chosen: '\u05d0' ':' ['\u0e01'] ['\u0e01'] ['{END}'] and 0 of padding"
    assert rejected == f"rejected: '\u05d0' ':' ['\U0001f642'] ['!'] ['{END}'] and 1 of padding"


def test_show_where_a_prompt_is_cut_within_a_character(tmp_path, capsys):
    """Its second byte is shown by itself, and nothing after it is lost."""
    pair = {"prompt": "\u05d0" + "x" * 1020, "chosen": "ab", "rejected": "c"}
    with pytest.warns(UserWarning, match="cut"):
        data.show(write(tmp_path, pair))
    shown = capsys.readouterr().out.split()
    assert shown[:3] == ["chosen:", "'\ufffd'", "'x'"]
    number = shown.count("'x'")
    assert number == 2 * 1020


# Tokens


def test_tokenizers(monkeypatch):
    text = "naïve 🙂\n\tx<|endoftext|>"
    assert BYTES.encode_ordinary(text) == list(text.encode())
    assert BYTES.decode(list(text.encode())) == text
    assert BYTES.eot_token == 256
    assert BYTES.n_vocab == 257
    words = WORLD.tokenizer.encode_ordinary(" The film was not very dull")
    assert words == [0, 2, 1, 8, 9, 5], "a token of the toy world is a word and the space before it"
    with pytest.raises(InputError, match="tokenizer klingon: not one of bytes, .*gpt2"):
        data.get_tokenizer("klingon")
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: f"tiktoken's {name}")
    assert data.get_tokenizer("gpt2") == "tiktoken's gpt2"
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: 1 / 0)
    with pytest.raises(InputError, match="gpt2: .*download failed .ZeroDivisionError.*use bytes"):
        data.get_tokenizer("gpt2")


TINY = GPTConfig(vocab_size=257, n_positions=8, n_embd=4, n_layer=1, n_head=1, eos_token_id=256)


def spelled(text):
    """GPT-2's files write a space as \u0120, a line end as \u010a, the byte 0xad as \u0143."""
    for byte, letter in ((" ", "\u0120"), ("\n", "\u010a"), ("\xad", "\u0143")):
        text = text.replace(byte, letter)
    return text


def vocabulary(**changed):
    """{text: id} of the tokenizer "bytes". `changed` gives other texts to some of A to Z."""
    texts = [chr(byte) for byte in range(33, 127)]
    texts += [" ", "\n", "\xad", "\xae", "\xff"]
    ids = {spelled(changed.get(text, text)): ord(text) for text in texts}
    return ids | {END: 256}


def store(folder, name, vocab):
    if name == "tokenizer.json":
        vocab = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab}}
    (folder / name).write_text(json.dumps(vocab), encoding="utf-8")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_folder_with_the_same_tokenizer(name, tmp_path):
    """Also if it has ids beyond the model's vocabulary, which no text contains."""
    store(tmp_path, name, vocabulary() | {"<pad>": 257, "<mask>": -1})
    data.check_tokenizer(tmp_path, TINY, BYTES)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("changed", [{"A": "B", "B": "A"}, {"z": "\u0141"}])
def test_a_folder_with_another_tokenizer_is_refused(name, changed, tmp_path):
    """One of the same size, as a GPT-2 of another language may have it."""
    store(tmp_path, name, vocabulary(**changed))
    says = " was trained with another tokenizer than bytes: its token .* is .*, not "
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}{says}"):
        data.check_tokenizer(tmp_path, TINY, BYTES)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "7", '{"model": {"vocab": [["a", -1.5]]}}', '{"a": "b"}'])
def test_a_vocabulary_of_another_form_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=f"{name} is not the vocabulary of a GPT-2"):
        data.check_tokenizer(tmp_path, TINY, BYTES)


@pytest.mark.parametrize("end", [256, 257, 50256, -1, None])
def test_the_same_end_token_or_none(end, tmp_path):
    data.check_tokenizer(tmp_path, replace(TINY, eos_token_id=end), BYTES)


@pytest.mark.parametrize("end", [0, 255])
def test_another_end_token_is_refused(end, tmp_path):
    says = f"with another tokenizer than bytes: its end token is {end}, not 256"
    with pytest.raises(InputError, match=says):
        data.check_tokenizer(tmp_path, replace(TINY, eos_token_id=end), BYTES)


def test_responses_end_in_the_end_token():
    rows = encode_pairs([Pair("ab", "c", ""), Pair("a", "bc", END)], BYTES, 16)
    assert rows[0] == ([97, 98], [99, 256], [256], "ab"), "an empty one is the end token alone"
    spelled = list(END.encode()) + [256]
    assert rows[1] == ([97], [98, 99, 256], spelled, "a"), "and one in a text is text"


def test_no_token_straddles_the_boundary():
    """In this tokenizer "ab" is one token, but not where it ends the prompt."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks[b"ab"] = 256
    tokenizer = data.tiktoken.Encoding(
        "pairs", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={END: 257}
    )
    assert tokenizer.encode_ordinary("ab") == [256]
    (row,) = encode_pairs([Pair("xa", "b", "ab")], tokenizer, 16)
    assert row == ([120, 97], [98, 257], [256, 257], "xa")


def test_long_prompts_are_cut_on_the_left():
    """Until the longer response fits. `text` stays whole, for `split`."""
    pairs = [
        Pair("123abcde", "xy", "z"),
        Pair("45abcde", "y", "xz"),
        Pair("a", "z", "xxxxxx"),
    ]
    rows, warned = with_warnings(encode_pairs, pairs, BYTES, 8)
    assert [bytes(row.prompt) for row in rows] == [b"abcde", b"abcde", b"a"]
    assert [row.text for row in rows] == ["123abcde", "45abcde", "a"]
    assert warned == ["prompts cut on the left to fit 8 tokens: 2"]
    exactly = [pair._replace(prompt=pair.prompt[-5:]) for pair in pairs]
    again, warned = with_warnings(encode_pairs, exactly, BYTES, 8)
    assert [row[:3] for row in again] == [row[:3] for row in rows]
    assert warned == [], "what fits exactly is neither cut nor dropped"


@pytest.mark.parametrize("pair", [("a", "x" * 7, "z"), ("a", "z", "x" * 7), ("", "x", "z")])
def test_pairs_that_do_not_fit_are_dropped(pair):
    bad = Pair(*pair)
    good = Pair("a", "z", "x" * 6)
    rows, warned = with_warnings(encode_pairs, [bad, good, bad], BYTES, 8)
    assert rows == encode_pairs([good], BYTES, 8)
    assert warned == ["pairs dropped, too long for 8 tokens: 2"]
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no pair fits into 8 tokens"):
        encode_pairs([bad], BYTES, 8)


# Splits, batches, rows


def row_of(text, number=0):
    return TokenPair([1], [number, 2], [3], text)


SPLITS = [  # prompts, fraction, prompts held out
    (10, 0.0, 0),
    (10, 0.21, 3),
    (10, 0.3, 3),
    (10, 0.95, 9),
    (10, 1.0, 9),
    (2, 0.1, 1),
    (1, 0.0, 0),
    (1, 0.1, 0),
    (1, 1.0, 0),
]


@pytest.mark.parametrize("prompts, fraction, n", SPLITS)
def test_split_by_prompt(prompts, fraction, n):
    """n of the prompts are held out, with all their pairs, and at least one never is."""
    rows = [row_of(f"prompt {i % prompts}", i) for i in range(25)]
    ever = set()
    for seed in range(40):
        sides, warned = with_warnings(data.split, rows, fraction, seeded(seed))
        train, held_out = sides
        chosen = {row.text for row in held_out}
        assert len(chosen) == n, "a fraction of the prompts, rounded up, but one is trained on"
        assert held_out == [row for row in rows if row.text in chosen], "with all its pairs"
        assert train == [row for row in rows if row.text not in chosen], "one side only"
        if fraction > 0 and n == 0:
            assert warned == ["there is only one prompt, so no pair is held out"]
        elif len(held_out) > len(train):
            assert warned == [f"{len(held_out)} of 25 pairs are held out, more than half"]
        else:
            assert warned == []
        again, _ = with_warnings(data.split, rows, fraction, seeded(seed))
        assert again == sides, "the seed alone decides"
        ever |= chosen
    if n > 0:
        assert len(ever) == prompts, "any prompt may be held out"


def test_half_of_the_pairs_may_be_held_out_without_a_warning():
    rows = [row_of(text) for text in ("a", "b", "c", "d")]
    sides, warned = with_warnings(data.split, rows, 0.5, seeded(0))
    assert [len(side) for side in sides] == [2, 2]
    assert warned == []


def test_near_duplicates_are_on_one_side():
    """Prompts that differ in case and white space only."""
    alike = [
        ["What is it?", "what  IS it?\n", " what is it ?", "WHAT\tis\u00a0it?", "What is it?"],
        ["Straße", "STRASSE", "stras se"],
        ["a", "A", " a "],
        ["a?", "A ?"],
    ]
    rows = [row_of(text, i) for i, texts in enumerate(alike) for text in texts]
    for seed in range(20):
        train, held_out = data.split(rows, 0.25, seeded(seed))
        numbers = {row.chosen[0] for row in held_out}
        assert len(numbers) == 1, "one of the four prompts"
        assert held_out == [row for row in rows if row.chosen[0] in numbers]
        assert train == [row for row in rows if row.chosen[0] not in numbers]


def test_a_prompt_that_was_cut_is_still_known():
    """Two prompts with one end are two; and one that is cut differently twice is one."""
    pairs = [
        Pair("1 abcd", "x", "y"),
        Pair("2 abcd", "x", "y"),
        Pair("1 abcd", "xxx", "y"),
    ]
    rows, _ = with_warnings(encode_pairs, pairs, BYTES, 6)
    assert rows[0].prompt == rows[1].prompt != rows[2].prompt
    for seed in range(10):
        sides, _ = with_warnings(data.split, rows, 0.5, seeded(seed))
        assert sorted(len(side) for side in sides) == [1, 2]
        assert [rows[0], rows[2]] in sides


def test_what_does_not_fit_has_no_part_in_the_split():
    """Ten pairs, one of them too long: nine rows, one held out, whatever the seed."""
    pairs = [Pair(f"prompt {i}", "yes", "no") for i in range(10)]
    pairs[4] = Pair("prompt 4", "y" * 99, "no")
    rows, warned = with_warnings(encode_pairs, pairs, BYTES, 32)
    assert warned == ["pairs dropped, too long for 32 tokens: 1"]
    for seed in range(40):
        train, held_out = data.split(rows, 0.1, seeded(seed))
        assert len(train) == 8
        assert len(held_out) == 1


def epochs_of(size, seed=0, length=lambda i: 1):
    """The pairs in batches of this size, in three epochs of ten pairs."""
    rows = [TokenPair([1], [0] * length(i), [0]) for i in range(10)]
    stream = data.batches(rows, size, seeded(seed))
    found = [next(stream) for _ in range(math.ceil(30 / size))]
    assert all(batch.shape == (size,) for batch in found), "(batch_size,), the last one too"
    return torch.cat(found)[:30].tolist()


@pytest.mark.parametrize("size", [1, 4, 5, 10, 15])
def test_batches_hold_every_pair_once_an_epoch(size):
    """The remainder of an epoch is carried into the next; the order is the seed's alone."""
    order = epochs_of(size)
    epochs = [order[:10], order[10:20], order[20:]]
    in_order = list(range(10))
    for epoch in epochs:
        assert sorted(epoch) == in_order
        assert epoch != in_order
    assert epochs[0] != epochs[1] != epochs[2], "each epoch has an order of its own"
    assert order == epochs_of(1), "the order does not depend on the size of a batch"
    assert order != epochs_of(size, seed=1), "it follows from the seed"


@pytest.mark.parametrize("size", [1, 5, 10, 15])
@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_rows_of_similar_length_are_neighbours_within_a_batch(size, part):
    """The same batches as without lengths; pair i is the longer, the smaller i is."""
    rows = []
    for i in range(10):
        row = TokenPair([1], [0], [0])
        rows.append(row._replace(**{part: [0] * (20 - i)}))
    stream = data.batches(rows, size, seeded(0))
    order = epochs_of(size)
    for first in range(0, 30, size):
        batch = order[first : first + size]
        assert next(stream).tolist() == sorted(batch, reverse=True)


TWO_PAIRS = [
    TokenPair([5, 6], [7, 8, 0], [9, 0]),
    TokenPair([5], [0], [1, 2, 0]),
]
COLLATED = {  # the pairs -> ids and mask, all chosen rows first, then all rejected rows
    (0, 1): ("56780 50000 56900 51200", "00111 01000 00110 01110"),
    (1, 0): ("50000 56780 51200 56900", "01000 00111 01110 00110"),
    (1, 1): ("5000 5000 5120 5120", "0100 0100 0111 0111"),
}
COLLATED_SFT = {  # the same without rejected responses
    (0, 1): ("56780 50000", "00111 01000"),
    (1, 0): ("50000 56780", "01000 00111"),
    (1, 1): ("50 50", "01 01"),
}


def digits(tensor):
    return " ".join("".join(map(str, row)) for row in tensor.int().tolist())


@pytest.mark.parametrize("pair_ids", COLLATED, ids=str)
def test_collate_by_hand(pair_ids):
    ids, mask = data.collate(TWO_PAIRS, pair_ids)
    assert (digits(ids), digits(mask)) == COLLATED[pair_ids]
    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool
    sft = [row._replace(rejected=[]) for row in TWO_PAIRS]
    ids, mask = data.collate(sft, pair_ids)
    assert (digits(ids), digits(mask)) == COLLATED_SFT[pair_ids]


def test_nothing_changes_what_it_is_given():
    pairs = [Pair("ab" * 9, "c", "de"), Pair("f", "g" * 6, "h")]
    rows = encode_pairs([Pair("a", "b", "c"), Pair("d", "ef", "g")], BYTES, 16)
    logps = torch.full((2, 1111), -math.log(1111), dtype=torch.float64)
    drawn = WORLD.draw_pairs(logps, 9, seeded(0))
    given = [pairs, rows, drawn, WORLD.response_ids, WORLD.prompt_ids]
    kept = copy.deepcopy(given)
    before = logps.clone()
    with_warnings(encode_pairs, pairs, BYTES, 12)
    with_warnings(data.split, rows, 0.5, seeded(0))
    data.collate(rows, [1, 0])
    next(data.batches(rows, 2, seeded(0)))
    WORLD.draw_pairs(logps, 9, seeded(0))
    WORLD.rows(drawn)
    WORLD.corpus(seeded(0), n=9)
    WORLD.measure(logps, logps, 1.0)
    assert str(given) == str(kept), "an argument, or the world, is changed in place"
    assert torch.equal(logps, before)


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


def test_rewards_by_hand():
    for response, wanted in REWARDS.items():
        found = WORLD.rewards[:, PLACE[response]].tolist()
        assert found == list(wanted), response
    assert WORLD.rewards.shape == (2, 1111)
    assert WORLD.rewards.dtype == torch.float64
    lengths = torch.tensor([len(y.split()) for y in WORLD.responses]).double()
    for rewards in WORLD.rewards:
        correlation = torch.stack([rewards, lengths]).corrcoef()[0, 1]
        assert correlation.abs() < 0.1, "length must not decide the reward"


def test_every_response_is_listed():
    """1 + 10 + 100 + 1000 different responses; below 3 words with the end token, 10."""
    assert len(WORLD.responses) == 1111
    assert len(PLACE) == 1111
    assert WORLD.prompts == [" The film was", " The hotel was"]
    assert WORLD.prompt_ids.tolist() == [[0, 2, 1], [0, 3, 1]]
    for response, ids in zip(WORLD.responses, WORLD.response_ids, strict=True):
        wanted = [WORDS.index(word) for word in response.split()]
        if len(wanted) < 3:
            wanted.append(10)
        assert ids == wanted, response
    grammatical = itertools.product(["", " not"], ["", " very"], WORDS[4:8])
    sentences = {f"{no}{very} {word}" for no, very, word in grammatical}
    assert {WORLD.responses[i] for i in WORLD.grammatical.nonzero()} == sentences


def corpus_law(slip):
    """The probability of each response in the corpus, in the order of WORLD.responses: (1111,)."""
    sentences = []
    for sentence in itertools.product([[], [8]], [[], [9]], [[4], [5], [6], [7]]):
        tokens = sum(sentence, [])
        sentences.append((tokens + [10, 10])[:3])
    stay = torch.nn.functional.one_hot(torch.tensor(sentences), 11).double()  # (16, 3, 11)
    a, b, c = ((1 - slip) * stay + slip / 11).unbind(1)
    joint = torch.einsum("sa,sb,sc->abc", a, b, c) / 16
    empty = joint[10].sum().view(1)
    one = joint[:10, 10].sum(-1)
    two = joint[:10, :10, 10].flatten()
    three = joint[:10, :10, :10].flatten()
    return torch.cat([empty, one, two, three])


@pytest.mark.parametrize("slip", [0.2, 0.0, 1.0])
def test_corpus_follows_its_law(slip):
    """16 sentences, equally likely; each of 3 tokens slips, to any of the 11; cut after END."""
    if slip == 0.2:  # the default
        corpus = WORLD.corpus(seeded(0))
    else:
        corpus = WORLD.corpus(seeded(0), slip=slip)
    assert not any(row.rejected for row in corpus)
    no_first_token = [0, 1, 2, 3, 10]  # of a sentence
    slipped = [row for row in corpus if row.chosen[0] in no_first_token]
    expect(len(slipped) / 20_000, slip * 5 / 11, "5 of the 11 tokens are such slips", 0.007)
    place = {tuple(ids): y for y, ids in enumerate(WORLD.response_ids)}
    for prompt in WORLD.prompt_ids.tolist():
        drawn = [place[tuple(row.chosen)] for row in corpus if row.prompt == prompt]
        assert len(drawn) == 10_000, "each prompt gets half"
        assert_drawn_from(corpus_law(slip), torch.tensor(drawn))


def test_the_corpus_follows_from_the_seed():
    corpus = WORLD.corpus(seeded(0), n=99)
    torch.rand(1)  # the global generator has no say
    assert WORLD.corpus(seeded(0), n=99) == corpus
    assert WORLD.corpus(seeded(1), n=99) != corpus


def test_the_better_response_wins_by_bradley_terry():
    uniform = torch.full((2, 1111), -math.log(1111), dtype=torch.float64)
    x, chosen, rejected = WORLD.draw_pairs(uniform, 200_000, seeded(0))
    lead = WORLD.rewards[x, chosen] - WORLD.rewards[x, rejected]
    for gap in (0.5, 1.0, 2.0):
        near = lead[(lead.abs() - gap).abs() < 0.01]
        noise = 2 / math.sqrt(len(near))  # 4 standard errors of a coin
        wins = (near > 0).double().mean()
        why = f"Eq. 1: of two responses {gap} apart the better one wins with sigma({gap})"
        expect(wins, 1 / (1 + math.exp(-gap)), why, noise + 0.002)


def test_no_response_is_drawn_for_two_pairs():
    """Neighbours share one about as rarely as any two pairs do: 4 times in 1,111."""
    uniform = torch.full((2, 1111), -math.log(1111), dtype=torch.float64)
    _, chosen, rejected = WORLD.draw_pairs(uniform, 20_000, seeded(0))
    pairs = torch.stack([chosen, rejected], dim=1)
    same = pairs[:-1, :, None] == pairs[1:, None, :]  # (n - 1, 2, 2)
    share = same.any(-1).any(-1).double().mean()
    expect(share, 4 / 1111, "how often neighbouring pairs share a response", 0.003)


def test_pairs_come_from_the_policy_and_the_seed():
    """The two responses are independent, and equal ones are kept."""
    probs = [{3: 0.75, 7: 0.25}, {53: 0.1, 57: 0.9}]
    logps = torch.full((2, 1111), -torch.inf, dtype=torch.float64)
    law = {}
    for x in (0, 1):
        for y, p in probs[x].items():
            logps[x, y] = math.log(p)
            for z, q in probs[x].items():
                beats = torch.sigmoid(WORLD.rewards[x, y] - WORLD.rewards[x, z])  # Eq. 1
                law[x, y, z] = p * q * beats.item()
    draws = []
    for seed in (0, 0, 1):
        torch.rand(1)  # the global generator has no say
        drawn = WORLD.draw_pairs(logps, 8000, seeded(seed))
        draws.append(list(zip(*[column.tolist() for column in drawn])))
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert set(draws[0]) <= set(law)
    places = [list(law).index(pair) for pair in draws[0]]
    assert_drawn_from(torch.tensor(list(law.values())), torch.tensor(places))
    drawn = WORLD.draw_pairs(logps, 1, seeded(0))
    assert len(drawn.chosen) == 1, "a prompt may get no pair"


def test_rows_by_hand():
    prompt = torch.tensor([1, 0])
    chosen = torch.tensor([PLACE[" not very dull"], 0])
    rejected = torch.tensor([PLACE[" dull"], 1110])
    rows = WORLD.rows(Drawn(prompt, chosen, rejected))
    assert rows[0][:3] == ([0, 3, 1], [8, 9, 5], [5, 10])
    assert rows[1][:3] == ([0, 2, 1], [10], [9, 9, 9])


def test_logps_of_every_response_are_exact():
    """They sum to 1, and each is a sum over its own tokens, computed one response at a time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 8, 16, 1, 2)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    kept = copy.deepcopy(model)
    logps = WORLD.logps(model)
    assert logps.shape == (2, 1111)
    assert not logps.requires_grad
    expect(logps.exp().sum(-1), [1.0, 1.0], "the listed responses are all there is")
    for x in (0, 1):
        for y in range(0, 1111, 10):
            ids = WORLD.prompt_ids[x].tolist() + WORLD.response_ids[y]
            table = model(torch.tensor([ids]))[0].log_softmax(-1)
            alone = 0.0
            for t in range(3, len(ids)):
                alone += table[t - 1, ids[t]]
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
    logps = torch.full((2, 1111), -torch.inf, dtype=torch.float64)
    ref = logps.clone()
    for x, two in enumerate([(" good", " dull"), (" good", "")]):
        places = [PLACE[y] for y in two]
        logps[x, places] = p[x].log()
        ref[x, places] = q[x].log()
    best = q * (r / beta).exp()  # (4), before its normaliser
    best /= best.sum(-1, keepdim=True)
    reward = (p * r).sum(-1)
    kl = (p * (p / q).log()).sum(-1)
    missing = (p * (p / best).log()).sum(-1)
    gap = (q * (q / best).log()).sum(-1)
    kept = [logps.clone(), ref.clone(), WORLD.rewards.clone()]
    for prompts in (slice(None), slice(0, 1), slice(1, 2)):
        to_optimum = missing[prompts].mean().item()
        wanted = {
            "expected_reward": reward[prompts].mean().item(),
            "kl": kl[prompts].mean().item(),
            "objective": (reward - beta * kl)[prompts].mean().item(),
            "kl_to_optimum": to_optimum,
            "gap_closed": 1 - to_optimum / gap[prompts].mean().item(),
        }
        assert WORLD.measure(logps, ref, beta, prompts) == pytest.approx(wanted), prompts
    row = WORLD.measure(logps, ref, beta)
    assert row == WORLD.measure(logps, ref, beta, slice(None)), "all prompts, if none is named"
    assert all(type(value) is float for value in row.values())
    assert all(map(torch.equal, kept, (logps, ref, WORLD.rewards))), "an argument is changed"


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_measure_says_what_the_paper_says(beta):
    """J(pi*) - J(pi) = beta KL(pi || pi*), and so gap closed is the fraction of J gained."""
    ref, noise = torch.randn(2, 2, 1111, generator=seeded(0)).double().log_softmax(-1)
    best = (ref + WORLD.rewards / beta).log_softmax(-1)  # (4)
    start = WORLD.measure(ref, ref, beta)
    end = WORLD.measure(best, ref, beta)
    row = WORLD.measure((best + noise).log_softmax(-1), ref, beta)
    assert start["gap_closed"] == 0, "the reference has closed nothing"
    assert start["kl"] == 0
    expect([end["gap_closed"], end["kl_to_optimum"]], [1.0, 0.0], "pi* has closed all", 1e-12)
    missed = end["objective"] - row["objective"]
    expect(missed, beta * row["kl_to_optimum"], "J(pi*) - J(pi) = beta KL(pi || pi*)", 1e-9)
    gained = 1 - missed / (end["objective"] - start["objective"])
    expect(row["gap_closed"], gained, "gap closed: (J(pi) - J(ref)) / (J(pi*) - J(ref))", 1e-9)


def test_gap_closed_where_there_is_no_gap():
    """A reference that is sure of one response is its own optimum: no 0 / 0."""
    sure = torch.full((2, 1111), -torch.inf, dtype=torch.float64)
    sure[:, 7] = 0.0
    assert math.isfinite(WORLD.measure(sure, sure, 1.0)["gap_closed"])
