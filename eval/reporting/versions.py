"""Versions of a cell: which one tables show, and in what the shown cells differ.

Two cells are versions of one if they have the same settings, method, budget and task, but were run
with other code, packages, weights or data. Tables show the one that was run with the code that is
here now; if there is none, the newest.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from secateur import source
from secateur.pruners import REGISTRY
from secateur.records import Record

_OF_METHOD = ("method's code", "CLIP")


class Stale(NamedTuple):
    """A cell of which tables show another version."""

    record: Record
    shown: Record

    def __str__(self) -> str:
        changed = ", ".join(differences(self.record, self.shown)) or "nothing that is recorded"
        return f"runs/{self.record.identity.folder} of {self.record.started}: {changed} differs"


def newest(records: Iterable[Record]) -> tuple[list[Record], list[Stale]]:
    """The version of each cell that tables show, in the order given, and the others."""
    versions = defaultdict(list)
    for record in records:
        versions[record.identity.configuration].append(record)
    shown, stale = [], []
    for own in versions.values():
        # two that started in the same second: any order, but always the same
        last = max(own, key=lambda one: (_of_code_here(one), one.started, one.identity.digest))
        shown.append(last)
        stale += [Stale(record, last) for record in own if record is not last]
    return shown, stale


def _of_code_here(record: Record) -> bool:
    own = record.identity
    method = REGISTRY.get(own.pruner.name)
    here = source.code(own.model.family)
    return own.code == here and method is not None and own.pruner.source == method.code


def left_out(stale: list[Stale]) -> list[str]:
    """Messages that these versions are not shown: the first five, and how many more."""
    found = [f"other version left out: {old}" for old in stale[:5]]
    if stale:
        more = f"{len(stale) - 5} more versions are left out; " * (len(stale) > 5)
        found.append(
            f"{more}`python scripts/stale_cells.py` lists these versions, and removes them with "
            "--delete"
        )
    return found


def differences(one: Record, other: Record) -> list[str]:
    """What may make the answers of two cells of one task differ, apart from their settings.

    Two methods have code of their own, which does not count.
    """
    mine, theirs = _origin(one), _origin(other)
    names = [name for name in mine if mine[name] != theirs[name]]
    if one.identity.pruner.name != other.identity.pruner.name:
        names = [name for name in names if name not in _OF_METHOD]
    return names


def mixtures(records: Iterable[Record]) -> list[str]:
    """In what the cells of a table differ, as sentences for its notes; empty if in nothing."""
    groups: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for record in records:
        for name, value in _origin(record).items():
            own = record.identity
            part = own.task if name == "data" else own.pruner.name if name in _OF_METHOD else ""
            groups[name][part][value] += 1
    found = []
    for name, by_part in groups.items():
        for part, values in by_part.items():
            if len(values) > 1:
                counts = " and ".join(
                    f"{count} of {value}" for value, count in values.most_common()
                )
                found.append(f"Cells differ in {name}{f' ({part})' * bool(part)}: {counts}.")
    return found


def _origin(record: Record) -> dict[str, str]:
    own, ran = record.identity, record.environment
    packages = ", ".join(f"{name} {version}" for name, version in sorted(own.versions.items()))
    return {
        "code": own.code or "not recorded",
        "method's code": own.pruner.source,
        "CLIP": own.clip,
        "packages": packages,
        "lock": ran.lock or "not recorded",
        "weights": own.model.weights,
        "data": own.data or ran.data_fingerprint or "not recorded",
    }
