"""What the figures of a sweep share: how methods look, panels of a fixed size, labels, axes."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from secateur.pruners import REGISTRY
from secateur.tasks import TASKS

UNPRUNED = "none"
BLACK, GREY = "#222222", "#b4b9bf"
# eight hues that stay apart for the common kinds of colour blindness
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#7b3fa0", "#8c510a"),
)
_MARKERS = "osD^vP<>"
_LETTER = 0.062  # inches per letter of the largest labels
Handles = list[Line2D | Patch]


class Look(NamedTuple):
    """How a method is drawn; methods that are not `named` are grey and share one look."""

    color: str
    marker: str = "."
    line: str = "-"
    named: bool = True


def looks(comparison: pd.DataFrame, highlight: Sequence[str] = ()) -> dict[str, Look]:
    """The look of every method, the same in all figures of a comparison.

    At most eight methods have a colour: those in `highlight`, then methods from outside the
    project, then the best ones at the smallest budget. `random` is black and dotted, the others
    are grey.

    Args:
        highlight: names of methods, or labels of rows.

    Raises:
        ValueError: a name that is not in the comparison, or more than eight.
    """
    rows = comparison[comparison["method"] != UNPRUNED]
    labels = list(dict.fromkeys(rows["method"]))
    chosen = [label for label in labels if {label, _name(label)} & set(highlight)]
    known = {*labels, *map(_name, labels)}
    if unknown := [name for name in highlight if name not in known]:
        raise ValueError(f"no rows of {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if len(chosen) > len(COLORS):
        raise ValueError(
            f"{len(chosen)} methods to highlight, but {len(COLORS)} colours: name fewer"
        )
    outside = [
        label
        for label in labels
        if _name(label) in REGISTRY
        and not REGISTRY[_name(label)].__module__.startswith("secateur.pruners.")
    ]
    order = dict.fromkeys([*chosen, *outside, *_best_first(rows)])
    colored = sorted([label for label in order if _name(label) != "random"][: len(COLORS)])
    found = {
        label: Look(color, marker)
        for label, color, marker in zip(colored, COLORS, _MARKERS, strict=False)
    }
    for label in labels:
        usual = Look(BLACK, "x", ":") if _name(label) == "random" else Look(GREY, named=False)
        found.setdefault(label, usual)
    return found


def _best_first(rows: pd.DataFrame) -> list[str]:
    """The methods by their average, or else their mean rank over the tasks, budgets ascending."""
    own = rows[rows["task"] == "average"] if (rows["task"] == "average").any() else rows
    ranks = own.groupby(["task", "budget"])["value"].rank(ascending=False)
    means = own.assign(rank=ranks).groupby(["method", "budget"])[["tokens", "rank"]].mean()
    return list(dict.fromkeys(means.sort_values(["tokens", "rank"]).index.get_level_values(0)))


def _name(label: str) -> str:
    """The name of a method in the label of its row."""
    return label.split(" ")[0]


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Labels for figures: without a method's fields where it has one row only."""
    labels = list(dict.fromkeys(labels))
    found = {}
    for label in labels:
        alone = sum(_name(other) == _name(label) for other in labels) == 1
        status = f" {label[label.rindex('(') :]}" if label.endswith(")") else ""
        found[label] = f"{_name(label)}{status}" if alone else label
    return found


def task_title(task: str) -> str:
    """The title of a panel: the task with its metric."""
    if task == "average":
        return "average, % of unpruned"
    return TASKS[task].heading() if task in TASKS else task


def tasks_of(comparison: pd.DataFrame) -> list[str]:
    """The tasks in their order, the average first."""
    return sorted(dict.fromkeys(comparison["task"]), key=lambda task: task != "average")


class Grid(NamedTuple):
    """Panels of a fixed size in rows, with room around them; all sizes are inches."""

    width: float
    height: float
    left: float = 0.55
    right: float = 0.15
    bottom: float = 0.5
    top: float = 0.35

    def draw(
        self, titles: Sequence[str], columns: int, caption: str, handles: Handles
    ) -> tuple[Figure, list[Axes]]:
        """A figure with one panel per title, the caption above and the legend below."""
        columns = min(columns, len(titles))
        rows = -(-len(titles) // columns)
        titles = [textwrap.fill(title, int(self.width / 0.07)) for title in titles]
        top = self.top + 0.15 * max(title.count("\n") for title in titles)
        cell = self.left + self.width + self.right, self.bottom + self.height + top
        wide = max(columns * cell[0], 5.0)
        text = textwrap.fill(caption, int(12 * wide), break_long_words=False)
        head = 0.12 + 0.16 * (text.count("\n") + 1)
        widest = max((len(str(handle.get_label())) for handle in handles), default=0)
        per_line = max(1, min(len(handles), int(wide / (0.55 + _LETTER * widest))))
        foot = 0.1 + 0.2 * -(-len(handles) // per_line)
        high = head + rows * cell[1] + foot
        figure = Figure(figsize=(wide, high))
        figure.suptitle(text, fontsize=10, x=0.1 / wide, y=1 - 0.06 / high, ha="left", va="top")
        panels = []
        for number, title in enumerate(titles):
            row, column = divmod(number, columns)
            x = column * cell[0] + self.left
            y = high - head - (row + 1) * cell[1] + self.bottom
            panel = figure.add_axes(
                (x / wide, y / high, self.width / wide, self.height / high),
            )
            panel.set_title(title, fontsize=9, loc="left")
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panels.append(panel)
        if handles:
            figure.legend(
                handles=handles, loc="lower left", bbox_to_anchor=(0.1 / wide, 0.02 / high),
                ncols=per_line, fontsize=8, frameon=False, borderaxespad=0,
            )  # fmt: skip
        return figure, panels


def room_for(labels: Sequence[str]) -> float:
    """Inches that labels beside a panel need."""
    return 0.3 + _LETTER * max((len(label) for label in labels), default=0)


def scale_costs(panel: Axes, costs: Sequence[float], ticks: Sequence[float] = ()) -> None:
    """The axis of a cost, from high to low; logarithmic where the costs span a factor of two.

    Args:
        ticks: values to mark; those that would touch each other are left out.
    """
    low, high = min(costs), max(costs)
    if low <= 0 or high < 2 * low:
        edge = 0.06 * (high - low or high or 1)
        panel.set_xlim(high + edge, low - edge)
        return
    panel.set_xscale("log", base=2)
    edge = (high / low) ** 0.06
    panel.set_xlim(high * edge, low / edge)
    if ticks:
        apart, kept = (high / low) ** 0.09, [min(ticks)]
        for tick in sorted(ticks):
            if tick >= kept[-1] * apart:
                kept.append(tick)
        panel.set_xticks(kept)
    else:
        panel.xaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 4, 6, 8)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.minorticks_off()


def label_lines(panel: Axes, ends: dict[str, tuple[float, float]], looks: dict[str, Look]) -> None:
    """Write labels right of a panel at the heights of their lines, moved apart where they touch.

    Args:
        ends: label -> end of its line.
    """
    low, high = panel.get_ylim()
    inches = panel.get_position().height * panel.figure.get_size_inches()[1]  # type: ignore[union-attr]
    step = 0.135 * (high - low) / inches
    order = sorted(ends, key=lambda label: ends[label][1])
    places = apart([ends[label][1] for label in order], step, low, high)
    shown = short_names([*looks])
    for label, place in zip(order, places, strict=True):
        panel.annotate(
            shown[label], ends[label], (1.06, place),
            textcoords=("axes fraction", "data"), fontsize=8, color=looks[label].color,
            va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": looks[label].color, "linewidth": 0.5, "shrinkA": 1,
                "shrinkB": 3, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def apart(values: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Ascending values, moved as little as needed to be `step` apart, within [low, high].

    Where they do not fit, they leave the interval at its upper end.
    """
    # runs of values that touch, each around the mean of its values, merged until none touch
    runs: list[list[float]] = []
    for value in values:
        runs.append([value])
        while len(runs) > 1 and _start(runs[-1], step, low, high) < (
            _start(runs[-2], step, low, high) + step * len(runs[-2])
        ):
            runs[-2:] = [runs[-2] + runs[-1]]
    return [
        _start(run, step, low, high) + step * number for run in runs for number in range(len(run))
    ]


def _start(run: list[float], step: float, low: float, high: float) -> float:
    """The place of the first value of a run."""
    length = step * (len(run) - 1)
    return max(low, min(high - length, float(np.mean(run)) - length / 2))
