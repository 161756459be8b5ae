from dataclasses import dataclass
from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import (
    concatenate_rows,
    cosine_gram,
    facility_location,
    farthest_point,
    greedy_map,
    normalize,
    top_k,
)
from secateur.pruners.registry import register

_LIMITS = {"script": (0.0, 1.0), "wrapper": (0.1, 0.7)}  # smallest and largest share for saliency


@register("promprune")
@dataclass(frozen=True)
class PromPrune(Pruner):
    """Spectral entropy splits the budget between salient tokens and a diverse set of the rest.

    Lee et al., "Balancing Saliency and Coverage: Semantic Prominence-Aware Budgeting for Visual
    Token Compression in VLMs", arXiv 2603.14892. Content concentrated in few directions (low
    entropy) goes to saliency, spread content to coverage.

    Args:
        mu: entropy at which the budget is halved. 0.42 for CLIP encoders, 0.5744 for Qwen2.5-VL-7B
            (paper, App. C.1). For the other entropies the paper states none.
        tau: width of the transition (paper and code: 0.02).
        settings: limits of the share for saliency. `script`: 0 and 1, as the released run script
            and README; `wrapper`: 0.1 and 0.7, as the released lmms-eval wrapper and YAML.
        kr_min: smallest share for saliency, in place of the script's.
        kr_max: largest share for saliency, in place of the script's.
        entropy: `spectral`; `attention`, of the saliency over the tokens; `feature_norm`, of the
            norms of the tokens (Figure 4, formulas in App. B.2).
        salient: tokens for saliency, the same number for every image (Table 4, "fixed
            allocation"); None: the entropy decides.
        stage2: `dpp`; `farthest_point`, which maximises the smallest cosine distance to its own
            picks; `facility_location`, which maximises the sum over all tokens that are not salient
            of their largest (cosine + 1) / 2 to a pick (Table 5, formulas in App. D.2).
        start: with which token stage 2 starts if no token is salient: the `first` by index, or the
            `farthest` from the mean of the normalised tokens (ours).
        order: `spatial`, or `official`: salient tokens by descending saliency, then the others as
            picked.

    Deviations: the entropy is the code's, of normalised and centred tokens (paper: raw singular
    values), and stage 2 starts at the token farthest from the salient set (paper: plain greedy). A
    token cannot be picked twice (released: it can once the kernel's rank is exhausted); the rest
    then follows by index. Without any salient token stage 2 starts at index 0, which is padding if
    a wide or high image is padded to a square. There the released code takes the largest of values
    that are all 1 but for rounding, and its whole set follows from that pick: of ten such cases
    none gave the same set, with 38 % of the tokens in common on average, so these images cannot be
    reproduced token by token. One Gram matrix serves entropy and kernel, with the entropy's
    epsilon. No code of the ablations is public: the paper names neither where farthest point starts
    (ours: as dpp) nor the weights of facility location (ours: 1).
    """

    mu: float = 0.42
    tau: Annotated[float, Field(ge=0)] = 0.02
    settings: Literal["script", "wrapper"] = "script"
    kr_min: Annotated[float, Field(ge=0, le=1)] = 0.0
    kr_max: Annotated[float, Field(ge=0, le=1)] = 1.0
    entropy: Literal["spectral", "attention", "feature_norm"] = "spectral"
    salient: Annotated[int, Field(ge=0)] | None = None
    stage2: Literal["dpp", "farthest_point", "facility_location"] = "dpp"
    start: Literal["first", "farthest"] = "first"
    order: Literal["spatial", "official"] = "spatial"

    paper = "arXiv 2603.14892"
    status = "official"
    needs = frozenset({"features", "saliency"})

    def __post_init__(self) -> None:
        super().__post_init__()
        own_limits = (self.kr_min, self.kr_max) != _LIMITS["script"]
        if self.settings == "wrapper" and own_limits:
            self.fail("settings=wrapper has limits of its own: leave out kr_min, kr_max")
        if self.salient is not None and (
            own_limits or self.settings != "script" or self.entropy != "spectral"
        ):
            self.fail(
                f"salient={self.salient} fixes the split, which no entropy then decides: "
                "leave out settings, kr_min, kr_max, entropy"
            )
        if self.stage2 == "facility_location" and self.start != "first":
            self.fail(
                f"stage2=facility_location starts where it covers most: leave out "
                f"start={self.start}"
            )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.saliency is not None
        if self.salient is not None and self.salient > keep:
            self.fail(f"salient={self.salient} is more than the budget of {keep} tokens")
        similarity = cosine_gram(tokens.features, eps=1e-8)
        saliency = tokens.saliency.mean(1)
        if self.entropy == "spectral":
            entropy = spectral_entropy(tokens.features, similarity)
        else:
            norms = tokens.features.norm(dim=-1)
            entropy = relative_entropy(saliency if self.entropy == "attention" else norms)
        ratio = (
            self.saliency_ratio(entropy)
            if self.salient is None
            else torch.full_like(entropy, self.salient / keep)
        )
        count = (ratio * keep).round().long()

        salient = top_k(saliency, keep)
        place = torch.arange(keep, device=count.device)
        in_salient = torch.zeros_like(similarity[:, 0], dtype=torch.bool).scatter_(
            1, salient, place < count[:, None]
        )
        picks = concatenate_rows(salient, count, self.coverage(similarity, in_salient, keep))
        diagnostics = {"entropy": entropy, "saliency_ratio": ratio, "T_sal": count}
        return Selection.ordered(picks, self.order == "official", diagnostics=diagnostics)

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix and the CLS attention; the eigenvalues, O(N^3), are left out."""
        return shape.gram + shape.cls_attention

    def saliency_ratio(self, entropy: Tensor) -> Tensor:
        """Share of the budget for salient tokens, per image."""
        low, high = _LIMITS["wrapper"] if self.settings == "wrapper" else (self.kr_min, self.kr_max)
        q = ((entropy - self.mu) / (self.tau + 1e-12)).clamp(-20, 20)
        return low + (1 - q.sigmoid()) * (max(low, high) - low)

    def coverage(self, similarity: Tensor, in_salient: Tensor, keep: int) -> Tensor:
        """Stage 2: picks [B, keep] as taken.

        A row's first picks are not salient; after N - T_sal picks there are no such tokens left.

        Args:
            similarity: [B, N, N] cosines.
            in_salient: [B, N].
        """
        if self.stage2 == "facility_location":
            covered = similarity.add(1).div_(2).clamp_(0, 1)
            covered.masked_fill_(in_salient[:, :, None] | in_salient[:, None], 0)
            weights = similarity.new_zeros(in_salient.shape).masked_fill_(in_salient, -torch.inf)
            return facility_location(covered, weights, keep, additive=True)
        nearest = similarity.masked_fill(~in_salient[:, :, None], -torch.inf).amax(1)
        if self.start == "farthest":  # the cosines to all tokens order them as their mean does
            none = ~in_salient.any(1, keepdim=True)
            nearest = torch.where(none, similarity.mean(1), nearest)
        first = nearest.masked_fill(in_salient, torch.inf).argmin(1)
        if self.stage2 == "dpp":
            return greedy_map(similarity, keep, free=~in_salient, first=first)
        distance = (1 - similarity).masked_fill_(in_salient[:, None], -torch.inf)
        return farthest_point(distance, first[:, None], keep)


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
    return relative_entropy(torch.linalg.eigvalsh(gram))


def relative_entropy(weights: Tensor) -> Tensor:
    """Entropy of weights [B, M] in proportion to their sum, as a share of its maximum, log M.

    Weights below 1e-12 count as 1e-12.
    """
    weights = weights.clamp_min(1e-12)
    p = weights / weights.sum(1, keepdim=True)
    size = weights.shape[1]
    return -(p * p.log()).sum(1) / (log(size) + 1e-12 if size > 1 else 1.0)
