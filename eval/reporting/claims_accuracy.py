"""Claims about accuracy: what the paper prints, the cells that judge it, and the verdict."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from secateur.reporting import averages, stats
from secateur.reporting.claims import (
    UNDECIDED,
    Claim,
    Evidence,
    Finding,
    Printed,
    at_least,
    interval,
    no_cell,
    not_comparable,
    not_run,
    of_method,
    sweep,
    without_cells,
)
from secateur.reporting.layouts import PaperLayout
from secateur.reporting.paper_tables import PaperTable
from secateur.reporting.reported import AVERAGE
from secateur.reporting.verdicts import PRINTED

NONE = "none at full"  # the unpruned row of a table


class Rows:
    """Some rows of a paper's table ("scope at 64") with the unpruned row, and their cells.

    Attributes:
        rows: the pruned rows.
        columns: that can have comparable cells.
        never: the other columns of the rows, and why.
    """

    def __init__(self, table: PaperTable, rows: Sequence[str], columns: Sequence[str] = ()) -> None:
        """Of the named columns, or of all that the rows print."""
        self.rows, self._table = list(rows), table
        self._cells: dict[tuple[str, str], dict[Hashable, Any]] = {
            (cell["column"], f"{cell['method']} at {cell['budget']}"): cell
            for cell in table.cells.to_dict("records")
        }
        wanted = columns or [
            task
            for task in table.layout.tasks
            if all(pd.notna(self.printed(row, task)) for row in rows)
        ]
        self.never = {column: why for column in wanted if (why := no_cell(column))}
        self.columns = [column for column in wanted if column not in self.never]

    def printed(self, row: str, column: str) -> float:
        """A printed number; NaN if there is none."""
        cell = self._cells.get((column, row))
        return float(cell["printed"]) if cell else float("nan")

    def cells(self) -> dict[str, dict[Hashable, Any]]:
        """The cells that judge the rows, by "scope at 64 on gqa"."""
        return {
            f"{row} on {column}": self._cells[column, row]
            for column in self.columns
            for row in (NONE, *self.rows)
        }

    def missing(self) -> list[str]:
        """The cells that were not run."""
        return [name for name, cell in self.cells().items() if pd.isna(cell["reproduced"])]

    def problems(self) -> dict[str, str]:
        """Why cells that were run are not comparable, by cell."""
        return {
            name: str(cell["cause"])
            for name, cell in self.cells().items()
            if cell["verdict"] == "not comparable" and PRINTED not in cell["cause"]
        }

    def off(self) -> list[str]:
        """The columns in which our unpruned score misses the printed one."""
        verdicts = {column: self._cells[column, NONE]["verdict"] for column in self.columns}
        return [column for column, verdict in verdicts.items() if verdict == "baseline off"]

    @property
    def _formula(self) -> averages.Formula:
        return averages.formula_of(self._table.layout.paper, self._table.layout.table)

    def _metrics(self) -> list[str]:
        return [str(self._cells[column, NONE]["metric"]) for column in self.columns]

    def mean(self) -> stats.Estimates:
        """Our averages over the columns, by the formula of the table.

        Raises:
            ValueError: the unpruned model scores 0 in a column.
        """
        own = [self._table.estimates[column] for column in self.columns]
        rows = [NONE, *self.rows]
        return averages.estimate(self._formula, self._metrics(), own, rows, NONE)

    def printed_mean(self) -> stats.Estimates:
        """The same of the printed scores, without spread."""
        rows = [NONE, *self.rows]
        scores = np.array([[self.printed(row, column) for column in self.columns] for row in rows])
        values = averages.mean(self._formula, self._metrics(), scores, scores[0])
        return stats.Estimates(pd.Series(values, rows), pd.DataFrame([values], columns=rows))


@dataclass(frozen=True, kw_only=True)
class OfTable(Claim):
    """A claim about a row of a paper's table.

    Attributes:
        layout: of the table, in layouts.yaml.
        method, budget: of the row.
        columns: of the table; empty: all.
        run_budget: the budget as the experiment writes it, if it writes another one.
    """

    layout: str
    method: str
    budget: str
    columns: tuple[str, ...] = ()
    run_budget: str = ""

    @property
    def methods(self) -> list[str]:
        """The pruned methods that judge the claim."""
        return [self.method]

    @property
    def rows(self) -> list[str]:
        return [f"{name} at {self.budget}" for name in self.methods]

    def _printed(self, evidence: Evidence) -> Rows:
        return Rows(evidence.printed(self.layout), self.rows, self.columns)

    def paper_layout(self, evidence: Evidence) -> PaperLayout:
        return evidence.printed(self.layout).layout

    def average(self, evidence: Evidence) -> list[float]:
        """The printed averages of the rows."""
        own = self._printed(evidence)
        return [own.printed(row, AVERAGE) for row in self.rows]

    def needs(self, evidence: Evidence) -> str:
        own, model = self._printed(evidence), self.paper_layout(evidence).model
        text = f"{model}: unpruned, {', '.join(self.rows)}, on {', '.join(own.columns)}"
        return text + without_cells(own.never)

    def command(self, evidence: Evidence) -> str:
        experiment = self.paper_layout(evidence).experiment
        budgets = [self.run_budget or self.budget]
        columns = self._printed(evidence).columns
        return sweep(experiment, ["none", *self.methods], budgets, columns)

    def judge(self, evidence: Evidence) -> Finding:
        own = Rows(evidence.table(self.layout), self.rows, self.columns)
        if missing := own.missing():
            return not_run(missing, len(own.cells()))
        value, target = self.value(own.mean()), self.target
        cause = f"over {', '.join(own.columns)}"
        if own.never:
            target = self.value(own.printed_mean()).value
            cause += (
                f", where the paper's scores give {target:.1f} {self.unit}; without "
                f"{', '.join(own.never)}"
            )
        shown, verdict = interval(value, self.unit), at_least(target, value.value)
        if problems := own.problems():
            return not_comparable(problems, shown)
        if off := own.off():
            cause = f"our unpruned model is off in {', '.join(off)}; as run: {verdict}, {cause}"
            verdict = UNDECIDED
        return of_method(self.method, Finding(verdict, cause, shown))

    @property
    def target(self) -> float:
        """The claimed number."""
        raise NotImplementedError

    @property
    def unit(self) -> str:
        raise NotImplementedError

    def value(self, mean: stats.Estimates) -> stats.Interval:
        """The claimed quantity, from the averages of the rows."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Score(OfTable):
    """A method keeps this share of the unpruned model's accuracy, in percent.

    `table` is the paper's table that prints it, if the layout is of another one.
    """

    percent: float
    table: str = ""

    @property
    def target(self) -> float:
        return self.percent

    @property
    def unit(self) -> str:
        return "%"

    def value(self, mean: stats.Estimates) -> stats.Interval:
        return mean.interval(self.rows[0])

    def printed(self, evidence: Evidence) -> Printed:
        layout = self.paper_layout(evidence)
        if not self.columns:
            (own,) = self.average(evidence)
            return Printed(own >= self.percent - 0.05, f"{layout.table}: average {own:.1f}")
        numbers = evidence.accuracy
        numbers = numbers[
            (numbers["paper"] == layout.paper)
            & (numbers["table"] == (self.table or layout.table))
            & (numbers["model"] == layout.model)
        ]
        values = {
            (row["method"], row["budget"], row["task"]): row["value"]
            for row in numbers.to_dict("records")
        }
        pairs = {
            column: (values[self.method, self.budget, column], values["none", "full", column])
            for column in self.columns
        }
        ratio = float(np.mean([100 * own / base for own, base in pairs.values()]))
        parts = [f"{column} {own:g} of {base:g}" for column, (own, base) in pairs.items()]
        text = f"{self.table or layout.table}: {', '.join(parts)}, {ratio:.1f} %"
        return Printed(ratio >= self.percent - 0.05, text)


@dataclass(frozen=True, kw_only=True)
class Advantage(OfTable):
    """The average of a method is this many points above that of another one."""

    points: float
    other: str

    @property
    def methods(self) -> list[str]:
        return [self.method, self.other]

    @property
    def target(self) -> float:
        return self.points

    @property
    def unit(self) -> str:
        return "points"

    def value(self, mean: stats.Estimates) -> stats.Interval:
        return mean.difference(*self.rows)

    def printed(self, evidence: Evidence) -> Printed:
        own, other = self.average(evidence)
        text = f"{self.paper_layout(evidence).table}: averages {own:.1f} and {other:.1f}"
        return Printed(round(own - other, 6) >= self.points - 0.05, text)
