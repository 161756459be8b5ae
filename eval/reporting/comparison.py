"""Compares the cells of one setting: intervals, tests, tied best methods, flips, random."""

from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from secateur.pruners import REGISTRY
from secateur.records import Record
from secateur.reporting import stats
from secateur.reporting.seeds import row_names, seed_of
from secateur.reporting.tables import by_setting
from secateur.reporting.versions import Stale, differences, newest
from secateur.store import DamagedRecord, Store
from secateur.tasks import TASKS

FEW_IMAGES = 50  # with fewer images, percentile intervals are too short
# counts of a record as marks of its row
COUNTED = {
    "answers are empty": "empty_answers",
    "answers are unusable": "unusable_answers",
    "answers were cut off by the limit of new tokens": "cut_off_answers",
    "prompts were rewritten wrongly by lmms-eval": "rewritten_prompts",
}
TOKENS = 0.01  # methods are compared if their mean tokens differ by at most this share
# of the samples; the kept tokens, which are their bulk, are not read
_COLUMNS = ("doc_id", "image_id", "category", "unit", "target", "answer", "score")
_INFERRED = (
    *("low", "high", "difference", "difference_low", "difference_high", "p", "detectable"),
    *("over_random", "over_random_low", "over_random_high"),
)


class Cell(NamedTuple):
    """A finished cell: its record and its per-document rows."""

    record: Record
    rows: pd.DataFrame

    @property
    def task(self) -> str:
        return self.record.identity.task

    @property
    def name(self) -> str:
        return self.record.identity.pruner.name

    @property
    def method(self) -> str:
        return self.record.identity.pruner.label

    @property
    def seed(self) -> Any:
        """The method's own seed; None if it has none."""
        return seed_of(self.record.identity.pruner)

    @property
    def budget(self) -> str:
        return self.record.identity.budget

    @property
    def key(self) -> str:
        """Names the cell within a task of a setting."""
        return f"{self.method} at {self.budget}"

    @property
    def tokens(self) -> float:
        """Visual tokens per prompt (all its images), mean over documents and layers."""
        return self.record.average_tokens

    def per_image(self, tokens: float) -> float:
        """Tokens per document as tokens per image; 0 if no document has an image."""
        images = self.record.images
        return tokens / images if images else 0.0

    def stored(self, metric: str) -> float:
        """A metric as lmms-eval aggregated it, in the units tables print."""
        definition = self.record.entry.metrics[metric]
        return definition.factor * self.record.metrics[definition.stored]


def load(
    results: Path, damaged: list[str] | None = None, stale: list[Stale] | None = None
) -> list[Cell]:
    """The finished cells of a results folder that have a score, of each the newest version.

    Args:
        damaged: as in `Store.records`; also for records of a method or task that is not known here.
        stale: receives the older versions.
    """
    store, cells = Store(results), []
    shown, older = newest(store.records(damaged))
    if stale is not None:
        stale += older
    for record in shown:
        if unknown := _unknown(record):
            message = f"the record in {store.cell(record.identity).folder} {unknown}"
            if damaged is None:
                raise DamagedRecord(message)
            damaged.append(message)
            continue
        if not record.entry.metrics:  # a server scores it
            continue
        cells.append(cell_of(record, store))
    return cells


def cell_of(record: Record, store: Store) -> Cell:
    """A stored cell with the columns of its rows that a comparison needs."""
    path = store.cell(record.identity).folder / "samples.parquet"
    stored = pq.read_schema(path).names
    columns = [name for name in _COLUMNS if name in stored]
    return Cell(record, pd.read_parquet(path, columns=columns))


def _unknown(record: Record) -> str:
    """What of a record this installation does not know; empty if nothing."""
    own = record.identity
    if own.pruner.name not in REGISTRY:
        return (
            f"is of the method {own.pruner.name!r}, which is not registered here; name the file "
            "that it is in: plugins=[path/to/it.py]"
        )
    if own.task not in TASKS and record.unlisted is None:
        return f"is of the task {own.task!r}, which is not known here"
    task = record.entry
    headline = task.metrics[task.headline].stored if task.metrics else None
    known = headline is None or headline in record.metrics
    return "" if known else f"has no metric {headline!r}"


def check_one_setting(cells: list[Cell]) -> None:
    """Cells may share a table only if their settings are equal.

    Raises:
        ValueError: they are not; the message says which one.
    """
    settings = [cell.record.identity for cell in cells]
    if len({own.setting for own in settings}) <= 1:
        return
    for field in ("suite", "model", "limit", "seed"):
        found = {str(own.as_json()[field]) for own in settings}
        if len(found) > 1:
            raise ValueError(
                f"cells of {len(found)} settings cannot share a table; "
                f"{field} is {' or '.join(sorted(found))}. "
                "Keep those of one setting in a results folder of their own"
            )


def settings(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that may share a table, by setting."""
    by_identity = {id(cell.record): cell for cell in cells}
    return [
        [by_identity[id(record)] for record in group]
        for group in by_setting([cell.record for cell in cells])
    ]


def provenance(cells: list[Cell]) -> str:
    """How many cells a table shows, and the commits at which they ran."""
    commits = sorted({cell.record.environment.commit for cell in cells})
    return f"{len(cells)} cells, commit {', '.join(commits)}."


def estimate(metric: str, cells: dict[str, Cell], resamples: int) -> stats.Estimates:
    """A metric of some cells of one task, over the same resampled images.

    Raises:
        ValueError: as `stats.estimate`; or a record's value is not that of its samples.
    """
    task = next(iter(cells.values())).record.entry
    for key, cell in cells.items():  # before the intervals, which a single image does not have
        unlisted = cell.record.unlisted
        if unlisted and not unlisted.mean:
            raise ValueError(
                f"{task.name}: no interval, since {metric} is not the mean of scores of documents"
            )
        stored, own = cell.stored(metric), stats.metric_of(task, metric, key, cell.rows)
        if not abs(stored - own) <= 0.01:
            raise ValueError(
                f"{task.name}: the record of {key} has {metric} {stored:.2f}, "
                f"its samples give {own:.2f}"
            )
    return stats.estimate(task, metric, {key: cell.rows for key, cell in cells.items()}, resamples)


def compare(cells: list[Cell], resamples: int = stats.RESAMPLES) -> pd.DataFrame:
    """Compare the cells of one setting.

    Returns:
        One row per task, method and budget, and rows of task "average" for the methods that ran
        every task, over the tasks in which the unpruned model does not score 0. Cells that differ
        in the method's seed alone share a row, which shows means over the seeds. What cannot be
        computed is NaN. Columns:
        task, metric, method, budget, seeds, tokens, documents, images;
        value, low, high: the metric with its interval, over documents and seeds;
        sd: standard deviation over the seeds;
        difference, difference_low, difference_high, p, p_holm: to the unpruned model, the last
        adjusted over the rows of a task;
        detectable: the smallest difference that the test finds with the usual power;
        mcnemar, mcnemar_holm, right_to_wrong, wrong_to_right, agreement: flips; the tests only
        where every image has one question;
        over_random, over_random_low, over_random_high: difference to random of three seeds;
        tied_best: whether it ties with the best of its budget; none where images are few;
        few_images: whether the row has too few images for its intervals and tests;
        mark: what limits the row, e.g. why it has no interval.

    Raises:
        ValueError: cells of different settings; two cells for one row.
    """
    check_one_setting(cells)
    names = row_names(cell.record.identity for cell in cells)
    rows: list[dict[str, Any]] = []
    estimates: list[stats.Estimates | None] = []
    based: list[stats.Estimates] = []  # those with a baseline
    present = {cell.task for cell in cells}
    for task in (name for name in [*TASKS, *sorted(present - set(TASKS))] if name in present):
        own: dict[str, Cell] = {}
        for cell in (cell for cell in cells if cell.task == task):
            if cell.key in own:
                raise ValueError(
                    f"two cells of {task} for {cell.key}: "
                    f"{own[cell.key].record.identity.folder} and {cell.record.identity.folder}"
                )
            own[cell.key] = cell
        by_row = _by_row(own, names)
        unpruned = next((key for key, cell in own.items() if cell.name == "none"), None)
        if unpruned is None:
            missing = f"task {task} has no unpruned cell to compare with; run it with pruner=none"
            for group in by_row.values():
                fact = _facts(group, names, None)
                rows.append(fact | {"mark": [*fact["mark"], missing]})
            estimates.append(None)
            continue
        facts = {key: _facts(group, names, own[unpruned]) for key, group in by_row.items()}
        try:
            found = estimate(own[unpruned].record.entry.headline, own, resamples)
        except ValueError as error:
            estimates.append(None)
            for fact in facts.values():
                fact["mark"].append(str(error))
        else:
            found = found.over_seeds({key: list(group) for key, group in by_row.items()})
            _infer(facts, found, unpruned)
            estimates.append(found)
            if found.values[unpruned] > 0:
                based.append(found)
        rows += facts.values()
    complete = [found for found in estimates if found is not None]
    without = {row["task"] for row in rows if row["name"] == "none" and not row["value"] > 0}
    for row in rows:
        if row["task"] in without:
            row["mark"].append("no baseline: the unpruned model scores 0")
    if len(complete) == len(estimates) and len(based) > 1:
        rows += _average([row for row in rows if row["task"] not in without], based)
    frame = pd.DataFrame(rows).drop(columns=["key", "name", "by_seed"])
    for p in ("p", "mcnemar"):
        adjusted = pd.concat(
            [pd.Series(stats.holm(own), own.index) for _, own in frame.groupby("task")[p]]
        )
        frame.insert(list(frame).index(p) + 1, f"{p}_holm", adjusted)
    return frame.assign(mark=frame["mark"].map("; ".join))


def _by_row(cells: dict[str, Cell], names: dict[str, str]) -> dict[str, dict[str, Cell]]:
    """The cells of a task by row, each row with its cells by their keys."""
    rows: dict[str, dict[str, Cell]] = {}
    for key, cell in cells.items():
        rows.setdefault(f"{names[cell.method]} at {cell.budget}", {})[key] = cell
    return rows


def _facts(cells: dict[str, Cell], names: dict[str, str], unpruned: Cell | None) -> dict[str, Any]:
    """The part of a row that needs no resampling; the cells are of one method and its seeds."""
    facts = [_facts_of_cell(cell, unpruned) for cell in cells.values()]
    first = next(iter(cells.values()))
    by_seed = {cell.seed: fact["value"] for cell, fact in zip(cells.values(), facts, strict=True)}
    method = names[first.method]
    row = facts[0] | {
        "key": f"{method} at {first.budget}",
        "method": method,
        "seeds": len(cells),
        "by_seed": by_seed,
    }
    if len(cells) == 1:
        return row
    for column in ("tokens", "value", "right_to_wrong", "wrong_to_right", "agreement"):
        row[column] = float(np.mean([fact[column] for fact in facts]))
    return row | {
        "sd": float(np.std([fact["value"] for fact in facts], ddof=1)),
        "mcnemar": np.nan,
        "mark": list(dict.fromkeys(text for fact in facts for text in fact["mark"])),
    }


def _facts_of_cell(cell: Cell, unpruned: Cell | None) -> dict[str, Any]:
    """What is known of one cell. Without an unpruned cell there is no comparison of answers."""
    metric = cell.record.entry.headline
    images, answers = cell.rows["image_id"].nunique(), cell.rows["answer"].str.strip().str.lower()
    mark = []
    if unpruned and (other := differences(cell.record, unpruned.record)):
        mark.append(f"other {', '.join(other)} than the unpruned cell")
    if answers.nunique() == 1:
        mark.append(f"every answer is {answers.iloc[0]!r}")
    for text, field in COUNTED.items():
        if field == "empty_answers" and cell.record.unusable_answers:
            continue  # they are among the unusable ones
        if number := getattr(cell.record, field):
            mark.append(f"{number} of {cell.record.documents} {text}")
    if images < FEW_IMAGES:
        mark.append(f"{images} image{'s' * (images != 1)}: intervals are too short")
    flips = stats.Flips(*[np.nan] * 4)
    if (
        unpruned
        and cell.key != unpruned.key
        and sorted(cell.rows["doc_id"]) == sorted(unpruned.rows["doc_id"])
    ):
        flips = stats.flips(unpruned.rows, cell.rows)
    return {
        "task": cell.task,
        "metric": metric,
        "name": cell.name,
        "method": cell.method,
        "budget": cell.budget,
        "seeds": 1,
        "tokens": cell.tokens,
        "documents": len(cell.rows),
        "images": images,
        "value": cell.stored(metric),
        "sd": np.nan,
        **dict.fromkeys(_INFERRED, np.nan),
        "mcnemar": flips.p,
        "right_to_wrong": flips.right_to_wrong,
        "wrong_to_right": flips.wrong_to_right,
        "agreement": flips.agreement,
        "tied_best": False,
        "few_images": images < FEW_IMAGES,
        "mark": mark,
    }


def _infer(rows: dict[str, dict[str, Any]], found: stats.Estimates, unpruned: str) -> None:
    """Add intervals, tests, tied best methods and the distance to random to the rows of a task."""
    for key, row in rows.items():
        own = found.interval(key)
        row |= {"low": own.low, "high": own.high}
        if key != unpruned:
            change = found.difference(key, unpruned)
            row |= {
                "difference": change.value,
                "difference_low": change.low,
                "difference_high": change.high,
                "p": change.p,
            }
            row["detectable"] = found.detectable(key, unpruned)
            if np.isnan(change.low):
                row["mark"].append(
                    "no interval of the difference to the unpruned model can be estimated: "
                    "it is the same in every resample"
                )
    for budget in {row["budget"] for key, row in rows.items() if key != unpruned}:
        group = {
            key: row for key, row in rows.items() if row["budget"] == budget and key != unpruned
        }
        # the tokens of one of them, so that at least that one is equal
        usual = median_low(row["tokens"] for row in group.values())
        equal = [key for key, row in group.items() if abs(row["tokens"] - usual) <= TOKENS * usual]
        for key in group.keys() - set(equal):
            group[key]["mark"].append(
                f"{group[key]['tokens']:.1f} tokens where the others of its budget keep {usual:.1f}"
            )
        if not any(group[key]["few_images"] for key in equal):
            for key in found.tied_best(equal):
                group[key]["tied_best"] = True
        randoms = [key for key in equal if group[key]["name"] == "random"]
        for key in equal if sum(group[key]["seeds"] for key in randoms) >= 3 else []:
            if key not in randoms:
                over = found.difference(key, randoms[0])
                group[key] |= {
                    "over_random": over.value,
                    "over_random_low": over.low,
                    "over_random_high": over.high,
                }


def _average(rows: list[dict[str, Any]], estimates: list[stats.Estimates]) -> list[dict[str, Any]]:
    """The rows of the relative average, for the methods that ran every task."""
    keys = [
        key for key in estimates[0].values.index if all(key in found.values for found in estimates)
    ]
    unpruned = next(row["key"] for row in rows if row["name"] == "none")
    whole = stats.relative_average([found.only(keys) for found in estimates], unpruned)
    averages = {}
    for key in keys:
        own = [row for row in rows if row["key"] == key]
        averages[key] = own[0] | dict.fromkeys(
            (*_INFERRED, "mcnemar", "right_to_wrong", "wrong_to_right", "agreement"), np.nan
        )
        averages[key] |= {
            "task": "average",
            "metric": "relative_average",
            "tokens": float(np.mean([row["tokens"] for row in own])),
            "documents": sum(row["documents"] for row in own),
            "images": sum(row["images"] for row in own),
            "value": float(whole.values[key]),
            "sd": _spread_of_average(own, rows),
            "tied_best": False,
            "few_images": any(row["few_images"] for row in own),
            "mark": sorted({f"{row['task']}: {text}" for row in own for text in row["mark"]}),
        }
    _infer(averages, whole, unpruned)
    return list(averages.values())


def _spread_of_average(own: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    """Standard deviation over the seeds of a method's relative average; NaN with one seed."""
    full = {row["task"]: row["value"] for row in rows if row["name"] == "none"}
    seeds = set.intersection(*(set(row["by_seed"]) for row in own))
    if len(seeds) < 2:
        return np.nan
    means = [
        np.mean([100 * row["by_seed"][seed] / full[row["task"]] for row in own]) for seed in seeds
    ]
    return float(np.std(means, ddof=1))
