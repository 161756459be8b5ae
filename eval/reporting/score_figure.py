"""All scores of a comparison with their intervals, one line per method and budget."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from secateur.reporting.figures import (
    BLACK,
    UNPRUNED,
    Grid,
    Handles,
    Look,
    looks,
    room_for,
    short_names,
    task_title,
    tasks_of,
)

_LINE = 0.165  # inches per line
_GAP = 1.4  # lines between two budgets
_UNNAMED = "#7b838c"  # of methods without a colour of their own


def scores(comparison: pd.DataFrame, caption: str, highlight: Sequence[str] = ()) -> Figure:
    """One panel per task, one line per method and budget: the score with its 95 % interval.

    Budgets follow each other from many to few tokens, the methods of one from best to worst in the
    first panel. "not run" stands where a task has no score of the line.

    Args:
        comparison: of `secateur.reporting.comparison.compare`.
        highlight: as in `secateur.reporting.figures.looks`.

    Raises:
        ValueError: as `looks`.
    """
    look = looks(comparison, highlight)
    pruned = comparison[comparison["method"] != UNPRUNED]
    tasks = tasks_of(pruned) or tasks_of(comparison)
    shown, places, heads = short_names([*look]), {}, {}
    sizes = pruned.groupby("budget")["tokens"].median().sort_values(ascending=False)
    place = 0.0
    for budget in sizes.index:
        heads[str(budget)] = place
        place += 1
        own = pruned[pruned["budget"] == budget]
        first = own[own["task"] == tasks[0]].set_index("method")["value"]
        order = first.reindex(dict.fromkeys(own["method"])).sort_values(ascending=False)
        for method in order.index:
            places[str(budget), str(method)] = place
            place += 1
        place += _GAP - 1
    names = [shown[method] for _, method in places]
    grid = Grid(1.3, _LINE * max(place, 3), left=0.08, right=0.12, bottom=0.3, top=0.4)
    figure, panels = grid.draw(
        [task_title(task) for task in tasks], len(tasks), caption, _handles(comparison)
    )
    room = room_for([*names, "budget 128/tile"])
    _make_room(figure, panels, room)
    for task, panel in zip(tasks, panels, strict=True):
        panel.set_ylim(place, -0.6)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        panel.grid(axis="x", color="#e3e6e9", linewidth=0.6)
        panel.set_axisbelow(True)
        _panel(panel, comparison[comparison["task"] == task], places, look)
    for (_, method), line in places.items():
        _label(panels[0], line, shown[method], look[method].color if look[method].named else BLACK)
    for budget, line in heads.items():
        text = budget if budget.endswith(("%", "tile")) else f"{budget} tokens"
        _label(panels[0], line, text, BLACK, weight="bold")
    return figure


def _panel(
    panel: Axes, own: pd.DataFrame, places: dict[tuple[str, str], float], look: dict[str, Look]
) -> None:
    rows = {(row["budget"], row["method"]): row for row in own.to_dict("records")}
    for row in rows.values():
        if row["method"] == UNPRUNED:
            panel.axvline(row["value"], color=BLACK, linewidth=0.8, linestyle="--", gid=UNPRUNED)
            if row["high"] > row["low"]:
                panel.axvspan(row["low"], row["high"], color="#e9ebee", zorder=0)
    for key, line in places.items():
        if key not in rows or rows[key]["value"] != rows[key]["value"]:
            panel.text(
                0.02, line, "not run", transform=panel.get_yaxis_transform(), fontsize=7,
                color=_UNNAMED, va="center",
            )  # fmt: skip
            continue
        row, color = rows[key], look[key[1]].color if look[key[1]].named else _UNNAMED
        sure = row["low"] == row["low"]
        if sure:
            panel.plot([row["low"], row["high"]], [line, line], color=color, linewidth=1.2)
        panel.plot(
            row["value"], line, "o", markersize=6 if row["tied_best"] else 4, gid=" ".join(key),
            markerfacecolor=color if sure else "none",
            markeredgecolor=BLACK if row["tied_best"] else color,
            markeredgewidth=1.2 if row["tied_best"] else 0.8,
        )  # fmt: skip
    panel.margins(x=0.04)


def _label(panel: Axes, line: float, text: str, color: str, weight: str = "normal") -> None:
    panel.annotate(
        text, (0, line), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="center", fontsize=8, color=color, fontweight=weight, annotation_clip=False,
    )  # fmt: skip


def _make_room(figure: Figure, panels: list[Axes], inches: float) -> None:
    """Widen a figure at its left side, all its parts keeping their sizes."""
    wide, high = figure.get_size_inches()
    figure.set_size_inches(wide + inches, high)
    for panel in panels:
        box = panel.get_position()
        panel.set_position(
            ((box.x0 * wide + inches) / (wide + inches), box.y0, box.width * wide / (wide + inches),
             box.height)
        )  # fmt: skip


def _handles(comparison: pd.DataFrame) -> Handles:
    handles: Handles = []
    if (comparison["method"] == UNPRUNED).any():
        handles.append(
            Line2D([], [], color=BLACK, linestyle="--", label="unpruned, with its interval")
        )
    if comparison["tied_best"].any():
        handles.append(_dot("black rim: not below the best of its budget", _UNNAMED, BLACK))
    if comparison["low"].isna().any():
        handles.append(_dot("hollow: no interval", "none", _UNNAMED))
    return handles


def _dot(label: str, face: str, edge: str) -> Line2D:
    return Line2D(
        [], [], color="none", marker="o", markerfacecolor=face, markeredgecolor=edge, label=label
    )
