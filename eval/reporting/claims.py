"""The claims of abstracts, results/reported/claims.yaml: what speaks for and against each.

Verdicts on a claim:

supported        what was run or counted reaches the claimed number, less the rounding of the print
                 and the run-to-run tolerance of `verdicts`
contradicted     it is below the limit for close
undecided        it is between the two; or the abstract leaves several readings, and they give
                 different verdicts; or the method is a reconstruction, or our unpruned model is off
not comparable   the cells have other inputs or budgets than the paper's
not run          cells are missing
cannot be judged by no cell at all; the cause says why

A claimed number is a lower limit: a model that keeps more of its accuracy, or saves more FLOPs,
supports the claim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from secateur.pruners import REGISTRY
from secateur.reporting import paper_tables, stats
from secateur.reporting.comparison import Cell
from secateur.reporting.layouts import layouts
from secateur.reporting.reported import load_efficiency, load_reported
from secateur.reporting.verdicts import POINTS, foreign_documents
from secateur.tasks import TASKS

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
NOT_COMPARABLE, NOT_RUN, OPEN = "not comparable", "not run", "cannot be judged"
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, NOT_COMPARABLE, NOT_RUN, OPEN)


@dataclass
class Evidence:
    """What claims are judged by.

    Attributes:
        cells: the finished cells of a results folder.
        bench: raw samples of `scripts/bench.py`.
        resamples: how often images are resampled.
    """

    cells: Sequence[Cell] = ()
    bench: pd.DataFrame = field(default_factory=pd.DataFrame)
    resamples: int = stats.RESAMPLES
    _tables: dict[tuple[str, bool], paper_tables.PaperTable] = field(default_factory=dict)

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        return load_reported()

    @cached_property
    def efficiency(self) -> pd.DataFrame:
        return load_efficiency()

    def printed(self, stem: str) -> paper_tables.PaperTable:
        """A paper's table without our cells."""
        return self._table(stem, own=False)

    def table(self, stem: str) -> paper_tables.PaperTable:
        """A paper's table beside our cells.

        Raises:
            ValueError: as `paper_tables.build`.
        """
        return self._table(stem, own=True)

    def _table(self, stem: str, own: bool) -> paper_tables.PaperTable:
        if (stem, own) not in self._tables:
            layout = next(layout for layout in layouts() if layout.stem == stem)
            cells = self.cells if own else ()
            self._tables[stem, own] = paper_tables.build(
                layout, self.accuracy, cells, self.resamples
            )
        return self._tables[stem, own]


class Finding(NamedTuple):
    """What was run or counted for a claim.

    Attributes:
        verdict: one of `VERDICTS`.
        cause: what the verdict rests on.
        value: the reproduced value with its interval, as text; empty if there is none.
    """

    verdict: str
    cause: str = ""
    value: str = ""


class Printed(NamedTuple):
    """What the paper's own tables say: whether they support the claim (None: they are silent)."""

    supports: bool | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of an abstract; its kinds are in `claims_page.KINDS`.

    Attributes:
        name: its name in claims.yaml.
        paper, source: the paper, and where the sentence is.
        claim: the sentence, in our words.
        remark: how the paper's tables, or the wording, bear on it.
    """

    name: str
    paper: str
    source: str
    claim: str
    remark: str = ""

    def printed(self, evidence: Evidence) -> Printed:
        """What the paper's own tables say."""
        raise NotImplementedError

    def needs(self, evidence: Evidence) -> str:
        """The cells that judge it, in words."""
        raise NotImplementedError

    def command(self, evidence: Evidence) -> str:
        """The command that makes them; empty if there is none."""
        raise NotImplementedError

    def judge(self, evidence: Evidence) -> Finding:
        """The verdict.

        Raises:
            ValueError: as `Evidence.table`; or the unpruned model scores 0 in a column.
        """
        raise NotImplementedError


def at_least(target: float, own: float) -> str:
    """Whether a share of accuracy in percent, or a difference in points, reaches its target."""
    short = round(target - own, 6)
    if short <= 0.05 + POINTS.run_to_run:
        return SUPPORTED
    return CONTRADICTED if short > POINTS.close else UNDECIDED


def over_readings(readings: dict[str, str]) -> tuple[str, str]:
    """One verdict, and its cause, from those of several readings of a claim (words -> verdict)."""
    verdicts = set(readings.values())
    if len(verdicts) == 1:
        return verdicts.pop(), ", ".join(readings)
    return UNDECIDED, "; ".join(f"{words}: {verdict}" for words, verdict in readings.items())


def of_method(method: str, finding: Finding) -> Finding:
    """The finding, undecided if the method is a reconstruction of ours."""
    if REGISTRY[method].status != "reconstruction":
        return finding
    if finding.verdict not in (SUPPORTED, CONTRADICTED):
        return finding
    cause = f"{method} is our reconstruction; as run: {finding.verdict}, {finding.cause}"
    return finding._replace(verdict=UNDECIDED, cause=cause)


def interval(value: stats.Interval, unit: str) -> str:
    """A value with half of its interval: "97.5 ± 0.4 %"."""
    half = "" if pd.isna(value.low) else f" ± {(value.high - value.low) / 2:.1f}"
    return f"{value.value:.1f}{half} {unit}"


def not_run(missing: Sequence[str], cells: int, value: str = "") -> Finding:
    """The finding if some of a number of cells are missing."""
    if len(missing) == cells:
        return Finding(NOT_RUN, f"none of the {cells} cells was run", value)
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    cause = f"{len(missing)} of {cells} cells are missing: {', '.join(missing[:5])}{more}"
    return Finding(NOT_RUN, cause, value)


def not_comparable(problems: Mapping[str, str], value: str) -> Finding:
    """The finding if cells ("scope at 64 on gqa") have problems."""
    found = []
    for problem, names in _by_text(problems).items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"{names[0]}{more}: {problem}")
    return Finding(NOT_COMPARABLE, "; ".join(found), value)


def without_cells(never: Mapping[str, str]) -> str:
    """The columns that can have no comparable cell, by reason; empty if there are none."""
    found = [f"{', '.join(names)} ({why})" for why, names in _by_text(never).items()]
    return f". No comparable cell: {'; '.join(found)}" if found else ""


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that have a text, by the text."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        found.setdefault(text, []).append(name)
    return found


def no_cell(column: str) -> str:
    """Why a column of a paper's table can have no comparable cell; empty if it can."""
    return foreign_documents(column) if column in TASKS else "no such task here"


def sweep(experiment: str, methods: Sequence[str], budgets: Sequence[str], tasks: list[str]) -> str:
    """The command for some cells of an experiment."""
    return (
        f"python scripts/sweep.py -m experiment={experiment} pruner={','.join(methods)} "
        f"budget={','.join(budgets)} 'tasks=[{','.join(tasks)}]'"
    )
