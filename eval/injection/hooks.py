"""The hooks that both kinds of injection share."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from secateur.budget import Budget
from secateur.families.base import Adapter
from secateur.families.contract import Arguments, Keywords
from secateur.injection.audit import Trace
from secateur.injection.encoder import Encoder, ImageCache
from secateur.injection.prompt import PlacedImage, place
from secateur.injection.tower import TowerMerging

_INJECTED: WeakSet[nn.Module] = WeakSet()  # cores with a block open


class Hooks:
    """The hooks that both kinds of injection share.

    An `Encoder` replaces the core's image encoding and keeps the captures. The core's pre-hook
    reads which positions are visual. The language model's pre-hook tells prompts from decoding
    steps. Subclasses write `_prompt` and `_step`, which return the keyword arguments that the
    language model gets instead of its own.
    """

    def __init__(
        self, adapter: Adapter, budget: Budget, trace: Trace, cache: ImageCache | None
    ) -> None:
        self.adapter, self.budget, self.trace = adapter, budget, trace
        if budget.per_tile and not adapter.prunes_crops:
            raise ValueError(
                f"budget={budget}: models of type {adapter.model.config.model_type} lay the tiles "
                "of an image out as one grid before methods see them, so that no tile has a budget "
                "of its own: give tokens per image (320) or a share (22.2%)"
            )
        self.encoder = Encoder(
            adapter, self._encoded(), cache, adapter.core.get_image_features, self._merging()
        )
        self.core_arguments = Arguments(adapter.core.forward, "input_ids")
        self.arguments = Arguments(
            adapter.language_model.forward,
            "inputs_embeds",
            "attention_mask",
            "position_ids",
            "cache",
        )
        self.input_ids: Tensor | None = None
        # [B, L] ids of the last prompt, padding included; None before the first prompt
        self.prompt: Tensor | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in, hooks out.

        Raises:
            ValueError: the model is inside a block already.
        """
        core = self.adapter.core
        if core in _INJECTED:
            raise ValueError(
                "a pruner is injected into this model already, and prompts cannot be pruned "
                "twice: leave its block first"
            )
        with contextlib.ExitStack() as stack:
            _INJECTED.add(core)
            stack.callback(_INJECTED.discard, core)
            for handle in self.hooks():
                stack.callback(handle.remove)
            stack.enter_context(encoding_by(core, self.encoder))
            yield

    def hooks(self) -> Iterator[Any]:
        yield self.adapter.core.register_forward_pre_hook(self._see_ids, with_kwargs=True)
        yield self.adapter.language_model.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _encoded(self) -> frozenset[str]:
        """Captures that the image encoder must provide."""
        return frozenset()

    def _merging(self) -> TowerMerging | None:
        """What merges tokens inside the image encoder; None: nothing does."""
        return None

    def _prompt(self, kwargs: Keywords, visual: Tensor, images: list[PlacedImage]) -> Keywords:
        raise NotImplementedError

    def _step(self, kwargs: Keywords, past: int) -> Keywords:
        raise NotImplementedError

    def _see_ids(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords) -> None:
        self.input_ids = self.core_arguments.read(args, kwargs).get("input_ids")

    def _enter(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords
    ) -> tuple[Any, Keywords]:
        kwargs = self.arguments.read(args, kwargs)
        cache, mask = kwargs.get("cache"), kwargs.get("attention_mask")
        past = cache.get_seq_length() if cache is not None else 0
        per_position = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if getattr(cache, "is_compileable", False) or not per_position:
            raise ValueError(
                "pruning needs a dynamic cache, and the mask of the prompt as [B, L]: generate "
                "with a dynamic cache, not with a static one"
            )
        if past:
            if self.prompt is None:
                raise ValueError(
                    "the cache was filled outside this block: start generation inside it"
                )
            ids = self.input_ids
            if (
                ids is not None
                and ids.shape[1] > 1
                and bool((ids == self.adapter.image_token_id).any())
            ):
                raise ValueError(
                    "image placeholders after a filled cache cannot be pruned: give the prompt in "
                    "one piece"
                )
            return (), self.arguments.write(self._step(kwargs, past))
        if self.input_ids is None:
            raise ValueError(
                "a pruned model needs input_ids: inputs_embeds do not tell which positions are "
                "visual"
            )
        visual = self.input_ids == self.adapter.image_token_id
        # in transformers 5.0 `generate` passes no cache with a prompt, but asks for one
        self._check_prompt(
            self.input_ids, visual, cached=cache is not None or bool(kwargs.get("use_cache"))
        )
        # used once: the next prompt must encode its own images
        images = place(self.adapter.grouped(self.encoder.images, visual), visual)
        self.encoder.images = []
        for image in images:
            self.adapter.check_positions(
                kwargs.get("position_ids"), image.grid, image.row, image.places
            )
        self.adapter.check_images(images, [image.row for image in images])
        new = self._prompt(kwargs, visual, images)
        self.prompt = self.input_ids
        return (), self.arguments.write(new)

    def _check_prompt(self, ids: Tensor, visual: Tensor, cached: bool) -> None:
        """Refuse a decoding step of the last prompt that comes without a filled cache.

        Args:
            ids: [B, L] of the call.
            visual: [B, L] True at image placeholders.
            cached: an empty cache came with the call, or the call asks for one.

        Raises:
            ValueError: it is such a step.
        """
        if self.prompt is None:  # the first call of a block is a prompt, even one of one position
            return
        if ids.shape[1] == 1 and not bool(visual.any()):
            raise ValueError(
                "a call of one position without an image came with an empty cache, after a "
                "prompt: a decoding step needs the cache that the prompt filled; for a prompt of "
                "one token open a block of its own"
            )
        if (
            not cached
            and ids.shape[1] == self.prompt.shape[1] + 1
            and torch.equal(ids[:, :-1], self.prompt)
        ):
            raise ValueError(
                "the prompt came again with one token more and no cache, as use_cache=False does: "
                "it would be pruned anew at every step; generate with a cache"
            )


@contextlib.contextmanager
def encoding_by(core: Any, encode: Callable[..., Any]) -> Iterator[None]:
    """Replace the core's `get_image_features` by `encode` within the block.

    The replacement keeps the signature; after the block the core is as before.
    """
    own = vars(core).get("get_image_features")
    # partial, because wraps writes attributes into its argument
    core.get_image_features = functools.wraps(core.get_image_features)(functools.partial(encode))
    try:
        yield
    finally:
        if own is None:
            del core.get_image_features
        else:
            core.get_image_features = own


def real_positions(kwargs: Keywords, visual: Tensor) -> Tensor:
    """[B, L] False at padding."""
    mask = kwargs.get("attention_mask")
    return torch.ones_like(visual) if mask is None else mask.bool()
