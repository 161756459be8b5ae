"""LLaVA-1.5: a CLIP tower with CLS, a projector, a Llama."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from secateur.families.base import (
    Adapter,
    EncodedImage,
    Family,
    TowerBlock,
    View,
    language_fields,
)
from secateur.families.contract import ContractError, require
from secateur.prompts import LLAVA

if TYPE_CHECKING:
    from secateur.settings import ModelIdentity

# CLIP towers: hidden_size, intermediate_size, layers, heads, image_size
CLIP_L_336 = (1024, 4096, 24, 16, 336)
TINY_CLIP = (64, 128, 4, 4, 56)
# language models, as in `language_fields`
VICUNA_7B = (4096, 11008, 32, 32, 32, 32064)
VICUNA_13B = (5120, 13824, 40, 40, 40, 32064)
TINY_VICUNA = (64, 160, 4, 4, 4, 320)


class LlavaAdapter(Adapter):
    """LLaVA-1.5: a CLIP tower with CLS, one crop per image, all patches in raster order."""

    # One row per crop. encoder_features [R, N, C] and features [R, N, D] enter and leave the
    # projector; hidden, queries and keys [R, 1+N, C] are of the block whose output is
    # encoder_features, first_* of the first block, object_* of a middle one, last_* of the last.
    SOURCES: ClassVar[dict[str, tuple[str, ...]]] = {
        "features": ("features",),
        "encoder_features": ("encoder_features",),
        "cls_token": ("hidden",),
        "saliency": ("queries", "keys"),
        "first_saliency": ("first_queries", "first_keys"),
        "object_attention": ("object_queries", "object_keys"),
        "output_attention": ("queries", "keys"),
        "encoder_keys": ("keys",),
        "last_queries": ("last_queries",),
        "last_keys": ("last_keys",),
        "output_places": (),  # of the hooks that merge
        "grid": (),
    }
    PARTS: ClassVar[tuple[str, ...]] = (
        *Adapter.PARTS,
        "model.multi_modal_projector",
        "model.vision_tower",
    )

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.projector = self.core.multi_modal_projector
        layer, strategy = (
            self.model.config.vision_feature_layer,
            self.model.config.vision_feature_select_strategy,
        )
        if not isinstance(layer, int) or strategy != "default":
            raise ValueError(
                f"this model reads features from layer(s) {layer!r} with strategy {strategy!r}; "
                "pruning supports one layer and strategy 'default' (CLS dropped)"
            )
        blocks = self._blocks()
        require(blocks[0], "self_attn.q_proj", "self_attn.k_proj", "self_attn.num_heads")
        # hidden_states has one entry more than there are blocks: entry k leaves block k - 1
        self.block: Any = blocks[layer if layer < 0 else layer - 1]
        self.first_block: Any = blocks[0]
        self.until = layer % (len(blocks) + 1)  # how many blocks make the features
        self.last_block: Any = blocks[-1]
        # HiPrune's object layer: the 9th of CLIP-L's 24, in other towers at the same relative depth
        self.object_block: Any = blocks[max(round(len(blocks) * 9 / 24), 1) - 1]

    def _blocks(self) -> nn.ModuleList:
        """The tower's encoder blocks; their parent moved between releases of transformers."""
        for name, module in self.core.vision_tower.named_modules():
            if name.endswith("encoder.layers"):
                return module
        raise ContractError(f"{type(self.core.vision_tower).__name__} has no `encoder.layers`")

    def tower_blocks(self) -> list[TowerBlock]:
        kernel = self.core.vision_tower.config._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={kernel!r}: merging inside the image encoder weights its "
                "attention, for which it needs sdpa or eager"
            )
        blocks: list[Any] = list(self._blocks())[: self.until]
        require(blocks[0], "self_attn.k_proj", "layer_norm2", "mlp")
        return [
            TowerBlock(
                block,
                block.self_attn.k_proj,
                block.layer_norm2,
                block.mlp,
                block.self_attn.num_heads,
            )
            for block in blocks
        ]

    def hooks(self, needs: frozenset[str], into: dict[str, Tensor]) -> Iterator[RemovableHandle]:
        self.check_known(needs)
        wanted = {source for need in needs for source in self.SOURCES[need]} | {"features"}

        def store(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            into[name] = (output[0] if isinstance(output, tuple) else output).detach()

        def store_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            into["encoder_features"] = args[0].detach()

        if "encoder_features" in wanted:
            yield self.projector.register_forward_pre_hook(store_input)
        places = {
            "features": self.projector,
            "hidden": self.block,
            "queries": self.block.self_attn.q_proj,
            "keys": self.block.self_attn.k_proj,
            "first_queries": self.first_block.self_attn.q_proj,
            "first_keys": self.first_block.self_attn.k_proj,
            "object_queries": self.object_block.self_attn.q_proj,
            "object_keys": self.object_block.self_attn.k_proj,
            "last_queries": self.last_block.self_attn.q_proj,
            "last_keys": self.last_block.self_attn.k_proj,
        }
        for name, module in places.items():
            if name in wanted:
                yield module.register_forward_hook(partial(store, name))

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        captures, count = self._captures(needs, raw), raw["features"].shape[1]
        tokens = torch.arange(count, device=raw["features"].device)
        return [
            EncodedImage(
                {name: value[row : row + 1] for name, value in captures.items()},
                square(count),
                1,
                tokens,
            )
            for row in range(len(raw["features"]))
        ]

    def _captures(self, needs: frozenset[str], raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in `needs`, as `VisualTokens` defines them, one row per crop."""
        made = {
            "cls_token": lambda: raw["hidden"][:, 0],
            "saliency": lambda: self._from_cls(raw["queries"], raw["keys"]),
            "first_saliency": lambda: self._from_cls(raw["first_queries"], raw["first_keys"]),
            "object_attention": lambda: self._received(raw["object_queries"], raw["object_keys"]),
            "output_attention": lambda: self._received(raw["queries"], raw["keys"]),
            "encoder_keys": lambda: raw["keys"],
        }
        return {
            name: made[name]() if name in made else raw[name]
            for name in (needs | {"features"}) - {"grid"}
        }

    def _attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[I, H, Q, 1+N] softmax attention over CLS and patches, in float32.

        Args:
            queries: [I, Q, C].
            keys: [I, 1+N, C].
        """
        heads = self.block.self_attn.num_heads
        query = queries.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        key = keys.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)

    def _from_cls(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[I, H, N] attention that CLS gives to each patch."""
        return self._attention(queries[:, :1], keys)[:, :, 0, 1:]

    def _received(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[I, N] attention that each patch gets, mean over heads and all queries, CLS included."""
        return self._attention(queries, keys).mean((1, 2))[:, 1:]

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        per_image = {
            name for name in ("pixel_values", "image_sizes") if arguments.get(name) is not None
        }
        for number in range(len(arguments["pixel_values"])):
            yield arguments | {name: arguments[name][number : number + 1] for name in per_image}

    def project(self, features: Tensor) -> Tensor:
        return self.projector(features.to(next(self.projector.parameters()).dtype))


def square(count: int) -> tuple[int, int]:
    """The side, twice, of a square grid of `count` tokens."""
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} visual tokens do not form a square grid")
    return side, side


class Llava(Family):
    """LLaVA-1.5 and its kin: one CLIP tower, square crops."""

    MODEL_TYPE = "llava"
    NEW_TOKENS = 1024
    PLACEHOLDER = "<image>"
    GEOMETRIES: ClassVar[tuple[str, ...]] = ("processor", "pad")
    # from config.json of llava-hf/llava-1.5-{7b,13b}-hf
    CONFIGS: ClassVar = {
        "llava_1_5_7b": lambda: llava_config(LlavaConfig, CLIP_L_336, VICUNA_7B),
        "llava_1_5_13b": lambda: llava_config(LlavaConfig, CLIP_L_336, VICUNA_13B),
    }
    # 56 px, 4 x 4 tokens
    TINY: ClassVar = {"llava": lambda: llava_config(LlavaConfig, TINY_CLIP, TINY_VICUNA)}
    SELFTEST = "llava"

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return LlavaAdapter(model)

    def processor(self, config: PreTrainedConfig) -> ProcessorMixin:
        from transformers import CLIPImageProcessor, LlavaProcessor  # slow to import

        return clip_processor(config, LlavaProcessor, CLIPImageProcessor)

    def crops(self, config: Any, inputs: BatchFeature) -> list[tuple[int, int]]:
        return [clip_grid(config)]

    def crops_of(self, config: Any, visual_tokens: int) -> list[tuple[int, int]] | None:
        grid = clip_grid(config)
        return [grid] * (visual_tokens // grid[0] ** 2)

    def visual_tokens(self, config: Any) -> int | None:
        return math.prod(clip_grid(config))

    def views(
        self, model: "ModelIdentity", image: Image.Image, grid: tuple[int, int]
    ) -> list[View]:
        if model.geometry == "pad":
            seen = ImageOps.pad(image, (max(image.size),) * 2, color="gray")
        else:  # CLIP's processor: the middle square
            seen = ImageOps.fit(image, (min(image.size),) * 2)
        return super().views(model, seen, grid)

    def encoder_saliency(self, model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
        pixels = inputs["pixel_values"].flatten(0, -4)
        attentions = model.model.vision_tower(pixels, output_attentions=True).attentions
        return attentions[model.config.vision_feature_layer][:, :, 0, 1:]

    def merging_blocks(self, config: Any) -> int:
        layers: int = config.vision_config.num_hidden_layers
        return config.vision_feature_layer % (layers + 1)

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"FLOPs of {config.model_type!r} models with the image encoder "
                f"{vision.model_type!r} are not known; known: clip_vision_model"
            )
        d, patches = vision.hidden_size, rows * columns
        positions = patches + 1  # CLS
        embedding = 2 * patches * 3 * vision.patch_size**2 * d
        linear, attention = embedding, 0
        for layer in range(vision.num_hidden_layers):
            linear += 2 * positions * 4 * d * d
            attention += 4 * positions**2 * d
            positions -= merged_away[layer] if layer < len(merged_away) else 0
            linear += 2 * positions * 2 * d * vision.intermediate_size
        return linear, attention

    def projector_flops(self, config: Any) -> int:
        width = config.get_text_config().hidden_size
        return 2 * width * (config.vision_config.hidden_size + width)


def clip_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of tokens of a crop."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def clip_processor(
    config: Any, processor: Any, image_processor: Any, **geometry: Any
) -> ProcessorMixin:
    """A processor of these classes with a byte tokenizer, for LLaVA and LLaVA-NeXT.

    Args:
        geometry: more arguments of the image processor.
    """
    from secateur.families.byte_tokenizer import byte_tokenizer

    text, vision = config.text_config, config.vision_config
    side = vision.image_size
    return processor(
        image_processor=image_processor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **geometry
        ),
        tokenizer=byte_tokenizer(
            text.vocab_size,
            {
                "<s>": text.bos_token_id,
                "</s>": text.eos_token_id,
                "<image>": config.image_token_id,
                "<pad>": text.pad_token_id,
            },
            begin="<s>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLS
        image_token="<image>",
        chat_template=LLAVA,
    )


def llava_config(
    kind: type[LlavaConfig] | type[LlavaNextConfig],
    vision: tuple[int, ...],
    text: tuple[int, ...],
    pinpoints: list[list[int]] | None = None,
) -> PreTrainedConfig:
    """A config of LLaVA or LLaVA-NeXT with a CLIP tower of 14-pixel patches and a Vicuna.

    Args:
        vision: hidden_size, intermediate_size, layers, heads, image_size.
        text: as in `language_fields`.
        pinpoints: the shapes of LLaVA-NeXT's mosaics, in crops.
    """
    hidden, intermediate, layers, heads, side = vision
    tower = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=14,
        projection_dim=768,
    )
    # llava-hf pads Vicuna's 32,000 tokens to 32,064: <image> and <pad> are the first two
    pad = text[-1] - 63
    names: dict[str, Any] = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": pad,
        "tie_word_embeddings": False,
    }
    options: dict[str, Any] = (
        {}
        if pinpoints is None
        else {"image_grid_pinpoints": [[side * a, side * b] for a, b in pinpoints]}
    )
    return kind(
        vision_config=tower,
        text_config=LlamaConfig(
            **language_fields(*text), max_position_embeddings=4096, rms_norm_eps=1e-5, **names
        ),
        image_token_index=pad - 1,
        image_seq_length=(side // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **options,
    )


FAMILY = Llava()
