"""Milliseconds per image of every selection, beside the literal formulation of its steps.

    python scripts/bench_select.py                       all; a quarter of an hour on two cores
    python scripts/bench_select.py --quick               seconds: one shape, one budget
    python scripts/bench_select.py --pruners scope,divprune --shapes 576x1024 --threads 2
    python scripts/bench_select.py --device cuda         on a GPU; counts kernels

Times are of `prune`, its checks included, on random clustered tokens in float32 on the device. The
literal formulation (tests/reference/literal.py, one image) runs interleaved with it in the same
process. The cosine Gram matrix is timed alone as well: no method that needs it can be faster.
Writes CSV and Markdown to --out.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.progress import track

from secateur.efficiency.hardware import describe
from secateur.pruners import REGISTRY, InLLMPruner, LayerTokens, VisualTokens, build
from secateur.pruners.linalg import cosine_gram
from secateur.pruners.tower import TowerPruner

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference.literal import METHODS as LITERAL

GRAM = "cosine Gram"  # stands where a pruner's name does
PREFIX, TEXT, HEADS = 35, 40, 16  # positions before and after the image, attention heads
FEWEST, SECONDS = 5, 1.0  # a slow measurement ends after a second, with at least so many repeats


@dataclass(frozen=True)
class Shape:
    """One image: crops of rows x columns tokens."""

    crops: int
    grid: tuple[int, int]
    width: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


SHAPES = {
    "576x1024": Shape(1, (24, 24), 1024),
    "576x4096": Shape(1, (24, 24), 4096),
    "5x576x1024": Shape(5, (24, 24), 1024),
    "1296x3584": Shape(1, (36, 36), 3584),
}


@dataclass
class Row:
    """One measurement; times in milliseconds per image."""

    pruner: str
    shape: str
    keep: int  # per crop
    batch: int
    median: float
    q1: float
    q3: float
    repeats: int
    literal: float | None = None
    speedup: float | None = None
    identical: bool | None = None
    kernels: int | None = None


def visual_tokens(
    needs: frozenset[str], shape: Shape, images: int, device: torch.device
) -> VisualTokens:
    """Only the captures that are needed; tokens in twelve clusters."""
    generator = torch.Generator(device).manual_seed(0)
    rows, count = images * shape.crops, shape.tokens

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def clusters(length: int, width: int = shape.width) -> torch.Tensor:
        centres = draw(rows, 12, width)
        label = torch.randint(12, (rows, length), generator=generator, device=device)
        return centres[torch.arange(rows, device=device)[:, None], label] + 0.25 * draw(
            rows, length, width
        )

    def attention(*size: int) -> torch.Tensor:
        logits = draw(*size)
        return (2.5 * (logits + logits[:, :1])).softmax(-1)  # heads agree in part

    make: dict[str, Callable[[], torch.Tensor]] = {
        "features": lambda: clusters(count),
        "encoder_features": lambda: clusters(count),
        "cls_token": lambda: draw(rows, shape.width),
        "saliency": lambda: attention(rows, HEADS, count + 1)[..., 1:],
        "first_saliency": lambda: attention(rows, HEADS, count + 1)[..., 1:],
        "object_attention": lambda: attention(rows, count),
        "output_attention": lambda: attention(rows, count),
        "encoder_keys": lambda: clusters(1 + count),
        "last_queries": lambda: draw(rows, 1 + count, shape.width),
        "last_keys": lambda: clusters(1 + count),
        "text_embeddings": lambda: draw(rows, TEXT, shape.width),
        "clip_patches": lambda: clusters(count, 768),
        "clip_text": lambda: draw(rows, 1, 768),
    }
    captures: dict[str, Any] = {name: make[name]() for name in make if name in needs}
    images_of_rows = tuple(row // shape.crops for row in range(rows))
    return VisualTokens(grid=shape.grid, image_of_row=images_of_rows, **captures)


def layer_tokens(
    pruner: InLLMPruner, shape: Shape, images: int, device: torch.device
) -> LayerTokens:
    """A prompt of prefix, all crops of an image, and text."""
    generator = torch.Generator(device).manual_seed(0)
    count = shape.crops * shape.tokens
    length, head = PREFIX + count + TEXT, max(1, shape.width // HEADS)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    visual = torch.arange(PREFIX, PREFIX + count, device=device).repeat(images, 1)
    text = (torch.arange(length, device=device) >= PREFIX + count).repeat(images, 1)
    hidden = draw(images, length, shape.width)
    asked = (
        int(pruner.queries(hidden, visual, text).sum(1).max()) if "attention" in pruner.needs else 1
    )
    return LayerTokens(
        visual=visual,
        text=text,
        hidden=hidden,
        attention=(2.5 * draw(images, HEADS, asked, length)).softmax(-1),
        keys=draw(images, HEADS, length, head),
        **{
            name: draw(images, HEADS, length, head)
            for name in ("next_queries", "next_keys", "next_rotated_keys")
            if name in pruner.needs
        },
    )


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def count_kernels(call: Callable[[], Any]) -> int:
    """Kernels and copies that one call launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure(
    name: str, label: str, keep: int, batch: int, repeats: int, device: torch.device, literal: bool
) -> Row:
    """Median and quartiles of a pruner's `prune`, in turns with the literal formulation."""
    pruner, shape = build(name), SHAPES[label]
    tokens: Any
    if isinstance(pruner, InLLMPruner):
        tokens, budget = layer_tokens(pruner, shape, batch, device), keep * shape.crops
    else:
        tokens, budget = visual_tokens(pruner.needs, shape, batch, device), keep

    def ours() -> Any:
        return pruner.prune(tokens, budget)

    reference = LITERAL.get(name) if literal and batch == shape.crops == 1 else None
    calls = [ours, lambda: reference(tokens, budget)] if reference else [ours]
    times, *literal_times = in_turns(calls, repeats, device)
    q1, median, q3 = (value / batch for value in quantiles(times, n=4, method="inclusive"))
    row = Row(name, label, keep, batch, median, q1, q3, len(times))
    if reference:
        row.literal = quantiles(literal_times[0], n=4, method="inclusive")[1]
        row.speedup = row.literal / median
        row.identical = reference(tokens, budget) == ours().indices[0].tolist()
    if device.type == "cuda":
        row.kernels = count_kernels(ours)
    return row


def measure_gram(label: str, batch: int, repeats: int, device: torch.device) -> Row:
    """The same of the cosine Gram matrix of all tokens, which most methods begin with."""
    features = visual_tokens(frozenset({"features"}), SHAPES[label], batch, device).features
    (times,) = in_turns([lambda: cosine_gram(features)], repeats, device)
    q1, median, q3 = (value / batch for value in quantiles(times, n=4, method="inclusive"))
    return Row(GRAM, label, 0, batch, median, q1, q3, len(times))


def in_turns(
    calls: list[Callable[[], Any]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each call, by turns, after two turns of warm-up; at least FEWEST turns."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(repeats + 2):
        for call, found in zip(calls, times, strict=True):
            elapsed = timed(call, device)
            if turn >= 2:
                found.append(elapsed)
        if len(times[0]) >= FEWEST and time.perf_counter() - start > SECONDS:
            break
    return times


def markdown(rows: list[Row], where: str) -> str:
    """One table per shape: one row per pruner and budget, one column per batch."""
    lines = [
        "# Selection time, milliseconds per image",
        "",
        f"{where}. Median (quartiles); `prune` with its checks, float32.",
    ]
    lines += ["On 5x576 a budget is per crop. Generated by `scripts/bench_select.py`.", ""]
    batches = sorted({row.batch for row in rows})
    cuda = any(row.kernels is not None for row in rows)
    for label in dict.fromkeys(row.shape for row in rows):
        gram = ", ".join(
            f"{row.median:.2f} (batch {row.batch})"
            for row in rows
            if row.shape == label and row.pruner == GRAM
        )
        heads = [
            "pruner",
            "keep",
            *(f"batch {batch}" for batch in batches),
            "literal, batch 1",
            "speed-up",
            "same indices",
        ]
        heads += ["kernels, batch 1"] if cuda else []
        lines += [f"## {label}", "", f"The cosine Gram matrix alone: {gram}.", ""]
        lines += [f"| {' | '.join(heads)} |", "|---" * 2 + "|---:" * (len(heads) - 2) + "|"]
        cells = {
            (row.pruner, row.keep, row.batch): row
            for row in rows
            if row.shape == label and row.pruner != GRAM
        }
        for pruner, keep in dict.fromkeys((pruner, keep) for pruner, keep, _ in cells):
            found = [cells.get((pruner, keep, batch)) for batch in batches]
            one = next((row for row in found if row), None)
            line = [
                pruner,
                str(keep),
                *(f"{r.median:.2f} ({r.q1:.2f}-{r.q3:.2f})" if r else "" for r in found),
            ]
            if one is not None and one.literal is not None and one.speedup is not None:
                line += [
                    f"{one.literal:.2f}",
                    f"{one.speedup:.1f}",
                    "yes" if one.identical else "NO",
                ]
            else:
                line += ["", "", ""]
            line += [str(one.kernels)] if cuda and one is not None else []
            lines.append(f"| {' | '.join(line)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    # what merges in the encoder has no selection of its own
    inside = {name for name, method in REGISTRY.items() if issubclass(method, TowerPruner)}
    names = sorted(set(REGISTRY) - {"none"} - inside)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pruners", default=",".join(names), help="comma-separated names")
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help="comma-separated, tokens x width"
    )
    parser.add_argument("--keep", default="64,128,192", help="budgets per crop")
    parser.add_argument("--batch", default="1,8", help="images per call")
    parser.add_argument(
        "--repeats", type=int, default=15, help="at most; slow measurements stop earlier"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--no-literal", action="store_true", help="leave the literal formulations out"
    )
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="576x1024, keep 64, 3 repeats, files named select-*-quick",
    )
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.keep, args.repeats = "576x1024", "64", 3
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(args.device)
    load = f", load {os.getloadavg()[0]:.1f} at the start" if device.type == "cpu" else ""
    where = f"{describe(device)}{load}, torch {torch.__version__}"

    plan: list[Callable[[], Row]] = []
    batches = [int(batch) for batch in args.batch.split(",")]
    for label in args.shapes.split(","):
        plan += [partial(measure_gram, label, batch, args.repeats, device) for batch in batches]
        for name in args.pruners.split(","):
            # the grid fixes the budget of pooling
            budgets = (
                [SHAPES[label].tokens // 4]
                if name == "pooling"
                else [int(keep) for keep in args.keep.split(",")]
            )
            plan += [
                partial(
                    measure, name, label, keep, batch, args.repeats, device, not args.no_literal
                )
                for keep in budgets
                for batch in batches
            ]
    rows = [job() for job in track(plan, f"{len(plan)} measurements")]

    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"select-{device.type}{'-quick' if args.quick else ''}"
    with (args.out / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*(field.name for field in fields(Row)), "device"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(
            {key: _number(value) for key, value in asdict(row).items()} | {"device": where}
            for row in rows
        )
    table = markdown(rows, where)
    (args.out / f"{stem}.md").write_text(table)
    print(table)


def _number(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
