from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, gather_rows, top_k
from secateur.pruners.registry import register


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(Pruner):
    """Half the budget by CLS attention, half by rounds that drop the most repeated tokens.

    Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning
    in VLMs", ICCV 2025, arXiv 2412.01818.

    Args:
        important_ratio: share of the budget that goes by attention, rounded down (released
            default).
        step: tokens dropped per round (released code).
        order: `spatial` as the released code, or `picked`: important ones by attention, then the
            survivors of the rounds.

    Deviations: float32 (released: float16). An odd number of remaining tokens, where the released
    code fails or loses tokens, puts the middle one in the half that is dropped from; a zero vector
    has cosine 0.
    """

    important_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    step: Annotated[int, Field(ge=1)] = 8
    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2412.01818"
    status = "official"
    needs = frozenset({"features", "encoder_features", "saliency"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.encoder_features is not None
        assert tokens.saliency is not None
        ranking = top_k(tokens.saliency.mean(1), tokens.saliency.shape[2])
        important = int(keep * self.important_ratio)
        picks = ranking[:, :important]
        if keep > important:
            rest = ranking[:, important:]
            picks = torch.cat(
                [
                    picks,
                    rest.gather(
                        1,
                        self.thin_out(gather_rows(tokens.encoder_features, rest), keep - important),
                    ),
                ],
                1,
            )
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The CLS attention and the Gram matrix of the tokens without the important ones."""
        rest = shape.tokens - int(shape.kept * self.important_ratio)
        return shape.cls_attention + 2 * rest**2 * shape.encoder_width

    def thin_out(self, x: Tensor, keep: int) -> Tensor:
        """[B, keep] of the tokens x [B, R, C] after all rounds, in the order of the last round."""
        batch, count = x.shape[:2]
        rows = cosine_gram(x).flatten(0, 1)
        start = torch.arange(batch, device=x.device)[:, None] * count
        rest = torch.arange(count, device=x.device).expand(batch, -1)
        while (drop := min(self.step, rest.shape[1] - keep, (rest.shape[1] + 1) // 2)) > 0:
            even, odd = rest[:, 0::2], rest[:, 1::2]
            others = x.new_full((batch, 1, count), -torch.inf).scatter_(2, odd[:, None], 0.0)
            repeated = (
                rows.index_select(0, (even + start).flatten())
                .view(batch, -1, count)
                .add_(others)
                .amax(2)
            )
            rest = torch.cat([even.gather(1, top_k(repeated, even.shape[1])[:, drop:]), odd], 1)
        return rest
