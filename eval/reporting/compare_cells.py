"""Paired differences of the cells of two methods, and of all methods at a budget."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from secateur.paths import CONFIGS
from secateur.reporting import stats
from secateur.reporting.comparison import FEW_IMAGES, TOKENS, Cell, estimate, settings
from secateur.reporting.layouts import yaml
from secateur.reporting.reported import AVERAGE
from secateur.reporting.seeds import row_names
from secateur.reporting.variants import variant
from secateur.reporting.verdicts import choices


def measured(
    cells: Sequence[Cell],
    a: str,
    b: str,
    model: str,
    budgets: set[str],
    resamples: int = stats.RESAMPLES,
) -> pd.DataFrame:
    """Paired differences of the cells of two methods, over the same resampled documents.

    Returns:
        One row per setting and task, and of task "average" if two tasks have a baseline. Columns:
        setting (its title), task, metric, a, b (scores), difference, low, high, p, note (what
        limits the row, or why it has no difference).
    """
    rows: list[dict[str, Any]] = []
    for group in settings([cell for cell in cells if cell.record.identity.model.name == model]):
        found: list[stats.Estimates] = []
        title = group[0].record.identity.title
        for task in dict.fromkeys(cell.task for cell in group):
            sides = [_of(group, name, task, budgets) for name in (a, b)]
            if not all(sides):
                continue
            metric = sides[0][0].record.entry.headline
            row: dict[str, Any] = {"setting": title, "task": task, "metric": metric}
            seeds = dict(zip((a, b), sides, strict=True))
            if several := _budgets(seeds):
                rows.append(row | {"note": several})
                continue
            base = [cell for cell in group if cell.task == task and cell.name == "none"]
            own = seeds | ({"none": base} if len(base) == 1 else {})
            try:
                estimates = _over_seeds(row["metric"], own, resamples)
            except ValueError as error:
                rows.append(row | {"note": str(error)})
                continue
            rows.append(row | _difference(estimates, a, b) | {"note": _limits(seeds)})
            if "none" in own and estimates.values["none"] > 0:
                found.append(estimates)
        if len(found) > 1:
            whole = stats.relative_average(found, "none")
            note = f"{len(found)} tasks, in percent of the unpruned score"
            row = {"setting": title, "task": AVERAGE, "metric": "relative_average", "note": note}
            rows.append(row | _difference(whole, a, b))
    columns = ["setting", "task", "metric", "a", "b", "difference", "low", "high", "p", "note"]
    return pd.DataFrame(rows, columns=columns)


def measured_matrix(
    group: Sequence[Cell], budgets: set[str], resamples: int = stats.RESAMPLES
) -> pd.DataFrame:
    """All pairs of methods of one setting that ran, at a budget, the same tasks as the most do.

    Returns:
        Indexed by (method a, method b), the labels. Columns: difference (a minus b, mean over
        tasks in percent of the unpruned score), low, high, p, tasks (how many), few_images (so
        that the intervals are too short).

    Raises:
        ValueError: no task has an unpruned cell with a score; or as `comparison.estimate`.
    """
    names_of = row_names(cell.record.identity for cell in group)
    by_task: dict[str, dict[str, list[Cell]]] = {}
    for cell in group:
        if cell.name == "none" or cell.budget in budgets:
            name = "none" if cell.name == "none" else names_of[cell.method]
            by_task.setdefault(cell.task, {}).setdefault(name, []).append(cell)
    found = []
    for own in by_task.values():
        headline = next(iter(own.values()))[0].record.entry.headline
        estimates = _over_seeds(headline, own, resamples)
        if "none" in own and estimates.values["none"] > 0:
            found.append(estimates)
    if not found:
        raise ValueError("no task has an unpruned cell with a score; run it with pruner=none")
    most = max(len(own.values) for own in found)
    names = next(list(own.values.index) for own in found if len(own.values) == most)
    same = [own.only(names) for own in found if set(names) <= set(own.values.index)]
    whole = stats.relative_average(same, "none")
    few = any(cell.rows["image_id"].nunique() < FEW_IMAGES for cell in group)
    rows = {
        (a, b): whole.difference(a, b)._asdict() | {"tasks": len(same), "few_images": few}
        for a in names
        for b in names
        if "none" not in (a, b) and a != b
    }
    columns = {"value": "difference"}
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns=columns)


def _over_seeds(metric: str, methods: dict[str, list[Cell]], resamples: int) -> stats.Estimates:
    """A metric of methods, each the mean over its cells, which differ in its seed alone."""
    cells = {cell.key: cell for own in methods.values() for cell in own}
    keys = {name: [cell.key for cell in own] for name, own in methods.items()}
    return estimate(metric, cells, resamples).over_seeds(keys)


def _difference(estimates: stats.Estimates, a: str, b: str) -> dict[str, float]:
    found = estimates.difference(a, b)
    scores = {"a": float(estimates.values[a]), "b": float(estimates.values[b])}
    return scores | {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p": found.p,
    }


def _of(cells: Sequence[Cell], name: str, task: str, budgets: set[str]) -> list[Cell]:
    """The cells that are a method, as published or by its label here, at a budget: all its seeds.

    A name that has a seed of its own stands for that seed alone.
    """
    try:
        wanted = variant(name, task)
    except KeyError:  # a field of it has no value for this task
        return []

    def fits(cell: Cell) -> bool:
        config = CONFIGS / "model" / f"{cell.record.identity.model.name}.yaml"
        usual = yaml(config).get("pruner_fields", {}) if config.is_file() else {}
        pruner = cell.record.identity.pruner
        chosen = choices(pruner, usual.get(cell.name))
        without = tuple(choice for choice in chosen if not choice.startswith("seed="))
        return wanted in ((cell.name, chosen), (cell.name, without))

    own = [cell for cell in cells if cell.task == task and cell.budget in budgets]
    return [cell for cell in own if fits(cell)]


def _budgets(methods: dict[str, list[Cell]]) -> str:
    """That a method has cells of several budgets; empty if none has."""
    for name, cells in methods.items():
        if len(found := sorted({cell.budget for cell in cells})) > 1:
            return f"{name} has cells at {' and '.join(found)}; give one of them as the budget"
    return ""


def _limits(methods: dict[str, list[Cell]]) -> str:
    """What limits the comparison of two methods; empty if nothing does."""
    notes = [f"{len(own)} seeds of {name}" for name, own in methods.items() if len(own) > 1]
    images = next(iter(methods.values()))[0].rows["image_id"].nunique()
    a, b = (fmean(cell.tokens for cell in own) for own in methods.values())
    if abs(a - b) > TOKENS * min(a, b):
        notes.append(f"{a:.1f} and {b:.1f} tokens per prompt")
    if images < FEW_IMAGES:
        notes.append(f"{images} image{'s' * (images != 1)}: the interval is too short")
    return "; ".join(notes)
