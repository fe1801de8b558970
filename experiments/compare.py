"""Two or more runs of train.py beside each other: a table, and their curves in one picture.

    python -m experiments.compare out-dpo out-ipo

All columns but the loss mean the same whatever --loss was: rewards and margins are always DPO's.
The picture is compare.png. Its numbers are in compare.csv, a row for each DPO step of each run.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from experiments import lab

PANELS = {  # what a metric of metrics.jsonl is called in the picture
    "objective": "J of Eq. 3",
    "kl": "KL to the reference, nats",
    "gap_closed": "gap closed",
    "held_out_loss": "held-out loss of Eq. 7",
    "held_out_accuracy": "held-out accuracy",
    "margin": "margin of implicit rewards",
    "chosen_logp": "log-prob of the chosen, nats",
    "rejected_logp": "log-prob of the rejected, nats",
    "accuracy": "accuracy on the batch",
}


def compare(folders):
    """Print the table of these runs. Returns the metrics of their DPO steps, {folder: rows}."""
    final = {}
    histories = {}
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        who = {"run": folder, "seed": summary["config"]["seed"]}
        metrics = [json.loads(line) for line in lines]
        histories[folder] = [who | line for line in metrics if "step" in line]
        final[folder] = summary["rows"]["policy"]
    print_table(final)
    return histories


def print_table(rows):
    """The final policy of each run. Columns that only some runs have are left out."""
    first, *others = rows.values()
    columns = [column for column in first if all(column in other for other in others)]
    if not columns:
        print("These runs have no results in common: a toy run has others than one on pairs.")
        return
    name_width = max(len(name) for name in rows)
    heads = [f"{column:>8}" for column in columns]
    print(" " * name_width, *heads, sep="  ")
    for name, row in rows.items():
        cells = []
        for column, head in zip(columns, heads):
            cells.append(f"{row[column]:{len(head)}.4f}")
        print(f"{name:{name_width}}", *cells, sep="  ")


def draw(histories):
    """The figure: a panel for each metric that all runs have, at most six, a colour for each run.
    histories: {name: rows with a step and metrics}."""
    shown = []
    for metric in PANELS:
        if all(any(metric in line for line in history) for history in histories.values()):
            shown.append(metric)
    shown = shown[:6]
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax in axes[len(shown) :]:
        ax.remove()
    for ax, metric in zip(axes, shown):
        for name, history in histories.items():
            lines = [line for line in history if metric in line]
            steps = [line["step"] for line in lines]
            values = [line[metric] for line in lines]
            ax.plot(steps, values, label=name, linewidth=1)
        ax.set(xlabel="DPO step", ylabel=PANELS[metric])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="+", help="what train.py wrote, one folder for each run")
    args = parser.parse_args(argv)
    try:
        histories = compare(args.folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"compare: not the folders of finished runs: {error}", file=sys.stderr)
        sys.exit(2)
    draw(histories).savefig("compare.png", dpi=120)
    lab.save_csv("compare.csv", [row for history in histories.values() for row in history])
    print("\nthe curves are in compare.png, their numbers in compare.csv")


if __name__ == "__main__":
    main()
