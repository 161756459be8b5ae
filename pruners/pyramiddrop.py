from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from typing import Annotated, Literal

from pydantic import Field

from secateur.pruners.base import Selection
from secateur.pruners.in_llm import InLLMPruner, LayerTokens, PromptShape
from secateur.pruners.linalg import top_k
from secateur.pruners.registry import register

# SCOPE's code, comments of llava_arch.py: (visual tokens, budget) -> tokens kept from each layer on
_SCOPE = {
    (576, 192): {2: 300, 6: 200, 16: 110},
    (576, 128): {2: 303, 6: 110, 16: 36},
    (576, 64): {2: 66, 6: 30, 16: 17},
    (2880, 160): {1: 136, 6: 100, 16: 44},
    (2880, 320): {2: 960, 6: 600, 16: 300},  # labelled "320 and 640"; its mean is 637
    (2880, 640): {2: 960, 6: 600, 16: 300},
}


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(InLLMPruner):
    """Drops tokens in stages, ranked by the last prompt position's attention in the next layer.

    Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", CVPR 2025, arXiv 2410.17247.

    Args:
        stages: 0-based layers before which tokens go (paper: 8, 16, 24, also for 40 layers).
        ratios: share of all visual tokens kept from each stage on; None chooses x, x^2, x^3 such
            that the mean over the layers is the budget. The paper's (0.5, 0.25, 0.125) averages 270
            of 576 tokens and takes that budget only.
        schedules: `average`, as above; `scope`: those that SCOPE's code holds for 32 layers, all
            but one in comments. Whether its tables were run with them is not known. Their means
            are near the budget, not equal to it.
        positions: `reindex` the survivors (released code), or keep the `original` position ids.

    Deviations: for budgets below the paper's no schedule is published with a table. The geometric
    one is ours (x = 0.253 for 192 of 576 in 32 layers). Where the layers before the first
    stage alone exceed the budget, or the model ends before the last stage, all stages are halved
    until it fits (128 and 64 of 576: stages 4, 8, 12 with x = 0.375, and 2, 4, 6 with x = 0.307).
    """

    stages: tuple[Annotated[int, Field(ge=1)], ...] = (8, 16, 24)
    ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    schedules: Literal["average", "scope"] = "average"
    positions: Literal["reindex", "original"] = "reindex"

    paper = "arXiv 2410.17247"
    status = "official"
    needs = frozenset({"attention"})
    attention_of = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages or any(a >= b for a, b in pairwise(self.stages)):
            self.fail(f"stages={self.stages} have to be at least one and ascend")
        if self.ratios is not None and (
            len(self.ratios) != len(self.stages) or any(a < b for a, b in pairwise(self.ratios))
        ):
            self.fail(f"ratios={self.ratios} have to be one per stage and descend")
        if self.schedules == "scope" and (self.ratios or self.stages != (8, 16, 24)):
            self.fail("schedules=scope has stages and counts of its own: leave out stages, ratios")

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        if self.schedules == "scope":
            if layers != 32 or (tokens, keep) not in _SCOPE:
                known = ", ".join(f"{budget} of {count}" for count, budget in _SCOPE)
                self.fail(
                    f"schedules=scope has none for {keep} of {tokens} tokens in {layers} layers; "
                    f"it has, for 32 layers: {known}"
                )
            return _SCOPE[tokens, keep]
        if self.ratios is not None:
            if self.stages[-1] >= layers:
                self.fail(f"stages={self.stages} do not fit into {layers} layers")
            plan = {
                stage: max(1, int(tokens * ratio))
                for stage, ratio in zip(self.stages, self.ratios, strict=True)
            }
            mean = sum(map(mul, _lengths(self.stages, layers), (tokens, *plan.values()))) / layers
            if keep != round(mean):
                self.fail(
                    f"ratios={self.ratios} average {mean:.1f} tokens, "
                    f"which is not the budget of {keep}"
                )
            return plan
        stages = self.stages
        while stages[-1] >= layers or stages[0] * tokens >= layers * keep:
            if stages[0] == 1:
                self.fail(
                    f"cannot average {keep} of {tokens} tokens over {layers} layers, "
                    f"even with stages={stages}"
                )
            stages = tuple(dict.fromkeys(max(1, stage // 2) for stage in stages))
        # the root found for 1 lies just below it, where int() would drop a token
        x = 1.0 if keep == tokens else _root(_lengths(stages, layers), layers * keep / tokens)
        return {stage: max(1, int(tokens * x**power)) for power, stage in enumerate(stages, 1)}

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        return Selection(top_k(tokens.relevance(), keep).sort(1).values)

    def flops(self, shape: PromptShape) -> float:
        """The last position's query, all keys and their scores, in the layer after each cut."""

        def cut(length: int) -> int:
            query, keys = shape.width * shape.query_width, length * shape.width * shape.key_width
            return 2 * (query + keys + length * shape.query_width)

        return sum(cut(n + shape.text_tokens) for n, _ in shape.cuts)


def _lengths(stages: tuple[int, ...], layers: int) -> list[int]:
    """Layers before the first stage and from each stage on."""
    return [b - a for a, b in pairwise((0, *stages, layers))]


def _root(lengths: list[int], target: float) -> float:
    """The x in 0..1 where sum_i lengths_i x^i = target, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(length * middle**power for power, length in enumerate(lengths)) < target:
            low = middle
        else:
            high = middle
    return high
