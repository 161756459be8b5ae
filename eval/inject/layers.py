"""Methods inside the language model: visual tokens leave between two of its layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from eval.budget import Budget
from eval.inject.adapter import Adapter, Rotary
from eval.inject.calls import Calls, Sample, SampleRecord, Trace, real_positions
from eval.inject.encoder import ImageCache
from eval.inject.layout import NEWLINE, PlacedImage
from eval.inject.shorten import Edit, Keywords, Shortened
from pruners import InLLMPruner, LayerTokens
from pruners.base import EXTRA


@dataclass(frozen=True)
class _Frame:
    """The prompt as a stretch of layers sees it: B rows of L positions, n of them visual tokens."""

    visual: Tensor  # [B, n] positions of the visual tokens, ascending
    tokens: Tensor  # [B, n] which of the prompt's visual tokens they are; EXTRA: merged
    places: Tensor  # [B, L] positions in the unpruned prompt; merged tokens have that of the last visual token they met
    columns: Tensor  # [B, L] positions in the unpruned prompt whose rows and columns of its mask they take, ascending
    real: Tensor  # [B, L] False at padding
    text: Tensor  # [B, L] True at real positions behind the last image
    asked: Tensor  # [B, L] True where the pruner wants the attention

    @property
    def counted(self) -> Tensor:
        """[B, L] the real positions numbered through."""
        return (self.real.cumsum(1) - 1).clamp_min(0)

    def cut(self, chosen: Tensor) -> tuple["_Frame", Tensor]:
        """The frame behind a choice [B, k] of visual tokens, and [B, L-n+k], the position each of its positions was.

        Merged tokens stand behind the last image and the kept ones, and were the last visual token.
        """
        length, count = self.real.shape[1], self.visual.shape[1]
        merged, index = chosen == EXTRA, chosen.clamp_min(0)
        stays = torch.ones_like(self.real).scatter(1, self.visual, False)
        others = stays.sort(dim=1, descending=True, stable=True).indices[:, : length - count]
        taken = torch.where(merged, self.visual[:, -1:], self.visual.gather(1, index))
        source, item = torch.cat([others, taken], 1).sort(dim=1, stable=True)
        # a mask knows order and padding only: where merged tokens share a position, what stands before gives way to the left
        step = torch.arange(source.shape[1], device=source.device)
        own = (source - step).flip(1).cummin(1).values.flip(1) + step
        frame = _Frame(
            visual=item.argsort(1)[:, length - count :],
            tokens=torch.where(merged, EXTRA, self.tokens.gather(1, index)),
            places=self.places.gather(1, source),
            columns=self.columns.gather(1, own),
            real=self.real.gather(1, own),
            text=self.text.gather(1, own),
            asked=self.asked.gather(1, own),
        )
        return frame, source


class Layers(Calls):
    """Pre-hooks on every decoder layer: at a scheduled one tokens leave, behind it every layer gets masks and positions to fit.

    The language model goes on counting the unpruned prompt; the caches of its layers hold different numbers of positions.
    """

    def __init__(self, adapter: Adapter, pruner: InLLMPruner, budget: Budget, trace: Trace, cache: ImageCache | None) -> None:
        super().__init__(adapter, budget, trace, cache)
        self.pruner = pruner
        self.reindexes = getattr(pruner, "positions", "original") == "reindex"
        self.past = 0  # positions the first layer's cache holds, 0 during a prompt
        self.samples: list[Sample] = []
        self.prompts: list[int] = []  # real positions of every row
        self.shortened: Shortened | None = None  # without the newlines between tiles, where the layout has none
        self.width = 0  # positions of the prompt as the layers meet it, padding included
        self.spans: list[tuple[int, int]] = []  # row and visual tokens of every image
        self.crops: list[tuple[int, tuple[int, int]]] = []  # row and grid of every crop
        self.plan: dict[int, int] = {}
        self.frames: dict[int, _Frame] = {}  # by the first layer that sees them
        self.diagnostics: list[dict[str, Tensor]] = []  # of every cut
        self.fitting: Keywords = {}  # what the layers behind the last cut get in this call
        self.projected: dict[tuple[str, int], Tensor] = {}  # queries and keys of the layers before a cut

    def hooks(self) -> Iterator[Any]:
        yield from super().hooks()
        attention = "attention" in self.pruner.needs and self.pruner.attention_of == "previous"
        for number, layer in enumerate(self.adapter.layers):
            yield layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            queries, keys = self.adapter.projections(number)
            if attention:
                yield queries.register_forward_hook(partial(self._store, "queries", number))
            if attention or "keys" in self.pruner.needs:
                yield keys.register_forward_hook(partial(self._store, "keys", number))

    def _prompt(self, kwargs: Keywords, visual: Tensor, images: list[PlacedImage]) -> Keywords:
        self.past, self.fitting, self.plan, self.frames, self.diagnostics, self.shortened = 0, {}, {}, {}, [], None
        self.projected.clear()
        self.samples = self.trace.take(len(visual))
        real = real_positions(kwargs, visual)
        if images and not self.adapter.keeps_newlines:
            edits = [Edit(image.row, image.places, image.places[image.tokens != NEWLINE]) for image in images]
            self.shortened = Shortened(kwargs, real, edits, compact=True)
            kwargs, real = self.shortened.kwargs, self.shortened.mask.bool()
            visual = torch.zeros_like(real)
            for edit in edits:
                visual[edit.row, self.shortened.moved(edit.places[: len(edit.sources)], edit.row)] = True
        sizes = [int((image.tokens != NEWLINE).sum()) if self.shortened else len(image.places) for image in images]
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

    def _schedule(self, visual: Tensor, real: Tensor, embeddings: Tensor, budgets: list[int]) -> None:
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
        self.frames[0] = _Frame(where, tokens, places, places, real, text, asked)

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        self.past, self.fitting = past, {}
        return self.shortened.step(kwargs, past) if self.shortened else kwargs

    def _store(self, what: str, number: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if not self.past and number + 1 in self.plan:
            self.projected[what, number] = output.detach()

    def _before(
        self, number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords
    ) -> tuple[tuple[Any, ...], Keywords] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number in self.plan:
            if not self.past:
                hidden = self._cut(number, hidden, (kwargs | self.fitting)["position_embeddings"])
            self.fitting = self._fit(self.frames[number], hidden, kwargs)
            if number == max(self.plan) and not self.past:
                self._record()
        if not self.fitting:
            return None
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (hidden, *args[1:]), rest | self.fitting

    def _cut(self, number: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Ask the pruner, note the new frame, and return the hidden states that go on."""
        frame, keep = self.frames[max(self.frames)], self.plan[number]
        with torch.no_grad():
            tokens = self._tokens(number, frame, hidden, rotary)
        selection = self.pruner.prune(tokens, keep)
        index, count, passed = selection.indices, tokens.shape[1], self.pruner.passed(tokens.shape[1], keep)
        if selection.counts is not None or index.shape[1] != passed:
            self.pruner.fail(f"let {index.shape[1]} of {count} tokens pass before layer {number}; its schedule says {passed}")
        order = index.masked_fill(index == EXTRA, count)
        if bool((order[:, 1:] < order[:, :-1]).any()):
            self.pruner.fail("returned tokens that do not ascend, with merged ones behind them")
        if selection.features is not None and selection.space != "hidden":
            self.pruner.fail(f"returned features for the space {selection.space!r}; inside the language model it is 'hidden'")
        self.diagnostics.append(selection.diagnostics)
        self.frames[number], source = frame.cut(index)
        hidden = _rows(hidden, source)
        if selection.features is not None:
            places = self.frames[number].visual[..., None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.scatter(1, places, selection.features.to(hidden.dtype))
        return hidden

    def _tokens(self, number: int, frame: _Frame, hidden: Tensor, rotary: Rotary) -> LayerTokens:
        """What the pruner may look at before a layer, rows padded at the end."""
        needs, states, attention, asked, keys = self.pruner.needs, None, None, None, None
        if "attention" in needs:
            # rows padded at the end, with the first row again: it is finite
            count = frame.asked.sum(1, keepdim=True)
            places = frame.asked.sort(dim=1, descending=True, stable=True).indices[:, : max(1, int(count.max()))]
            asked = torch.arange(places.shape[1], device=places.device) < count
            attention = self._attention(number, frame, hidden, rotary, torch.where(asked, places, places[:, :1]))
        if "keys" in needs:
            keys = self.adapter.heads(number - 1, self.projected["keys", number - 1], rotary)
        if "hidden" in needs:
            states = self.adapter.normed(hidden) if self.pruner.normed else hidden
        self.projected.clear()
        # padding goes to the end: a method that looks at positions, as DART does, must not see how long other prompts are
        front = frame.real.sort(dim=1, descending=True, stable=True).indices
        return LayerTokens(
            visual=frame.counted.gather(1, frame.visual),
            text=frame.text.gather(1, front),
            hidden=None if states is None else _rows(states, front),
            attention=None if attention is None else _rows(attention.transpose(1, 3), front).transpose(1, 3),
            asked=asked,
            keys=None if keys is None else _rows(keys.transpose(1, 2), front).transpose(1, 2),
        )

    def _attention(self, number: int, frame: _Frame, hidden: Tensor, rotary: Rotary, places: Tensor) -> Tensor:
        """[B, H, Q, L] softmax attention of the positions `places` [B, Q] in the layer the pruner names, in float32."""
        adapter = self.adapter
        if self.pruner.attention_of == "previous":
            number -= 1
            queries, keys = _rows(self.projected["queries", number], places), self.projected["keys", number]
        else:
            to_queries, to_keys = adapter.projections(number)
            entering = adapter.before_attention(number, hidden)
            queries, keys = to_queries(_rows(entering, places)), to_keys(entering)
        query = adapter.heads(number, queries, adapter.rotary_rows(rotary, places)).float()
        key = adapter.heads(number, keys, rotary).float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * adapter.scaling(number)
        seen = frame.real[:, None] & (torch.arange(hidden.shape[1], device=places.device) <= places[..., None])
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)

    def _fit(self, frame: _Frame, hidden: Tensor, kwargs: Keywords) -> Keywords:
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
        if self.reindexes:
            fitting["position_embeddings"] = self.adapter.rotary(hidden, positions)
        elif not self.past:
            fitting["position_embeddings"] = self.adapter.rotary_rows(kwargs["position_embeddings"], frame.places)
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
        names = {name for notes in self.diagnostics for name in notes}
        for row, sample in enumerate(self.samples):
            tokens = self.frames[max(self.frames)].tokens[row].tolist() if self.frames else []
            sizes = [size for owner, size in self.spans if owner == row]
            ends = list(accumulate(sizes))
            kept = [
                tuple(token - end + size for token in tokens if end - size <= token < end)
                for size, end in zip(sizes, ends, strict=True)
            ]
            counts = [len(indices) for indices in kept]
            if counts:
                counts[-1] += tokens.count(EXTRA)
            self.trace.records.append(
                SampleRecord(
                    id=sample.id,
                    visual_tokens=tuple(sizes),
                    kept_tokens=tuple(counts),
                    kept_indices=tuple(kept),
                    crops=tuple(grid for owner, grid in self.crops if owner == row),
                    prompt_tokens=self.prompts[row],
                    layer_tokens=tuple(layer_tokens),
                    diagnostics={
                        name: tuple(float(notes[name][row]) for notes in self.diagnostics if name in notes) for name in names
                    },
                )
            )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """[B, L, ...] -> [B, K, ...]: the positions `index` [B, K] of every row."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]
