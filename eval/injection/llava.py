"""LLaVA-1.5 and LLaVA-NeXT: a CLIP tower with CLS, a projector, a Llama."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from secateur.injection.adapter import Adapter
from secateur.injection.contract import ContractError, require
from secateur.injection.layout import NEWLINE, EncodedImage


class LlavaAdapter(Adapter):
    """LLaVA-1.5: a CLIP tower with CLS, one crop an image, all patches in raster order."""

    # encoder_features [R, N, C] and features [R, N, D] around the projector, a row a crop; hidden, queries, keys [R, 1+N, C]
    # of the block that gives encoder_features; object_* of a middle one, last_* of the last
    SOURCES: ClassVar[dict[str, tuple[str, ...]]] = {
        "features": ("features",),
        "encoder_features": ("encoder_features",),
        "cls_token": ("hidden",),
        "saliency": ("queries", "keys"),
        "object_attention": ("object_queries", "object_keys"),
        "output_attention": ("queries", "keys"),
        "encoder_keys": ("keys",),
        "last_queries": ("last_queries",),
        "last_keys": ("last_keys",),
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
        # hidden_states has one entry more than there are blocks: entry k is the output of block k - 1
        self.block: Any = blocks[layer if layer < 0 else layer - 1]
        self.last_block: Any = blocks[-1]
        # HiPrune's object layer, the 9th of CLIP-L's 24 (its default); in towers of other depth at the same share
        self.object_block: Any = blocks[max(round(len(blocks) * 9 / 24), 1) - 1]

    def _blocks(self) -> nn.ModuleList:
        """The tower's encoder blocks; their parent moved between releases of transformers."""
        for name, module in self.core.vision_tower.named_modules():
            if name.endswith("encoder.layers"):
                return module
        raise ContractError(f"{type(self.core.vision_tower).__name__} has no `encoder.layers`")

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
                _square(count),
                1,
                tokens,
            )
            for row in range(len(raw["features"]))
        ]

    def _captures(self, needs: frozenset[str], raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors `needs` names, as `VisualTokens` defines them, one row a crop."""
        made = {
            "cls_token": lambda: raw["hidden"][:, 0],
            "saliency": lambda: self._attention(raw["queries"][:, :1], raw["keys"])[:, :, 0, 1:],
            "object_attention": lambda: self._received(raw["object_queries"], raw["object_keys"]),
            "output_attention": lambda: self._received(raw["queries"], raw["keys"]),
            "encoder_keys": lambda: raw["keys"],
        }
        return {
            name: made[name]() if name in made else raw[name]
            for name in (needs | {"features"}) - {"grid"}
        }

    def _attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Softmax attention of the given queries [I, Q, C] over CLS and patches [I, 1+N, C], [I, H, Q, 1+N], in float32."""
        heads = self.block.self_attn.num_heads
        query = queries.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        key = keys.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)

    def _received(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[I, N] attention each patch gets, mean over heads and all queries, CLS's among them."""
        return self._attention(queries, keys).mean((1, 2))[:, 1:]

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        per_image = {
            name for name in ("pixel_values", "image_sizes") if arguments.get(name) is not None
        }
        for number in range(len(arguments["pixel_values"])):
            yield arguments | {name: arguments[name][number : number + 1] for name in per_image}

    def project(self, features: Tensor) -> Tensor:
        return self.projector(features.to(next(self.projector.parameters()).dtype))


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} visual tokens do not form a square grid")
    return side, side


class LlavaNextAdapter(LlavaAdapter):
    """LLaVA-NeXT: the crops of LLaVA-1.5's tower, the whole image first and then its tiles, row by row.

    Args:
        layout: `anyres`, as Hugging Face packs it, without the tokens of padding and with a newline behind every row of tiles; or
            `fixed2880`, as the papers' codes do: every token of every crop, no newlines. The latter needs inputs whose image
            sizes are square, so that nothing counts as padding.
    """

    PARTS: ClassVar = (*LlavaAdapter.PARTS, "model.pack_image_features")
    IMAGE_ARGUMENTS: ClassVar = ("pixel_values", "image_sizes")

    def __init__(self, model: PreTrainedModel, layout: str) -> None:
        super().__init__(model)
        if layout not in ("anyres", "fixed2880"):
            raise ValueError(f"layout={layout!r} is not one of 'anyres', 'fixed2880'")
        self.keeps_newlines = layout == "anyres"

    def _crops(self, sizes: Iterable[Any]) -> list[int]:
        """How many crops images of these sizes (height, width) have."""
        pinpoints, side = (
            self.model.config.image_grid_pinpoints,
            self.model.config.vision_config.image_size,
        )
        return [image_size_to_num_patches(size, pinpoints, side) for size in sizes]

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # without the zeros that fill an image up to the crops of the largest beside it
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
        # the model's own packing, of numbers in place of features, tells which placeholder holds which token; float64 holds
        # them exactly
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
            images.append(EncodedImage(mine, _square(count), number, tokens.flatten().long()))
            first += number
        assert first == rows, "the encoder ran on other crops than the image sizes say"
        for image in images:
            if (
                not self.keeps_newlines
                and int((image.tokens != NEWLINE).sum()) != image.crops * count
            ):
                raise ValueError(
                    "layout='fixed2880' needs inputs without padding; secateur.inputs prepares them"
                )
        return images
