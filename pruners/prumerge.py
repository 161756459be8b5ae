from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import EXTRA, ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import complement, gather_rows, normalize, outlier_share, top_k
from secateur.pruners.registry import register


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(Pruner):
    """Attention outliers, each with its nearest neighbours added, and one sum of all other tokens.

    Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    ICCV 2025, arXiv 2403.15388. Attention is taken over the full width of the last block's queries
    and keys, as one head. Centres come in descending attention, the sum last; it counts in the
    budget.

    Args:
        adaptive: the image decides on the count by the outliers of its attention (released code; a
            `keep` below N does not matter); False keeps the budget exactly: keep - 1 centres and
            the sum, an extension for tables at equal budgets.
        neighbours: how many nearest tokens, by cosine of the keys, are added to a centre (released
            code).

    Deviations: the fixed budget is an extension of ours; float32 (released: float16). Without
    outliers the ratio is 1/N, where the released code divides by zero. The fixed-ratio path used
    for training, which repeats tokens, is left out.
    """

    adaptive: bool = False  # type: ignore[misc]
    neighbours: Annotated[int, Field(ge=0)] = 32

    paper = "arXiv 2403.15388"
    status = "official"
    merges = True
    needs = frozenset({"features", "encoder_features", "last_queries", "last_keys"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.encoder_features is not None
        assert tokens.last_keys is not None
        attention = self.attention(tokens)
        if self.adaptive:
            order, counts = self.outliers(attention, tokens.image_of_row)
            width = int(counts.max())
        else:
            order, counts, width = self.fixed(attention, keep - 1), None, keep - 1
        features, centres = tokens.encoder_features, order[:, :width]
        inside = torch.arange(order.shape[1], device=order.device) < (
            width if counts is None else counts[:, None]
        )
        keys = normalize(tokens.last_keys[:, 1:])
        # columns in the order of the candidates: other centres first, then the rest ascending
        columns = order[:, None].expand(-1, width, -1)
        similarity = (gather_rows(keys, centres) @ keys.transpose(1, 2)).gather(2, columns)
        itself = torch.eye(order.shape[1], dtype=torch.bool, device=order.device)[:width]
        near = top_k(
            similarity.masked_fill_(itself, -torch.inf), min(self.neighbours, order.shape[1] - 1)
        )
        near = columns.gather(2, near)
        spread = torch.zeros_like(similarity).scatter_(
            2, near, attention[:, None].expand_as(similarity).gather(2, near)
        )
        merged = gather_rows(features, centres) + spread @ features
        loose = torch.zeros_like(attention).scatter_(1, order, attention.gather(1, order) * ~inside)
        extra = loose[:, None] @ features
        places = torch.cat([centres, torch.full_like(order[:, :1], EXTRA)], 1)
        merged = torch.cat([merged, extra], 1)
        if counts is None:
            return Selection(places, merged, "encoder", custom_order=True)
        # the sum follows the last centre of its row; padding comes after it
        last = torch.arange(width + 1, device=order.device)
        column = torch.where(last == counts[:, None], width, last)
        places = places.gather(1, column).masked_fill(last > counts[:, None], 0)
        return Selection(
            places, gather_rows(merged, column), "encoder", counts + 1, custom_order=True
        )

    def flops(self, shape: ImageShape) -> float:
        """The similarity of centres and tokens, and the CLS attention; merging is left out."""
        similarity = 2 * shape.kept * shape.tokens * shape.encoder_width
        return similarity + shape.cls_attention

    def attention(self, tokens: VisualTokens) -> Tensor:
        """Step 1: [B, N] softmax attention of CLS over all rows, patch columns."""
        assert tokens.last_queries is not None
        assert tokens.last_keys is not None
        queries, keys = tokens.last_queries[:, :1], tokens.last_keys
        return (queries @ keys.transpose(1, 2) * keys.shape[2] ** -0.5).softmax(2)[:, 0, 1:]

    def fixed(self, attention: Tensor, centres: int) -> Tensor:
        """[B, N] permutation: `centres` centres in output order, then the rest ascending."""
        picks = self.centres(attention, centres)
        return torch.cat([picks, complement(picks, attention.shape[1])], 1)

    def centres(self, attention: Tensor, count: int) -> Tensor:
        """The centres of a fixed budget, in output order."""
        return top_k(attention, count)

    def outliers(
        self, attention: Tensor, image_of_row: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """Step 2: permutation and number of centres per row, by the quartiles of the attention."""
        count = attention.shape[1]
        ratio = outlier_share(attention, image_of_row).clamp_min(1 / count)
        top = (count * ratio).long()[:, None]
        rank = top_k(attention, count).argsort(1)
        places = torch.arange(count, device=attention.device)
        added = self.added(places, ratio, count) & (rank >= top)
        order = torch.where(
            rank < top, rank, torch.where(added, count + places, 2 * count + places)
        ).argsort(1)
        return order, (top + added.sum(1, keepdim=True))[:, 0]

    def added(self, places: Tensor, ratio: Tensor, count: int) -> Tensor:
        """[B, N] centres beside the outliers."""
        return torch.zeros(len(ratio), count, dtype=torch.bool, device=ratio.device)


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced tokens as further centres after the outliers.

    Shang et al., arXiv 2403.15388, Section 3.3. A fixed budget (extension) has (keep - 1) // 2
    tokens by attention and fills up with evenly spaced ones of the rest.

    Args:
        adaptive: as in `prumerge`.
        neighbours: as in `prumerge`.

    Deviations: as in `prumerge`; the spacing is at least 1, where the released code divides by zero
    above a third of outliers.
    """

    def centres(self, attention: Tensor, count: int) -> Tensor:
        top = top_k(attention, count // 2)
        rest = complement(top, attention.shape[1])
        even = count - count // 2
        places = torch.arange(even, device=rest.device) * rest.shape[1] // max(even, 1)
        return torch.cat([top, rest[:, places]], 1)

    def added(self, places: Tensor, ratio: Tensor, count: int) -> Tensor:
        step = ((1 / ratio).long().double() / 3).long().clamp_min(1)[:, None]
        return (places % step == 0) & (places < count - 1)
