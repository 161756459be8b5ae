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

from secateur.records import Record, digest
from secateur.reporting.seeds import SPREAD, row_names, seed_of
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
RELATIVE = "relative %"
OVER_RANDOM = "over random"
SD = " sd"  # ends the names of columns with standard deviations over seeds
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

    Records that differ in the method's seed alone share a row of means. Then there are columns
    seeds, their number, and `<column> sd`, the standard deviation over them. With three seeds of
    random there is a column over random: the difference of relative % to random at the budget.
    """
    names = row_names(record.identity for record in records)
    own: dict[tuple[str, str], Records] = {}
    for record in records:
        key = names[record.identity.pruner.label], record.identity.budget
        own.setdefault(key, []).append(record)
    means = {key: fmean(one.average_tokens for one in group) for key, group in own.items()}
    order = sorted(own, key=lambda key: (key[0] != "none", -means[key], *key))
    by_seed = pd.concat(
        {key: pd.DataFrame(_by_seed(own[key])).T.rename_axis("seed") for key in order},
        names=["method", "budget"],
    )
    listed = [task.heading() for task in TASKS.values()]
    others = sorted(
        record.entry.heading()
        for record in records
        if not record.entry.listed and record.entry.metrics
    )
    tasks = [heading for heading in dict.fromkeys([*listed, *others]) if heading in by_seed]
    scores = by_seed[tasks]
    unpruned = scores[scores.index.get_level_values("method") == "none"]
    if len(unpruned) == 1:
        full = unpruned.iloc[0]
        based = [name for name in tasks if not full[name] <= 0]
        ratios = 100 * scores[based] / full[based]
        scores = scores.assign(**{RELATIVE: ratios.mean(axis=1, skipna=False)})
    groups = scores.groupby(["method", "budget"], sort=False)
    table = groups.mean().reset_index()
    table.insert(2, "tokens", [means[key] for key in order])
    seeds = groups.size().to_numpy()
    if (seeds > 1).any():
        table.insert(2, "seeds", seeds)
        table = table.join(groups.std().reset_index(drop=True).add_suffix(SD))
        if RELATIVE in table and (over := _over_random(table)).notna().any():
            table.insert(list(table).index(RELATIVE) + 1, OVER_RANDOM, over)
    for heading, field in COUNTS.items():
        shares = [share(own[key], field) for key in order]
        if any(shares):
            table[heading] = [100 * value for value in shares]
    return table


def _over_random(table: pd.DataFrame) -> pd.Series:
    """Each row's relative score minus that of random at its budget, of three seeds or more."""
    randoms = table[(table["method"] == "random") & (table["seeds"] >= 3)]
    floor = table["budget"].map(randoms.set_index("budget")[RELATIVE])
    return (table[RELATIVE] - floor).where(~table["method"].isin(["none", "random"]))


def _by_seed(records: Records) -> dict[Any, dict[str, float]]:
    """The scores of a row by the method's seed and the heading of the task."""
    scores: dict[Any, dict[str, float]] = {}
    for record in records:
        task, own = record.entry, scores.setdefault(seed_of(record.identity.pruner), {})
        if task.metrics:  # else a server scores it
            metric = task.metrics[task.headline]
            own[task.heading()] = metric.factor * record.metrics[metric.stored]
    return scores


def share(records: Records, field: str) -> float:
    """The share of all documents of some cells that this field of `Results` counts."""
    counted = sum(getattr(record, field) for record in records)
    return counted / sum(record.documents for record in records)


def _cells(records: Records) -> pd.DataFrame:
    """The table as printed: one decimal, a dash if nothing was run, a dagger (see `NOTE`)."""
    table = accuracy(records)
    names = row_names(record.identity for record in records)
    shown = table.map(
        lambda value: (
            "-" if value != value else f"{value:.1f}" if isinstance(value, float) else str(value)
        )
    )
    for column in [name for name in table if f"{name}{SD}" in table]:
        spread = table[f"{column}{SD}"]
        shown[column] += spread.map(lambda value: "" if value != value else f" ± {value:.1f}")
        shown = shown.drop(columns=f"{column}{SD}")
    for record in records:
        own = record.identity
        if share([record], "unusable_answers") and record.entry.metrics:
            row = (table["method"] == names[own.pruner.label]) & (table["budget"] == own.budget)
            heading = record.entry.heading()
            shown.loc[row, heading] = shown.loc[row, heading].str.rstrip(DAGGER) + DAGGER
    return shown


def _notes(records: Records) -> list[str]:
    """What a reader of the table has to know of its marks and gaps."""
    notes = [NOTE] * bool(share(records, "unusable_answers"))
    names = row_names(record.identity for record in records)
    if len(set(names.values())) < len(names):
        notes.append(f"{SPREAD} Intervals: `make tables`.")
    if all(record.identity.pruner.name != "none" for record in records):
        notes.append(
            "No unpruned model among these cells, so nothing is relative to it: add pruner=none."
        )
    for name in sorted({one.identity.task for one in records if not one.entry.metrics}):
        notes.append(
            f"{name} has no score here: its server scores the file in the folder submissions of "
            "each cell's folder."
        )
    return notes


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


def grid_stem(records: Records) -> str:
    """The file name of one sweep's table, without suffix: the setting and a digest of the cells.

    The same sweep writes the same file again; another one has a file of its own.
    """
    cells = sorted(record.identity.configuration for record in records)
    return f"{records[0].identity.stem}_{digest(cells)[:8]}"


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
