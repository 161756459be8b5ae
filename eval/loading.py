"""A model and its processor: from the hub, from a folder, or with random weights."""

from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto import image_processing_auto

from secateur import hub
from secateur.checkpoints import locate, not_loaded, pinned
from secateur.geometry import config_of, random_model, random_processor


def load(
    pretrained: str,
    name: str,
    weights: Literal["pretrained", "random"],
    revision: str,
    dtype: str,
    attn_implementation: str | None,
    device: torch.device,
    resize: str | None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, ready to answer, and its processor; fields as in `secateur.models.PrunedModel`.

    Raises:
        FileNotFoundError: the checkpoint is neither on disk nor reachable, or its files are
            damaged.
        ValueError: unknown weights or resize; a checkpoint that lacks some of the weights.
    """
    if weights == "random":
        config = config_of(name)
        processor = random_processor(config)
        return random_model(
            config, device, getattr(torch, dtype), attn_implementation or "sdpa"
        ), processor
    if weights != "pretrained":
        raise ValueError(f"weights={weights!r} is not one of pretrained, random")
    place, commit = str(locate(pretrained)), pinned(pretrained, revision)

    def fetched() -> tuple[PreTrainedModel, dict[str, Any], ProcessorMixin]:
        processor = AutoProcessor.from_pretrained(place, revision=commit)
        if resize is not None:
            # AutoProcessor passes a backend to Qwen's video processor too, which has no PIL form
            processor.image_processor = AutoImageProcessor.from_pretrained(
                place, revision=commit, **_backend(resize)
            )
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            place,
            revision=commit,
            dtype=dtype,
            device_map=str(device),
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        return *loaded, processor

    try:
        model, found, processor = hub.patiently(fetched)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(not_loaded(pretrained, revision, error)) from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{pretrained} has no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' * (len(missing) > 3)}, which transformers "
            f"fills with random numbers: it is no checkpoint of {type(model).__name__}, or its "
            "keys have other names"
        )
    return model.eval(), processor


def _backend(resize: str) -> dict[str, Any]:
    """The keyword of `AutoImageProcessor` for a backend; early releases of 5 name it otherwise."""
    if resize not in ("pil", "torchvision"):
        raise ValueError(f"model.resize={resize!r} is not one of pil, torchvision")
    known = hasattr(image_processing_auto, "_resolve_backend")
    return {"backend": resize} if known else {"use_fast": resize == "torchvision"}
