"""Reading pairs, encoding them, the pair row, the order of batches, and the toy world."""

import copy
import json
import math
import warnings

import pytest
import torch

import dpo
from data import (
    END,
    Drawn,
    InputError,
    Pair,
    TokenPair,
    ToyWorld,
    batches,
    collate,
    encode_pairs,
    get_tokenizer,
    load_pairs,
)
from model import GPT, GPTConfig
from test_dpo import expect

GOOD = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}


def write(tmp_path, *lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_load_pairs(tmp_path):
    assert load_pairs(write(tmp_path, GOOD, "", GOOD)) == [Pair("2 + 2 =", "4", "5")] * 2


@pytest.mark.parametrize(
    "bad, says",
    [
        ("{", "not a line of JSON"),
        ("[1]", "not a JSON object"),
        ("12", "not a JSON object"),
        ("[" * 100_000, "not a line of JSON"),
        ({"prompt": "a", "chosen": "b"}, '"rejected"'),
        (GOOD | {"chosen": ""}, '"chosen"'),
        (GOOD | {"chosen": "  \n"}, '"chosen"'),
        (GOOD | {"prompt": None}, '"prompt"'),
        (GOOD | {"rejected": ["5"]}, '"rejected"'),
    ],
)
def test_load_pairs_names_file_and_line(tmp_path, bad, says):
    path = write(tmp_path, GOOD, bad)
    with pytest.raises(InputError) as error:
        load_pairs(path)
    assert f"{path}:2" in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)


TALK = "\n\nHuman: Hi.\n\nAssistant: Hello. Assistant: here.\n\nHuman: Why?\n\nAssistant:"
DIALOGUES = {  # chosen, rejected, the pair; None if it is dropped
    "they differ in the last answer": (TALK + " Since.", TALK + " No.", (TALK, " Since.", " No.")),
    "they begin alike": (TALK + " Yes, A.", TALK + " Yes, B.", (TALK, " Yes, A.", " Yes, B.")),
    "one answer begins the other": (TALK + " A.", TALK + " A. B", (TALK, " A.", " A. B")),
    "nothing in common but the question": (TALK + "X", TALK + " Y", (TALK, "X", " Y")),
    "an empty last answer": (TALK + " Yes.", TALK, None),
    "a blank last answer": (TALK + " \n", TALK + " No.", None),
    "one goes on for a turn": (TALK + " A.\n\nHuman: B?\n\nAssistant: C.", TALK + " D.", None),
    "they part early": (TALK + " A.", "\n\nHuman: Hi.\n\nAssistant: Go away.", None),
    "they differ at once": (TALK + " A.", "?" + TALK + " B.", None),
    "no question at all": ("\n\nAssistant: A.", "?\n\nAssistant: B.", None),
    "a person has the last word": (TALK + " A.\n\nHuman: Thanks.", TALK + " B.", None),
    "chosen answers twice": (TALK + " A.\n\nAssistant: C.", TALK + " B.", None),
    "rejected answers twice": (TALK + " A.", TALK + " B.\n\nAssistant: C.", None),
    "one has no answer, nor a turn for it": (TALK + " A.", "\n\nHuman: Hi.", None),
    "neither the other": ("\n\nHuman: Hi.", TALK + " A.", None),
    "another question": (TALK.replace("Why", "Where") + " A.", TALK + " B.", None),
}


@pytest.mark.parametrize("case", DIALOGUES)
def test_dialogues(case, tmp_path):
    """Anthropic's form: prompt and answer together rebuild each text, or the row is dropped."""
    chosen, rejected, wanted = DIALOGUES[case]
    rows = [(TALK + " 1", TALK + " 2"), (chosen, rejected), (TALK + " 3", TALK + " 4")]
    path = write(tmp_path, *({"chosen": w, "rejected": l} for w, l in rows))
    if wanted is None:
        with pytest.warns(UserWarning, match="pairs dropped, .*: 1, first in line 2"):
            pairs = load_pairs(path)
        assert pairs == [(TALK, " 1", " 2"), (TALK, " 3", " 4")]
    else:
        prompt, *answers = pair = load_pairs(path)[1]
        assert pair == wanted and [prompt + answer for answer in answers] == [chosen, rejected]


def test_equal_dialogues_are_counted(tmp_path):
    rows = [{"chosen": TALK + " A.", "rejected": TALK + f" {x}."} for x in "AB"]
    with pytest.warns(UserWarning, match="dropped.*: 1, first in line 1"):
        assert load_pairs(write(tmp_path, *rows)) == [(TALK, " A.", " B.")]


def test_a_dialogue_must_be_text(tmp_path):
    path = write(tmp_path, {"chosen": 1, "rejected": TALK + " B."})
    with pytest.raises(InputError, match=':1: "chosen" must be a string'):
        load_pairs(path)


@pytest.mark.parametrize("given", [{"prompt": "Hi"}, {"chosen": "A", "rejected": "B"}])
def test_what_is_no_dialogue_stays_as_it_is(given, tmp_path):
    """With a prompt, or where no text has an "Assistant:": three fields are asked for."""
    record = {"chosen": TALK + " A.", "rejected": TALK + " B."} | given
    path = write(tmp_path, record)
    if "prompt" in given:
        assert load_pairs(path) == [("Hi", record["chosen"], record["rejected"])]
    else:
        with pytest.raises(InputError, match=':1: "prompt"'):
            load_pairs(path)


def test_load_pairs_refuses_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(InputError, match=":2"):
        load_pairs(path)


def test_equal_answers_are_counted_and_dropped(tmp_path):
    with pytest.warns(UserWarning, match="dropped.*: 2, first in line 2"):
        assert (
            len(load_pairs(write(tmp_path, GOOD, GOOD | {"chosen": "5"}, GOOD | {"chosen": "5"})))
            == 1
        )
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no usable pair"):
        load_pairs(write(tmp_path, GOOD | {"chosen": "5"}))
    with pytest.raises(InputError, match="no usable pair"):
        load_pairs(write(tmp_path, ""))


def test_bytes_keep_any_text():
    tokenizer = get_tokenizer("bytes")
    text = "naïve 🙂\n\tx<|endoftext|>"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.eot_token == 256 and tokenizer.n_vocab == 257


def test_toy_words():
    tokenizer = ToyWorld().tokenizer
    ids = tokenizer.encode_ordinary(" The film was not very dull")
    assert len(ids) == 6 and tokenizer.decode(ids) == " The film was not very dull"
    for text in (" The film was splendid", "The film", " The  film", " The film\n"):
        with pytest.raises(InputError, match="not a word of the toy world"):
            tokenizer.encode_ordinary(text)


def test_unknown_tokenizer():
    with pytest.raises(InputError, match="bytes"):
        get_tokenizer("klingon")


def test_prompt_and_answers_are_encoded_apart_and_closed():
    rows = encode_pairs([Pair("ab", "c", ""), Pair("a", "bc", "d")], get_tokenizer("bytes"), 16)
    assert rows[0] == ([97, 98], [99, 256], [256])  # an empty answer is the end token alone
    assert rows[1] == ([97], [98, 99, 256], [100, 256])


def test_toy_answers_of_k_words_have_no_end():
    world = ToyWorld()
    encode, place = world.tokenizer.encode_ordinary, world.answers.index
    drawn = torch.tensor([[2], [place(" not very dull")], [place(" dull")], [1]])
    (row,) = world.rows(Drawn(*drawn))
    assert row == (encode(" The curry was"), encode(" not very dull"), [*encode(" dull"), world.W])
    (row,) = world.rows(Drawn(*torch.tensor([[0], [0], [len(world.answers) - 1], [1]])))
    assert row == (encode(" The film was"), [world.W], encode(" quite quite quite"))


def test_long_prompts_are_cut_on_the_left_exactly():
    with pytest.warns(UserWarning, match="cut on the left.*: 1"):
        (row,) = encode_pairs([Pair("abcdefgh", "xy", "z")], get_tokenizer("bytes"), 8)
    assert bytes(row.prompt) == b"defgh" and len(row.prompt) + len(row.chosen) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what fits exactly is neither cut nor warned of
        encode_pairs([Pair("defgh", "xy", "z")], get_tokenizer("bytes"), 8)


def test_answers_are_never_cut():
    pairs = [Pair("a", "x" * 7, "z"), Pair("a", "z", "x" * 6)]
    with pytest.warns(UserWarning, match="pairs dropped.*: 1"):
        (row,) = encode_pairs(pairs, get_tokenizer("bytes"), 8)
    assert len(row.rejected) == 7
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no pair fits"):
        encode_pairs(pairs[:1], get_tokenizer("bytes"), 8)
    with pytest.warns(UserWarning, match="fills"), pytest.raises(InputError, match="no pair"):
        encode_pairs([Pair("", "x", "z")], get_tokenizer("bytes"), 8)


def test_pair_row_by_hand():
    """Prompt of 2 tokens, chosen of 3, rejected of 2, beside a shorter row."""
    rows = [TokenPair([5, 6], [7, 8, 0], [9, 0]), TokenPair([5], [0], [1, 0])]
    batch = collate(rows, [0, 1])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [5, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [7, 8, 0, 0, 9, 0, 1, 0]
    assert batch.owner.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.score_at[batch.logits_row].tolist() == [1, 2, 3, 5, 1, 4, 5, 6]
    assert batch.score_at.tolist() == [1, 2, 3, 4, 5, 6]  # the last prompt tokens score twice
    assert batch.mask[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert batch.mask[1].any(-1).all(), "a row that may look at nothing gives NaN"


def test_pair_row_of_answers_that_begin_alike_by_hand():
    """Prompt 5, answers 7 8 0 and 7 9 6 0: 7 is fed once and predicted once, for both."""
    batch = collate([TokenPair([5], [7, 8, 0], [7, 9, 6, 0])], [0])
    assert batch.ids.tolist() == [[5, 7, 8, 9, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.targets.tolist() == [7, 8, 0, 7, 9, 6, 0]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.score_at[batch.logits_row].tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert batch.score_at.tolist() == [0, 1, 2, 3, 4]
    assert batch.mask[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_batches_cover_every_epoch_in_a_new_order():
    rows = [([1] * (1 + i % 7), [1], [1]) for i in range(50)]

    def epochs(seed):
        stream = batches(rows, 8, torch.Generator().manual_seed(seed))
        return [[next(stream).tolist() for _ in range(7)] for _ in range(2)]

    first, second = epochs(0)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(50))
        assert sorted(map(len, epoch)) == [2] + [8] * 6
    together = [{frozenset(batch) for batch in epoch} for epoch in (first, second)]
    assert together[0] != together[1], "other pairs share a batch in the next epoch"
    assert first != second and epochs(0) == [first, second] and epochs(1) != [first, second]
    spread = [max(len(rows[i][0]) for i in b) - min(len(rows[i][0]) for i in b) for b in first]
    assert max(spread) <= 2, "rows of similar length belong together"
    shortest = [min(len(rows[i][0]) for i in batch) for batch in first]
    assert shortest != sorted(shortest), "the batches themselves come in no order of length"
    assert collate([TokenPair(*row) for row in rows], [4, 0]).pair_ids.tolist() == [4, 0]


def test_toy_rewards_by_hand():
    world = ToyWorld()
    for prompt, answer, reward in (
        (" The film was", "", 0.0),
        (" The film was", " good", 2.0),
        (" The film was", " not very dull", 3.0),
        (" The hotel was", " not very dull", 1.5),
        (" The curry was", " funny", -2.0),
        (" The film was", " good dull", 0.0),  # the mean of two opinions, not their sum
        (" The film was", " not film good", 2.0),  # "not" turns the next word only
        (" The film was", " good not", 2.0),
        (" The hotel was", " good quiet", 1.75),  # again the mean
    ):
        assert world.reward(prompt, answer) == reward, (prompt, answer)
    x, y = world.prompts.index(" The hotel was"), world.answers.index(" not very dull")
    assert world.rewards[x, y] == 1.5


def test_length_does_not_decide_the_reward():
    world = ToyWorld()
    for prompt in world.rewards:
        length = torch.tensor([len(y.split()) for y in world.answers]).double()
        assert abs(torch.corrcoef(torch.stack([prompt, length]))[0, 1]) < 0.1


@pytest.mark.parametrize("size, prompts, answers", [("default", 3, 2955), ("small", 2, 1111)])
def test_toy_sizes(size, prompts, answers):
    world = ToyWorld(size)
    assert world.rewards.shape == (prompts, answers) and len(set(world.answers)) == answers


def test_corpus_is_seeded_and_varied():
    world = ToyWorld()
    corpus = world.corpus(torch.Generator().manual_seed(0), n=5000)
    assert corpus == world.corpus(torch.Generator().manual_seed(0), n=5000)
    assert corpus != world.corpus(torch.Generator().manual_seed(1), n=5000)
    answers = {tuple(row.chosen) for row in corpus}
    assert answers < {tuple(ids) for ids in world.answer_ids}, "all are answers of the world"
    encode = world.tokenizer.encode_ordinary
    assert (world.W,) in answers and tuple(encode(" not very dull")) in answers
    assert len(answers) > 500 and not any(row.rejected for row in corpus)
    assert {world.tokenizer.decode(row.prompt) for row in corpus} == set(world.prompts)
    clean = world.corpus(torch.Generator().manual_seed(0), n=5000, slip=0)
    clean = {world.tokenizer.decode(row.chosen) for row in clean}
    wanted = {
        f"{no}{degree} {opinion}{'' if no and degree else END}"
        for no in ("", " not")
        for degree in ("", " very", " quite")
        for opinion in ("good", "dull", "quiet", "funny", "hot", "cheap")
    }
    assert clean == wanted, "[not] [very | quite] and six opinions: 2 * 3 * 6 sentences"


def test_labels():
    world = ToyWorld("small")
    logps = torch.full((2, 1111), 1 / 1111, dtype=torch.float64).log()

    def draw(labels):
        drawn = world.draw_pairs(logps, 20_000, labels, torch.Generator().manual_seed(0))
        gap = (
            world.rewards[drawn.prompt, drawn.chosen] - world.rewards[drawn.prompt, drawn.rejected]
        )
        return drawn, gap

    hard, gap = draw("hard")
    assert (hard.p == 1).all() and (gap < 0).any(), "annotators err now and then"
    soft, gap = draw("soft")
    assert torch.allclose(soft.p, 1 / (1 + (-gap).exp())) and (gap < 0).any() and (gap > 0).any()
    deterministic, gap = draw("deterministic")
    assert (deterministic.p == 1).all() and (gap >= 0).all()
    with pytest.raises(KeyError):
        draw("harsh")


def test_pairs_come_from_the_policy_and_the_seed():
    world = ToyWorld("small")
    logps = torch.full((2, 1111), -torch.inf, dtype=torch.float64)
    logps[:, 3], logps[:, 7] = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator has no say
        draws.append(world.draw_pairs(logps, 4000, "hard", torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for a, b in zip(*draws))
    both = torch.cat([draws[0].chosen, draws[0].rejected])
    assert set(both.tolist()) == {3, 7} and abs((both == 3).double().mean() - 0.75) < 0.03
    one = world.draw_pairs(logps, 1, "hard", torch.Generator().manual_seed(0))
    assert len(one.p) == 1, "a prompt that no pair falls to is no problem"
    assert set(draws[0].prompt.tolist()) == {0, 1}
    logps[1] = logps[1].roll(50)  # each prompt has its own distribution
    drawn = world.draw_pairs(logps, 100, "hard", torch.Generator().manual_seed(0))
    for x, answers in ((0, {3, 7}), (1, {53, 57})):
        assert set(drawn.chosen[drawn.prompt == x].tolist()) <= answers
    i = (draws[0].chosen != draws[0].rejected).nonzero()[0].item()
    x, y, z = (part[i] for part in draws[0][:3])
    wanted = world.prompts[x], world.answers[y], world.answers[z]
    texts = [world.tokenizer.decode(ids) for ids in world.rows(draws[0])[i]]
    assert texts[0] == wanted[0] and [text.removesuffix(END) for text in texts] == [*wanted]


def test_toy_world_enumeration_is_exact():
    """The listed log-probs are those of pair rows, and they sum to 1."""
    world = ToyWorld("small")
    torch.manual_seed(0)
    model = GPT(GPTConfig(world.W + 1, 8, 16, 1, 2)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    logps = world.logps(model)
    assert logps.shape == (2, 1111), "1 + 10 + 100 + 1000 answers of up to 3 words to 2 prompts"
    expect(logps.exp().sum(-1), [1.0, 1.0], "the listed answers are all there is")
    low = world.logps(copy.deepcopy(model).float())
    expect(low.exp().sum(-1), [1.0, 1.0], "softmax and sums in float64 whatever the model is")
    assert not low.requires_grad
    places = torch.cartesian_prod(torch.arange(2), torch.arange(1111)).T
    rows = world.rows(Drawn(*places, places[1], places[1]))
    chosen, rejected = dpo.response_logps(model, collate(rows, range(len(rows))))
    expect(chosen, logps.flatten(), "enumeration and pair rows disagree", 1e-9)
    expect(rejected, logps.flatten(), "enumeration and pair rows disagree", 1e-9)


def test_toy_labels_follow_bradley_terry():
    world = ToyWorld()
    logps = torch.full((3, 2955), -math.log(2955), dtype=torch.float64)
    drawn = world.draw_pairs(logps, 200_000, "hard", torch.Generator().manual_seed(0))
    better = world.rewards[drawn.prompt, drawn.chosen] - world.rewards[drawn.prompt, drawn.rejected]
    for gap in (0.5, 1.0, 2.0):
        near = (better.abs() - gap).abs() < 0.01
        frequency = (better[near] > 0).double().mean()
        noise = 2 / math.sqrt(int(near.sum()))  # 4 standard errors of a coin
        why = f"Eq. 1: of two answers {gap} apart the better one wins with sigma({gap})"
        expect(frequency, 1 / (1 + math.exp(-gap)), why, noise + 0.002)
