"""Model families: everything that is known of one family stands in its file.

A new family is a file here with a `FAMILY` and a line in `MODULES`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.families.base import Family

# model type of a config -> module whose FAMILY describes it; imported when first asked for
MODULES = {
    "llava": "secateur.families.llava",
    "llava_next": "secateur.families.llava_next",
    "qwen2_vl": "secateur.families.qwen2_vl",
    "qwen2_5_vl": "secateur.families.qwen2_5_vl",
}


def family_of(model_type: str) -> "Family":
    """The family of a model type.

    Raises:
        ValueError: it is not supported.
    """
    if model_type not in MODULES:
        raise ValueError(
            f"model type {model_type!r} is not supported; supported: {', '.join(MODULES)}"
        )
    return importlib.import_module(MODULES[model_type]).FAMILY


def families() -> "list[Family]":
    """All families."""
    return [family_of(model_type) for model_type in MODULES]
