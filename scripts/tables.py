"""Print every published table beside our numbers, and the sweeps' tables with intervals.

python scripts/tables.py [--results results]     the same as `make tables`

It writes these files to results/tables:
papers/<table>.{md,tex,html,csv}                  a published table beside our numbers
papers/duplicates.csv, papers/contradictions.csv  numbers that several papers print, alike or not
papers/averages.csv                               printed averages beside those of printed scores
intervals_<suite>_<model>_<limit>.{md,csv}        one for every sweep
"""

import argparse
from pathlib import Path

from rich.console import Console

from secateur.paths import ROOT
from secateur.progress import count, run_script
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
from secateur.reporting.stats import RESAMPLES
from secateur.reporting.versions import Stale, left_out


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
        "--resamples",
        type=count,
        default=RESAMPLES,
        help=f"how often images are resampled (default: {RESAMPLES})",
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    folder, console, failed = (
        options.results / "tables",
        Console(soft_wrap=True, highlight=False, markup=False),
        False,
    )

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
        paths = render.write(table, folder / "papers")
        console.print(paths[0].read_text())
        counts = table.cells["verdict"].value_counts()
        console.print(
            f"{layout.title}: "
            + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
            style="bold",
        )
    claims = reported.load_efficiency().query("paper == 'SPpruner'")
    console.print(
        "ZSPAPrune: no table of it is public, and no number.\n"
        "SPpruner: no table of it is public; its abstract says: "
        + ", ".join(
            f"{row.quantity} {row.value:g} {row.unit} ({row.model})" for row in claims.itertuples()
        )
        + "."
    )
    for name, question in (
        ("duplicates", "numbers in several papers"),
        ("contradictions", "cells printed differently"),
    ):
        found = getattr(reported, name)(numbers)
        found.to_csv(folder / "papers" / f"{name}.csv", index=False)
        console.print(
            f"\n{len(found)} {question}; the first five of papers/{name}.csv:\n"
            f"{found.head().to_string(index=False)}"
        )
    means = averages.check(numbers)
    means.to_csv(folder / "papers" / "averages.csv", index=False)
    wrong = (~means["follows"]).sum()
    console.print(
        f"\n{wrong} of {len(means)} printed averages do not follow from the printed scores by "
        "their table's formula; see papers/averages.csv\n"
    )

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


if __name__ == "__main__":
    run_script(main)
