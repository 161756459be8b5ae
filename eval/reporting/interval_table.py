"""The comparison of a sweep's cells as Markdown with notes, and as CSV."""

import html
import re
from pathlib import Path

import pandas as pd

from secateur.reporting.comparison import FEW_IMAGES, Cell, provenance
from secateur.reporting.stats import LEVEL
from secateur.reporting.tables import DAGGER, NOTE
from secateur.reporting.versions import mixtures

_NAMED = 6  # rows that a note names
_REASON = re.compile(r"; (?=\d+ |\d+\.\d tokens|no |other |every answer )")
_COUNT = re.compile(r"(\d+ of \d+) (.*)")


def markdown(cells: list[Cell], comparison: pd.DataFrame) -> str:
    """The comparison as a table with notes: one row per method and budget, one column per task."""
    comparison = comparison.assign(method=_with_seeds(comparison))
    shown = comparison.assign(cell=comparison.apply(_shown, axis=1))
    order = list(dict.fromkeys(comparison["task"]))
    wide = shown.pivot_table(
        index=["budget", "method"], columns="task", values="cell", aggfunc="first"
    )[order].fillna("not run")
    tokens = (
        comparison.groupby(["budget", "method"])["tokens"]
        .mean()
        .sort_values(ascending=False, kind="stable")
    )
    wide.insert(0, "tokens", tokens.map("{:.1f}".format))
    last = comparison[comparison["task"] == ("average" if "average" in order else order[-1])]
    if last["over_random"].notna().any():
        over = last.set_index(["budget", "method"]).apply(_over_random, axis=1)
        wide["over random"] = over.reindex(wide.index).fillna("")
    detectable = comparison.groupby("task", sort=False)["detectable"].median()
    notes = [
        "Value ± half of the 95 % interval (images resampled). **Bold**: not significantly below "
        "the best of its budget (paired, Holm, 5 %). ▾ or ▴: below or above the unpruned model "
        f"(paired, Holm over the rows of the task, 5 %). Neither below {FEW_IMAGES} images.",
        "Average: mean of the score in percent of the unpruned model's, over the tasks that have "
        "a baseline."
        if "average" in order
        else "No average: a task has no interval or no unpruned cell, or fewer than two tasks have "
        "a baseline.",
        "Smallest difference to the unpruned model that so many documents show with power 80 % "
        "(median over the methods): "
        + ", ".join(
            f"{task} {value:.1f}" if value == value else f"{task} cannot be estimated"
            for task, value in detectable.items()
        )
        + ".",
    ]
    if comparison["over_random"].isna().all():
        notes.append(
            "No difference to random: it needs three seeds of random at a budget "
            "(`pruner=random seeds=0,1,2`)."
        )
    if (comparison["seeds"] > 1).any():
        notes.append(
            "Rows of several seeds: means over the seeds, intervals over documents and seeds "
            "together; in parentheses the standard deviation over the seeds."
        )
    if "over random" in wide:
        notes.append(f"Over random: the difference in the column {last['task'].iloc[0]}.")
    marked = comparison[(comparison["mark"] != "") & (comparison["task"] != "average")]
    for task, rows in marked.groupby("task", sort=False):
        notes += _marks(str(task), rows, int((comparison["task"] == task).sum()))
    if shown["cell"].str.contains(DAGGER).any():
        notes.append(NOTE)
    notes += mixtures(cell.record for cell in cells)
    notes.append(provenance(cells))
    wide = wide.loc[tokens.index].reset_index()
    wide.insert(0, "method", wide.pop("method"))
    table = wide.to_markdown(index=False, disable_numparse=True)
    heading = f"Intervals: {cells[0].record.identity.title}."
    return f"{heading}\n\n{table}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _marks(task: str, rows: pd.DataFrame, total: int) -> list[str]:
    """What limits the rows of a task, each reason once; `total` counts all rows of the task.

    Reasons that differ in a count alone share a note, which names the row with the most. Many rows
    are counted instead of named; the CSV has the reasons of each row.
    """
    reasons: dict[str, list[tuple[int, str, str]]] = {}
    for method, budget, mark in rows[["method", "budget", "mark"]].to_numpy():
        for text in _REASON.split(mark):
            count = _COUNT.match(text)
            reason = count[2] if count else text
            number = int(count[1].split()[0]) if count else 0
            reasons.setdefault(reason, []).append((number, f"{method} {budget}", text))
    notes = []
    for found in reasons.values():
        who = [name for _, name, _ in found]
        named = ", ".join(who) if len(who) <= _NAMED else f"{len(who)} of {total} rows"
        _, most, text = max(found, key=lambda one: one[0])
        if len({text for *_, text in found}) > 1:
            text = f"{text} in {most}, no more in the others"
        notes.append(f"{task}, {'all rows' if len(who) == total else named}: {text}.")
    return notes


def _over_random(row: pd.Series) -> str:
    """The difference to random with its interval; empty where there is none."""
    value, low, high = (row[f"over_random{end}"] for end in ("", "_low", "_high"))
    if value != value:
        return ""
    return f"{value:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if low == low else "")


def _with_seeds(comparison: pd.DataFrame) -> pd.Series:
    """The methods, with the number of seeds where there are several."""
    most = comparison.groupby(["method", "budget"])["seeds"].transform("max")
    return pd.Series(
        [
            f"{method}, {count} seeds" if count > 1 else method
            for method, count in zip(comparison["method"], most, strict=True)
        ],
        comparison.index,
    )


def _shown(row: pd.Series) -> str:
    text = f"{row['value']:.1f}" + DAGGER * ("answers are unusable" in row["mark"])
    if row["low"] == row["low"]:
        text += f" ± {(row['high'] - row['low']) / 2:.1f}"
    if row["sd"] == row["sd"]:
        text += f" (sd {row['sd']:.1f})"
    if row["p_holm"] < 1 - LEVEL and not row["few_images"]:
        text += " ▾" if row["difference"] < 0 else " ▴"
    return f"**{text}**" if row["tied_best"] else text


def write(cells: list[Cell], comparison: pd.DataFrame, stem: Path) -> list[Path]:
    """Write the comparison as Markdown and, with every column, as CSV; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".csv")]
    # answers and commits in the notes may contain anything
    paths[0].write_text(html.escape(markdown(cells, comparison), quote=False), encoding="utf-8")
    comparison.to_csv(paths[1], index=False)
    return paths
