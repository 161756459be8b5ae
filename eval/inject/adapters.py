"""The only place that knows the module names of a model family."""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

Rotary = tuple[Tensor, Tensor]  # cosines and sines as a family's layers get them; here [B or 1, L, d]


class LlavaAdapter:
    """LLaVA-1.5: a CLIP tower with CLS, one crop an image, all patches in raster order."""

    # capture a pruner may need -> raw tensors it is made from; hooks store them under these names, one row an image:
    # encoder_features [I, N, C] and features [I, N, D] around the projector; hidden, queries, keys [I, 1+N, C] of the block
    # that gives encoder_features; object_* of a middle one, last_* of the last
    SOURCES: ClassVar[dict[str, tuple[str, ...]]] = {
        "features": ("features",),
        "encoder_features": ("encoder_features",),
        "cls_token": ("hidden",),
        "saliency": ("queries", "keys"),
        "object_attention": ("object_queries", "object_keys"),
        "output_attention": ("queries", "keys"),
        "encoder_keys": ("keys",),
        "last_queries": ("last_queries",),
        "last_keys": ("last_keys",),
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.core = self.model.model
        self.language_model = self.core.language_model
        self.projector = self.core.multi_modal_projector
        layer, strategy = self.model.config.vision_feature_layer, self.model.config.vision_feature_select_strategy
        if not isinstance(layer, int) or strategy != "default":
            raise ValueError(
                f"this model reads features from layer(s) {layer!r} with strategy {strategy!r}; "
                "pruning supports one layer and strategy 'default' (CLS dropped)"
            )
        blocks = self._blocks()
        # hidden_states has one entry more than there are blocks: entry k is the output of block k - 1
        self.block: Any = blocks[layer if layer < 0 else layer - 1]
        self.last_block: Any = blocks[-1]
        # HiPrune's object layer, the 9th of CLIP-L's 24 (its default); in towers of other depth at the same share
        self.object_block: Any = blocks[max(round(len(blocks) * 9 / 24), 1) - 1]

    def _blocks(self) -> nn.ModuleList:
        """The tower's encoder blocks; their parent moved between releases of transformers."""
        for name, module in self.core.vision_tower.named_modules():
            if name.endswith("encoder.layers"):
                return module
        raise ValueError(f"no encoder blocks found in {type(self.core.vision_tower).__name__}")

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
        """Forward hooks that store what `needs` asks for, and nothing else."""
        unknown = sorted(need for need in needs if need not in self.SOURCES)
        if unknown:
            raise ValueError(f"{type(self).__name__[:-7]} models do not provide {', '.join(unknown)}")
        wanted = {source for need in needs for source in self.SOURCES[need]} | {"features"}

        def store(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            into[name] = (output[0] if isinstance(output, tuple) else output).detach()

        def store_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            into["encoder_features"] = args[0].detach()

        if "encoder_features" in wanted:
            yield self.projector.register_forward_pre_hook(store_input)
        places = {
            "features": self.projector,
            "hidden": self.block,
            "queries": self.block.self_attn.q_proj,
            "keys": self.block.self_attn.k_proj,
            "object_queries": self.object_block.self_attn.q_proj,
            "object_keys": self.object_block.self_attn.k_proj,
            "last_queries": self.last_block.self_attn.q_proj,
            "last_keys": self.last_block.self_attn.k_proj,
        }
        for name, module in places.items():
            if name in wanted:
                yield module.register_forward_hook(partial(store, name))

    def captures(self, needs: frozenset[str], raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors `needs` names, as `VisualTokens` defines them, one row an image."""
        made = {
            "cls_token": lambda: raw["hidden"][:, 0],
            "saliency": lambda: self._attention(raw["queries"][:, :1], raw["keys"])[:, :, 0, 1:],
            "object_attention": lambda: self._received(raw["object_queries"], raw["object_keys"]),
            "output_attention": lambda: self._received(raw["queries"], raw["keys"]),
            "encoder_keys": lambda: raw["keys"],
        }
        return {name: made[name]() if name in made else raw[name] for name in needs | {"features"}}

    def _attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Softmax attention of the given queries [I, Q, C] over CLS and patches [I, 1+N, C], [I, H, Q, 1+N], in float32."""
        heads = self.block.self_attn.num_heads
        query = queries.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        key = keys.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)

    def _received(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[I, N] attention each patch gets, mean over heads and all queries, CLS's among them."""
        return self._attention(queries, keys).mean((1, 2))[:, 1:]

    def grid(self, count: int) -> tuple[int, int]:
        """(rows, columns) of an image's tokens."""
        side = round(count**0.5)
        if side * side != count:
            raise ValueError(f"{count} visual tokens do not form a square grid")
        return side, side

    def project(self, features: Tensor) -> Tensor:
        """[..., C] -> [..., D], in the model's dtype."""
        return self.projector(features.to(next(self.projector.parameters()).dtype))

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
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def scaling(self, layer: int) -> float:
        """What a layer multiplies products of queries and keys with."""
        attention: Any = self.layers[layer].self_attn
        return attention.scaling


_FAMILIES = {"llava": LlavaAdapter}


def adapter_for(model: PreTrainedModel) -> LlavaAdapter:
    """The adapter of a model's family.

    Raises:
        ValueError: a family that is not supported.
    """
    family = getattr(model.config, "model_type", "?")
    if family not in _FAMILIES:
        raise ValueError(f"model type {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[family](model)
