"""Accuracy tables of finished cells: printed, Markdown, CSV."""

import dataclasses
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from pruners import REGISTRY

Records = list[dict[str, Any]]
TITLES = {"pope": "POPE F1", "scienceqa_img": "SQA", "gqa": "GQA", "mme": "MME sum", "mmmu_val": "MMMU", "mmstar": "MMStar"}
# task -> (metric shown, factor to points)
HEADLINE = {
    "pope": ("pope_f1_score", 100.0),
    "scienceqa_img": ("exact_match", 100.0),
    "gqa": ("exact_match", 100.0),
    "mme": ("mme_total_score", 1.0),
    "mmmu_val": ("mmmu_acc", 100.0),
    "mmstar": ("average", 100.0),
}


def by_setting(records: Records) -> list[Records]:
    """Records that may share a table: same suite, model, limit and seed."""

    def setting(record: dict[str, Any]) -> str:
        identity = record["identity"]
        return str([identity[key] for key in ("suite", "model", "limit", "seed")])

    return [list(group) for _, group in groupby(sorted(records, key=setting), key=setting)]


def label(pruner: dict[str, Any]) -> str:
    """Method name, options that differ from their defaults, and the mark of a reconstruction."""
    fields = dataclasses.fields(REGISTRY[pruner["name"]])
    # JSON has no tuples
    changed = [f"{f.name}={pruner[f.name]}" for f in fields if json.dumps(pruner[f.name]) != json.dumps(f.default)]
    mark = " (reconstruction)" if pruner["status"] == "reconstruction" else ""
    return " ".join([pruner["name"], *changed]) + mark


def accuracy(records: Records) -> pd.DataFrame:
    """One row a method and budget, one column a task (headline metric), and the mean share of the unpruned scores in percent.

    The unpruned row comes first, then budgets from large to small. Tasks a row did not run are empty, and so is its mean.
    """
    rows: dict[tuple[float, str, str], dict[str, Any]] = {}
    for record in records:
        identity = record["identity"]
        metric, factor = HEADLINE[identity["task"]]
        unpruned = identity["pruner"]["name"] == "none"
        key = (float("inf") if unpruned else record["average_tokens"], label(identity["pruner"]), identity["budget"])
        row = rows.setdefault(key, {"method": key[1], "budget": identity["budget"], "tokens": float(record["average_tokens"])})
        row[TITLES[identity["task"]]] = factor * record["metrics"][metric]
    order = sorted(rows, key=lambda key: (-key[0], key[1]))
    table = pd.DataFrame([rows[key] for key in order])
    tasks = [title for title in TITLES.values() if title in table]
    table = table[["method", "budget", "tokens", *tasks]]
    unpruned_rows = table[table["method"] == "none"]
    if len(unpruned_rows) == 1:
        table["relative %"] = (100 * table[tasks] / unpruned_rows[tasks].iloc[0]).mean(axis=1, skipna=False)
    return table


def title(records: Records) -> str:
    identity = records[0]["identity"]
    limit = "all documents" if identity["limit"] is None else f"the first {identity['limit']} documents a task"
    return f"suite {identity['suite']['name']}, model {identity['model']['name']}, {limit}, seed {identity['seed']}"


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers as printed: one decimal, a dash where nothing was run."""
    return table.map(lambda value: "-" if value != value else f"{value:.1f}" if isinstance(value, float) else str(value))


def show(records: Records) -> None:
    """Print the table."""
    table = _cells(accuracy(records))
    view = Table(title=title(records))
    for name in table:
        view.add_column(str(name), justify="left" if name == "method" else "right")
    for row in table.itertuples(index=False):
        view.add_row(*row, style="bold" if row[0] == "none" else None)
    Console(width=None if sys.stdout.isatty() else 120).print(view)


def write(records: Records, folder: Path) -> list[Path]:
    """Store the table as Markdown and CSV; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    identity, table = records[0]["identity"], accuracy(records)
    commits = sorted({record["environment"]["commit"] for record in records})
    stem = folder / f"{identity['suite']['name']}_{identity['model']['name']}_{identity['limit'] or 'all'}"
    shown = _cells(table)
    lines = [
        f"Accuracy: {title(records)}.",
        "",
        "| " + " | ".join(shown.columns) + " |",
        "|" + "|".join("---" if name == "method" else "---:" for name in shown.columns) + "|",
        *("| " + " | ".join(row) + " |" for row in shown.itertuples(index=False)),
        "",
        f"{len(records)} cells, commit {', '.join(commits)}. `tokens`: visual tokens a prompt, mean over the layers. "
        "`relative %`: mean over tasks of the score as a share of the unpruned model's.",
        "",
    ]
    paths = [stem.with_suffix(".md"), stem.with_suffix(".csv")]
    paths[0].write_text("\n".join(lines))
    table.to_csv(paths[1], index=False)
    return paths
