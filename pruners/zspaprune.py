from collections.abc import Callable
from dataclasses import dataclass
from math import floor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, farthest_point, most_isolated, normalize, top_k
from secateur.pruners.registry import register
from secateur.pruners.relevance import embedding_relevance, text_mask

RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maxmin": torch.minimum,
    "mean": torch.add,
    "minmin": torch.maximum,
}


@register("zspaprune")
@dataclass(frozen=True)
class ZSPAPrune(Pruner):
    """The tokens most relevant to the prompt, then those least similar to all chosen.

    Zhang et al., "ZSPAPrune: Zero-Shot Prompt-Aware Token Pruning for Vision-Language Models",
    arXiv 2510.17197. Relevance is the cosine with the mean prompt embedding (Eq. 4 and stage 2, as
    reviews of the paper quote them). There is no public code; the formula of the diversity stage,
    the rounding and the core ratio are our reconstruction.

    Args:
        core_ratio: share of the budget for the core. The paper tunes it per dataset and the values
            are not public; 0.6 is a third party's. Never tune it on a test split.
        diversity_rule: `maxmin` takes the token whose largest cosine to the chosen is smallest
            (reconstruction), `mean` the smallest average cosine, `minmin` the smallest smallest one
            (a third party's code, probably by mistake).
        pool: `mean` of the prompt embeddings (paper), or the `max` of the cosines with each of them
            (third party).
        order: `spatial` (common practice), or `picked`: core by descending relevance, then the
            picks.

    Deviations: the core has at least one token, to start from; without prompt tokens the core is
    DivPrune's first pick, so that `maxmin` becomes DivPrune.
    """

    core_ratio: Annotated[float, Field(ge=0, le=1)] = 0.6
    diversity_rule: Literal["maxmin", "mean", "minmin"] = "maxmin"
    pool: Literal["mean", "max"] = "mean"
    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2510.17197"
    status = "reconstruction"
    needs = frozenset({"features", "text_embeddings"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        distance = cosine_gram(tokens.features).neg_()
        core = min(max(floor(self.core_ratio * keep + 0.5), 1), keep)
        asked = text_mask(tokens).any(1)
        seeds = top_k(self.relevance(tokens), core)
        seeds = torch.where(asked[:, None], seeds, most_isolated(distance)[:, None])
        count = torch.where(asked, core, 1)
        picks = farthest_point(distance, seeds, keep, count, update=RULES[self.diversity_rule])
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix; the relevance, N times smaller, is left out."""
        return shape.gram

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """[B, N] cosine of token and prompt; meaningless without prompt tokens."""
        if self.pool == "mean":
            return embedding_relevance(tokens)
        assert tokens.text_embeddings is not None
        cosine = normalize(tokens.features) @ normalize(tokens.text_embeddings).transpose(1, 2)
        return pad(cosine.masked_fill(~text_mask(tokens)[:, None], -2.0), (0, 1), value=-2.0).amax(
            2
        )
