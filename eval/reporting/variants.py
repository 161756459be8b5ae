"""Printed methods that are a method of this project with other fields than its defaults."""

from functools import cache
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from secateur.pruners import build
from secateur.records import MethodIdentity
from secateur.reporting.reported import FOLDER


class Variant(NamedTuple):
    """A method and its fields that differ from the defaults, as "name=value" in their order."""

    method: str
    fields: tuple[str, ...] = ()


@cache
def variants() -> dict[str, dict[str, Any]]:
    """The entries of results/reported/variants.yaml, by the printed name."""
    written = OmegaConf.to_container(OmegaConf.load(FOLDER / "variants.yaml"))
    assert isinstance(written, dict)
    return {str(printed): entry for printed, entry in written.items()}


def method_of(printed: str) -> str:
    """The method of this project that a method of the published tables is."""
    return str(variants().get(printed, {"name": printed})["name"])


@cache
def variant(printed: str, task: str = "") -> Variant:
    """What a method of the published tables is here; a name without an entry stands for itself.

    Args:
        task: of the printed number; some fields have a value for each task.

    Raises:
        KeyError: a field has no value for this task.
        PrunerError: an unknown method or field, or a wrong value.
    """
    if printed not in variants():
        return Variant(printed)
    options = {
        name: value[task] if isinstance(value, dict) else value
        for name, value in variants()[printed].items()
    }
    method = MethodIdentity.of(build(**options))
    fields = tuple(f"{name}={value}" for name, value in method.changed().items())
    return Variant(method.name, fields)
