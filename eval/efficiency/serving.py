"""Requests in batches, as a server runs them: tokens per second, first token, cache.

All requests of a batch start together and generate equally many tokens, so the size of the batch is
the number of concurrent requests. A server that takes requests while others run mixes prefill and
decoding, which is not measured here; see docs/SERVING.md.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from transformers import BatchFeature

from secateur.efficiency.bench import Bench, Setting
from secateur.efficiency.bench_stats import ratio
from secateur.efficiency.latency import generate
from secateur.efficiency.memory import footprint
from secateur.injection import inject
from secateur.pruners import PrunerError

SETTING = ["model", "kind", "method", "budget", "batch"]


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        batches: numbers of requests that run together.
        new_tokens: of every request.
        warm_up, timed: rounds.
    """

    batches: tuple[int, ...]
    new_tokens: int
    warm_up: int
    timed: int

    def __post_init__(self) -> None:
        for name, low in {"new_tokens": 2, "warm_up": 0, "timed": 2}.items():
            if getattr(self, name) < low:
                raise ValueError(f"serving.{name}={getattr(self, name)}: at least {low}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"serving.batches={list(self.batches)}: numbers of at least 1")


def serve(
    bench: Bench,
    settings: Sequence[Setting],
    load: Load,
    deadline: float,
    tick: Callable[[], None],
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Measure every setting at every size of a batch. Each round runs all, in a random order.

    Args:
        bench: the model and its prompts.
        deadline: by `time.monotonic`; no round begins after it.
        tick: called after each batch.

    Returns:
        One row per timed batch: model, kind, method, budget, batch, round, first_token and total
        (ms), tokens (new ones of the batch), kv_bytes (of the batch, after the prefill); and what
        was left out, with the reason.
    """
    facts: dict[tuple[Setting, int], dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for setting in settings:
        for size in load.batches:
            try:
                facts[setting, size] = _facts(bench, setting, size, load.new_tokens)
            except (PrunerError, ValueError) as error:
                name = f"{bench.name} {setting.method} {setting.tokens}, batch {size}"
                left_out[name] = str(error)
            tick()
    rng, rows, work = np.random.default_rng(bench.plan.seed), [], list(facts)
    for number in range(load.warm_up + load.timed):
        if time.monotonic() > deadline:
            break
        for index in rng.permutation(len(work)):
            setting, size = work[index]
            with _ready(bench, setting, size, number) as inputs:
                generate(bench.model, inputs, load.new_tokens, bench.timeline)
            tokens = [at for name, at in bench.timeline.read() if name == "token"]
            tick()
            if number >= load.warm_up:
                times = {"round": number, "first_token": tokens[0], "total": tokens[-1]}
                rows.append(facts[setting, size] | times)
    return pd.DataFrame(rows), left_out


@contextlib.contextmanager
def _ready(bench: Bench, setting: Setting, size: int, number: int) -> Iterator[BatchFeature]:
    """The inputs of a batch, for the model in this setting."""
    count = len(bench.prompts)
    chosen = [bench.prompts[(number * size + place) % count] for place in range(size)]
    inputs = bench.inputs.collate([prompt for prompt, _ in chosen])
    if setting.pruner is None:
        yield inputs
        return
    with inject(bench.model, setting.pruner, setting.tokens, layout=bench.layout) as trace:
        trace.announce([sample for _, sample in chosen])
        yield inputs


def _facts(bench: Bench, setting: Setting, size: int, new_tokens: int) -> dict[str, Any]:
    """What of a setting is no time, from a batch that is not timed."""
    with _ready(bench, setting, size, 0) as inputs:
        held = footprint(
            bench.adapter, lambda: generate(bench.model, inputs, new_tokens, bench.timeline)
        )
    return {
        "model": bench.name,
        "kind": setting.kind,
        "method": setting.method,
        "budget": setting.tokens,
        "batch": size,
        "tokens": size * new_tokens,
        "kv_bytes": sum(held.kv_bytes),
    }


def summarise(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and batch: medians, and the speed-up with its interval.

    Columns besides those of `SETTING`: first_token (ms), tokens_per_second, kv_mb (MiB of the
    batch), speed_up, speed_up_low, speed_up_high: tokens per second over those of the unpruned
    model in the same batch, with a 95 % interval over rounds.

    Raises:
        ValueError: no samples of the unpruned model.
    """
    found = []
    groups = {key: own.sort_values("round") for key, own in samples.groupby(SETTING, sort=False)}
    unpruned = {
        (model, size): own
        for (model, kind, _, _, size), own in groups.items()
        if kind == "unpruned"
    }
    for key, own in groups.items():
        if (base := unpruned.get((key[0], key[4]))) is None:
            raise ValueError(f"{key[0]}: no samples of the unpruned model in batches of {key[4]}")
        value, low, high = ratio(base["total"], own["total"])
        seconds = own["total"].median() / 1e3
        found.append(
            dict(zip(SETTING, key, strict=True))
            | {
                "first_token": own["first_token"].median(),
                "tokens_per_second": own["tokens"].iloc[0] / seconds,
                "kv_mb": own["kv_bytes"].iloc[0] / 2**20,
                "speed_up": value,
                "speed_up_low": low,
                "speed_up_high": high,
            }
        )
    table = pd.DataFrame(found)
    order = table["kind"].map(["unpruned", "pruned"].index)
    table = table.assign(order=order).sort_values(
        ["model", "batch", "order", "budget", "method"],
        ascending=[True, True, True, False, True],
        ignore_index=True,
    )
    return table.drop(columns="order")


def markdown(summary: pd.DataFrame) -> str:
    """A section with one table per model."""
    lines = [
        "## Requests in batches",
        "",
        "Medians over rounds. All requests of a batch start together and generate equally many "
        "tokens. `first token`: ms until each request has one. `speed-up`: tokens per second over "
        "those of the unpruned model in a batch of the same size, with a 95 % interval.",
        "",
    ]
    for model, rows in summary.groupby("model", sort=False):
        interval = [
            f"{a:.2f} ({b:.2f}–{c:.2f})"
            for a, b, c in rows[["speed_up", "speed_up_low", "speed_up_high"]].to_numpy()
        ]
        shown = pd.DataFrame(
            {
                "batch": rows["batch"].astype(str),
                "method": rows["method"],
                "budget": rows["budget"].astype(str),
                "first token": rows["first_token"].map("{:.1f}".format),
                "tokens/s": rows["tokens_per_second"].map("{:.1f}".format),
                "speed-up": interval,
                "KV MiB": rows["kv_mb"].map("{:.1f}".format),
            }
        )
        columns = ("right", "left", *["right"] * 5)
        table = shown.to_markdown(index=False, disable_numparse=True, colalign=columns)
        lines += [f"### {model}", "", table, ""]
    return "\n".join(lines)
