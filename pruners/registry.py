"""All pruners by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from secateur.pruners.base import Pruner, PrunerError
from secateur.pruners.in_llm import InLLMPruner

REGISTRY: dict[str, type[Pruner] | type[InLLMPruner]] = {}
P = TypeVar("P", Pruner, InLLMPruner)


def register(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator: configs, command lines and tests find the pruner by `name`."""

    def add(cls: type[P]) -> type[P]:
        if name in REGISTRY:
            raise PrunerError(
                f"two pruners are called {name!r}: "
                f"{REGISTRY[name].__qualname__} and {cls.__qualname__}"
            )
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


def build(name: str, **options: Any) -> Any:
    """The Pruner or InLLMPruner called `name`, with `options` as its fields.

    Raises:
        PrunerError: unknown name or option (the message lists the known ones), or a wrong value.
    """
    if name not in REGISTRY:
        raise PrunerError(f"unknown pruner {name!r}; known: {', '.join(sorted(REGISTRY))}")
    known = [f.name for f in dataclasses.fields(REGISTRY[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise PrunerError(
            f"pruner {name!r} has no option {', '.join(unknown)}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    return REGISTRY[name](**options)
