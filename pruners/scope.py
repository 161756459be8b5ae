from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, facility_location, top_k
from secateur.pruners.registry import register


@register("scope")
@dataclass(frozen=True)
class Scope(Pruner):
    """Greedy facility location on encoder features, each gain scaled by CLS attention.

    Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
    NeurIPS 2025, arXiv 2510.24214, Algorithm 1.

    Args:
        alpha: exponent of the saliency (paper: 1, best of App. C.5).
        combine: `multiply` gain and saliency (paper), or `add` them (released code only).
        saliency: `cls` attention, summed over heads, scales the gains; `none`: coverage alone;
            `only`: the tokens of largest attention, without coverage (both Table 4).
        order: `spatial` as the released code, or `picked` for the greedy order.

    Deviations: scores in float32 (released: float16, where ties are common); the budget is per
    image (released: divided by the number of images in a call); a token of length zero has cosine
    0 (released: NaN).
    """

    alpha: Annotated[float, Field(ge=0)] = 1.0
    combine: Literal["multiply", "add"] = "multiply"
    saliency: Literal["cls", "none", "only"] = "cls"
    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2510.24214"
    status = "official"
    needs = frozenset({"features", "encoder_features", "saliency"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency != "cls" and (self.combine != "multiply" or self.alpha != 1):
            self.fail(
                f"saliency={self.saliency} combines no gain with attention: "
                "leave out alpha, combine"
            )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.encoder_features is not None
        assert tokens.saliency is not None
        weights = tokens.saliency.sum(1) ** self.alpha
        if self.saliency == "only":
            return Selection.ordered(top_k(weights, keep), self.order == "picked")
        if self.saliency == "none":
            weights = torch.ones_like(weights)
        picks = facility_location(
            cosine_gram(tokens.encoder_features), weights, keep, additive=self.combine == "add"
        )
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix and the CLS attention; the coverage consists of additions."""
        gram = 0 if self.saliency == "only" else shape.encoder_gram
        return gram + shape.cls_attention
