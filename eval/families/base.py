"""What a model family tells the rest of the harness.

A `Family` describes it without a model: configurations, processor, prompts, FLOPs. Its `Adapter`
knows the modules of a loaded model. No other file reads a module or a model type by name.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from secateur.families.contract import Keywords, require
from secateur.prompts import PROMPTS

if TYPE_CHECKING:  # the library works without lmms-eval
    from lmms_eval.protocol import ChatMessages

    from secateur.settings import ModelIdentity

NEWLINE = -1  # a placeholder of no image token: it holds the embedding that ends a row of tiles

# cosines and sines as a family's layers get them: [B or 1, L, d]; with M-RoPE [3, B or 1, L, d]
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mosaic:
    """The tiles of an image as one grid, which methods see as a whole.

    It is for models that cut or resample the tiles together, so that the prompt no longer holds the
    tokens of single tiles.
    """

    captures: dict[str, Tensor]  # [1, M, ...], as VisualTokens defines them
    grid: tuple[int, int]  # (rows, columns), rows * columns = M; M = 0 if all is padding
    tiles: int  # how many crops were encoded for it


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: the captures of its crops, and the tokens that the prompt has places for.

    Token t of crop c has number c * N + t. The first of several crops is the whole image; the
    others tile it. The tokens of a mosaic have the numbers after those of the crops.
    """

    captures: dict[str, Tensor]  # [crops, N, ...], as VisualTokens defines them
    grid: tuple[int, int]  # (rows, columns) of a crop, rows * columns = N
    crops: int
    tokens: Tensor  # [P] number of the token each placeholder holds, or NEWLINE
    mosaic: Mosaic | None = field(default=None, kw_only=True)  # None: every tile is a crop

    @property
    def per_crop(self) -> int:
        """N, the tokens of a crop."""
        return self.grid[0] * self.grid[1]

    @property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of all that methods see as one row: the crops, and then the mosaic.

        A mosaic without tokens is left out.
        """
        mosaic = (self.mosaic.grid,) if self.mosaic and min(self.mosaic.grid) else ()
        return (self.grid,) * self.crops + mosaic

    @property
    def encoded_crops(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of everything that the image encoder ran on."""
        return (self.grid,) * (self.crops + (self.mosaic.tiles if self.mosaic else 0))


class View(NamedTuple):
    """A picture as an image encoder gets it, whole or in tiles.

    Attributes:
        tokens: [rows, columns] numbers of the tokens that cover it, as in `EncodedImage`.
    """

    image: Image.Image
    tokens: np.ndarray


@dataclass(frozen=True)
class TowerBlock:
    """The modules of one block of an image encoder: x + attention(x), then x + mlp(norm(x))."""

    block: nn.Module
    keys: nn.Module  # its output [B, T, C] holds the heads side by side
    norm: nn.Module
    mlp: nn.Module
    heads: int


class Adapter:
    """The modules of a loaded model; this class knows the decoder, which is alike in all families.

    Subclasses say how images are encoded: `SOURCES`, `hooks`, `encoded`, `one_by_one`, `project`.
    """

    # capture that a pruner may need -> the raw tensors it is made from, by the hooks' names
    SOURCES: ClassVar[dict[str, tuple[str, ...]]]
    # attributes of the model that are read by name
    PARTS: ClassVar[tuple[str, ...]] = (
        "config.image_token_id",
        "model.get_image_features",
        "model.language_model.layers.0",
    )
    LANGUAGE_PARTS: ClassVar[tuple[str, ...]] = (  # of the language model, for methods inside it
        "norm",
        "rotary_emb",
        "layers.0.input_layernorm",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.head_dim",
        "layers.0.self_attn.scaling",
    )
    # arguments of get_image_features that are read by name
    IMAGE_ARGUMENTS: ClassVar[tuple[str, ...]] = ("pixel_values",)
    # position policies; the first is the default
    POSITIONS: ClassVar[tuple[str, ...]] = ("compact", "original")
    projector: nn.Module  # of families with `tower_blocks`
    keeps_newlines: bool = True  # False: the embeddings that end rows of tiles are removed
    # True: every crop gets the same share of a budget, rounded down; else the first get one more
    equal_shares: bool = False
    # True: the crops of an image follow one another in the prompt, each as a whole
    crops_in_turn: bool = False
    # False: tiles are no rows of their own for a method, and no budget can be given per crop
    prunes_crops: bool = True
    # True: to methods that merge, the features that left the projector are the encoder's too, and
    # `project` returns what they merge as it is
    merges_projected: bool = False

    def __init__(self, model: PreTrainedModel) -> None:
        require(model, *self.PARTS)
        self.model: Any = model
        self.core: Any = self.model.model
        self.language_model: Any = self.core.language_model

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's decoder layers."""
        return self.language_model.layers

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def hooks(self, needs: frozenset[str], into: dict[str, Tensor]) -> Iterator[RemovableHandle]:
        """Forward hooks for one call of the encoder; they store only what `needs` asks for."""
        raise NotImplementedError

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        """The images of one call of the encoder, with `features` and the captures in `needs`.

        Args:
            raw: what the hooks stored.
            arguments: of the core's `get_image_features`, by name.
        """
        raise NotImplementedError

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The arguments of the core's `get_image_features`, one image at a time."""
        raise NotImplementedError

    def extras(self, output: Any) -> dict[str, Tensor]:
        """What the model needs of one image beside its embeddings, by names of the family's own.

        Args:
            output: of the core's `get_image_features` for this image alone.
        """
        return {}

    def output(self, features: list[Tensor], extras: list[dict[str, Tensor]]) -> Any:
        """What the core's `get_image_features` returns for several images.

        Args:
            features: of each image in `one_by_one`, the embeddings of its placeholders [P, D].
            extras: of each image.
        """
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def grouped(self, images: list[EncodedImage], visual: Tensor) -> list[EncodedImage]:
        """The images of a prompt, where the encoder saw parts of images alone.

        Args:
            images: as `encoded` returned them.
            visual: [B, L] True at placeholders.
        """
        return images

    def project(self, features: Tensor) -> Tensor:
        """Encoder features [..., C] -> LLM width [..., D], in the model's dtype."""
        raise NotImplementedError

    def tower_blocks(self) -> list[TowerBlock]:
        """The image encoder's blocks up to the one whose output the projector receives.

        Raises:
            ValueError: tokens cannot be merged inside this encoder.
        """
        raise ValueError(
            f"tokens cannot be merged inside the image encoder of {self.model.config.model_type} "
            "models: this needs an encoder with CLS and without windows, as that of LLaVA-1.5 and "
            "LLaVA-NeXT; take another pruner"
        )

    def check_known(self, needs: frozenset[str]) -> None:
        """Raise ValueError for captures that this family does not provide."""
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            family = type(self).__name__.removesuffix("Adapter")
            raise ValueError(f"{family} models do not provide {', '.join(unknown)}")

    def pruned_arguments(self, kwargs: Keywords, origin: Tensor) -> Keywords:
        """The language model's arguments of a pruned prompt: those that only this family has.

        Args:
            kwargs: with embeddings, mask and positions of the pruned prompt.
            origin: [B, L'] the position of each token in the unpruned prompt; EXTRA: none.
        """
        return kwargs

    def without_deepstack(self, kwargs: Keywords) -> tuple[Keywords, list[Tensor]]:
        """The language model's arguments without what its first layers add to visual tokens.

        Returns:
            The arguments, and [all visual tokens, D] for each of the first layers.
        """
        return kwargs, []

    def check_positions(
        self, positions: Tensor | None, grid: tuple[int, int], row: int, places: Tensor
    ) -> None:
        """Check the positions of an image's tokens in a prompt; most families number them as text.

        Args:
            positions: as the language model gets them, [B, L] or, with M-RoPE, [3 or 4, B, L]; None
                where it makes them itself.
            grid: (rows, columns) of the image.
            row: its prompt in the batch.
            places: [P] its placeholders in the prompt.

        Raises:
            ValueError: they are not the family's.
        """

    def check_images(self, images: Sequence[EncodedImage], rows: Sequence[int]) -> None:
        """Check how the images of a call were encoded.

        Args:
            rows: for each image its prompt in the batch.

        Raises:
            ValueError: not as the family's prompts have them.
        """

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids -> LLM embeddings."""
        return self.model.get_input_embeddings()(ids)

    def normed(self, hidden: Tensor) -> Tensor:
        """The language model's final norm of hidden states [B, L, D]."""
        return self.language_model.norm(hidden)

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The modules that make a layer's queries and keys.

        Their outputs [B, L, H d] hold the heads side by side, without the rotary embedding.
        """
        attention: Any = self.layers[layer].self_attn
        return attention.q_proj, attention.k_proj

    def before_attention(self, layer: int, hidden: Tensor) -> Tensor:
        """What the projections of a layer receive when `hidden` [B, L, D] enters it."""
        block: Any = self.layers[layer]
        return block.input_layernorm(hidden)

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """The rotary embedding of positions [B, L] of running text; `hidden` gives the dtype."""
        return self.language_model.rotary_emb(hidden, positions)

    def rotary_rows(self, rotary: Rotary, index: Tensor) -> Rotary:
        """The rotary embedding of the positions `index` [B, K] alone."""
        row = torch.arange(len(index), device=index.device)[:, None]
        cos, sin = (part.expand(len(index), -1, -1)[row, index] for part in rotary)
        return cos, sin

    def heads(self, layer: int, projected: Tensor, rotary: Rotary) -> Tensor:
        """[B, L, H d] of one of the projections -> [B, H, L, d], rotary embedding applied."""
        attention: Any = self.layers[layer].self_attn
        x = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (part[:, None] for part in rotary)
        return rotate(x, cos, sin)

    def scaling(self, layer: int) -> float:
        """The factor that a layer applies to products of queries and keys."""
        attention: Any = self.layers[layer].self_attn
        return attention.scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [..., L, d], first half against second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Family:
    """One family of models. Subclasses fill in what differs.

    The defaults are those of most models: the checkpoint's own chat template, image processing
    and layout.
    """

    MODEL_TYPE: ClassVar[str]  # of the family's configs
    NEW_TOKENS: ClassVar[int]  # longest answer where a task sets none, as in lmms-eval's classes
    PLACEHOLDER: ClassVar[str]  # an image in a prompt's text
    MARKERS: ClassVar[tuple[str, ...]] = ()  # special tokens beside the processor's image token

    # allowed values of the input fields, see `secateur.inputs.Inputs`
    PROMPTS: ClassVar[tuple[str, ...]] = ("hub", *PROMPTS)
    GEOMETRIES: ClassVar[tuple[str, ...]] = ("processor",)
    LAYOUTS: ClassVar[tuple[str, ...]] = ()  # the first is the default; empty: no such field
    HAS_IMAGE_SIDE: ClassVar[bool] = False

    # configurations without weights: hub checkpoints by the file name in configs/model, tiny ones
    CONFIGS: ClassVar[dict[str, Callable[[], PreTrainedConfig]]]
    TINY: ClassVar[dict[str, Callable[[], PreTrainedConfig]]]
    # the self-test of injection: its tiny form, and the height and width of its image
    SELFTEST: ClassVar[str]
    SELFTEST_SIZE: ClassVar[tuple[int, int]] = (112, 112)
    # fields of the vision config: number of blocks, number of heads
    VISION_FIELDS: ClassVar[tuple[str, str]] = ("num_hidden_layers", "num_attention_heads")
    # its widths, that of the hidden states first
    VISION_WIDTHS: ClassVar[tuple[str, ...]] = ("hidden_size", "intermediate_size")

    # --- models

    def adapter(self, model: PreTrainedModel, layout: str | None) -> Adapter:
        """The adapter of a loaded model; `layout` is None or one of `LAYOUTS`."""
        raise NotImplementedError

    def processor(self, config: PreTrainedConfig) -> ProcessorMixin:
        """A processor with the image geometry of `config` and a byte tokenizer."""
        raise NotImplementedError

    def reduced(self, config: Any) -> None:
        """Make the rest of a config fit after its layers and widths were reduced."""

    # --- inputs

    def check_layout(self, config: Any, layout: str | None) -> None:
        """Raise ValueError for one of `LAYOUTS` that a checkpoint cannot have."""

    def limit_pixels(self, processor: Any, least: int | None, most: int | None) -> None:
        """Set the smallest and the largest number of pixels that images are resized to.

        Raises:
            ValueError: the family has no such limits.
        """
        if least is not None or most is not None:
            raise ValueError(
                "model.min_pixels and model.max_pixels are for Qwen's models, not for the family "
                f"{self.MODEL_TYPE!r}"
            )

    def check_budget(self, processor: Any, budget: int, image_side: int | None) -> None:
        """Check that images can have `budget` tokens.

        Args:
            image_side: as in `chat`.

        Raises:
            ValueError: the largest size of an image has fewer tokens.
        """

    def check_images(self, processor: Any, budget: int, inputs: BatchFeature) -> None:
        """Check that the images of a prompt have `budget` tokens each, where their sizes differ.

        Raises:
            ValueError: an image has fewer.
        """

    def expanded(self, processor: Any, count: int) -> str:
        """What the processor writes into a prompt's text for an image of `count` tokens."""
        return processor.image_token * count

    def chat(
        self,
        processor: Any,
        chat: "ChatMessages",
        images: list[Image.Image],
        template: str | None,
        image_side: int | None,
    ) -> tuple[str, list[Image.Image]]:
        """The prompt's text, and its images as the processor gets them.

        Args:
            template: the chat template; None: the checkpoint's own.
            image_side: resize every image to this square first.
        """
        text = processor.apply_chat_template(
            chat.model_dump()["messages"],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text, images

    def tensors(
        self,
        processor: Any,
        config: Any,
        text: str,
        images: list[Image.Image],
        layout: str | None,
    ) -> BatchFeature:
        """The tensors of one prompt."""
        return processor(text=[text], images=images or None, return_tensors="pt")

    # --- images

    def crops(self, config: Any, inputs: BatchFeature) -> list[tuple[int, int]]:
        """(rows, columns) of tokens of every crop of the one image in `inputs`."""
        raise NotImplementedError

    def crops_of(self, config: Any, visual_tokens: int) -> list[tuple[int, int]] | None:
        """The crops of prompts with so many visual tokens; None where the number does not tell."""
        return None

    def visual_tokens(self, config: Any) -> int | None:
        """Visual tokens of every image, before pruning; None if they depend on the image."""
        return None

    def views(
        self, model: "ModelIdentity", image: Image.Image, grid: tuple[int, int]
    ) -> list[View]:
        """The pictures that the crops of an image are cut from, with the tokens in their places.

        Args:
            model: the model's settings as a record holds them.
            grid: (rows, columns) of tokens of its first crop.
        """
        return [View(image, np.arange(math.prod(grid)).reshape(grid))]

    def prompt_order(self, model: "ModelIdentity", views: Sequence[View]) -> list[int]:
        """The number of the token that each placeholder of an image holds, or NEWLINE."""
        return [int(number) for view in views for number in view.tokens.flat]

    # --- the self-test of injection

    def places(self, kept: Sequence[int], visual: int) -> list[int]:
        """The placeholders that remain when the tokens `kept` of the self-test's image do."""
        return list(kept)

    def positions(self, inputs: BatchFeature, visual: Tensor, length: int) -> Tensor:
        """[1, length] positions of the self-test's prompt and of what follows it.

        Args:
            visual: [P] positions of the placeholders.
        """
        return torch.arange(length)[None]

    def encoder_saliency(self, model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
        """[crops, H, N] saliency as the eager encoder gives it out; None: it does not."""
        return None

    # --- FLOPs

    def merging_blocks(self, config: Any) -> int:
        """How many blocks `Adapter.tower_blocks` has; 0: tokens cannot be merged there."""
        return 0

    def tower_flops(
        self, config: Any, rows: int, columns: int, merged_away: Sequence[int] = ()
    ) -> tuple[float, float]:
        """Of one crop in the image encoder: products with weights, and products of attention.

        Args:
            rows, columns: tokens of the crop after the projector, without merging.
            merged_away: tokens that each of the first blocks merges away between attention and MLP.

        Raises:
            ValueError: an image encoder that is not known.
        """
        raise NotImplementedError

    def projector_flops(self, config: Any) -> int:
        """Of one token in the projector."""
        raise NotImplementedError


def language_fields(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int
) -> dict[str, Any]:
    """The sizes of a language model by their names in its config."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }
