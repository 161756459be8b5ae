"""What every kind of injection shares: the calls of a model as hooks see them, and the audit that comes of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from eval.budget import Budget
from eval.inject.adapters import LlavaAdapter

Span = tuple[int, Tensor]  # row of the batch, positions of one image's placeholders
Keywords = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What a call's tensors do not tell: a name that seeds random choices, and the question without template words."""

    id: str
    question_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SampleRecord:
    """The audit of one prompt: tokens before and after, one entry an image.

    Methods inside the language model: what is left behind their last stage. They rank the images of a prompt together; merged
    tokens, which may come of several images, count for the last and have no index. Diagnostics have an entry a stage.
    """

    id: str
    visual_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    kept_indices: tuple[tuple[int, ...], ...]  # among the tokens of the image
    prompt_tokens: int  # positions the language model sees at prefill
    layer_tokens: tuple[int, ...]  # visual tokens that each layer of the language model processes at prefill, over all images
    diagnostics: dict[str, tuple[float, ...]]


@dataclass
class Trace:
    """Handle of an open block: announce the samples of the next call, read the records of past ones."""

    records: list[SampleRecord] = field(default_factory=list)
    _announced: list[Sample] | None = None

    def announce(self, samples: list[Sample]) -> None:
        """Name the rows of the next call of the model."""
        self._announced = samples

    def take(self, rows: int) -> list[Sample]:
        """The announced samples, used up; rows without announcement are numbered through."""
        samples, self._announced = self._announced, None
        if samples is None:
            return [Sample(str(len(self.records) + row)) for row in range(rows)]
        if len(samples) != rows:
            raise ValueError(f"{len(samples)} samples were announced for a batch of {rows}")
        return samples


class Calls:
    """Two pre-hooks: the core's shows which positions are visual, the language model's tells a prompt from a step behind it.

    Subclasses write `_prompt` and `_step`: the keyword arguments that the language model gets instead of its own.
    """

    def __init__(self, adapter: LlavaAdapter, budget: Budget, trace: Trace) -> None:
        self.adapter, self.budget, self.trace = adapter, budget, trace
        self.captured: dict[str, Tensor] = {}
        self.input_ids: Tensor | None = None
        self.length: int | None = None  # positions of the unpruned prompt, padding included; None before the first

    def hooks(self) -> Iterator[Any]:
        yield self.adapter.core.register_forward_pre_hook(self._see_ids, with_kwargs=True)
        yield self.adapter.language_model.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield from self.adapter.hooks(self._encoded(), self.captured)

    def _encoded(self) -> frozenset[str]:
        """Captures of the image encoder that are wanted besides `features`."""
        return frozenset()

    def _prompt(self, kwargs: Keywords, input_ids: Tensor) -> Keywords:
        raise NotImplementedError

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        raise NotImplementedError

    def _see_ids(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords) -> None:
        self.input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords) -> tuple[Any, Keywords]:
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError("pruning needs the mask of the prompt, [B, L]: generate with a dynamic cache, not with a static one")
        if past:
            if self.length is None:
                raise ValueError("the cache was filled outside this block: start generation inside it")
            ids = self.input_ids
            if ids is not None and ids.shape[1] > 1 and bool((ids == self.adapter.image_token_id).any()):
                raise ValueError("image placeholders behind a filled cache cannot be pruned: give the prompt in one piece")
            return args, self._step(kwargs, past)
        if self.input_ids is None:
            raise ValueError("a pruned model needs input_ids: inputs_embeds do not tell which positions are visual")
        new = self._prompt(kwargs, self.input_ids)
        self.length = kwargs["inputs_embeds"].shape[1]
        return args, new

    def _spans(self, visual: Tensor) -> list[Span]:
        """The placeholders of every image of the call, in the order of the images."""
        features = self.captured.get("features")
        if features is None:
            if bool(visual.any()):
                raise ValueError("the prompt has image placeholders, but no image was encoded inside this block")
            return []
        rows, positions = visual.nonzero(as_tuple=True)
        count, per_image = features.shape[:2]
        if len(positions) != count * per_image:
            raise ValueError(f"{len(positions)} image placeholders for {count} images of {per_image} tokens")
        return list(zip(rows[::per_image].tolist(), positions.split(per_image), strict=True))
