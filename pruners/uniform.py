from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import Literal

import torch
from torch import Tensor

from secateur.pruners.base import ImageShape, Pruner, PrunerError, Selection, VisualTokens
from secateur.pruners.linalg import evenly_spaced
from secateur.pruners.registry import register


@register("uniform")
@dataclass(frozen=True)
class Uniform(Pruner):
    """Tokens at even distances, blind to the image: what mere coverage is worth.

    Args:
        lattice: `grid` spreads the tokens over rows and columns, `raster` over the flattened
            sequence.
    """

    lattice: Literal["grid", "raster"] = "grid"

    paper = "-"
    status = "baseline"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        batch, count = tokens.shape
        if self.lattice == "raster":
            index = evenly_spaced(count, keep)
        elif tokens.grid is None:
            raise PrunerError(
                "pruner 'uniform' with lattice='grid' needs the token grid, "
                "which this call does not give"
            )
        else:
            index = _lattice(*tokens.grid, keep)
        return Selection(index.to(tokens.features.device).expand(batch, -1))

    def flops(self, shape: ImageShape) -> float:
        """No product."""
        return 0


def _lattice(height: int, width: int, keep: int) -> Tensor:
    """Rows x columns nearest to the grid's proportions, thinned or filled up evenly to `keep`."""
    rows = min(max(floor(sqrt(keep * height / width) + 0.5), 1), height)
    columns = min(width, ceil(keep / rows))
    lattice = (
        evenly_spaced(height, rows)[:, None] * width + evenly_spaced(width, columns)
    ).flatten()
    if len(lattice) > keep:
        return lattice[evenly_spaced(len(lattice), keep)]
    unused = torch.ones(height * width, dtype=torch.bool)
    unused[lattice] = False
    rest = unused.nonzero()[:, 0]
    missing = keep - len(lattice)
    extra = rest[evenly_spaced(len(rest), missing)] if missing else rest[:0]
    return torch.cat([lattice, extra]).sort().values
