"""Print every published table beside our numbers, and the sweeps' tables with intervals.

python scripts/tables.py [--results results]     the same as `make tables`

It writes these files to results/tables:
papers/<table>.{md,tex,html,csv}                  a published table beside our numbers
papers/duplicates.csv, papers/contradictions.csv  numbers that several papers print, alike or not
papers/averages.csv                               printed averages beside those of printed scores
intervals_<suite>_<model>_<limit>.{md,csv}        one for every sweep
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from secateur.paths import ROOT
from secateur.progress import count, run_script
from secateur.pruners import PrunerError
from secateur.pruners.plugins import load_plugins
from secateur.reporting import (
    averages,
    comparison,
    interval_table,
    paper_tables,
    render,
    reported,
    tables,
)
from secateur.reporting.layouts import layouts
from secateur.reporting.render import heading
from secateur.reporting.stats import RESAMPLES
from secateur.reporting.versions import Stale, left_out

WIDTH = 140  # of what is not a terminal
FIRST = 5  # rows that are printed of a long list


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results",
        help="folder of a sweep (default: results)",
    )
    parser.add_argument(
        "--plugins", default="", metavar="FILE,...", help="files with methods of your own"
    )
    parser.add_argument(
        "--resamples",
        type=count,
        default=RESAMPLES,
        help=f"how often images are resampled (default: {RESAMPLES})",
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    try:
        load_plugins(options.plugins)
    except PrunerError as error:
        parser.error(str(error))
    folder, failed, started = options.results / "tables", False, False
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, soft_wrap=True, highlight=False, markup=False)

    numbers = reported.load_reported()
    damaged: list[str] = []
    stale: list[Stale] = []
    cells = comparison.load(options.results, damaged, stale)
    for message in damaged:
        console.print(f"REFUSED {message}", style="red")
        failed = True
    for message in left_out(stale):
        console.print(message, style="yellow")
    for layout in layouts():
        try:
            table = paper_tables.build(layout, numbers, cells, options.resamples)
        except ValueError as error:
            console.print(f"REFUSED {layout.title}: {error}", style="red")
            failed = True
            continue
        render.write(table, folder / "papers")
        sheet = render.sheet(table)
        render.show(sheet, console)
        started |= render.LEGEND in sheet.notes
        console.print(f"{layout.title}: {render.counts(table)}\n", style="bold")
    if started:
        console.print(f"{render.LEGEND}\n")
    claims = reported.load_efficiency().query("paper == 'SPpruner'")
    console.print(
        "ZSPAPrune: no table of it is public, and no number.\n"
        "SPpruner: no table of it is public; its abstract says: "
        + ", ".join(
            f"{row.quantity} {row.value:g} {row.unit} ({row.model})" for row in claims.itertuples()
        )
        + "."
    )
    published_only(console, numbers, folder / "papers")

    groups = comparison.settings(cells)
    stems = tables.stems([[cell.record for cell in group] for group in groups])
    for group, stem in zip(groups, stems, strict=True):
        try:
            compared = comparison.compare(group, options.resamples)
        except ValueError as error:
            console.print(f"REFUSED {group[0].record.identity.title}: {error}", style="red")
            failed = True
            continue
        for path in interval_table.write(group, compared, folder / f"intervals_{stem}"):
            console.print(path.read_text() if path.suffix == ".md" else f"written: {path}")
    return int(failed)


def published_only(console: Console, numbers: pd.DataFrame, folder: Path) -> None:
    """Write and print what the published numbers say of each other, the most serious first."""
    alike = reported.duplicates(numbers)
    alike.to_csv(folder / "duplicates.csv", index=False)
    together = alike.groupby(["kind", "model", "method", "where"], sort=False)
    rows = together.agg(
        numbers=("value", "size"), budgets=("budget", lambda own: ", ".join(dict.fromkeys(own)))
    ).reset_index()
    copied = rows[rows["kind"] == reported.ALIKE[0]].nlargest(FIRST, "numbers")
    _list(
        console,
        f"{len(alike)} numbers are in several papers ({_kinds(alike)}); all in {folder.name}/"
        f"duplicates.csv. The {FIRST} largest copies:",
        [
            [
                row["model"],
                f"{row['method']} at {row['budgets']}",
                row["where"],
                str(row["numbers"]),
            ]
            for row in copied.to_dict("records")
        ],
        ["model", "method", "in", "equal numbers"],
    )
    different = reported.contradictions(numbers)
    different.to_csv(folder / "contradictions.csv", index=False)
    rows = different.head(FIRST)
    _list(
        console,
        f"{len(different)} cells are printed differently ({_kinds(different)}); all in "
        f"{folder.name}/contradictions.csv. The first {FIRST}:",
        [
            [
                row["kind"],
                row["model"],
                f"{row['method']} at {row['budget']}",
                heading(row["task"], row["metric"]),
                f"{row['spread_percent']:.0f} %",
                row["values"].replace(" | ", "\n"),
            ]
            for row in rows.to_dict("records")
        ],
        ["kind", "model", "method", "task", "highest above lowest", "printed"],
    )
    means = averages.check(numbers)
    means["difference"] = means["printed"] - means["recomputed"]
    means = means.sort_values("difference", key=lambda values: -values.abs(), kind="stable")
    digits = {"recomputed": 2, "mean_of_ratios": 2, "difference": 2}
    means.round(digits).to_csv(folder / "averages.csv", index=False)
    wrong = means[~means["follows"]]
    _list(
        console,
        f"{len(wrong)} of {len(means)} printed averages do not follow from the printed scores by "
        f"their table's formula; all in "
        f"{folder.name}/averages.csv. The first {FIRST}:",
        [
            [f"{row['paper']} {row['table']}", row["model"], f"{row['method']} at {row['budget']}"]
            + [f"{row['printed']:.1f}", f"{row['recomputed']:.1f}"]
            for row in wrong.head(FIRST).to_dict("records")
        ],
        ["table", "model", "method", "printed", "recomputed"],
    )


def _kinds(rows: pd.DataFrame) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in rows["kind"].value_counts().items())


def _list(console: Console, title: str, rows: list[list[str]], columns: Sequence[str]) -> None:
    console.print(title, style="bold")
    view = Table(*columns)
    for row in rows:
        view.add_row(*row)
    console.print(view, "\n", soft_wrap=False)


if __name__ == "__main__":
    run_script(main)
