"""The samples that are announced to a block, and the audits that it returns."""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.injection.prompt import PrunedPrompt


@dataclass(frozen=True)
class PromptAudit:
    """The audit of one prompt: tokens before and after, one entry per image.

    For methods inside the language model: what is left after their last stage. They rank the
    images of a prompt together. Merged tokens may come from several images; they count for the
    last image and have no index. Diagnostics have one entry per stage.
    """

    id: str
    visual_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    kept_indices: tuple[tuple[int, ...], ...]  # among the tokens of the image
    crops: tuple[tuple[int, int], ...]  # (rows, columns) of every encoded crop, over all images
    prompt_tokens: int  # positions the language model sees at prefill
    layer_tokens: tuple[int, ...]  # visual tokens at prefill, per layer of the language model
    diagnostics: dict[str, tuple[float, ...]]
    # (rows, columns) of all that a method before the language model saw as one row, over all
    # images; empty: the crops
    sections: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ImageAudit:
    """One image that was pruned on its own."""

    before: int
    after: int
    indices: tuple[int, ...]
    crops: tuple[tuple[int, int], ...]
    notes: dict[str, float]  # diagnostics, mean over the crops
    sections: tuple[tuple[int, int], ...] = ()  # as of PromptAudit


@dataclass(frozen=True)
class Sample:
    """What the tensors of a call do not tell about one prompt.

    Methods that compare in LLM space read `question_ids`, those that compare in CLIP's space read
    `question`.
    """

    id: str  # seeds random choices
    question_ids: tuple[int, ...] | None = None  # in the model's tokens
    question: str | None = None  # without template words


@dataclass
class Trace:
    """The handle of an open block: announce the samples of the next call, read the audits."""

    audits: list[PromptAudit] = field(default_factory=list)
    # the last prompt of the block, of a method before the language model
    pruned: "PrunedPrompt | None" = None
    _announced: list[Sample] | None = None

    def announce(self, samples: list[Sample]) -> None:
        """Name the rows of the model's next call."""
        self._announced = samples

    def take(self, rows: int) -> list[Sample]:
        """The announced samples, once; without an announcement rows get consecutive numbers."""
        samples, self._announced = self._announced, None
        if samples is None:
            return [Sample(str(len(self.audits) + row)) for row in range(rows)]
        if len(samples) != rows:
            raise ValueError(f"{len(samples)} samples were announced for a batch of {rows}")
        return samples


def audit_before_llm(
    name: str, images: list[ImageAudit], prompt_tokens: int, layers: int
) -> PromptAudit:
    """The audit of a prompt that is the same in each of the `layers`."""
    return PromptAudit(
        id=name,
        visual_tokens=tuple(image.before for image in images),
        kept_tokens=tuple(image.after for image in images),
        kept_indices=tuple(image.indices for image in images),
        crops=tuple(grid for image in images for grid in image.crops),
        prompt_tokens=prompt_tokens,
        layer_tokens=(sum(image.after for image in images),) * layers,
        diagnostics={
            note: tuple(image.notes[note] for image in images)
            for note in (images[0].notes if images else ())
        },
        sections=tuple(grid for image in images for grid in image.sections),
    )


def audit_in_llm(
    name: str,
    sizes: list[int],
    tokens: list[int],
    crops: tuple[tuple[int, int], ...],
    prompt_tokens: int,
    layer_tokens: tuple[int, ...],
    stages: list[dict[str, float]],
) -> PromptAudit:
    """The audit of a prompt whose images were ranked together.

    Args:
        sizes: visual tokens of every image.
        tokens: what is left, numbers among the visual tokens of the prompt; negative: merged.
        stages: the diagnostics of every cut.
    """
    kept = [
        tuple(token - end + size for token in tokens if end - size <= token < end)
        for size, end in zip(sizes, accumulate(sizes), strict=True)
    ]
    counts = [len(indices) for indices in kept]
    if counts:
        counts[-1] += sum(token < 0 for token in tokens)
    notes = dict.fromkeys(note for stage in stages for note in stage)
    return PromptAudit(
        id=name,
        visual_tokens=tuple(sizes),
        kept_tokens=tuple(counts),
        kept_indices=tuple(kept),
        crops=crops,
        prompt_tokens=prompt_tokens,
        layer_tokens=layer_tokens,
        diagnostics={
            note: tuple(stage[note] for stage in stages if note in stage) for note in notes
        },
    )
