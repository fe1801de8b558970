"""What the figures of the questions share. A band or an error bar is one standard deviation over
the seeds. Legends stand below the panels, never over a curve."""

import torch
from matplotlib.figure import Figure

from experiments import lab

# The colours of Okabe and Ito, which the colour-blind can tell apart
BLUE = "#0072B2"
RED = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
GREY = "#777777"
BLACK = "#000000"


def panels(title, n, rows=1, width=4.2, height=3.6):
    """A figure with n panels in `rows` rows -> (figure, list of axes)."""
    columns = -(-n // rows)
    size = (width * columns, height * rows + 0.7)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes[n:]:
        ax.remove()
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:n]


def seeds(rows):
    """For a title: "5 seeds"."""
    count = len(lab.values(rows, "seed"))
    if count == 1:
        return "1 seed"
    return f"{count} seeds"


def line(ax, rows, x, y, color, **style):
    """The mean of column y at each value of column x, with a band. style: label, linestyle, ..."""
    positions = sorted(lab.values(rows, x))
    points = []
    for position in positions:
        here = lab.where(rows, **{x: position})
        points.append(lab.mean_sd(lab.per_seed(here, y)))
    middle, sd = torch.tensor(points).T
    ax.plot(positions, middle, color=color, **style)
    ax.fill_between(positions, middle - sd, middle + sd, color=color, alpha=0.15, linewidth=0)


def bars(ax, heights, colors):
    """Groups of bars. heights: {group on the x axis: {bar: its numbers, one per seed}}; colors:
    {bar: its colour}. A bar that a group lacks is left out."""
    width = 0.8 / len(colors)
    for i, (name, color) in enumerate(colors.items()):
        offset = width * (i - (len(colors) - 1) / 2)
        for j, numbers in enumerate(heights.values()):
            if name not in numbers:
                continue
            middle, sd = lab.mean_sd(numbers[name])
            style = {"color": color, "edgecolor": "black", "linewidth": 0.6, "capsize": 3}
            ax.bar(j + offset, middle, 0.9 * width, yerr=sd, **style)
    for name, color in colors.items():
        ax.plot([], [], "s", color=color, label=name)  # for the legend
    ax.set_xticks(range(len(heights)), list(heights))
    ax.axhline(0, color="black", linewidth=0.8)


def legend(figure, *axes, columns=4):
    """One legend below all panels, with each name once."""
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
