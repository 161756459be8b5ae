"""Methods before the language model: visual tokens leave at its entrance."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.budget import Budget
from secateur.injection.adapter import Adapter
from secateur.injection.arrange import Kept, arrange
from secateur.injection.audit import at_the_entrance
from secateur.injection.calls import Calls, Sample, Trace, real_positions
from secateur.injection.contract import Keywords
from secateur.injection.encoder import ImageCache
from secateur.injection.layout import NEWLINE, PlacedImage
from secateur.injection.shorten import Shortened, shorten
from secateur.pruners import Pruner, PrunerError, Selection, VisualTokens

if TYPE_CHECKING:  # a pruned model needs no CLIP beside it as a rule
    from secateur.injection.clip import ClipRelevance

# captures that do not come out of the image encoder
_TEXT = frozenset({"text_embeddings"})
_CLIP = frozenset({"clip_patches", "clip_text"})


class Entrance(Calls):
    """Takes tokens out of what enters the language model."""

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
        self.shortened: Shortened
        if pruner.needs & _CLIP and clip is None:
            raise ValueError(
                f"pruner {pruner.name!r} compares with the question in CLIP's space: give inject(clip=...), in configs "
                "model.clip, or set relevance_space to a value that needs no CLIP text tower"
            )
        adapter.check_known(self._encoded())

    def _encoded(self) -> frozenset[str]:
        needs = self.pruner.needs - _TEXT
        return (needs - _CLIP) | {"encoder_features"} if needs & _CLIP else needs

    def _prompt(self, kwargs: Keywords, visual: Tensor, images: list[PlacedImage]) -> Keywords:
        samples = self.trace.take(len(visual))
        selected = self._select(images, samples, kwargs["inputs_embeds"])
        arranged = [
            arrange(image, kept, self.adapter.keeps_newlines)
            for image, kept in zip(images, selected, strict=True)
        ]
        edits = [edit for edit, _ in arranged]
        shorter, self.shortened = shorten(
            kwargs, real_positions(kwargs, visual), edits, self.compact
        )
        for row, (sample, length) in enumerate(
            zip(samples, self.shortened.mask.sum(1).tolist(), strict=True)
        ):
            mine = [audit for edit, audit in arranged if edit.row == row]
            self.trace.records.append(
                at_the_entrance(sample.id, mine, length, len(self.adapter.layers))
            )
        return shorter

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        return self.shortened.step(kwargs, past)

    def _select(
        self, images: list[PlacedImage], samples: list[Sample], embeds: Tensor
    ) -> list[list[Kept]]:
        """Per image and crop what goes on; crops of one size and kind of question go to the pruner together.

        A budget that the crops do not divide leaves them with two of their own: all crops are then pruned with either, since a
        method may compare the crops of an image.
        """
        questions = {image.row: self._text(samples[image.row]) for image in images}
        rows: list[
            tuple[int, int, VisualTokens, int]
        ] = []  # image, crop, what the pruner sees of it, its budget
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
            )

    def _crops(
        self, image: PlacedImage, name: str, question: dict[str, Tensor], embeds: Tensor
    ) -> Iterator[tuple[VisualTokens, int]]:
        """What the pruner sees of each crop of an image, and the crop's budget."""
        if image.crops > 1 and self.pruner.packed:
            features = embeds[image.row, image.places]
            if not self.adapter.keeps_newlines:
                features = features[image.tokens != NEWLINE]
            keep = self.budget.of_sequence(len(features), image.crops, image.per_crop)
            yield VisualTokens(features[None], sample_ids=(name,), **question), keep  # type: ignore[arg-type]
            return
        captures = dict(image.captures)
        if self.clip is not None and self.pruner.needs & _CLIP:
            patches = (
                captures["encoder_features"]
                if "encoder_features" in self.pruner.needs
                else captures.pop("encoder_features")
            )
            captures["clip_patches"] = self.clip.patches(patches)
        for crop, keep in enumerate(self.budget.of_crops(image.crops, image.per_crop)):
            mine = {key: value[crop : crop + 1] for key, value in captures.items()}
            ids = (name if image.crops == 1 else f"{name}.{crop}",)
            yield VisualTokens(**mine, **question, grid=image.grid, sample_ids=ids), keep  # type: ignore[arg-type]

    def _prune(self, tokens: VisualTokens, keep: int) -> Selection:
        selection = self.pruner.prune(tokens, keep)
        kept = selection.indices.shape[1]
        if kept != keep and not self.pruner.adaptive and self.pruner.name != "none":
            raise PrunerError(
                f"pruner {self.pruner.name!r} kept {kept} tokens of {tokens.shape[1]}; the budget is {keep}"
            )
        return selection

    def _text(self, sample: Sample) -> dict[str, Tensor]:
        """The question as the pruner needs it, one row."""
        needs, made = self.pruner.needs, {}
        announced = {"text_embeddings": sample.question_ids, "clip_text": sample.question}
        if any(announced[name] is None for name in needs & announced.keys()):
            raise ValueError(
                f"pruner {self.pruner.name!r} reads the question, which was not announced: "
                "call trace.announce([Sample(id, question_ids, question)]) before the model"
            )
        if "text_embeddings" in needs:
            ids = torch.tensor(sample.question_ids, dtype=torch.long, device=self.adapter.device)
            made["text_embeddings"] = self.adapter.embed(ids)[None]
            made["text_mask"] = torch.ones_like(ids, dtype=torch.bool)[None]
        if "clip_text" in needs:
            assert self.clip is not None
            assert sample.question is not None
            made["clip_text"] = self.clip.text(sample.question)[None]
        return made


def _kind(tokens: VisualTokens) -> tuple[int, ...]:
    """What rows must share to be pruned together: tokens, grid, segments of text."""
    segments = -1 if tokens.clip_text is None else tokens.clip_text.shape[1]
    return (tokens.shape[1], *(tokens.grid or (0, 0)), segments)


def _batch(rows: list[VisualTokens], images: list[int]) -> VisualTokens:
    """Rows of one kind as a batch; texts of different length are padded at the end."""
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
