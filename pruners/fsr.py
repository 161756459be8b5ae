from dataclasses import dataclass
from math import floor
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import (
    cosine_gram,
    farthest_point,
    gather_rows,
    merge_into_anchors,
    min_max,
    top_k,
)
from secateur.pruners.registry import register
from secateur.pruners.relevance import clip_relevance


class Stages(NamedTuple):
    """The intermediate results of FSR."""

    phi: Tensor  # [B, N] focus scores
    picks: Tensor  # [B, K] focus tokens by descending score, then scan tokens as picked
    focus_count: Tensor  # [B]
    indices: Tensor  # [B, K] ascending
    features: Tensor  # [B, K, D] with the merged tokens
    merged: Tensor  # [B, M] merged tokens by descending similarity, -1 after the last
    anchors: Tensor  # [B, M] the tokens they went into


@register("fsr")
@dataclass(frozen=True)
class FSR(Pruner):
    """Keeps a focus set and the tokens farthest from it, and merges dropped tokens into the latter.

    Tong et al., "Focus-Scan-Refine", arXiv 2602.05809, Eq. 1-9. Only formulas are public, no code.

    Args:
        alpha: exponent of the relevance (paper: 3).
        beta: exponent of the saliency (paper: 1).
        rho: share of the focus scores' sum that the focus set has to reach (paper: 0.9).
        kappa: how many dropped tokens to merge, as a multiple of the scan set (paper: 1).
        relevance_space: `clip`, cosine of patch and question in CLIP's joint space (paper), `none`
            for saliency alone (paper, on Qwen2.5-VL), or `given` by the caller as `relevance`.
        relevance_sign: `+` (paper, by its formula), or `-`, CDPruner's choice because CLIP's
            patches anti-correlate with the text.
        space: which tokens are compared and merged: `encoder` (paper: tokens of the encoder), or
            `projected`.

    Deviations: the focus set is cut to the budget; every merging weight gets 1e-12, because scores
    can be 0; a question without segments leaves saliency alone.
    """

    alpha: Annotated[float, Field(ge=0)] = 3.0
    beta: Annotated[float, Field(ge=0)] = 1.0
    rho: Annotated[float, Field(ge=0, le=1)] = 0.9
    kappa: Annotated[float, Field(ge=0)] = 1.0
    relevance_space: Literal["clip", "none", "given"] = "clip"
    relevance_sign: Literal["+", "-"] = "+"
    space: Literal["encoder", "projected"] = "encoder"

    paper = "arXiv 2602.05809"
    status = "paper"
    merges = True

    @property
    def needs(self) -> frozenset[str]:
        question = {"clip": {"clip_patches", "clip_text"}, "none": set(), "given": {"relevance"}}[
            self.relevance_space
        ]
        own = {"encoder_features"} if self.space == "encoder" else set()
        return frozenset({"features", "saliency", *own, *question})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        stages = self.stages(tokens, keep)
        return Selection(
            stages.indices, stages.features, self.space, diagnostics={"focus": stages.focus_count}
        )

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix, the CLS attention and the merging; CLIP is left out."""
        encoder = self.space == "encoder"
        width = shape.encoder_width if encoder else shape.width
        gram = shape.encoder_gram if encoder else shape.gram
        most = min(self.kappa * (shape.kept - 1), shape.tokens)
        return gram + shape.cls_attention + 2 * shape.kept * most * width

    def stages(self, tokens: VisualTokens, keep: int) -> Stages:
        """The selection with its intermediate results."""
        x = tokens.encoder_features if self.space == "encoder" else tokens.features
        assert x is not None
        phi = self.focus_score(tokens)
        focus = top_k(phi, keep)
        mass = phi.sort(1, descending=True).values.double().cumsum(1)
        focus_count = ((mass < self.rho * mass[:, -1:]).sum(1) + 1).clamp_max(keep)
        similarity = cosine_gram(x)
        picks = farthest_point(1 - similarity, focus, keep, focus_count)

        indices, place = picks.sort(1)
        scanned = place >= focus_count[:, None]
        dropped = torch.ones_like(phi, dtype=torch.bool).scatter_(1, indices, False)
        affinity = gather_rows(similarity, indices).masked_fill_(
            ~(scanned[:, :, None] & dropped[:, None]), -torch.inf
        )
        limit = (self.kappa * (keep - focus_count)).floor().long()
        most = min(floor(self.kappa * (keep - 1)), phi.shape[1])
        features, merged, slot = merge_into_anchors(x, indices, affinity, phi + 1e-12, limit, most)
        return Stages(phi, picks, focus_count, indices, features, merged, indices.gather(1, slot))

    def focus_score(self, tokens: VisualTokens) -> Tensor:
        """[B, N] min-max scaled relevance ** alpha * saliency ** beta."""
        assert tokens.saliency is not None
        score = min_max(tokens.saliency.mean(1)) ** self.beta
        relevance = tokens.relevance if self.relevance_space == "given" else None
        if (
            self.relevance_space == "clip"
            and tokens.clip_text is not None
            and tokens.clip_text.shape[1] > 0
        ):
            relevance = clip_relevance(tokens)
        if relevance is None:
            return score
        return (
            min_max(relevance if self.relevance_sign == "+" else -relevance) ** self.alpha * score
        )
