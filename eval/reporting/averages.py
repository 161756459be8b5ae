"""Averages over the columns of a table, by the formula of each paper.

SCOPE and PruneSID print the mean over the columns of a score in percent of the unpruned score.
PromPrune states no formula. Its printed numbers give one: the mean of the raw scores in percent of
the mean of the raw unpruned scores, where MME counts as a share of its 2000 points, so hardly at
all. All 18 averages of its Tables 2 and 3 follow within 0.06, the two of Table 4 within 0.04. The
mean of ratios is up to 0.9 away in Tables 2 and 3. In Table 1 ten of 18 averages follow within
0.05, among them those of FastV, SparseVLM and VisionZip; those of PromPrune are 2.0 to 2.1 below
what its scores give. Table 5 prints the same mean of raw scores itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from secateur.reporting.reported import AVERAGE, METRICS, ROUNDING
from secateur.reporting.stats import Estimates


class Formula(NamedTuple):
    """How a table averages.

    Attributes:
        words: the formula, for notes.
        ratios: whether scores are divided by the unpruned scores before they are averaged.
        relative: whether the average is in percent of the unpruned model.
    """

    words: str
    ratios: bool
    relative: bool


MEAN_OF_RATIOS = Formula("mean of score / unpruned score", ratios=True, relative=True)
RATIO_OF_MEANS = Formula(
    "mean of the scores / mean of the unpruned scores, MME as a share of 2000",
    ratios=False,
    relative=True,
)
MEAN_OF_SCORES = Formula("mean of the scores, MME as a share of 2000", ratios=False, relative=False)
# (paper, table) -> its formula; all other tables print the mean of ratios
FORMULAS = {
    **{("PromPrune", f"Table {number}"): RATIO_OF_MEANS for number in (1, 2, 3, 4)},
    ("PromPrune", "Table 5"): MEAN_OF_SCORES,
}


def formula_of(paper: str, table: str) -> Formula:
    """The formula of a table's average."""
    return FORMULAS.get((paper, table), MEAN_OF_RATIOS)


def mean(
    formula: Formula, metrics: Sequence[str], scores: np.ndarray, unpruned: np.ndarray
) -> np.ndarray:
    """The average of scores [..., columns] by a formula, [...].

    Args:
        metrics: of the columns, names in results/reported.
        unpruned: the scores of the unpruned model [..., columns], none of them 0.
    """
    if formula.ratios:
        return 100 * np.mean(scores / unpruned, axis=-1)
    units = np.array([METRICS[name][1] if name.startswith("mme_") else 1 for name in metrics])
    own = np.mean(scores / units, axis=-1)
    return 100 * own / np.mean(unpruned / units, axis=-1) if formula.relative else own


def estimate(
    formula: Formula,
    metrics: Sequence[str],
    columns: Sequence[Estimates],
    rows: Sequence[str],
    unpruned: str,
) -> Estimates:
    """The average of some rows over columns that are resampled together.

    Args:
        metrics: of the columns, names in results/reported.
        columns: the scores of each column; `rows` and `unpruned` are among their methods.

    Raises:
        ValueError: the unpruned model scores 0 in a column.
    """
    for metric, own in zip(metrics, columns, strict=True):
        if not own.values[unpruned] > 0:
            raise ValueError(f"the unpruned model scores 0 in a column ({metric})")
    keys = list(rows)
    values = np.stack([own.values[keys] for own in columns], axis=-1)
    draws = np.stack([own.draws[keys] for own in columns], axis=-1)
    base = np.stack([own.values[[unpruned]] for own in columns], axis=-1)
    base_draws = np.stack([own.draws[[unpruned]] for own in columns], axis=-1)
    return Estimates(
        pd.Series(mean(formula, metrics, values, base), keys),
        pd.DataFrame(mean(formula, metrics, draws, base_draws), columns=keys),
        min(own.freedom for own in columns),
    )


def check(numbers: pd.DataFrame) -> pd.DataFrame:
    """Every printed average of a pruned row beside that of the row's printed scores.

    Tables without an unpruned row are left out. Columns: paper, table, model, method, budget,
    printed, recomputed (by the table's formula), mean_of_ratios, tasks (how many columns the row
    has), follows (whether `printed` and `recomputed` agree within `ROUNDING`).
    """
    found = []
    for (paper, table, model), rows in numbers.groupby(["paper", "table", "model"]):
        formula = formula_of(str(paper), str(table))
        scores = rows[rows["task"] != AVERAGE]
        base = scores[scores["method"] == "none"].set_index("task")["value"]
        base = base[base > 0]
        scores = scores[scores["task"].isin(base.index)]
        printed = {
            (row["method"], row["budget"]): row["value"]
            for row in rows[rows["task"] == AVERAGE].to_dict("records")
        }
        for (method, budget), own in scores.groupby(["method", "budget"]):
            if method == "none" or (method, budget) not in printed:
                continue
            values = own["value"].to_numpy(), base[own["task"]].to_numpy()
            means = [mean(one, list(own["metric"]), *values) for one in (formula, MEAN_OF_RATIOS)]
            place = paper, table, model, method, budget
            found.append((*place, printed[method, budget], *map(float, means), len(own)))
    columns = ["paper", "table", "model", "method", "budget"]
    columns += ["printed", "recomputed", "mean_of_ratios", "tasks"]
    result = pd.DataFrame(found, columns=columns)
    return result.assign(follows=(result["printed"] - result["recomputed"]).abs() <= ROUNDING)
