from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import Selection
from secateur.pruners.fastv import SingleCut
from secateur.pruners.in_llm import LayerTokens, PromptShape
from secateur.pruners.linalg import normalize, top_k
from secateur.pruners.registry import register


@register("dart")
@dataclass(frozen=True)
class Dart(SingleCut):
    """A few pivots of large keys, and for each the visual tokens least similar to it.

    Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication
    Matters More", EMNLP 2025, arXiv 2502.11494. With P = image_pivots + text_pivots, image_pivots +
    P * (keep // P) tokens stay: 132 for a budget of 128.

    Args:
        layer: 0-based layer before which the tokens go (released: 2).
        budget: `average` compares methods at an equal mean over the layers; `after` hands `keep` to
            the selection as it is (released). Both before the rounding above, which `tokens_after`
            reports.
        image_pivots: pivots among the visual tokens (released: 4).
        text_pivots: pivots among the positions after the image (released: 4).
        pivot_order: order in which pivots choose: of a CPython set of the positions (released), or
            `sorted`.
        positions: survivors keep their position ids (released code), or `reindex` them.

    Deviations: a pivot takes what is left when fewer candidates remain than its share.
    """

    image_pivots: Annotated[int, Field(ge=0)] = 4
    text_pivots: Annotated[int, Field(ge=0)] = 4
    pivot_order: Literal["cpython_set", "sorted"] = "cpython_set"
    positions: Literal["original", "reindex"] = "original"

    paper = "arXiv 2502.11494"
    status = "official"
    needs = frozenset({"hidden", "keys"})
    apply_final_norm = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots + self.text_pivots == 0:
            self.fail("image_pivots=0 and text_pivots=0 leave no pivot")

    def tokens_after(self, tokens: int, keep: int) -> int:
        if keep == tokens:
            return tokens
        pivots = self.image_pivots + self.text_pivots
        return min(tokens, min(self.image_pivots, tokens) + pivots * (keep // pivots))

    def pivots(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """Positions of the image and text pivots, by descending L1 norm of all heads' keys."""
        assert tokens.keys is not None
        norm = tokens.keys.transpose(1, 2).flatten(2).abs().sum(2)
        image = top_k(tokens.visual_rows(norm), min(self.image_pivots, tokens.shape[1]))
        text = top_k(norm.masked_fill(~tokens.text, -torch.inf), self.text_pivots)
        return tokens.visual.gather(1, image), text

    def visit_order(self, image: Tensor, text: Tensor) -> Tensor:
        """The pivots in the order they choose, [B, P]."""
        together = torch.cat([image, text], 1)
        if self.pivot_order == "sorted":
            return together.sort(1).values
        return torch.tensor([list(set(row)) for row in together.tolist()], device=image.device)

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        assert tokens.hidden is not None
        batch, count = tokens.shape
        if bool((tokens.text.sum(1) < self.text_pivots).any()):
            self.fail(f"text has fewer than text_pivots={self.text_pivots} real positions in a row")
        image, text = self.pivots(tokens)
        order = self.visit_order(image, text)
        states = normalize(tokens.hidden, 1e-8)
        chosen = states[torch.arange(batch, device=order.device)[:, None], order]
        similarity = chosen @ tokens.visual_rows(states).transpose(1, 2)  # [B, P, n]
        kept = (tokens.visual[:, :, None] == image[:, None]).any(2)
        left, share = count - image.shape[1], keep // order.shape[1]
        for number in range(order.shape[1]):
            taken = top_k(-similarity[:, number].masked_fill(kept, torch.inf), min(share, left))
            kept = kept.scatter(1, taken, True)
            left -= taken.shape[1]
        return Selection(kept.sort(dim=1, descending=True, stable=True).indices[:, : count - left])

    def flops(self, shape: PromptShape) -> float:
        """The similarity of pivots and visual tokens."""
        pivots = self.image_pivots + self.text_pivots
        return sum(2 * pivots * n * shape.width for n, _ in shape.cuts)
