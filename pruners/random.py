import hashlib
from dataclasses import dataclass

import torch

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.registry import register


@register("random")
@dataclass(frozen=True)
class Random(Pruner):
    """Uniformly random tokens, the floor every method has to beat.

    The first `keep` of a permutation drawn on the CPU from (seed, document, crop), so that neither
    batching nor sharding changes it. Report at least three seeds.

    Args:
        seed: number of the draw.
    """

    seed: int = 0

    paper = "-"
    status = "baseline"
    draws_per_document = True

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        count = tokens.shape[1]
        rows = [torch.randperm(count, generator=g)[:keep] for g in generators(self.seed, tokens)]
        return Selection(torch.stack(rows).sort(1).values.to(tokens.features.device))

    def flops(self, shape: ImageShape) -> float:
        """No product."""
        return 0


def generators(seed: int, tokens: VisualTokens) -> list[torch.Generator]:
    """One generator on the CPU per row, from the seed and the row's name in `sample_ids`."""
    names = tokens.sample_ids or tuple(f"{row}|0" for row in range(tokens.shape[0]))
    digests = [hashlib.sha256(f"{seed}|{name}".encode()).digest() for name in names]
    return [
        torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        for digest in digests
    ]
