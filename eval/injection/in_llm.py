"""Methods inside the language model: they remove visual tokens between two of its layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.budget import Budget
from secateur.families.base import NEWLINE, Adapter, Rotary
from secateur.families.contract import Arguments, Keywords, require
from secateur.injection.audit import Sample, Trace, audit_in_llm
from secateur.injection.encoder import ImageCache
from secateur.injection.hooks import Hooks, real_positions
from secateur.injection.prompt import Edit, PlacedImage, PrunedPrompt, prune_prompt
from secateur.pruners import EXTRA, InLLMPruner, LayerTokens


@dataclass(frozen=True)
class Frame:
    """The prompt as the layers between two cuts see it.

    B rows of L positions, n of them visual tokens.
    """

    visual: Tensor  # [B, n] positions of the visual tokens, ascending
    tokens: Tensor  # [B, n] their numbers among the prompt's visual tokens; EXTRA: merged
    # [B, L] positions in the unpruned prompt; a merged token has that of the last visual token
    places: Tensor
    # [B, L] ascending; the positions in the unpruned prompt whose rows and columns of the mask
    # these positions use
    columns: Tensor
    real: Tensor  # [B, L] False at padding
    text: Tensor  # [B, L] True at real positions after the last image
    asked: Tensor  # [B, L] True at the positions whose attention the pruner reads
    # [B, L] what layers add to the scores of a position's key; None: nothing
    bias: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """[B, L] consecutive numbers of the real positions."""
        return (self.real.cumsum(1) - 1).clamp_min(0)

    def cut(self, chosen: Tensor) -> tuple["Frame", Tensor]:
        """Keep a choice [B, k] of visual tokens.

        Merged tokens come after the kept ones of the last image, from the last visual token's
        position.

        Returns:
            The new frame, and [B, L-n+k] the old position of each of its positions.
        """
        length, count = self.real.shape[1], self.visual.shape[1]
        merged, index = chosen == EXTRA, chosen.clamp_min(0)
        stays = torch.ones_like(self.real).scatter(1, self.visual, False)
        others = stays.sort(dim=1, descending=True, stable=True).indices[:, : length - count]
        taken = torch.where(merged, self.visual[:, -1:], self.visual.gather(1, index))
        source, item = torch.cat([others, taken], 1).sort(dim=1, stable=True)
        # Shift earlier tokens left where merged tokens share a position: a mask knows only order
        # and padding
        step = torch.arange(source.shape[1], device=source.device)
        own = (source - step).flip(1).cummin(1).values.flip(1) + step
        frame = Frame(
            visual=item.argsort(1)[:, length - count :],
            tokens=torch.where(merged, EXTRA, self.tokens.gather(1, index)),
            places=self.places.gather(1, source),
            columns=self.columns.gather(1, own),
            real=self.real.gather(1, own),
            text=self.text.gather(1, own),
            asked=self.asked.gather(1, own),
        )
        return frame, source


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """[B, L, ...] -> [B, K, ...]: the positions `index` [B, K] of every row."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


@dataclass
class _Prompt:
    """The prompt that is answered now."""

    samples: list[Sample] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # real positions of every row
    width: int = 0  # positions that the first layer sees, padding included
    # the prompt without newlines between tiles, where the layout has none
    pruned: PrunedPrompt | None = None
    images: list[tuple[int, int]] = field(default_factory=list)  # row and visual tokens
    crops: list[tuple[int, tuple[int, int]]] = field(default_factory=list)  # row and grid
    plan: dict[int, int] = field(default_factory=dict)  # layer -> tokens to keep before it
    frames: dict[int, Frame] = field(default_factory=dict)  # by the first layer that sees them
    # [B, n, D] what each of the first layers adds to the prompt's visual tokens (DeepStack)
    deepstack: list[Tensor] = field(default_factory=list)
    diagnostics: list[dict[str, Tensor]] = field(default_factory=list)  # of every cut


class LayerCaptures:
    """Stores queries and keys of the layers before a cut, and makes `LayerTokens` of them."""

    def __init__(self, adapter: Adapter, pruner: InLLMPruner) -> None:
        self.adapter, self.pruner = adapter, pruner
        self.projected: dict[tuple[str, int], Tensor] = {}

    def hooks(self, wanted: Callable[[int], bool]) -> Iterator[RemovableHandle]:
        """Forward hooks on the projections; `wanted` tells whether a layer's output is stored."""

        def store(what: str, number: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
            if wanted(number):
                self.projected[what, number] = output.detach()

        attention = "attention" in self.pruner.needs and self.pruner.attention_of == "previous"
        for number in range(len(self.adapter.layers)):
            queries, keys = self.adapter.projections(number)
            if attention:
                yield queries.register_forward_hook(partial(store, "queries", number))
            if attention or "keys" in self.pruner.needs:
                yield keys.register_forward_hook(partial(store, "keys", number))

    @torch.no_grad()
    def tokens(self, number: int, frame: Frame, hidden: Tensor, rotary: Rotary) -> LayerTokens:
        """What the pruner may read before layer `number`, rows padded at the end.

        Deletes what the hooks stored.
        """
        needs, states, attention, asked, keys = self.pruner.needs, None, None, None, None
        if "attention" in needs:
            # rows are padded at the end, with the first query again, which is finite
            count = frame.asked.sum(1, keepdim=True)
            places = frame.asked.sort(dim=1, descending=True, stable=True).indices[
                :, : max(1, int(count.max()))
            ]
            asked = torch.arange(places.shape[1], device=places.device) < count
            attention = self._attention(
                number, frame, hidden, rotary, torch.where(asked, places, places[:, :1])
            )
        if "keys" in needs:
            keys = self.adapter.heads(number - 1, self.projected["keys", number - 1], rotary)
        following = self._following(number, hidden, rotary) if "next_keys" in needs else {}
        if "hidden" in needs:
            states = self.adapter.normed(hidden) if self.pruner.apply_final_norm else hidden
        self.projected.clear()
        # padding goes to the end: a method that reads positions, as DART does, must not see the
        # lengths of other prompts
        front = frame.real.sort(dim=1, descending=True, stable=True).indices
        return LayerTokens(
            visual=frame.counted.gather(1, frame.visual),
            text=frame.text.gather(1, front),
            hidden=None if states is None else gather_rows(states, front),
            attention=None
            if attention is None
            else gather_rows(attention.transpose(1, 3), front).transpose(1, 3),
            query_mask=asked,
            keys=None if keys is None else gather_rows(keys.transpose(1, 2), front).transpose(1, 2),
            **{
                name: gather_rows(x.transpose(1, 2), front).transpose(1, 2)
                for name, x in following.items()
            },
        )

    def _following(self, number: int, hidden: Tensor, rotary: Rotary) -> dict[str, Tensor]:
        """Queries and keys [B, H, L, d] of layer `number`, which `hidden` is about to enter."""
        adapter = self.adapter
        to_queries, to_keys = adapter.projections(number)
        entering = adapter.before_attention(number, hidden)
        keys = to_keys(entering)
        rotated = adapter.heads(number, keys, rotary)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, rotated.shape[-1])).transpose(1, 2)

        return {
            "next_queries": heads(to_queries(entering)),
            "next_keys": heads(keys),
            "next_rotated_keys": rotated,
        }

    def _attention(
        self, number: int, frame: Frame, hidden: Tensor, rotary: Rotary, places: Tensor
    ) -> Tensor:
        """[B, H, Q, L] softmax attention of the positions `places` [B, Q], in float32.

        It is that of layer `number`, or of the one before it, as the pruner says.
        """
        adapter = self.adapter
        if self.pruner.attention_of == "previous":
            number -= 1
            queries, keys = (
                gather_rows(self.projected["queries", number], places),
                self.projected["keys", number],
            )
        else:
            to_queries, to_keys = adapter.projections(number)
            entering = adapter.before_attention(number, hidden)
            queries, keys = to_queries(gather_rows(entering, places)), to_keys(entering)
        query = adapter.heads(number, queries, adapter.rotary_rows(rotary, places)).float()
        key = adapter.heads(number, keys, rotary).float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * adapter.scaling(number)
        seen = frame.real[:, None] & (
            torch.arange(hidden.shape[1], device=places.device) <= places[..., None]
        )
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)


class InLLM(Hooks):
    """Pre-hooks on every decoder layer.

    Before a scheduled layer tokens are removed; later layers get masks and positions to match. The
    language model itself still counts the unpruned prompt, and the caches of its layers hold
    different numbers of positions.
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
        kernel = adapter.language_model.config._attn_implementation
        if pruner.weighs_attention and kernel not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={kernel!r}: pruner {pruner.name!r} weights the attention of "
                "later layers, for which it needs sdpa or eager"
            )
        self.pruner = pruner
        self.captures = LayerCaptures(adapter, pruner)
        self.layer_arguments = Arguments(
            adapter.layers[0].forward,
            "hidden_states",
            "attention_mask",
            "position_ids",
            "position_embeddings",
        )
        self.past = 0  # positions in the first layer's cache; 0 during a prompt
        self.now = _Prompt()
        self.fitting: Keywords = {}  # arguments of the layers after the last cut, in this call

    def hooks(self) -> Iterator[Any]:
        yield from super().hooks()
        for number, layer in enumerate(self.adapter.layers):
            yield layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
        yield from self.captures.hooks(lambda number: not self.past and number + 1 in self.now.plan)

    def _prompt(self, kwargs: Keywords, visual: Tensor, images: list[PlacedImage]) -> Keywords:
        self.past, self.fitting, self.now = 0, {}, _Prompt()
        self.captures.projected.clear()
        now = self.now
        now.samples = self.trace.take(len(visual))
        real = real_positions(kwargs, visual)
        if images and not self.adapter.keeps_newlines:
            edits = [
                Edit(image.row, image.places, image.places[image.tokens != NEWLINE])
                for image in images
            ]
            kwargs, now.pruned = prune_prompt(kwargs, real, edits, compact=True)
            real = now.pruned.mask.bool()
            visual = torch.zeros_like(real)
            for edit in edits:
                placed = now.pruned.moved(edit.places[: len(edit.sources)], edit.row)
                visual[edit.row, placed] = True
        sizes = [
            int((image.tokens != NEWLINE).sum()) if now.pruned else len(image.places)
            for image in images
        ]
        now.images = [(image.row, size) for image, size in zip(images, sizes, strict=True)]
        now.crops = [(image.row, grid) for image in images for grid in image.encoded_crops]
        now.lengths, now.width = real.sum(1).tolist(), real.shape[1]
        if images:
            budgets = [0] * len(visual)
            for image, size in zip(images, sizes, strict=True):
                budgets[image.row] += self.budget.of_sequence(size, image.crops, image.per_crop)
            self._schedule(visual, real, kwargs["inputs_embeds"], budgets)
        if not now.plan:
            self._record()
            return kwargs
        # added here, because the language model would add them to the unpruned prompt
        kwargs, levels = self.adapter.without_deepstack(kwargs)
        now.deepstack = [level.unflatten(0, (len(visual), -1)) for level in levels]
        return kwargs

    def _schedule(
        self, visual: Tensor, real: Tensor, embeddings: Tensor, budgets: list[int]
    ) -> None:
        """Ask the pruner for its plan and its queries.

        Args:
            visual, real: [B, L] masks.
            budgets: of every row.
        """
        batch, length = visual.shape
        counts = visual.sum(1).tolist()
        if len(set(counts)) > 1 or len(set(budgets)) > 1:
            raise ValueError(
                f"budgets of {', '.join(map(str, budgets))} of {', '.join(map(str, counts))} "
                f"visual tokens in the prompts of a batch: pruner {self.pruner.name!r} acts inside "
                "the language model, where all must be equal; use batch size 1"
            )
        if batch > 1 and self.pruner.adaptive:
            raise ValueError(
                f"{batch} prompts in a batch: pruner {self.pruner.name!r} decides by the image how "
                "many tokens stay, inside the language model, where all must be equal; use batch "
                "size 1"
            )
        layers = len(self.adapter.layers)
        self.now.plan = self.pruner.schedule(counts[0], layers, budgets[0])
        if not all(0 < number < layers for number in self.now.plan):
            self.pruner.fail(
                f"cannot act before layers {sorted(self.now.plan)}: the model has 0..{layers - 1}, "
                "and 0 sees all tokens"
            )

        where = visual.nonzero()[:, 1].view(batch, -1)
        places = torch.arange(length, device=visual.device).expand(batch, -1)
        text = real & (places > where[:, -1:])
        if not bool(text.any(1).all()):
            self.pruner.fail("the prompt needs text after the image")
        with torch.no_grad():
            asked = self.pruner.queries(embeddings, where, text)
        tokens = torch.arange(counts[0], device=visual.device).expand(batch, -1)
        self.now.frames[0] = Frame(where, tokens, places, places, real, text, asked)

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        self.past, self.fitting = past, {}
        return self.now.pruned.step(kwargs, past) if self.now.pruned else kwargs

    def _before(
        self, number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords
    ) -> tuple[tuple[Any, ...], Keywords] | None:
        kwargs = self.layer_arguments.read(args, kwargs)
        hidden = kwargs.pop("hidden_states")
        deepened = not self.past and 0 < number <= len(self.now.deepstack)
        if deepened:
            hidden = self._deepened(self.now.deepstack[number - 1], hidden)
        if number in self.now.plan:
            if not self.past:
                hidden = self._cut(number, hidden, (kwargs | self.fitting)["position_embeddings"])
            self.fitting = self._fit(self.now.frames[number], hidden, kwargs)
            if number == max(self.now.plan) and not self.past:
                self._record()
        if not self.fitting and not deepened:
            return None
        return (hidden,), self.layer_arguments.write(kwargs | self.fitting)

    def _deepened(self, level: Tensor, hidden: Tensor) -> Tensor:
        """Add a level of DeepStack [B, n, D] to the visual tokens left; merged ones get none."""
        frame = self.now.frames[max(self.now.frames)]
        merged = frame.tokens == EXTRA
        added = gather_rows(level.to(hidden), frame.tokens.clamp_min(0))
        row, hidden = torch.arange(len(hidden), device=hidden.device)[:, None], hidden.clone()
        hidden[row, frame.visual] += added.masked_fill(merged[..., None], 0)
        return hidden

    def _cut(self, number: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Ask the pruner, store the new frame, and return the hidden states of the kept tokens."""
        frame, keep = self.now.frames[max(self.now.frames)], self.now.plan[number]
        tokens = self.captures.tokens(number, frame, hidden, rotary)
        selection = self.pruner.prune(tokens, keep)
        index, count, passed = (
            selection.indices,
            tokens.shape[1],
            self.pruner.tokens_after(tokens.shape[1], keep),
        )
        wrong = (
            index.shape[1] > passed
            if self.pruner.adaptive
            else selection.counts is not None or index.shape[1] != passed
        )
        if wrong:
            self.pruner.fail(
                f"let {index.shape[1]} of {count} tokens pass before layer {number}; its schedule "
                f"says {passed}"
            )
        order = index.masked_fill(index == EXTRA, count)
        if bool((order[:, 1:] < order[:, :-1]).any()):
            self.pruner.fail("returned tokens that do not ascend, with merged ones after them")
        if selection.features is not None and selection.space != "hidden":
            self.pruner.fail(
                f"returned features for the space {selection.space!r}; inside the language model "
                "it is 'hidden'"
            )
        self.now.diagnostics.append(selection.diagnostics)
        self.now.frames[number], source = frame.cut(index)
        hidden = gather_rows(hidden, source)
        if selection.features is not None:
            places = self.now.frames[number].visual[..., None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.scatter(1, places, selection.features.to(hidden.dtype))
        if selection.sizes is not None and self.pruner.weighs_attention:
            after = self.now.frames[number]
            bias = torch.zeros_like(after.places, dtype=torch.float32)
            after = replace(after, bias=bias.scatter(1, after.visual, selection.sizes.log()))
            self.now.frames[number] = after
        return hidden

    def _fit(self, frame: Frame, hidden: Tensor, kwargs: Keywords) -> Keywords:
        """The mask and the positions of a frame's layers.

        They replace those that the language model made for all its layers.
        """
        batch, length = hidden.shape[:2]
        positions, columns, width = frame.counted, frame.columns, self.now.width
        if self.past:
            width = self.past + length
            new = torch.arange(self.now.width, width, device=hidden.device).expand(batch, -1)
            columns = torch.cat([columns, new], 1)
            positions = positions[:, -1:] + 1 + new[:, -length:] - self.now.width
        # consecutive whatever the rotary embedding is: FlashAttention takes gaps for borders of
        # packed sequences
        fitting: Keywords = {"position_ids": positions}
        if kwargs.get("attention_mask") is not None:
            fitting["attention_mask"] = self._mask(kwargs["attention_mask"], columns, width)
        if frame.bias is not None:
            fitting["attention_mask"] = _biased(
                fitting.get("attention_mask"), frame.bias, length, columns.shape[1], hidden.dtype
            )
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
        """The columns `columns` [B, K] of the mask of all T = `width` positions.

        Args:
            mask: [B, T] for FlashAttention, else [B or 1, 1, rows, T].
        """
        if not isinstance(mask, Tensor) or mask.shape[-1] != width:
            what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the layers got the attention mask {what} for {width} positions; methods inside "
                "the language model need a dynamic cache, and sdpa, eager or flash_attention_2"
            )
        if mask.dim() == 2:
            return mask.gather(1, columns)
        mask = mask.expand(len(columns), -1, -1, -1)
        if not self.past:  # the rows are those of the prompt too
            mask = mask.gather(2, columns[:, None, :, None].expand(*mask.shape[:2], -1, width))
        return mask.gather(3, columns[:, None, None].expand(*mask.shape[:3], -1))

    def _record(self) -> None:
        """Add the audits of the prompts."""
        layer_tokens, count = [], 0
        for number in range(len(self.adapter.layers)):
            count = self.now.frames[number].visual.shape[1] if number in self.now.frames else count
            layer_tokens.append(count)
        left = (
            self.now.frames[max(self.now.frames)].tokens.tolist()
            if self.now.frames
            else [[] for _ in self.now.samples]
        )
        for row, (sample, tokens) in enumerate(zip(self.now.samples, left, strict=True)):
            audit = audit_in_llm(
                sample.id,
                [size for owner, size in self.now.images if owner == row],
                tokens,
                tuple(grid for owner, grid in self.now.crops if owner == row),
                self.now.lengths[row],
                tuple(layer_tokens),
                [
                    {name: float(values[row]) for name, values in notes.items()}
                    for notes in self.now.diagnostics
                ],
            )
            self.trace.audits.append(audit)


def _biased(
    mask: Tensor | None, bias: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The mask [B, 1, rows, columns] with `bias` [B, P] added to its first P columns.

    Args:
        mask: [B, 1, rows, columns], True or 0 where a row sees a column; None: it is causal.
    """
    added = nn.functional.pad(bias.to(dtype), (0, columns - bias.shape[1]))[:, None, None]
    if mask is None:
        places = torch.arange(columns, device=bias.device)
        mask = places <= places[columns - rows :, None]
    if mask.dtype == torch.bool:
        return torch.where(mask, added, torch.finfo(dtype).min)
    return mask + added
