"""Questions about DPO, each in a file of its own: measure, judge, draw.

    python -m experiments.questions --list               the questions
    python -m experiments.questions overfitting stuck    answer these
    python -m experiments.questions --all                answer all of them
    python -m experiments.questions --all --quick        one seed, smaller runs, into out-quick/
    python -m experiments.questions --all --redraw       from the CSV files, without measuring

Each answer is a table and a figure, assets/NAME.csv and assets/NAME.png, and a row in
experiments/README.md. README.md has a row for each answer that begins with "Yes." or "No.". A file
in this folder is a question. It has

    a docstring     the question on its first line, what the paper says, what was found
    SECONDS         a guess of how many seconds `measure` takes for one seed
    measure(seed, quick)    the rows of this seed, dicts of settings and numbers
    verdict(rows)           the answer, one line of text
    draw(rows)              its Figure

A question that takes long may have PARTS in place of SECONDS, {part: seconds}. Then it has
measure(seed, quick, part), and its parts run side by side.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from experiments import lab

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
ROOT_README = HERE.parents[1] / "README.md"
BEGIN = "<!-- answers: python -m experiments.questions -->"
END = "<!-- end of answers -->"


def names():
    """The questions, in alphabetical order."""
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("__"))


def load(name):
    return importlib.import_module(f"experiments.questions.{name}")


def asked(question):
    """The first line of its docstring."""
    return question.__doc__.strip().split("\n")[0]


# Measuring, on all cores


class Job(NamedTuple):
    name: str  # of the question
    seconds: float
    arguments: tuple  # of its measure


def jobs_of(name, seeds, quick):
    """A job for each seed, and for each part if the question has parts."""
    question = load(name)
    jobs = []
    for seed in range(seeds):
        if hasattr(question, "PARTS"):
            for part, seconds in question.PARTS.items():
                jobs.append(Job(name, seconds, (seed, quick, part)))
        else:
            jobs.append(Job(name, question.SECONDS, (seed, quick)))
    return jobs


def run(jobs, workers, folder):
    """Run the jobs in several processes of one thread each, the longest first. The table of a
    question is saved as soon as all its jobs are done. Returns the questions that raised an error,
    which does not stop the others."""
    start = time.time()
    done = {}  # job: its rows
    failed = set()
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        futures = {}
        for job in sorted(jobs, key=lambda job: -job.seconds):
            measure = load(job.name).measure
            futures[pool.submit(measure, *job.arguments)] = job
        for future in as_completed(futures):
            job = futures[future]
            error = future.exception()
            if error:
                traceback.print_exception(error)
                failed.add(job.name)
                continue
            done[job] = future.result()
            report(job, jobs, done, time.time() - start)
            save_if_complete(job.name, jobs, done, folder)
    return sorted(failed)


def save_if_complete(name, jobs, done, folder):
    rows = []
    for job in jobs:
        if job.name != name:
            continue
        if job not in done:
            return
        rows += done[job]
    lab.save_csv(folder / f"{name}.csv", rows)


def report(job, jobs, done, spent):
    """A line for a finished job, with the time left by the seconds that the questions guess."""
    finished = sum(job.seconds for job in done)
    everything = sum(job.seconds for job in jobs)
    left = spent * (everything - finished) / finished
    seed, _, *part = job.arguments
    name = " ".join([job.name, *part, f"seed {seed}"])
    print(f"{len(done)}/{len(jobs)}  {name}  {spent:.0f} s, {left:.0f} s left", flush=True)


# The answers in both README files


def answers():
    """The table of answers in Markdown, from the docstrings and the CSV files in assets/."""
    lines = ["| file | question | answer |", "|---|---|---|"]
    for name in names():
        question = load(name)
        file = f"[{name}](questions/{name}.py)"
        answer = "not measured yet"
        if (lab.ASSETS / f"{name}.csv").exists():
            answer = question.verdict(lab.saved(name))
            answer += f" [Figure](../assets/{name}.png)"
        lines.append(f"| {file} | {asked(question)} | {answer} |")
    return "\n".join(lines)


def yes_or_no():
    """The table of README.md: the questions whose answer begins with "Yes." or "No."."""
    lines = ["| question | answer |", "|---|---|"]
    for name in names():
        if not (lab.ASSETS / f"{name}.csv").exists():
            continue
        question = load(name)
        first_word = question.verdict(lab.saved(name)).split()[0]
        if first_word in ("Yes.", "No."):
            lines.append(f"| {asked(question)} | {first_word.lower().removesuffix('.')} |")
    return "\n".join(lines)


def with_answers(text, table):
    """The text of a README file with this table between its two comments."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def update(path, table):
    text = path.read_text(encoding="utf-8")
    path.write_text(with_answers(text, table), encoding="utf-8")


# The command


def answer(name, folder):
    """Draw the figure of a question and print its answer, both from its table in `folder`."""
    table = folder / f"{name}.csv"
    if not table.exists():
        print(f"\n{name} is not measured yet")
        return
    question = load(name)
    rows = lab.load_csv(table)
    question.draw(rows).savefig(folder / f"{name}.png")
    print(f"\n{asked(question)}")
    print(question.verdict(rows))
    print(f"See {folder.name}/{name}.csv and {name}.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the questions")
    parser.add_argument("--all", action="store_true", help="all questions")
    parser.add_argument("--quick", action="store_true", help="one seed, into out-quick/")
    parser.add_argument("--redraw", action="store_true", help="from the CSV files that are there")
    help = "processes, one thread each (default: as many as there are cores)"
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help=help)
    args = parser.parse_args()
    wanted = args.names
    if args.all:
        wanted = names()
    for name in wanted:
        if name not in names():
            parser.error(f"{name} is not one of {', '.join(names())}")
    if args.list or not wanted:
        for name in names():
            print(f"{name:18} {asked(load(name))}")
        return

    folder = lab.ASSETS
    seeds = 5
    if args.quick:
        folder = Path("out-quick")
        seeds = 1
    folder.mkdir(exist_ok=True)
    failed = []
    if not args.redraw:
        jobs = []
        for name in wanted:
            jobs += jobs_of(name, seeds, args.quick)
        failed = run(jobs, args.workers, folder)
    for name in wanted:
        if name not in failed:
            answer(name, folder)
    if not args.quick:
        update(README, answers())
        update(ROOT_README, yes_or_no())
    if failed:
        sys.exit(f"not measured, see the errors above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
