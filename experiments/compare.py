"""Two or more runs of train.py beside each other: a table, and their curves in one picture.

    python -m experiments.compare out-dpo out-ipo

All columns but the loss mean the same whatever --loss was: rewards and margins are always DPO's.
The picture is compare.png.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {  # what a metric of metrics.jsonl is called in the picture
    "objective": "J of Eq. 3",
    "kl": "KL to the reference, nats",
    "gap_closed": "gap closed",
    "held_out_loss": "held-out loss",
    "held_out_accuracy": "held-out accuracy",
    "margin": "margin of implicit rewards",
    "chosen_logp": "log-prob of the chosen, nats",
    "rejected_logp": "log-prob of the rejected, nats",
}


def compare(folders):
    """Print the table of these runs. Returns the figure with their curves."""
    rows = {}
    histories = {}
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows[folder] = summary["rows"]["policy"]
        histories[folder] = [json.loads(line) for line in lines]
    print_table(rows)
    return draw(histories)


def print_table(rows):
    """The final policy of each run. Columns that only some runs have are left out."""
    first, *others = rows.values()
    columns = [column for column in first if all(column in other for other in others)]
    name_width = max(len(name) for name in rows)
    heads = [f"{column:>8}" for column in columns]
    print(" " * name_width, *heads, sep="  ")
    for name, row in rows.items():
        cells = []
        for column, head in zip(columns, heads):
            cells.append(f"{row[column]:{len(head)}.4f}")
        print(f"{name:{name_width}}", *cells, sep="  ")


def draw(histories):
    """A panel for each metric that all runs have, a colour for each run."""
    shown = []
    for metric in PANELS:
        if all(any(metric in line for line in history) for history in histories.values()):
            shown.append(metric)
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
        figure = compare(args.folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"compare: not the folders of finished runs: {error}", file=sys.stderr)
        sys.exit(2)
    figure.savefig("compare.png", dpi=120)
    print("\nthe curves are in compare.png")


if __name__ == "__main__":
    main()
