"""All pruners by name."""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from secateur.pruners.base import Pruner, PrunerError
from secateur.pruners.in_llm import InLLMPruner

REGISTRY: dict[str, type[Pruner] | type[InLLMPruner]] = {}
P = TypeVar("P", Pruner, InLLMPruner)
_PACKAGE = "secateur.pruners"


def register(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator: configs, command lines and tests find the pruner by `name`."""

    def add(cls: type[P]) -> type[P]:
        if name in REGISTRY:
            raise PrunerError(
                f"two pruners are called {name!r}: "
                f"{REGISTRY[name].__qualname__} and {cls.__qualname__}"
            )
        cls.name = name
        cls.code = digest_of_code(cls.__module__)
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


def digest_of_code(module: str) -> str:
    """Digest of a module and of the modules of this package that it uses, directly or indirectly.

    It is taken when a method is registered, so that it tells which code runs, not which code is on
    the disk when a cell is stored hours later.
    """
    found, waiting = set[str](), {module}
    while waiting:
        found.add(name := waiting.pop())
        waiting |= set(_imported(name)) - found
    return hashlib.sha256("".join(_code(name) for name in sorted(found)).encode()).hexdigest()[:12]


@cache
def _imported(module: str) -> tuple[str, ...]:
    """The modules of this package that a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_code(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == _PACKAGE:
            names |= {f"{_PACKAGE}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return tuple(
        name for name in names if name.startswith(f"{_PACKAGE}.") and importlib.util.find_spec(name)
    )


@cache
def _code(module: str) -> str:
    return inspect.getsource(sys.modules.get(module) or importlib.import_module(module))
