"""Where cells come from: settings, versions, commits, machines, methods, identities."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from secateur.pruners import REGISTRY
from secateur.reporting.comparison import Cell
from secateur.reporting.versions import mixtures


class Provenance(NamedTuple):
    """Where the cells of one setting come from.

    Attributes:
        facts: what all cells share, by name.
        methods: one row per method.
        cells: one row per cell.
        doubts: reasons not to read the cells as one table.
    """

    facts: dict[str, str]
    methods: list[dict[str, str]]
    cells: list[dict[str, Any]]
    doubts: list[str]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> "Provenance":
        pruners = {cell.method: cell.record.identity.pruner for cell in cells}
        methods = [
            {
                "method": name,
                "status": own.status,
                "paper": REGISTRY[own.name].paper,
                "source": own.source,
            }
            for name, own in sorted(pruners.items())
        ]
        return cls(_facts(cells), methods, [_row(cell) for cell in cells], _doubts(cells))


def _facts(cells: Sequence[Cell]) -> dict[str, str]:
    identities, machines = (
        [cell.record.identity for cell in cells],
        [cell.record.environment for cell in cells],
    )
    first, started = identities[0], sorted(cell.record.started for cell in cells)
    return {
        "cells": str(len(cells)),
        "suite": f"{first.suite.name}, revision {first.suite.revision}",
        **{
            f"model: {name}": str(value)
            for name, value in first.as_json()["model"].items()
            if value is not None
        },
        "documents per task": "all" if first.limit is None else f"the first {first.limit}",
        "task seed": str(first.task_seed),
        "versions": _listed(
            f"{name} {version}"
            for identity in identities
            for name, version in identity.versions.items()
        ),
        "commits": _listed(machine.commit for machine in machines),
        "hardware": _listed(
            f"{machine.device} ({machine.machine}, {machine.cores} cores, Python {machine.python})"
            for machine in machines
        ),
        "run": f"{started[0]} to {started[-1]}",
    }


def _row(cell: Cell) -> dict[str, Any]:
    return {
        "task": cell.task,
        "method": cell.method,
        "budget": cell.budget,
        "documents": len(cell.rows),
        "empty": int((cell.rows["answer"].str.strip() == "").sum()),
        "identity": cell.record.identity.digest[:12],
        "commit": cell.record.environment.commit,
        "started": cell.record.started,
    }


def _doubts(cells: Sequence[Cell]) -> list[str]:
    commits, found = sorted({cell.record.environment.commit for cell in cells}), []
    if len(commits) > 1:
        found.append(f"The cells ran at {len(commits)} commits, {', '.join(commits)}.")
    found += mixtures(cell.record for cell in cells)
    if dirty := [commit for commit in commits if commit.endswith("-dirty")]:
        found.append(f"Cells ran on edited sources that no commit holds: {', '.join(dirty)}.")
    if unknown := [commit for commit in commits if commit.startswith("unknown")]:
        found.append(f"The commit of cells is not known ({', '.join(unknown)}).")
    return found


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))
