"""Write tables, figures, BibTeX and provenance of a results folder for a paper.

python scripts/paper.py --out paper [--results results]     the same as `make paper OUT=paper`

It writes these files to the folder:
table_<setting>.{tex,csv}        the comparison of a sweep; the CSV has every column
figures/<setting>_*.{pdf,png}    every figure
provenance_<setting>.tex         a paragraph: commits, lock, model, data sets, hardware
methods.bib                      the papers of the methods
preview.tex                      all of it in one document
"""

import argparse
from pathlib import Path

from rich.console import Console

from secateur.paths import ROOT
from secateur.progress import count, run_script
from secateur.reporting.stats import RESAMPLES


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
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
        "--highlight",
        default="",
        metavar="METHOD,...",
        help="methods that get a colour of their own (default: yours, then the best; eight)",
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
    from secateur.pruners import PrunerError
    from secateur.pruners.plugins import load_plugins

    try:
        load_plugins(options.plugins)
    except PrunerError as error:
        parser.error(str(error))
    from secateur.reporting.paper import write

    console = Console(soft_wrap=True, highlight=False, markup=False)
    highlight = [name for name in options.highlight.split(",") if name]
    try:
        paper = write(options.results, options.out, options.resamples, highlight)
    except ValueError as error:
        console.print(str(error), style="red")
        return 1
    for text in paper.warnings:
        console.print(text, style="red" if text.startswith("REFUSED") else "yellow")
    for path in paper.files:
        console.print(f"written: {path}")
    return int(any(text.startswith("REFUSED") for text in paper.warnings))


if __name__ == "__main__":
    run_script(main)
