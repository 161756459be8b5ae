"""Estimate how long experiments take: documents left, and hours at measured rates.

python scripts/plan.py promprune_table1 prunesid_table2   two experiments; shared cells count once
python scripts/plan.py --rate 12                          all papers, 12 prompts per second
python scripts/plan.py --rate llava_1_5_7b=8.3 llava_next_7b=3.9   a rate for each model

Rates come from the finished cells in --results, by model; --rate gives a rate for models without
finished cells. Without either, the hours stay open. First run one small cell of each model:
python scripts/sweep.py model=... suite=hub limit=200. docs/PLANNING.md shows the sum for the whole
grid. --seeds 3 adds what `random.seed=0,1,2` runs: differences to random need three seeds.

A rate is of prompts that are answered alone. Where questions about an image share its prefill,
every question but the first counts as TAIL of a prompt.
"""

import argparse
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path

import pandas as pd

from secateur.experiments import jobs, of_papers
from secateur.job import Job
from secateur.paths import ROOT
from secateur.pruners import InLLMPruner, Pruner
from secateur.pruners.random import Random
from secateur.store import read
from secateur.tasks import TASKS, Task

Method = Pruner | InLLMPruner
DEVICES = (1, 8, 64)
# what a question and its answer cost beside a whole prompt; by results/bench/prefixes-cpu.md, on a
# random LLaVA with 576 visual tokens, 0.15 unpruned and 0.34 at 64 tokens
TAIL = 0.3


def shares(job: Job) -> bool:
    """Whether a job's questions about an image share its prefill."""
    pruner = job.pruner
    return not job.strict and isinstance(pruner, Pruner) and pruner.question_agnostic


def seeded(pruner: Method, seeds: int) -> list[Method]:
    """`random` with so many seeds, any other method once."""
    if not isinstance(pruner, Random):
        return [pruner]
    return [replace(pruner, seed=pruner.seed + number) for number in range(seeds)]


def prompts(task: Task | None, documents: int, shared: bool) -> float:
    """How many prompts, each answered alone, cost as much as these documents of a task."""
    whole = documents
    if shared and task and task.images and task.documents:
        whole = ceil(documents * task.images / task.documents)
    return whole + TAIL * (documents - whole)


def rates(results: Path) -> dict[str, float]:
    """Prompts per second, by model, of the finished cells on the hub's data."""
    records = [read(path.parent) for path in (results / "runs" / "hub").glob("**/record.json")]
    found = pd.DataFrame(
        [
            (
                one.identity.model.name,
                prompts(
                    TASKS.get(one.identity.task),
                    one.documents,
                    bool(one.environment.shared_prefixes),
                ),
                one.seconds,
            )
            for one in records
        ],
        columns=["model", "prompts", "seconds"],
    )
    total = found.groupby("model")[["prompts", "seconds"]].sum()
    return {
        str(model): float(rate) for model, rate in (total["prompts"] / total["seconds"]).items()
    }


def given(words: list[str], models: set[str]) -> dict[str, float]:
    """Rates from the command line, `12` for every model or `model=12`.

    Raises:
        ValueError: a rate is no positive number, or its model is not in the plan.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if name and name not in models:
            raise ValueError(
                f"--rate {word}: {name!r} is not in this plan, "
                f"which has {', '.join(sorted(models))}"
            )
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf"):
            raise ValueError(
                f"--rate {word}: prompts per second are a positive number, 12 or model=12"
            )
        found |= {name: rate} if name else {model: rate for model in models if model not in found}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = of_papers()
    parser.add_argument(
        "experiments", nargs="*", default=every, metavar="experiment", help="default: all of papers"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument(
        "--rate",
        nargs="+",
        default=[],
        help="prompts per second on one device, if none was measured: 12, or model=12 ...",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="of random, where it is a baseline (default 1)"
    )
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    if unknown := sorted(set(options.experiments) - set(every)):
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(every)}")
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")

    measured, cells = rates(options.results), {}
    for experiment in options.experiments:
        for job in jobs(experiment, options.results):
            for task, pruner in product(job.tasks, seeded(job.pruner, options.seeds)):
                cell = job.cell(task, pruner)
                if not cell.exists():
                    entry = job.suite.find(task)
                    size = entry.documents
                    if size is None and job.limit is None:
                        raise ValueError(
                            f"the number of documents of task {task} is not known; set a limit"
                        )
                    documents = min(n for n in (job.limit, size) if n is not None)
                    alone = prompts(entry, documents, shares(job))
                    cells[cell.folder] = (job.model.name, 1, documents, alone)
    columns = ["model", "cells", "documents", "as prompts"]
    table = pd.DataFrame(cells.values(), columns=columns).groupby("model").sum()
    try:
        known = given(options.rate, set(map(str, table.index))) | measured
    except ValueError as error:
        parser.error(str(error))
    rate = pd.Series({model: known.get(str(model)) for model in table.index}, dtype=float)
    table["prompts per second"] = rate
    for count in DEVICES:
        table[f"hours on {count}"] = table["as prompts"] / rate / 3600 / count
    table.loc["all"] = table.sum(min_count=len(table))
    table.loc["all", "prompts per second"] = float("nan")
    shown = {
        name: table[name].map(
            lambda value: "-" if value != value else f"{value:,.1f}".removesuffix(".0")
        )
        for name in table
    }
    print(pd.DataFrame(shown).to_markdown(stralign="right", disable_numparse=True))
    if rate.isna().any():
        print(
            f"\nNo rate for {', '.join(map(str, rate.index[rate.isna()]))}: "
            "run a small cell of it first, or give --rate."
        )


if __name__ == "__main__":
    main()
