from dataclasses import dataclass
from math import floor
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool2d

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import (
    complement,
    cosine_gram,
    evenly_spaced,
    farthest_point,
    gather_rows,
    merge_into_anchors,
    min_max,
    top_k,
)
from secateur.pruners.registry import register
from secateur.pruners.relevance import clip_relevance, embedding_relevance, range_over_image

PRODUCT_EXPONENTS = 3, 1  # of relevance and saliency, as in FSR (arXiv 2602.05809)


class Stages(NamedTuple):
    """The intermediate results of SPpruner."""

    phi: Tensor  # [B, N] focus scores
    focus: Tensor  # [B, K_F] by descending score
    context: Tensor  # [B, K_C] as scanned
    indices: Tensor  # [B, K] ascending
    features: Tensor  # [B, K, D] with the merged tokens
    merged: Tensor  # [B, M] merged tokens by descending similarity, -1 after the last
    anchors: Tensor  # [B, M] the tokens they went into


@register("sppruner")
@dataclass(frozen=True)
class SPpruner(Pruner):
    """RECONSTRUCTION. Keeps a focus set, then context tokens, and merges neighbours into these.

    Zhao et al., "Focus-then-Context: Subject-Centric Progressive Visual Token Reduction for
    Vision-Language Models", arXiv 2605.20950. Only the abstract is public: two modules, focus
    identification and context-aware structural scanning. Every formula and default below is our
    design, never a reproduction.

    Args:
        focus_score: `additive`, saliency_weight * a + (1 - saliency_weight) * r + interplay * a * r
            for scaled saliency a and relevance r (R1), or `product`, r^3 * a as in FSR.
        saliency_weight: weight of saliency against relevance, 0..1 (R1).
        interplay: weight of their product; 0 switches it off (R1).
        focus_share: share of the budget for the focus set (R2).
        window: radius of the neighbourhood whose mean score raises a place's context value (R3).
        scan_weight: how much; 0 leaves farthest-point sampling (R4).
        anchors: `scan`, or `grid`, context evenly spaced along the raster of what the focus left
            (R4).
        merge: whether dropped tokens are merged into context anchors (R5).
        merge_radius: largest Chebyshev grid distance to the anchor (R5).
        merge_factor: how many tokens to merge, as a multiple of the context set (R5).
        relevance_space: `clip`, minus the cosine of patch and question in CLIP's joint space,
            scaled over all crops of an image together (as CDPruner); `llm_embed`, cosine of
            projected token and mean question embedding, for models without a CLIP encoder; `given`
            by the caller as `relevance`.
        saliency_norm: `minmax`, or `rank`, which few extreme tokens cannot dominate.

    Deviations: there is nothing official to deviate from.
    """

    focus_score: Literal["additive", "product"] = "additive"
    saliency_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    interplay: Annotated[float, Field(ge=0)] = 1.0
    focus_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    window: Annotated[int, Field(ge=0)] = 1
    scan_weight: Annotated[float, Field(ge=0)] = 1.0
    anchors: Literal["scan", "grid"] = "scan"
    merge: bool = True
    merge_radius: Annotated[int, Field(ge=0)] = 3
    merge_factor: Annotated[float, Field(ge=0)] = 1.0
    relevance_space: Literal["clip", "llm_embed", "given"] = "clip"
    saliency_norm: Literal["minmax", "rank"] = "minmax"

    paper = "arXiv 2605.20950"
    status = "reconstruction"
    merges = True

    @property
    def needs(self) -> frozenset[str]:
        question = {
            "clip": {"clip_patches", "clip_text"},
            "llm_embed": {"text_embeddings"},
            "given": {"relevance"},
        }
        return frozenset({"features", "saliency", "grid", *question[self.relevance_space]})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        stages = self.stages(tokens, keep)
        return Selection(stages.indices, stages.features if self.merge else None)

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix and the CLS attention; CLIP and the merging are left out."""
        return shape.gram + shape.cls_attention

    def stages(self, tokens: VisualTokens, keep: int) -> Stages:
        """The selection with its intermediate results."""
        assert tokens.grid is not None
        phi = self.phi(tokens)
        focus = top_k(phi, min(keep, max(1, floor(self.focus_share * keep + 0.5))))
        similarity = cosine_gram(tokens.features)
        if self.anchors == "scan":
            worth = 1 + self.scan_weight * min_max(
                neighbourhood_mean(phi, tokens.grid, self.window)
            )
            picks = farthest_point((1 - similarity).clamp_min_(0).mul_(worth[:, None]), focus, keep)
            context = picks[:, focus.shape[1] :]
        else:
            rest = complement(focus, phi.shape[1])
            context = rest[:, evenly_spaced(rest.shape[1], keep - focus.shape[1]).to(rest.device)]

        indices = torch.cat([focus, context], 1).sort(1).values
        none = torch.zeros_like(phi, dtype=torch.bool)
        receives = none.scatter(1, context, True).gather(1, indices)
        dropped = ~none.scatter(1, indices, True)
        near = within_radius(indices, tokens.grid, self.merge_radius)
        affinity = gather_rows(similarity, indices).masked_fill_(
            ~(receives[..., None] & dropped[:, None] & near), -torch.inf
        )
        limit = min(floor(self.merge_factor * context.shape[1]), phi.shape[1])
        features, merged, slot = merge_into_anchors(
            tokens.features, indices, affinity, phi + 1e-6, limit, limit
        )
        return Stages(phi, focus, context, indices, features, merged, indices.gather(1, slot))

    def phi(self, tokens: VisualTokens) -> Tensor:
        """[B, N] focus scores."""
        assert tokens.saliency is not None
        a = tokens.saliency.mean(1)
        ranks = torch.searchsorted(a.sort(1).values, a)
        a = min_max(a) if self.saliency_norm == "minmax" else ranks / (a.shape[1] - 1)
        r = self.relevance(tokens)
        if self.focus_score == "product":
            return r ** PRODUCT_EXPONENTS[0] * a ** PRODUCT_EXPONENTS[1]
        return self.saliency_weight * a + (1 - self.saliency_weight) * r + self.interplay * a * r

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """[B, N] min-max scaled relevance to the question."""
        if self.relevance_space == "llm_embed":
            return min_max(embedding_relevance(tokens))
        raw = tokens.relevance if self.relevance_space == "given" else -clip_relevance(tokens)
        assert raw is not None
        low, high = range_over_image(raw, tokens.image_of_row)
        return (raw - low) / (high - low + 1e-6)


def neighbourhood_mean(scores: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Mean of scores [B, N] over other cells within Chebyshev distance `radius`; 0 without any."""
    image = scores.view(-1, 1, *grid)
    total, cells = (
        avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius, divisor_override=1)
        for x in (image, torch.ones_like(image))
    )
    return ((total - image) / (cells - 1).clamp_min(1)).flatten(1)


def within_radius(indices: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """[B, K, N] whether cell n is within Chebyshev distance `radius` of cell indices [B, K]."""
    cell = torch.arange(grid[0] * grid[1], device=indices.device)
    rows = (indices[..., None] // grid[1] - cell // grid[1]).abs()
    columns = (indices[..., None] % grid[1] - cell % grid[1]).abs()
    return torch.maximum(rows, columns) <= radius
