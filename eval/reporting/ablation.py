"""Scores against a field of a method, for sweeps that vary it."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from secateur.pruners import REGISTRY
from secateur.records import Identity
from secateur.reporting.figures import UNPRUNED, panels
from secateur.reporting.seeds import row_names


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
    """One panel per task, one line per budget: the score with its interval against the field.

    Values that are no numbers stand side by side. A dotted line marks the default.
    """
    title = f"{one.method} {one.others}".strip() + f" against {one.field}: {caption}"
    drawn, by_task = panels(comparison, title, 3.0)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in one.rows)
    values = sorted(one.rows) if numeric else list(one.rows)
    place = {value: value if numeric else number for number, value in enumerate(values)}
    pruned = comparison[comparison["method"].isin(one.rows.values())]
    budgets = list(pruned.groupby("budget")["tokens"].mean().sort_values(ascending=False).index)
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    default = getattr(REGISTRY[one.method], one.field, None)
    for task, panel in by_task.items():
        own = comparison[comparison["task"] == task]
        for row in own[own["method"] == UNPRUNED].to_dict("records"):
            panel.axhline(row["value"], color="#222222", linewidth=0.8, linestyle="--")
        for number, budget in enumerate(budgets):
            rows = own[own["budget"] == budget].set_index("method")
            known = [value for value in values if one.rows[value] in rows.index]
            line = rows.loc[[one.rows[value] for value in known]]
            low, high = line["value"] - line["low"], line["high"] - line["value"]
            panel.errorbar(
                [place[value] for value in known], line["value"],
                yerr=[low.fillna(0), high.fillna(0)],
                color=colors[number % len(colors)], marker="o", markersize=4, linewidth=1,
                capsize=2,
            )  # fmt: skip
        if not numeric:
            panel.set_xticks(range(len(values)), [textwrap.fill(str(v), 12) for v in values])
        if default in place:
            panel.axvline(place[default], color="gray", linewidth=0.8, linestyle=":")
        panel.set_xlabel(one.field, fontsize=8)
    handles = [
        Line2D([], [], color="#222222", linestyle="--", label="unpruned"),
        *[Line2D([], [], color="gray", linestyle=":", label="default")] * (default in place),
        *(
            Line2D([], [], color=colors[n % len(colors)], marker="o", label=f"budget {budget}")
            for n, budget in enumerate(budgets)
        ),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
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
