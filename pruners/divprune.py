from dataclasses import dataclass
from typing import Literal

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, farthest_point, most_isolated
from secateur.pruners.registry import register


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Pruner):
    """Max-min diversity of projected tokens, by cosine distance.

    The first pick is the most isolated token; each further pick is the one farthest from all picks.

    On LLaVA-NeXT it runs once over the packed sequence, with its newline tokens, as the released
    code.

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
    2025, arXiv 2503.02175.

    Args:
        order: `spatial` as the released code, or `picked` for the greedy order.

    Deviations: scores in float32 (released: the model's dtype); a chosen token cannot be chosen
    again (released: it can where nothing but duplicates is left); zero tokens have cosine 0
    (released: NaN).
    """

    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2503.02175"
    status = "official"
    packed = True

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        distance = cosine_gram(tokens.features).neg_().add_(1)
        picks = farthest_point(distance, most_isolated(distance)[:, None], keep)
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix."""
        return shape.gram
