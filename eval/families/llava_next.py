"""LLaVA-NeXT: LLaVA-1.5's tower on several crops of an image."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import (
    BatchFeature,
    LlavaNextConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import (
    image_size_to_num_patches,
    unpad_image,
)

from secateur.families.base import NEWLINE, Adapter, EncodedImage, View
from secateur.families.llava import (
    CLIP_L_336,
    TINY_CLIP,
    TINY_VICUNA,
    VICUNA_7B,
    VICUNA_13B,
    Llava,
    LlavaAdapter,
    clip_grid,
    clip_processor,
    llava_config,
    square,
)

if TYPE_CHECKING:
    from secateur.settings import ModelIdentity

LAYOUTS = ("anyres", "crops", "fixed2880")
_PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]  # in crops
_PATCH = 14  # pixels along a side of a patch, in every CLIP of these checkpoints


class LlavaNextAdapter(LlavaAdapter):
    """LLaVA-NeXT: crops in LLaVA-1.5's tower, first the whole image, then its tiles row by row.

    Args:
        layout: `anyres`, as Hugging Face packs crops: no tokens of padding, a newline after every
            row of tiles. `crops` and `fixed2880`, as the papers' codes do: all tokens of all
            crops, no newlines; they need inputs whose image sizes are those of the mosaics, so
            that nothing counts as padding. `crops` takes the checkpoint's own mosaics and rounds
            a crop's share of a budget down, as the codes of SCOPE and HiPrune do; `fixed2880`
            takes the mosaic of 2 x 2 tiles for every image, as those of VisPruner and CDPruner.
    """

    PARTS: ClassVar = (*LlavaAdapter.PARTS, "model.pack_image_features")
    IMAGE_ARGUMENTS: ClassVar = ("pixel_values", "image_sizes")

    def __init__(self, model: PreTrainedModel, layout: str) -> None:
        super().__init__(model)
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
        self.layout = layout
        self.keeps_newlines, self.equal_shares = layout == "anyres", layout == "crops"

    def _crops(self, sizes: Iterable[Any]) -> list[int]:
        """How many crops images of these sizes (height, width) have."""
        pinpoints, side = (
            self.model.config.image_grid_pinpoints,
            self.model.config.vision_config.image_size,
        )
        return [image_size_to_num_patches(size, pinpoints, side) for size in sizes]

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # without the zeros that pad an image to the number of crops of the largest one
        for mine, crops in zip(
            super().one_by_one(arguments), self._crops(arguments["image_sizes"]), strict=True
        ):
            yield mine | {"pixel_values": mine["pixel_values"][:, :crops]}

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        captures, (rows, count) = self._captures(needs, raw), raw["features"].shape[:2]
        sizes, device = arguments["image_sizes"], raw["features"].device
        crops = self._crops(sizes)
        # the model's own code packs token numbers instead of features, and so tells which
        # placeholder holds which token; float64 holds the numbers exactly
        numbers = [
            torch.arange(n * count, dtype=torch.float64, device=device).view(n, count, 1)
            for n in crops
        ]
        newline = torch.tensor([float(NEWLINE)], dtype=torch.float64, device=device)
        packed, _ = self.core.pack_image_features(
            numbers, sizes, vision_feature_select_strategy="default", image_newline=newline
        )
        images, first = [], 0
        for number, tokens in zip(crops, packed, strict=True):
            mine = {name: value[first : first + number] for name, value in captures.items()}
            images.append(EncodedImage(mine, square(count), number, tokens.flatten().long()))
            first += number
        assert first == rows, "the encoder ran on other crops than the image sizes say"
        for image in images:
            padded = int((image.tokens != NEWLINE).sum()) != image.crops * count
            if not self.keeps_newlines and padded:
                raise ValueError(
                    f"layout={self.layout!r} needs inputs without padding; secateur.inputs "
                    "prepares them"
                )
            if self.layout == "fixed2880" and image.crops != 5:
                raise ValueError(
                    f"layout='fixed2880' needs images of 5 crops, but one has {image.crops}; "
                    "secateur.inputs prepares them"
                )
        return images


class LlavaNext(Llava):
    """LLaVA-NeXT."""

    MODEL_TYPE = "llava_next"
    GEOMETRIES = ("processor",)
    LAYOUTS = LAYOUTS
    # from config.json of llava-hf/llava-v1.6-vicuna-{7b,13b}-hf
    CONFIGS: ClassVar = {
        "llava_next_7b": lambda: llava_config(LlavaNextConfig, CLIP_L_336, VICUNA_7B, _PINPOINTS),
        "llava_next_13b": lambda: llava_config(LlavaNextConfig, CLIP_L_336, VICUNA_13B, _PINPOINTS),
    }
    # crops of 4 x 4 tokens; llava_next_fixed has the mosaic of 2 x 2 alone: all images are 1 + 4
    TINY: ClassVar = {
        "llava_next": lambda: llava_config(LlavaNextConfig, TINY_CLIP, TINY_VICUNA, _PINPOINTS),
        "llava_next_fixed": lambda: llava_config(LlavaNextConfig, TINY_CLIP, TINY_VICUNA, [[2, 2]]),
    }
    SELFTEST = "llava_next_fixed"

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        return LlavaNextAdapter(model, layout or "anyres")

    def processor(self, config: Any) -> ProcessorMixin:
        from transformers import LlavaNextImageProcessor, LlavaNextProcessor  # slow to import

        return clip_processor(
            config,
            LlavaNextProcessor,
            LlavaNextImageProcessor,
            image_grid_pinpoints=config.image_grid_pinpoints,
        )

    def check_layout(self, config: Any, layout: str | None) -> None:
        side = 2 * config.vision_config.image_size
        if layout == "fixed2880" and [side, side] not in map(list, config.image_grid_pinpoints):
            raise ValueError(
                f"model.layout='fixed2880' needs the mosaic of {side} x {side} pixels, which is "
                f"not among the checkpoint's image_grid_pinpoints {config.image_grid_pinpoints}"
            )

    def tensors(
        self,
        processor: Any,
        config: Any,
        text: str,
        images: list[Image.Image],
        layout: str | None,
    ) -> BatchFeature:
        if layout in (None, "anyres") or not images:
            return super().tensors(processor, config, text, images, layout)
        vision, mosaics = config.vision_config, config.image_grid_pinpoints
        side, per_side = vision.image_size, vision.image_size // vision.patch_size
        if layout == "fixed2880":
            mosaics = [[2 * side, 2 * side]]
        pixels = processor.image_processor(
            images=images, image_grid_pinpoints=mosaics, return_tensors="pt"
        )
        # images as large as their mosaics, so that no token of the tiles counts as padding
        sizes = [select_best_resolution(size.tolist(), mosaics) for size in pixels["image_sizes"]]
        pixels["image_sizes"] = torch.tensor(sizes)
        first, *rest = text.split(processor.image_token)
        for (height, width), words in zip(sizes, rest, strict=True):
            rows, columns = height // side, width // side
            # every row of tiles ends in a newline, which is removed before the language model
            places = (1 + rows * columns) * per_side**2 + rows * per_side
            first += processor.image_token * places + words
        return BatchFeature({**processor.tokenizer([first], return_tensors="pt"), **pixels})

    def crops(self, config: Any, inputs: BatchFeature) -> list[tuple[int, int]]:
        return [clip_grid(config)] * inputs["pixel_values"].shape[1]

    def crops_of(self, config: Any, visual_tokens: int) -> list[tuple[int, int]] | None:
        return None

    def views(
        self, model: "ModelIdentity", image: Image.Image, grid: tuple[int, int]
    ) -> list[View]:
        """The whole image, squeezed into a square, and the mosaic of its tiles.

        The mosaic has the place of each tile's tokens; with `anyres` only those without padding.
        The mosaics are those of the checkpoints in `CONFIGS`.
        """
        per_side, size = grid[0], (image.height, image.width)
        side = per_side * _PATCH
        mosaics = [[2, 2]] if model.layout == "fixed2880" else _PINPOINTS
        height, width = select_best_resolution(
            size, [[rows * side, columns * side] for rows, columns in mosaics]
        )
        rows, columns = height // side, width // side
        tiles = np.arange(per_side**2, (1 + rows * columns) * per_side**2)
        tiles = tiles.reshape(rows, columns, per_side, per_side).swapaxes(1, 2)
        tokens = tiles.reshape(rows * per_side, columns * per_side)
        if model.layout in (None, "anyres"):
            mosaic = View(image, unpad_image(torch.from_numpy(tokens)[None], size)[0].numpy())
        else:
            mosaic = View(ImageOps.pad(image, (width, height), color="black"), tokens)
        whole = image.resize((min(image.size),) * 2)
        return [View(whole, np.arange(per_side**2).reshape(grid)), mosaic]

    def prompt_order(self, model: "ModelIdentity", views: Sequence[View]) -> list[int]:
        whole, mosaic = (view.tokens for view in views)
        if model.layout in (None, "anyres"):
            mosaic = np.pad(mosaic, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return [*map(int, whole.flat), *map(int, mosaic.flat)]

    def places(self, kept: Sequence[int], visual: int) -> list[int]:
        # the self-test's image is a base crop and 2 x 2 tiles without padding: 5 S^2 tokens and
        # 2 S newlines. A newline remains while its row of the mosaic holds a kept token.
        side = next(side for side in range(1, visual) if 5 * side**2 + 2 * side == visual)
        held = [{number} for number in range(side**2)]
        for row in range(2 * side):
            line = [
                (1 + row // side * 2 + column // side) * side**2 + row % side * side + column % side
                for column in range(2 * side)
            ]
            held += [*({number} for number in line), set(line)]
        return [place for place, tokens in enumerate(held) if tokens & set(kept)]


FAMILY = LlavaNext()
