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

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        batch, count = tokens.shape
        ids = tokens.sample_ids or tuple(f"{row}|0" for row in range(batch))
        rows = [torch.randperm(count, generator=self._generator(sample))[:keep] for sample in ids]
        return Selection(torch.stack(rows).sort(1).values.to(tokens.features.device))

    def flops(self, shape: ImageShape) -> float:
        """No product."""
        return 0

    def _generator(self, sample: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}|{sample}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
