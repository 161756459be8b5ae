from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.registry import register


@register("pooling")
@dataclass(frozen=True)
class Pooling(Pruner):
    """Means of 2 x 2 blocks, a quarter of the tokens: what merging without looking is worth.

    The grid fixes the count; each mean stands at the upper left token of its block.
    """

    paper = "-"
    status = "baseline"
    merges = True
    needs = frozenset({"features", "grid"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.grid is not None
        height, width = tokens.grid
        if height % 2 or width % 2:
            self.fail(
                f"grid {tokens.grid} cannot be cut into 2 x 2 blocks; both sides have to be even"
            )
        if keep * 4 != height * width:
            self.fail(
                f"keeps {height * width // 4} of {height * width} tokens and cannot keep {keep}"
            )

        def blocks(x: Tensor) -> Tensor:
            return x.unflatten(1, (height // 2, 2, width // 2, 2))

        corners = blocks(torch.arange(height * width, device=tokens.features.device)[None])[
            :, :, 0, :, 0
        ].flatten(1)
        cells = blocks(tokens.features)
        means = (
            cells[:, :, 0, :, 0]
            + cells[:, :, 0, :, 1]
            + cells[:, :, 1, :, 0]
            + cells[:, :, 1, :, 1]
        ).flatten(1, 2) / 4
        return Selection(corners.expand(len(means), -1), means)

    def flops(self, shape: ImageShape) -> float:
        """No product: means are additions."""
        return 0
