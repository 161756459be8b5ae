"""The jobs of a sweep from its overrides: fields named by method, seeds, methods from outside.

`pruner=none,scope mine.alpha=1,2 seeds=0,1,2`: fields after a method's name and seeds are for the
methods that have them; every other method runs once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from itertools import product
from typing import NamedTuple

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from secateur.paths import CONFIGS

SEED = "seed"  # the field of a method that decides its random choices


class Methods(NamedTuple):
    """The methods that a sweep can name.

    Attributes:
        names: all of them.
        fields: the fields of one of them.
        usual: the method of a job that names none.
    """

    names: frozenset[str]
    fields: Callable[[str], list[str]]
    usual: str


def arguments(given: Sequence[str]) -> list[str]:
    """Words of a sweep's command line as Hydra takes them; loads the plug-ins that they name.

    Hydra's config has no key for a method's own fields and for seeds, so even one value is made an
    axis of the sweep, which Hydra leaves to its sweeper.

    Raises:
        ValueError: a plug-in that cannot be loaded; a name of an earlier release.
    """
    parser = OverridesParser.create()
    files: list[str] = []
    for word in given:
        key = _key(word)
        if key == "seed":
            raise ValueError(
                f"{word}: lmms-eval's own seed is task_seed={word.partition('=')[2]}; the seeds "
                "of the methods are seeds=0,1,2"
            )
        if key == "plugins":
            override = parser.parse_override(word)
            if override.is_sweep_override():
                raise ValueError(f"{word}: write several files as a list, plugins=[a.py,b.py]")
            value = override.value()
            files += value if isinstance(value, list) else [str(value)]
    known = {path.stem for path in (CONFIGS / "pruner").glob("*.yaml")}
    if files or entry_points(group="secateur.pruners"):
        known |= set(add_methods(files))
    words = [word for word in given if word not in ("-m", "--multirun")]
    axes = {word for word in words if _is_axis(_key(word), known)}
    words = [_as_axis(parser.parse_override(word)) if word in axes else word for word in words]
    # first, because Hydra refuses overrides on both sides of an option
    return ["-m", *words] if axes or len(words) < len(given) else words


def _key(word: str) -> str:
    """The key of an override; empty for an option."""
    key, equals, _ = word.partition("=")
    return key.lstrip("+") if equals and not word.startswith("-") else ""


def _is_axis(key: str, methods: set[str] | frozenset[str]) -> bool:
    name, dot, _ = key.partition(".")
    return key == "seeds" or (bool(dot) and name in methods)


def _as_axis(override: Override) -> str:
    text = str(override.input_line)
    if override.is_sweep_override():
        return text
    key, _, value = text.partition("=")
    return f"{key}=choice({value})"


def add_methods(files: Sequence[str]) -> list[str]:
    """Load plug-ins; give Hydra a config of each of their methods: its name and its defaults.

    Raises:
        ValueError: a plug-in that cannot be loaded.
    """
    from secateur.pruners import REGISTRY  # imports PyTorch
    from secateur.pruners.plugins import load_plugins

    names = load_plugins(files)
    for name in names:
        defaults = {f.name: f.default for f in dataclasses.fields(REGISTRY[name])}
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in defaults.items()
        }
        ConfigStore.instance().store(group="pruner", name=name, node={"name": name, **plain})
    return names


def jobs(overrides: Sequence[Override], methods: Methods) -> tuple[list[list[str]], list[str]]:
    """The overrides of every job, and what the user should know of them.

    Raises:
        ValueError: a field of a method that the sweep does not run, or that has no such field; a
            seed that is given twice; values that are no list.
    """
    axes: dict[str, list[str]] = {}
    own: dict[str, dict[str, list[str]]] = {}
    seeds: list[str] = []
    for override in overrides:
        key, values = str(override.get_key_element()), _values(override)
        name, _, field = key.partition(".")
        if key == "seeds":
            seeds = values
        elif field and name in methods.names:
            own.setdefault(name, {})[field] = values
        else:
            axes[key] = values
    run = list(dict.fromkeys(_method(value, methods) for value in axes.get("pruner", ["{}"])))
    _check_fields(own, run, methods)
    _check_shared(axes, run, methods)
    found = []
    for base in product(*axes.values()):
        job = dict(zip(axes, base, strict=True))
        method = _method(job.get("pruner", "{}"), methods)
        extra = dict(own.get(method, {}))
        if seeds and SEED in methods.fields(method):
            if SEED in extra or f"pruner.{SEED}" in axes:
                raise ValueError(f"seeds={','.join(seeds)} and a seed of {method!r}: leave one out")
            extra[SEED] = seeds
        for chosen in product(*extra.values()):
            fields = {f"pruner.{key}": value for key, value in zip(extra, chosen, strict=True)}
            found.append([f"{key}={value}" for key, value in (job | fields).items()])
    fixed = [name for name in run if SEED not in methods.fields(name)]
    notes = [f"seeds: {', '.join(fixed)} draw no random numbers and run once"] if fixed else []
    return found, notes if seeds else []


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    if not override.is_discrete_sweep():
        raise ValueError(f"{override.input_line}: a sweep takes values, not an interval")
    return [str(value) for value in override.sweep_string_iterator()]


def _method(value: str, methods: Methods) -> str:
    """The method that a value of `pruner` names; fields in braces are those of the usual one."""
    return methods.usual if value.startswith("{") else value.strip("'\"")


def _check_fields(own: dict[str, dict[str, list[str]]], run: list[str], methods: Methods) -> None:
    for name, fields in own.items():
        first = f"{name}.{next(iter(fields))}"
        if name not in run:
            raise ValueError(
                f"{first}: this sweep runs no {name}, only {', '.join(run)}; add it, as in "
                f"pruner={','.join([*run, name])}"
            )
        known = [field for field in methods.fields(name) if field != "name"]
        if unknown := [field for field in fields if field not in known]:
            raise ValueError(
                f"{name}.{unknown[0]}: {name!r} has no field {unknown[0]}; its fields: "
                f"{', '.join(known) or 'none'}"
            )


def _check_shared(axes: dict[str, list[str]], run: list[str], methods: Methods) -> None:
    """A field of all methods of the sweep has to be one that they all have."""
    for key in axes:
        group, _, field = key.partition(".")
        without = [name for name in run if field not in methods.fields(name)]
        if group == "pruner" and field and len(run) > 1 and without:
            having = [name for name in run if name not in without]
            raise ValueError(
                f"{key} is for every method of the sweep, and {', '.join(without)} has no field "
                f"{field}; name the method: "
                + (f"{having[0]}.{field}=..." if having else "mine.field=...")
            )
