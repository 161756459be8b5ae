"""Put a pruner into a Hugging Face vision-language model for the length of a `with` block."""

from typing import TYPE_CHECKING, Any

from secateur.injection.audit import PromptAudit, Sample, Trace
from secateur.injection.session import inject

if TYPE_CHECKING:
    from secateur.injection.clip import ClipRelevance

__all__ = ["ClipRelevance", "PromptAudit", "Sample", "Trace", "inject"]


def __getattr__(name: str) -> Any:
    if name == "ClipRelevance":  # few methods need CLIP beside the model
        from secateur.injection.clip import ClipRelevance

        return ClipRelevance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
