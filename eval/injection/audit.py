"""The audit of a prompt: which visual tokens it had, and which of them went on."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class SampleRecord:
    """The audit of one prompt: tokens before and after, one entry an image.

    Methods inside the language model: what is left behind their last stage. They rank the images of a prompt together; merged
    tokens, which may come of several images, count for the last and have no index. Diagnostics have an entry a stage.
    """

    id: str
    visual_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    kept_indices: tuple[tuple[int, ...], ...]  # among the tokens of the image
    crops: tuple[
        tuple[int, int], ...
    ]  # (rows, columns) of every crop that was encoded, over all images
    prompt_tokens: int  # positions the language model sees at prefill
    layer_tokens: tuple[
        int, ...
    ]  # visual tokens that each layer of the language model processes at prefill, over all images
    diagnostics: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class ImageAudit:
    """One image that was pruned for itself."""

    before: int
    after: int
    indices: tuple[int, ...]
    crops: tuple[tuple[int, int], ...]
    notes: dict[str, float]  # mean over the crops


def at_the_entrance(
    name: str, images: list[ImageAudit], prompt_tokens: int, layers: int
) -> SampleRecord:
    """The record of a prompt that every one of the `layers` sees alike."""
    return SampleRecord(
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
    )


def between_layers(
    name: str,
    sizes: list[int],
    tokens: list[int],
    crops: tuple[tuple[int, int], ...],
    prompt_tokens: int,
    layer_tokens: tuple[int, ...],
    stages: list[dict[str, float]],
) -> SampleRecord:
    """The record of a prompt whose images were ranked together.

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
    return SampleRecord(
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
