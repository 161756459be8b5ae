"""A model family to the rest of the harness. Adapters are the only places that know module names."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from secateur.injection.contract import require
from secateur.injection.layout import EncodedImage

Rotary = tuple[
    Tensor, Tensor
]  # cosines and sines as a family's layers get them, [B or 1, L, d]; with M-RoPE [3, B or 1, L, d]


class Adapter:
    """A model family to the rest of the harness; here the decoder that all of them share in kind.

    Subclasses say how images are encoded: `SOURCES`, `hooks`, `encoded` and `project`.
    """

    # capture a pruner may need -> raw tensors it is made from, which hooks store under these names
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
    IMAGE_ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "pixel_values",
    )  # of get_image_features, read by name
    POSITIONS: ClassVar[tuple[str, ...]] = (
        "compact",
        "original",
    )  # position policies; the first is the default
    keeps_newlines: bool = True  # False: rows of tiles go on without the embedding that ends them

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
        """Forward hooks for one call of the encoder that store what `needs` asks for, and nothing else."""
        raise NotImplementedError

    def encoded(
        self, needs: frozenset[str], raw: dict[str, Tensor], arguments: dict[str, Any]
    ) -> list[EncodedImage]:
        """The images of one call of the encoder, with the captures `needs` names and `features`.

        Args:
            raw: what the hooks stored.
            arguments: of the core's `get_image_features`, by name.
        """
        raise NotImplementedError

    def one_by_one(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The arguments of the core's `get_image_features`, an image at a time."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """Encoder features [..., C] -> LLM width [..., D], in the model's dtype."""
        raise NotImplementedError

    def check_known(self, needs: frozenset[str]) -> None:
        """Raise ValueError for captures this family has not."""
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            family = type(self).__name__.removesuffix("Adapter")
            raise ValueError(f"{family} models do not provide {', '.join(unknown)}")

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids -> LLM embeddings."""
        return self.model.get_input_embeddings()(ids)

    def normed(self, hidden: Tensor) -> Tensor:
        """The language model's final norm of hidden states [B, L, D]."""
        return self.language_model.norm(hidden)

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs are the queries and the keys of a layer, heads side by side, before the rotary embedding."""
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
        """[B, L, H d] of one of the projections -> [B, H, L, d] behind the rotary embedding."""
        attention: Any = self.layers[layer].self_attn
        x = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (part[:, None] for part in rotary)
        return rotate(x, cos, sin)

    def scaling(self, layer: int) -> float:
        """What a layer multiplies products of queries and keys with."""
        attention: Any = self.layers[layer].self_attn
        return attention.scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [..., L, d], first half against second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin
