"""Compare the cells of two results folders document by document: what did a change of code or library change?

    python scripts/compare_results.py /before/results results

Cells match by model, method with its fields, budget, suite, task, limit and seed; versions and digests of code are left out.
Exits with 1 where answers, kept tokens or metrics differ, or no cell is in both folders.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

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
        record: dict[str, Any] = json.loads(path.read_text())
        identity = record["identity"]
        method = {key: value for key, value in identity["pruner"].items() if key != "source"}
        common = [identity[name] for name in ("budget", "task", "limit", "seed")]
        key = json.dumps([identity["suite"]["name"], identity["model"]["name"], method, *common])
        found[key] = (record["metrics"], path.with_name("samples.parquet"))
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
    old, new = cells(options.before), cells(options.after)
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
        f"{both} cells in both folders, {documents} documents: {both - different} equal, {different} different; "
        f"{len(old) - both} only before, {len(new) - both} only after"
    )
    sys.exit(1 if different or not both else 0)


if __name__ == "__main__":
    main()
