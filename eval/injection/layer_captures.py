"""What methods inside the language model may look at before a layer."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.injection.adapter import Adapter, Rotary
from secateur.injection.frame import Frame, rows_at
from secateur.pruners import InLLMPruner, LayerTokens


class LayerCaptures:
    """Queries and keys of the layers before a cut, as hooks store them, and the `LayerTokens` made of them."""

    def __init__(self, adapter: Adapter, pruner: InLLMPruner) -> None:
        self.adapter, self.pruner = adapter, pruner
        self.projected: dict[tuple[str, int], Tensor] = {}

    def hooks(self, wanted: Callable[[int], bool]) -> Iterator[RemovableHandle]:
        """Forward hooks on the projections; what they give is stored where `wanted` says so of the layer at that moment."""

        def store(what: str, number: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
            if wanted(number):
                self.projected[what, number] = output.detach()

        attention = "attention" in self.pruner.needs and self.pruner.attention_of == "previous"
        for number in range(len(self.adapter.layers)):
            queries, keys = self.adapter.projections(number)
            if attention:
                yield queries.register_forward_hook(partial(store, "queries", number))
            if attention or "keys" in self.pruner.needs:
                yield keys.register_forward_hook(partial(store, "keys", number))

    @torch.no_grad()
    def tokens(self, number: int, frame: Frame, hidden: Tensor, rotary: Rotary) -> LayerTokens:
        """What the pruner may look at before layer `number`, rows padded at the end; uses up what the hooks stored."""
        needs, states, attention, asked, keys = self.pruner.needs, None, None, None, None
        if "attention" in needs:
            # rows padded at the end, with the first row again: it is finite
            count = frame.asked.sum(1, keepdim=True)
            places = frame.asked.sort(dim=1, descending=True, stable=True).indices[
                :, : max(1, int(count.max()))
            ]
            asked = torch.arange(places.shape[1], device=places.device) < count
            attention = self._attention(
                number, frame, hidden, rotary, torch.where(asked, places, places[:, :1])
            )
        if "keys" in needs:
            keys = self.adapter.heads(number - 1, self.projected["keys", number - 1], rotary)
        if "hidden" in needs:
            states = self.adapter.normed(hidden) if self.pruner.normed else hidden
        self.projected.clear()
        # padding goes to the end: a method that looks at positions, as DART does, must not see how long other prompts are
        front = frame.real.sort(dim=1, descending=True, stable=True).indices
        return LayerTokens(
            visual=frame.counted.gather(1, frame.visual),
            text=frame.text.gather(1, front),
            hidden=None if states is None else rows_at(states, front),
            attention=None
            if attention is None
            else rows_at(attention.transpose(1, 3), front).transpose(1, 3),
            asked=asked,
            keys=None if keys is None else rows_at(keys.transpose(1, 2), front).transpose(1, 2),
        )

    def _attention(
        self, number: int, frame: Frame, hidden: Tensor, rotary: Rotary, places: Tensor
    ) -> Tensor:
        """[B, H, Q, L] softmax attention of the positions `places` [B, Q] in the layer the pruner names, in float32."""
        adapter = self.adapter
        if self.pruner.attention_of == "previous":
            number -= 1
            queries, keys = (
                rows_at(self.projected["queries", number], places),
                self.projected["keys", number],
            )
        else:
            to_queries, to_keys = adapter.projections(number)
            entering = adapter.before_attention(number, hidden)
            queries, keys = to_queries(rows_at(entering, places)), to_keys(entering)
        query = adapter.heads(number, queries, adapter.rotary_rows(rotary, places)).float()
        key = adapter.heads(number, keys, rotary).float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * adapter.scaling(number)
        seen = frame.real[:, None] & (
            torch.arange(hidden.shape[1], device=places.device) <= places[..., None]
        )
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
