"""Methods before the language model: they remove visual tokens from its input."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.budget import Budget
from secateur.families.base import NEWLINE, Adapter
from secateur.families.contract import Keywords
from secateur.injection.audit import ImageAudit, Sample, Trace, audit_before_llm
from secateur.injection.encoder import ImageCache
from secateur.injection.hooks import Hooks, real_positions
from secateur.injection.prompt import Edit, PlacedImage, PrunedPrompt, prune_prompt
from secateur.injection.tower import TowerMerging
from secateur.pruners import EXTRA, Pruner, PrunerError, Selection, VisualTokens
from secateur.pruners.tower import TowerPruner

if TYPE_CHECKING:  # few methods need CLIP beside the model
    from secateur.injection.clip import ClipRelevance

# captures that the image encoder does not make
_TEXT = frozenset({"text_embeddings"})
_CLIP = frozenset({"clip_patches", "clip_text"})


@dataclass(frozen=True)
class Kept:
    """One crop's row of a selection."""

    indices: Tensor  # [K] positions in the crop, or EXTRA
    features: Tensor | None  # [K, D] in LLM width
    notes: dict[str, float]
    unplaced: int = 0  # of the last tokens, see `Selection`

    @property
    def loose(self) -> Tensor:
        """[K] which tokens have no place of their own in the image."""
        places = torch.arange(len(self.indices), device=self.indices.device)
        return places >= len(self.indices) - self.unplaced


class BeforeLLM(Hooks):
    """Removes visual tokens from the input of the language model."""

    def __init__(
        self,
        adapter: Adapter,
        pruner: Pruner,
        budget: Budget,
        trace: Trace,
        cache: ImageCache | None,
        compact: bool,
        clip: "ClipRelevance | None",
    ) -> None:
        self.pruner, self.compact, self.clip = pruner, compact, clip
        super().__init__(adapter, budget, trace, cache)
        self.pruned: PrunedPrompt
        if pruner.needs & _CLIP and clip is None:
            raise ValueError(
                f"pruner {pruner.name!r} compares with the question in CLIP's space: give "
                "inject(clip=...), in configs model.clip, or set relevance_space, "
                "where the pruner has it, to a value that needs no CLIP text tower"
            )
        adapter.check_known(self._encoded())

    def _encoded(self) -> frozenset[str]:
        needs = self.pruner.needs - _TEXT
        return (needs - _CLIP) | {"encoder_features"} if needs & _CLIP else needs

    def _merging(self) -> TowerMerging | None:
        if not isinstance(self.pruner, TowerPruner):
            return None
        return TowerMerging(self.adapter, self.pruner, self.budget)

    def _prompt(self, kwargs: Keywords, visual: Tensor, images: list[PlacedImage]) -> Keywords:
        samples = self.trace.take(len(visual))
        selected = self._select(images, samples, kwargs["inputs_embeds"])
        merged = [
            merge_crops(
                image,
                kept,
                self.adapter.keeps_newlines,
                self.pruner.merges,
                self.adapter.crops_in_turn,
            )
            for image, kept in zip(images, selected, strict=True)
        ]
        edits = [edit for edit, _ in merged]
        kwargs, self.pruned = prune_prompt(
            kwargs, real_positions(kwargs, visual), edits, self.compact
        )
        kwargs = self.adapter.pruned_arguments(kwargs, self.pruned.origin)
        self.trace.pruned = self.pruned
        for row, (sample, length) in enumerate(
            zip(samples, self.pruned.mask.sum(1).tolist(), strict=True)
        ):
            mine = [audit for edit, audit in merged if edit.row == row]
            self.trace.audits.append(
                audit_before_llm(sample.id, mine, length, len(self.adapter.layers))
            )
        return kwargs

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        return self.pruned.step(kwargs, past)

    def _select(
        self, images: list[PlacedImage], samples: list[Sample], embeds: Tensor
    ) -> list[list[Kept]]:
        """The kept tokens per image and crop.

        Crops of one size and one kind of question go to the pruner together. Where a budget does
        not divide evenly, the crops of an image have two different budgets. All its crops are then
        pruned with each of them, since a method may compare the crops of an image.
        """
        questions = {image.row: self._text(samples[image.row]) for image in images}
        # image, crop, what the pruner sees of it, its budget
        rows: list[tuple[int, int, VisualTokens, int]] = []
        for number, image in enumerate(images):
            name = f"{samples[image.row].id}|{image.number}"
            for crop, (tokens, keep) in enumerate(
                self._crops(image, name, questions[image.row], embeds)
            ):
                rows.append((number, crop, tokens, keep))
        kept: dict[tuple[int, int], Kept] = {}
        rows.sort(key=lambda row: _kind(row[2]))
        for _, group in groupby(rows, key=lambda row: _kind(row[2])):
            members = list(group)
            for keep in sorted({own for *_, own in members}):
                owners = {number for number, _, _, own in members if own == keep}
                whole = [row for row in members if row[0] in owners]
                selection = self._prune(
                    _batch([tokens for _, _, tokens, _ in whole], [n for n, *_ in whole]), keep
                )
                for (number, crop, _, own), mine in zip(whole, self._kept(selection), strict=True):
                    if own == keep:
                        kept[number, crop] = mine
        return [
            [kept[key] for key in sorted(kept) if key[0] == number] for number in range(len(images))
        ]

    def _kept(self, selection: Selection) -> Iterator[Kept]:
        """The rows of a selection."""
        features, width = selection.features, selection.indices.shape[1]
        if features is not None and selection.space == "encoder":
            if self.adapter.merges_projected and not self.pruner.merges:
                self.pruner.fail(
                    "returned features of the image encoder, which this model does not project; "
                    "with the class attribute merges = True it gets projected ones instead"
                )
            features = self.adapter.project(features)
        counts = (
            [width] * len(selection.indices)
            if selection.counts is None
            else selection.counts.tolist()
        )
        notes = {name: values.tolist() for name, values in selection.diagnostics.items()}
        for row, count in enumerate(counts):
            mine = None if features is None else features[row, :count]
            yield Kept(
                selection.indices[row, :count],
                mine,
                {name: values[row] for name, values in notes.items()},
                selection.unplaced,
            )

    def _crops(
        self, image: PlacedImage, name: str, question: dict[str, Tensor], embeds: Tensor
    ) -> Iterator[tuple[VisualTokens, int]]:
        """What the pruner sees of each crop of an image, and the crop's budget."""
        if len(image.sections) > 1 and self.pruner.packed:
            features = embeds[image.row, image.places]
            if not self.adapter.keeps_newlines:
                features = features[image.tokens != NEWLINE]
            keep = self.budget.of_sequence(len(features), image.crops, image.per_crop)
            yield VisualTokens(features[None], sample_ids=(name,), **question), keep  # type: ignore[arg-type]
            return
        captures, count = self._captures(image.captures), image.crops
        seen = [
            {key: value[crop : crop + 1] for key, value in captures.items()}
            for crop in range(count)
        ]
        if image.mosaic is None or len(image.sections) == count:
            keeps = self.budget.of_crops(count, image.per_crop, self.adapter.equal_shares)
        else:
            seen.append(self._captures(image.mosaic.captures))
            keeps = self.budget.of_sections([rows * columns for rows, columns in image.sections])
        for number, (mine, grid, keep) in enumerate(zip(seen, image.sections, keeps, strict=True)):
            ids = (name if len(seen) == 1 else f"{name}.{number}",)
            yield VisualTokens(**mine, **question, grid=grid, sample_ids=ids), keep  # type: ignore[arg-type]

    def _captures(self, captures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Captures of the image encoder as the pruner gets them."""
        captures = dict(captures)
        if self.clip is not None and self.pruner.needs & _CLIP:
            patches = (
                captures["encoder_features"]
                if "encoder_features" in self.pruner.needs
                else captures.pop("encoder_features")
            )
            captures["clip_patches"] = self.clip.patches(patches)
        if self.adapter.merges_projected and self.pruner.merges and "encoder_features" in captures:
            captures["encoder_features"] = captures["features"]
        return captures

    def _prune(self, tokens: VisualTokens, keep: int) -> Selection:
        selection = self.pruner.prune(tokens, keep)
        kept = selection.indices.shape[1]
        if kept != keep and not self.pruner.adaptive and self.pruner.name != "none":
            raise PrunerError(
                f"pruner {self.pruner.name!r} kept {kept} tokens of {tokens.shape[1]}; the budget "
                f"is {keep}"
            )
        return selection

    def _text(self, sample: Sample) -> dict[str, Tensor]:
        """The question in the form that the pruner needs, one row."""
        needs, made = self.pruner.needs, {}
        announced = {"text_embeddings": sample.question_ids, "clip_text": sample.question}
        if any(announced[name] is None for name in needs & announced.keys()):
            raise ValueError(
                f"pruner {self.pruner.name!r} reads the question, which was not announced: "
                "call trace.announce([Sample(id, question_ids, question)]) before the model"
            )
        if "text_embeddings" in needs:
            ids = torch.as_tensor(sample.question_ids, dtype=torch.long, device=self.adapter.device)
            if ids.dim() != 1:
                raise ValueError(
                    f"question_ids of sample {sample.id!r} have the shape {tuple(ids.shape)}; give "
                    "one row of token ids, such as ids[0].tolist()"
                )
            made["text_embeddings"] = self.adapter.embed(ids)[None]
            made["text_mask"] = torch.ones_like(ids, dtype=torch.bool)[None]
        if "clip_text" in needs:
            assert self.clip is not None
            assert sample.question is not None
            made["clip_text"] = self.clip.text(sample.question)[None]
        return made


def _kind(tokens: VisualTokens) -> tuple[int, ...]:
    """Rows that agree in this can be pruned together: tokens, grid, segments of text."""
    segments = -1 if tokens.clip_text is None else tokens.clip_text.shape[1]
    return (tokens.shape[1], *(tokens.grid or (0, 0)), segments)


def _batch(rows: list[VisualTokens], images: list[int]) -> VisualTokens:
    """Rows of one kind as a batch; texts of different lengths are padded at the end."""
    tensors: dict[str, Tensor] = {}
    for name in rows[0].tensors():
        parts = [row.tensors()[name] for row in rows]
        if name.startswith("text_"):
            tensors[name] = nn.utils.rnn.pad_sequence([part[0] for part in parts], batch_first=True)
        else:
            tensors[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    ids = tuple(name for row in rows for name in row.sample_ids or ())
    owners = tuple(images) if len(set(images)) < len(images) else None
    return VisualTokens(**tensors, grid=rows[0].grid, image_of_row=owners, sample_ids=ids)


def merge_crops(
    image: PlacedImage,
    kept: list[Kept],
    keeps_newlines: bool,
    merges: bool,
    in_turn: bool = False,
) -> tuple[Edit, ImageAudit]:
    """Put an image's kept tokens into the order in which they enter the language model.

    One crop: the selection's order. Several crops: the base crop's tokens as selected; the tiles'
    tokens in the raster order of the whole mosaic, with the newlines of rows that still hold
    tokens; the extra tokens from the start of the tiles' rows; those from their end, and the tiles'
    tokens that have no place of their own. Tokens of padding, which have no place in the layout,
    are dropped. But where a method merges others into tokens with a place, they come last instead,
    so that what they hold is not lost. A mosaic stands for all tiles. With `in_turn` the crops
    follow one another as in the prompt, each in the order of its selection.
    """
    slots_of, counted, count = image.slots(), image.tokens != NEWLINE, len(image.sections)
    lines: Tensor | None = None  # the newlines that stay, where they are added here
    if len(kept) < count:  # one selection over the packed sequence
        slots = (
            torch.arange(len(image.tokens), device=image.tokens.device)[counted | keeps_newlines]
        )[kept[0].indices]
        numbers, key, vectors = image.tokens[slots], slots, None
    else:
        numbers = torch.cat(
            [
                # a mosaic comes after all crops
                torch.where(k.indices == EXTRA, EXTRA, k.indices + c * image.per_crop)
                for c, k in enumerate(kept)
            ]
        )
        slots = torch.where(numbers == EXTRA, -1, slots_of[numbers])
        # the base crop's tokens stay as selected
        loose = [
            (k.loose if k.unplaced else merges & (slot < 0)) & (c > 0 and not in_turn)
            for c, (k, slot) in enumerate(zip(kept, _by_crop(slots, kept), strict=True))
        ]
        slots = torch.where(torch.cat(loose), -1, slots)
        placeless = torch.cat(loose) | (numbers == EXTRA)
        key = torch.cat(
            [
                slots_of[c * image.per_crop] + torch.arange(len(slot), device=slot.device)
                if in_turn
                else _rank(k.indices, own, slot, c, image)
                for c, (k, own, slot) in enumerate(
                    zip(kept, loose, _by_crop(slots, kept), strict=True)
                )
            ]
        )
        vectors = (
            torch.cat([k.features for k in kept if k.features is not None])
            if kept[0].features is not None
            else None
        )
        placed = placeless | (slots >= 0)
        if not bool(placed.all()):
            numbers, slots, key = numbers[placed], slots[placed], key[placed]
            placeless = placeless[placed]
            vectors = None if vectors is None else vectors[placed]
        if keeps_newlines and (count > 1 or len(image.tokens) > image.per_crop):
            lines = image.newlines(numbers[~placeless])
            newline = torch.full_like(lines, NEWLINE)
            numbers, slots, key = (
                torch.cat([numbers, newline]),
                torch.cat([slots, lines]),
                torch.cat([key, lines]),
            )
            if vectors is not None:
                vectors = torch.cat([vectors, vectors.new_zeros(len(lines), vectors.shape[1])])
    extra = slots == -1
    if len(kept) > 1 or lines is not None:
        order = key.argsort(stable=True)
        numbers, slots, extra = numbers[order], slots[order], extra[order]
        vectors = None if vectors is None else vectors[order]
    if len(slots) > len(image.places):
        raise ValueError(
            f"{len(slots)} tokens do not fit into the {len(image.places)} places of an image; "
            "lower the budget"
        )
    # an extra token has the position of the place that it is moved to
    own = torch.arange(len(slots), device=slots.device)
    replaced = extra | ((numbers != NEWLINE) if vectors is not None else False)
    edit = Edit(
        image.row,
        image.places,
        image.places[torch.where(extra, own, slots)],
        vectors,
        replaced,
        extra,
    )
    before = len(image.tokens) if keeps_newlines else int(counted.sum())
    notes = {name: sum(k.notes[name] for k in kept) / len(kept) for name in kept[0].notes}
    return edit, ImageAudit(
        before,
        len(slots),
        tuple(numbers.tolist()),
        image.encoded_crops,
        notes,
        image.sections if image.mosaic else (),
    )


def _by_crop(values: Tensor, kept: list[Kept]) -> tuple[Tensor, ...]:
    """One value per kept token of an image -> those of each crop."""
    return values.split([len(crop.indices) for crop in kept])


def _rank(indices: Tensor, loose: Tensor, slots: Tensor, crop: int, image: PlacedImage) -> Tensor:
    """[K] sort keys of one crop's tokens among all of its image's tokens.

    The base crop comes first, then the tiles' tokens by their places, then extra tokens.

    Args:
        indices, loose, slots: [K] of the crop's tokens: where they are in the crop, whether they
            have no place of their own, their placeholders.
    """
    if crop == 0:
        return torch.arange(len(indices), device=indices.device) - len(indices)
    end, extra = len(image.tokens), indices == EXTRA
    leading = extra & ((~extra).cumsum(0) == 0)
    last = torch.where(leading, end + crop, end + len(image.sections) + crop)
    return torch.where(extra | loose, last, slots)
