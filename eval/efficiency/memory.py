"""Memory of one request: the KV caches of the layers, and the allocator's peak."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from secateur.families.base import Adapter
from secateur.families.contract import cache_of


@dataclass(frozen=True)
class Footprint:
    """Bytes of one request. Peaks are None on a CPU, where torch does not count allocations."""

    kv_bytes: tuple[int, ...]  # keys and values of each layer, after the prefill
    peak_bytes: int | None  # the most that was allocated, weights included
    peak_delta_bytes: int | None  # the same, without what was allocated before the request
    masked: bool  # the last layer's attention got a mask; sdpa then uses another kernel


def footprint(adapter: Adapter, request: Callable[[], Any]) -> Footprint:
    """Run one request and measure its caches and peak. The hooks cost time: do not time it."""
    seen: dict[str, Any] = {}

    def cache(_module: Any, _args: Any, output: Any) -> None:
        if "kv" not in seen:
            seen["kv"] = tuple(
                layer.keys.nbytes + layer.values.nbytes for layer in cache_of(output).layers
            )

    def mask(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.setdefault("masked", kwargs.get("attention_mask") is not None)

    handles = [
        adapter.language_model.register_forward_hook(cache),
        adapter.layers[-1].register_forward_pre_hook(mask, with_kwargs=True),
    ]
    cuda = adapter.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.synchronize(adapter.device)
            torch.cuda.reset_peak_memory_stats(adapter.device)
        before = torch.cuda.memory_allocated(adapter.device) if cuda else 0
        request()
        peak = torch.cuda.max_memory_allocated(adapter.device) if cuda else None
    finally:
        for handle in handles:
            handle.remove()
    return Footprint(seen["kv"], peak, None if peak is None else peak - before, seen["masked"])
