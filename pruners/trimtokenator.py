from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, farthest_point, gather_rows, top_k
from secateur.pruners.registry import register
from secateur.pruners.relevance import mean_text, text_mask


@register("trimtokenator")
@dataclass(frozen=True)
class TrimTokenator(Pruner):
    """The tokens nearest to the question in LLM space, thinned to those least similar on average.

    Zhang et al., "TrimTokenator: Towards Adaptive Visual Token Pruning for Large Multimodal
    Models", arXiv 2509.00320. No official code; formulas from a third party's implementation.

    Args:
        survivors: share of the tokens that stage 1 keeps (third party's code: 0.8; the official
            value is unknown).
        order: `spatial` as the third party, or `picked` for the greedy order.

    Deviations: float32 (third party: float16); stage 1 keeps at least the budget. Squared norms of
    visual tokens dominate stage 1, which therefore mostly drops tokens of large norm.
    """

    survivors: Annotated[float, Field(ge=0, le=1)] = 0.8
    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2509.00320"
    status = "secondary"
    needs = frozenset({"features", "text_embeddings"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        # minus the mean squared distance to the question's embeddings, up to a constant per row
        alignment = (
            2 * (tokens.features @ mean_text(tokens)[..., None])[..., 0]
            - tokens.features.norm(dim=2).square()
        )
        count = alignment.shape[1]
        raster = torch.arange(count, device=alignment.device)
        asked = text_mask(tokens).any(1, keepdim=True)
        order = torch.where(asked, top_k(alignment, count), raster)  # numbers the tokens of stage 2
        stays = (raster < max(int(self.survivors * count), keep)) | ~asked
        similarity = gather_rows(
            gather_rows(cosine_gram(tokens.features, eps=1e-8), order).transpose(1, 2), order
        )
        first = (
            (similarity @ stays[..., None].float())[..., 0].masked_fill(~stays, torch.inf).argmin(1)
        )
        distance = similarity.masked_fill_(~stays[:, None], torch.inf).neg_()
        picks = order.gather(1, farthest_point(distance, first[:, None], keep, update=torch.add))
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix, the products with the question and the sums of similarities."""
        return shape.gram + 2 * shape.tokens * (shape.width + shape.tokens)
