"""LLaVA-OneVision: a SigLIP tower without CLS over an image and its tiles, a projector, a Qwen2.

An image that is alone in its prompt is encoded as a whole and in tiles. The model lays the tiles
out as one mosaic, cuts off padding, resamples a mosaic that is too large, and ends its rows with
newlines. Images that share a prompt are encoded as a whole only, with one newline each.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    BatchFeature,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from secateur.families.base import (
    NEWLINE,
    Adapter,
    EncodedImage,
    Family,
    Mosaic,
    language_fields,
)
from secateur.families.contract import ContractError
from secateur.families.llava import clip_grid
from secateur.families.qwen2_5_vl import received

# towers: hidden_size, intermediate_size, layers, heads, image_size
_SIGLIP = (1152, 4304, 26, 16, 384)
_TINY_SIGLIP = (32, 64, 4, 4, 56)
# language models, as in `language_fields`
_QWEN2_05B = (896, 4864, 24, 14, 2, 152000)
_QWEN2_7B = (3584, 18944, 28, 28, 4, 152128)
_TINY_QWEN2 = (64, 160, 4, 4, 2, 320)
# images first, as in the checkpoints' template; this one ends each with a line break
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class LlavaOnevisionAdapter(Adapter):
    """LLaVA-OneVision: the whole image is the one crop, its tiles are a mosaic.

    Captures of tiles go through the model's own packing as features do: laid out, cut and
    resampled channel by channel. Attention is what a patch receives from its own crop or tile, mean
    over the queries; there is no CLS. What a method merges are projected tokens, since projecting
    means of resampled encoder features is not what the model does with its own.
    """

    # One row per crop or tile. encoder_features [R, N, C] and features [R, N, D] enter and leave
    # the projector; queries and keys [R, N, C] are of the last block, object_* of a middle one.
    SOURCES: ClassVar = {
        "features": ("features",),
        "encoder_features": ("encoder_features",),
        "saliency": ("queries", "keys"),
        "object_attention": ("object_queries", "object_keys"),
        "output_attention": ("queries", "keys"),
        "encoder_keys": ("keys",),
        "grid": (),
    }
    PARTS: ClassVar = (
        *Adapter.PARTS,
        "config.image_grid_pinpoints",
        "config.vision_aspect_ratio",
        "model.multi_modal_projector",
        "model.pack_image_features",
        "model.vision_tower",
    )
    IMAGE_ARGUMENTS: ClassVar = ("pixel_values", "image_sizes", "batch_num_images")
    prunes_crops = False
    merges_projected = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        check_options(self.model.config)
        self.projector = self.core.multi_modal_projector
        blocks = self._blocks()
        # hidden state -1 leaves the last block; the tower's last norm comes after it
        self.attention: Any = blocks[-1].self_attn
        # HiPrune's object layer: the 9th of CLIP-L's 24, in other towers at the same relative depth
        self.object: Any = blocks[max(round(len(blocks) * 9 / 24), 1) - 1].self_attn

    def _blocks(self) -> Any:
        """The tower's blocks; their parent moved between releases of transformers."""
        for name, module in self.core.vision_tower.named_modules():
            if name.endswith("encoder.layers"):
                return module
        raise ContractError(f"{type(self.core.vision_tower).__name__} has no `encoder.layers`")

    def check_known(self, needs: frozenset[str]) -> None:
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            raise ValueError(
                f"LLaVA-OneVision models do not provide {', '.join(unknown)}: their tower has no "
                "CLS token, and their tiles are one grid; take another pruner, or an option of it "
                "that does without (visionzip: keep_cls=false; prunesid: variant=qwen)"
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
            "queries": self.attention.q_proj,
            "keys": self.attention.k_proj,
            "object_queries": self.object.q_proj,
            "object_keys": self.object.k_proj,
        }
        for name, module in places.items():
            if name in wanted:
                yield module.register_forward_hook(partial(store, name))

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        crops, sizes = self._crops(arguments), arguments["image_sizes"]
        count = raw["features"].shape[1]
        made = self._captures(needs, raw)
        packed = {name: self._packed(value, crops, sizes) for name, value in made.items()}
        # 1 at tokens and 0 at newlines
        ones = torch.ones_like(raw["features"][..., :1], dtype=torch.float32)
        lines = self._packed(ones, crops, sizes, newline=ones.new_zeros(1))
        grid, images = clip_grid(self.model.config), []
        for number, tiles in enumerate(crops):
            token = lines[number][:, 0] > 0.5
            tokens = torch.where(token, token.cumsum(0) - 1, NEWLINE)
            base, rest = {}, {}
            for name, value in packed.items():
                base[name], rest[name] = (
                    _shaped(name, part) for part in value[number].tensor_split([count])
                )
            mosaic = None
            if tiles > 1:
                high = int((~token).sum())  # every row ends in a newline
                wide = rest["features"].shape[1] // high if high else 0
                mosaic = Mosaic(rest, (high, wide), tiles - 1)
            images.append(EncodedImage(base, grid, 1, tokens, mosaic=mosaic))
        return images

    def _captures(self, needs: frozenset[str], raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in `needs`, one row per crop or tile, [R, N, channels]."""
        made = {
            "saliency": lambda: self._received("queries", "keys", raw),
            "object_attention": lambda: self._received("object_queries", "object_keys", raw).mean(
                -1, keepdim=True
            ),
            "output_attention": lambda: self._received("queries", "keys", raw).mean(
                -1, keepdim=True
            ),
            "encoder_keys": lambda: raw["keys"],
        }
        return {
            name: made[name]() if name in made else raw[name]
            for name in (needs | {"features"}) - {"grid"}
        }

    def _received(self, queries: str, keys: str, raw: dict[str, Tensor]) -> Tensor:
        """[R, N, H] softmax attention that each patch gets, mean over all queries of its row."""
        query, key = (
            raw[name].float().unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)
            for name in (queries, keys)
        )
        query = query * query.shape[-1] ** -0.5
        return torch.stack([received(q, k).T for q, k in zip(query, key, strict=True)])

    def _crops(self, arguments: dict[str, Any]) -> list[int]:
        """How many crops each image has, its tiles included; images that share a prompt have 1."""
        sizes, counts = arguments["image_sizes"], arguments.get("batch_num_images")
        # as the model reads them: without the counts, every image is tiled
        alone = [True] * len(sizes)
        if counts is not None:
            alone = [count == 1 for count in map(int, counts) for _ in range(count)]
        config = self.model.config
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        return [
            image_size_to_num_patches(size, pinpoints, side) if tiled else 1
            for size, tiled in zip(sizes, alone, strict=False)
        ]

    def _packed(
        self, values: Tensor, crops: list[int], sizes: Tensor, newline: Tensor | None = None
    ) -> list[Tensor]:
        """[R, N, C] of all images -> [P, C] of each, by the model's own code."""
        ratio = self.model.config.vision_aspect_ratio
        packed, _ = self.core.pack_image_features(
            values.split(crops), sizes, image_newline=newline, vision_aspect_ratio=ratio
        )
        return packed

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # without the zeros that pad an image to the number of crops of the largest one
        pixels, sizes, crops = (
            arguments["pixel_values"],
            arguments["image_sizes"],
            self._crops(arguments),
        )
        rows = pixels.split(crops) if pixels.dim() == 4 else pixels
        for number, (row, count) in enumerate(zip(rows, crops, strict=True)):
            # 2: as an image that shares its prompt
            shared = torch.tensor([1 if count > 1 else 2], device=pixels.device)
            yield arguments | {
                "pixel_values": row[None, :count],
                "image_sizes": sizes[number : number + 1],
                "batch_num_images": shared,
            }

    def check_images(self, images: Sequence[EncodedImage], rows: Sequence[int]) -> None:
        for image, row in zip(images, rows, strict=True):
            count = rows.count(row)
            if (count == 1) != (image.mosaic is not None):
                how = "whole" if image.mosaic is None else "in tiles"
                raise ValueError(
                    f"prompt {row} of the batch has {count} image{'s' * (count > 1)}, encoded "
                    f"{how}: LLaVA-OneVision tiles an image only where it is alone in its prompt, "
                    "and the processor counts the images of a prompt from nested lists. Give one "
                    "list per prompt, images=[[a], [b, c]], and all that the processor returns, "
                    "batch_num_images included, to the model"
                )

    def project(self, features: Tensor) -> Tensor:
        """Features as they are: those of methods that merge are projected already."""
        return features.to(self.model.dtype)


def _shaped(name: str, value: Tensor) -> Tensor:
    """[N, channels] of one section -> [1, ...], as `VisualTokens` defines it."""
    if name == "saliency":
        return value.T[None]
    return (value[:, 0] if name in ("object_attention", "output_attention") else value)[None]


def check_options(config: Any) -> None:
    """Check that pruning supports the options of a checkpoint.

    Raises:
        ValueError: it does not.
    """
    expected = {
        "vision_feature_layer": (config.vision_feature_layer, -1),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, "full"),
        "vision_config.model_type": (config.vision_config.model_type, "siglip_vision_model"),
        "text_config.model_type": (config.text_config.model_type, "qwen2"),
    }
    for name, (value, known) in expected.items():
        if value != known:
            raise ValueError(
                f"this LLaVA-OneVision model has {name}={value!r}; pruning supports {known!r} "
                "alone, as in the checkpoints llava-hf/llava-onevision-qwen2-*"
            )


class LlavaOnevision(Family):
    """LLaVA-OneVision."""

    MODEL_TYPE = "llava_onevision"
    NEW_TOKENS = 1024
    PLACEHOLDER = "<image>"
    PROMPTS = ("hub",)
    # llava-hf/llava-onevision-qwen2-{0.5b,7b}-ov-hf, as the conversion script of transformers
    # writes them: SigLIP-SO400M without its last block and its head, Qwen2-Instruct with <image>
    # and <video> in a vocabulary filled up to a multiple of 64
    CONFIGS: ClassVar = {
        "llava_onevision_0_5b": lambda: _config(_SIGLIP, _QWEN2_05B, tied=True),
        "llava_onevision_7b": lambda: _config(_SIGLIP, _QWEN2_7B),
    }
    # crops of 4 x 4 tokens, mosaics of up to 4 x 4 tiles; the largest are resampled
    TINY: ClassVar = {
        "llava_onevision": lambda: _config(_TINY_SIGLIP, _TINY_QWEN2, most=4, first_special=300),
    }
    SELFTEST = "llava_onevision"

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return LlavaOnevisionAdapter(model)

    def processor(self, config: Any) -> ProcessorMixin:
        from transformers import (  # slow to import
            LlavaOnevisionImageProcessor,
            LlavaOnevisionProcessor,
            LlavaOnevisionVideoProcessor,
        )

        from secateur.families.byte_tokenizer import byte_tokenizer

        text, vision = config.text_config, config.vision_config
        size = {"height": vision.image_size, "width": vision.image_size}
        rows, columns = clip_grid(config)
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(
                size=size, image_grid_pinpoints=config.image_grid_pinpoints
            ),
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            tokenizer=byte_tokenizer(
                text.vocab_size,
                {
                    "<|endoftext|>": text.pad_token_id,
                    "<|im_start|>": text.eos_token_id - 1,
                    "<|im_end|>": text.eos_token_id,
                    "<image>": config.image_token_id,
                    "<video>": config.video_token_id,
                },
                eos_token="<|im_end|>",
                pad_token="<|endoftext|>",
                extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
            ),
            num_image_tokens=rows * columns,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            vision_aspect_ratio=config.vision_aspect_ratio,
            chat_template=_TEMPLATE,
        )

    def reduced(self, config: Any) -> None:
        text = config.text_config
        text.layer_types = text.layer_types[: text.num_hidden_layers]

    def tensors(
        self,
        processor: Any,
        config: Any,
        text: str,
        images: list[Image.Image],
        layout: str | None,
    ) -> BatchFeature:
        # nested: of a flat list the processor would tile every image
        return processor(text=[text], images=[images] if images else None, return_tensors="pt")

    def crops(self, config: Any, inputs: BatchFeature) -> list[tuple[int, int]]:
        return [clip_grid(config)] * inputs["pixel_values"].shape[1]

    def places(self, kept: Sequence[int], visual: int) -> list[int]:
        # the self-test's image is a base crop of S^2 tokens and a mosaic of 2 S rows of 2 S
        # tokens and a newline, which remains while its row holds a kept token
        side = next(side for side in range(1, visual) if 5 * side**2 + 2 * side == visual)
        held = [{number} for number in range(side**2)]
        for row in range(2 * side):
            line = [side**2 + row * 2 * side + column for column in range(2 * side)]
            held += [*({number} for number in line), set(line)]
        return [place for place, tokens in enumerate(held) if tokens & set(kept)]

    def encoder_saliency(self, model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
        # of the whole image; that of the tiles is laid out as their features are
        base = inputs["pixel_values"][:1, 0]
        attentions = model.model.vision_tower(base, output_attentions=True).attentions
        return attentions[-1].mean(2)

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        vision = config.vision_config
        if vision.model_type != "siglip_vision_model" or vision.vision_use_head:
            raise ValueError(
                f"FLOPs of {config.model_type!r} models with the image encoder "
                f"{vision.model_type!r} are not known but for siglip_vision_model without its "
                "head (vision_use_head=false)"
            )
        d, patches = vision.hidden_size, rows * columns
        embedding = 2 * patches * 3 * vision.patch_size**2 * d
        linear = 2 * patches * (4 * d * d + 2 * d * vision.intermediate_size)
        layers = vision.num_hidden_layers
        return embedding + layers * linear, layers * 4 * patches**2 * d

    def projector_flops(self, config: Any) -> int:
        width = config.get_text_config().hidden_size
        return 2 * width * (config.vision_config.hidden_size + width)


def _config(
    vision: tuple[int, ...],
    text: tuple[int, ...],
    most: int = 6,
    tied: bool = False,
    first_special: int = 151643,
) -> PreTrainedConfig:
    """A config of LLaVA-OneVision with a SigLIP tower of 14-pixel patches and a Qwen2.

    Args:
        vision: hidden_size, intermediate_size, layers, heads, image_size.
        text: as in `language_fields`.
        most: tiles along a side of the largest mosaic.
        tied: embeddings and head share their weights.
        first_special: id of <|endoftext|>; the other special tokens follow.
    """
    hidden, intermediate, layers, heads, side = vision
    tower = SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=14,
        vision_use_head=False,
    )
    names: dict[str, Any] = {
        "bos_token_id": first_special,
        "eos_token_id": first_special + 2,
        "pad_token_id": first_special,
        "tie_word_embeddings": tied,
    }
    language = Qwen2Config(
        **language_fields(*text),
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **names,
    )
    return LlavaOnevisionConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=first_special + 3,
        video_token_index=first_special + 4,
        image_grid_pinpoints=[
            [side * a, side * b] for a in range(1, most + 1) for b in range(1, most + 1)
        ],
        tie_word_embeddings=tied,
    )


FAMILY = LlavaOnevision()
