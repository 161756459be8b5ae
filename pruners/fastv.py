from dataclasses import dataclass
from math import floor
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from secateur.pruners.base import Selection
from secateur.pruners.in_llm import InLLMPruner, LayerTokens, PromptShape
from secateur.pruners.linalg import top_k
from secateur.pruners.registry import register


@dataclass(frozen=True)
class SingleCut(InLLMPruner):
    """An in-LLM pruner that acts once, before one layer.

    Args:
        layer: 0-based layer before which the tokens go.
        budget: `average` chooses the kept count so that the mean over all layers is the budget;
            `after` keeps exactly the budget from `layer` on.
    """

    layer: Annotated[int, Field(ge=1)] = 2
    budget: Literal["average", "after"] = "average"

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        if self.layer >= layers:
            self.fail(f"layer={self.layer} is not between the layers 0..{layers - 1} of this model")
        kept = keep
        if self.budget == "average":
            kept = floor((layers * keep - self.layer * tokens) / (layers - self.layer) + 0.5)
        if not 1 <= kept <= tokens:
            self.fail(
                f"cannot average {keep} tokens over {layers} layers "
                f"when the first {self.layer} process {tokens}"
            )
        return {self.layer: kept}


@register("fastv")
@dataclass(frozen=True)
class FastV(SingleCut):
    """Keeps the visual tokens that the last prompt position attends to most in an early layer.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration
    for Large Vision-Language Models", ECCV 2024, arXiv 2403.06764.

    Args:
        layer: 0-based layer before which the tokens go, ranked by the attention of the layer before
            (paper: K = 2).
        budget: `average` compares methods at an equal mean over the layers, (L keep - layer N) / (L
            - layer) tokens after the cut; `after` keeps exactly `keep` there. Published tables use
            either, often without saying which.
        positions: survivors keep their position ids (released code), or `reindex` them.

    Deviations: none. The paper's variant that masks instead of removing is left out.
    """

    positions: Literal["original", "reindex"] = "original"

    paper = "arXiv 2403.06764"
    status = "official"
    needs = frozenset({"attention"})

    def rank(self, tokens: LayerTokens, keep: int) -> Tensor:
        """The kept visual tokens by descending attention, [B, keep]."""
        return top_k(tokens.relevance(), keep)

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        return Selection(self.rank(tokens, keep).sort(1).values)

    def flops(self, shape: PromptShape) -> float:
        """The attention scores of the last position, at the cut."""
        return sum(2 * (n + shape.text_tokens) * shape.query_width for n, _ in shape.cuts)
