"""Scores against a field of a method, for sweeps that vary it."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from secateur.pruners import REGISTRY
from secateur.records import Identity
from secateur.reporting.figures import (
    BLACK,
    COLORS,
    UNPRUNED,
    Grid,
    Handles,
    task_title,
    tasks_of,
)
from secateur.reporting.seeds import row_names

CAPTION = "The bands and bars are 95 % intervals; bars of one value stand side by side."


class Varied(NamedTuple):
    """A field with several values, all other fields of the method being equal.

    Attributes:
        method: its name.
        field: the field.
        others: the other fields that differ from their defaults, as text; empty if none does.
        rows: the value of the field -> the row of the comparison.
    """

    method: str
    field: str
    others: str
    rows: dict[Any, str]


def varied(identities: Iterable[Identity]) -> list[Varied]:
    """The fields that vary among some cells. A seed is no such field: its values share a row."""
    identities = list(identities)
    names = row_names(identities)
    groups: dict[tuple[str, str, str], dict[Any, str]] = defaultdict(dict)
    for method in (own.pruner for own in identities):
        for field, value in method.fields.items():
            if field != "seed":
                rest = method.label_without(field, "seed").removeprefix(method.name).strip()
                value = value if isinstance(value, int | float | str) else str(value)
                groups[method.name, field, rest][value] = names[method.label]
    return [Varied(*key, rows) for key, rows in sorted(groups.items()) if len(rows) > 1]


def figure(one: Varied, comparison: pd.DataFrame, caption: str) -> Figure:
    """One panel per task, one line per budget: the score against the field, with its interval.

    Intervals are bands. Values that are no numbers stand side by side, and so do the intervals of
    their budgets. A dotted line marks the default.
    """
    pruned = comparison[comparison["method"].isin(one.rows.values())]
    budgets = list(pruned.groupby("budget")["tokens"].mean().sort_values(ascending=False).index)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in one.rows)
    values = sorted(one.rows) if numeric else list(one.rows)
    place = {value: value if numeric else number for number, value in enumerate(values)}
    default = getattr(REGISTRY[one.method], one.field, None)
    unpruned = comparison[comparison["method"] == UNPRUNED].set_index("task")["value"]
    tasks = [task for task in tasks_of(comparison) if task in set(pruned["task"])]
    handles: Handles = []
    if len(unpruned):
        handles.append(Line2D([], [], color=BLACK, linestyle="--", label="unpruned"))
    if default in place:
        handles.append(Line2D([], [], color="gray", linestyle=":", label="default"))
    handles += [
        Line2D([], [], color=COLORS[number % len(COLORS)], marker="o", label=f"budget {budget}")
        for number, budget in enumerate(budgets)
    ]
    title = f"{one.method} {one.others}".strip() + f" against {one.field}, {caption}"
    drawn, panels = Grid(2.6, 1.9).draw([task_title(task) for task in tasks], 3, title, handles)
    for task, panel in zip(tasks, panels, strict=True):
        if task in unpruned:
            panel.axhline(unpruned[task], color=BLACK, linewidth=0.8, linestyle="--")
        if default in place:
            panel.axvline(place[default], color="gray", linewidth=0.8, linestyle=":")
        for number, budget in enumerate(budgets):
            rows = pruned[(pruned["task"] == task) & (pruned["budget"] == budget)]
            rows = rows.set_index("method")
            known = [value for value in values if one.rows[value] in rows.index]
            line, color = rows.loc[[one.rows[v] for v in known]], COLORS[number % len(COLORS)]
            shift = 0.0 if numeric else 0.12 * (number - (len(budgets) - 1) / 2)
            at = [place[value] + shift for value in known]
            style = "-" if numeric else "none"
            panel.plot(at, line["value"], color=color, marker="o", markersize=4, linestyle=style)
            if numeric:
                panel.fill_between(at, line["low"], line["high"], color=color, alpha=0.15, lw=0)
            else:
                panel.vlines(at, line["low"], line["high"], color=color, linewidth=1)
        if not numeric:
            panel.set_xticks(range(len(values)), [textwrap.fill(str(v), 12) for v in values])
            panel.set_xlim(-0.5, len(values) - 0.5)
        panel.set_xlabel(one.field, fontsize=8)
    return drawn


def write(one: Varied, comparison: pd.DataFrame, caption: str, stem: Path) -> list[Path]:
    """Draw the figure beside a table, as PNG and PDF; returns the files."""
    words = "_".join([stem.name, one.method, *one.others.replace("=", "").split(), one.field])
    paths = [stem.with_name(f"{words}.{suffix}") for suffix in ("png", "pdf")]
    drawn = figure(one, comparison, caption)
    for path in paths:
        undated = {"CreationDate": None} if path.suffix == ".pdf" else {}
        drawn.savefig(path, dpi=110, metadata=undated)
    return paths
