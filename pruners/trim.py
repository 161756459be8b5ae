from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.pruners.base import EXTRA, ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import gather_rows, normalize, outlier_share, top_k
from secateur.pruners.registry import register


@register("trim")
@dataclass(frozen=True)
class TRIM(Pruner):
    """The tokens nearest to the question in CLIP's joint space, and the mean of all others.

    Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient
    Multi-modal LLMs", COLING 2025, arXiv 2409.10994; FreedomIntelligence/TRIM@0e66677,
    `clip_encoder.py` (`TextSim+`). Patches of CLIP anti-correlate with the text, so that the
    similarity is negated there, as here. The kept tokens come in raster order, the mean last; it
    counts in the budget.

    Args:
        adaptive: the image decides on the count by the outliers of the softmax of its scores
            (paper, released scripts; a `keep` below N does not matter, and the mean comes on top);
            False keeps the budget exactly (released code with a fixed share; tables at equal
            budgets).
        similarity: `dot`, the product of patch and text (released code), or `cosine` (paper).
        aggregate: add the mean of the tokens that are not kept (paper, and `TextSim+` of the
            released code; false: `TextSim`).

    Deviations: float32 throughout (released: float16 out); a question of more than 77 tokens is
    compared segment by segment, as in CDPruner (released: cut at 77); an adaptive count without
    `aggregate` is at least 1. Whether tables at equal budgets count the mean is not known. The
    paper's text was not at hand: what is said of it here comes from summaries. No official outputs
    are recorded.
    """

    adaptive: bool = False  # type: ignore[misc]
    similarity: Literal["dot", "cosine"] = "dot"
    aggregate: bool = True

    paper = "arXiv 2409.10994"
    status = "secondary"
    merges = True
    needs = frozenset({"features", "encoder_features", "clip_patches", "clip_text"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.encoder_features is not None
        score = self.score(tokens)
        batch, count = score.shape
        if self.adaptive:
            top = (count * outlier_share(score.softmax(1), tokens.image_of_row)).long()
            top = top if self.aggregate else top.clamp_min(1)
            width = int(top.max())
        else:
            width = keep - self.aggregate
            top = torch.full((batch,), width, device=score.device)
        column = torch.arange(width + self.aggregate, device=score.device)
        inside = column[:width] < top[:, None]
        # N stands for no token: such places sort to the end of their row
        picks = top_k(score, width).masked_fill(~inside, count).sort(1).values
        if not self.aggregate:
            picks = picks.masked_fill(~inside, 0)
            return Selection(picks, counts=top if self.adaptive else None)
        others = score.new_ones(batch, count + 1).scatter_(1, picks, 0.0)[:, :count]
        mean = (others[:, None] @ tokens.encoder_features) / others.sum(1)[:, None, None]
        features = torch.cat(
            [gather_rows(tokens.encoder_features, picks.clamp_max(count - 1)), mean], 1
        )
        # the mean follows the last kept token of its row; padding comes after it
        last = column == top[:, None]
        indices = torch.cat([picks, torch.full_like(top, count)[:, None]], 1)
        indices = torch.where(last, EXTRA, indices.masked_fill(indices == count, 0))
        return Selection(
            indices,
            gather_rows(features, torch.where(last, width, column)),
            "encoder",
            top + 1 if self.adaptive else None,
            custom_order=True,
        )

    def flops(self, shape: ImageShape) -> float:
        """The mean of the other tokens; CLIP is left out."""
        return 2 * shape.tokens * shape.encoder_width * self.aggregate

    def score(self, tokens: VisualTokens) -> Tensor:
        """[B, N] minus the similarity to the question, mean over its segments; 0 without text."""
        assert tokens.clip_patches is not None
        assert tokens.clip_text is not None
        patches, text = tokens.clip_patches, tokens.clip_text
        if self.similarity == "cosine":
            patches, text = normalize(patches), normalize(text)
        product = patches @ text.transpose(1, 2)
        return -product.sum(2) / max(product.shape[2], 1)
