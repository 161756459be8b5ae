"""The papers' main tables in their own layout: printed numbers beside those of our cells."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from secateur.experiments import origins
from secateur.paths import CONFIGS
from secateur.reporting import averages, stats
from secateur.reporting.comparison import (
    COUNTED,
    FEW_IMAGES,
    Cell,
    check_one_setting,
    estimate,
    provenance,
)
from secateur.reporting.layouts import PaperLayout, Row, rows_of, yaml
from secateur.reporting.reported import AVERAGE
from secateur.reporting.tables import share
from secateur.reporting.variants import method_of, variant
from secateur.reporting.verdicts import (
    JUDGED,
    PRINTED,
    READINGS,
    Verdict,
    choices,
    foreign,
    foreign_documents,
    judge_method,
    judge_unpruned,
    off_budget,
    over_readings,
    signs,
    with_open_budget,
    with_open_protocol,
)
from secateur.reporting.versions import mixtures
from secateur.tasks import TASKS

OVER_RUN = "over tasks run"  # the mean over the columns that have cells, printed and ours
NAN = float("nan")


class PaperTable(NamedTuple):
    """A table beside its reproduction.

    Attributes:
        layout: the table's layout.
        cells: one row per cell, in the order of the table. Columns: method, budget, column, metric;
            printed; reproduced, low, high; printed_relative, relative, relative_low, relative_high
            (percent of the unpruned row); verdict, cause, difference (ours minus printed);
            tied_best (of ours, within the budget); suspect, note, source (of the printed number).
        notes: to print below the table.
        estimates: column -> our scores of its rows ("scope at 64"), resampled together; only the
            columns that have an unpruned cell.
    """

    layout: PaperLayout
    cells: pd.DataFrame
    notes: list[str]
    estimates: dict[str, stats.Estimates]


def build(
    layout: PaperLayout,
    reported: pd.DataFrame,
    cells: Sequence[Cell],
    resamples: int = stats.RESAMPLES,
) -> PaperTable:
    """Fill a table with the cells of its model on the real data sets.

    Raises:
        ValueError: the cells are of several settings or versions, or two fit one place.
    """
    of_paper = (reported["paper"] == layout.paper) & (reported["model"] == layout.model)
    of_table = of_paper & (reported["table"] == layout.table)
    if layout.unpruned:
        of_table |= (
            of_paper
            & (reported["table"] == layout.unpruned)
            & (reported["method"] == "none")
            & reported["task"].isin(layout.tasks)
        )
    printed = reported[of_table].assign(table=layout.table)
    rows = rows_of(layout, printed)
    inputs = yaml(CONFIGS / "experiment" / f"{layout.experiment}.yaml")["model"]
    placed, notes = _place(layout, rows, cells, inputs)
    full = printed.loc[printed["method"] == "none", "budget_tokens"].iloc[0]
    columns = []
    for task in layout.tasks:
        own = {key: cell for (key, of), cell in placed.items() if of == task}
        problems = {
            row.key: foreign(own[row.key], inputs)
            or off_budget(own[row.key], None if pd.isna(full) else int(full), row.keep)
            for row in rows
            if row.key in own
        }
        columns.append(_Column(task, printed[printed["task"] == task], own, problems, resamples))
    found = [column.cell(row) for row in rows for column in columns]
    notes += signs(_differences(found))
    notes += [
        f"{column.task}: fewer than {FEW_IMAGES} images, so no row is marked as the best."
        for column in columns
        if column.few_images
    ]
    formula = averages.formula_of(layout.paper, layout.table)
    if layout.average:
        means = averages.check(printed)
        found += [_average(formula, row, columns, printed, means) for row in rows]
        notes += _missing_columns(layout, columns)
    run = [
        column
        for column in columns
        if column.found is not None
        and not column.no_baseline
        and not foreign_documents(column.task)
    ]
    if len(run) > 1:
        found += [_over_run(formula, row, run) for row in rows]
        notes.append(
            f"{OVER_RUN.capitalize()}: the same mean over "
            f"{', '.join(column.task for column in run)}, on both sides."
        )
    if layout.average:
        notes.append(
            f"{layout.average}: {formula.words}; "
            "a printed average that its scores do not give is not comparable."
        )
    notes += origins(layout.experiment)
    if placed:
        notes += _qualified(placed)
        notes += _counted(placed)
        notes += mixtures(cell.record for cell in placed.values())
        notes.append(provenance(list(placed.values())))
    else:
        notes.append(
            "Nothing was run. To run its tasks: "
            f"python scripts/sweep.py -m experiment={layout.experiment}"
        )
    estimates = {column.task: column.found for column in columns if column.found is not None}
    return PaperTable(layout, pd.DataFrame(found), notes, estimates)


def _missing_columns(layout: PaperLayout, columns: list["_Column"]) -> list[str]:
    """A note on the columns without which the paper's average cannot be recomputed."""
    missing = [column.task for column in columns if column.found is None]
    if not missing or len(missing) == len(columns):
        return []
    unknown = [task for task in missing if task not in TASKS]
    why = f"; no task here: {', '.join(unknown)}" if unknown else ""
    return [f"{layout.average} is not recomputed: no cells of {', '.join(missing)}{why}."]


def _qualified(placed: dict[tuple[str, str], Cell]) -> list[str]:
    """A note on methods whose status says that they are not checked against released code."""
    methods = [cell.record.identity.pruner for cell in placed.values()]
    found = sorted({f"{own.name} ({own.status})" for own in methods if own.qualified})
    if not found:
        return []
    return [f"Not checked against recorded outputs of released code: {', '.join(found)}."]


def _counted(placed: dict[tuple[str, str], Cell]) -> list[str]:
    """Notes on empty, unusable and cut-off answers and on rewritten prompts, by (row, task)."""
    found = []
    for text, field in COUNTED.items():
        shares = {
            where: 100 * share([cell.record], field)
            for where, cell in placed.items()
            if getattr(cell.record, field)
        }
        if shares:
            listed = ", ".join(
                f"{task} {row} {value:.1f} %" for (row, task), value in shares.items()
            )
            found.append(f"Some {text}: {listed}.")
    return found


def _differences(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By column, the differences of the pruned rows that have a verdict on the number itself."""
    differences: dict[str, list[float]] = {}
    for cell in found:
        if cell["method"] != "none" and cell["verdict"] in (*JUDGED, "undecided"):
            differences.setdefault(cell["column"], []).append(cell["difference"])
    return differences


def _place(
    layout: PaperLayout, rows: list[Row], cells: Sequence[Cell], inputs: dict[str, Any]
) -> tuple[dict[tuple[str, str], Cell], list[str]]:
    """Cells by (row, task), and notes on the cells that were left out.

    Left out are cells with other inputs or limits, and of a method other variants than the row's.
    """
    model = yaml(CONFIGS / "model" / f"{layout.model}.yaml")
    fitting: list[tuple[Row, Cell]] = []
    left_out = set()
    for cell in cells:
        identity = cell.record.identity
        if (identity.suite.name, identity.model.name) != (
            "hub",
            layout.model,
        ) or cell.task not in layout.tasks:
            continue
        usual = model.get("pruner_fields", {}).get(cell.name)
        changed = choices(identity.pruner, usual)
        named = [row for row in rows if method_of(row.method) == cell.name]
        placed_in = [row for row in named if variant(row.method, cell.task).fields == changed]
        fitting += [(row, cell) for row in placed_in if cell.budget in row.texts]
        if not placed_in and any(cell.budget in row.texts for row in named):
            left_out.add(f"{cell.name} with {', '.join(changed) or 'its defaults'}")
    suited = [(row, cell) for row, cell in fitting if not foreign(cell, inputs)]
    if suited:  # else the others are shown, as not comparable
        left_out |= {
            f"cells where {reason}" for _, cell in fitting if (reason := foreign(cell, inputs))
        }
        fitting = suited
    check_one_setting([cell for _, cell in fitting])
    placed: dict[tuple[str, str], Cell] = {}
    for row, cell in fitting:
        if (row.key, cell.task) in placed:
            raise ValueError(
                f"{layout.title}: two cells of {cell.task} for {row.key}, which differ in the "
                "method's source or in how the budget is written; keep one of them in a results "
                "folder of its own"
            )
        placed[row.key, cell.task] = cell
    return placed, [f"Left out: {text}." for text in sorted(left_out)]


class _Column:
    """One task of a table: printed scores, our scores, and why cells cannot be compared."""

    def __init__(
        self,
        task: str,
        printed: pd.DataFrame,
        own: dict[str, Cell],
        problems: dict[str, str],
        resamples: int,
    ) -> None:
        self.task, self.own, self.problems = task, own, problems
        self.metric = printed["metric"].iloc[0]
        self.printed = {
            f"{row['method']} at {row['budget']}": row for row in printed.to_dict("records")
        }
        self.unpruned = next(key for key, row in self.printed.items() if row["method"] == "none")
        self.found: stats.Estimates | None = None  # in the first reading of the metric
        self.readings: dict[str, stats.Estimates] = {}
        self.baselines: dict[str, Verdict] = {}
        self.few_images = any(cell.rows["image_id"].nunique() < FEW_IMAGES for cell in own.values())
        everywhere = self._estimate(resamples) if own else ""
        base = self.printed[self.unpruned]
        for key, problem in list(problems.items()):
            doubts = [
                f"{PRINTED}{row['note']}"
                for row in (self.printed.get(key, base), base)
                if row["suspect"]
            ]
            missing = "" if key in self.printed else "the paper prints no number"
            unpruned = (
                problems[self.unpruned] and f"unpruned row: {problems[self.unpruned]}"
                if self.unpruned in own
                else ""
            )
            self.problems[key] = (
                problem
                or (TASKS[task].other_documents if task in TASKS else "")
                or everywhere
                or unpruned
                or missing
                or "".join(doubts[:1])
            )
        rivals: dict[str, list[str]] = {}
        for key, cell in own.items():
            if cell.name != "none" and self.found and not self.problems[key]:
                rivals.setdefault(cell.budget, []).append(key)
        # our rows that are not significantly below the best of their budget
        self.tied_best = set[str]()
        if self.found and not self.few_images:
            self.tied_best.update(*map(self.found.tied_best, rivals.values()))

    def _estimate(self, resamples: int) -> str:
        """Find our scores and the verdict on the unpruned model; return why none is comparable.

        A metric that the paper does not name exactly is estimated in each of its readings.
        """
        metrics = READINGS.get(self.metric, (self.metric,))
        if self.unpruned not in self.own:
            return "no unpruned cell to be relative to"
        try:
            self.readings = {metric: estimate(metric, self.own, resamples) for metric in metrics}
        except ValueError as error:
            return str(error)
        self.found = self.readings[metrics[0]]
        self.baselines = {
            metric: judge_unpruned(self.score(self.unpruned), found.values[self.unpruned], metric)
            for metric, found in self.readings.items()
        }
        return ""

    @property
    def baseline(self) -> Verdict:
        """The verdict on the unpruned row."""
        return self._with_protocol(over_readings(self.baselines))

    @property
    def no_baseline(self) -> bool:
        """Whether our unpruned score is 0."""
        return self.found is not None and not self.found.values[self.unpruned] > 0

    def judge(self, row: Row) -> Verdict:
        """The verdict on a row that nothing else keeps from being compared."""
        if row.method == "none":
            return self.baseline
        if self.no_baseline:
            return Verdict("no baseline", "our unpruned model scores 0")
        verdict = over_readings(
            {
                metric: judge_method(
                    self.score(row.key), found.values[row.key], metric, self.baselines[metric]
                )
                for metric, found in self.readings.items()
            }
        )
        return self._with_protocol(with_open_budget(verdict, method_of(row.method), row.budget))

    def _with_protocol(self, verdict: Verdict) -> Verdict:
        """The verdict, undecided if it rests on what papers do not say of the task."""
        left_open = TASKS[self.task].open_protocol if self.task in TASKS else ""
        return with_open_protocol(verdict, left_open)

    def score(self, key: str) -> float:
        return self.printed[key]["value"] if key in self.printed else NAN

    def ratio(self, key: str) -> float:
        unpruned = self.score(self.unpruned)
        return 100 * self.score(key) / unpruned if unpruned > 0 else NAN

    def has(self, row: Row) -> bool:
        return self.found is not None and row.key in self.own

    def cell(self, row: Row) -> dict[str, Any]:
        empty = _empty(row, self.task, self.metric, self.score(row.key), self.ratio(row.key))
        if row.key in self.printed:
            empty |= {name: self.printed[row.key][name] for name in ("suspect", "note", "source")}
        if row.key not in self.own:
            return empty
        verdict = Verdict("not comparable", self.problems[row.key])
        if self.found is None:
            return empty | verdict._asdict()
        relative = (
            stats.Interval(NAN, NAN, NAN, NAN)
            if self.no_baseline
            else self.found.ratio(row.key, self.unpruned)
        )
        if not self.problems[row.key]:
            verdict = self.judge(row)
        best = {"tied_best": row.key in self.tied_best}
        return empty | _ours(self.found.interval(row.key), relative) | verdict._asdict() | best


def _empty(row: Row, column: str, metric: str, printed: float, relative: float) -> dict[str, Any]:
    """A cell that was not run."""
    nothing = stats.Interval(NAN, NAN, NAN, NAN)
    place = {"method": row.method, "budget": row.budget, "column": column, "metric": metric}
    numbers = {"printed": printed, **_ours(nothing, nothing), "printed_relative": relative}
    return (
        place
        | numbers
        | Verdict("not run")._asdict()
        | {"tied_best": False, "suspect": False, "note": "", "source": ""}
    )


def _ours(score: stats.Interval, relative: stats.Interval) -> dict[str, float]:
    absolute = {"reproduced": score.value, "low": score.low, "high": score.high}
    return absolute | {
        "relative": relative.value,
        "relative_low": relative.low,
        "relative_high": relative.high,
    }


def _average(
    formula: averages.Formula,
    row: Row,
    columns: list[_Column],
    printed: pd.DataFrame,
    means: pd.DataFrame,
) -> dict[str, Any]:
    """The cell of the paper's own average.

    It is reproduced if every column that the row prints was run.
    """
    own = (printed["method"] == row.method) & (printed["budget"] == row.budget)
    number = printed[own & (printed["task"] == "average")]
    value = float(number["value"].iloc[0]) if len(number) else NAN
    needed = [column for column in columns if row.key in column.printed]
    cell = _mean(formula, row, AVERAGE, needed, value)
    if len(number):
        cell |= {name: number[name].iloc[0] for name in ("suspect", "note", "source")}
    other = means[
        ~means["follows"] & (means["method"] == row.method) & (means["budget"] == row.budget)
    ]["recomputed"]
    doubt = cell["note"] if cell["suspect"] else ""
    if len(other):
        doubt = f"the printed scores give {other.iloc[0]:.1f}"
    if doubt and cell["verdict"] != "not run":
        cell |= Verdict("not comparable", f"{PRINTED}{doubt}")._asdict()
    return cell


def _over_run(formula: averages.Formula, row: Row, run: list[_Column]) -> dict[str, Any]:
    """The cell of the average over the columns that have comparable cells."""
    scores = np.array([[column.score(key) for column in run] for key in (row.key, run[0].unpruned)])
    printed = averages.mean(formula, [column.metric for column in run], *scores)
    return _mean(formula, row, OVER_RUN, run, float(printed))


def _mean(
    formula: averages.Formula, row: Row, name: str, columns: list[_Column], printed: float
) -> dict[str, Any]:
    """The average over some columns, judged against a printed one."""
    empty = _empty(row, name, "relative_average", printed, printed)
    missing = [column.task for column in columns if not column.has(row)]
    if missing:
        have = f"{len(columns) - len(missing)} of {len(columns)} tasks were run"
        return empty | {"cause": f"{have}; missing: {', '.join(missing)}"}
    without = [column.task for column in columns if column.no_baseline]
    if without:
        cause = f"our unpruned model scores 0 in {', '.join(without)}"
        return empty | Verdict("no baseline", cause)._asdict()
    unpruned = columns[0].unpruned
    own = averages.estimate(
        formula,
        [column.metric for column in columns],
        [column.found for column in columns if column.found],
        [row.key],
        unpruned,
    ).interval(row.key)
    problems = [
        f"{column.task}: {column.problems[row.key]}"
        for column in columns
        if column.problems[row.key]
    ]
    baselines = {column.task: column.baseline for column in columns}
    off = [
        base._replace(cause=f"of {task} {base.cause}")
        for task, base in baselines.items()
        if base.verdict == "baseline off"
    ]
    open_metrics = [column.metric for column in columns if len(column.readings) > 1]
    verdict = judge_method(
        printed, own.value, "relative_average", off[0] if off else columns[0].baseline
    )
    if row.method != "none":
        verdict = with_open_budget(verdict, method_of(row.method), row.budget)
    if open_metrics and verdict.verdict in JUDGED:
        verdict = verdict._replace(
            verdict="undecided",
            cause=f"the paper does not say which metric {', '.join(open_metrics)} is",
        )
    if problems:
        verdict = Verdict("not comparable", problems[0])
    elif row.method == "none" and formula.relative:
        verdict = Verdict("match", "100 by definition")
    elif pd.isna(printed):
        verdict = Verdict("not comparable", "the paper prints no number")
    return empty | _ours(own, own) | verdict._asdict()
