"""`inject`: hooks in, hooks out. Methods before the language model drop visual tokens at its entrance."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.budget import Budget
from eval.inject.adapters import LlavaAdapter, adapter_for
from eval.inject.calls import Calls, Keywords, Sample, SampleRecord, Span, Trace
from eval.inject.layers import Layers
from pruners import InLLMPruner, Pruner, PrunerError, Selection, VisualTokens
from pruners.base import EXTRA

Positions = Literal["compact", "original"]


@contextlib.contextmanager
def inject(
    model: PreTrainedModel,
    pruner: Pruner | InLLMPruner,
    budget: Budget | int | float | str,
    positions: Positions = "compact",
) -> Iterator[Trace]:
    """Within the block every prefill of `model` goes on with the tokens `pruner` keeps; behind it the model is as before.

    Args:
        model: a supported image-text model of transformers; `generate` and the plain forward both work.
        pruner: from `pruners.build`.
        budget: tokens per image (64), retention ("11.1%" or 0.111) or "full". Methods inside the language model rank the images
            of a prompt together, within the sum of their budgets.
        positions: `compact` numbers the shortened prompt through, as the official LLaVA codes do; `original` keeps the
            positions of the unpruned prompt. Not for methods inside the language model, which have a field of their own.

    Raises:
        ValueError: a model family, budget or option that is not supported. Errors of the pruner reach the caller of the model.
    """
    if positions not in ("compact", "original"):
        raise ValueError(f"positions={positions!r} is not one of 'compact', 'original'")
    adapter, budget, trace = adapter_for(model), Budget.parse(budget), Trace()
    calls: Calls
    if isinstance(pruner, Pruner):
        calls = _Entrance(adapter, pruner, budget, positions, trace)
    else:
        calls = Layers(adapter, pruner, budget, trace)
    with contextlib.ExitStack() as stack:
        for handle in calls.hooks():
            stack.callback(handle.remove)
        yield trace


@dataclass
class _Prefill:
    """What decoding needs to know of the pruned prompt."""

    length: int  # positions of the unpruned prompt, padding included
    mask: Tensor  # [B, L'] 1 for real positions of the pruned prompt
    removed: Tensor  # [B] positions taken out of each row


class _Entrance(Calls):
    """Takes tokens out of what enters the language model."""

    def __init__(self, adapter: LlavaAdapter, pruner: Pruner, budget: Budget, positions: Positions, trace: Trace) -> None:
        super().__init__(adapter, budget, trace)
        self.pruner, self.positions = pruner, positions
        self.prefill: _Prefill

    def _encoded(self) -> frozenset[str]:
        return self.pruner.needs - _NOT_ENCODED

    def _prompt(self, kwargs: Keywords, input_ids: Tensor) -> Keywords:
        embeds, attention_mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        batch, length, width = embeds.shape
        visual = input_ids == self.adapter.image_token_id
        real = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
        samples = self.trace.take(batch)
        spans = self._spans(visual)
        selection, replacement = self._select(spans, samples)

        # every image writes its kept tokens, in their order, into the first places of its span; the others are dropped
        source = torch.arange(length, device=embeds.device).repeat(batch, 1)
        alive = real & ~visual
        counts = _counts(selection)
        for row, (sample, span) in enumerate(spans):
            index = selection.indices[row, : counts[row]]
            target = span[: counts[row]]
            source[sample, target] = torch.where(index == EXTRA, target, span[index])
            alive[sample, target] = True
        embeds = torch.gather(embeds, 1, source[..., None].expand(-1, -1, width))
        if replacement is not None:
            for row, (sample, span) in enumerate(spans):
                embeds[sample, span[: counts[row]]] = replacement[row, : counts[row]].to(embeds.dtype)

        # a stable sort moves dropped places to the left and keeps the order of the others: left padding of the longest row
        longest = int(alive.sum(1).max())
        order = torch.sort(alive.long(), dim=1, stable=True).indices[:, -longest:]
        mask = torch.gather(alive, 1, order).long()
        self.prefill = _Prefill(length, mask, real.sum(1) - mask.sum(1))
        self._record(samples, spans, selection, mask)

        new = dict(kwargs, inputs_embeds=torch.gather(embeds, 1, order[..., None].expand(-1, -1, width)))
        # never None: without a mask transformers reads gaps between positions as borders of packed sequences
        new["attention_mask"] = mask if attention_mask is None else mask.to(attention_mask.dtype)
        if self.positions == "compact":
            new["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        else:
            before = kwargs.get("position_ids")
            before = (real.long().cumsum(1) - 1).clamp_min(0) if before is None else before.expand(batch, -1)
            new["position_ids"] = torch.gather(before, 1, torch.gather(source, 1, order))
        if kwargs.get("cache_position") is not None:
            new["cache_position"] = kwargs["cache_position"][:longest]
        return new

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        """Behind the prompt `generate` still counts the unpruned frame: cut masks, shift positions."""
        state, new = self.prefill, dict(kwargs)
        attention_mask, step = kwargs.get("attention_mask"), kwargs["inputs_embeds"].shape[1]
        generated = past + step - state.mask.shape[1]
        if attention_mask is not None:
            new["attention_mask"] = torch.cat([state.mask.to(attention_mask), attention_mask[:, state.length :]], 1)
        elif bool((state.mask == 0).any()):
            new["attention_mask"] = torch.cat([state.mask, state.mask.new_ones(len(state.mask), generated)], 1)
        if self.positions == "compact" and kwargs.get("position_ids") is not None:
            new["position_ids"] = kwargs["position_ids"] - state.removed[:, None]
        if kwargs.get("cache_position") is not None:
            new["cache_position"] = kwargs["cache_position"] - (state.length - state.mask.shape[1])
        return new

    def _select(self, spans: list[Span], samples: list[Sample]) -> tuple[Selection, Tensor | None]:
        """Run the pruner on all images of the call; also new features in LLM width, if it makes any."""
        if not spans:
            return Selection(torch.zeros(0, 0, dtype=torch.long)), None
        needs = self.pruner.needs
        captures = self.adapter.captures(needs - _NOT_ENCODED, self.captured)
        self.captured.clear()  # used up: the next prompt must encode its own images
        count = captures["features"].shape[1]
        keep = self.budget.resolve(count)
        if "text_embeddings" in needs:
            captures |= self._text([samples[row] for row, _ in spans])
        tokens = VisualTokens(
            **captures,  # type: ignore[arg-type]
            grid=self.adapter.grid(count),
            sample_ids=_sample_ids(spans, samples),
        )
        selection = self.pruner.prune(tokens, keep)
        kept = selection.indices.shape[1]
        if kept != keep and not self.pruner.adaptive and self.pruner.name != "none":
            raise PrunerError(f"pruner {self.pruner.name!r} kept {kept} tokens of {count}; the budget is {keep}")
        if selection.features is None or selection.space == "projected":
            return selection, selection.features
        return selection, self.adapter.project(selection.features)

    def _text(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Question embeddings of each image's prompt, padded at the end, and their mask."""
        device = self.adapter.device
        rows = []
        for sample in samples:
            if sample.question_ids is None:
                raise ValueError(
                    f"pruner {self.pruner.name!r} reads the question, which was not announced: "
                    "call trace.announce([Sample(id, question_ids)]) before the model"
                )
            rows.append(self.adapter.embed(torch.tensor(sample.question_ids, dtype=torch.long, device=device)))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"text_embeddings": padded, "text_mask": torch.arange(padded.shape[1], device=device) < lengths[:, None]}

    def _record(self, samples: list[Sample], spans: list[Span], selection: Selection, mask: Tensor) -> None:
        counts, indices, prompts = _counts(selection), selection.indices.tolist(), mask.sum(1).tolist()
        notes = {name: values.tolist() for name, values in selection.diagnostics.items()}
        layers = len(self.adapter.layers)
        for number, sample in enumerate(samples):
            mine = [row for row, (owner, _) in enumerate(spans) if owner == number]
            self.trace.records.append(
                SampleRecord(
                    id=sample.id,
                    visual_tokens=tuple(len(spans[row][1]) for row in mine),
                    kept_tokens=tuple(counts[row] for row in mine),
                    kept_indices=tuple(tuple(indices[row][: counts[row]]) for row in mine),
                    prompt_tokens=prompts[number],
                    layer_tokens=(sum(counts[row] for row in mine),) * layers,
                    diagnostics={name: tuple(values[row] for row in mine) for name, values in notes.items()},
                )
            )


# captures that do not come out of the image encoder
_NOT_ENCODED = frozenset({"text_embeddings", "grid"})


def _counts(selection: Selection) -> list[int]:
    """Kept tokens per row."""
    if selection.counts is not None:
        return selection.counts.tolist()
    return [selection.indices.shape[1]] * len(selection.indices)


def _sample_ids(spans: list[Span], samples: list[Sample]) -> tuple[str, ...]:
    """ "document|number of the image in its prompt" per row."""
    owners = [owner for owner, _ in spans]
    return tuple(f"{samples[owner].id}|{owners[:row].count(owner)}" for row, owner in enumerate(owners))
