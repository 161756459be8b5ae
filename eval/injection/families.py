"""Which adapter a model gets."""

import functools
import warnings

import transformers
from packaging.version import Version
from secateur.injection.adapter import Adapter
from secateur.injection.llava import LlavaAdapter, LlavaNextAdapter
from secateur.injection.qwen import Qwen25VLAdapter
from transformers import PreTrainedModel

TESTED = (
    "5.0.0",
    "5.23.0",
)  # oldest and newest release of transformers that `make test-matrix` ran on

_FAMILIES: dict[str, type[Adapter]] = {"llava": LlavaAdapter, "qwen2_5_vl": Qwen25VLAdapter}


def adapter_for(model: PreTrainedModel, layout: str | None = None) -> Adapter:
    """The adapter of a model's family; `layout` is for LLaVA-NeXT and defaults to `anyres`.

    Raises:
        ValueError: a family that is not supported, or a layout for a family that has none.
    """
    _warn_untested(transformers.__version__)
    family = getattr(model.config, "model_type", "?")
    if family == "llava_next":
        return LlavaNextAdapter(model, layout or "anyres")
    if layout is not None:
        raise ValueError(
            f"layout={layout!r} is for LLaVA-NeXT; model type {family!r} has one layout only"
        )
    if family not in _FAMILIES:
        raise ValueError(
            f"model type {family!r} is not supported; supported: {', '.join(_FAMILIES)}, llava_next"
        )
    return _FAMILIES[family](model)


@functools.cache
def _warn_untested(version: str) -> None:
    """Once a process and version."""
    if not Version(TESTED[0]) <= Version(version) <= Version(TESTED[1]):
        warnings.warn(
            f"transformers {version} is outside {TESTED[0]}..{TESTED[1]}, which injection is tested on; run `make test-matrix`",
            stacklevel=3,
        )
