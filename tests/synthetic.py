"""The variants of all methods, and the made-up inputs, for tests of the pruning maths."""

import dataclasses
import itertools
import typing
from typing import Literal

from secateur.pruners import REGISTRY, InLLMPruner
from secateur.synthetic import KINDS, joined, layer_tokens, rows_of, visual_tokens

__all__ = [
    "KINDS", "in_llm", "joined", "label", "layer_tokens", "rows_of", "variants", "visual_tokens",
]  # fmt: skip


def variants(kind: type) -> list[tuple[str, dict]]:
    """(name, options) of every registered subclass of `kind`.

    First its defaults, then each other choice of each Literal and bool field.
    """
    found = []
    for name, cls in sorted(REGISTRY.items()):
        if issubclass(cls, kind):
            found.append((name, {}))
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                hint = hints[field.name]
                choices = (
                    typing.get_args(hint)
                    if typing.get_origin(hint) is Literal
                    else (True, False)
                    if hint is bool
                    else ()
                )
                found += [
                    (name, {field.name: choice}) for choice in choices if choice != field.default
                ]
    return found


def label(value: object) -> str:
    """Test id of a variant's options."""
    if isinstance(value, dict):
        return ",".join(itertools.starmap("{}={}".format, value.items())) or "default"
    return str(value)


def in_llm(name: str) -> bool:
    """Whether the pruner acts between LLM layers."""
    return issubclass(REGISTRY[name], InLLMPruner)
