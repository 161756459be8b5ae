from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import top_k
from secateur.pruners.registry import register


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(Pruner):
    """Object tokens of a middle layer with their neighbours, then the output layer's tokens.

    Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
    Vision-Language Models", arXiv 2508.00553.

    Args:
        alpha: share of the budget for anchors and their four neighbours (paper: 0.1).
        order: `spatial` as the released code, or `picked`: anchors and neighbours ascending, then
            the others by attention.

    Deviations: neighbours at the left and right border wrap to the next row, as in the released
    code. Anchors are excluded from the second stage by a mask (released: minus 1, which a map of
    sums can exceed) and are at most keep / 5.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2508.00553"
    status = "official"
    needs = frozenset({"features", "grid", "object_attention", "output_attention"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.grid is not None
        assert tokens.object_attention is not None
        assert tokens.output_attention is not None
        count, width = tokens.object_attention.shape[1], tokens.grid[1]
        anchors = top_k(tokens.object_attention, min(round(keep * self.alpha / 5), keep // 5))
        shifts = torch.tensor([0, -1, 1, -width, width], device=anchors.device)
        block = (anchors[:, :, None] + shifts).clamp(0, count - 1).flatten(1)
        first = torch.zeros_like(tokens.output_attention, dtype=torch.bool).scatter(1, block, True)
        picks = top_k(tokens.output_attention.masked_fill(first, torch.inf), keep)
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The attention of all tokens in two blocks."""
        return 2 * 2 * (shape.tokens + 1) ** 2 * shape.encoder_width
