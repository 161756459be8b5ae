"""Documents per second of a sweep, beside lmms-eval's own model class with the same pruners.

    python scripts/bench_sweep.py                    6 pruners x 3 budgets x 6 tasks, minutes
    python scripts/bench_sweep.py --limit 8 --quick  the same on fewer documents and cells

Both sides run in this process, with the same task objects and scoring, on the embedded model, which
each side loads once. All answers are compared one by one. A third side is ours with one prompt at a
time and no cache; it shows the cost of the harness around `generate`. Writes CSV and Markdown to
--out.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lmms_eval.evaluator import simple_evaluate
from rich.progress import track

from secateur import cell
from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.efficiency.hardware import describe
from secateur.injection import Sample, inject
from secateur.models import PrunedModel
from secateur.paths import ROOT, SHAPES_MODEL
from secateur.pruners import build
from secateur.shapes.datasets import SWEEP_TASKS
from secateur.shapes.datasets import build as build_shapes
from secateur.tasks import TASKS
from secateur.tasks.load import load_tasks, manager_of

try:
    from lmms_eval.models.chat.llava_hf import LlavaHf
except ModuleNotFoundError as error:
    if error.name != "decord":
        raise
    sys.exit(
        "lmms-eval's own model class, which this compares with, imports decord: pip install decord"
    )

WEIGHTS = str(SHAPES_MODEL)
PRUNERS = ("random", "fastervlm", "visionzip", "divprune", "scope", "promprune")
BUDGETS = (48, 32, 16)


@dataclass(frozen=True)
class Row:
    """One cell on one side."""

    side: str
    pruner: str
    budget: str
    task: str
    documents: int
    seconds: float
    generating: float  # seconds inside `generate`


class Theirs(LlavaHf):
    """lmms-eval's class, with two changes.

    It keeps its model after an evaluation, and announces document ids, which seed random choices.
    """

    trace: Any

    def clean(self) -> None:
        pass

    def generate_until(self, requests: list[Any]) -> list[Any]:
        answers = []
        for request in requests:
            *_, doc_id, task, _ = request.args
            self.trace.announce([Sample(f"{task}/{doc_id}")])
            answers += super().generate_until([request])
        return answers


class Clock:
    """Seconds inside a model's `generate`."""

    def __init__(self, model: Any) -> None:
        self.generate, self.seconds = model.generate, 0.0
        model.generate = self

    def __call__(self, **inputs: Any) -> Any:
        started = time.perf_counter()
        output = self.generate(**inputs)
        self.seconds += time.perf_counter() - started
        return output


def theirs(model: Theirs, pruner: str, budget: Budget, task: Any, limit: int) -> list[str]:
    """The answers of lmms-eval's class to one cell."""
    with (
        inject(model.model, build(pruner), budget) as model.trace,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        results = simple_evaluate(
            model=model,
            tasks=[task],
            limit=limit,
            task_manager=manager_of(TASKS["pope"]),
            bootstrap_iters=0,
            process_docs_parallel=1,
        )
    (samples,) = results["samples"].values()
    return [
        sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]


def ours(
    model: PrunedModel, pruner: str, budget: Budget, task: Any, name: str, limit: int
) -> list[str]:
    """The answers of the harness to the same cell."""
    model.use(build(pruner), budget, None)
    return cell.run(model, task, TASKS[name], limit, 0)[1]["answer"].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=60, help="documents per task (default 60)")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="two pruners, one budget")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = build_shapes(Path(folder) / "shapes")
        tasks = load_tasks(list(SWEEP_TASKS), root)
        fields: dict[str, Any] = {
            "dtype": "float32",
            "device": "cpu",
            "attn_implementation": "sdpa",
        }
        sides: dict[str, Any] = {
            "sweep": PrunedModel(
                WEIGHTS, **fields, batch_tokens=options.batch_tokens, cache=EncodeCache(2**30)
            ),
            "one at a time": PrunedModel(WEIGHTS, **fields),
            "lmms-eval": Theirs(pretrained=WEIGHTS, device_map="cpu", **fields),
        }
        sides["sweep"].expect(set[str]().union(*(build(name).needs for name in PRUNERS)))
        clocks = {side: Clock(model.model) for side, model in sides.items()}
        pruners, budgets = (PRUNERS[:5:4], BUDGETS[:1]) if options.quick else (PRUNERS, BUDGETS)
        grid = [(p, Budget(tokens=b), t) for p in pruners for b in budgets for t in SWEEP_TASKS]
        rows = []
        for pruner, budget, name in track(grid, description="cells"):
            answers = {}
            # interleaved, so that all sides meet the same load of the machine
            for side, model in sides.items():
                started, before = time.perf_counter(), clocks[side].seconds
                if side == "lmms-eval":
                    answers[side] = theirs(model, pruner, budget, tasks[name], options.limit)
                else:
                    answers[side] = ours(model, pruner, budget, tasks[name], name, options.limit)
                seconds, documents = time.perf_counter() - started, len(answers[side])
                inside = clocks[side].seconds - before
                rows.append(Row(side, pruner, str(budget), name, documents, seconds, inside))
            if len({tuple(given) for given in answers.values()}) > 1:
                sys.exit(f"the answers of {pruner} at {budget} to {name} differ between the sides")
    _write(pd.DataFrame(rows), options)


def _write(rows: pd.DataFrame, options: argparse.Namespace) -> None:
    total = rows.groupby("side", sort=False)[["documents", "seconds", "generating"]].sum()
    total["documents per second"] = total["documents"] / total["seconds"]
    speed, around = total["documents per second"], total["seconds"] - total["generating"]
    total["speed-up"] = speed / float(speed["lmms-eval"])
    overhead = (float(around["one at a time"]) - float(around["lmms-eval"])) / float(
        total["generating"]["one at a time"]
    )
    cells = len(rows) // len(total)
    machine = f"{describe(torch.device('cpu'))}, load {os.getloadavg()[0]:.1f} at the end"
    text = f"""# Documents per second of a sweep

{machine}, torch {torch.__version__}, float32. {cells} cells of the shapes suite, the first
{options.limit} documents of each, batch_tokens {options.batch_tokens}. The sides take turns cell by
cell in one process, each model is loaded once, scoring is included. All
{int(total["documents"].iloc[0])} answers are the same on all sides. Generated by
`scripts/bench_sweep.py`.

{total.round(2).to_markdown()}

`generating`: seconds inside `generate`. Outside it, with one prompt at a time, the harness takes
{100 * overhead:+.1f} % of that time more than lmms-eval's class, for records, audits and hashes.
"""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sweep-cpu.md").write_text(text)
    rows.to_csv(options.out / "sweep-cpu.csv", index=False)
    print(text)


if __name__ == "__main__":
    main()
