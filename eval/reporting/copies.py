"""Which tables print one and the same run: baselines that papers copy from each other.

Papers do not say which of their baselines are copied, so it is read from the numbers. Two rows of
one model, method and budget are taken as one run if at least `FEWEST` of the scores that both
print, and at least half of them, are equal. Such a row is copied, or was reproduced exactly. Fewer
equal scores are a coincidence: papers print one decimal. Two rows of one paper are one run if no
score differs, also where they share none.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FEWEST = 2
ROW = ["model", "method", "budget", "paper", "table"]
Scores = dict[tuple[str, str], float]  # (task, metric) -> value


def own_paper(method: str, paper: str) -> bool:
    """Whether a published method is the paper's own; its name begins with the paper's."""
    return method.lower().startswith(paper.split()[0].lower())


def runs(reported: pd.DataFrame) -> pd.DataFrame:
    """The rows of all tables, and which of them print one run.

    Averages are left out: every paper averages over tasks of its own.

    Returns:
        One row per table row, indexed by model, method, budget, paper and table. Columns:
        run: equal numbers are one run; origin: "own" for the method of the paper, "copied from
        SCOPE" for a run of the method's own paper, "as in SCOPE, HiPrune" for a run that several
        papers print, else "run", as far as is known.
    """
    scores = reported[reported["metric"] != "relative_average"]
    values = {tuple(map(str, key)): _values(rows) for key, rows in scores.groupby(ROW)}
    keys = list(values)
    together: dict[tuple[str, ...], list[int]] = {}
    for number, key in enumerate(keys):
        together.setdefault(key[:3], []).append(number)
    edges = [
        (one, other)
        for numbers in together.values()
        for one, other in combinations(numbers, 2)
        if _one_run(values[keys[one]], values[keys[other]], keys[one][3] == keys[other][3])
    ]
    starts, ends = np.array(edges, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (starts, ends)), shape=(len(keys), len(keys)))
    found = pd.DataFrame(
        {"run": connected_components(graph, directed=False)[1]},
        index=pd.MultiIndex.from_tuples(keys, names=ROW),
    )
    papers = found.reset_index().groupby("run")["paper"].agg(lambda own: list(dict.fromkeys(own)))
    found["origin"] = [
        _origin(method, paper, papers[run])
        for (_, method, _, paper, _), run in zip(found.index, found["run"], strict=True)
    ]
    return found


def _values(rows: pd.DataFrame) -> Scores:
    return dict(zip(zip(rows["task"], rows["metric"], strict=True), rows["value"], strict=True))


def _one_run(one: Scores, other: Scores, one_paper: bool) -> bool:
    shared = one.keys() & other.keys()
    equal = sum(one[column] == other[column] for column in shared)
    if one_paper and equal == len(shared):
        return True
    return equal >= FEWEST and 2 * equal >= len(shared)


def _origin(method: str, paper: str, papers: list[str]) -> str:
    if own_paper(method, paper):
        return "own"
    if authors := [name for name in papers if own_paper(method, name)]:
        return f"copied from {authors[0]}"
    others = [name for name in papers if name != paper]
    return f"as in {', '.join(others)}" if others else "run"
