from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.pruners.base import ImageShape
from secateur.pruners.linalg import complement, normalize, top_k
from secateur.pruners.registry import register
from secateur.pruners.tower import Matching, TowerPruner


@register("tome")
@dataclass(frozen=True)
class ToMe(TowerPruner):
    """Merges the most similar tokens inside the image encoder, a few in every block.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, Section 3;
    facebookresearch/ToMe (tome/merge.py; tome/patch/clip.py at 16bda5b). In each block, between
    attention and MLP, the tokens are divided alternately into two sets. Each token of the first set
    finds the token of the second whose key is most similar to its own (cosine of the mean over
    heads). The `count` most similar pairs merge. CLS is never merged.

    Args:
        schedule: as many merges in every block (`constant`), or linearly fewer from 2r to 0
            (`decreasing`). Both are in the paper and in the released code. r is the least that
            reaches the budget; the last blocks merge only what is left to merge.
        proportional_attention: attention adds the logarithm of the number of patches that a token
            stands for (Equation 1; released default for models that were not trained with merging).
        order: of the tokens that the LLM receives: that of the encoder after merging (`released`),
            in which every block puts the first set before the second, or `raster`, by the patch
            that each merged token is centred on.

    Deviations: similarities and means in float32 (released: the model's dtype); equal similarities
    by lower index (released: by the sort); a key of length zero has cosine 0 (released: NaN). The
    papers that print ToMe for LLaVA name neither schedule nor order; a budget in tokens is
    reached in our way, as above.
    """

    schedule: Literal["constant", "decreasing"] = "constant"
    proportional_attention: bool = True
    order: Literal["released", "raster"] = "released"

    paper = "arXiv 2210.09461"
    status = "secondary"

    @property
    def weighs_attention(self) -> bool:
        return self.proportional_attention

    @property
    def raster(self) -> bool:
        return self.order == "raster"

    def merged_per_block(self, tokens: int, blocks: int, keep: int) -> list[int]:
        plans = (self.plan(r, tokens, blocks, keep) for r in range(tokens - keep + 1))
        plan = next((plan for plan in plans if sum(plan) == tokens - keep), None)
        if plan is None:
            least = tokens - sum(self.plan(tokens, tokens, blocks, keep))
            self.fail(
                f"cannot merge {tokens} tokens into {keep}: a block merges at most half of its "
                f"tokens, so that at least {least} remain after {blocks} blocks with "
                f"schedule={self.schedule!r}"
            )
        return plan

    def plan(self, r: int, tokens: int, blocks: int, keep: int) -> list[int]:
        """The merges of each block for one r; the arguments are those of `merged_per_block`."""
        plan: list[int] = []
        for block in range(blocks):
            wanted = r
            if self.schedule == "decreasing" and blocks > 1:
                wanted = int(2 * r - 2 * r / (blocks - 1) * block)
            # only tokens of the first set can merge
            plan.append(min(wanted, tokens // 2, tokens - keep))
            tokens -= plan[-1]
        return plan

    def match(self, keys: Tensor, count: int) -> Matching:
        metric = normalize(keys)
        first, second = metric[:, ::2], metric[:, 1::2]
        scores = first @ second.transpose(1, 2)
        scores[:, 0] = -torch.inf  # CLS
        best, nearest = scores.max(2)
        sources = top_k(best, count)
        stay = complement(sources, first.shape[1])  # ascending, CLS first
        seconds = torch.arange(second.shape[1], device=keys.device).expand(len(keys), -1)
        kept = torch.cat([2 * stay, 2 * seconds + 1], 1)
        # what stays has its own new place; a source has that of its match
        into = torch.zeros_like(keys[..., 0], dtype=torch.long)
        into.scatter_(1, kept, torch.arange(kept.shape[1], device=keys.device).expand_as(kept))
        into.scatter_(1, 2 * sources, stay.shape[1] + nearest.gather(1, sources))
        return Matching(kept, into)

    def flops(self, shape: ImageShape) -> float:
        """The similarities of the two sets and the means, in every block that merges."""
        total, positions, width = 0.0, shape.tokens + 1, shape.encoder_width
        for merged in self.merged_per_block(shape.tokens, shape.encoder_blocks, round(shape.kept)):
            if merged:
                pairs = -(-positions // 2) * (positions // 2)
                positions -= merged
                total += 2 * pairs * width / shape.encoder_heads
                total += 2 * positions * merged * (width + 1)
        return total
