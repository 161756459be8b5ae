"""Documents that two methods of a sweep answer differently."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from secateur.reporting.comparison import Cell
from secateur.reporting.kept import samples
from secateur.reporting.seeds import row_names

PER_SIDE = 2  # documents shown per task and method that is right


class Rivals(NamedTuple):
    """Two methods, and the budgets of a task that both ran, from few to many tokens."""

    budgets: tuple[str, ...]
    methods: tuple[str, str]


class Disagreement(NamedTuple):
    """A document that one of two methods answers right and the other wrong.

    Attributes:
        rows: its row of both methods' cells, by the label of the method.
        names: the names of the methods, by their labels.
        right: the label of the method that is right.
    """

    task: str
    rows: dict[str, pd.Series]
    names: dict[str, str]
    right: str


def rivals(comparison: pd.DataFrame, names: Sequence[str] = ()) -> Rivals | None:
    """Two methods to compare.

    Returns:
        The methods of `names`; without names, the two best at the smallest budget, in the last task
        that two methods ran at it. None: no two methods ran one task at one budget.

    Raises:
        ValueError: a name is not in the comparison, or the two share no budget of a task.
    """
    rows = comparison[comparison["method"] != "none"]
    unknown = sorted(set(names) - set(rows["method"]))
    if unknown or (names and len(set(names)) != 2):
        raise ValueError(
            f"rivals {', '.join(names)}: choose two of {', '.join(sorted(set(rows['method'])))}"
        )
    if names:
        rows = rows[rows["method"].isin(list(names))]
    shared = rows.groupby(["task", "budget"]).filter(lambda own: own["method"].nunique() >= 2)
    if shared.empty:
        if names:
            raise ValueError(f"rivals {', '.join(names)}: they share no budget of a task")
        return None
    budget = shared.groupby("budget")["tokens"].mean().idxmin()
    shared = shared[shared["budget"] == budget]
    last = shared[shared["task"] == shared["task"].iloc[-1]]
    best = last.sort_values("value", ascending=False, kind="stable")["method"].head(2)
    pair = rows[rows["method"].isin(best)].groupby(["task", "budget"])
    both = pair.filter(lambda own: own["method"].nunique() == 2)
    budgets = both.groupby("budget")["tokens"].mean().sort_values().index
    return Rivals(tuple(map(str, budgets)), (best.iloc[0], best.iloc[1]))


def disagreements(
    cells: Sequence[Cell], pair: Rivals, budget: str, results: Path
) -> tuple[dict[str, dict[str, int]], list[Disagreement]]:
    """The documents that exactly one of two methods answers right at a budget.

    Returns:
        Their number by task and by the method that is right; the first `PER_SIDE` of each.
    """
    counts: dict[str, dict[str, int]] = {}
    names = row_names(cell.record.identity for cell in cells)
    shown = []
    for task in dict.fromkeys(cell.task for cell in cells):
        at_budget = [cell for cell in cells if (cell.task, cell.budget) == (task, budget)]
        # of several seeds of a method, the first one
        own = {
            names[cell.method]: cell
            for cell in sorted(at_budget, key=lambda cell: -(cell.seed or 0))
            if names[cell.method] in pair.methods
        }
        if len(own) < 2:
            continue
        rows = {
            method: samples(own[method], results).set_index("doc_id", drop=False)
            for method in pair.methods
        }
        both = rows[pair.methods[0]].index.intersection(rows[pair.methods[1]].index)
        right = {method: rows[method].loc[both, "score"] == 1 for method in pair.methods}
        counts[task] = {}
        for method, other in (pair.methods, pair.methods[::-1]):
            chosen = both[right[method] & ~right[other]]
            counts[task][method] = len(chosen)
            for doc in chosen[:PER_SIDE]:
                shown.append(
                    Disagreement(
                        task=task,
                        rows={label: rows[label].loc[doc] for label in pair.methods},
                        names={label: own[label].name for label in pair.methods},
                        right=method,
                    )
                )
    return counts, shown
