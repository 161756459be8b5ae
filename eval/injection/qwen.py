"""Qwen2.5-VL: a tower without CLS that works in windows, M-RoPE, grouped queries."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from secateur.injection.adapter import Adapter, Rotary, rotate
from secateur.injection.contract import Arguments
from secateur.injection.layout import EncodedImage

_CHUNK = 2**26  # attention weights held at a time: 256 MB in float32


class Qwen25VLAdapter(Adapter):
    """Qwen2.5-VL: every image at its own size, 2 x 2 patches a token, a row of captures each.

    Features and encoder features are both what the merger gives, in LLM width. Attention is what a token receives from all
    patches of its image in a block with full attention, mean over queries and over the token's patches; keys are means over the
    patches too, before the rotary embedding, without a row for CLS.
    """

    # merged [N, D] tokens of all images, window by window; qkv, object_qkv [4N, 3C] of the last full-attention block and a middle
    # one, in patches of that order; cosines and sines [4N, C/H] of all blocks
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
        "model.visual.merger",
        "model.visual.spatial_merge_size",
        "model.visual.window_size",
        "model.visual.patch_size",
        "model.visual.fullatt_block_indexes",
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.attn.num_heads",
        "model.visual.blocks.0.attn.scaling",
    )
    IMAGE_ARGUMENTS: ClassVar = ("pixel_values", "image_grid_thw")
    POSITIONS: ClassVar = (
        "original",
    )  # M-RoPE holds rows and columns, which numbering through would lose

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.visual: Any = self.core.visual
        self.merge: int = self.visual.spatial_merge_size
        self.window: int = (
            self.visual.window_size // self.visual.patch_size // self.merge
        )  # tokens a side
        full = sorted(self.visual.fullatt_block_indexes)
        if not full:
            raise ValueError(
                "this model's tower has no block with full attention, from which pruning takes saliency"
            )
        depth = len(self.visual.blocks)
        self.attention: Any = self.visual.blocks[full[-1]].attn
        # HiPrune's object layer, the 16th of 32; in towers of other depth the full-attention block nearest to the same share
        self.object: Any = self.visual.blocks[
            min(full, key=lambda block: abs((block + 1) / depth - 16 / 32))
        ].attn

    def check_known(self, needs: frozenset[str]) -> None:
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            raise ValueError(
                f"Qwen2.5-VL models do not provide {', '.join(unknown)}: their tower has no CLS token; take another pruner, "
                "or an option of it that does without (visionzip: keep_cls=false; prunesid: variant=qwen)"
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
            raster = window_order(rows, columns, self.window).argsort().to(raw["merged"].device)
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
        """The tensors `needs` names, as `VisualTokens` defines them, of one image; `raster` [N] orders its tokens."""

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

    def project(self, features: Tensor) -> Tensor:
        """As they are: what pruners get as encoder features has gone through the merger, which no mean of tokens could."""
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
        """[3, B, L, d], as older releases of transformers hand them to the layers, -> [B, L, d]; newer ones do so before."""
        if part.dim() == 3:
            return part
        sections = self.model.config.text_config.rope_parameters["mrope_section"] * 2
        return torch.cat(
            [channels[axis % 3] for axis, channels in enumerate(part.split(sections, dim=-1))], -1
        )


def window_order(rows: int, columns: int, side: int) -> Tensor:
    """[rows * columns] raster numbers of tokens in the order of the tower: windows of side x side, each in raster order."""
    window = torch.arange(rows)[:, None] // side * columns + torch.arange(columns) // side
    return window.flatten().sort(stable=True).indices


def received(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, P] softmax attention that each of P patches gets, mean over all queries.

    Args:
        queries: [H, P, d], scaled; they are taken a chunk at a time.
        keys: [H, P, d].
    """
    heads, patches, _ = queries.shape
    total = queries.new_zeros(heads, patches)
    for chunk in queries.split(max(1, _CHUNK // (heads * patches)), dim=1):
        total += (chunk @ keys.transpose(1, 2)).softmax(-1).sum(1)
    return total / patches
