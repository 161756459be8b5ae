from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import top_k
from secateur.pruners.registry import register


@register("hired")
@dataclass(frozen=True)
class HiRED(Pruner):
    """The tokens that CLS attends to most; crops share the budget of their image by content.

    Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models", AAAI 2025, arXiv 2408.10945, Algorithm 1; hasanar1f/HiRED@42be984,
    `modeling_llava.py` and `modeling_llava_next.py`. An image of one crop keeps what FasterVLM
    keeps. Of several crops the first, the whole image, gets the share alpha of the budget. The
    rest is divided among the tiles, in proportion to the content of their regions in the first
    crop, by its CLS attention in the encoder's first block.

    Args:
        alpha: share of the whole image, rounded down (paper, Section 5.3, and released scripts).
        content: `count`, how many of the first crop's (1 - alpha) N most attended tokens lie in a
            region (released code), or `attention`, the sum of the region's attention (paper, Eq.
            1).
        regions: `strips`, as many equal runs of the first crop's raster as there are tiles
            (released code), or `tiles`, the quarters that four tiles show (paper).

    Deviations: float32 (released: float16); every crop keeps at least one token, and tiles have
    equal shares where no region has content (released: possibly none; NaN). As released, the
    tiles' shares are rounded down, so that an image of several crops may keep a few tokens less
    than its budget. No official outputs are recorded.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    content: Literal["count", "attention"] = "count"
    regions: Literal["strips", "tiles"] = "strips"

    paper = "arXiv 2408.10945"
    status = "secondary"
    adaptive = True  # per crop; of an image of one crop it keeps the budget exactly
    needs = frozenset({"features", "grid", "saliency", "first_saliency"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.saliency is not None
        saliency = tokens.saliency.sum(1)
        counts = self.counts(tokens, keep)
        width = keep if counts is None else int(counts.max())
        picks = top_k(saliency, width)
        if counts is None:
            return Selection.ordered(picks, custom_order=False)
        outside = torch.arange(width, device=picks.device) >= counts[:, None]
        # padding comes after the last token of its row
        picks = picks.masked_fill(outside, saliency.shape[1]).sort(1).values
        return Selection(picks.masked_fill(outside, 0), counts=counts)

    def flops(self, shape: ImageShape) -> float:
        """The attention of CLS in two blocks."""
        return 2 * shape.cls_attention

    def counts(self, tokens: VisualTokens, keep: int) -> Tensor | None:
        """[B] tokens of every crop, for images with a budget of `keep` per crop.

        None if every row is its own image.

        Raises:
            PrunerError: `regions=tiles` for an image whose number of tiles is not four.
        """
        assert tokens.first_saliency is not None
        if tokens.image_of_row is None:
            return None
        first = tokens.first_saliency.sum(1)
        counts = torch.full((len(first),), keep, device=first.device)
        for image in sorted(set(tokens.image_of_row)):
            rows = [row for row, owner in enumerate(tokens.image_of_row) if owner == image]
            if len(rows) > 1:
                counts[rows] = self.shares(first[rows[0]], len(rows) - 1, keep, tokens.grid)
        return counts

    def shares(self, first: Tensor, tiles: int, keep: int, grid: tuple[int, int] | None) -> Tensor:
        """Phase 1: [1 + tiles] tokens of the whole image and its tiles.

        Args:
            first: [N] attention of CLS in the first block, of the whole image.
        """
        count, budget = len(first), keep * (1 + tiles)
        whole = min(int(budget * self.alpha), count)
        rest = min(budget - whole, tiles * count)
        content = first
        if self.content == "count":
            most = top_k(first, int(count * (1 - self.alpha)))
            content = torch.zeros_like(first).index_fill_(0, most, 1.0)
        region = self.region(count, tiles, grid).to(first.device)
        inside = torch.nn.functional.one_hot(region, tiles).to(first.dtype)
        score = content @ inside
        total = score.sum()
        share = torch.where(total > 0, score / total, 1 / tiles)
        of_tiles = (share * rest).long().clamp(1, count)
        return torch.cat([of_tiles.new_tensor([max(whole, 1)]), of_tiles])

    def region(self, count: int, tiles: int, grid: tuple[int, int] | None) -> Tensor:
        """[N] the tile that each token of the whole image belongs to."""
        place = torch.arange(count)
        if self.regions == "strips":
            return place * tiles // count
        if tiles != 4:
            self.fail(
                f"regions=tiles needs four tiles, and this image has {tiles}, whose arrangement "
                "the pruner does not see; use regions=strips, or model.layout=fixed2880"
            )
        assert grid is not None
        rows, columns = grid
        return place // columns * 2 // rows * 2 + place % columns * 2 // columns
