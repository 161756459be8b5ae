"""The contract of the pruners between LLM layers, the counterpart of `base`."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.pruners.base import (
    Method,
    Selection,
    check_answer,
    check_keep,
    check_shape,
    is_finite,
)


@dataclass(frozen=True)
class LayerTokens:
    """What an in-LLM pruner may look at between two layers.

    B prompts of L positions hold n visual tokens each.
    """

    visual: Tensor  # [B, n] long, positions of the visual tokens, ascending
    text: Tensor  # [B, L] True at the real positions after the image
    # [B, L, D] input of the next layer, through the final norm with `apply_final_norm`
    hidden: Tensor | None = None
    # [B, H, Q, L] softmax rows of the positions in `queries`, rows padded at the end
    attention: Tensor | None = None
    query_mask: Tensor | None = None  # [B, Q] True at real rows of `attention`; None: all
    # [B, H, L, d] keys of the previous layer, after the rotary embedding
    keys: Tensor | None = None
    # [B, H, L, d] queries and keys of the next layer, before the rotary embedding
    next_queries: Tensor | None = None
    next_keys: Tensor | None = None
    next_rotated_keys: Tensor | None = None  # [B, H, L, d] these keys after it

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n)."""
        return self.visual.shape[0], self.visual.shape[1]

    def visual_rows(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, n, ...]: the rows of the visual tokens."""
        return x[torch.arange(len(x), device=x.device)[:, None], self.visual]

    def relevance(self) -> Tensor:
        """[B, n] attention the visual tokens get, mean over heads and real rows."""
        assert self.attention is not None
        rows = self.attention.mean(1)
        mask = torch.ones_like(rows[..., 0])
        mask = mask if self.query_mask is None else self.query_mask.to(rows.dtype)
        received = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return received.gather(1, self.visual)

    def survivors(self, kept: Tensor) -> Tensor:
        """Every position that stays, [B, L-n+k] ascending, for the kept visual tokens [B, k]."""
        stays = (
            torch.ones_like(self.text)
            .scatter(1, self.visual, False)
            .scatter(1, self.visual.gather(1, kept), True)
        )
        length = stays.shape[1] - self.visual.shape[1] + kept.shape[1]
        return stays.sort(dim=1, descending=True, stable=True).indices[:, :length]


@dataclass(frozen=True)
class PromptShape:
    """The sizes that decide an in-LLM pruner's FLOPs for one prompt."""

    layer_tokens: tuple[int, ...]  # visual tokens that each layer processes
    text_tokens: int  # all other positions
    width: int  # of the hidden states
    query_width: int  # of all query heads
    key_width: int  # of all key heads

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """(visual tokens before, after) of every cut."""
        return [(n, after) for n, after in pairwise(self.layer_tokens) if after != n]


@dataclass(frozen=True)
class InLLMPruner(Method):
    """Base of every method that drops visual tokens between LLM layers.

    The harness calls `schedule` once, `queries` once before layer 0, and `prune` before every layer
    of the schedule. Subclasses write `schedule`, `select` and `flops`. The indices of `select`
    count visual tokens (0..n-1); EXTRA rows with features follow them. An `adaptive` method gives
    `counts`; `schedule` and `tokens_after` then tell the most tokens that can pass.
    """

    # the layer whose rows `attention` holds
    attention_of: ClassVar[Literal["previous", "next"]] = "previous"
    apply_final_norm: ClassVar[bool] = False  # `hidden` goes through the LLM's final norm first

    @property
    def positions(self) -> Literal["original", "reindex"]:
        """Whether survivors keep their position ids; some methods make it a field."""
        return "original"

    @property
    def weighs_attention(self) -> bool:
        """Whether later layers add the logarithm of `sizes` to the scores of the tokens' keys."""
        return False

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        """0-based layer -> `keep` of the `prune` before it.

        Args:
            tokens: visual tokens of the prompt.
            layers: layers of the LLM.
            keep: the budget, as a mean over the layers or as the method defines it.
        """
        raise NotImplementedError

    def queries(self, embeddings: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """[B, L] mask of the positions whose attention `select` reads: the last one of the prompt.

        Args:
            embeddings: [B, L, D] input of layer 0.
            visual: [B, n] as in LayerTokens.
            text: [B, L] as in LayerTokens.
        """
        return text & (text.cumsum(1) == text.sum(1, keepdim=True))

    def tokens_after(self, tokens: int, keep: int) -> int:
        """Visual tokens after `prune` of `tokens` with `keep`, merged ones included."""
        return keep

    def layer_tokens(self, tokens: int, layers: int, keep: int) -> list[int]:
        """Visual tokens that each layer processes; the arguments are those of `schedule`."""
        plan, counts = self.schedule(tokens, layers, keep), []
        for layer in range(layers):
            tokens = self.tokens_after(tokens, plan[layer]) if layer in plan else tokens
            counts.append(tokens)
        return counts

    def average(self, tokens: int, layers: int, keep: int) -> float:
        """Mean of `layer_tokens`, by which budgets of in-LLM methods are compared."""
        return sum(self.layer_tokens(tokens, layers, keep)) / layers

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """Choose `keep` of n visual tokens (1 <= keep < n) per row; inputs: float32, finite."""
        raise NotImplementedError

    def flops(self, shape: PromptShape) -> float | None:
        """FLOPs of the dominating matrix products of all cuts; None: not counted.

        A multiply-add is 2 FLOPs. Captures that the model does not compute anyway count as well.
        """
        return None

    def prune(self, tokens: LayerTokens, keep: int) -> Selection:
        """`select` between checks; all tokens untouched when keep = n.

        Raises:
            PrunerError: keep outside 1..n; an input that is missing, misshapen or not finite; a
                wrong answer of `select`.
        """
        self._check_input(tokens, keep)
        batch, count = tokens.shape
        if keep == count:
            return Selection(torch.arange(count, device=tokens.visual.device).expand(batch, -1))
        floats = {name: getattr(tokens, name).float().contiguous() for name in self.needs}
        with torch.no_grad():
            selection = self.select(dataclasses.replace(tokens, **floats), keep)
        check_answer(self, selection, batch, count)
        return selection

    def _check_input(self, tokens: LayerTokens, keep: int) -> None:
        sizes: dict[str, int] = {}
        for name in ("visual", "text", *sorted(self.needs), "query_mask"):
            tensor = getattr(tokens, name)
            if tensor is None and name in self.needs:
                self.fail(f"needs {name!r}, which this call does not provide")
            if tensor is not None:
                check_shape(self, name, tensor, _AXES[name], sizes)
                if tensor.is_floating_point() and not bool(is_finite(tensor)):
                    self.fail(f"NaN or infinite values in {name} {list(tensor.shape)}")
        check_keep(self, keep, sizes["n"])
        if not bool(tokens.text.any(1).all()):
            self.fail(
                "text has a row without a real position; the prompt needs text after the image"
            )


# input -> its axes; a letter stands for the same size wherever it appears
_AXES = {
    "visual": ("B", "n"),
    "text": ("B", "L"),
    "hidden": ("B", "L", "D"),
    "attention": ("B", "H", "Q", "L"),
    "query_mask": ("B", "Q"),
    "keys": ("B", "G", "L", "d"),
    "next_queries": ("B", "H", "L", "d"),
    "next_keys": ("B", "G", "L", "d"),
    "next_rotated_keys": ("B", "G", "L", "d"),
}
