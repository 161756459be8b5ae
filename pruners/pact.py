from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import Selection
from secateur.pruners.in_llm import InLLMPruner, LayerTokens, PromptShape
from secateur.pruners.linalg import (
    gather_rows,
    non_maximum_suppression,
    normalize,
    top_k,
)
from secateur.pruners.registry import register

BANDWIDTH = 2  # of the density, in cosine distance (released code)


@register("pact")
@dataclass(frozen=True)
class Pact(InLLMPruner):
    """Drops unimportant tokens before one layer, and merges the others into clusters.

    Dhouib et al., "PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language
    Models", CVPR 2025, arXiv 2504.08966; orailix/PACT (configs/pact.json and transformers/PACT/
    utils.py at 423c799, transformers/models/qwen2/modeling_qwen2.py at 34ca136). Importance is the
    softmax of the mean query with all keys up to the last image token, both without the rotary
    embedding, averaged over heads, times the norm of the hidden state. Clusters are formed over the
    rotated keys by cosine distance. In the order of density a token becomes a centre if no earlier
    centre is within `cutoff`; each other token joins its nearest centre. Dropped tokens come back
    into the cluster of a centre within `recovery * cutoff`. A centre becomes the mean of its
    cluster. The image decides how many clusters there are; the budget does not matter.

    Args:
        layer: 0-based layer before which it acts, with that layer's queries and keys (released: 4).
        share: of the visual tokens that are not dropped (released: 0.55).
        cutoff: distance within which tokens share a cluster (released: 0.21).
        recovery: how far beyond the cutoff dropped tokens may be to come back (released: 1.5).
        proportional_attention: later layers add the logarithm of a cluster's size to the scores of
            its key (released).
        positions: centres keep their position ids (released), or `reindex` them.

    Deviations: float32 (released: the model's dtype, and float32 for importance); equal densities
    by higher index (released: by the sort); `share` keeps at least one token.
    """

    layer: Annotated[int, Field(ge=1)] = 4
    share: Annotated[float, Field(gt=0, lt=1)] = 0.55
    cutoff: Annotated[float, Field(ge=0, le=2)] = 0.21
    recovery: Annotated[float, Field(ge=1)] = 1.5
    proportional_attention: bool = True
    positions: Literal["original", "reindex"] = "original"

    paper = "arXiv 2504.08966"
    status = "secondary"
    merges = True
    adaptive = True
    needs = frozenset({"hidden", "next_queries", "next_keys", "next_rotated_keys"})

    @property
    def weighs_attention(self) -> bool:
        return self.proportional_attention

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        if self.layer >= layers:
            self.fail(f"layer={self.layer} is not between the layers 0..{layers - 1} of this model")
        return {self.layer: max(1, int(self.share * tokens))}

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        assert tokens.hidden is not None
        assert tokens.next_rotated_keys is not None
        picked = top_k(self.importance(tokens), keep).sort(1).values
        states = tokens.visual_rows(tokens.hidden)
        keys = normalize(tokens.visual_rows(tokens.next_rotated_keys.transpose(1, 2).flatten(2)))
        kept = torch.zeros_like(keys[..., 0], dtype=torch.bool).scatter(1, picked, True)
        centre = kept.scatter(1, picked, self.centres(gather_rows(keys, picked)))
        counts = centre.sum(1)
        width = int(counts.max())
        index = centre.sort(dim=1, descending=True, stable=True).indices[:, :width]  # ascending
        places = torch.arange(width, device=index.device)
        real = places < counts[:, None]
        distance = 1 - keys @ gather_rows(keys, index).transpose(1, 2)  # [B, n, width]
        nearest, cluster = distance.masked_fill(~real[:, None], torch.inf).min(2)
        # a centre is in its own cluster, also where rounding puts another one as near
        cluster = torch.where(centre, centre.cumsum(1) - 1, cluster)
        joins = kept | (nearest <= self.recovery * self.cutoff)
        member = (cluster[..., None] == places) & joins[..., None]
        sizes = member.sum(1).clamp_min(1).to(states.dtype)  # 0 at padding only
        means = member.to(states.dtype).transpose(1, 2) @ states / sizes[..., None]
        return Selection(index.masked_fill(~real, 0), means, "hidden", counts, sizes=sizes)

    def importance(self, tokens: LayerTokens) -> Tensor:
        """[B, n] the score by which visual tokens are dropped."""
        assert tokens.hidden is not None
        assert tokens.next_queries is not None
        assert tokens.next_keys is not None
        length = tokens.text.shape[1]
        upto = torch.arange(length, device=tokens.text.device) <= tokens.visual[:, -1:]  # [B, L]
        weight = upto[:, None, :, None].to(tokens.next_queries.dtype)
        query = (tokens.next_queries * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)
        keys = tokens.next_keys
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        scores = (query @ keys.transpose(2, 3))[:, :, 0] * keys.shape[3] ** -0.5  # [B, H, L]
        attention = scores.masked_fill(~upto[:, None], -torch.inf).softmax(2).mean(1)
        return attention.gather(1, tokens.visual) * tokens.visual_rows(tokens.hidden).norm(dim=2)

    def centres(self, keys: Tensor) -> Tensor:
        """[B, k] which of the tokens with unit keys [B, k, E] are centres of clusters."""
        distance = (1 - keys @ keys.transpose(1, 2)).clamp_min(0)
        distance.diagonal(dim1=1, dim2=2).zero_()
        density = (-((distance / BANDWIDTH) ** 2)).exp().sum(2)
        rank = density.sort(dim=1, stable=True).indices.argsort(1)
        near = (distance <= self.cutoff) & (rank[:, :, None] > rank[:, None])
        return non_maximum_suppression(near.to(keys.dtype), torch.ones_like(rank, dtype=torch.bool))

    def flops(self, shape: PromptShape) -> float:
        """Queries and keys of the next layer, their scores, and the distances between keys."""
        total = 0.0
        for n, after in shape.cuts:
            length, kept = n + shape.text_tokens, max(1, int(self.share * n))
            total += 2 * length * shape.width * (shape.query_width + shape.key_width)
            total += 2 * length * shape.query_width
            total += 2 * (kept**2 + n * after) * shape.key_width
            total += 2 * n * after * shape.width
        return total
