"""Compare the cells of two results folders, document by document.

    python scripts/compare_results.py /before/results results

It shows what a change of the code or of a library changed. Cells match by model, method with its
fields, budget, suite, task, limit and seed; versions and digests of code may differ. Exits with 1
if answers, kept tokens or metrics differ, or if no cell is in both folders.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from secateur.store import DamagedRecord, read

COMPARED = [
    "doc_id",
    "prompt",
    "target",
    "answer",
    "score",
    "kept_indices",
    "layer_tokens",
    "prompt_tokens",
]


def cells(results: Path) -> dict[str, tuple[dict[str, float], Path]]:
    """Metrics and file of samples of every cell, by what both folders have in common."""
    found: dict[str, tuple[dict[str, float], Path]] = {}
    for path in sorted((results / "runs").glob("*/*/*/*/record.json")):
        record = read(path.parent)
        own = record.identity
        method = own.pruner.name, own.pruner.fields
        setting = own.suite.name, own.model.name, own.limit, own.task_seed
        key = json.dumps([*setting, method, own.budget, own.task])
        found[key] = (record.metrics, path.with_name("samples.parquet"))
    return found


def differences(before: Path, after: Path) -> list[str]:
    """Names of the compared columns in which two files of samples differ."""
    old, new = (pd.read_parquet(path)[COMPARED].astype(str) for path in (before, after))
    if len(old) != len(new):
        return [f"{len(old)} documents against {len(new)}"]
    return [
        f"{name} of {count} documents"
        for name in COMPARED
        if (count := int((old[name] != new[name]).sum()))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    for folder in (options.before, options.after):
        if not (folder / "runs").is_dir():
            parser.error(f"{folder} has no runs/ and is no results folder")
    try:
        old, new = cells(options.before), cells(options.after)
    except DamagedRecord as error:
        parser.error(str(error))
    documents, different = 0, 0
    for key in sorted(old.keys() & new.keys()):
        (metrics, samples), (new_metrics, new_samples) = old[key], new[key]
        found = differences(samples, new_samples) + ["metrics"] * (metrics != new_metrics)
        documents += len(pd.read_parquet(samples, columns=["doc_id"]))
        if found:
            different += 1
            print(f"{key}: {', '.join(found)}")
    both = len(old.keys() & new.keys())
    print(
        f"{both} cells in both folders, {documents} documents: {both - different} equal, "
        f"{different} different; {len(old) - both} only before, {len(new) - both} only after"
    )
    sys.exit(1 if different or not both else 0)


if __name__ == "__main__":
    main()
