"""Responses of a trained policy and, beside them, of its reference.

    python -m experiments.sample out "The film was"

`out` is the folder of a run of train.py. The same seed gives the same responses. If the run was
trained on dialogues, a plain prompt is put into their form, as a question of the user.
"""

import argparse
import itertools
import json
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import torch

import data
from model import GPT

WIDTH = 38  # of a column, in letters


def sample(folder, prompt, temperature=1.0, n=3, seed=0, max_new_tokens=100):
    """n responses from each of a run's two models: {"reference": [texts], "policy": [texts]}.

    InputError or OSError, in one line, if the folder or the prompt cannot be used.
    """
    folder = Path(folder)
    if n < 1 or not 0 <= temperature < 1e6:
        raise data.InputError("--n must be at least 1, and --temperature a number from 0")
    settings = read_settings(folder)
    if settings["data"]:
        tokenizer = data.get_tokenizer(settings["tokenizer"])
        if settings.get("dialogues"):
            prompt = data.as_dialogue(prompt, "user") + data.ROLES["assistant"]
    else:
        world = data.ToyWorld()
        tokenizer = world.tokenizer
        max_new_tokens = world.K
        prompt = toy_prompt(prompt, world)
    ids = tokenizer.encode_ordinary(prompt)
    if not ids:
        raise data.InputError("the prompt is empty: its last token predicts the response")
    responses = {}
    for name in ["reference", "policy"]:
        model = GPT.from_pretrained(folder / name)
        if model.config.vocab_size != tokenizer.n_vocab:
            raise data.InputError(f"{folder / name}: its vocabulary is not that of the tokenizer")
        rows = model.generate(
            torch.tensor([ids] * n),
            max_new_tokens,
            temperature,
            stop_token=tokenizer.eot_token,
            generator=torch.Generator().manual_seed(seed),
        )
        responses[name] = [to_text(row[len(ids) :].tolist(), tokenizer) for row in rows]
    return responses


def read_settings(folder):
    """The config.json of a run."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not {"data", "tokenizer"} <= settings.keys():
        raise data.InputError(f"{folder}/config.json does not hold a run's settings")
    return settings


def toy_prompt(prompt, world):
    """The prompt as the toy world's tokenizer wants it. InputError if it does not know a word."""
    words = prompt.split()
    known = world.tokenizer.decode(range(world.W)).split()
    for word in words:
        if word not in known:
            raise data.InputError(f"{word} is not a word of the toy world: {', '.join(known)}")
    return "".join(f" {word}" for word in words)


def to_text(ids, tokenizer):
    """The response as a text, up to its end token. Ids that no text has are left out."""
    text = b""
    for token in ids:
        if token == tokenizer.eot_token:
            break
        with suppress(KeyError):
            text += tokenizer.decode_single_token_bytes(token)
    return text.decode(errors="replace").strip()


def print_side_by_side(responses):
    """A column for each model, a row for each response."""
    print(f"{'reference':{WIDTH}}  policy")
    for left, right in zip(responses["reference"], responses["policy"]):
        print()
        lines = itertools.zip_longest(wrapped(left), wrapped(right), fillvalue="")
        for line, other in lines:
            print(f"{line:{WIDTH}}  {other}".rstrip())


def wrapped(text):
    return textwrap.wrap(text, WIDTH) or ["(nothing)"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="what train.py wrote")
    parser.add_argument("prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--n", type=int, default=3, help="responses of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        responses = sample(args.folder, args.prompt, args.temperature, args.n, args.seed)
    except (data.InputError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr)
        sys.exit(2)
    print_side_by_side(responses)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has none
        sys.stdout.reconfigure(errors="replace")
    main()
