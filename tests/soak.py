"""What takes too long for the default tests: spoiled files and kills at random moments.

    python tests/soak.py [--seed 0] [--files 1000] [--kills 20]

Each file is a good one with a few bytes changed, cut or doubled: `load_pairs` must return pairs or
say in one line what is wrong. Each kill (kill -9) hits one run at a random moment; the run is then
resumed until it ends, and its weights must be those of a run that nothing disturbed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data

FLAGS = "--pairs 20000 --sft-epochs 3 --epochs 4 --save-every 5".split()
TALK = "\n\nHuman: Hi, é.\n\nAssistant:"
HI = {"role": "user", "content": "Hi?"}
YES = {"role": "assistant", "content": "Yes."}
BRIEF = {"role": "system", "content": "Be brief."}
GOOD = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": ' "5"'},
    {"chosen": TALK + " Hello.", "rejected": TALK + " Go \N{WAVING HAND SIGN}\\"},
    {
        "prompt": "Hi?",
        "chosen": [HI, YES],
        "rejected": [HI, YES | {"content": "\N{WAVING HAND SIGN}"}],
    },
    {"prompt": [HI], "chosen": [YES], "rejected": [YES | {"content": "No."}]},
    {
        "prompt": "\n\nHuman: Hi?\n\nAssistant:",
        "chosen": [HI, YES],
        "rejected": [HI, YES | {"content": "No."}],
    },
    {"prompt": [BRIEF, HI], "chosen": [HI, YES], "rejected": [HI, YES | {"content": "No."}]},
    {
        "prompt": "Hi, é.",
        "chosen": TALK + " Hello.",
        "rejected": TALK + " Go.",
        "system": "Be brief.",
    },
    {"prompt": "Say\n", "chosen": "é", "rejected": "e", "more": [1.5, None, {"a": True}]},
]
SPARE = [b"\x00", b"\xff", b'"', b"\\", b"\\ud800", b"{", b"]", b"\n", b"\r", b"null", b"1e999"]


def spoiled(rng):
    """A small file of pairs, with a change or two."""
    lines = [json.dumps(rng.choice(GOOD), ensure_ascii=rng.random() < 0.5) for _ in range(5)]
    text = "\n".join(lines).encode()
    for _ in range(rng.randint(1, 2)):
        i, n = rng.randrange(len(text) + 1), rng.randint(1, 30)
        text = rng.choice([
            text[:i] + text[i + n :],  # lost
            text[:i] + text[i : i + n] + text[i:],  # doubled
            text[:i] + rng.choice(SPARE) + text[i:],
            text[:i] + rng.randbytes(rng.randint(1, 3)) + text[i + 1 :],
            text[:i],  # torn
        ])  # fmt: skip
    return text


def spoiled_files(rng, n):
    """Every file is read, refused in one line, or read with a warning of one line."""
    seen, tokenizer = Counter(), data.get_tokenizer("bytes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        for i in range(n):
            path.write_bytes(spoiled(rng))
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    pairs = data.load_pairs(path)
                    data.encode_pairs(pairs, tokenizer, 200)
                said, what = [str(warning.message) for warning in warned], "read"
            except data.InputError as error:
                said, what = [str(error)], "refused"
            assert all("\n" not in line for line in said), (i, said)
            assert path.name in said[0] if what == "refused" else pairs, (i, said)
            seen[what] += 1
    print(f"{n} spoiled files: {seen['read']} read, {seen['refused']} refused, each in one line")


def train(*flags):
    args = [sys.executable, ROOT / "train.py", *flags]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def random_kills(rng, n):
    """One run after the other is killed and resumed, till n kills have hit."""
    with tempfile.TemporaryDirectory() as folder:
        whole, out, kills, runs = Path(folder) / "whole", Path(folder) / "out", 0, 0
        start = time.time()
        assert train(*FLAGS, "--out", whole).communicate() and (whole / "summary.json").exists()
        seconds = time.time() - start
        wanted = (whole / "policy" / "pytorch_model.bin").read_bytes()
        while kills < n:
            flags = [*FLAGS, "--out", out]
            while True:
                process = train(*flags)
                try:
                    _, err = process.communicate(timeout=rng.uniform(0, seconds))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    kills += 1
                else:
                    assert process.returncode == 0, err
                    break
                if (out / "config.json").exists():
                    flags = ["--resume", "--out", out]
            assert (out / "policy" / "pytorch_model.bin").read_bytes() == wanted, "other weights"
            runs += 1
    print(f"{kills} kills in {runs} runs, each resumed to the same weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    spoiled_files(random.Random(args.seed), args.files)
    random_kills(random.Random(args.seed), args.kills)
