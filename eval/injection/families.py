"""Which adapter a model gets."""

import transformers
from transformers import PreTrainedModel

from secateur.injection.adapter import Adapter
from secateur.injection.contract import is_tested
from secateur.injection.llava import LlavaAdapter, LlavaNextAdapter
from secateur.injection.qwen import Qwen25VLAdapter

_FAMILIES: dict[str, type[Adapter]] = {"llava": LlavaAdapter, "qwen2_5_vl": Qwen25VLAdapter}


def adapter_for(model: PreTrainedModel, layout: str | None = None) -> Adapter:
    """The adapter of a model's family, once injection into the family is known to work on the installed transformers.

    On a release that is not in `contract.TESTED`, a self-test on a tiny model of the family tells; it warns where it passes.

    Args:
        layout: for LLaVA-NeXT; the default is `anyres`.

    Raises:
        ValueError: a family that is not supported, a layout for a family that has none, or a release of transformers on which
            injection does not work.
    """
    adapter, version = adapter_of(model, layout), transformers.__version__
    if not is_tested(version):
        from secateur.injection import (
            selftest,  # it imports this module, and tested releases do without it
        )

        selftest.check(model.config.model_type, version)
    return adapter


def adapter_of(model: PreTrainedModel, layout: str | None = None) -> Adapter:
    """The same without a look at the release of transformers."""
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
