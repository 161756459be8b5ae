"""Qwen2.5-VL: a tower without CLS that works in windows, M-RoPE, grouped queries."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
)

from secateur.families.base import (
    Adapter,
    EncodedImage,
    Family,
    Rotary,
    View,
    language_fields,
    rotate,
)
from secateur.families.contract import Arguments

if TYPE_CHECKING:  # the library works without lmms-eval
    from lmms_eval.protocol import ChatMessages

    from secateur.settings import ModelIdentity

TOWER_PARTS = (  # of Qwen2-VL too
    "model.visual.merger",
    "model.visual.spatial_merge_size",
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.0.attn.num_heads",
    "model.visual.blocks.0.attn.scaling",
)
_CHUNK = 2**26  # attention weights held at a time: 256 MB in float32
# towers: hidden_size, intermediate_size, layers, heads, window_size, blocks with full attention
_VISION = (1280, 3420, 32, 16, 112, [7, 15, 23, 31])
_TINY_VISION = (64, 128, 4, 4, 56, [1, 3])
# language models, as in `language_fields`
QWEN_7B = (3584, 18944, 28, 28, 4, 152064)
_QWEN_3B = (2048, 11008, 36, 16, 2, 151936)
TINY_QWEN = (64, 160, 4, 4, 2, 320)
# the chat template of Qwen2-VL and Qwen2.5-VL: a default system turn, images in place
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Qwen25VLAdapter(Adapter):
    """Qwen2.5-VL: images of their own size, 2 x 2 patches per token, one row of captures per image.

    Features and encoder features are both the merger's output, in LLM width. Attention is what a
    token receives from all patches of its image in a block with full attention, mean over the
    queries and over the token's patches. Keys are means over the patches too, without the rotary
    embedding and without a row for CLS.
    """

    NAME: ClassVar[str] = "Qwen2.5-VL"  # in messages
    # merged [N, D]: the tokens of all images, window by window. qkv and object_qkv [4N, 3C]: the
    # patches, in that order, in the last block with full attention and in a middle one. cosines
    # and sines [4N, C/H]: of all blocks.
    SOURCES: ClassVar = {
        "features": ("merged",),
        "encoder_features": ("merged",),
        "saliency": ("qkv", "cosines", "sines"),
        "object_attention": ("object_qkv", "cosines", "sines"),
        "output_attention": ("qkv", "cosines", "sines"),
        "encoder_keys": ("qkv",),
        "grid": (),
    }
    PARTS: ClassVar = (
        *Adapter.PARTS,
        *TOWER_PARTS,
        "model.visual.window_size",
        "model.visual.patch_size",
        "model.visual.fullatt_block_indexes",
    )
    IMAGE_ARGUMENTS: ClassVar = ("pixel_values", "image_grid_thw")
    # M-RoPE's positions hold rows and columns, which `compact` would lose
    POSITIONS: ClassVar = ("original",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.visual: Any = self.core.visual
        self.merge: int = self.visual.spatial_merge_size
        full = self.full_blocks()
        if not full:
            raise ValueError(
                "this model's tower has no block with full attention, from which pruning takes "
                "saliency"
            )
        depth = len(self.visual.blocks)
        self.attention: Any = self.visual.blocks[full[-1]].attn
        # HiPrune's object layer, the 16th of 32; in other towers the block with full attention
        # nearest to the same relative depth
        self.object: Any = self.visual.blocks[
            min(full, key=lambda block: abs((block + 1) / depth - 16 / 32))
        ].attn

    def full_blocks(self) -> list[int]:
        """The tower's blocks in which a patch attends to all patches of its image, ascending."""
        return sorted(self.visual.fullatt_block_indexes)

    def tower_order(self, rows: int, columns: int) -> Tensor:
        """[rows * columns] raster numbers of an image's tokens in the order of the tower."""
        # tokens along one side of a window
        side = self.visual.window_size // self.visual.patch_size // self.merge
        return window_order(rows, columns, side)

    def check_known(self, needs: frozenset[str]) -> None:
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            raise ValueError(
                f"{self.NAME} models do not provide {', '.join(unknown)}: their tower has no CLS "
                "token; take another pruner, or an option of it that does without "
                "(visionzip: keep_cls=false; prunesid: variant=qwen)"
            )

    def hooks(self, needs: frozenset[str], into: dict[str, Tensor]) -> Iterator[RemovableHandle]:
        self.check_known(needs)
        wanted = {source for need in needs for source in self.SOURCES[need]} | {"merged"}

        def store(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
            into[name] = output.detach()

        rotary = Arguments(self.attention.forward, "position_embeddings")

        def store_rotary(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into["cosines"], into["sines"] = rotary.read(args, kwargs)["position_embeddings"]

        places = {
            "merged": self.visual.merger,
            "qkv": self.attention.qkv,
            "object_qkv": self.object.qkv,
        }
        for name, module in places.items():
            if name in wanted:
                yield module.register_forward_hook(partial(store, name))
        if "cosines" in wanted:
            yield self.attention.register_forward_pre_hook(store_rotary, with_kwargs=True)

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        images, first = [], 0
        for frames, height, width in arguments["image_grid_thw"].tolist():
            if frames != 1:
                raise ValueError(
                    f"an image of {frames} frames: pruning supports images, not videos"
                )
            rows, columns = height // self.merge, width // self.merge
            count, unit = rows * columns, self.merge**2
            raster = self.tower_order(rows, columns).argsort().to(raw["merged"].device)
            mine = {
                name: value[first : first + count]
                if name == "merged"
                else value[unit * first : unit * (first + count)]
                for name, value in raw.items()
            }
            images.append(
                EncodedImage(
                    self._captures(needs, mine, raster),
                    (rows, columns),
                    1,
                    torch.arange(count).to(raster),
                )
            )
            first += count
        return images

    def _captures(
        self, needs: frozenset[str], raw: dict[str, Tensor], raster: Tensor
    ) -> dict[str, Tensor]:
        """The tensors in `needs`, as `VisualTokens` defines them, of one image.

        Args:
            raster: [N] for each token in raster order, where the tower has it.
        """

        def tokens(patches: Tensor) -> Tensor:
            """[4N, ...] -> [N, ...] means, in raster order."""
            return patches.unflatten(0, (-1, self.merge**2)).mean(1)[raster]

        def saliency(block: str) -> Tensor:
            heads = raw[block].float().unflatten(1, (3, self.attention.num_heads, -1))
            query, key, _ = heads.permute(1, 2, 0, 3)
            cos, sin = raw["cosines"].float(), raw["sines"].float()
            weights = received(
                rotate(query, cos, sin) * self.attention.scaling, rotate(key, cos, sin)
            )
            return tokens(weights.T).T

        made: dict[str, Callable[[], Tensor]] = {
            "features": lambda: raw["merged"][raster],
            "encoder_features": lambda: raw["merged"][raster],
            "saliency": lambda: saliency("qkv"),
            "object_attention": lambda: saliency("object_qkv").mean(0),
            "output_attention": lambda: saliency("qkv").mean(0),
            "encoder_keys": lambda: tokens(raw["qkv"].unflatten(1, (3, -1))[:, 1].float()),
        }
        return {name: made[name]()[None] for name in (needs | {"features"}) - {"grid"}}

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        grids = arguments["image_grid_thw"]
        pixels = arguments["pixel_values"].split(grids.prod(1).tolist())
        for mine, grid in zip(pixels, grids.split(1), strict=True):
            yield arguments | {"pixel_values": mine, "image_grid_thw": grid}

    def check_positions(
        self, positions: Tensor | None, grid: tuple[int, int], row: int, places: Tensor
    ) -> None:
        rows, columns = grid
        place = torch.arange(rows * columns, device=places.device)
        offsets = torch.stack([torch.zeros_like(place), place // columns, place % columns])
        if positions is not None and positions.dim() == 3:
            # of four axes the first is for masks alone
            axes = positions[-3:, row if positions.shape[1] > 1 else 0, places]
            if bool((axes - axes[:, :1] == offsets).all()):
                return
        raise ValueError(
            f"{self.NAME} got the positions of text for an image of {rows} x {columns} tokens, "
            "where M-RoPE has rows and columns: transformers takes them, without an error, if "
            "mm_token_type_ids or image_grid_thw is missing; give the model both, as the "
            "processor returns them"
        )

    def project(self, features: Tensor) -> Tensor:
        """Features as they are: encoder features are the merger's output, already in LLM width."""
        return features.to(self.model.dtype)

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        return self.language_model.rotary_emb(hidden, positions.expand(3, *positions.shape))

    def rotary_rows(self, rotary: Rotary, index: Tensor) -> Rotary:
        row = torch.arange(len(index), device=index.device)[:, None]
        cos, sin = (
            part.expand(*part.shape[:-3], len(index), -1, -1)[..., row, index, :] for part in rotary
        )
        return cos, sin

    def heads(self, layer: int, projected: Tensor, rotary: Rotary) -> Tensor:
        cos, sin = (self._mixed(part) for part in rotary)
        return super().heads(layer, projected, (cos, sin))

    def _mixed(self, part: Tensor) -> Tensor:
        """[3, B, L, d] -> [B, L, d]; newer releases of transformers do it before the layers."""
        if part.dim() == 3:
            return part
        sections = self.model.config.text_config.rope_parameters["mrope_section"] * 2
        return torch.cat(
            [channels[axis % 3] for axis, channels in enumerate(part.split(sections, dim=-1))], -1
        )


class Qwen25VL(Family):
    """Qwen2.5-VL."""

    MODEL_TYPE = "qwen2_5_vl"
    NEW_TOKENS = 128
    PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
    MARKERS = ("<|vision_start|>", "<|vision_end|>")
    PROMPTS = ("hub",)
    HAS_IMAGE_SIDE = True
    # from config.json of Qwen/Qwen2.5-VL-{7B,3B}-Instruct
    CONFIGS: ClassVar = {
        "qwen2_5_vl_7b": lambda: qwen_config(_VISION, QWEN_7B, [16, 24, 24]),
        "qwen2_5_vl_3b": lambda: qwen_config(_VISION, _QWEN_3B, [16, 24, 24], tied=True),
    }
    # grouped queries (4 heads, 2 for keys), windows of 2 x 2 tokens, full attention in blocks 1, 3
    TINY: ClassVar = {
        "qwen2_5_vl": lambda: qwen_config(_TINY_VISION, TINY_QWEN, [2, 3, 3], first_special=300),
    }
    VISION_FIELDS = ("depth", "num_heads")
    # in transformers, which is slow to import them
    PROCESSOR: ClassVar[str] = "Qwen2_5_VLProcessor"
    VIDEO_PROCESSOR: ClassVar[str] = "Qwen2VLVideoProcessor"
    TEMPLATE: ClassVar[str] = _TEMPLATE
    SELFTEST = "qwen2_5_vl"
    SELFTEST_SIZE = (112, 168)  # 4 x 6 tokens

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return Qwen25VLAdapter(model)

    def processor(self, config: Any) -> ProcessorMixin:
        from transformers import Qwen2VLImageProcessor  # slow to import

        from secateur.families.byte_tokenizer import byte_tokenizer

        text, vision = config.text_config, config.vision_config
        made: Any = getattr(transformers, self.PROCESSOR)
        return made(
            image_processor=Qwen2VLImageProcessor(
                patch_size=vision.patch_size, merge_size=vision.spatial_merge_size
            ),
            video_processor=getattr(transformers, self.VIDEO_PROCESSOR)(
                patch_size=vision.patch_size, merge_size=vision.spatial_merge_size
            ),
            tokenizer=byte_tokenizer(
                text.vocab_size,
                {
                    "<|endoftext|>": text.pad_token_id,
                    "<|im_start|>": text.eos_token_id - 1,
                    "<|im_end|>": text.eos_token_id,
                    "<|vision_start|>": config.vision_start_token_id,
                    "<|vision_end|>": config.vision_end_token_id,
                    "<|image_pad|>": config.image_token_id,
                    "<|video_pad|>": config.video_token_id,
                },
                eos_token="<|im_end|>",
                pad_token="<|endoftext|>",
                extra_special_tokens={
                    "image_token": "<|image_pad|>",
                    "video_token": "<|video_pad|>",
                },
            ),
            chat_template=self.TEMPLATE,
        )

    def reduced(self, config: Any) -> None:
        # every eighth block, counted from the last, attends to the whole image, as in the original
        text, vision = config.text_config, config.vision_config
        layers = text.num_hidden_layers
        text.layer_types = text.layer_types[:layers]
        vision.out_hidden_size = text.hidden_size
        vision.fullatt_block_indexes = [
            block for block in range(layers) if (layers - 1 - block) % 8 == 0
        ]

    def limit_pixels(self, processor: Any, least: int | None, most: int | None) -> None:
        if least is None and most is None:
            return
        images = processor.image_processor
        size = images.size
        least = size["shortest_edge"] if least is None else least
        most = size["longest_edge"] if most is None else most
        if least > most:
            raise ValueError(
                f"model.min_pixels={least} is above model.max_pixels={most} (null: the "
                "checkpoint's): raise the one or lower the other"
            )
        images.size = {"shortest_edge": least, "longest_edge": most}
        # the PIL class of early releases of transformers 5 reads these instead
        if getattr(images, "min_pixels", None) is not None:
            images.min_pixels, images.max_pixels = images.size.values()

    def check_budget(self, processor: Any, budget: int, image_side: int | None) -> None:
        images = processor.image_processor
        side, size = images.patch_size * images.merge_size, images.size
        least, most = size["shortest_edge"], size["longest_edge"]
        if most // side**2 < budget:
            raise ValueError(
                f"budget={budget}: model.max_pixels={most} leaves an image at most "
                f"{most // side**2} visual tokens; lower the budget, or set model.max_pixels to at "
                f"least {budget * side**2}"
            )
        if image_side:
            from qwen_vl_utils.vision_process import smart_resize  # of secateur[eval]

            height, width = smart_resize(image_side, image_side, side, least, most)
            count = height * width // side**2
            if count < budget:
                raise ValueError(
                    f"budget={budget}: model.image_side={image_side} leaves every image {count} "
                    "visual tokens; lower the budget, or raise model.image_side"
                )

    def check_images(self, processor: Any, budget: int, inputs: BatchFeature) -> None:
        if "image_grid_thw" not in inputs:  # text alone
            return
        images = processor.image_processor
        fewest = int(inputs["image_grid_thw"].prod(1).min()) // images.merge_size**2
        if fewest < budget:
            enough = budget * (images.patch_size * images.merge_size) ** 2
            raise ValueError(
                f"budget={budget}: an image has only {fewest} visual tokens with "
                f"model.min_pixels={images.size['shortest_edge']}; lower the budget to at most "
                f"{fewest}, or set model.min_pixels to {enough}"
            )

    def chat(
        self,
        processor: Any,
        chat: "ChatMessages",
        images: list[Image.Image],
        template: str | None,
        image_side: int | None,
    ) -> tuple[str, list[Image.Image]]:
        from qwen_vl_utils import process_vision_info  # of secateur[eval]; injection needs none

        if image_side:
            square, how = (image_side, image_side), Image.Resampling.BICUBIC
            images = [image.convert("RGB").resize(square, how) for image in images]
        text = processor.apply_chat_template(
            chat.to_hf_messages(), tokenize=False, add_generation_prompt=True
        )
        if images:
            # As the released wrappers do: resized here once, by the limits, to a multiple of the
            # patches, which the processor leaves alone. Without the limits here it would resize
            # again: an image of 202 x 100 pixels would get 13 x 22 tokens instead of 12 x 23.
            size = processor.image_processor.size
            limits = {
                "min_pixels": size["shortest_edge"],
                "max_pixels": size["longest_edge"],
            }
            content = [{"type": "image", "image": image, **limits} for image in images]
            images, _ = process_vision_info(
                [{"role": "user", "content": content}],
                image_patch_size=processor.image_processor.patch_size,
            )
        return text, images

    def crops(self, config: Any, inputs: BatchFeature) -> list[tuple[int, int]]:
        merge = config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return [(rows // merge, columns // merge)]

    def views(
        self, model: "ModelIdentity", image: Image.Image, grid: tuple[int, int]
    ) -> list[View]:
        seen = image.resize((max(image.size),) * 2) if model.image_side else image
        return super().views(model, seen, grid)

    def positions(self, inputs: BatchFeature, visual: Tensor, length: int) -> Tensor:
        """[3, 1, length]: M-RoPE's time, row and column."""
        _, rows, columns = (inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
        start, end = int(visual[0]), int(visual[-1]) + 1
        place = torch.arange(rows * columns)
        image = start + torch.stack([torch.zeros_like(place), place // columns, place % columns])
        after = start + max(rows, columns) + torch.arange(length - end)
        parts = [torch.arange(start).expand(3, -1), image, after.expand(3, -1)]
        return torch.cat(parts, 1)[:, None]

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        vision = config.vision_config
        d, merged = vision.hidden_size, vision.spatial_merge_size
        patches = rows * columns * merged**2
        embedding = 2 * patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * d
        linear = 2 * patches * (4 * d * d + 3 * d * vision.intermediate_size)
        # tokens along one side of a window; windows at the edges are smaller
        side = vision.window_size // merged // vision.patch_size
        windows = [a * b * merged**2 for a in pieces(rows, side) for b in pieces(columns, side)]
        full = len(vision.fullatt_block_indexes)
        pairs = full * patches**2 + (vision.depth - full) * sum(size**2 for size in windows)
        return embedding + vision.depth * linear, 4 * pairs * d

    def projector_flops(self, config: Any) -> int:
        # the merger makes one token of a square of patches
        vision = config.vision_config
        entering = getattr(vision, self.VISION_WIDTHS[0]) * vision.spatial_merge_size**2
        return 2 * entering * (entering + config.get_text_config().hidden_size)


def pieces(length: int, side: int) -> list[int]:
    """`length` in pieces of `side`, the last perhaps smaller."""
    return [min(side, length - start) for start in range(0, length, side)]


def window_order(rows: int, columns: int, side: int) -> Tensor:
    """[rows * columns] raster numbers of the tokens in the tower's order.

    The tower takes windows of side x side, in raster order and each in raster order.
    """
    window = torch.arange(rows)[:, None] // side * columns + torch.arange(columns) // side
    return window.flatten().sort(stable=True).indices


def received(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, P] softmax attention that each of P patches gets, mean over all queries.

    Args:
        queries: [H, P, d], scaled; processed in chunks.
        keys: [H, P, d].
    """
    heads, patches, _ = queries.shape
    total = queries.new_zeros(heads, patches)
    for chunk in queries.split(max(1, _CHUNK // (heads * patches)), dim=1):
        total += (chunk @ keys.transpose(1, 2)).softmax(-1).sum(1)
    return total / patches


def qwen_config(
    vision: tuple[Any, ...],
    text: tuple[int, ...],
    mrope_section: list[int],
    tied: bool = False,
    first_special: int = 151643,
) -> PreTrainedConfig:
    """A config of Qwen2.5-VL with a tower of 14-pixel patches.

    Args:
        vision: hidden_size, intermediate_size, layers, heads, window_size, blocks with full
            attention.
        text: as in `language_fields`.
        tied: embeddings and head share their weights.
        first_special: id of <|endoftext|>; the other special tokens follow as in Qwen's vocabulary.
    """
    hidden, intermediate, depth, heads, window, full = vision
    tower = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "depth": depth,
        "num_heads": heads,
        "window_size": window,
        "fullatt_block_indexes": list(full),
        "out_hidden_size": text[0],
        "tokens_per_second": 2,
    }
    return mrope_config(Qwen2_5_VLConfig, tower, text, mrope_section, 128000, tied, first_special)


def mrope_config(
    kind: Callable[..., PreTrainedConfig],
    tower: dict[str, Any],
    text: tuple[int, ...],
    mrope_section: list[int],
    positions: int,
    tied: bool = False,
    first_special: int = 151643,
) -> PreTrainedConfig:
    """A config of Qwen2-VL or Qwen2.5-VL; arguments not named here are those of `qwen_config`.

    Args:
        kind: the class.
        tower: fields of the vision config that the two do not share.
        positions: the longest prompt.
    """
    patches = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section}
    names = {
        "bos_token_id": first_special,
        "eos_token_id": first_special + 2,
        "pad_token_id": first_special,
    }
    language = {
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    return kind(
        vision_config=tower | patches,
        text_config=language_fields(*text) | language | names,
        vision_start_token_id=first_special + 9,
        vision_end_token_id=first_special + 10,
        image_token_id=first_special + 12,
        video_token_id=first_special + 13,
        tie_word_embeddings=tied,
    )


FAMILY = Qwen25VL()
