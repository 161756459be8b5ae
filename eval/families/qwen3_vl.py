"""Qwen3-VL: Qwen2-VL with patches of 16 pixels, DeepStack, and norms of queries and keys.

DeepStack: features of earlier blocks of the tower are added to the visual tokens after the first
layers of the language model. A kept token keeps its own, also where a method merged others into it;
a token without a place in the image gets none.
"""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3VLConfig

from secateur.families.base import Adapter, language_fields
from secateur.families.contract import Keywords
from secateur.families.qk_norm import PARTS as NORMS
from secateur.families.qk_norm import normed_projections
from secateur.families.qwen2_5_vl import TINY_QWEN, Qwen25VL
from secateur.families.qwen2_vl import Qwen2VLAdapter
from secateur.pruners.base import EXTRA

# towers: hidden_size, intermediate_size, layers, heads, blocks whose features DeepStack adds
_VISION_L = (1024, 4096, 24, 16, [5, 11, 17])
_VISION_SO = (1152, 4304, 27, 16, [8, 16, 24])
_TINY_VISION = (64, 128, 4, 4, [0, 1, 2])
# language models, as in `language_fields`
_QWEN_2B = (2048, 6144, 28, 16, 8, 151936)
_QWEN_4B = (2560, 9728, 36, 32, 8, 151936)
_QWEN_8B = (4096, 12288, 36, 32, 8, 151936)
_LEVEL = "deepstack {}"  # an image's features of one level in the cache
_TEMPLATE = (  # no default system turn
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Qwen3-VL: captures are those of Qwen2-VL; DeepStack is no part of what pruners compare."""

    NAME = "Qwen3-VL"
    PARTS: ClassVar = (*Qwen2VLAdapter.PARTS, "model.visual.deepstack_visual_indexes")
    LANGUAGE_PARTS: ClassVar = (*Adapter.LANGUAGE_PARTS, *NORMS)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.levels = len(self.visual.deepstack_visual_indexes)
        if self.levels >= len(self.layers):
            raise ValueError(
                f"this model adds DeepStack features after {self.levels} of {len(self.layers)} "
                "layers; pruning supports models with more layers than levels of DeepStack"
            )

    def extras(self, output: Any) -> dict[str, Tensor]:
        # releases before 5.23 give the features of all images as one tensor
        levels = [
            level if isinstance(level, Tensor) else level[0] for level in output.deepstack_features
        ]
        return {_LEVEL.format(number): level for number, level in enumerate(levels)}

    def output(self, features: list[Tensor], extras: list[dict[str, Tensor]]) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        levels: list[Any] = [
            [image[_LEVEL.format(number)] for image in extras] for number in range(self.levels)
        ]
        if "mm_encoder_outputs" not in inspect.signature(self.core.forward).parameters:
            levels = [torch.cat(level) for level in levels]  # as in releases before 5.23
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=features,  # type: ignore[arg-type]
            deepstack_features=levels,
        )

    def pruned_arguments(self, kwargs: Keywords, origin: Tensor) -> Keywords:
        visual, levels = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if visual is None or levels is None:
            return kwargs
        index = origin.clamp_min(0)
        mine = visual.gather(1, index) & (origin != EXTRA)
        numbers = (visual.flatten().cumsum(0) - 1).view_as(visual)  # rows of a level
        rows = numbers.gather(1, index)[mine]
        return kwargs | {
            "visual_pos_masks": mine,
            "deepstack_visual_embeds": [level[rows] for level in levels],
        }

    def without_deepstack(self, kwargs: Keywords) -> tuple[Keywords, list[Tensor]]:
        levels = kwargs.get("deepstack_visual_embeds") or []
        return kwargs | {"visual_pos_masks": None, "deepstack_visual_embeds": None}, [*levels]

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        return normed_projections(self.layers[layer].self_attn)


class Qwen3VL(Qwen25VL):
    """Qwen3-VL without experts."""

    MODEL_TYPE = "qwen3_vl"
    # from config.json of Qwen/Qwen3-VL-{2B,4B,8B}-Instruct
    CONFIGS: ClassVar = {
        "qwen3_vl_2b": lambda: _config(_VISION_L, _QWEN_2B, tied=True),
        "qwen3_vl_4b": lambda: _config(_VISION_L, _QWEN_4B, tied=True),
        "qwen3_vl_8b": lambda: _config(_VISION_SO, _QWEN_8B),
    }
    # grouped queries (4 heads, 2 for keys), an 8 x 8 grid of learned positions, DeepStack after
    # three of four layers
    TINY: ClassVar = {
        "qwen3_vl": lambda: _config(
            _TINY_VISION, TINY_QWEN, mrope_section=[4, 2, 2], positions=64, first_special=300
        ),
    }
    PROCESSOR = "Qwen3VLProcessor"
    VIDEO_PROCESSOR = "Qwen3VLVideoProcessor"
    TEMPLATE = _TEMPLATE
    SELFTEST = "qwen3_vl"
    SELFTEST_SIZE = (128, 192)  # 4 x 6 tokens

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return Qwen3VLAdapter(model)

    def reduced(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        vision.out_hidden_size = text.hidden_size
        levels = min(len(vision.deepstack_visual_indexes), text.num_hidden_layers - 1)
        vision.deepstack_visual_indexes = list(range(levels))

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        vision = config.vision_config
        d, patches = vision.hidden_size, rows * columns * vision.spatial_merge_size**2
        embedding = 2 * patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * d
        linear = 2 * patches * (4 * d + 2 * vision.intermediate_size) * d
        return embedding + vision.depth * linear, vision.depth * 4 * patches**2 * d

    def projector_flops(self, config: Any) -> int:
        # every level of DeepStack has a merger of its own
        return super().projector_flops(config) * (
            1 + len(config.vision_config.deepstack_visual_indexes)
        )


def _config(
    vision: tuple[Any, ...],
    text: tuple[int, ...],
    mrope_section: Sequence[int] = (24, 20, 20),
    positions: int = 2304,
    tied: bool = False,
    first_special: int = 151643,
) -> PreTrainedConfig:
    """A config of Qwen3-VL with a tower of 16-pixel patches.

    Args:
        vision: hidden_size, intermediate_size, layers, heads, blocks of DeepStack.
        text: as in `language_fields`.
        mrope_section: its sum is half a head's width.
        positions: learned positions of the tower's square grid.
        tied: embeddings and head share their weights.
        first_special: id of <|endoftext|>; the other special tokens follow as in Qwen's vocabulary.
    """
    hidden, intermediate, depth, heads, deepstack = vision
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": list(mrope_section),
        "mrope_interleaved": True,
    }
    return Qwen3VLConfig(
        vision_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "depth": depth,
            "num_heads": heads,
            "deepstack_visual_indexes": list(deepstack),
            "out_hidden_size": text[0],
            "num_position_embeddings": positions,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config={
            **language_fields(*text),
            "head_dim": 2 * sum(mrope_section),
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
            "bos_token_id": first_special,
            "eos_token_id": first_special + 2,
            "pad_token_id": first_special,
        },
        vision_start_token_id=first_special + 9,
        vision_end_token_id=first_special + 10,
        image_token_id=first_special + 12,
        video_token_id=first_special + 13,
        tie_word_embeddings=tied,
    )


FAMILY = Qwen3VL()
