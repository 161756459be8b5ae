"""The base of methods that only score."""

from dataclasses import dataclass

from torch import Tensor

from secateur.pruners.base import Pruner, Selection, VisualTokens
from secateur.pruners.linalg import top_k


@dataclass(frozen=True)
class ScoreTopK(Pruner):
    """Keeps the tokens of largest score, in raster order. Subclasses write `score` and `flops`."""

    def score(self, tokens: VisualTokens) -> Tensor:
        """[B, N] higher is better; equal scores are taken by lower index."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return Selection.ordered(top_k(self.score(tokens), keep), custom_order=False)
