import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from secateur.pruners.base import ImageShape, Selection, VisualTokens
from secateur.pruners.linalg import cosine_gram, mean_similarity
from secateur.pruners.prunesid import PruneSID
from secateur.pruners.registry import register


@register("prunesid_dyn")
@dataclass(frozen=True)
class PruneSIDDyn(PruneSID):
    """PruneSID with a budget per image, proportional to 1 - rho and equal to `keep` on average.

    Fang et al., arXiv 2603.09480 (PruneSID-Dyn). Not in the released code.

    Args:
        mean_phi: mean of 1 - rho over the benchmark; None for the first pass, which finds it:
            PruneSID as it is, every crop at `keep`, with 1 - rho as the diagnostic `phi`. The
            images of a call never share a budget, for the caller chooses them.
        min_tokens: smallest budget of an image (unless the average itself is below).

    All other fields as PruneSID.

    Deviations: rounding and bounds of the budgets are ours. The budgets are read from the device,
    and images are pruned one by one, because the number of groups depends on them.
    """

    mean_phi: Annotated[float, Field(gt=0, le=2)] | None = None
    min_tokens: Annotated[int, Field(ge=1)] = 16

    paper = "arXiv 2603.09480"
    status = "paper"
    adaptive = True

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        x = tokens.encoder_features if self.variant == "llava" else tokens.features
        assert x is not None
        phi = (1 - mean_similarity(cosine_gram(x))).clamp_min(1e-6)
        if self.mean_phi is None:
            first = super().select(tokens, keep)
            return dataclasses.replace(first, diagnostics={"phi": phi} | first.diagnostics)
        budgets = (
            (keep * phi / self.mean_phi)
            .round()
            .long()
            .clamp(min(self.min_tokens, keep), x.shape[1])
        )
        rows = [
            super(PruneSIDDyn, self).select(_row(tokens, i), budget)
            for i, budget in enumerate(budgets.tolist())
        ]
        width = max(row.indices.shape[1] for row in rows)
        features = [_padded(row.features, width, 1) for row in rows if row.features is not None]
        return Selection(
            torch.cat([_padded(row.indices, width, 0) for row in rows]),
            torch.cat(features) if features else None,
            rows[0].space,
            counts=budgets,
            custom_order=any(row.custom_order for row in rows),
            diagnostics={"phi": phi}
            | {
                name: torch.cat([row.diagnostics[name] for row in rows])
                for name in rows[0].diagnostics
            },
        )

    def flops(self, shape: ImageShape) -> float:
        """Those of PruneSID, and the Gram matrix that the budget needs first."""
        gram = shape.gram if self.variant == "qwen" else shape.encoder_gram
        return super().flops(shape) + gram


def _row(tokens: VisualTokens, i: int) -> VisualTokens:
    own = {name: t[i : i + 1] for name, t in tokens.tensors().items()}
    samples = tokens.sample_ids and tokens.sample_ids[i : i + 1]
    return dataclasses.replace(tokens, **own, sample_ids=samples)  # type: ignore[arg-type]


def _padded(x: Tensor, width: int, trailing: int) -> Tensor:
    """Zeros up to `width` along axis 1, which `trailing` axes follow."""
    return pad(x, (0, 0) * trailing + (0, width - x.shape[1]))
