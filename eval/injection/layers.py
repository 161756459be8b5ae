"""Methods inside the language model: visual tokens leave between two of its layers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.budget import Budget
from secateur.injection.adapter import Adapter, Rotary
from secateur.injection.audit import between_layers
from secateur.injection.calls import Calls, Sample, Trace, real_positions
from secateur.injection.contract import Arguments, Keywords, require
from secateur.injection.encoder import ImageCache
from secateur.injection.frame import Frame, rows_at
from secateur.injection.layer_captures import LayerCaptures
from secateur.injection.layout import NEWLINE, PlacedImage
from secateur.injection.shorten import Edit, Shortened, shorten
from secateur.pruners import InLLMPruner
from secateur.pruners.base import EXTRA


class Layers(Calls):
    """Pre-hooks on every decoder layer: at a scheduled one tokens leave, behind it every layer gets masks and positions to fit.

    The language model goes on counting the unpruned prompt; the caches of its layers hold different numbers of positions.
    """

    def __init__(
        self,
        adapter: Adapter,
        pruner: InLLMPruner,
        budget: Budget,
        trace: Trace,
        cache: ImageCache | None,
    ) -> None:
        super().__init__(adapter, budget, trace, cache)
        require(adapter.language_model, *adapter.LANGUAGE_PARTS)
        self.pruner = pruner
        self.captures = LayerCaptures(adapter, pruner)
        self.layer_arguments = Arguments(
            adapter.layers[0].forward,
            "hidden_states",
            "attention_mask",
            "position_ids",
            "position_embeddings",
        )
        self.past = 0  # positions the first layer's cache holds, 0 during a prompt
        self.samples: list[Sample] = []
        self.prompts: list[int] = []  # real positions of every row
        self.shortened: Shortened | None = (
            None  # without the newlines between tiles, where the layout has none
        )
        self.width = 0  # positions of the prompt as the layers meet it, padding included
        self.spans: list[tuple[int, int]] = []  # row and visual tokens of every image
        self.crops: list[tuple[int, tuple[int, int]]] = []  # row and grid of every crop
        self.plan: dict[int, int] = {}
        self.frames: dict[int, Frame] = {}  # by the first layer that sees them
        self.diagnostics: list[dict[str, Tensor]] = []  # of every cut
        self.fitting: Keywords = {}  # what the layers behind the last cut get in this call

    def hooks(self) -> Iterator[Any]:
        yield from super().hooks()
        for number, layer in enumerate(self.adapter.layers):
            yield layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
        yield from self.captures.hooks(lambda number: not self.past and number + 1 in self.plan)

    def _prompt(self, kwargs: Keywords, visual: Tensor, images: list[PlacedImage]) -> Keywords:
        self.past, self.fitting, self.plan, self.frames, self.diagnostics, self.shortened = (
            0,
            {},
            {},
            {},
            [],
            None,
        )
        self.captures.projected.clear()
        self.samples = self.trace.take(len(visual))
        real = real_positions(kwargs, visual)
        if images and not self.adapter.keeps_newlines:
            edits = [
                Edit(image.row, image.places, image.places[image.tokens != NEWLINE])
                for image in images
            ]
            kwargs, self.shortened = shorten(kwargs, real, edits, compact=True)
            real = self.shortened.mask.bool()
            visual = torch.zeros_like(real)
            for edit in edits:
                visual[
                    edit.row, self.shortened.moved(edit.places[: len(edit.sources)], edit.row)
                ] = True
        sizes = [
            int((image.tokens != NEWLINE).sum()) if self.shortened else len(image.places)
            for image in images
        ]
        self.spans = [(image.row, size) for image, size in zip(images, sizes, strict=True)]
        self.crops = [(image.row, image.grid) for image in images for _ in range(image.crops)]
        self.prompts, self.width = real.sum(1).tolist(), real.shape[1]
        if images:
            budgets = [0] * len(visual)
            for image, size in zip(images, sizes, strict=True):
                budgets[image.row] += self.budget.of_sequence(size, image.crops, image.per_crop)
            self._schedule(visual, real, kwargs["inputs_embeds"], budgets)
        if not self.plan:
            self._record()
        return kwargs

    def _schedule(
        self, visual: Tensor, real: Tensor, embeddings: Tensor, budgets: list[int]
    ) -> None:
        """Ask the pruner for its plan and its queries; both masks are [B, L], the budgets those of the rows."""
        batch, length = visual.shape
        counts = visual.sum(1).tolist()
        if len(set(counts)) > 1 or len(set(budgets)) > 1:
            raise ValueError(
                f"budgets of {', '.join(map(str, budgets))} of {', '.join(map(str, counts))} visual tokens in the prompts of a "
                f"batch: pruner {self.pruner.name!r} acts inside the language model, where all must be equal; use batch size 1"
            )
        layers = len(self.adapter.layers)
        self.plan = self.pruner.schedule(counts[0], layers, budgets[0])
        if not all(0 < number < layers for number in self.plan):
            self.pruner.fail(
                f"cannot act before layers {sorted(self.plan)}: the model has 0..{layers - 1}, and 0 sees all tokens"
            )

        where = visual.nonzero()[:, 1].view(batch, -1)
        places = torch.arange(length, device=visual.device).expand(batch, -1)
        text = real & (places > where[:, -1:])
        if not bool(text.any(1).all()):
            self.pruner.fail("the prompt needs text behind the image")
        with torch.no_grad():
            asked = self.pruner.queries(embeddings, where, text)
        tokens = torch.arange(counts[0], device=visual.device).expand(batch, -1)
        self.frames[0] = Frame(where, tokens, places, places, real, text, asked)

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        self.past, self.fitting = past, {}
        return self.shortened.step(kwargs, past) if self.shortened else kwargs

    def _before(
        self, number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords
    ) -> tuple[tuple[Any, ...], Keywords] | None:
        kwargs = self.layer_arguments.read(args, kwargs)
        hidden = kwargs.pop("hidden_states")
        if number in self.plan:
            if not self.past:
                hidden = self._cut(number, hidden, (kwargs | self.fitting)["position_embeddings"])
            self.fitting = self._fit(self.frames[number], hidden, kwargs)
            if number == max(self.plan) and not self.past:
                self._record()
        if not self.fitting:
            return None
        return (hidden,), self.layer_arguments.write(kwargs | self.fitting)

    def _cut(self, number: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Ask the pruner, note the new frame, and return the hidden states that go on."""
        frame, keep = self.frames[max(self.frames)], self.plan[number]
        tokens = self.captures.tokens(number, frame, hidden, rotary)
        selection = self.pruner.prune(tokens, keep)
        index, count, passed = (
            selection.indices,
            tokens.shape[1],
            self.pruner.passed(tokens.shape[1], keep),
        )
        if selection.counts is not None or index.shape[1] != passed:
            self.pruner.fail(
                f"let {index.shape[1]} of {count} tokens pass before layer {number}; its schedule says {passed}"
            )
        order = index.masked_fill(index == EXTRA, count)
        if bool((order[:, 1:] < order[:, :-1]).any()):
            self.pruner.fail("returned tokens that do not ascend, with merged ones behind them")
        if selection.features is not None and selection.space != "hidden":
            self.pruner.fail(
                f"returned features for the space {selection.space!r}; inside the language model it is 'hidden'"
            )
        self.diagnostics.append(selection.diagnostics)
        self.frames[number], source = frame.cut(index)
        hidden = rows_at(hidden, source)
        if selection.features is not None:
            places = self.frames[number].visual[..., None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.scatter(1, places, selection.features.to(hidden.dtype))
        return hidden

    def _fit(self, frame: Frame, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """What layers of a frame get in place of the mask and the positions that the language model made for all its layers."""
        batch, length = hidden.shape[:2]
        positions, columns, width = frame.counted, frame.columns, self.width
        if self.past:
            width = self.past + length
            behind = torch.arange(self.width, width, device=hidden.device).expand(batch, -1)
            columns = torch.cat([columns, behind], 1)
            positions = positions[:, -1:] + 1 + behind[:, -length:] - self.width
        # numbered through whatever the rotary embedding says: FlashAttention takes gaps for borders of packed sequences
        fitting: Keywords = {"position_ids": positions}
        if kwargs.get("attention_mask") is not None:
            fitting["attention_mask"] = self._mask(kwargs["attention_mask"], columns, width)
        if self.pruner.positions == "reindex":
            fitting["position_embeddings"] = self.adapter.rotary(hidden, positions)
        elif not self.past:
            fitting["position_embeddings"] = self.adapter.rotary_rows(
                kwargs["position_embeddings"], frame.places
            )
        if kwargs.get("cache_position") is not None:
            fitting["cache_position"] = kwargs["cache_position"][:length]
        return fitting

    def _mask(self, mask: Any, columns: Tensor, width: int) -> Tensor:
        """The mask of all T = `width` positions, [B, T] for FlashAttention, else [B or 1, 1, rows, T] -> of `columns` [B, K]."""
        if not isinstance(mask, Tensor) or mask.shape[-1] != width:
            what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the layers got the attention mask {what} for {width} positions; methods inside the language model need a "
                "dynamic cache, and sdpa, eager or flash_attention_2"
            )
        if mask.dim() == 2:
            return mask.gather(1, columns)
        mask = mask.expand(len(columns), -1, -1, -1)
        if not self.past:  # the rows are those of the prompt too
            mask = mask.gather(2, columns[:, None, :, None].expand(*mask.shape[:2], -1, width))
        return mask.gather(3, columns[:, None, None].expand(*mask.shape[:3], -1))

    def _record(self) -> None:
        """Add the audit of the prompt."""
        layer_tokens, count = [], 0
        for number in range(len(self.adapter.layers)):
            count = self.frames[number].visual.shape[1] if number in self.frames else count
            layer_tokens.append(count)
        left = (
            self.frames[max(self.frames)].tokens.tolist()
            if self.frames
            else [[] for _ in self.samples]
        )
        for row, (sample, tokens) in enumerate(zip(self.samples, left, strict=True)):
            record = between_layers(
                sample.id,
                [size for owner, size in self.spans if owner == row],
                tokens,
                tuple(grid for owner, grid in self.crops if owner == row),
                self.prompts[row],
                tuple(layer_tokens),
                [
                    {name: float(values[row]) for name, values in notes.items()}
                    for notes in self.diagnostics
                ],
            )
            self.trace.records.append(record)
