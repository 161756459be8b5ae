from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import EXTRA, Selection
from secateur.pruners.in_llm import InLLMPruner, LayerTokens, PromptShape
from secateur.pruners.linalg import complement, gather_rows, top_k
from secateur.pruners.registry import register

# budget at 576 visual tokens -> tokens kept at each stage, before merging
_LAYERS = 32  # of the model that they are for
_KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(InLLMPruner):
    """Keeps tokens that image-related question words attend to; merges the best of the rest.

    Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
    Inference", ICML 2025, arXiv 2410.04417, with the released code's fixed counts. Merged tokens
    follow the kept ones; `tokens_after` counts both.

    Args:
        stages: 0-based layers before which tokens go, ranked by the attention of the layer before
            (released: after 2, 6, 15).
        kept: tokens kept at each stage besides the merged ones; None takes the released lists for
            192, 128, 96 and 64 of 576 tokens in 32 layers, scaled to other numbers of tokens.
        merge: append cluster means of the best dropped tokens to the kept ones (version 1, released
            default).
        seed: of the noise of at most 1e-6 that separates equal densities.
        positions: `reindex` the survivors (version 1), or keep the `original` position ids.

    Deviations: the noise comes from a generator of its own and is the same for every image
    (released: global state). All text rates when no position stands out. Counts derived from the
    rank of the attention (paper) and version 2 are left out.
    """

    stages: tuple[Annotated[int, Field(ge=1)], ...] = (3, 7, 16)
    kept: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    merge: bool = True
    seed: int = 0
    positions: Literal["reindex", "original"] = "reindex"

    paper = "arXiv 2410.04417"
    status = "official"
    merges = True
    needs = frozenset({"attention", "hidden"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages or any(a >= b for a, b in pairwise(self.stages)):
            self.fail(f"stages={self.stages} have to be at least one and ascend")
        if self.kept is not None and len(self.kept) != len(self.stages):
            self.fail(f"kept={self.kept} has to name one count for each of stages={self.stages}")

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        kept = self.kept
        if kept is None:
            nominal = round(keep * 576 / tokens)
            if nominal not in _KEPT or len(self.stages) != 3:
                known = ", ".join(map(str, _KEPT))
                self.fail(
                    f"has no counts for {keep} of {tokens} tokens "
                    f"(released: {known} of 576); set kept="
                )
            if layers != _LAYERS:
                self.fail(
                    f"has released counts for {_LAYERS} layers only, and this model has {layers}; "
                    "set kept=, and stages= if others fit it better"
                )
            kept = tuple(max(1, round(count * tokens / 576)) for count in _KEPT[nominal])
        if self.stages[-1] >= layers:
            self.fail(f"stages={self.stages} do not fit into {layers} layers")
        plan = {}
        for stage, count in zip(self.stages, kept, strict=True):
            plan[stage] = max(1, min(count, tokens - 1))
            tokens = self.tokens_after(tokens, plan[stage])
        return plan

    def tokens_after(self, tokens: int, keep: int) -> int:
        return keep + _merged(tokens - keep) * self.merge

    def queries(self, embeddings: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """Text positions with above-average relevance to the image.

        Relevance is the softmax over the text of image . text, averaged over the image.
        """
        embeddings = embeddings.float()
        products = gather_rows(embeddings, visual) @ embeddings.transpose(1, 2)
        share = products.masked_fill(~text[:, None], -torch.inf).softmax(2).mean(1)
        raters = text & (share > share.sum(1, keepdim=True) / text.sum(1, keepdim=True))
        return torch.where(raters.any(1, keepdim=True), raters, text)

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        relevance = tokens.relevance()
        kept = top_k(relevance, keep).sort(1).values
        if not self.merge:
            return Selection(kept)
        assert tokens.hidden is not None
        states = tokens.visual_rows(tokens.hidden)
        dropped = complement(kept, tokens.shape[1])
        best = top_k(relevance.gather(1, dropped), int(0.3 * dropped.shape[1]) + 1)
        merged = self.cluster(
            gather_rows(states, dropped.gather(1, best)), _merged(dropped.shape[1])
        )
        indices = torch.cat([kept, torch.full_like(merged[..., 0], EXTRA, dtype=torch.long)], 1)
        return Selection(
            indices, torch.cat([gather_rows(states, kept), merged], 1), "hidden", custom_order=True
        )

    def flops(self, shape: PromptShape) -> float:
        """The raters, and at each cut their attention scores, the clustering and the means.

        The number of raters depends on the prompt; all text positions are counted.
        """

        def cut(n: int, after: int) -> int:
            scores = shape.text_tokens * (n + shape.text_tokens) * shape.query_width
            if not self.merge:
                return 2 * scores
            # the first count that leaves `after` tokens, merged ones included
            kept = next(keep for keep in range(1, n) if self.tokens_after(n, keep) == after)
            best, clusters = int(0.3 * (n - kept)) + 1, _merged(n - kept)
            return 2 * (scores + (best + clusters) * best * shape.width)

        first = shape.layer_tokens[0]
        raters = 2 * first * (first + shape.text_tokens) * shape.width
        return raters + sum(cut(*cut_tokens) for cut_tokens in shape.cuts)

    def cluster(self, x: Tensor, clusters: int) -> Tensor:
        """Cluster means [B, clusters, C] of x [B, n, C] by density-peak clustering.

        The density takes as many neighbours as there are clusters.
        """
        count = x.shape[1]
        distance = (
            torch.cdist(x.double(), x.double()).float() / x.shape[2] ** 0.5
        )  # a product in float32 would cancel
        nearest = distance.sort(2).values[..., :clusters]
        noise = torch.rand(count, generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        density = (-nearest.square().mean(2)).exp() + 1e-6 * noise
        denser = density[:, None] > density[:, :, None]
        furthest = distance.amax((1, 2), keepdim=True)
        separation = torch.where(denser, distance, furthest).amin(2)
        centres = top_k(separation * density, clusters)
        joined = gather_rows(distance, centres).argmin(1)
        joined = joined.scatter(
            1, centres, torch.arange(clusters, device=x.device).expand_as(centres)
        )
        member = torch.nn.functional.one_hot(joined, clusters).to(x.dtype)
        return member.transpose(1, 2) @ x / (member.sum(1)[..., None] + 1e-6)


def _merged(dropped: int) -> int:
    """How many cluster means stand for `dropped` tokens: a tenth of the best three tenths."""
    return (int(0.3 * dropped) + 1) // 10 + 1 if dropped else 0
