"""Pruners against recorded outputs of the official code: reads the golden files, runs the cases."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reference.golden_adapters import METHODS, Tensors
from reference.ties import tie
from safetensors import SafetensorError
from safetensors.torch import load_file


class GoldenError(ValueError):
    """A golden file that cannot be read as one."""


@dataclass
class Report:
    """What became of one file."""

    method: str
    cases: int = 0
    exact: int = 0
    worst: float = 0.0
    ties: list[str] = field(default_factory=list)  # neither exact nor a mismatch
    mismatches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.cases:>3} cases  {self.exact:>3} exact  {len(self.ties):>3} ties"
        return f"{self.method:<16} {counts}  worst feature error {self.worst:.1e}"


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
            wrong, known = [f"{type(error).__name__}: {error}"], False
        else:
            wrong, known = [c.what for c in results if not c.exact], True
            report.worst = max([report.worst, *(c.error for c in results)])
        report.cases += 1
        report.exact += not wrong
        if not wrong:
            continue
        what = f"{report.method} {name}: {', '.join(wrong)}"
        margin = tie(adapter, case, own) if known else None
        if margin is None:
            report.mismatches.append(what)
        else:
            report.ties.append(f"{what}; candidates {margin:.1e} apart in float64")
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
