from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import gather_rows, top_k
from secateur.pruners.registry import register

EPSILON = 1e-6  # of the released code's norms and ratios


@register("holov")
@dataclass(frozen=True)
class HoloV(Pruner):
    """Bands of an image share its budget by attention and diversity; each keeps its most attended.

    Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
    Retention", NeurIPS 2025, arXiv 2510.02912, Eq. 1-5; obananas/HoloV@07c159b,
    `llava/model/utils.py`, and @ddcc937, `utils.py` (Qwen). A band is a run of the raster. Its
    share follows the mean over its tokens of CLS attention plus the variance of a token's cosines
    within the band, scaled to the band's mean attention. By this scaling the variance adds the
    same factor to every band, except where the tokens of a band are nearly equal.

    Args:
        bands: how many; None takes int(16 / 9 * N / keep), at least 1 (released code for Qwen; the
            16 of the released code for LLaVA at 64 of 576; the paper compares 4 to 16).
        variance_weight: factor of the scaled variance (released code; paper: 1).
        sharpness: exponent tau of the bands' scores (released code; the paper does not state it).
        rank: within a band by `attention` (released code), or by the `score` (paper, Eq. 5).
        order: `picked`, band by band, each by descending rank, whole bands in raster order
            (released code), or `spatial`.

    Deviations: float32 throughout, as released for the attention alone; what exceeds a band's size
    goes to the bands of largest score that have room (paper: in proportion to score and room;
    released: lost, vectors of zeros fill the budget). LLaVA-NeXT: each crop by itself (released:
    once over the sequence of all crops without padding). Qwen2.5-VL: attention belongs to its own
    token (released: it stays in the encoder's order of windows, and the eager kernel gives ones).
    The paper's refetching of pruned tokens inside the LLM is not in the released code, and not
    here. No official outputs are recorded.
    """

    bands: Annotated[int, Field(ge=1)] | None = None
    variance_weight: Annotated[float, Field(ge=0)] = 0.09
    sharpness: Annotated[float, Field(ge=0)] = 1.0
    rank: Literal["attention", "score"] = "attention"
    order: Literal["spatial", "picked"] = "picked"

    paper = "arXiv 2510.02912"
    status = "secondary"
    needs = frozenset({"features", "saliency"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.saliency is not None
        count = tokens.shape[1]
        bands = self.number(count, keep)
        band = torch.arange(bands, device=tokens.features.device)
        size = count // bands + (band < count % bands).long()  # [P]
        place = torch.arange(-(-count // bands), device=size.device)
        inside = place < size[:, None]  # [P, M]
        token = (size.cumsum(0) - size)[:, None] + place * inside
        # the released factor of 1000 is left out for bands of one token, as there
        factor = torch.where(size > 1, 1e3, 1.0)[:, None]
        attention = tokens.saliency.mean(1)[:, token] * inside * factor  # [B, P, M]
        score = self.scores(tokens.features, attention, token, inside)
        quota = self.quotas((score.sum(2) / size) ** self.sharpness, size, keep)
        ranked = attention if self.rank == "attention" else score
        by = top_k(ranked.masked_fill(~inside, -torch.inf), len(place)).argsort(2)
        kept = inside & (by < quota[..., None])
        # whole bands stay in raster order
        within = torch.where((quota == size)[..., None], place, by)
        key = (band[:, None] * len(place) + within).masked_fill(~kept, token.numel())
        chosen = key.flatten(1).argsort(1)[:, :keep]  # the keys of kept tokens are distinct
        return Selection.ordered(token.flatten()[chosen], self.order == "picked")

    def flops(self, shape: ImageShape) -> float:
        """The CLS attention and the Gram matrix of every band."""
        bands = self.number(shape.tokens, shape.kept)
        return shape.cls_attention + 2 * bands * (-(-shape.tokens // bands)) ** 2 * shape.width

    def number(self, count: int, keep: float) -> int:
        """How many bands `count` tokens have; sizes differ by at most 1, larger ones come first."""
        bands = int(16 / 9 * count / keep) if self.bands is None else self.bands
        return min(max(bands, 1), count)

    def scores(self, features: Tensor, attention: Tensor, token: Tensor, inside: Tensor) -> Tensor:
        """Eq. 1-3: [B, P, M] attention plus scaled variance of every token, 0 outside the band.

        Args:
            attention: [B, P, M] of every token, 0 outside the band.
            token: [P, M] the tokens of each band.
            inside: [P, M] which of these belong to it.
        """
        x = features / (features.norm(dim=2, keepdim=True) + EPSILON)
        x = gather_rows(x, token.flatten().expand(len(x), -1)).unflatten(1, token.shape)
        x = x * inside[..., None]
        cosine = x @ x.transpose(2, 3)
        cosine.diagonal(dim1=2, dim2=3).zero_()
        size = inside.sum(1)[:, None]
        others = (size - 1).clamp_min(1)
        mean = cosine.sum(3) / others
        # a token's own entry is 0, and counts, as released
        apart = (cosine - mean[..., None]).square() * inside[:, None]
        variance = apart.sum(3) / others * inside
        scale = (attention.sum(2, True) / size) / (variance.sum(2, True) / size + EPSILON)
        return attention + self.variance_weight * scale * variance

    def quotas(self, worth: Tensor, size: Tensor, keep: int) -> Tensor:
        """Eq. 4: [B, P] how many tokens each band keeps, `keep` in all."""
        share = worth / (worth.sum(1, keepdim=True) + EPSILON)
        quota = (share * keep).floor().long()
        order = top_k(share, len(size))
        # one more each for the bands of largest share
        quota += (order.argsort(1) < keep - quota.sum(1, keepdim=True)).long()
        quota = torch.minimum(quota, size)
        room = (size - quota).gather(1, order)
        before = room.cumsum(1) - room
        more = torch.minimum((keep - quota.sum(1, keepdim=True) - before).clamp_min(0), room)
        return quota.scatter_add_(1, order, more)
