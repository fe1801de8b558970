"""What train.py shows of a run: a line that changes, samples, the table, curves.png."""

import sys

import torch
from matplotlib.figure import Figure


def progress(line, keep):
    """One line that changes in place on a terminal; piped, only the lines worth keeping."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)
    elif keep:
        print(line, flush=True)


def describe_step(metrics, steps, seconds):
    """A line of metrics.jsonl for people; `seconds` since the first of so many steps."""
    step = metrics["step"]
    shown = "loss", "margin", "weight", "gap_closed", "held_out_accuracy"
    line = [f"{key} {metrics[key]:.4f}" for key in shown if key in metrics]
    rate, left = metrics["pairs_per_second"], (steps - step) * seconds / step
    return "  ".join([f"DPO {step}/{steps}", *line, f"{rate:.0f} pairs/s", f"{left:.0f} s left"])


def samples(model, task, seed):
    """Each of the task's prompts with an answer; the same policy gives the same answers."""
    torch.manual_seed(seed)
    lines = []
    for prompt in task.prompts:
        ids = torch.tensor([prompt], device=model.device)
        ids = model.generate(ids, task.max_answer, task.temperature, None, task.tokenizer.eot_token)
        lines.append(task.tokenizer.decode(ids[0].tolist()).strip())
    return lines


def report(summary, before, after):
    print("\nsamples before DPO:", *before, "\nsamples after DPO:", *after, sep="\n")
    columns = list(summary["rows"]["reference"])
    print("\n" + " " * 9, *columns, sep="  ")
    for name, row in summary["rows"].items():
        print(f"{name:9}", *(f"{row[column]:{len(column)}.4f}" for column in columns), sep="  ")
    gap = "-" if summary["gap_closed"] is None else f"{summary['gap_closed']:.1%}"
    print(f"gap closed: {gap}\n{summary['seconds']:.0f} s; see {summary['config']['out']}/")


def plot(history, results, path):
    """curves.png: did it learn, and what did it do to the loss, the rewards and the log-probs?"""
    panels = {
        "reward; KL in nats": ("expected_reward", "kl_to_reference", "objective"),
        "held-out pairs: nats; share": ("held_out_loss", "held_out_accuracy"),
        "nats; mean gradient weight": ("loss", "weight"),
        "implicit reward (Eq. 5)": ("chosen_reward", "rejected_reward", "margin"),
        "log-prob of an answer, nats": ("chosen_logp", "rejected_logp"),
    }
    panels = [(ylabel, keys) for ylabel, keys in panels.items() if keys[0] in history[-1]]
    fig = Figure(figsize=(11, 7), layout="constrained")
    for ax, (ylabel, keys) in zip(fig.subplots(2, 2).flat, panels):
        lines = [line for line in history if keys[0] in line]
        for key, style in zip(keys, ("-", "--", ":")):
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            ax.plot(steps, values, style, label=key.replace("_", " "))
        if "objective" in keys:
            ax.axhline(results["optimum"]["objective"], color="black", label="objective of pi*")
        ax.set(xlabel="DPO step", ylabel=ylabel)
        ax.legend()
    fig.savefig(path, dpi=120)
