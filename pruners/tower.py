"""The contract of the pruners that merge tokens inside the image encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruners.base import Pruner, Selection, VisualTokens
from secateur.pruners.linalg import gather_rows


@dataclass(frozen=True)
class Matching:
    """Which tokens merge in one block: T tokens of B crops become T'. CLS is the first of both."""

    kept: Tensor  # [B, T'] long, the token that each of the T' was, in output order
    into: Tensor  # [B, T] long, the one of the T' that each token becomes a part of


@dataclass(frozen=True)
class TowerPruner(Pruner):
    """Base of every method that merges tokens between attention and MLP of the encoder's blocks.

    The harness asks `merged_per_block` once per image and `match` in every block that merges. It
    replaces merged tokens by their means, weighted by how many patches each stands for. `features`
    then holds the encoder's output in the places of the patches that remain, and zeros elsewhere.
    Subclasses write `merged_per_block`, `match` and `flops`.
    """

    merges = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features", "output_places"})

    @property
    def weighs_attention(self) -> bool:
        """Whether attention adds the logarithm of a token's number of patches to its scores."""
        return False

    @property
    def raster(self) -> bool:
        """Whether the remaining tokens go on in raster order, not in that of the encoder."""
        return False

    def merged_per_block(self, tokens: int, blocks: int, keep: int) -> list[int]:
        """How many tokens each block merges into others.

        Args:
            tokens: patches of a crop, without CLS.
            blocks: blocks of the encoder up to the one whose output the projector receives.
            keep: patches that remain at the end.
        """
        raise NotImplementedError

    def match(self, keys: Tensor, count: int) -> Matching:
        """Choose `count` tokens of a block that merge into others.

        Args:
            keys: [B, T, d] mean of the heads' keys in this block, float32; the first is that of
                CLS, which always remains.
        """
        raise NotImplementedError

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.output_places is not None
        left = tokens.output_places >= 0
        if bool((left.sum(1) != keep).any()):
            self.fail(
                f"the image encoder left {left.sum(1).tolist()} tokens per crop, and the budget is "
                f"{keep}: this method merges inside the encoder, so that it works in "
                "secateur.inject only, with the budget given there"
            )
        last = tokens.output_places.masked_fill(~left, torch.inf)
        order = last.sort(dim=1, stable=True).indices[:, :keep]
        indices = order.sort(1).values if self.raster else order
        return Selection(
            indices, gather_rows(tokens.features, indices), custom_order=not self.raster
        )
