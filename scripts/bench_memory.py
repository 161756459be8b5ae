"""Memory of a process after cells of 10,000 documents of the embedded suite.

    python scripts/bench_memory.py                     two to three minutes (Linux with glibc)
    python scripts/bench_memory.py --documents 2000

One process answers POPE several times. Its memory is measured after each cell, before and after
`malloc_trim`, with which the allocator returns free memory to the system. Then records and caches
are dropped one after the other, so that the table shows what each of them held. Pages of the data
set's files are counted apart, because the kernel maps and drops them as it likes.

Then a cell of POPE's size, 500 images of 336 x 336 pixels with 18 questions each in POPE's order,
is answered by a narrow random model, to see how often an image is prepared. Writes Markdown and CSV
to --out.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import torch
from bench_prefixes import random_checkpoint, requests

from secateur import cell
from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.models import PrunedModel
from secateur.paths import ROOT, SHAPES_MODEL
from secateur.pruners import build
from secateur.shapes.datasets import build as build_shapes
from secateur.tasks import TASKS
from secateur.tasks.load import load_tasks

TASK, WARM_UP = "pope", 500


def resident(kind: str) -> float:
    """MiB of this process: private memory (`RssAnon`) or pages of files (`RssFile`)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) / 1024


class Ledger:
    """Measures the process at named moments."""

    def __init__(self, model: PrunedModel) -> None:
        self.model, self.rows, self.peak = model, list[dict[str, Any]](), 0.0

    def watch(self) -> None:
        """Update the peak; called after every answer."""
        self.peak = max(self.peak, resident("RssAnon"))

    def note(self, moment: str) -> None:
        """Add a row."""
        gc.collect()
        standing = resident("RssAnon")
        pyarrow.default_memory_pool().release_unused()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        cache = self.model.images.cache
        self.rows.append(
            {
                "moment": moment,
                "peak before": max(self.peak, standing),
                "as it stands": standing,
                "held": resident("RssAnon"),
                "cache": cache.bytes / 2**20,
                "evictions": cache.counts.memory_evictions,
                "Python objects": sys.getallocatedblocks(),
                "mapped files": resident("RssFile"),
            }
        )
        self.peak = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument(
        "--cache-mb", type=int, default=100, help="limit of the encode cache (default 100)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    options = parser.parse_args()
    if options.documents <= WARM_UP:
        parser.error(f"--documents {options.documents}: must be more than the warm-up's {WARM_UP}")

    with tempfile.TemporaryDirectory() as folder:
        task = load_tasks([TASK], build_shapes(Path(folder) / "shapes", {TASK: options.documents}))[
            TASK
        ]
        cache = EncodeCache(options.cache_mb * 2**20)
        weights = str(SHAPES_MODEL)
        model = PrunedModel(weights, dtype="float32", device="cpu", batch_tokens=8192, cache=cache)
        ledger = Ledger(model)
        records: list[Any] = []

        def answer(documents: int, pruner: str) -> None:
            records.clear()
            model.use(build(pruner), Budget(tokens=16), None)
            model.on_answer = ledger.watch
            records.append(cell.run(model, task, TASKS[TASK], documents, 0))

        answer(WARM_UP, "fastervlm")
        ledger.note(f"{WARM_UP} documents")
        for pruner in ("fastervlm", "scope", "random"):
            answer(options.documents, pruner)
            ledger.note(f"{options.documents:,} documents, {pruner}")
        records.clear()
        model.use(build("none"), Budget(), None)
        task._instances = None
        ledger.note("records dropped")
        model.images.cache, model.documents.tensors = EncodeCache(0), EncodeCache(0)
        del cache
        ledger.note("and caches dropped")
    long = long_cell(options.cache_mb)
    _write(pd.DataFrame(ledger.rows).set_index("moment"), long, options)


def long_cell(cache_mb: int, images: int = 500, questions: int = 18) -> dict[str, float]:
    """How often a cell of POPE's size prepares and encodes an image, and what its caches hold."""
    with tempfile.TemporaryDirectory() as folder:
        weights = random_checkpoint(Path(folder), layers=2, shrink=16)
        cache = EncodeCache(cache_mb * 2**20)
        model = PrunedModel(weights, dtype="float32", device="cpu", batch_tokens=8192, cache=cache)
        model.use(build("uniform"), Budget(tokens=64), None)
        prepared, plain = [0], model.inputs.images
        most = {"documents": 0, "encoder": 0}

        def images_of(prompt: Any) -> dict[str, torch.Tensor]:
            prepared[0] += 1
            return plain(prompt)

        def watch() -> None:
            most["documents"] = max(most["documents"], model.documents.tensors.bytes)
            most["encoder"] = max(most["encoder"], cache.bytes)

        model.inputs.images = images_of  # type: ignore[method-assign]
        model.on_answer = watch
        model.generate_until(requests(model, "pope", images, questions))
    documents = images * questions
    return {
        "documents": documents,
        "images prepared": prepared[0],
        "images encoded": cache.counts.misses,
        "hit rate": 100 * (1 - prepared[0] / documents),
        "of documents, MiB at most": most["documents"] / 2**20,
        "of the encoder, MiB at most": most["encoder"] / 2**20,
    }


def _write(table: pd.DataFrame, long: dict[str, float], options: argparse.Namespace) -> None:
    start, first, third, dropped = (table.iloc[place] for place in (0, 1, 3, -1))
    more, cached = first["held"] - start["held"], first["cache"] - start["cache"]
    later = third["held"] - first["held"]
    objects = dropped["Python objects"] - start["Python objects"]
    text = f"""# Memory of a long cell

Three cells of {options.documents:,} POPE documents of the embedded suite in one process on a CPU,
encode cache of {options.cache_mb} MiB; torch {torch.__version__}, glibc. In MiB, except evictions
and Python objects. Generated by `scripts/bench_memory.py`.

{table.round(0).astype(int).to_markdown()}

`held`: private memory after `malloc_trim`; `as it stands` also has what glibc keeps for the next
allocation. `cache`: bytes of its tensors. After the first cell {more:.0f} MiB more are held than
after the warm-up, of which {cached:.0f} are tensors of the cache; from the first cell to the third
it is {later:+.0f} MiB. Without records and caches, the number of Python objects differs by
{objects:+,.0f} from the warm-up's {start["Python objects"]:,.0f}.

## A cell of POPE's size at 336 pixels

A random LLaVA with 576 visual tokens, uniform at 64; tensors of documents may take a quarter of the
{options.cache_mb} MiB.

{pd.Series(long).round(1).to_frame("value").to_markdown()}

`hit rate`: share of the documents whose image tensors were there, in percent.
"""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory-cpu.md").write_text(text)
    table.to_csv(options.out / "memory-cpu.csv")
    print(text)


if __name__ == "__main__":
    main()
