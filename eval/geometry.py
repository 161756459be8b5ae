"""Models without weights: true, tiny and reduced configurations, random models, a processor.

For what depends on shapes alone: FLOPs, latencies, tests of the whole path. The answers of such a
model mean nothing.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from secateur.families import families, family_of


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a hub checkpoint, by the name of its file in configs/model.

    Raises:
        ValueError: an unknown name.
    """
    made: dict[str, Callable[[], PreTrainedConfig]] = {}
    for family in families():
        made |= family.CONFIGS
    if name not in made:
        raise ValueError(f"no geometry for the model {name!r}; known: {', '.join(made)}")
    return made[name]()


def tiny(name: str) -> PreTrainedConfig:
    """Four layers, at most 64 wide, for tests.

    `name` is one of a family's `TINY`, mostly its model type.

    Raises:
        ValueError: an unknown name.
    """
    made: dict[str, Callable[[], PreTrainedConfig]] = {}
    for family in families():
        made |= family.TINY
    if name not in made:
        raise ValueError(f"no tiny model {name!r}; known: {', '.join(made)}")
    return made[name]()


def reduced(config: PreTrainedConfig, layers: int, shrink: int = 1) -> PreTrainedConfig:
    """The same image geometry and head width with fewer layers, in image encoder and LLM.

    Args:
        shrink: divides all widths and numbers of heads.

    Raises:
        ValueError: fewer than 2 layers (LLaVA reads the second last), or `shrink` does not divide
            the heads.
    """
    if layers < 2:
        raise ValueError(f"layers={layers}: at least 2")
    family, config = family_of(config.model_type), copy.deepcopy(config)
    text, vision = config.text_config, config.vision_config
    vision_layers, vision_heads = family.VISION_FIELDS
    for part, heads, widths in (
        (text, "num_attention_heads", ("hidden_size", "intermediate_size")),
        (vision, vision_heads, family.VISION_WIDTHS),
    ):
        if getattr(part, heads) % shrink:
            raise ValueError(
                f"shrink={shrink} does not divide the {getattr(part, heads)} heads of "
                f"{type(part).__name__}"
            )
        for name in (heads, *widths):
            setattr(part, name, getattr(part, name) // shrink)
    text.num_key_value_heads = max(1, text.num_key_value_heads // shrink)
    text.num_hidden_layers = layers
    setattr(vision, vision_layers, layers)
    family.reduced(config)
    return config


@torch.no_grad()
def random_model(
    config: PreTrainedConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    std: float = 0.02,
) -> PreTrainedModel:
    """A model of this configuration with random weights.

    They are drawn on the device itself: 7B in bfloat16 takes seconds on a GPU.

    Args:
        device: `meta` gives shapes without memory.
        std: of all matrices; norms are 1, biases 0. At the default, attention is near uniform and
            dropping tokens changes little; tests use 0.2.

    Returns:
        The model in eval mode, `config` untouched.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    device = torch.device(device)
    if device.type != "meta":
        model.to_empty(device=device)
    model.tie_weights()
    if device.type != "meta":
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.init_weights()  # also the buffers, which no checkpoint holds
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=std)
    generation, text = model.generation_config, config.text_config
    generation.bos_token_id, generation.eos_token_id = text.bos_token_id, text.eos_token_id
    generation.pad_token_id = text.pad_token_id
    return model.eval()


def random_processor(config: Any) -> ProcessorMixin:
    """A processor with the image geometry of `config` and a byte tokenizer made for it.

    The tokenizer has the special tokens at the ids of `config` and one token per byte. All other
    ids of the vocabulary are names that no text encodes to, so that every answer of a random model
    can be decoded.
    """
    return family_of(config.model_type).processor(config)
