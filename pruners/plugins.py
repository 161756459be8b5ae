"""Methods from outside the project: a file, or a package with an entry point.

A plug-in may also register families of models (`secateur.families.register_family`).
"""

import dataclasses
import hashlib
import linecache
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from secateur.pruners.base import PrunerError, Status, VisualTokens
from secateur.pruners.in_llm import InLLMPruner, LayerTokens
from secateur.pruners.registry import EXTENSIONS, REGISTRY

GROUP = "secateur.pruners"  # entry points of this group name a module that registers methods
_loaded: dict[Path, list[str]] = {}


def load_plugins(files: str | Iterable[str | Path] = ()) -> list[str]:
    """Register the methods of these files and of the installed packages' entry points.

    A file that was loaded before is not read again.

    Args:
        files: Python files; as one string, separated by commas or as in PATH, with or without
            brackets around.

    Returns:
        The names of these methods.

    Raises:
        PrunerError: a file that is missing, fails to import, registers nothing or a known name, or
            a method with a field or an attribute that the project cannot use.
    """
    if isinstance(files, str):
        files = [part for part in re.split(f"[,{os.pathsep}]", files.strip("[]")) if part.strip()]
    names = list(_entry_points())
    for file in files:
        path = Path(str(file).strip()).expanduser().resolve()
        if path not in _loaded:
            if not path.is_file():
                raise PrunerError(f"plugins: there is no file {path}")
            _loaded[path] = _registered(str(path), lambda path=path: _import(path))  # type: ignore[misc]
        names += _loaded[path]
    return names


@cache
def _entry_points() -> tuple[str, ...]:
    names: list[str] = []
    for point in entry_points(group=GROUP):
        names += _registered(f"the entry point {_title(point)}", point.load)
    return tuple(names)


def _title(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else "an unknown package"
    return f"{point.name!r} of {package}"


def _import(path: Path) -> None:
    """Run a file as a module of its own. No bytecode is cached: an edit always counts."""
    source = path.read_text(encoding="utf-8")
    name = f"secateur_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # so that the digest is of the text that runs, not of what the file holds later
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise


def _registered(where: str, run: Callable[[], object]) -> list[str]:
    """The names that an import registers, checked; none of them stays if it fails."""
    before, extensions = set(REGISTRY), len(EXTENSIONS)
    try:
        run()
        names = [name for name in REGISTRY if name not in before]
        for name in names:
            _check(name)
        nothing = not names and len(EXTENSIONS) == extensions
        if nothing and not where.startswith("the entry point"):
            raise PrunerError('it registers no method; write @register("my_name") above its class')
    except Exception as error:
        for name in REGISTRY.keys() - before:
            del REGISTRY[name]
        raise PrunerError(f"plugins: {where}: {_reason(where, error)}") from error
    return names


def _reason(where: str, error: Exception) -> str:
    """What went wrong, where in the file, and the fix where it is known."""
    if isinstance(error, PrunerError):
        return str(error)
    lines = [step.lineno for step in traceback.extract_tb(error.__traceback__)
             if step.filename == where]  # fmt: skip
    place = f" (line {lines[-1]})" if lines else ""
    text = f"it cannot be imported: {type(error).__name__}: {error}{place}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        if Path(where).with_name(f"{error.name}.py").is_file():
            text += (
                ". A plug-in is one file; put several files into a package with an entry point "
                f"{GROUP!r}"
            )
    return text


def _check(name: str) -> None:
    """Raise PrunerError if the class of a method is not what tables, records and configs need."""
    cls = REGISTRY[name]
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise PrunerError(
            f"the name {name!r} must be small letters, digits and _; it is part of file names"
        )
    for attribute, example in (("paper", '"arXiv 2601.01234"'), ("status", '"official"')):
        if not isinstance(getattr(cls, attribute, None), str):
            raise PrunerError(f"the class of {name!r} lacks a line such as {attribute} = {example}")
    if cls.status not in typing.get_args(Status):
        choices = ", ".join(map(repr, typing.get_args(Status)))
        raise PrunerError(f"the status of {name!r} is {cls.status!r}, which is none of {choices}")
    reads = LayerTokens if issubclass(cls, InLLMPruner) else VisualTokens
    known = {field.name for field in dataclasses.fields(reads)}
    if unknown := sorted(set(cls().needs) - known):
        raise PrunerError(
            f"{name!r} needs {', '.join(unknown)}, which nobody provides; "
            f"there are {', '.join(sorted(known))}"
        )
