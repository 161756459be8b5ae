"""Printed methods that are a method of this project with other fields than its defaults."""

from functools import cache
from typing import NamedTuple

from omegaconf import OmegaConf

from secateur.pruners import build
from secateur.records import MethodIdentity
from secateur.reporting.reported import FOLDER


class Variant(NamedTuple):
    """A method and its fields that differ from the defaults, as "name=value" in their order."""

    method: str
    fields: tuple[str, ...] = ()


@cache
def variants() -> dict[str, Variant]:
    """The methods of results/reported/variants.yaml, by their printed name.

    Raises:
        PrunerError: an unknown method or field, or a wrong value.
    """
    found = {}
    for printed, config in OmegaConf.load(FOLDER / "variants.yaml").items():
        method = MethodIdentity.of(build(**config))
        fields = tuple(f"{name}={value}" for name, value in method.changed().items())
        found[str(printed)] = Variant(method.name, fields)
    return found


def variant(printed: str) -> Variant:
    """What a method of the published tables is here; a name without an entry stands for itself."""
    return variants().get(printed, Variant(printed))
