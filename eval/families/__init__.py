"""Model families: everything that is known of one family stands in its file.

A new family is a file here with a `FAMILY` and a line in `MODULES`. One from outside is registered
by its own file, a plug-in.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.families.base import Family

# model type of a config -> module whose FAMILY describes it; imported when first asked for
MODULES = {
    "llava": "secateur.families.llava",
    "llava_next": "secateur.families.llava_next",
    "llava_onevision": "secateur.families.llava_onevision",
    "qwen2_vl": "secateur.families.qwen2_vl",
    "qwen2_5_vl": "secateur.families.qwen2_5_vl",
    "qwen3_vl": "secateur.families.qwen3_vl",
    "internvl": "secateur.families.internvl",
}


# of families from plug-ins, by model type
_OUTSIDE: "dict[str, Family]" = {}


def register_family(family: "Family") -> None:
    """Make a family from outside known; the file that defines its class calls this.

    The file's text is part of the identity of cells of this family.

    Raises:
        ValueError: a family of this model type is known already.
    """
    from secateur import source
    from secateur.pruners.registry import EXTENSIONS, digest_of_code

    model_type = family.MODEL_TYPE
    if model_type in MODULES or model_type in _OUTSIDE:
        raise ValueError(f"a family of model type {model_type!r} is known already")
    _OUTSIDE[model_type] = family
    source.add_family(model_type, digest_of_code(type(family).__module__))
    EXTENSIONS.append(model_type)


def family_of(model_type: str) -> "Family":
    """The family of a model type.

    Raises:
        ValueError: it is not supported.
    """
    if model_type in _OUTSIDE:
        return _OUTSIDE[model_type]
    if model_type not in MODULES:
        known = ", ".join([*MODULES, *_OUTSIDE])
        raise ValueError(
            f"model type {model_type!r} is not supported; supported: {known}. A family from "
            "outside needs its file: plugins=[path/to/it.py]"
        )
    return importlib.import_module(MODULES[model_type]).FAMILY


def families() -> "list[Family]":
    """All families."""
    return [family_of(model_type) for model_type in (*MODULES, *_OUTSIDE)]
