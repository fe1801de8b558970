"""Continue a prompt with a trained policy and, beside it, with its reference.

    python -m experiments.sample out "The film was"

`out` is the folder of a run of train.py. The same seed gives the same responses.
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

import data
from model import GPT


def sample(folder, prompt, temperature=1.0, n=3, seed=0, max_new_tokens=100):
    """n responses from each of a run's two models: {"reference": [texts], "policy": [texts]}.
    InputError or OSError, in one line, if the folder or the prompt cannot be used."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
        toy, name = not settings["data"], settings["tokenizer"]
    except (KeyError, TypeError, ValueError):
        raise data.InputError(f"{folder}/config.json does not hold a run's settings") from None
    if toy:
        world, prompt = data.ToyWorld(), " " + " ".join(prompt.split())
        tokenizer, max_new_tokens = world.tokenizer, world.K
        words = world.tokenizer.decode(range(world.W)).split()
        if unknown := set(prompt.split()) - set(words):
            raise data.InputError(f"{unknown.pop()} is not a word of the toy world: {words}")
    else:
        tokenizer = data.get_tokenizer(name)
    if n < 1 or not 0 <= temperature < 1e6:
        raise data.InputError("--n must be at least 1, and --temperature a number from 0")
    ids = tokenizer.encode_ordinary(prompt)
    if not ids:
        raise data.InputError("the prompt is empty: its last token predicts the response")
    responses = {}
    for name in ("reference", "policy"):
        model = GPT.from_pretrained(folder / name)
        if model.config.vocab_size != tokenizer.n_vocab:
            raise data.InputError(f"{folder / name}: its vocabulary is not that of the tokenizer")
        random = torch.Generator().manual_seed(seed)
        rows = torch.tensor([ids] * n)
        rows = model.generate(
            rows, max_new_tokens, temperature, stop_token=tokenizer.eot_token, generator=random
        )
        texts = [to_text(row[len(ids) :].tolist(), tokenizer) for row in rows]
        responses[name] = [text.split(data.END)[0].strip() for text in texts]
    return responses


def to_text(ids, tokenizer):
    """As tokenizer.decode; ids without a text, which some vocabularies have, are left out."""
    text = b""
    for token in ids:
        with suppress(KeyError):
            text += tokenizer.decode_single_token_bytes(token)
    return text.decode(errors="replace")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="what train.py wrote")
    parser.add_argument("prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--n", type=int, default=3, help="responses of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        asked = args.folder, args.prompt, args.temperature, args.n, args.seed
        for name, texts in sample(*asked).items():
            for text in texts:
                print(f"{name:10} {args.prompt.strip()} ... {text}")
    except (data.InputError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has none
        sys.stdout.reconfigure(errors="replace")
    main()
