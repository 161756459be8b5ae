"""From chat messages to the tensors a model takes: prompt template, image geometry and layout, as fields."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lmms_eval.protocol import ChatMessages
from PIL import Image
from qwen_vl_utils import process_vision_info
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from secateur.prompts import PROMPTS
from secateur.questions import Scope, question_text

Family = Literal["llava", "llava_next", "qwen2_5_vl"]


@dataclass(frozen=True)
class Prompt:
    """One document as the model is asked: the text with a placeholder an image, the images, and the question alone."""

    text: str
    images: list[Image.Image]
    question: str


class Inputs:
    """Prepares prompts for one model.

    Args:
        processor, config: of the model. For layout `fixed2880` both get the one pinpoint of 2 x 2 tiles.
        prompt: `hub`, the checkpoint's chat template, or `vicuna_v1`, with the system sentence of the original LLaVA.
        geometry: `processor`, the checkpoint's own image processing, or `pad`, to a square of the mean colour first, as the
            original LLaVA does (LLaVA-1.5 only).
        layout: of LLaVA-NeXT: `anyres`, as Hugging Face packs crops, or `fixed2880`, a base crop and 2 x 2 tiles of each image.
        image_side: Qwen2.5-VL only: resize every image to this square first.
        text_scope: which words count as the question, see `secateur.questions`.

    Raises:
        ValueError: a field that the family does not have.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        prompt: str = "hub",
        geometry: Literal["processor", "pad"] = "processor",
        layout: Literal["anyres", "fixed2880"] | None = None,
        image_side: int | None = None,
        text_scope: Scope = "question",
    ) -> None:
        self.processor: Any = processor
        self.config, self.family = config, config.model_type
        self.geometry, self.layout, self.image_side, self.text_scope = (
            geometry,
            layout,
            image_side,
            text_scope,
        )
        possible: dict[str, tuple[Any, list[Any]]] = {
            "prompt": (prompt, ["hub"] if self.family == "qwen2_5_vl" else ["hub", *PROMPTS]),
            "geometry": (
                geometry,
                ["processor", "pad"] if self.family == "llava" else ["processor"],
            ),
            "layout": (
                layout,
                [None, "anyres", "fixed2880"] if self.family == "llava_next" else [None],
            ),
            "text_scope": (text_scope, list(get_args(Scope))),
            "image_side": (image_side, [image_side if self.family == "qwen2_5_vl" else None]),
        }
        for name, (value, choices) in possible.items():
            if value not in choices:
                known = ", ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(
                    f"model.{name}={value!r} is not one of {known}, which models of type {self.family} take"
                )
        self.template = None if prompt == "hub" else PROMPTS[prompt]
        if layout == "fixed2880":
            side = 2 * config.vision_config.image_size
            config.image_grid_pinpoints = self.processor.image_processor.image_grid_pinpoints = [
                [side, side]
            ]

    def prompt(self, chat: ChatMessages, sample: str) -> Prompt:
        """The prompt of a chat; `sample` names it in errors.

        Raises:
            ValueError: videos; or text that the tokenizer would read as an image.
        """
        images, videos, _ = chat.extract_media()
        if videos:
            raise ValueError(f"{sample}: videos are not supported")
        words = "\n".join(
            part.text
            for message in chat.messages
            for part in message.content
            if part.type == "text"
        )
        placeholder = self.processor.image_token
        if placeholder in words:
            raise ValueError(
                f"{sample}: the question contains the literal text {placeholder!r}, which stands for an image"
            )
        options = {"tokenize": False, "add_generation_prompt": True}
        if self.family == "qwen2_5_vl":
            if self.image_side:
                square = (self.image_side, self.image_side)
                images = [
                    image.convert("RGB").resize(square, Image.Resampling.BICUBIC)
                    for image in images
                ]
            messages = chat.to_hf_messages()
            text = self.processor.apply_chat_template(messages, **options)
            if images:  # lmms-eval's way: images come to a multiple of the patches before the processor sees them
                images, _ = process_vision_info(
                    [{"role": "user", "content": [{"type": "image", "image": i} for i in images]}]
                )
        else:
            text = self.processor.apply_chat_template(
                chat.model_dump()["messages"], chat_template=self.template, **options
            )
        if self.geometry == "pad":
            images = [self._padded(image) for image in images]
        markers = (
            (placeholder, "<|vision_start|>", "<|vision_end|>")
            if self.family == "qwen2_5_vl"
            else (placeholder,)
        )
        bare = functools.reduce(lambda left, marker: left.replace(marker, ""), markers, text)
        return Prompt(text, images, question_text(words, self.text_scope, bare))

    def __call__(self, prompt: Prompt) -> BatchFeature:
        """The tensors of one prompt."""
        if self.layout == "fixed2880" and prompt.images:
            return self._fixed(prompt.text, prompt.images)
        return self.processor(text=[prompt.text], images=prompt.images or None, return_tensors="pt")

    def collate(self, rows: list[BatchFeature]) -> BatchFeature:
        """The tensors of several prompts as a batch, padded on the left; crops behind an image's own are zeros."""
        batch: dict[str, Tensor] = {}
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        for name in dict.fromkeys(name for row in rows for name in row):
            parts = [row[name] for row in rows if name in row]
            if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
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
        """In the middle of a square of the mean colour."""
        image, side = image.convert("RGB"), max(image.size)
        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _fixed(self, text: str, images: list[Image.Image]) -> BatchFeature:
        """Square image sizes, so that no token of the tiles counts as padding, and placeholders to match."""
        vision = self.config.vision_config
        side, per_side = 2 * vision.image_size, vision.image_size // vision.patch_size
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        pixels["image_sizes"] = torch.tensor([[side, side]] * len(images))
        places = (
            5 * per_side**2 + 2 * per_side
        )  # the rows of tiles end in a newline, which goes at the entrance of the LLM
        token = self.processor.image_token
        tokens = self.processor.tokenizer(
            [text.replace(token, token * places)], return_tensors="pt"
        )
        return BatchFeature({**tokens, **pixels})
