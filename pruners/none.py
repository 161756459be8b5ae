from dataclasses import dataclass

import torch

from secateur.pruners.base import ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.registry import register


@register("none")
@dataclass(frozen=True)
class NoPruning(Pruner):
    """The unpruned model: keeps every token, whatever the budget. Other rows are relative to it."""

    paper = "-"
    status = "baseline"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        batch, count = tokens.shape
        return Selection(torch.arange(count, device=tokens.features.device).expand(batch, -1))

    def flops(self, shape: ImageShape) -> float:
        """No product."""
        return 0
