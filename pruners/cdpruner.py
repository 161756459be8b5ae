from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, greedy_map
from secateur.pruners.registry import register
from secateur.pruners.relevance import clip_relevance, embedding_relevance, range_over_image


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Pruner):
    """Greedy MAP of a determinantal point process conditioned on relevance to the question.

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token
    Pruning in MLLMs", NeurIPS 2025, arXiv 2506.10967.

    Args:
        relevance_space: `clip`, minus the cosine of patch and question in CLIP's joint space
            (released code; the sign is intended), or `llm_embed`, the cosine of projected token and
            mean question embedding (our extension for models without a CLIP encoder).
        theta: None takes the relevance as it is (released code); a number in [0, 1) takes exp(theta
            / (2 (1 - theta)) * relevance) instead (present in the released code, switched off; 0.5
            there).
        order: `spatial` as the released code, or `picked` for the greedy order.

    Deviations: features are normalised in float32 (released: the model's dtype); constant
    relevance, also that of an empty question, counts as 1 (released: division by zero); once the
    kernel's rank is exhausted the most relevant of the remaining tokens follow (released: NaN); a
    token of length zero has cosine 0 (released: NaN).
    """

    relevance_space: Literal["clip", "llm_embed"] = "clip"
    theta: Annotated[float, Field(ge=0, lt=1)] | None = None
    order: Literal["spatial", "picked"] = "spatial"

    paper = "arXiv 2506.10967"
    status = "official"

    @property
    def needs(self) -> frozenset[str]:
        question = (
            {"clip_patches", "clip_text"} if self.relevance_space == "clip" else {"text_embeddings"}
        )
        return frozenset({"features", *question})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        relevance = self.relevance(tokens)
        weights = (
            relevance
            if self.theta is None
            else (self.theta / (2 * (1 - self.theta)) * relevance).exp()
        )
        kernel = cosine_gram(tokens.features).mul_(weights[:, :, None]).mul_(weights[:, None])
        picks = greedy_map(kernel, keep, fallback=relevance)
        return Selection.ordered(picks, self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix and the Cholesky updates; CLIP is left out."""
        return shape.gram + 2 * shape.kept**2 * shape.tokens

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """[B, N] relevance, min-max scaled over all crops of an image, plus 1e-6 / range."""
        raw = (
            -clip_relevance(tokens)
            if self.relevance_space == "clip"
            else embedding_relevance(tokens)
        )
        low, high = range_over_image(raw, tokens.image_of_row)
        return torch.where(high > low, (raw - low + 1e-6) / (high - low), 1.0)
