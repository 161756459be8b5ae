"""Figures of a sweep: accuracy against cost, bars per task, agreement between methods."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from secateur.reporting.comparison import Cell
from secateur.tasks import TASKS

UNPRUNED = "none"
_MARKERS = "osDv^<>Pp*hX8dH"
_COLUMNS = 3  # panels per row
_BLACK = "#222222"


class Look(NamedTuple):
    """How a method is drawn."""

    color: tuple[float, float, float]
    marker: str


def looks(comparison: pd.DataFrame) -> dict[str, Look]:
    """A colour and a marker for every method, the same in every figure of the comparison."""
    methods = sorted(set(comparison["method"]) - {UNPRUNED})
    palette = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"]
    colors = palette.colors  # type: ignore[attr-defined]
    return {
        name: Look(colors[i % len(colors)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(methods)
    }


def pareto(cost: ArrayLike, value: ArrayLike) -> np.ndarray:
    """Which points are on the Pareto front [points].

    A point is on it if no other point costs no more, scores no less, and is better in one of both.
    """
    x, y = np.asarray(cost, dtype=float), np.asarray(value, dtype=float)
    no_worse = np.less_equal.outer(x, x) & np.greater_equal.outer(y, y)  # [other, point]
    better = np.less.outer(x, x) | np.greater.outer(y, y)
    return ~(no_worse & better).any(axis=0)


def accuracy_against(comparison: pd.DataFrame, cost: pd.Series, axis: str, caption: str) -> Figure:
    """One panel per task: values with 95 % intervals against a cost, and their Pareto front.

    Args:
        comparison: of `secateur.reporting.comparison.compare`.
        cost: by task, method and budget; rows without a cost are not drawn.
        axis: the name of the cost, with its unit.

    Raises:
        ValueError: no row of the comparison has a cost.
    """
    points = comparison.join(cost.rename("cost"), on=["task", "method", "budget"]).dropna(
        subset=["cost"]
    )
    if points.empty:
        raise ValueError(f"no row has a cost ({axis})")
    figure, tasks = panels(comparison, caption, 3.4)
    look = looks(comparison)
    for task, panel in tasks.items():
        own = points[points["task"] == task].dropna(subset=["value"]).sort_values("cost")
        front = own[pareto(own["cost"], own["value"])]
        panel.plot(
            front["cost"], front["value"], color=_BLACK, linewidth=0.8, linestyle="--", zorder=1
        )
        panel.plot(
            front["cost"],
            front["value"],
            "o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=_BLACK,
            zorder=1,
        )
        for row in own.to_dict("records"):
            method = row["method"]
            color, marker = look.get(method, Look((0.13, 0.13, 0.13), "*"))
            sure = row["low"] == row["low"]
            errors = [[row["value"] - row["low"]], [row["high"] - row["value"]]] if sure else None
            panel.errorbar(
                row["cost"],
                row["value"],
                yerr=errors,
                color=color,
                marker=marker,
                markersize=6,
                linewidth=0.8,
                capsize=2,
                alpha=0.85,
                markerfacecolor=color if sure else "none",
            )
        panel.set_xlabel(axis, fontsize=8)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_BLACK, marker="*", linestyle="none", label="unpruned"),
        *(
            Line2D([], [], color=own.color, marker=own.marker, linestyle="none", label=_short(name))
            for name, own in look.items()
        ),
        Line2D(
            [],
            [],
            color=_BLACK,
            marker="o",
            markersize=11,
            markerfacecolor="none",
            linestyle="--",
            label="Pareto front",
        ),
    ]
    if points["low"].isna().any():
        handles.append(
            Line2D(
                [],
                [],
                color="gray",
                marker="o",
                markerfacecolor="none",
                linestyle="none",
                label="hollow: no interval",
            )
        )
    return _finished(figure, handles)


def bars(comparison: pd.DataFrame, caption: str) -> Figure:
    """One panel per task, one group per budget, one bar per method with its 95 % interval.

    A line shows the unpruned value, a band its interval.
    """
    figure, tasks = panels(comparison, caption, 3.0)
    look = looks(comparison)
    tokens = comparison[comparison["method"] != UNPRUNED].groupby("budget")["tokens"].mean()
    budgets = list(tokens.sort_values(ascending=False).index)
    width = 0.86 / max(1, len(look))
    for task, panel in tasks.items():
        own = comparison[comparison["task"] == task]
        for row in own.to_dict("records"):
            if row["method"] == UNPRUNED:
                panel.axhline(row["value"], color=_BLACK, linewidth=0.8, linestyle=":")
                if row["low"] == row["low"]:
                    panel.axhspan(row["low"], row["high"], color="#dddddd", zorder=0)
                continue
            sure = row["low"] == row["low"]
            place = (
                budgets.index(row["budget"])
                - 0.43
                + width * (list(look).index(row["method"]) + 0.5)
            )
            panel.bar(
                place,
                row["value"],
                width,
                color=look[row["method"]].color,
                hatch=None if sure else "///",
                edgecolor=_BLACK if row["tied_best"] or not sure else "none",
                linewidth=1.2 if row["tied_best"] else 0.5,
            )
            if sure:
                panel.vlines(place, row["low"], row["high"], color=_BLACK, linewidth=0.8)
        panel.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
        panel.set_xlabel("budget", fontsize=8)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_BLACK, linestyle=":", label="unpruned, with its interval"),
        *(Patch(color=own.color, label=_short(name)) for name, own in look.items()),
    ]
    if comparison["tied_best"].any():
        handles.append(
            Patch(
                facecolor="white",
                edgecolor=_BLACK,
                linewidth=1.2,
                label="framed: not below the best",
            )
        )
    if comparison["low"].isna().any():
        handles.append(
            Patch(facecolor="white", edgecolor=_BLACK, hatch="///", label="hatched: no interval")
        )
    return _finished(figure, handles)


def agreement(cells: Sequence[Cell]) -> dict[str, pd.DataFrame]:
    """The share of documents that two methods answer alike, mean over the tasks.

    Case and spaces at the ends do not count.

    Returns:
        By budget, a matrix of the methods and the unpruned model. NaN: the two did not answer the
        same documents of all tasks.
    """
    answers: dict[tuple[str, str, str], pd.Series] = {
        (cell.budget, cell.method, cell.task): cell.rows.set_index("doc_id")["answer"]
        .str.strip()
        .str.lower()
        .sort_index()
        for cell in cells
    }
    tasks = sorted({cell.task for cell in cells})
    full = sorted({(budget, method) for budget, method, _ in answers if method == UNPRUNED})
    size = {
        budget: np.mean([c.tokens for c in cells if c.budget == budget])
        for budget, method, _ in answers
        if method != UNPRUNED
    }
    found = {}
    for budget in sorted(size, key=lambda budget: -size[budget]):
        rows = full + sorted(
            {(at, method) for at, method, _ in answers if at == budget and method != UNPRUNED}
        )

        def alike(one: tuple[str, str], other: tuple[str, str]) -> float:
            shares = []
            for task in tasks:
                left, right = answers.get((*one, task)), answers.get((*other, task))
                if left is None or right is None or not left.index.equals(right.index):
                    return np.nan
                shares.append(float((left == right).mean()))
            return float(np.mean(shares))

        names = [method for _, method in rows]
        found[budget] = pd.DataFrame(
            [[alike(a, b) for b in rows] for a in rows], index=names, columns=names
        )
    return found


def agreement_matrices(shares: dict[str, pd.DataFrame], caption: str) -> Figure:
    """Draw what `agreement` returns: one matrix per budget, in percent."""
    largest = max(len(matrix) for matrix in shares.values())
    side = max(3.6, 0.42 * largest + 1.6)
    columns = min(len(shares), 2 if largest <= 10 else 1)
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(side * columns, side * rows + 0.4), layout="constrained")
    figure.suptitle(_wrapped(caption, side * columns), fontsize=9)
    for number, (budget, matrix) in enumerate(shares.items()):
        panel = figure.add_subplot(rows, columns, number + 1)
        percents = 100 * matrix.to_numpy()
        panel.imshow(percents, vmin=0, vmax=100, cmap="YlGnBu")
        for i, j in np.ndindex(matrix.shape):
            share = percents[i, j]
            text, color = f"{share:.0f}", "white" if share > 60 else _BLACK
            if share != share:
                text = "–"
            panel.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        labels = [_short(str(name)) for name in matrix.index]
        panel.set_xticks(range(len(matrix)), labels, rotation=90, fontsize=7)
        panel.set_yticks(range(len(matrix)), labels, fontsize=7)
        panel.set_title(f"budget {budget}: equal answers, %", fontsize=9)
    return figure


def panels(comparison: pd.DataFrame, caption: str, height: float) -> tuple[Figure, dict[str, Axes]]:
    """A titled figure with one panel per task, the average first."""
    tasks = sorted(dict.fromkeys(comparison["task"]), key=lambda task: task != "average")
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(5.0, 4.0 * columns), height * rows + 0.8), layout="constrained")
    figure.suptitle(_wrapped(caption, max(5.0, 4.0 * columns)), fontsize=9)
    found = {}
    for number, task in enumerate(tasks):
        panel = found[task] = figure.add_subplot(rows, columns, number + 1)
        panel.set_title(
            "average, % of unpruned"
            if task == "average"
            else TASKS[task].heading()
            if task in TASKS
            else task,
            fontsize=9,
        )
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, found


def _finished(figure: Figure, handles: list[Line2D | Patch]) -> Figure:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4 if figure.get_figwidth() > 8 else 2,
        fontsize=8,
        frameon=False,
    )
    return figure


def _short(label: str) -> str:
    return textwrap.fill(label, 26, break_long_words=False)


def _wrapped(caption: str, inches: float) -> str:
    return textwrap.fill(caption, int(14 * inches))
