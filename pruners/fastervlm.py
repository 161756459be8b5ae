from dataclasses import dataclass

from secateur.pruners.base import Pruner, Selection, VisualTokens, register
from secateur.pruners.linalg import top_k


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Pruner):
    """The tokens that CLS attends to most (mean over heads), in raster order.

    Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818v1.
    Without a CLS token (Qwen) the attention a token receives takes its place; that is the harness's reading.
    """

    paper = "arXiv 2412.01818v1"
    status = "official"
    needs = frozenset({"features", "saliency"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.saliency is not None
        return Selection(top_k(tokens.saliency.mean(1), keep).sort(1).values)
