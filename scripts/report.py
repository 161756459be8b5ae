"""Write the report of a results folder: results/report/index.html and summary.md.

python scripts/report.py [--results results]     the same as `make report`

The page needs no network; its figures are also written to results/figures. The exit status is 1 if
cells were refused; the page then says which cells, and why.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from secateur.paths import ROOT
from secateur.progress import count, run_script
from secateur.reporting.stats import RESAMPLES


def _document(text: str) -> tuple[str, int]:
    task, _, number = text.rpartition(":")
    return task, int(number)


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
    parser.add_argument(
        "--data-root",
        type=Path,
        help="folder with the data sets, from which the images are read (default: the hub)",
    )
    parser.add_argument(
        "--documents",
        nargs="+",
        type=_document,
        default=[],
        metavar="TASK:NUMBER",
        help="documents whose kept tokens to show (default: the first of every task)",
    )
    parser.add_argument(
        "--rivals",
        nargs=2,
        default=[],
        metavar="METHOD",
        help="the two methods of the gallery (default: the two best)",
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    from secateur.pruners import PrunerError
    from secateur.pruners.plugins import load_plugins

    try:
        load_plugins(options.plugins)
    except PrunerError as error:
        parser.error(str(error))
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # of lmms-eval's index of tasks
    os.environ.setdefault("TQDM_DISABLE", "1")
    from secateur.reporting.report import Report
    from secateur.reporting.report_page import write

    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        report = Report(
            options.results, options.resamples, options.data_root, options.documents, options.rivals
        )
    except ValueError as error:
        console.print(str(error), style="red")
        return 1
    for problem in report.problems:
        console.print(problem, style="red" if "REFUSED" in problem else "yellow")
    for path in write(report, options.results / "report"):
        console.print(f"written: {path}")
    return int(report.refused)


if __name__ == "__main__":
    run_script(main)
