"""Which of two methods is better: pairs of published numbers.

A published pair is one number of each method, of one model, budget, task and metric. In one table
the two share an unpruned row. Across tables each number is taken in percent of its own table's
unpruned row, so that the difference of two ratios remains. Numbers of one run count once, however
many papers print them (`copies.runs`).
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import pandas as pd

from secateur.paths import CONFIGS
from secateur.pruners import REGISTRY
from secateur.reporting.comparison import Cell
from secateur.reporting.copies import ROW, runs
from secateur.reporting.layouts import CROPS
from secateur.reporting.reported import AVERAGE
from secateur.reporting.variants import variants

_COLUMN = ["task", "metric"]
_TABLE = ["paper", "table"]
_RUNS = ["run_a", "run_b"]
_SIDE = ("value", "unpruned", "relative", "origin", "run", "suspect", *_TABLE)


def known(name: str, names: Iterable[str], what: str) -> str:
    """The name as it is written in `names`; case does not matter.

    Raises:
        ValueError: it is not among them; the message has the nearest ones.
    """
    by_lower = {one.lower(): one for one in sorted(names)}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    listed = [by_lower[one] for one in near] or sorted(by_lower.values())
    raise ValueError(
        f"{what} {name!r} is not known; {'the nearest' if near else 'known'}: {', '.join(listed)}"
    )


def methods(reported: pd.DataFrame) -> set[str]:
    """Names of all methods, published or here."""
    return {*reported["method"], *REGISTRY} - {"none"}


def models(reported: pd.DataFrame, cells: Sequence[Cell]) -> set[str]:
    """Names of all models, published, configured or run."""
    configured = {path.stem for path in (CONFIGS / "model").glob("[!_]*.yaml")}
    return {*reported["model"], *configured, *(cell.record.identity.model.name for cell in cells)}


def usual_budget(
    reported: pd.DataFrame, cells: Sequence[Cell], model: str, names: Sequence[str] = ()
) -> str:
    """The budget of a model with the most published numbers (of each of `names`), or most cells.

    Raises:
        ValueError: there is neither.
    """
    rows = _with_budget(reported, model)
    counts = rows.groupby("budget").size()
    own = [rows[rows["method"] == name].groupby("budget").size() for name in names]
    if own:
        of_all = pd.concat(own, axis=1).dropna().min(axis=1)
        counts = of_all if len(of_all) else counts
    run = pd.Series([cell.budget for cell in cells if cell.record.identity.model.name == model])
    for found in (counts, run[run != "full"].value_counts()):
        if len(found):
            return str(found.idxmax())
    raise ValueError(f"no number of {model} is published, and no cell of it was run")


def spellings(reported: pd.DataFrame, cells: Sequence[Cell], model: str, budget: str) -> set[str]:
    """How tables and configs write a budget of a model: "64", "11.1%", "128/tile".

    Raises:
        ValueError: neither a published number nor a cell has it; the message has those that exist.
    """
    rows = _with_budget(reported, model)
    written: dict[str, set[str]] = {}
    columns = ["budget", "budget_tokens", "retention_pct"]
    for name, tokens, share in rows[columns].drop_duplicates().itertuples(index=False):
        own = written.setdefault(name, {name})
        if not pd.isna(share):
            own.add(f"{share:g}%")
        if not pd.isna(tokens) and model.startswith("llava_next"):
            own.add(f"{tokens // CROPS}/tile")
    run = {cell.budget for cell in cells if cell.record.identity.model.name == model} - {"full"}
    found = {budget} if budget in run else set()
    found = found.union(*(own for own in written.values() if budget in own))
    if not found:
        exist = ", ".join(_sorted([*written, *run]))
        raise ValueError(f"no number of {model} at budget {budget!r}; budgets: {exist or 'none'}")
    return found


def _with_budget(reported: pd.DataFrame, model: str) -> pd.DataFrame:
    """The pruned rows of a model whose budget is known."""
    rows = reported[(reported["model"] == model) & (reported["method"] != "none")]
    return rows[rows["budget"] != "unknown"]


def _sorted(budgets: Iterable[str]) -> list[str]:
    return sorted(set(budgets), key=lambda text: (len(text), text))


def scores_at(reported: pd.DataFrame, model: str, budgets: set[str]) -> pd.DataFrame:
    """The published scores of a model at a budget, one row per number.

    Columns besides those of `load_reported`: run and origin (of `copies.runs`); unpruned: the
    unpruned score of the table or, if it has none, of another table of its paper, NaN if there is
    none above 0; relative: the score in percent of it.
    """
    scores = reported[(reported["model"] == model) & (reported["metric"] != "relative_average")]
    base = scores[scores["method"] == "none"]
    found = scores[(scores["method"] != "none") & scores["budget"].isin(budgets)]
    found = found.join(runs(scores), on=ROW)
    of_table = base.set_index([*_TABLE, *_COLUMN])["value"]
    of_paper = base.drop_duplicates(["paper", *_COLUMN]).set_index(["paper", *_COLUMN])["value"]
    unpruned = found.join(of_table.rename("unpruned"), on=[*_TABLE, *_COLUMN])["unpruned"]
    other = found.join(of_paper.rename("unpruned"), on=["paper", *_COLUMN])["unpruned"]
    unpruned = unpruned.fillna(other)
    unpruned = unpruned.where(unpruned > 0)
    return found.assign(unpruned=unpruned, relative=100 * found["value"] / unpruned)


def pairs(scores: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """Every pair of published numbers of two methods, each pair of runs once per task and metric.

    Pairs of two tables are left out if one table has no unpruned score, or if both runs have a
    partner in their own table.

    Args:
        scores: of `scores_at`.

    Returns:
        One row per pair, those of one table first. Columns: task, metric; for each method, with
        suffix _a or _b: value, unpruned, relative, origin, run, suspect, paper, table; one_table;
        also: other tables that print this pair; difference: a minus b in percent of the
        unpruned scores.
    """
    sides = [scores.loc[scores["method"] == name, [*_COLUMN, *_SIDE]] for name in (a, b)]
    both = sides[0].merge(sides[1], on=_COLUMN, suffixes=("_a", "_b"))
    both["one_table"] = (both["paper_a"] == both["paper_b"]) & (both["table_a"] == both["table_b"])
    both["difference"] = both["relative_a"] - both["relative_b"]
    inside = both[both["one_table"]]
    partners = both["run_a"].isin(inside["run_a"]) & both["run_b"].isin(inside["run_b"])
    both = both[both["one_table"] | (both["difference"].notna() & ~partners)]
    key = [*_COLUMN, *_RUNS]
    # of one pair of runs: in one table, where its authors ran it, then by name
    order = both.assign(
        away=~both["one_table"],
        foreign_a=both["origin_a"] != "own",
        foreign_b=both["origin_b"] != "own",
    ).sort_values(["away", "foreign_a", "foreign_b", "paper_a", "paper_b", "table_a", "table_b"])
    once = order.drop_duplicates(key).drop(columns=["away", "foreign_a", "foreign_b"])
    inside = both[both["one_table"]]
    printed = (inside["paper_a"] + " " + inside["table_a"]).groupby(
        [inside[column] for column in key]
    )
    together = {pair: set(names) for pair, names in printed}
    once["also"] = [
        ", ".join(sorted(together.get(tuple(pair[:4]), set()) - {f"{pair[4]} {pair[5]}"}))
        for pair in once[[*key, "paper_a", "table_a"]].itertuples(index=False)
    ]
    return once.sort_values(
        ["one_table", "paper_a", "paper_b"], ascending=[False, True, True], kind="stable"
    ).reset_index(drop=True)


def where(reported: pd.DataFrame, method: str) -> str:
    """The models and budgets of a method's published numbers, in words."""
    rows = reported[(reported["method"] == method) & (reported["metric"] != "relative_average")]
    budgets = rows.groupby("model")["budget"].agg(lambda own: ", ".join(_sorted(own)))
    return "; ".join(f"{model} at {own}" for model, own in budgets.items()) or "none at all"


def other_metrics(scores: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """Pairs of runs that print a task in other metrics, so that they are no pair.

    Returns:
        Columns: task, metrics ("pope_f1 and pope_as_printed"), pairs (how many).
    """
    one, other = (scores.loc[scores["method"] == name, [*_COLUMN, "run"]] for name in (a, b))
    both = one.merge(other, on="task", suffixes=("_a", "_b"))
    same = (both["metric_a"] == both["metric_b"]).groupby([both[c] for c in ("task", *_RUNS)])
    apart = both[~same.transform("any")].drop_duplicates()
    metrics = [" and ".join(sorted(pair)) for pair in apart[["metric_a", "metric_b"]].to_numpy()]
    counted = apart.assign(metrics=metrics).groupby(["task", "metrics"])
    return counted.size().rename("pairs").reset_index()


def summary(pairs: pd.DataFrame) -> pd.DataFrame:
    """Published differences by task: mean, and the spread over pairs of runs.

    Suspect numbers and pairs without an unpruned score are left out. The rows of task "average"
    take the mean over the tasks of each pair of runs first; they exist if there are two tasks.

    Returns:
        Columns: one_table, task, metric, pairs, a_higher (in how many pairs), mean, lowest, highest
        (percent of the unpruned score).
    """
    usable = pairs[~pairs["suspect_a"] & ~pairs["suspect_b"] & pairs["difference"].notna()]
    parts = []
    for one_table, own in usable.groupby("one_table", sort=False):
        by_runs = own.groupby(_RUNS)["difference"].mean().reset_index()
        whole = by_runs.assign(task=AVERAGE, metric="relative_average")
        both = [own, whole] if len(own.groupby(_COLUMN)) > 1 else [own]
        found = pd.concat([part[[*_COLUMN, "difference"]] for part in both])
        parts.append(
            found.groupby(_COLUMN, sort=False)["difference"]
            .agg(
                pairs="size",
                a_higher=lambda values: int((values > 0).sum()),
                mean="mean",
                lowest="min",
                highest="max",
            )
            .reset_index()
            .assign(one_table=one_table)
        )
    columns = ["one_table", *_COLUMN, "pairs", "a_higher", "mean", "lowest", "highest"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def matrix(scores: pd.DataFrame) -> pd.DataFrame:
    """All pairs of methods that tables print together, without the ablations of a method.

    Returns:
        Indexed by (method a, method b). Columns: difference: a minus b in percent of the unpruned
        score, mean over tasks, then over pairs of runs; runs: how many pairs of runs.
    """
    usable = scores[~scores["suspect"] & ~scores["method"].isin(list(variants()))]
    usable = usable[usable["relative"].notna()]
    columns = [*_TABLE, *_COLUMN]
    own = usable[[*columns, "method", "relative", "run"]]
    both = own.merge(own, on=columns, suffixes=("_a", "_b"))
    both = both[both["method_a"] != both["method_b"]]
    both = both.drop_duplicates([*_COLUMN, "method_a", "method_b", *_RUNS])
    difference = (both["relative_a"] - both["relative_b"]).rename("difference")
    by_runs = difference.groupby([both[name] for name in ("method_a", "method_b", *_RUNS)]).mean()
    grouped = by_runs.groupby(["method_a", "method_b"])
    return pd.DataFrame({"difference": grouped.mean(), "runs": grouped.size()})
