from dataclasses import dataclass
from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import concatenate_rows, cosine_gram, greedy_map, normalize, top_k
from secateur.pruners.registry import register


@register("promprune")
@dataclass(frozen=True)
class PromPrune(Pruner):
    """Spectral entropy splits the budget between salient tokens and a diverse set of the rest.

    Lee et al., "Balancing Saliency and Coverage: Semantic Prominence-Aware Budgeting for Visual
    Token Compression in VLMs", arXiv 2603.14892. Content concentrated in few directions (low
    entropy) goes to saliency, spread content to coverage.

    Args:
        mu: entropy at which the budget is halved. 0.42 for CLIP encoders, 0.5744 for Qwen2.5-VL-7B
            (paper, App. C.1).
        tau: width of the transition (paper and code: 0.02).
        kr_min: smallest share for saliency (script of the released code: 0; the wrapper's own
            default of 0.1 is another method).
        kr_max: largest share for saliency (script: 1; wrapper: 0.7).
        order: `spatial`, or `official`: salient tokens by descending saliency, then the others as
            picked.

    Deviations: the entropy is the code's, of normalised and centred tokens (paper: raw singular
    values), and stage 2 starts at the token farthest from the salient set (paper: plain greedy). A
    token cannot be picked twice (released: it can once the kernel's rank is exhausted); the rest
    then follows by index, as does the first pick without any salient token. There the released
    code lets rounding decide, and its whole set follows from that pick: such images cannot be
    reproduced token by token. One Gram matrix serves entropy and kernel, with the entropy's
    epsilon.
    """

    mu: float = 0.42
    tau: Annotated[float, Field(ge=0)] = 0.02
    kr_min: Annotated[float, Field(ge=0, le=1)] = 0.0
    kr_max: Annotated[float, Field(ge=0, le=1)] = 1.0
    order: Literal["spatial", "official"] = "spatial"

    paper = "arXiv 2603.14892"
    status = "official"
    needs = frozenset({"features", "saliency"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.saliency is not None
        similarity = cosine_gram(tokens.features, eps=1e-8)
        entropy = spectral_entropy(tokens.features, similarity)
        ratio = self.saliency_ratio(entropy)
        count = (ratio * keep).round().long()

        salient = top_k(tokens.saliency.mean(1), keep)
        place = torch.arange(keep, device=count.device)
        in_salient = torch.zeros_like(similarity[:, 0], dtype=torch.bool).scatter_(
            1, salient, place < count[:, None]
        )
        nearest = (
            similarity.masked_fill(~in_salient[:, :, None], -torch.inf)
            .amax(1)
            .masked_fill(in_salient, torch.inf)
        )
        diverse = greedy_map(similarity, keep, free=~in_salient, first=nearest.argmin(1))

        picks = concatenate_rows(salient, count, diverse)
        diagnostics = {"entropy": entropy, "saliency_ratio": ratio, "T_sal": count}
        return Selection.ordered(picks, self.order == "official", diagnostics=diagnostics)

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix and the CLS attention; the eigenvalues, O(N^3), are left out."""
        return shape.gram + shape.cls_attention

    def saliency_ratio(self, entropy: Tensor) -> Tensor:
        """Share of the budget for salient tokens, per image."""
        q = ((entropy - self.mu) / (self.tau + 1e-12)).clamp(-20, 20)
        return self.kr_min + (1 - q.sigmoid()) * (max(self.kr_min, self.kr_max) - self.kr_min)


def spectral_entropy(features: Tensor, similarity: Tensor) -> Tensor:
    """Spectral entropy of the normalised, centred tokens, as a share of its maximum.

    0: all variance in one direction; 1: equal variance in all directions.

    Args:
        features: [B, N, D].
        similarity: [B, N, N] cosines of the features.
    """
    count, width = features.shape[1:]
    if count <= width:
        gram = (similarity - similarity.mean(1, keepdim=True)).sub_(
            similarity.mean(2, keepdim=True)
        )
        gram.add_(similarity.mean((1, 2), keepdim=True))
    else:
        unit = normalize(features, eps=1e-8)
        centred = unit - unit.mean(1, keepdim=True)
        gram = centred.transpose(1, 2) @ centred
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(1e-12)
    p = spectrum / spectrum.sum(1, keepdim=True).clamp_min(1e-12)
    size = min(count, width)
    return -(p * p.log()).sum(1) / (log(size) + 1e-12 if size > 1 else 1.0)
