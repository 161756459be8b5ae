from dataclasses import dataclass

from torch import Tensor

from secateur.pruners.base import ImageShape, VisualTokens
from secateur.pruners.registry import register
from secateur.pruners.scoring import ScoreTopK


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(ScoreTopK):
    """The tokens that CLS attends to most (mean over heads), in raster order.

    Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv
    2412.01818v1. Without a CLS token (Qwen), the attention that a token receives replaces it (our
    extension).
    """

    paper = "arXiv 2412.01818v1"
    status = "official"
    needs = frozenset({"features", "saliency"})

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.saliency is not None
        return tokens.saliency.mean(1)

    def flops(self, shape: ImageShape) -> float:
        """The attention of CLS."""
        return shape.cls_attention
