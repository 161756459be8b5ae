"""List the cells of which tables show another version, and remove them on request.

    python scripts/stale_cells.py --results results
    python scripts/stale_cells.py --results results --delete

Versions of a cell have the same settings, method, budget and task, but were run with other code,
packages, weights or data. Tables show the version of the code that is here now; if there is none,
the newest.
"""

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from secateur.paths import ROOT
from secateur.progress import run_script
from secateur.reporting.versions import newest
from secateur.store import Store


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--delete", action="store_true", help="remove their folders")
    options = parser.parse_args()
    if not (options.results / "runs").is_dir():
        parser.error(f"--results {options.results} has no runs/ and is no results folder")
    store, console = Store(options.results), Console(soft_wrap=True, highlight=False, markup=False)
    damaged: list[str] = []
    _, stale = newest(store.records(damaged))
    for message in damaged:
        console.print(f"REFUSED {message}", style="red")
    for old in stale:
        console.print(str(old))
        if options.delete:
            shutil.rmtree(store.cell(old.record.identity).folder)
    done = "removed" if options.delete else "found; --delete removes them"
    console.print(f"{len(stale)} stale cells {done}", style="bold")
    return int(bool(damaged))


if __name__ == "__main__":
    run_script(main)
