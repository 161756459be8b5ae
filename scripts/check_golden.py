"""Check the pruners against recorded outputs of the official code.

    python scripts/check_golden.py PATH

PATH is a folder or one JSON file beside its safetensors file. Every case goes through the public classes; a line per method
tells how many are exact and the worst difference of a feature, mismatches are listed, and any of them exits non-zero.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # started as a file, Python looks for modules beside it only
from scripts.golden_cases import METHODS, Tensors


class GoldenError(ValueError):
    """A golden file that cannot be read as one."""


@dataclass
class Report:
    """What became of one file."""

    method: str
    cases: int = 0
    exact: int = 0
    worst: float = 0.0
    mismatches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.method:<16} {self.cases:>3} cases  {self.exact:>3} exact  worst feature error {self.worst:.1e}"


def check(path: Path) -> Report:
    """Run every case of one JSON file."""
    index, tensors = _read(path)
    adapter = METHODS[index["method"].removesuffix("_ref")]
    report = Report(index["method"])
    for case in index["cases"]:
        name = ".".join(case[key] for key in ("method", "case", "id") if key in case)
        own = {
            key.removeprefix(name + "."): t
            for key, t in tensors.items()
            if key.startswith(name + ".")
        }
        try:
            results = adapter(case, own)
        except KeyError as error:
            raise GoldenError(f"{path}: case {name} lacks {error}") from error
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        else:
            wrong = [c.what for c in results if not c.exact]
            report.worst = max([report.worst, *(c.error for c in results)])
        report.cases += 1
        report.exact += not wrong
        if wrong:
            report.mismatches.append(f"{report.method} {name}: {', '.join(wrong)}")
    return report


def files(path: Path) -> list[Path]:
    """The golden files PATH stands for."""
    found = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not found:
        raise GoldenError(f"{path}: no JSON file in this folder")
    return found


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    try:
        index = json.loads(path.read_text())
        method, cases = index["method"], index["cases"]
        known = isinstance(method, str) and all(
            isinstance(case, dict) and ("id" in case or "case" in case) for case in cases
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GoldenError(
            f"{path}: not a golden index ({type(error).__name__}: {error})"
        ) from error
    names = (
        [".".join(case[key] for key in ("method", "case", "id") if key in case) for case in cases]
        if known
        else []
    )
    if len(set(names)) < len(names):
        raise GoldenError(f"{path}: a case stands in it more than once")
    if not known or not cases:
        raise GoldenError(f"{path}: not a golden index (no cases, or cases without id)")
    if method.removesuffix("_ref") not in METHODS:
        raise GoldenError(f"{path}: unknown method {method!r}; known: {', '.join(sorted(METHODS))}")
    store = path.with_name(index.get("file", path.with_suffix(".safetensors").name))
    try:
        return index, load_file(store)
    except (OSError, SafetensorError) as error:
        raise GoldenError(f"{store}: cannot be read ({type(error).__name__}: {error})") from error


def main() -> int:
    """Check, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    try:
        reports = []
        for path in files(parser.parse_args().path):
            reports.append(check(path))
            print(reports[-1], flush=True)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mismatches = [line for report in reports for line in report.mismatches]
    cases = sum(report.cases for report in reports)
    print(f"{cases - len(mismatches)} of {cases} cases exact")
    for line in mismatches:
        print(f"  mismatch: {line}")
    return 1 if mismatches else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
