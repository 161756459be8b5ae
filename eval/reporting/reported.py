"""The published numbers in results/reported: loading, checks, repetitions, contradictions."""

from pathlib import Path

import pandas as pd

from secateur.paths import REPORTED
from secateur.reporting.copies import ROW, runs
from secateur.tasks import TASKS

FOLDER = REPORTED

_COMMON = {
    "paper": "string",
    "table": "string",
    "model": "string",
    "method": "string",
    "budget_tokens": "Int64",
    "retention_pct": "Float64",
    "budget_scope": "string",
}
_END = {"suspect": "bool", "note": "string", "source": "string"}
ACCURACY = (
    _COMMON | {"task": "string", "metric": "string", "value": "float64", "unit": "string"} | _END
)
EFFICIENCY = (
    _COMMON
    | {"quantity": "string", "value": "float64", "unit": "string", "hardware": "string"}
    | _END
)
_OPTIONAL = {"budget_tokens", "retention_pct", "hardware", "note"}

# the tokens of one image, or only those of the layers after the cut of a method inside the LLM
SCOPES = {"image", "layer"}
AVERAGE = "average"  # in place of a task: a table's own mean over its columns
# columns of published tables besides the tasks of `secateur.tasks`, and their headings
OTHER_COLUMNS = {
    "llava_bench": "LLaVA-Bench",
    "mmvet": "MM-Vet",
    "okvqa": "OK-VQA",
}
COLUMNS = [*TASKS, *OTHER_COLUMNS, AVERAGE]
# metric -> tasks that have it (None: every task without one of its own), largest possible value
METRICS: dict[str, tuple[set[str] | None, float]] = {
    "accuracy": (None, 100),
    **{
        name: ({task.name}, metric.highest)
        for task in TASKS.values()
        if "accuracy" not in task.metrics
        for name, metric in task.metrics.items()
    },
    "pope_as_printed": ({"pope"}, 100),  # the source does not say which
    "relative_average": ({AVERAGE}, 150),
}
# all other columns are in percent
_POINTS = {"mmvet", "llava_bench", "ocrbench"} | {
    task.name for task in TASKS.values() if task.metrics[task.headline].highest != 100
}
# quantity -> units and largest plausible value in each
QUANTITIES: dict[str, dict[str, float]] = {
    "flops": {"T": 100},
    "macs": {"T": 50},
    "vision": {"ms": 1000},
    "pruner": {"ms": 1000},
    "prefill": {"ms": 5000, "ms/token": 100},
    "first_token": {"ms": 5000, "s": 5},
    "decode": {"ms/token": 1000},
    "sample": {"ms": 60_000},
    "run": {"s": 100_000},
    "throughput": {"tokens/s": 10_000},
    "kv_cache": {"MB": 10_000},
    "gpu_memory": {"GB": 200},
    "speed_up": {"x": 50},
    "speed_gain": {"%": 5000},
    "flops_reduction": {"%": 100},
    "accuracy_drop": {"%": 100},
}
_CELL = ["model", "method", "budget", "task", "metric"]
# kinds of numbers that several tables print alike, and differently; the most serious first
ALIKE = ("copied baseline", "unpruned row", "coincidence")
DIFFERENT = ("separate runs", "copied with a change", "unpruned row", "open metric")
# points between a printed mean and that of the printed scores, which are rounded to 0.1
ROUNDING = 0.15


def load_reported(path: Path = FOLDER / "accuracy.csv") -> pd.DataFrame:
    """Published accuracies, one row per number.

    Columns: as in `ACCURACY`, and `budget` ("64", "11.1%", "full").

    Raises:
        ValueError: a row without a source or another field that is not optional; an unknown metric,
            task or scope; a metric of another task; a wrong unit; an impossible value; a suspect
            row without a reason; a number given twice.
    """
    rows = _read(path, ACCURACY)
    _refuse(
        path,
        rows,
        ~rows["metric"].isin(list(METRICS)),
        "metric",
        f"is not known; known: {', '.join(METRICS)}",
    )
    _refuse(
        path,
        rows,
        ~rows["task"].isin(COLUMNS),
        "task",
        f"is not known; known: {', '.join(COLUMNS)}",
    )
    special = set().union(*(tasks for tasks, _ in METRICS.values() if tasks))
    for metric, (tasks, high) in METRICS.items():
        of = rows["metric"] == metric
        foreign = rows["task"].isin(special) if tasks is None else ~rows["task"].isin(tasks)
        _refuse(path, rows, of & foreign, "task", f"has no metric {metric}")
        _refuse(
            path,
            rows,
            of & ~rows["value"].between(0, high),
            "value",
            f"cannot be: {metric} lies in 0..{high}",
        )
    unit = rows["task"].map(lambda task: "points" if task in _POINTS else "%")
    _refuse(
        path,
        rows,
        rows["unit"] != unit,
        "unit",
        f"is wrong: points for {', '.join(sorted(_POINTS))}, % for the others",
    )
    _refuse(
        path,
        rows,
        rows.duplicated(["paper", "table", *_CELL]),
        "value",
        "is given twice for this table and cell",
    )
    return rows


def load_efficiency(path: Path = FOLDER / "efficiency.csv") -> pd.DataFrame:
    """Published costs, one row per number; columns as in `EFFICIENCY`, and `budget`.

    Raises:
        ValueError: as `load_reported`.
    """
    rows = _read(path, EFFICIENCY)
    _refuse(
        path,
        rows,
        ~rows["quantity"].isin(list(QUANTITIES)),
        "quantity",
        f"is not known; known: {', '.join(QUANTITIES)}",
    )
    for quantity, units in QUANTITIES.items():
        of = rows["quantity"] == quantity
        _refuse(
            path,
            rows,
            of & ~rows["unit"].isin(list(units)),
            "unit",
            f"is wrong: {quantity} is in {' or '.join(units)}",
        )
        high = rows["unit"].map(units).astype("float64")
        _refuse(
            path,
            rows,
            of & ~((rows["value"] >= 0) & (rows["value"] <= high)),
            "value",
            f"is not plausible for {quantity}",
        )
    return rows


def _read(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path, dtype=columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the columns are {columns}") from error
    if list(rows) != list(columns):
        raise ValueError(f"{path}: the columns are {list(rows)}, expected {list(columns)}")
    for name in set(columns) - _OPTIONAL:
        _refuse(path, rows, rows[name].isna(), name, "is missing")
    _refuse(
        path,
        rows,
        ~rows["budget_scope"].isin(list(SCOPES)),
        "budget_scope",
        f"is not one of {', '.join(sorted(SCOPES))}",
    )
    _refuse(
        path,
        rows,
        ~rows["retention_pct"].fillna(100).between(0, 100),
        "retention_pct",
        "is not a percentage",
    )
    _refuse(
        path,
        rows,
        rows["suspect"] & rows["note"].isna(),
        "note",
        "is missing: why is the row suspect?",
    )
    rows["note"] = rows["note"].fillna("")
    tokens = rows["budget_tokens"].astype("string")
    retention = rows["retention_pct"].map("{:g}%".format, na_action="ignore").astype("string")
    rows["budget"] = (
        tokens.fillna(retention)
        .fillna("unknown")
        .mask((rows["retention_pct"] == 100).fillna(False), "full")
    )
    return rows


def _refuse(path: Path, rows: pd.DataFrame, bad: pd.Series, column: str, what: str) -> None:
    if bad.any():
        first = int(bad.to_numpy(dtype=bool).argmax())
        others = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
        raise ValueError(
            f"{path} line {first + 2}: {column} {rows[column].iloc[first]!r} {what}{others}"
        )


def _by_cell(reported: pd.DataFrame) -> pd.DataFrame:
    """One row per cell and value, with the tables that print it.

    Left out are averages, since every paper averages over tasks of its own, and rows whose number
    of tokens is not known.
    """
    cells = (reported["metric"] != "relative_average") & (reported["budget"] != "unknown")
    rows = reported[cells].assign(where=reported["paper"] + " " + reported["table"])
    grouped = rows.groupby([*_CELL, "value"], as_index=False)
    return grouped.agg(
        papers=("paper", "nunique"),
        where=("where", lambda tables: ", ".join(dict.fromkeys(tables))),
    )


def _with_runs(reported: pd.DataFrame) -> pd.DataFrame:
    """The numbers that `_by_cell` groups, with the run that each is of."""
    scores = reported[reported["metric"] != "relative_average"]
    return scores.join(runs(reported)["run"], on=ROW)


def _by_kind(rows: pd.DataFrame, kinds: tuple[str, ...], size: str) -> pd.DataFrame:
    """Rows by kind in this order, and within a kind the largest first."""
    place = rows["kind"].map(kinds.index)
    order = rows.assign(place=place).sort_values(
        ["place", size], ascending=[True, False], kind="stable"
    )
    return order.drop(columns="place").reset_index(drop=True)


def duplicates(reported: pd.DataFrame) -> pd.DataFrame:
    """Numbers that two or more papers print alike, the most serious kind first.

    Columns: kind ("copied baseline": also other numbers of the two rows are equal, see
    `copies.runs`; "unpruned row"; "coincidence"), model, method, budget, task, metric, value,
    papers (how many), where.
    """
    cells = _by_cell(reported)
    alike = cells[cells["papers"] > 1]
    by_run = _with_runs(reported).groupby([*_CELL, "value", "run"])["paper"].nunique()
    most = by_run.groupby([*_CELL, "value"]).max().rename("most")
    copied = alike.join(most, on=[*_CELL, "value"])["most"] > 1
    kind = copied.map({True: "copied baseline", False: "coincidence"})
    alike.insert(0, "kind", kind.mask(alike["method"] == "none", "unpruned row"))
    return _by_kind(alike, ALIKE, "papers")


def contradictions(reported: pd.DataFrame) -> pd.DataFrame:
    """Cells that tables print differently, the most serious kind first, then the largest spread.

    Columns: kind ("separate runs"; "copied with a change": rows that are otherwise one run;
    "unpruned row"; "open metric": the papers do not say which metric they print), model, method,
    budget, task, metric, low, high, spread_percent (of the lower value; empty if it is 0), values
    ("59.3: SCOPE Table 1 | 60.1: DiffPrune Table 1").
    """
    cells = _by_cell(reported).assign(
        text=lambda frame: frame["value"].map("{:g}".format) + ": " + frame["where"]
    )
    grouped = cells.groupby(_CELL, as_index=False)
    wide = grouped.agg(low=("value", "min"), high=("value", "max"), values=("text", " | ".join))
    spread = 100 * (wide["high"] / wide["low"].where(wide["low"] > 0) - 1)
    wide.insert(len(wide.columns) - 1, "spread_percent", spread.round(1))
    wide = wide[wide["high"] > wide["low"]]
    number = _with_runs(reported).groupby(_CELL)["run"].nunique().rename("runs")
    one_run = wide.join(number, on=_CELL)["runs"] == 1
    kind = one_run.map({True: "copied with a change", False: "separate runs"})
    kind = kind.mask(wide["metric"].str.endswith("_as_printed"), "open metric")
    wide.insert(0, "kind", kind.mask(wide["method"] == "none", "unpruned row"))
    return _by_kind(wide, DIFFERENT, "spread_percent")
