"""Claims that a method is better than all others, and claims of methods without a public table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from secateur.paths import CONFIGS
from secateur.reporting import averages, stats
from secateur.reporting.claims import (
    CONTRADICTED,
    SUPPORTED,
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
    over_readings,
    sweep,
    without_cells,
)
from secateur.reporting.claims_accuracy import NONE, Rows
from secateur.reporting.comparison import Cell, estimate
from secateur.reporting.layouts import yaml
from secateur.reporting.reported import AVERAGE
from secateur.reporting.verdicts import foreign
from secateur.tasks import TASKS


class Place(NamedTuple):
    """A budget and a column of a table, in which a method is printed beside others."""

    layout: str
    column: str
    own: str  # the method's row, "scope at 64"
    rivals: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Best(Claim):
    """A method is better than all others at every budget of some tables.

    Attributes:
        layouts: of the tables, in layouts.yaml.
        place: "average": the averages decide; "column": every column does.
        no_cells: rows that no cell can have; nothing is compared with them.
    """

    layouts: tuple[str, ...]
    method: str
    place: str
    no_cells: tuple[str, ...] = ()

    @property
    def _what(self) -> str:
        return "averages" if self.place == "average" else "columns"

    def _places(self, evidence: Evidence) -> Iterator[Place]:
        for stem in self.layouts:
            table = evidence.printed(stem)
            columns = [AVERAGE] if self.place == "average" else table.layout.tasks
            cells = table.cells[table.cells["column"].isin(columns)].dropna(subset="printed")
            for (budget, column), rows in cells.groupby(["budget", "column"], sort=False):
                names = [f"{name} at {budget}" for name in rows["method"]]
                own = f"{self.method} at {budget}"
                if own in names:
                    names.remove(own)
                    yield Place(stem, str(column), own, tuple(names))

    def printed(self, evidence: Evidence) -> Printed:
        best = []
        for place in self._places(evidence):
            rows = Rows(evidence.printed(place.layout), [place.own])
            own, *others = (rows.printed(row, place.column) for row in (place.own, *place.rivals))
            best.append(own > max(others))
        tables = ", ".join(evidence.printed(stem).layout.table for stem in self.layouts)
        return Printed(all(best), f"{tables}: best in {sum(best)} of {len(best)} {self._what}")

    def needs(self, evidence: Evidence) -> str:
        found = []
        for stem in self.layouts:
            layout = evidence.printed(stem).layout
            never = {column: why for column in layout.tasks if (why := no_cell(column))}
            columns = [column for column in layout.tasks if column not in never]
            text = f"{layout.model}: all rows of {layout.table}, on {', '.join(columns)}"
            found.append(text + without_cells(never))
        if self.no_cells:
            found.append(f"No cell can be of {', '.join(self.no_cells)}")
        return ". ".join(found)

    def command(self, evidence: Evidence) -> str:
        names = []
        for stem in self.layouts:
            name = evidence.printed(stem).layout.experiment
            inside = CONFIGS / "experiment" / f"{name}_llm.yaml"  # methods inside the LLM
            names += [name, inside.stem] if inside.is_file() else [name]
        return "; ".join(f"make sweep EXPERIMENT={name}" for name in names)

    def judge(self, evidence: Evidence) -> Finding:
        places = [
            place
            for place in self._places(evidence)
            if place.column == AVERAGE or not no_cell(place.column)
        ]
        differences: dict[str, stats.Interval] = {}
        needed: set[tuple[str, str]] = set()
        missing: dict[str, None] = {}
        problems: dict[str, str] = {}
        best = 0
        for place in places:
            table = evidence.table(place.layout)
            columns = [] if place.column == AVERAGE else [place.column]
            wins = True
            for rival in (row for row in place.rivals if row not in self.no_cells):
                rows = Rows(table, [place.own, rival], columns)
                needed |= {(table.layout.table, cell) for cell in rows.cells()}
                if lacking := rows.missing():
                    missing |= dict.fromkeys(f"{cell} ({table.layout.table})" for cell in lacking)
                    wins = False
                    continue
                problems |= rows.problems()
                difference = rows.mean().difference(place.own, rival)
                differences[f"{rival} on {place.column} of {table.layout.table}"] = difference
                wins &= difference.value > 0
            best += wins
        if not differences:
            return not_run(list(missing), len(needed))
        adjusted = stats.holm([own.p for own in differences.values()])
        below = [
            f"{where} ({own.value:+.1f})"
            for (where, own), p in zip(differences.items(), adjusted, strict=True)
            if own.value < 0 and p <= 1 - stats.LEVEL
        ]
        shown = f"best in {best} of {len(places)} {self._what}"
        if problems:
            return not_comparable(problems, shown)
        if below:
            where = "significantly below, in percent of the unpruned score"
            return Finding(CONTRADICTED, f"{where}: {', '.join(below)}", shown)
        if missing:
            return not_run(list(missing), len(needed), shown)
        verdict = SUPPORTED if best == len(places) else UNDECIDED
        cause = f"{len(differences)} paired differences, none significantly below zero"
        return Finding(verdict, cause, shown)


@dataclass(frozen=True, kw_only=True)
class Retained(Claim):
    """A method without a public table keeps this share of the accuracy, in percent.

    Judged by the mean over an experiment's tasks of score / unpruned score.
    """

    percent: float
    experiment: str
    method: str
    budgets: tuple[str, ...]

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml(CONFIGS / "experiment" / f"{self.experiment}.yaml")
        return config

    @property
    def _model(self) -> str:
        defaults = {
            key: value for entry in self._config["defaults"] for key, value in entry.items()
        }
        return str(defaults["override /model"])

    def printed(self, evidence: Evidence) -> Printed:
        return Printed(None, "no table is public")

    def needs(self, evidence: Evidence) -> str:
        rows = [f"{self.method} at {budget}" for budget in self.budgets]
        return f"{self._model}: unpruned, {', '.join(rows)}, on {', '.join(self._config['tasks'])}"

    def command(self, evidence: Evidence) -> str:
        return sweep(self.experiment, ["none", self.method], self.budgets, self._config["tasks"])

    def judge(self, evidence: Evidence) -> Finding:
        rows = {NONE: ("none", "full")}
        rows |= {f"{self.method} at {budget}": (self.method, budget) for budget in self.budgets}
        columns, missing = [], []
        for task in self._config["tasks"]:
            own = {key: self._cell(evidence, task, *row) for key, row in rows.items()}
            found = {key: cell for key, cell in own.items() if cell}
            missing += [f"{key} on {task}" for key in own if key not in found]
            if len(found) == len(rows):
                columns.append(estimate(TASKS[task].headline, found, evidence.resamples))
        if missing:
            return not_run(missing, len(rows) * len(self._config["tasks"]))
        mean = averages.estimate(
            averages.MEAN_OF_RATIOS, ["accuracy"] * len(columns), columns, list(rows), NONE
        )
        pruned = [key for key in rows if key != NONE]
        shown = "; ".join(f"{interval(mean.interval(key), '%')} ({key})" for key in pruned)
        verdict, cause = over_readings(
            {key: at_least(self.percent, mean.values[key]) for key in pruned}
        )
        return of_method(self.method, Finding(verdict, cause, shown))

    def _cell(self, evidence: Evidence, task: str, method: str, budget: str) -> Cell | None:
        """The cell with the experiment's inputs and the method's defaults.

        Raises:
            ValueError: there are several, which differ in other settings.
        """
        model = yaml(CONFIGS / "model" / f"{self._model}.yaml")
        usual = model.get("pruner_fields", {}).get(method, {})
        found = [
            cell
            for cell in evidence.cells
            if (cell.task, cell.name, cell.budget) == (task, method, budget)
            and cell.record.identity.model.name == self._model
            and cell.record.identity.suite.name == "hub"
            and not cell.record.identity.pruner.changed(usual)
            and not foreign(cell, self._config["model"])
        ]
        if len(found) > 1:
            raise ValueError(
                f"{self.name}: {len(found)} cells of {method} at {budget} on {task}; keep those of "
                "one setting in a results folder of their own"
            )
        return found[0] if found else None
