"""Qwen2-VL: Qwen2.5-VL without windows; its tower has another MLP and other names of its widths."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2VLConfig

from secateur.families.base import Adapter
from secateur.families.qwen2_5_vl import (
    QWEN_7B,
    TINY_QWEN,
    TOWER_PARTS,
    Qwen25VL,
    Qwen25VLAdapter,
    mrope_config,
)


class Qwen2VLAdapter(Qwen25VLAdapter):
    """Qwen2-VL: as Qwen2.5-VL, but every block attends to the whole image, in raster order."""

    NAME = "Qwen2-VL"
    PARTS: ClassVar = (*Adapter.PARTS, *TOWER_PARTS)

    def full_blocks(self) -> list[int]:
        return list(range(len(self.visual.blocks)))

    def tower_order(self, rows: int, columns: int) -> Tensor:
        return torch.arange(rows * columns)


class Qwen2VL(Qwen25VL):
    """Qwen2-VL."""

    MODEL_TYPE = "qwen2_vl"
    # from config.json of Qwen/Qwen2-VL-7B-Instruct
    CONFIGS: ClassVar = {
        "qwen2_vl_7b": lambda: _config((1280, 4, 32, 16), QWEN_7B, [16, 24, 24]),
    }
    # a tower of 32 channels beside a language model of 64
    TINY: ClassVar = {
        "qwen2_vl": lambda: _config((32, 2, 4, 4), TINY_QWEN, [2, 3, 3], first_special=300),
    }
    VISION_WIDTHS = ("embed_dim",)
    PROCESSOR = "Qwen2VLProcessor"
    SELFTEST = "qwen2_vl"

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return Qwen2VLAdapter(model)

    def reduced(self, config: Any) -> None:
        text = config.text_config
        text.layer_types = text.layer_types[: text.num_hidden_layers]
        config.vision_config.hidden_size = text.hidden_size

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        vision = config.vision_config
        d, patches = vision.embed_dim, rows * columns * vision.spatial_merge_size**2
        embedding = 2 * patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * d
        linear = 2 * patches * (4 + 2 * vision.mlp_ratio) * d * d
        return embedding + vision.depth * linear, vision.depth * 4 * patches**2 * d


def _config(
    vision: tuple[int, ...],
    text: tuple[int, ...],
    mrope_section: list[int],
    first_special: int = 151643,
) -> PreTrainedConfig:
    """A config of Qwen2-VL; the arguments that are not named here are those of `mrope_config`.

    Args:
        vision: width, width of the MLP in units of it, layers, heads.
    """
    width, ratio, depth, heads = vision
    tower = {
        "embed_dim": width,
        "mlp_ratio": ratio,
        "depth": depth,
        "num_heads": heads,
        "hidden_size": text[0],  # after the merger
    }
    return mrope_config(
        Qwen2VLConfig, tower, text, mrope_section, 32768, first_special=first_special
    )


FAMILY = Qwen2VL()
