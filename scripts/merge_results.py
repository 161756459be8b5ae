"""Copy the finished cells of other machines into a results folder.

    python scripts/merge_results.py SOURCE... --into results

A cell is copied if its seal is intact and its folder is the one that its identity names. Cells that
are in the results folder already stay as they are. If the same cell has other answers in a source,
the source's cell is refused, because nothing says which one is right. Unfinished cells, failures
and tables are not copied: run `make tables` afterwards. A seal shows damage and editing, not
forgery.

The script also reports versions: cells that tables will mark, because they were run with other
code or packages, and cells that tables will leave out, because a newer version of them is there. It
exits with 1 if it refused a cell.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from rich.console import Console

from secateur.progress import run_script
from secateur.records import Record
from secateur.reporting.tables import by_setting
from secateur.reporting.versions import mixtures, newest
from secateur.store import DamagedRecord, Store, StoredCell, read

_COUNTS = ("new", "already here", "same answers", "refused", "failed", "unfinished")
# what two runs of a cell must share; their seconds differ
_ANSWER = ["doc_id", "target", "answer", "score", "kept_indices"]


class Refused(RuntimeError):
    """A cell that cannot be merged."""


@dataclass
class Contribution:
    """Counts of a source's cells by what became of them, and why some were refused.

    `same answers` counts cells that were run in both places.
    """

    source: Path
    counts: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)


def merge(source: Path, target: Store) -> Contribution:
    """Copy the cells of a results folder that are missing in another; overwrite none."""
    contribution = Contribution(source)
    for folder in _cells(source / "runs"):
        try:
            contribution.counts[_adopt(folder, target)] += 1
        except (Refused, DamagedRecord) as error:
            contribution.refused.append(str(error))
    contribution.counts["refused"] = len(contribution.refused)
    runs = [path for path in (source / "runs").glob("*/*/*/*") if path.is_file()]
    contribution.counts["failed"] = sum(path.name.endswith(".failed.json") for path in runs)
    contribution.counts["unfinished"] = len(
        {path.name.split(".answers")[0] for path in runs if ".answers" in path.name}
    )
    return contribution


def warnings(target: Store) -> list[str]:
    """What tables of a results folder mark or leave out because of other versions.

    Raises:
        DamagedRecord: a cell of the folder is damaged.
    """
    shown, stale = newest(target.records())
    found = [
        f"MIXED {group[0].identity.title}: {text}"
        for group in by_setting(shown)
        for text in mixtures(group)
    ]
    return found + [f"OLDER {old}" for old in stale]


def _cells(runs: Path) -> Iterator[Path]:
    """Folders of cells, complete or not; the store's own folders begin with a dot."""
    yield from (path for path in sorted(runs.glob("[!.]*/*/*/*")) if path.is_dir())


def _adopt(folder: Path, target: Store) -> str:
    """Copy one cell if it is missing. Returns the one of `_COUNTS` that it belongs to."""
    record = read(folder)
    cell = target.cell(record.identity)
    with cell.claim() as mine:
        if not mine:
            raise Refused(
                f"{folder}: a sweep is running this cell in the results folder; "
                "merge again when it has ended"
            )
        if not cell.exists():
            _copy(folder, cell, target)
            cell.forget_answers()
            return "new"
        here = cell.read()
        if here.seal == record.seal:
            return "already here"
        if different := _difference(here, record, cell.folder, folder):
            raise Refused(
                f"{folder}: the same cell is here with other content ({different}); "
                "delete the one that is wrong"
            )
        return "same answers"


def _difference(here: Record, record: Record, goal: Path, folder: Path) -> str:
    """What differs between two runs of one cell, time and machine apart; empty if nothing does."""
    if here.identity != record.identity:
        return "two identities share a name"
    rows, others = (
        pq.read_table(path / "samples.parquet", columns=_ANSWER).to_pylist()
        for path in (goal, folder)
    )
    if len(rows) != len(others):
        return f"{len(rows)} documents and {len(others)}"
    changed = sum(row != other for row, other in zip(rows, others, strict=True))
    if changed:
        return f"{changed} of {len(rows)} documents"
    return "" if here.metrics == record.metrics else "the metrics"


def _copy(folder: Path, cell: StoredCell, target: Store) -> None:
    """Copy a complete cell, in one step."""
    if cell.folder.exists():
        raise Refused(
            f"{folder}: an incomplete cell is in its place, {cell.folder}; delete that folder"
        )
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    (target.runs / ".writing").mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="merge", dir=target.runs / ".writing"))
    try:
        arrived = scratch / cell.identity.folder
        shutil.copytree(folder, arrived)  # also the files that the task wrote
        read(arrived)  # an error of the copy shows here
        arrived.rename(cell.folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="results folders of other machines"
    )
    parser.add_argument("--into", type=Path, required=True, help="the results folder that receives")
    options = parser.parse_args()
    for source in options.sources:
        if not (source / "runs").is_dir():
            parser.error(f"{source} has no runs/ and is no results folder")
        if source.resolve() == options.into.resolve():
            parser.error(f"{source} is the folder to merge into")

    target, console = Store(options.into), Console(soft_wrap=True, highlight=False, markup=False)
    contributions = [merge(source, target) for source in options.sources]
    rows = [
        {"source": str(one.source)} | {name: one.counts[name] for name in _COUNTS}
        for one in contributions
    ]
    console.print(f"Merged into {options.into}\n{pd.DataFrame(rows).to_string(index=False)}")
    if any(one.counts["failed"] or one.counts["unfinished"] for one in contributions):
        console.print("Cells that failed or are unfinished there were not merged.")
    refused = [text for one in contributions for text in one.refused]
    try:
        for text in warnings(target):
            console.print(text, style="yellow")
    except DamagedRecord as error:
        refused.append(f"already here: {error}")
    for text in refused:
        console.print(f"REFUSED {text}", style="red")
    return int(bool(refused))


if __name__ == "__main__":
    run_script(main)
