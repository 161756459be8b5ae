"""One prefill for all questions about an image.

For a method that does not read the question, prompts about one image have the same pruned prefix,
up to the last placeholder. Its keys and values are computed once and copied to the questions, whose
remaining tokens are then prefilled and decoded together.

The answers are those of a greedy `generate`. Sums run in another order, so logits differ by
rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    BatchFeature,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import DynamicLayer

from secateur.families.contract import Arguments, cache_of


class CannotShare(Exception):
    """What keeps prompts from sharing a prefix; they can be answered alone."""


@dataclass(frozen=True)
class Prefix:
    """Prefilled prefixes of several prompts."""

    cache: Any  # G rows, P positions
    mask: Tensor  # [G, P] 1 for real positions; padding on the left
    next: Tensor  # [G] the position after each prefix


@dataclass(frozen=True)
class Question:
    """A prompt about one of the images of a `Prefix`."""

    prefix: int  # row of the prefix
    ids: Tensor  # [L] of the whole unpruned prompt; penalties look at them
    tail: int  # how many of the ids, at the end, follow the prefix


def penalties(defaults: dict[str, Any]) -> LogitsProcessorList:
    """What generation defaults do to logits.

    Raises:
        CannotShare: a default that is not known here.
    """
    known = LogitsProcessorList()
    for name, value in defaults.items():
        if name != "repetition_penalty":
            raise CannotShare(f"the checkpoint's generation default {name}={value}")
        known.append(RepetitionPenaltyLogitsProcessor(value))
    return known


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache for prefixes.

    Raises:
        CannotShare: it has layers whose rows cannot be copied, such as sliding windows.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise CannotShare(f"a cache with {type(layer).__name__}")
    return cache


@torch.no_grad()
def prefill(model: PreTrainedModel, inputs: BatchFeature) -> Any:
    """The cache that prefixes fill; to be called inside an injection block.

    Raises:
        CannotShare: as `empty_cache`.
    """
    core: Any = model.model
    keywords = {**inputs, "cache": empty_cache(model), "use_cache": True}
    return cache_of(core(**Arguments(core.forward, "cache").write(keywords)))


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    prefix: Prefix,
    questions: list[Question],
    new_tokens: int,
    stop: int,
    fill: int,
    penalties: LogitsProcessorList,
) -> tuple[Tensor, Tensor]:
    """Answer questions greedily; to be called outside injection blocks.

    Args:
        new_tokens: the most tokens of an answer.
        stop: the token that ends an answer.
        fill: the token after an answer's end.

    Returns:
        [B, at most new_tokens] token ids, and [B] whether all logits of a row were finite.
    """
    owner = torch.tensor([question.prefix for question in questions], device=prefix.mask.device)
    tails = [question.ids[len(question.ids) - question.tail :] for question in questions]
    ids, real = _padded(tails, fill)
    cache = _copied(prefix.cache, owner)
    mask = torch.cat([prefix.mask[owner], real], 1)
    # padding between prefix and question has no position of its own
    positions = prefix.next[owner, None] + (real.cumsum(1) - 1).clamp_min(0)
    seen = _seen(questions) if len(penalties) else ids
    found: list[Tensor] = []
    finished = torch.zeros_like(owner, dtype=torch.bool)
    finite = ~finished
    while True:
        logits = _logits(model, cache, found[-1] if found else ids, mask, positions)
        finite &= logits.isfinite().all(-1)
        said = torch.cat([seen, *found], 1) if len(penalties) else seen
        scores = penalties(said, logits)  # type: ignore[arg-type] # it wants a class of its own
        chosen = torch.where(finished, fill, scores.argmax(-1))
        finished |= chosen == stop
        found.append(chosen[:, None])
        if len(found) == new_tokens or bool(finished.all()):
            return torch.cat(found, 1), finite
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def _logits(
    model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, positions: Tensor
) -> Tensor:
    """[B, V] logits of the token after `ids` [B, T], in float32; `ids` enter the cache."""
    language: Any = model.model.language_model
    head: Any = model.get_output_embeddings()
    arguments = Arguments(
        language.forward, "inputs_embeds", "attention_mask", "position_ids", "cache"
    )
    keywords = {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": mask,
        "position_ids": positions,
        "cache": cache,
        "use_cache": True,
    }
    output = language(**arguments.write(keywords))
    return head(output.last_hidden_state[:, -1:])[:, -1].float()


def _copied(cache: Any, rows: Tensor) -> DynamicCache:
    """A cache of these rows of another one, which stays as it is."""
    new = DynamicCache()
    for number, layer in enumerate(cache.layers):
        new.update(layer.keys[rows], layer.values[rows], number)
    return new


def _padded(rows: list[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as a batch [B, T] padded on the left, and its mask."""
    longest = max(map(len, rows))
    ids = [pad(row, (longest - len(row), 0), value=fill) for row in rows]
    real = [pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]
    return torch.stack(ids), torch.stack(real)


def _seen(questions: list[Question]) -> Tensor:
    """[B, L] ids of the whole prompts; rows are filled with ids of their own, for penalties."""
    rows = [question.ids for question in questions]
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row[:1].expand(longest - len(row)), row]) for row in rows])
