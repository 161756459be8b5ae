"""Accuracy tables of finished cells: printed, Markdown, CSV."""

import html
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from secateur.records import Record
from secateur.reporting.versions import mixtures
from secateur.tasks import TASKS

Records = list[Record]
# columns of tables, where they are not zero: heading, and the field of `Results` that counts
COUNTS = {
    "empty %": "empty_answers",
    "unusable %": "unusable_answers",
    "cut off %": "cut_off_answers",
    "rewritten %": "rewritten_prompts",
}
DAGGER = "†"
NOTE = (
    f"{DAGGER}: from some answers the task's own scoring reads nothing; they are wrong, or guessed."
)


def by_setting(records: Records) -> list[Records]:
    """Records that may share a table, by setting."""

    def setting(record: Record) -> tuple[str, str]:
        return record.identity.stem, record.identity.setting

    return [list(group) for _, group in groupby(sorted(records, key=setting), key=setting)]


def accuracy(records: Records) -> pd.DataFrame:
    """One row per method and budget, one column per task (its headline metric).

    Column tokens: visual tokens per prompt, mean over layers and documents, then over the tasks of
    the row, since a method may keep more of a budget in one task than in another. Column
    relative %: mean over tasks of the score in percent of the unpruned score, without tasks in
    which that is 0. The unpruned row comes first, then the rows from many to few tokens. Tasks that
    a row did not run are empty, and so is its relative %. The columns of
    `COUNTS` give shares of a row's documents; a column without any is left out.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    tokens: dict[tuple[str, str], list[float]] = {}
    own: dict[tuple[str, str], Records] = {}
    for record in records:
        identity = record.identity
        task, key = record.entry, (identity.pruner.label, identity.budget)
        rows.setdefault(key, {})
        if task.metrics:
            metric = task.metrics[task.headline]
            rows[key][task.heading()] = metric.factor * record.metrics[metric.stored]
        tokens.setdefault(key, []).append(record.average_tokens)
        own.setdefault(key, []).append(record)
    means = {key: fmean(own) for key, own in tokens.items()}
    order = sorted(rows, key=lambda key: (key[0] != "none", -means[key], *key))
    table = pd.DataFrame(
        [{"method": key[0], "budget": key[1], "tokens": means[key], **rows[key]} for key in order]
    )
    listed = [task.heading() for task in TASKS.values()]
    others = sorted(
        record.entry.heading()
        for record in records
        if not record.entry.listed and record.entry.metrics
    )
    tasks = [heading for heading in dict.fromkeys([*listed, *others]) if heading in table]
    table = table[["method", "budget", "tokens", *tasks]]
    unpruned_rows = table[table["method"] == "none"]
    if len(unpruned_rows) == 1:
        unpruned = unpruned_rows[tasks].iloc[0]
        based = [name for name in tasks if not unpruned[name] <= 0]
        table["relative %"] = (100 * table[based] / unpruned[based]).mean(axis=1, skipna=False)
    for heading, field in COUNTS.items():
        shares = [share(own[key], field) for key in order]
        if any(shares):
            table[heading] = [100 * value for value in shares]
    return table


def share(records: Records, field: str) -> float:
    """The share of all documents of some cells that this field of `Results` counts."""
    counted = sum(getattr(record, field) for record in records)
    return counted / sum(record.documents for record in records)


def _cells(records: Records) -> pd.DataFrame:
    """The table as printed: one decimal, a dash if nothing was run, a dagger (see `NOTE`)."""
    table = accuracy(records)
    shown = table.map(
        lambda value: (
            "-" if value != value else f"{value:.1f}" if isinstance(value, float) else str(value)
        )
    )
    for record in records:
        own = record.identity
        if share([record], "unusable_answers") and record.entry.metrics:
            row = (table["method"] == own.pruner.label) & (table["budget"] == own.budget)
            shown.loc[row, record.entry.heading()] += DAGGER
    return shown


def _notes(records: Records) -> list[str]:
    """What a reader needs to know of the table's marks, and of tasks without a score."""
    found = [NOTE] * bool(share(records, "unusable_answers"))
    for name in sorted({one.identity.task for one in records if not one.entry.metrics}):
        found.append(
            f"{name} has no score here: its server scores the file in the folder submissions of "
            "each cell's folder."
        )
    return found


def show(records: Records) -> None:
    """Print the table."""
    table = _cells(records)
    view = Table(title=records[0].identity.title)
    for name in table:
        view.add_column(str(name), justify="left" if name == "method" else "right")
    for row in table.itertuples(index=False):
        view.add_row(*row, style="bold" if row[0] == "none" else None)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(view)
    for note in _notes(records):
        console.print(note, markup=False, highlight=False)


def stems(groups: Sequence[Records]) -> list[str]:
    """File names of settings, without suffix; where two would be equal, with their digests."""
    names = [group[0].identity.stem for group in groups]
    return [
        f"{name}_{group[0].identity.setting}" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def write(records: Records, stem: Path) -> list[Path]:
    """Write the table as Markdown and CSV; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    identity, table = records[0].identity, accuracy(records)
    commits = sorted({record.environment.commit for record in records})
    shown = _cells(records)
    lines = [
        f"Accuracy: {identity.title}.",
        "",
        "| " + " | ".join(shown.columns) + " |",
        "|" + "|".join("---" if name == "method" else "---:" for name in shown.columns) + "|",
        *("| " + " | ".join(row) + " |" for row in shown.itertuples(index=False)),
        "",
        *(f"{note}\n" for note in _notes(records)),
        *(f"{text}\n" for text in mixtures(records)),
        f"{len(records)} cells, commit {', '.join(commits)}. "
        "`tokens`: visual tokens per prompt, mean over layers and tasks. "
        "`relative %`: mean over tasks of the score as a share of the unpruned model's, "
        "without tasks in which that is 0.",
        "",
    ]
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".csv")]
    paths[0].write_text(html.escape("\n".join(lines), quote=False), encoding="utf-8")
    table.to_csv(paths[1], index=False)
    return paths
