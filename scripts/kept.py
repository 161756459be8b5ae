"""Draw which tokens of chosen documents the methods keep, before and after, as PDF and PNG.

python scripts/kept.py gqa:7 pope:3 --out kept [--results results]
make kept DOC=gqa:7,pope:3 OUT=kept              the same

One picture per document and budget: the image as the encoder sees it (cropped or padded as the
model's processor does; for LLaVA-NeXT the whole image and its tiles; for several images, all of
them), and beside it one panel per method with the dropped tokens dark. Without documents: the first
of every task. Records of methods inside the language model show what its last layers see.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from secateur.paths import ROOT
from secateur.progress import run_script


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "documents", nargs="*", metavar="TASK:NUMBER", help="documents, also joined by commas"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: kept in the results folder)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results",
        help="folder of a sweep (default: results)",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        help="folder with the data sets, from which the images are read (default: the hub)",
    )
    parser.add_argument(
        "--methods", default="", metavar="NAME,...", help="methods to show (default: all)"
    )
    parser.add_argument(
        "--plugins", default="", metavar="FILE,...", help="files with methods of your own"
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    documents = []
    for word in (word for words in options.documents for word in words.split(",")):
        task, _, number = word.strip().rpartition(":")
        if not (task and number.isdecimal()):
            parser.error(f"{word!r}: write TASK:NUMBER, as in gqa:7")
        documents.append((task, int(number)))
    from secateur.pruners import PrunerError
    from secateur.pruners.plugins import load_plugins

    try:
        load_plugins(options.plugins)
    except PrunerError as error:
        parser.error(str(error))
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # of lmms-eval's index of tasks
    os.environ.setdefault("TQDM_DISABLE", "1")
    from secateur.reporting.kept_pictures import draw

    console = Console(soft_wrap=True, highlight=False, markup=False)
    methods = [name for name in options.methods.split(",") if name]
    out = options.out or options.results / "kept"
    try:
        for path in draw(options.results, out, documents, methods, options.data_root):
            console.print(f"written: {path}")
    except (FileNotFoundError, ValueError) as error:
        console.print(str(error), style="red")
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
