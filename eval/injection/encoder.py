"""The core's method that encodes images, answered with what a pruner needs of them kept, and from a cache where there is one."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from secateur.cache import EncodeCache, image_key
from secateur.injection.adapter import Adapter
from secateur.injection.contract import Arguments
from secateur.injection.layout import EncodedImage

_CAPTURE = "capture "  # how the names of captures begin in the cache


@dataclass
class ImageCache:
    """What the encoder of one model gave, for all methods that ask it.

    Args:
        cache: where it is kept.
        model: what identifies the model: weights, dtype, attention kernel, libraries.
    """

    cache: EncodeCache
    model: str
    asked: frozenset[str] = (
        frozenset()
    )  # captures that any method has asked for: who encodes an image encodes them for the next

    def entry(
        self,
        needs: frozenset[str],
        arguments: dict[str, Any],
        encode: Callable[[frozenset[str]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The tensors of one image, from the cache or from `encode`, with at least the captures `needs`."""
        self.asked |= needs
        pixels = [value for _, value in sorted(arguments.items()) if isinstance(value, Tensor)]
        names = {_CAPTURE + need for need in needs - {"grid"}}  # a shape, no tensor
        return self.cache.fetch(image_key(pixels, self.model), lambda: encode(self.asked), names)


class Encoder:
    """Stands in for the core's `get_image_features` within a block; `images` is what the last call encoded."""

    def __init__(
        self,
        adapter: Adapter,
        needs: frozenset[str],
        cache: ImageCache | None,
        encode: Callable[..., Any],
    ) -> None:
        self.adapter, self.needs, self.cache, self.encode = adapter, needs, cache, encode
        self.arguments = Arguments(encode, *adapter.IMAGE_ARGUMENTS)
        self.images: list[EncodedImage] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments.read(args, kwargs)
        if self.cache is None:
            output, self.images = self._run(arguments, self.needs)
            return output
        # one by one: what an image gives must not depend on the images beside it
        found = [self._cached(self.cache, mine) for mine in self.adapter.one_by_one(arguments)]
        self.images = [image for image, _ in found]
        return BaseModelOutputWithPooling(pooler_output=[features for _, features in found])  # type: ignore[arg-type]

    def _run(
        self, arguments: dict[str, Any], needs: frozenset[str]
    ) -> tuple[Any, list[EncodedImage]]:
        raw: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for handle in self.adapter.hooks(needs, raw):
                stack.callback(handle.remove)
            output = self.encode(**arguments)
        with torch.no_grad():
            return output, self.adapter.encoded(needs, raw, arguments)

    def _cached(self, cache: ImageCache, arguments: dict[str, Any]) -> tuple[EncodedImage, Tensor]:
        """An image, and what the prompt gets in place of its placeholders [P, D]."""

        def encode(needs: frozenset[str]) -> dict[str, Tensor]:
            output, (image,) = self._run(arguments, needs)
            tensors = {_CAPTURE + name: value for name, value in image.captures.items()}
            shape = torch.tensor([*image.grid, image.crops])
            packed = (
                {"packed": output.pooler_output[0]} if image.crops > 1 else {}
            )  # else the features themselves
            return tensors | packed | {"tokens": image.tokens, "shape": shape}

        tensors = cache.entry(self.needs, arguments, encode)
        captures = {
            name.removeprefix(_CAPTURE): value
            for name, value in tensors.items()
            if name.startswith(_CAPTURE)
        }
        rows, columns, crops = tensors["shape"].tolist()
        wanted = {
            name: value for name, value in captures.items() if name in self.needs | {"features"}
        }
        image = EncodedImage(wanted, (rows, columns), crops, tensors["tokens"])
        return image, tensors["packed"] if crops > 1 else captures["features"][0]
