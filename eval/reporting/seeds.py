"""Cells of a method that differ in its seed alone share a row of a table."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from secateur.records import Identity, MethodIdentity

SPREAD = "±: mean and standard deviation over the seeds of a method."


def row_names(identities: Iterable[Identity]) -> dict[str, str]:
    """The row of each method, by its label: without the seed if a budget has several seeds of it.

    One seed that is not the default keeps its name.
    """
    labels: dict[tuple[str, str], set[str]] = defaultdict(set)
    for own in identities:
        labels[own.pruner.label_without("seed"), own.budget].add(own.pruner.label)
    shared = {name for (name, _), group in labels.items() if len(group) > 1}
    return {
        label: name if name in shared else label
        for (name, _), group in labels.items()
        for label in group
    }


def seed_of(method: MethodIdentity) -> Any:
    """The seed of a method; None if it has none."""
    return method.fields.get("seed")
