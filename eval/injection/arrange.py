"""The order in which an image's kept tokens enter the language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.injection.audit import ImageAudit
from secateur.injection.layout import NEWLINE, PlacedImage
from secateur.injection.shorten import Edit
from secateur.pruners.base import EXTRA


@dataclass(frozen=True)
class Kept:
    """What one crop's row of a selection says."""

    indices: Tensor  # [K] positions in the crop, or EXTRA
    features: Tensor | None  # [K, D] in LLM width
    notes: dict[str, float]


def arrange(image: PlacedImage, kept: list[Kept], keeps_newlines: bool) -> tuple[Edit, ImageAudit]:
    """The order in which an image's kept tokens enter the language model.

    One crop: the selection's. Several: the base crop's tokens as selected, then those of the tiles in the raster of the whole
    mosaic, with the newlines of rows that still hold any, then the tiles' extra tokens that led their rows, then those that ended
    them. Tokens that the layout has no place for (padding) are dropped.
    """
    slots_of, counted = image.slots(), image.tokens != NEWLINE
    if len(kept) < image.crops:  # one selection over the packed sequence
        slots = (
            torch.arange(len(image.tokens), device=image.tokens.device)[counted | keeps_newlines]
        )[kept[0].indices]
        numbers, key, vectors = image.tokens[slots], slots, None
    else:
        numbers = torch.cat(
            [
                torch.where(k.indices == EXTRA, EXTRA, k.indices + c * image.per_crop)
                for c, k in enumerate(kept)
            ]
        )
        slots = torch.where(numbers == EXTRA, -1, slots_of[numbers])
        key = torch.cat([_rank(k.indices, c, slots_of, image) for c, k in enumerate(kept)])
        vectors = (
            torch.cat([k.features for k in kept if k.features is not None])
            if kept[0].features is not None
            else None
        )
        placed = (numbers == EXTRA) | (slots >= 0)
        if not bool(placed.all()):
            numbers, slots, key = numbers[placed], slots[placed], key[placed]
            vectors = None if vectors is None else vectors[placed]
        if keeps_newlines and image.crops > 1:
            lines = image.newlines(numbers[numbers != EXTRA])
            newline = torch.full_like(lines, NEWLINE)
            numbers, slots, key = (
                torch.cat([numbers, newline]),
                torch.cat([slots, lines]),
                torch.cat([key, lines]),
            )
            if vectors is not None:
                vectors = torch.cat([vectors, vectors.new_zeros(len(lines), vectors.shape[1])])
    extra = slots == -1
    if len(kept) > 1:
        order = key.argsort(stable=True)
        numbers, slots, extra = numbers[order], slots[order], extra[order]
        vectors = None if vectors is None else vectors[order]
    if len(slots) > len(image.places):
        raise ValueError(
            f"{len(slots)} tokens do not fit into the {len(image.places)} places of an image; lower the budget"
        )
    # an extra token has the position of the place it comes to stand at
    own = torch.arange(len(slots), device=slots.device)
    replaced = extra | ((numbers != NEWLINE) if vectors is not None else False)
    edit = Edit(
        image.row, image.places, image.places[torch.where(extra, own, slots)], vectors, replaced
    )
    before = len(image.tokens) if keeps_newlines else int(counted.sum())
    notes = {name: sum(k.notes[name] for k in kept) / len(kept) for name in kept[0].notes}
    return edit, ImageAudit(
        before, len(slots), tuple(numbers.tolist()), (image.grid,) * image.crops, notes
    )


def _rank(indices: Tensor, crop: int, slots: Tensor, image: PlacedImage) -> Tensor:
    """[K] sort keys of one crop's tokens among all of its image: the base crop in front, tiles by their places, extras behind."""
    if crop == 0:
        return torch.arange(len(indices), device=indices.device) - len(indices)
    end, real = len(image.tokens), indices != EXTRA
    leading = ~real & (real.cumsum(0) == 0)
    behind = torch.where(leading, end + crop, end + image.crops + crop)
    return torch.where(real, slots[indices.clamp_min(0) + crop * image.per_crop], behind)
