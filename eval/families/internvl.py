"""InternVL3 in Hugging Face's layout: tiles of one size, 2 x 2 patches per token, a Qwen.

An image is cut into tiles, row by row, and the whole image follows as a tile of its own; an image
of one tile has only that. In the prompt each tile has its placeholders, one tile after another.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import (
    BatchFeature,
    InternVLConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from secateur.families.base import Adapter, EncodedImage, Family, language_fields
from secateur.families.llava import square
from secateur.families.qk_norm import normed_projections
from secateur.families.qwen2_5_vl import received

# model types of the language models that are supported: InternVL3 has a Qwen2, InternVL3.5 a Qwen3
LANGUAGES = ("qwen2", "qwen3")
# towers: hidden_size, intermediate_size, layers, heads, image_size
_VISION = (1024, 4096, 24, 16, 448)
_TINY_VISION = (64, 128, 4, 4, 112)
# language models, as in `language_fields`
_QWEN_05B = (896, 4864, 24, 14, 2, 151674)
_QWEN_15B = (1536, 8960, 28, 12, 2, 151674)
_QWEN_7B = (3584, 18944, 28, 28, 4, 151674)
_TINY_QWEN = (64, 160, 4, 4, 2, 320)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class InternVLAdapter(Adapter):
    """InternVL: every tile is a crop; the first crop is the whole image, the last of the tiles.

    The encoder gets the tiles of all images, and nothing says which image a tile is of: an
    unbroken run of placeholders is one image. Attention and keys are means over the 2 x 2 patches
    of a token. Keys have no row for CLS.
    """

    # One row per tile. encoder_features [R, N, 4C] and features [R, N, D] enter and leave the
    # projector; queries and keys [R, 1+4N, C] are of the last block, first_* of the first,
    # object_* of a middle one.
    SOURCES: ClassVar = {
        "features": ("features",),
        "encoder_features": ("encoder_features",),
        "saliency": ("queries", "keys"),
        "first_saliency": ("first_queries", "first_keys"),
        "object_attention": ("object_queries", "object_keys"),
        "output_attention": ("queries", "keys"),
        "encoder_keys": ("keys",),
        "grid": (),
    }
    PARTS: ClassVar = (
        *Adapter.PARTS,
        "config.downsample_ratio",
        "config.vision_feature_layer",
        "config.vision_feature_select_strategy",
        "model.multi_modal_projector",
        *(
            f"model.vision_tower.encoder.layer.0.attention.{part}"
            for part in ("q_norm", "k_norm", "num_heads", "scale")
        ),
    )
    crops_in_turn = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = self.model.config
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if layer != -1 or strategy != "default":
            raise ValueError(
                f"this model reads features from layer(s) {layer!r} with strategy {strategy!r}; "
                "pruning of InternVL models supports layer -1 with strategy 'default' (CLS "
                "dropped), as in the checkpoints of InternVL3"
            )
        check_language(config)
        self.projector = self.core.multi_modal_projector
        self.merge = round(1 / config.downsample_ratio)  # patches along one side of a token
        blocks: Any = self.core.vision_tower.encoder.layer
        # their norms of queries and keys, which are identities where the tower has none
        self.attention: Any = blocks[-1].attention
        self.first: Any = blocks[0].attention
        # HiPrune's object layer: the 9th of 24, in other towers at the same relative depth
        self.object: Any = blocks[max(round(len(blocks) * 9 / 24), 1) - 1].attention

    def tower_blocks(self) -> list[Any]:
        raise ValueError(
            "tokens cannot be merged inside the image encoder of InternVL models: its output must "
            "be a grid of patches, 2 x 2 of which become one token; take another pruner"
        )

    def check_known(self, needs: frozenset[str]) -> None:
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            raise ValueError(
                f"InternVL models do not provide {', '.join(unknown)}: CLS is dropped before 2 x 2 "
                "patches become one token; take another pruner, or an option of it that does "
                "without (visionzip: keep_cls=false; prunesid: variant=qwen)"
            )

    def hooks(self, needs: frozenset[str], into: dict[str, Tensor]) -> Iterator[RemovableHandle]:
        self.check_known(needs)
        wanted = {source for need in needs for source in self.SOURCES[need]} | {"features"}

        def store(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
            into[name] = output.detach()

        def store_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            into["encoder_features"] = args[0].detach()

        if "encoder_features" in wanted:
            yield self.projector.register_forward_pre_hook(store_input)
        places = {
            "features": self.projector,
            "queries": self.attention.q_norm,
            "keys": self.attention.k_norm,
            "first_queries": self.first.q_norm,
            "first_keys": self.first.k_norm,
            "object_queries": self.object.q_norm,
            "object_keys": self.object.k_norm,
        }
        for name, module in places.items():
            if name in wanted:
                yield module.register_forward_hook(partial(store, name))

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        """Every tile as an image of one crop; `grouped` joins them."""
        captures, count = self._captures(needs, raw), raw["features"].shape[1]
        tokens = torch.arange(count, device=raw["features"].device)
        return [
            EncodedImage(
                {name: value[tile : tile + 1] for name, value in captures.items()},
                square(count),
                1,
                tokens,
            )
            for tile in range(len(raw["features"]))
        ]

    def _captures(self, needs: frozenset[str], raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in `needs`, as `VisualTokens` defines them, one row per tile."""
        made = {
            "saliency": lambda: self._from_cls(raw["queries"], raw["keys"]),
            "first_saliency": lambda: self._from_cls(raw["first_queries"], raw["first_keys"]),
            "object_attention": lambda: self._received(raw["object_queries"], raw["object_keys"]),
            "output_attention": lambda: self._received(raw["queries"], raw["keys"]),
            "encoder_keys": lambda: self.tokens(raw["keys"][:, 1:].transpose(1, 2)).transpose(1, 2),
        }
        return {
            name: made[name]() if name in made else raw[name]
            for name in (needs | {"features"}) - {"grid"}
        }

    def tokens(self, patches: Tensor) -> Tensor:
        """[..., 4N] patches in raster order -> [..., N] means over the patches of a token."""
        rows, columns = (side // self.merge for side in square(patches.shape[-1]))
        blocks = patches.unflatten(-1, (rows, self.merge, columns, self.merge))
        return blocks.mean((-3, -1)).flatten(-2)

    def _heads(self, projected: Tensor) -> Tensor:
        """[R, 1+4N, C] -> [R, H, 1+4N, C/H] in float32."""
        return projected.unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2).float()

    def _from_cls(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[R, H, N] attention that CLS gives to the patches of each token, their mean."""
        query = self._heads(queries[:, :1]) * self.attention.scale
        weights = (query @ self._heads(keys).transpose(-1, -2)).softmax(-1)
        return self.tokens(weights[:, :, 0, 1:])

    def _received(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[R, N] attention that each token gets, mean over heads and all queries, CLS included."""
        rows = zip(self._heads(queries) * self.attention.scale, self._heads(keys), strict=True)
        weights = torch.stack([received(query, key).mean(0) for query, key in rows])
        return self.tokens(weights[:, 1:])

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Tile by tile."""
        for tile in arguments["pixel_values"].split(1):
            yield arguments | {"pixel_values": tile}

    def output(self, features: list[Tensor], extras: list[dict[str, Tensor]]) -> Any:
        return BaseModelOutputWithPooling(pooler_output=torch.stack(features))

    def grouped(self, images: list[EncodedImage], visual: Tensor) -> list[EncodedImage]:
        """The tiles of every image together.

        Raises:
            ValueError: tiles and placeholders do not match.
        """
        if not images:  # `place` says what is missing
            return images
        edges = pad(visual.int(), (1, 1)).diff(dim=1)
        runs = ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()
        size, joined, first = images[0].per_crop, [], 0
        if any(run % size for run in runs) or sum(runs) != len(images) * size:
            raise ValueError(
                f"runs of {', '.join(map(str, runs)) or 'no'} image placeholders for {len(images)} "
                f"tiles of {size} tokens: each image needs an unbroken run of a whole number of "
                "tiles, as the processor writes it"
            )
        for count in (run // size for run in runs):
            # the whole image, which the prompt has last, is the first crop
            mine = [images[first + count - 1], *images[first : first + count - 1]]
            captures = {
                name: torch.cat([image.captures[name] for image in mine])
                for name in mine[0].captures
            }
            order = torch.arange(count * size, device=visual.device).roll(-size)
            joined.append(EncodedImage(captures, mine[0].grid, count, order))
            first += count
        return joined

    def project(self, features: Tensor) -> Tensor:
        return self.projector(features.to(next(self.projector.parameters()).dtype))

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        attention: Any = self.layers[layer].self_attn
        if hasattr(attention, "q_norm"):
            return normed_projections(attention)
        return super().projections(layer)


def check_language(config: Any) -> None:
    """Raise ValueError for a language model that is not supported."""
    kind = config.text_config.model_type
    if kind not in LANGUAGES:
        raise ValueError(
            f"InternVL models with a language model of type {kind!r} are not supported; supported: "
            f"{', '.join(LANGUAGES)}, as in InternVL3 (1B, 2B, 8B, 14B, 38B, 78B) and in the "
            "models of InternVL3.5 without experts"
        )


class InternVL(Family):
    """InternVL3."""

    MODEL_TYPE = "internvl"
    NEW_TOKENS = 1024
    PLACEHOLDER = "<IMG_CONTEXT>"
    MARKERS = ("<img>", "</img>")
    PROMPTS = ("hub",)
    # from config.json of OpenGVLab/InternVL3-{1B,2B,8B}-hf
    CONFIGS: ClassVar = {
        "internvl3_1b": lambda: internvl_config(_VISION, _QWEN_05B),
        "internvl3_2b": lambda: internvl_config(_VISION, _QWEN_15B),
        "internvl3_8b": lambda: internvl_config(_VISION, _QWEN_7B),
    }
    # tiles of 112 px, 4 x 4 tokens; grouped queries (4 heads, 2 for keys)
    TINY: ClassVar = {
        "internvl": lambda: internvl_config(_TINY_VISION, _TINY_QWEN, first_special=300),
        "internvl_qwen3": lambda: internvl_config(
            _TINY_VISION, _TINY_QWEN, first_special=300, language="qwen3"
        ),
    }
    SELFTEST = "internvl"
    SELFTEST_SIZE = (112, 224)  # two tiles and the whole image

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return InternVLAdapter(model)

    def processor(self, config: Any) -> ProcessorMixin:
        # slow to import
        from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

        from secateur.families.byte_tokenizer import byte_tokenizer

        text, image = config.text_config, config.image_token_id
        height, width = config.vision_config.image_size
        size = {"height": height, "width": width}
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=12),
            video_processor=InternVLVideoProcessor(size=size),
            tokenizer=byte_tokenizer(
                text.vocab_size,
                {
                    "<|endoftext|>": text.pad_token_id,
                    "<|im_start|>": text.eos_token_id - 1,
                    "<|im_end|>": text.eos_token_id,
                    "<img>": image - 2,
                    "</img>": image - 1,
                    "<IMG_CONTEXT>": image,
                    "<video>": image + 1,
                },
                eos_token="<|im_end|>",
                pad_token="<|endoftext|>",
                extra_special_tokens={
                    "start_image_token": "<img>",
                    "end_image_token": "</img>",
                    "context_image_token": "<IMG_CONTEXT>",
                    "video_token": "<video>",
                },
            ),
            image_seq_length=config.image_seq_length,
            chat_template=_TEMPLATE,
        )

    def reduced(self, config: Any) -> None:
        text = config.text_config
        text.layer_types = text.layer_types[: text.num_hidden_layers]

    def expanded(self, processor: Any, count: int) -> str:
        image = processor.image_token * count
        return f"{processor.start_image_token}{image}{processor.end_image_token}"

    def crops(self, config: Any, inputs: BatchFeature) -> list[tuple[int, int]]:
        return [square(config.image_seq_length)] * len(inputs["pixel_values"])

    def crops_of(self, config: Any, visual_tokens: int) -> list[tuple[int, int]] | None:
        grid = square(config.image_seq_length)
        return [grid] * (visual_tokens // config.image_seq_length)

    def places(self, kept: Sequence[int], visual: int) -> list[int]:
        first = self.TINY[self.SELFTEST]().image_seq_length  # the whole image, last in the prompt
        return [(number - first) % visual for number in kept]

    def encoder_saliency(self, model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
        attentions = model.model.vision_tower(**inputs, output_attentions=True).attentions
        tokens = self.adapter(model, None).tokens  # type: ignore[attr-defined]
        return tokens(attentions[-1][:, :, 0, 1:])

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        check_language(config)
        vision, merge = config.vision_config, round(1 / config.downsample_ratio)
        d, patches = vision.hidden_size, rows * columns * merge**2
        embedding = 2 * patches * 3 * vision.patch_size[0] * vision.patch_size[1] * d
        block = 2 * (patches + 1) * (4 * d + 2 * vision.intermediate_size) * d  # CLS
        attention = 4 * (patches + 1) ** 2 * d
        return embedding + vision.num_hidden_layers * block, vision.num_hidden_layers * attention

    def projector_flops(self, config: Any) -> int:
        width, merge = config.get_text_config().hidden_size, round(1 / config.downsample_ratio)
        return 2 * width * (config.vision_config.hidden_size * merge**2 + width)


def internvl_config(
    vision: tuple[int, ...],
    text: tuple[int, ...],
    first_special: int = 151643,
    language: str = "qwen2",
) -> PreTrainedConfig:
    """A config of InternVL3 with a tower of 14-pixel patches.

    Args:
        vision: hidden_size, intermediate_size, layers, heads, image_size.
        text: as in `language_fields`.
        first_special: id of <|endoftext|>; the other special tokens follow as in Qwen's vocabulary.
        language: model type of the language model.
    """
    hidden, intermediate, layers, heads, side = vision
    # Qwen's vocabulary is followed by <img>, </img> and <IMG_CONTEXT>
    image = first_special + (24 if first_special == 151643 else 12)
    return InternVLConfig(
        vision_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": [side, side],
            "patch_size": [14, 14],
            "attention_bias": True,
            "layer_scale_init_value": 0.1,
        },
        text_config={
            "model_type": language,
            **language_fields(*text),
            **({"head_dim": text[0] // text[3]} if language == "qwen3" else {}),
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "bos_token_id": first_special,
            "eos_token_id": first_special + 2,
            "pad_token_id": first_special,
        },
        image_token_id=image,
        image_seq_length=(side // 28) ** 2,
        tie_word_embeddings=False,
    )


FAMILY = InternVL()
