"""Accuracy against a cost: by task, and each method by itself."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from secateur.reporting.figures import (
    BLACK,
    GREY,
    UNPRUNED,
    Grid,
    Handles,
    Look,
    label_lines,
    looks,
    room_for,
    scale_costs,
    short_names,
    task_title,
    tasks_of,
)


def pareto(cost: ArrayLike, value: ArrayLike) -> np.ndarray:
    """Which points are on the Pareto front [points].

    A point is on it if no other point costs no more, scores no less, and is better in one of both.
    """
    x, y = np.asarray(cost, dtype=float), np.asarray(value, dtype=float)
    no_worse = np.less_equal.outer(x, x) & np.greater_equal.outer(y, y)  # [other, point]
    better = np.less.outer(x, x) | np.greater.outer(y, y)
    return ~(no_worse & better).any(axis=0)


def accuracy_against(
    comparison: pd.DataFrame,
    cost: pd.Series,
    axis: str,
    caption: str,
    highlight: Sequence[str] = (),
    front: bool = True,
) -> Figure:
    """One panel per task: a line per method against a cost, and the Pareto front as rings.

    Args:
        comparison: of `secateur.reporting.comparison.compare`.
        cost: by task, method and budget; rows without a cost are not drawn.
        axis: the name of the cost, with its unit.
        highlight: as in `secateur.reporting.figures.looks`.
        front: whether the Pareto front is drawn.

    Raises:
        ValueError: no row of a method has a cost; as `looks`.
    """
    points, look = _points(comparison, cost, axis), looks(comparison, highlight)
    named = [label for label, own in look.items() if own.named]
    grid = Grid(2.5, 2.1, right=room_for([*map(short_names([*look]).get, named)]))  # type: ignore[list-item]
    drawn = set(points["task"])
    tasks = [task for task in tasks_of(comparison) if task in drawn]
    marks = _ticks(points)
    handles = _handles(comparison, look)
    if front:
        handles.append(
            _handle("Pareto front: no method is cheaper and better", BLACK, "o", hollow=True)
        )
    figure, panels = grid.draw([task_title(task) for task in tasks], 3, caption, handles)
    for task, panel in zip(tasks, panels, strict=True):
        own = points[points["task"] == task]
        scale_costs(panel, own["cost"].tolist(), marks)
        _unpruned(panel, own, comparison)
        ends = _lines(panel, own, look)
        if front:
            best = own[pareto(own["cost"], own["value"])]
            panel.plot(
                best["cost"], best["value"], "o", markersize=10, markerfacecolor="none",
                markeredgecolor=BLACK, markeredgewidth=0.8, gid="front",
            )  # fmt: skip
        label_lines(panel, {label: ends[label] for label in named if label in ends}, look)
        panel.set_xlabel(axis, fontsize=8)
    return figure


def one_by_one(
    comparison: pd.DataFrame,
    cost: pd.Series,
    axis: str,
    caption: str,
    highlight: Sequence[str] = (),
) -> Figure:
    """One panel per method, the best first: its line with 95 % intervals, the others in grey.

    The scores are the average, or else those of the first task. Arguments and errors as in
    `accuracy_against`.
    """
    points, look = _points(comparison, cost, axis), looks(comparison, highlight)
    task = next(task for task in tasks_of(comparison) if task in set(points["task"]))
    own = points[points["task"] == task]
    pruned = own[own["method"] != UNPRUNED].sort_values(
        ["tokens", "value"], ascending=[True, False]
    )
    methods = list(dict.fromkeys(pruned["method"]))
    if not methods:
        raise ValueError(f"no pruned row has a cost ({axis})")
    shown = short_names([*look])
    handles = _handles(comparison, {})
    if len(methods) > 1:
        handles.append(_handle("the other methods", GREY, "."))
    text = f"{caption}. Score: {task_title(task)}"
    grid = Grid(1.6, 1.25, left=0.5, bottom=0.5)
    figure, panels = grid.draw([shown[label] for label in methods], 6, text, handles)
    for label, panel in zip(methods, panels, strict=True):
        scale_costs(panel, own["cost"].tolist(), _ticks(own))
        _unpruned(panel, own, comparison)
        _lines(panel, pruned[pruned["method"] != label], dict.fromkeys(methods, Look(GREY)), 0.6)
        line, color = pruned[pruned["method"] == label], look[label].color
        color = color if look[label].named else BLACK
        panel.vlines(line["cost"], line["low"], line["high"], color=color, linewidth=1)
        panel.plot(
            line["cost"], line["value"], color=color, marker="o", markersize=4, linewidth=1.4,
            gid=label,
        )  # fmt: skip
        panel.set_xlabel(axis, fontsize=8)
    return figure


def _points(comparison: pd.DataFrame, cost: pd.Series, axis: str) -> pd.DataFrame:
    """The rows that have a value and a cost, which is their column `cost`.

    Tasks that no method ran are left out.
    """
    points = comparison.join(cost.rename("cost"), on=["task", "method", "budget"])
    points = points.dropna(subset=["cost", "value"]).sort_values("cost", ascending=False)
    pruned = points["method"] != UNPRUNED
    if not pruned.any():
        raise ValueError(f"no row of a method has a cost ({axis})")
    return points[points["task"].isin(set(points["task"][pruned]))]


def _ticks(points: pd.DataFrame) -> list[float]:
    """The budgets as places on an axis of tokens; none for another cost."""
    if not np.allclose(points["cost"], points["tokens"]):
        return []
    return [float(value) for value in points.groupby("budget")["tokens"].median()]


def _lines(
    panel: Axes, points: pd.DataFrame, look: dict[str, Look], width: float = 1.4
) -> dict[str, tuple[float, float]]:
    """Draw a line per method, those in grey first; returns its end by method."""
    ends = {}
    pruned = points[points["method"] != UNPRUNED]
    for label, rows in sorted(pruned.groupby("method"), key=lambda item: look[str(item[0])].named):
        own = look[str(label)]
        panel.plot(
            rows["cost"], rows["value"], color=own.color, marker=own.marker, linestyle=own.line,
            markersize=4.5 if own.named else 2.5, linewidth=width if own.named else 0.8,
            gid=str(label),
        )  # fmt: skip
        ends[str(label)] = (float(rows["cost"].iloc[-1]), float(rows["value"].iloc[-1]))
    return ends


def _unpruned(panel: Axes, points: pd.DataFrame, comparison: pd.DataFrame) -> None:
    """Draw the unpruned model: a line with its interval, and a star at its cost, if it has one."""
    for row in comparison[
        (comparison["method"] == UNPRUNED) & (comparison["task"] == points["task"].iloc[0])
    ].to_dict("records"):
        panel.axhline(row["value"], color=BLACK, linewidth=0.8, linestyle="--", gid=UNPRUNED)
        if row["high"] > row["low"]:
            panel.axhspan(row["low"], row["high"], color="#e9ebee", zorder=0)
    full = points[points["method"] == UNPRUNED]
    panel.plot(full["cost"], full["value"], "*", color=BLACK, markersize=8)


def _handles(comparison: pd.DataFrame, look: dict[str, Look]) -> Handles:
    """The legend: what is not labelled beside its line."""
    handles: Handles = []
    unpruned = comparison[comparison["method"] == UNPRUNED]
    if len(unpruned):
        handles.append(Line2D([], [], color=BLACK, linestyle="--", marker="*", label="unpruned"))
    if (unpruned["high"] > unpruned["low"]).any():
        handles.append(Patch(color="#e9ebee", label="its 95 % interval"))
    if others := sum(not own.named for own in look.values()):
        handles.append(_handle(f"{others} other methods", GREY, "."))
    return handles


def _handle(label: str, color: str, marker: str, hollow: bool = False) -> Line2D:
    return Line2D(
        [], [], color=color, marker=marker, linestyle="none" if hollow else "-", label=label,
        markersize=9 if hollow else 4, markerfacecolor="none" if hollow else color,
    )  # fmt: skip
