"""The replacement of the core's `get_image_features`: it records captures and caches results."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.cache import EncodeCache, image_key
from secateur.families.base import Adapter, EncodedImage, Mosaic
from secateur.families.contract import Arguments
from secateur.injection.tower import TowerMerging

# prefixes of names in the cache
_CAPTURE, _MOSAIC, _EXTRA = "capture ", "mosaic ", "extra "


@dataclass
class ImageCache:
    """The encoded images of one model, for all methods that use it.

    Args:
        cache: the storage.
        model: identifies the model: weights, dtype, attention kernel, libraries.
    """

    cache: EncodeCache
    model: str
    # captures that any method has asked for: an image is encoded once, with all of them
    asked: frozenset[str] = frozenset()

    def entry(
        self,
        needs: frozenset[str],
        arguments: dict[str, Any],
        encode: Callable[[frozenset[str]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The tensors of one image with the captures in `needs`, cached or from `encode`."""
        self.asked |= needs
        pixels = [value for _, value in sorted(arguments.items()) if isinstance(value, Tensor)]
        names = {_CAPTURE + need for need in needs - {"grid"}}  # a shape, no tensor
        return self.cache.fetch(image_key(pixels, self.model), lambda: encode(self.asked), names)


class Encoder:
    """Wraps `get_image_features`: records captures, caches results.

    `images` holds the images of the last call. With `merging` every image is encoded alone, and
    the cache is left out: an image's features depend on method and budget.
    """

    def __init__(
        self,
        adapter: Adapter,
        needs: frozenset[str],
        cache: ImageCache | None,
        encode: Callable[..., Any],
        merging: TowerMerging | None = None,
    ) -> None:
        self.adapter, self.needs, self.cache, self.encode = adapter, needs, cache, encode
        self.merging = merging
        self.arguments = Arguments(encode, *adapter.IMAGE_ARGUMENTS)
        self.images: list[EncodedImage] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments.read(args, kwargs)
        if self.merging is not None:
            alone = [self._run(mine, self.needs) for mine in self.adapter.one_by_one(arguments)]
            self.images = [image for _, (image,) in alone]
            return self.adapter.output(
                [output.pooler_output[0] for output, _ in alone],
                [self.adapter.extras(output) for output, _ in alone],
            )
        if self.cache is None:
            output, self.images = self._run(arguments, self.needs)
            return output
        # one by one: the features of an image must not depend on the other images
        found = [self._cached(self.cache, mine) for mine in self.adapter.one_by_one(arguments)]
        self.images = [image for image, _, _ in found]
        return self.adapter.output(
            [features for _, features, _ in found], [extras for *_, extras in found]
        )

    def _run(
        self, arguments: dict[str, Any], needs: frozenset[str]
    ) -> tuple[Any, list[EncodedImage]]:
        raw: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            if self.merging is not None:
                stack.enter_context(self.merging.attached(raw))
            for handle in self.adapter.hooks(needs, raw):
                stack.callback(handle.remove)
            output = self.encode(**arguments)
        with torch.no_grad():
            return output, self.adapter.encoded(needs, raw, arguments)

    def _cached(
        self, cache: ImageCache, arguments: dict[str, Any]
    ) -> tuple[EncodedImage, Tensor, dict[str, Tensor]]:
        """An image, the embeddings of its placeholders [P, D], and its `extras`."""

        def encode(needs: frozenset[str]) -> dict[str, Tensor]:
            output, (image,) = self._run(arguments, needs)
            tensors = {_CAPTURE + name: value for name, value in image.captures.items()}
            extras = self.adapter.extras(output)
            tensors |= {_EXTRA + name: value.detach() for name, value in extras.items()}
            shape = torch.tensor([*image.grid, image.crops])
            mosaic: dict[str, Tensor] = {}
            if image.mosaic is not None:
                mosaic = {_MOSAIC + name: value for name, value in image.mosaic.captures.items()}
                mosaic["mosaic"] = torch.tensor([*image.mosaic.grid, image.mosaic.tiles])
            # with one crop they are the features themselves
            whole = len(image.sections) == 1 and len(image.tokens) == image.per_crop
            packed = {} if whole else {"packed": output.pooler_output[0]}
            return tensors | mosaic | packed | {"tokens": image.tokens, "shape": shape}

        tensors = cache.entry(self.needs, arguments, encode)
        extras = {
            name.removeprefix(_EXTRA): value
            for name, value in tensors.items()
            if name.startswith(_EXTRA)
        }
        rows, columns, crops = tensors["shape"].tolist()
        captures, mosaic = self._wanted(tensors, _CAPTURE), None
        if "mosaic" in tensors:
            high, wide, tiles = tensors["mosaic"].tolist()
            mosaic = Mosaic(self._wanted(tensors, _MOSAIC), (high, wide), tiles)
        image = EncodedImage(captures, (rows, columns), crops, tensors["tokens"], mosaic=mosaic)
        packed = tensors["packed"] if "packed" in tensors else captures["features"][0]
        return image, packed, extras

    def _wanted(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The captures that the method needs, by their names after `prefix` in the cache."""
        return {
            name: tensors[prefix + name]
            for name in self.needs | {"features"}
            if prefix + name in tensors
        }
