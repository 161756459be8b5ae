"""The images of a prompt in their places, and the pruned prompt the language model gets.

Embeddings, mask and positions stay consistent, in the decoding steps too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.families.base import NEWLINE, EncodedImage
from secateur.families.contract import Keywords
from secateur.pruners import EXTRA


@dataclass(frozen=True)
class PlacedImage(EncodedImage):
    """An image with its places in the prompts of a call."""

    row: int  # prompt of the batch
    places: Tensor  # [P] positions in that prompt, ascending
    number: int  # which image of that prompt it is

    def slots(self) -> Tensor:
        """[tokens] the placeholder of each token; -1 without one (padding, layout `anyres`)."""
        count = sum(rows * columns for rows, columns in self.sections)
        where = torch.full((count,), -1, device=self.tokens.device)
        real = (self.tokens != NEWLINE).nonzero()[:, 0]
        where[self.tokens[real]] = real
        return where

    def newlines(self, kept: Tensor) -> Tensor:
        """The placeholders of newlines whose row of tiles holds one of the `kept` tokens [K].

        Those of an image without tiles all stay: they separate it from what follows.
        """
        newline = self.tokens == NEWLINE
        if len(self.sections) == 1:
            return newline.nonzero()[:, 0]
        line = newline.cumsum(0) - newline.long()  # the newline that ends each placeholder's row
        # the base crop comes before the rows
        slots = self.slots()[kept[kept >= self.per_crop]]
        alive = torch.zeros(int(newline.sum()) + 1, dtype=torch.bool, device=newline.device)
        alive[line[slots[slots >= 0]]] = True
        return (newline & alive[line]).nonzero()[:, 0]


def place(images: list[EncodedImage], visual: Tensor) -> list[PlacedImage]:
    """Give the images of a call their placeholders, in order.

    Args:
        visual: [B, L] True at placeholders.

    Raises:
        ValueError: placeholders and images do not match.
    """
    rows, positions = visual.nonzero(as_tuple=True)
    sizes = [len(image.tokens) for image in images]
    if sum(sizes) != len(positions):
        if not images:
            raise ValueError(
                f"the prompt has {len(positions)} image placeholders, but no image was encoded "
                "inside this block (the literal text of a placeholder in a question counts as one; "
                "with use_cache=False the prompt comes again at every step, without its image)"
            )
        raise ValueError(
            f"{len(positions)} image placeholders for images of {', '.join(map(str, sizes))} "
            "tokens (beam search, or several answers per prompt, repeat the prompt without its "
            "image: generate one answer per prompt)"
        )
    placed: list[PlacedImage] = []
    for image, row, places in zip(images, rows.split(sizes), positions.split(sizes), strict=True):
        owner = int(row[0])
        if bool((row != owner).any()):
            raise ValueError(
                "the placeholders of an image are spread over several prompts of the batch"
            )
        number = sum(other.row == owner for other in placed)
        placed.append(PlacedImage(**vars(image), row=owner, places=places, number=number))
    return placed


@dataclass(frozen=True)
class Edit:
    """What happens to one image's placeholders.

    The first M placeholders receive the kept tokens; the rest are removed.
    """

    row: int
    places: Tensor  # [P] ascending
    sources: Tensor  # [M] positions of the kept embeddings
    vectors: Tensor | None = None  # [M, D] new embeddings in their place
    replaced: Tensor | None = None  # [M] True where `vectors` are used; None: everywhere
    extra: Tensor | None = None  # [M] True for tokens without a place in the image; None: none


@dataclass(frozen=True)
class PrunedPrompt:
    """Which positions of a prompt remain; it holds none of the language model's arguments."""

    length: int  # L, positions of the unpruned prompt
    order: Tensor  # [B, L'] the remaining ones among them, padding on the left
    mask: Tensor  # [B, L'] 1 for real positions
    next: Tensor  # [B] the position after each prompt
    # [B, L'] the position of each token in the unpruned prompt; EXTRA: padding, or a token without
    # a place in its image
    origin: Tensor

    def moved(self, places: Tensor, row: int) -> Tensor:
        """The new positions of `places` of the unpruned prompt, all of which remain."""
        where = torch.full((self.length,), -1, device=places.device)
        where[self.order[row]] = torch.arange(self.order.shape[1], device=places.device)
        return where[places]

    def step(self, kwargs: Keywords, past: int) -> Keywords:
        """The arguments of a decoding step: masks are cut, positions shifted.

        `generate` still counts the unpruned prompt.

        Args:
            past: positions in the cache: those of the pruned prompt and of the generated tokens.
        """
        new = dict(kwargs)
        attention_mask, step = kwargs.get("attention_mask"), kwargs["inputs_embeds"].shape[1]
        generated = past + step - self.mask.shape[1]
        if attention_mask is not None:
            new["attention_mask"] = torch.cat(
                [self.mask.to(attention_mask), attention_mask[:, self.length :]], 1
            )
        elif bool((self.mask == 0).any()):
            new["attention_mask"] = torch.cat(
                [self.mask, self.mask.new_ones(len(self.mask), generated)], 1
            )
        # always set: `generate` passes positions after the unpruned prompt, and a plain forward
        # would count the cache
        positions = (
            self.next[:, None]
            + past
            - self.mask.shape[1]
            + torch.arange(step, device=self.mask.device)
        )
        given = kwargs.get("position_ids")
        new["position_ids"] = (
            positions if given is None or given.dim() == 2 else positions.expand(len(given), -1, -1)
        )
        if kwargs.get("cache_position") is not None:
            new["cache_position"] = kwargs["cache_position"] - (self.length - self.mask.shape[1])
        return new


def prune_prompt(
    kwargs: Keywords, real: Tensor, edits: list[Edit], compact: bool
) -> tuple[Keywords, PrunedPrompt]:
    """Remove the placeholders that `edits` drops; the remaining prompts are padded on the left.

    Args:
        kwargs: the language model's arguments; inputs_embeds [B, L, D].
        real: [B, L] False at padding.
        compact: number the remaining tokens from 0, instead of keeping their positions. Positions
            of several axes (M-RoPE) are always kept.

    Returns:
        The arguments of the pruned prompt, and the pruned prompt for later steps.
    """
    embeds, attention_mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    batch, length, width = embeds.shape
    source = torch.arange(length, device=embeds.device).repeat(batch, 1)
    alive, loose = real.clone(), torch.zeros_like(real)
    for edit in edits:
        alive[edit.row, edit.places] = False
        target = edit.places[: len(edit.sources)]
        source[edit.row, target], alive[edit.row, target] = edit.sources, True
        if edit.extra is not None:
            loose[edit.row, target] = edit.extra
    embeds = torch.gather(embeds, 1, source[..., None].expand(-1, -1, width))
    for edit in edits:
        if edit.vectors is not None:
            new = slice(None) if edit.replaced is None else edit.replaced
            embeds[edit.row, edit.places[: len(edit.sources)][new]] = edit.vectors[new].to(
                embeds.dtype
            )

    # a stable sort moves dropped places to the left, where they serve as padding, and keeps the
    # order of the others
    longest = int(alive.sum(1).max())
    order = torch.sort(alive.long(), dim=1, stable=True).indices[:, -longest:]
    mask = torch.gather(alive, 1, order).long()
    pruned = dict(
        kwargs, inputs_embeds=torch.gather(embeds, 1, order[..., None].expand(-1, -1, width))
    )
    # never None: without a mask transformers takes gaps between positions for borders of packed
    # sequences
    pruned["attention_mask"] = mask if attention_mask is None else mask.to(attention_mask.dtype)
    before = (
        (real.long().cumsum(1) - 1).clamp_min(0)
        if kwargs.get("position_ids") is None
        else kwargs["position_ids"]
    )
    before = before.expand(*before.shape[:-2], batch, -1)
    pruned["position_ids"] = _positions(before, torch.gather(source, 1, order), mask, compact)
    axes = (before[-3:] if before.dim() == 3 else before[None]).masked_fill(~real, 0)
    removed = real.sum(1) - mask.sum(1)  # [B]
    following = axes.amax((0, 2)) + 1 - (removed if compact and before.dim() == 2 else 0)
    if kwargs.get("cache_position") is not None:
        pruned["cache_position"] = kwargs["cache_position"][:longest]
    origin = source.masked_fill(loose | ~alive, EXTRA).gather(1, order)
    return pruned, PrunedPrompt(length, order, mask, following, origin)


def _positions(before: Tensor, source: Tensor, mask: Tensor, compact: bool) -> Tensor:
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    if before.dim() == 3:
        kept = before.gather(2, source.expand(len(before), -1, -1))
        if len(kept) == 4:  # the first axis is for masks alone: it tells where packed sequences end
            kept = torch.cat([counted[None].to(kept.dtype), kept[1:]])
        return kept
    return counted if compact else torch.gather(before, 1, source)
