"""From chat messages to the tensors a model takes; prompt, geometry and layout are fields."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from secateur.families import family_of
from secateur.prompts import PROMPTS, TextScope, question_text


@dataclass(frozen=True)
class Prompt:
    """One document as the model sees it."""

    text: str  # with one placeholder per image
    images: list[Image.Image]
    question: str  # for methods that read it

    def image_key(self) -> str:
        """Hash of the images: equal for prompts with equal images in the same order."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.mode} {image.size} ".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()


_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")  # the rest are the images' tensors


class Inputs:
    """Prepares prompts for one model.

    Args:
        processor, config: of the model.
        prompt: `hub`, the checkpoint's chat template, or `vicuna_v1`, with the system sentence of
            the original LLaVA.
        geometry: `processor`, the checkpoint's own image processing, or `pad`, which first pads
            images to a square of the mean colour, as the original LLaVA does (LLaVA-1.5 only).
        layout: of LLaVA-NeXT: `anyres`, as Hugging Face packs crops: padding removed, a newline
            after every row of tiles. `crops`: all tokens of the same crops, without newlines.
            `fixed2880`: the same of a base crop and 2 x 2 tiles for every image.
        image_side: Qwen only: resize every image to this square first.
        text_scope: which words count as the question, see `secateur.prompts`.

    Raises:
        ValueError: a field that the family does not have.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        prompt: str = "hub",
        geometry: Literal["processor", "pad"] = "processor",
        layout: Literal["anyres", "crops", "fixed2880"] | None = None,
        image_side: int | None = None,
        text_scope: TextScope = "question",
    ) -> None:
        self.processor: Any = processor
        self.config, self.family = config, family_of(config.model_type)
        self.geometry, self.layout, self.image_side, self.text_scope = (
            geometry,
            layout,
            image_side,
            text_scope,
        )
        possible: dict[str, tuple[Any, list[Any]]] = {
            "prompt": (prompt, list(self.family.PROMPTS)),
            "geometry": (geometry, list(self.family.GEOMETRIES)),
            "layout": (layout, [None, *self.family.LAYOUTS]),
            "text_scope": (text_scope, list(get_args(TextScope))),
            "image_side": (image_side, [image_side if self.family.HAS_IMAGE_SIDE else None]),
        }
        for name, (value, choices) in possible.items():
            if value not in choices:
                known = ", ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(
                    f"model.{name}={value!r} is not one of {known}, which models of type "
                    f"{config.model_type} take"
                )
        self.template = None if prompt == "hub" else PROMPTS[prompt]
        self.family.check_layout(config, layout)

    def prompt(self, chat: ChatMessages) -> Prompt:
        """The prompt of a chat.

        Raises:
            ValueError: videos; or text that the tokenizer would read as an image.
        """
        images, videos, _ = chat.extract_media()
        if videos:
            raise ValueError("videos are not supported")
        words = "\n".join(
            part.text
            for message in chat.messages
            for part in message.content
            if part.type == "text"
        )
        placeholder = self.processor.image_token
        if placeholder in words:
            raise ValueError(
                f"the question contains the literal text {placeholder!r}, which stands for an image"
            )
        text, images = self.family.chat(
            self.processor, chat, images, self.template, self.image_side
        )
        if self.geometry == "pad":
            images = [self._padded(image) for image in images]
        markers = (placeholder, *self.family.MARKERS)
        bare = functools.reduce(lambda left, marker: left.replace(marker, ""), markers, text)
        return Prompt(text, images, question_text(words, self.text_scope, bare))

    def __call__(self, prompt: Prompt) -> BatchFeature:
        """The tensors of one prompt."""
        return self.family.tensors(
            self.processor, self.config, prompt.text, prompt.images, self.layout
        )

    def images(self, prompt: Prompt) -> dict[str, Tensor]:
        """The tensors of a prompt's images alone, and `places` [images]: placeholders of each.

        Without `places` where the placeholders of two images touch.
        """
        tensors = self(prompt)
        values, counts = tensors["input_ids"][0].unique_consecutive(return_counts=True)
        places = counts[values == self.placeholder]
        known = {"places": places} if len(places) == len(prompt.images) else {}
        return {name: value for name, value in tensors.items() if name not in _TEXT} | known

    def without_images(self, prompt: Prompt) -> dict[str, Tensor]:
        """The tensors of a prompt's text alone."""
        return {name: value for name, value in self(prompt).items() if name in _TEXT}

    def text(self, text: str, places: list[int]) -> dict[str, Tensor]:
        """The same from the text alone, without its images.

        Args:
            places: placeholders of each image, from `images`.
        """
        first, *rest = text.split(self.processor.image_token)
        words = zip(places, rest, strict=True)
        expanded = first + "".join(
            self.family.expanded(self.processor, n) + after for n, after in words
        )
        tensors = dict(self.processor.tokenizer([expanded], return_tensors="pt"))
        if "mm_token_type_ids" in self.processor.model_input_names:
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == self.placeholder).long()
        return tensors

    def beginning(self, tensors: BatchFeature, length: int) -> BatchFeature:
        """The tensors of a prompt's first `length` tokens; those of its images stay whole."""
        cut = {name: value[:, :length] for name, value in tensors.items() if name in _TEXT}
        return BatchFeature({**tensors, **cut})

    @property
    def placeholder(self) -> int:
        """The token that stands for a part of an image."""
        return self.config.image_token_id

    def collate(self, rows: list[BatchFeature]) -> BatchFeature:
        """The tensors of several prompts as a batch: text padded on the left, crops with zeros."""
        batch: dict[str, Tensor] = {}
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        for name in dict.fromkeys(name for row in rows for name in row):
            parts = [row[name] for row in rows if name in row]
            if name in _TEXT:
                longest = max(part.shape[1] for part in parts)
                parts = [
                    pad(part, (longest - part.shape[1], 0), value=fill.get(name, 0))
                    for part in parts
                ]
            elif name == "pixel_values" and parts[0].dim() == 5:
                most = max(part.shape[1] for part in parts)
                parts = [pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in parts]
            batch[name] = torch.cat(parts)
        return BatchFeature(batch)

    def _padded(self, image: Image.Image) -> Image.Image:
        """The image in the middle of a square of the mean colour."""
        image, side = image.convert("RGB"), max(image.size)
        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
