"""A shorter prompt for the language model, and the steps behind it: embeddings, mask and positions stay consistent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.injection.contract import Keywords


@dataclass(frozen=True)
class Edit:
    """What becomes of one image's places [P] of a prompt: their first M hold what follows, the others leave."""

    row: int
    places: Tensor  # [P] ascending
    sources: Tensor  # [M] position whose embedding goes on
    vectors: Tensor | None = None  # [M, D] embeddings instead
    replaced: Tensor | None = None  # [M] True where `vectors` count; None: everywhere


@dataclass(frozen=True)
class Shortened:
    """The frame of a shortened prompt; it holds nothing of what the language model was called with."""

    length: int  # L, positions of the unpruned prompt
    order: Tensor  # [B, L'] which of them the positions are, padding on the left
    mask: Tensor  # [B, L'] 1 for real positions
    behind: Tensor  # [B] the first position behind each prompt

    def moved(self, places: Tensor, row: int) -> Tensor:
        """Where positions of the unpruned prompt that stayed stand now."""
        where = torch.full((self.length,), -1, device=places.device)
        where[self.order[row]] = torch.arange(self.order.shape[1], device=places.device)
        return where[places]

    def step(self, kwargs: Keywords, past: int) -> Keywords:
        """Behind the prompt `generate` still counts the unpruned frame: cut masks, shift positions.

        Args:
            past: positions in the cache, those of the shortened prompt and of what was generated.
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
        # whoever steps: `generate` hands over positions of the unpruned frame, the model's own forward would count the cache
        positions = (
            self.behind[:, None]
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


def shorten(
    kwargs: Keywords, real: Tensor, edits: list[Edit], compact: bool
) -> tuple[Keywords, Shortened]:
    """What the language model gets: the prompts of a call without the places that `edits` takes out, padded on the left.

    Args:
        kwargs: what it was called with; inputs_embeds [B, L, D].
        real: [B, L] False at padding.
        compact: number the shortened prompts through, instead of keeping every token's position. Positions of several axes
            (M-RoPE) are always kept.
    """
    embeds, attention_mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    batch, length, width = embeds.shape
    source = torch.arange(length, device=embeds.device).repeat(batch, 1)
    alive = real.clone()
    for edit in edits:
        alive[edit.row, edit.places] = False
        target = edit.places[: len(edit.sources)]
        source[edit.row, target], alive[edit.row, target] = edit.sources, True
    embeds = torch.gather(embeds, 1, source[..., None].expand(-1, -1, width))
    for edit in edits:
        if edit.vectors is not None:
            new = slice(None) if edit.replaced is None else edit.replaced
            embeds[edit.row, edit.places[: len(edit.sources)][new]] = edit.vectors[new].to(
                embeds.dtype
            )

    # a stable sort moves dropped places to the left and keeps the order of the others: left padding of the longest row
    longest = int(alive.sum(1).max())
    order = torch.sort(alive.long(), dim=1, stable=True).indices[:, -longest:]
    mask = torch.gather(alive, 1, order).long()
    shorter = dict(
        kwargs, inputs_embeds=torch.gather(embeds, 1, order[..., None].expand(-1, -1, width))
    )
    # never None: without a mask transformers reads gaps between positions as borders of packed sequences
    shorter["attention_mask"] = mask if attention_mask is None else mask.to(attention_mask.dtype)
    before = (
        (real.long().cumsum(1) - 1).clamp_min(0)
        if kwargs.get("position_ids") is None
        else kwargs["position_ids"]
    )
    before = before.expand(*before.shape[:-2], batch, -1)
    shorter["position_ids"] = _positions(before, torch.gather(source, 1, order), mask, compact)
    axes = (before[-3:] if before.dim() == 3 else before[None]).masked_fill(~real, 0)
    removed = real.sum(1) - mask.sum(1)  # [B]
    behind = (
        axes.amax((0, 2)) + 1 - (removed if compact and before.dim() == 2 else 0)
    )  # with compact positions, of the shortened
    if kwargs.get("cache_position") is not None:
        shorter["cache_position"] = kwargs["cache_position"][:longest]
    return shorter, Shortened(length, order, mask, behind)


def _positions(before: Tensor, source: Tensor, mask: Tensor, compact: bool) -> Tensor:
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    if before.dim() == 3:
        kept = before.gather(2, source.expand(len(before), -1, -1))
        if len(kept) == 4:  # the first axis only tells masks where packed sequences end
            kept = torch.cat([counted[None].to(kept.dtype), kept[1:]])
        return kept
    return counted if compact else torch.gather(before, 1, source)
