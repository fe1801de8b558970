"""Public preference data as a file for `python train.py --data`. Needs `pip install datasets`.

    python -m experiments.recipes ultrafeedback pairs.jsonl
    python -m experiments.recipes hh pairs.jsonl --n 2000
    python -m experiments.recipes orca pairs.jsonl
    python -m experiments.recipes instruct pairs.jsonl
    python -m experiments.recipes mine.csv pairs.jsonl

`mine.csv` stands for a file of your own with the columns prompt, chosen and rejected. Files that
end in .json, .jsonl or .parquet are read as well. A recipe is a few lines: copy one for other data.
"""

import argparse
import sys
from pathlib import Path

KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
INSTRUCT = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
    "04_preference-tuning-with-dpo/instruction-data-with-preference.json"
)
COLUMNS = ["prompt", "chosen", "rejected"]


def ultrafeedback(load_dataset):
    """61,000 pairs, scored by GPT-4. The responses are whole dialogues, as lists of messages."""
    rows = load_dataset("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs")
    return rows.select_columns(COLUMNS)


def hh(load_dataset):
    """44,000 pairs of Anthropic's, labelled by people. Whole dialogues, so without a prompt."""
    return load_dataset("Anthropic/hh-rlhf", data_dir="helpful-base", split="train")


def orca(load_dataset):
    """13,000 pairs, GPT-4 against a smaller model. The prompt has an instruction for the system."""

    def add_prompt(row):
        system = {"role": "system", "content": row["system"]}
        user = {"role": "user", "content": row["question"]}
        return {"prompt": [system, user]}

    rows = load_dataset("Intel/orca_dpo_pairs", split="train")
    return rows.map(add_prompt).select_columns(COLUMNS)


def instruct(load_dataset):
    """1,100 pairs of LLMs-from-scratch, polite against rude. The prompt has two parts."""

    def add_prompt(row):
        prompt = "Below is an instruction that describes a task. Write a response that "
        prompt += f"appropriately completes the request.\n\n### Instruction:\n{row['instruction']}"
        if row["input"]:
            prompt += f"\n\n### Input:\n{row['input']}"
        return {"prompt": f"{prompt}\n\n### Response:\n"}

    rows = load_dataset("json", data_files=INSTRUCT, split="train")
    return rows.map(add_prompt).select_columns(COLUMNS)


RECIPES = {recipe.__name__: recipe for recipe in (ultrafeedback, hh, orca, instruct)}


def own_file(path, load_dataset):
    kind = KINDS[Path(path).suffix]
    return load_dataset(kind, data_files=path, split="train").select_columns(COLUMNS)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help=f"{', '.join(RECIPES)}, or a file of your own")
    parser.add_argument("out", help="the file to write, such as pairs.jsonl")
    parser.add_argument("--n", type=int, help="only the first n pairs")
    args = parser.parse_args(argv)
    if args.source not in RECIPES and Path(args.source).suffix not in KINDS:
        parser.error(f"{args.source} is none of {', '.join(RECIPES)}, nor a file {list(KINDS)}")
    try:
        from datasets import load_dataset
    except ImportError:
        sys.exit("recipes: pip install datasets")
    if args.source in RECIPES:
        rows = RECIPES[args.source](load_dataset)
    else:
        rows = own_file(args.source, load_dataset)
    if args.n:
        rows = rows.select(range(min(args.n, len(rows))))
    rows.to_json(args.out)
    print(f"{len(rows)} pairs are in {args.out}: look at one with python data.py {args.out}")


if __name__ == "__main__":
    main()
