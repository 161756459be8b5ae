"""All pruners by name."""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING
from functools import cache
from typing import Any, TypeVar

from secateur.pruners.base import Pruner, PrunerError
from secateur.pruners.in_llm import InLLMPruner

REGISTRY: dict[str, type[Pruner] | type[InLLMPruner]] = {}
# what plug-ins registered that is no method, such as families of models
EXTENSIONS: list[str] = []
P = TypeVar("P", Pruner, InLLMPruner)
_PACKAGE = "secateur.pruners"


def register(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator: configs, command lines and tests find the pruner by `name`."""

    def add(cls: type[P]) -> type[P]:
        if name in REGISTRY:
            raise PrunerError(
                f"two pruners are called {name!r}: {REGISTRY[name].__qualname__} "
                f"({REGISTRY[name].__module__}) and {cls.__qualname__}; rename the latter"
            )
        if not (isinstance(cls, type) and issubclass(cls, Pruner | InLLMPruner)):
            raise PrunerError(f"{name!r} is no subclass of Pruner or InLLMPruner")
        if "__dataclass_params__" not in vars(cls):
            raise PrunerError(
                f"the class of {name!r} is no dataclass; write @dataclass(frozen=True) below "
                "@register"
            )
        if without := [f.name for f in dataclasses.fields(cls) if f.default is MISSING]:
            raise PrunerError(
                f"the fields of {name!r} need defaults, and these have none: {', '.join(without)}"
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
        # not an import statement, which would make that file part of every method's digest
        importlib.import_module(f"{_PACKAGE}.plugins").load_plugins()
    if name not in REGISTRY:
        raise PrunerError(
            f"unknown pruner {name!r}; known: {', '.join(sorted(REGISTRY))}. "
            "A method of your own needs its file: plugins=[path/to/it.py]"
        )
    known = [f.name for f in dataclasses.fields(REGISTRY[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise PrunerError(
            f"pruner {name!r} has no option {', '.join(unknown)}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    return REGISTRY[name](**options)


def digest_of_code(module: str) -> str:
    """Digest of a module and of the modules that it uses, directly or indirectly.

    Only modules of this package count, and those of the package that the module itself is in. The
    digest is taken when a method is registered, so that it tells which code runs, not which code
    is on the disk when a cell is stored hours later.
    """
    found, waiting = set[str](), {module}
    while waiting:
        found.add(name := waiting.pop())
        waiting |= set(_imported(name)) - found
    return hashlib.sha256("".join(_code(name) for name in sorted(found)).encode()).hexdigest()[:12]


@cache
def _imported(module: str) -> tuple[str, ...]:
    """The modules that count for a digest and that a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_code(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= _imported_from(module, node)
    own = module if module.startswith(f"{_PACKAGE}.") else module.split(".")[0]
    return tuple(
        name
        for name in names
        if (name.startswith(f"{_PACKAGE}.") or f"{name}.".startswith(f"{own}."))
        and _is_module(name)
    )


def _imported_from(module: str, node: ast.ImportFrom) -> set[str]:
    """What `from x import a, b` imports: x, and the modules that hold or are a and b."""
    source = "." * node.level + (node.module or "")
    if node.level:
        source = importlib.util.resolve_name(source, sys.modules[module].__package__)
    inside = {f"{source}.{alias.name}" for alias in node.names}
    if source != _PACKAGE:  # whose __init__ imports every method
        return {source, *inside}
    homes = (getattr(sys.modules[_PACKAGE], alias.name, None) for alias in node.names)
    return inside | {str(home.__module__) for home in homes if hasattr(home, "__module__")}


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a name inside a module, which is no package
        return False


@cache
def _code(module: str) -> str:
    return inspect.getsource(sys.modules.get(module) or importlib.import_module(module))
