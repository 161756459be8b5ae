"""Latency of one request, phase by phase.

Hooks set marks on the device's own timeline; they change nothing that runs. The phases add up to
the time of the first token:

vision      `get_image_features` of the model: tower and projector
captures    what the pruner needs, computed from it
selection   from the call of the language model to its first layer: selection, pruned prompt, audit;
            for methods inside the language model also their cuts
prefill     the language model over the prompt, without the cuts
rest        what `generate` does around these, and the head

After the first token, `decode` is the mean time of a step.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.generation.streamers import BaseStreamer

from secateur.families.base import Adapter
from secateur.injection.hooks import encoding_by

PHASES = ("vision", "captures", "selection", "prefill", "rest")
Marks = list[tuple[str, float]]


class ClockJumped(RuntimeError):
    """Times that are impossible; the sample is of no use."""


class Timeline:
    """Marks in the order in which the device reaches them.

    They are CUDA events; on a CPU they are times of the monotonic clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._marks: list[tuple[str, float, Any]] = []  # name, the host's clock, event

    def start(self) -> None:
        """Forget all marks and set the first one, `call`, when the device is idle."""
        self._marks.clear()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        self.mark("call")

    def mark(self, name: str, *_: Any) -> None:
        event = None
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        self._marks.append((name, time.perf_counter(), event))

    def read(self) -> Marks:
        """The marks in milliseconds since `call`. The host must have waited for the last one.

        Raises:
            ClockJumped: a time is not finite or less than the one before, or at the end the clocks
                of device and host differ.
        """
        _, start, first = self._marks[0]
        host = [1e3 * (at - start) for _, at, _ in self._marks]
        times = host
        if self.cuda:
            torch.cuda.synchronize(self.device)
            times = [first.elapsed_time(event) for _, _, event in self._marks]
        return _checked(
            [(name, at) for (name, *_), at in zip(self._marks, times, strict=True)], host[-1]
        )


def _checked(marks: Marks, host: float) -> Marks:
    """Check times; `host` is the last mark by the host's clock."""
    before = 0.0
    for name, at in marks:
        if not math.isfinite(at) or at < before:
            raise ClockJumped(
                f"the clock jumped: mark {name!r} at {at:.3f} ms, after one at {before:.3f} ms; "
                "run the benchmark again"
            )
        before = at
    if abs(before - host) > 1 + 0.05 * host:
        raise ClockJumped(
            f"the device says {before:.3f} ms and the host {host:.3f} ms for one request; run the "
            "benchmark again"
        )
    return marks


def phases(marks: Marks) -> dict[str, float]:
    """Milliseconds of every phase, of `first_token` and of `decode` (NaN with a single token)."""
    first: dict[str, float] = {}
    for name, at in marks:
        first.setdefault(name, at)
    cuts = [
        (name, at)
        for name, at in marks
        if name in ("cut", "cut end") and at <= first["prefill end"]
    ]
    inside = sum(at if name == "cut end" else -at for name, at in cuts)
    tokens = [at for name, at in marks if name == "token"]
    found = {
        "vision": first["vision end"] - first["vision"],
        "selection": first["prefill"] - first["entry"] + inside,
        "prefill": first["prefill end"] - first["prefill"] - inside,
    }
    found["captures"] = first["images end"] - first["images"] - found["vision"]
    found["rest"] = tokens[0] - sum(found.values())
    decode = (tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else math.nan
    return {name: found[name] for name in PHASES} | {"first_token": tokens[0], "decode": decode}


class _Tokens(BaseStreamer):
    """Marks each token when the host has it. The first call of `put` brings the prompt."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.prompt = timeline, True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.timeline.mark("token")
        self.prompt = False

    def end(self) -> None:
        pass


def generate(model: Any, inputs: BatchFeature, new_tokens: int, timeline: Timeline) -> None:
    """Generate exactly `new_tokens` tokens for one prompt, greedily."""
    tokens = _Tokens(timeline)
    timeline.start()
    model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        streamer=tokens,
    )


@contextlib.contextmanager
def marked_images(core: Any, timeline: Timeline, name: str) -> Iterator[None]:
    """Marks around the current `get_image_features` of the core, its own or an injection's."""
    inner = core.get_image_features

    def encode(*args: Any, **kwargs: Any) -> Any:
        timeline.mark(name)
        output = inner(*args, **kwargs)
        timeline.mark(f"{name} end")
        return output

    with encoding_by(core, encode):
        yield


@contextlib.contextmanager
def marked_prompt(adapter: Adapter, timeline: Timeline, cuts: Iterable[int]) -> Iterator[None]:
    """Marks around the language model, and around the hooks of the layers `cuts`.

    Enter it inside the block of an injection: its hooks are then between `entry` and `prefill`.
    """

    def at(name: str) -> Callable[..., None]:
        return lambda *_: timeline.mark(name)

    with contextlib.ExitStack() as stack:
        for module, before, after in (
            (adapter.language_model, "entry", "prefill"),
            *((adapter.layers[number], "cut", "cut end") for number in cuts),
        ):
            stack.callback(module.register_forward_pre_hook(at(before), prepend=True).remove)
            stack.callback(module.register_forward_pre_hook(at(after)).remove)
        stack.callback(adapter.language_model.register_forward_hook(at("prefill end")).remove)
        yield


@contextlib.contextmanager
def ceiling_prompt(adapter: Adapter, inputs: BatchFeature, tokens: int) -> Iterator[BatchFeature]:
    """The ceiling of a budget: image and text as before, but a prompt with `tokens` visual tokens.

    Yields the inputs for the model within the block. The image is encoded as always, and its first
    features become the visual tokens. With M-RoPE they form a single row; these other coordinates
    cost the same.

    Args:
        inputs: one prompt with one image.

    Raises:
        ValueError: the prompt has fewer visual tokens.
    """
    visual = inputs["input_ids"][0] == adapter.image_token_id
    places = int(visual.sum())
    if tokens > places:
        raise ValueError(
            f"{tokens} visual tokens do not fit into the {places} places of the prompt; lower the "
            "budget"
        )
    if tokens == places:
        yield inputs
        return
    stays = ~visual | (visual.cumsum(0) <= tokens)
    length = len(visual)
    fewer = {
        name: value[:, stays] if value.shape[1:] == (length,) else value
        for name, value in inputs.items()
    }
    inner, grid = adapter.core.get_image_features, inputs.get("image_grid_thw")
    if grid is not None:
        merge = adapter.model.config.vision_config.spatial_merge_size
        fewer["image_grid_thw"] = grid.new_tensor([[1, merge, merge * tokens]])

    def encode(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {}) | (
            {} if grid is None else {"image_grid_thw": grid}
        )
        output = inner(**arguments)
        features = torch.cat([*output.pooler_output])[:tokens]  # of one image, perhaps in tiles
        extras = {name: value[:tokens] for name, value in adapter.extras(output).items()}
        return adapter.output([features], [extras])

    with encoding_by(adapter.core, encode):
        yield BatchFeature(fewer)
