"""How many of the papers' numbers have a cell that one command recomputes, and why others do not.

A number has a cell if an experiment of its paper composes a job with its model, its method with the
fields that its row names, its budget, its task and a metric of that task. If an experiment names
the number's table, the job's model has the settings that this experiment gives it: image layout,
prompt and so on. An average has no cell of its own: it counts if every other number of its row has
one. Every other number has one reason.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from secateur import experiments
from secateur.job import Job
from secateur.paths import CONFIGS
from secateur.pruners import REGISTRY
from secateur.records import MethodIdentity
from secateur.reporting.layouts import yaml
from secateur.reporting.reported import AVERAGE, FOLDER, load_reported
from secateur.reporting.variants import Variant, method_of, variant
from secateur.reporting.verdicts import READINGS, choices
from secateur.tasks import TASKS

PAPERS = ("PromPrune", "PruneSID", "SCOPE")  # no table of ZSPAPrune and SPpruner is public
IN_NONE = "in no experiment"  # of a number that could have a cell; its task follows
CROPS = 5  # of the 2880 tokens in the tables of LLaVA-NeXT
_ROW = ["paper", "table", "model", "method", "budget"]


def of_papers(results: Path) -> pd.DataFrame:
    """The numbers of `PAPERS`, each with its experiment or its reason; see `cover`."""
    numbers = load_reported()
    numbers = numbers[numbers["paper"].isin(PAPERS)].reset_index(drop=True)
    return cover(numbers, composed(PAPERS, results))


class Composed(NamedTuple):
    """The cells of a job of an experiment."""

    experiment: str
    paper: str
    tables: tuple[str, ...]
    model: str
    inputs: str  # the settings of the model, as JSON
    method: Variant
    budget: str
    tasks: tuple[str, ...]


def composed(papers: Iterable[str], results: Path) -> list[Composed]:
    """The jobs of all experiments of some papers."""
    found = []
    for name in experiments.of_papers():
        source = experiments.written(name).get("reported")
        if source and source.paper in papers:
            tables = tuple(source.tables)
            found += [
                _composed(name, source.paper, tables, job)
                for job in experiments.jobs(name, results)
            ]
    return found


def _composed(experiment: str, paper: str, tables: tuple[str, ...], job: Job) -> Composed:
    name = job.pruner.name
    usual = job.model.pruner_fields.get(name)
    fields = choices(MethodIdentity.of(job.pruner), usual)
    return Composed(
        experiment,
        paper,
        tables,
        job.model.name,
        job.model.model_dump_json(exclude={"device", "budgets", "pruner_fields"}),
        Variant(name, fields),
        "full" if name == "none" else str(job.budget),
        tuple(job.tasks),
    )


def cover(numbers: pd.DataFrame, cells: Iterable[Composed]) -> pd.DataFrame:
    """Add two columns to published numbers: `experiment`, and `reason` if that is empty.

    Args:
        numbers: rows of `load_reported`.
        cells: what the experiments compose.
    """
    reasons = yaml(FOLDER / "reasons.yaml")
    models = {path.stem for path in (CONFIGS / "model").glob("[!_]*.yaml")}
    by_setting: dict[tuple[str, str], list[Composed]] = defaultdict(list)
    for cell in cells:
        by_setting[cell.paper, cell.model].append(cell)
    found = []
    for row in numbers.to_dict("records"):
        experiment, reason = "", ""
        if row["task"] != AVERAGE:
            reason = _missing(row, models, reasons)
            if not reason:
                experiment = _experiment(row, by_setting[row["paper"], row["model"]])
                reason = "" if experiment else _no_cell(row, reasons)
        found.append((experiment, reason))
    covered = numbers.assign(
        experiment=[one for one, _ in found], reason=[reason for _, reason in found]
    )
    return _with_averages(covered)


def _missing(row: Mapping[Any, Any], models: set[str], reasons: dict[str, Any]) -> str:
    """The task, model or method of a row that is not here, and why; empty if all are."""
    task, metric = row["task"], row["metric"]
    lacking = [
        ("task", task, task in TASKS),
        ("model", row["model"], row["model"] in models),
        ("method", row["method"], method_of(row["method"]) in REGISTRY),
    ]
    for kind, name, there in lacking:
        if not there:
            why = reasons[f"{kind}s"].get(name)
            return f"no {kind} {name}" + (f": {why}" if why else "")
    if not set(READINGS.get(metric, (metric,))) <= set(TASKS[task].metrics):
        return f"no metric {metric} of {task}"
    return ""


def _experiment(row: Mapping[Any, Any], cells: list[Composed]) -> str:
    """The first experiment with a row's cell; empty if there is none."""
    tokens, budgets = row["budget_tokens"], {row["budget"]}
    if not pd.isna(row["retention_pct"]):
        budgets.add(f"{row['retention_pct']:g}%")
    if row["model"].startswith("llava_next") and not pd.isna(tokens):
        budgets.add(f"{tokens // CROPS}/tile")  # as PruneSID and VisionZip count
    settings = {cell.inputs for cell in cells if row["table"] in cell.tables}
    for cell in cells:
        if (
            (cell.inputs in settings or not settings)
            and cell.method == variant(row["method"], row["task"])
            and cell.budget in budgets
            and row["task"] in cell.tasks
        ):
            return cell.experiment
    return ""


def _no_cell(row: Mapping[Any, Any], reasons: dict[str, Any]) -> str:
    """Why a row that could run is in no experiment."""
    for cell in reasons["cells"]:
        if all(row[name] == cell[name] for name in ("model", "method", "budget")):
            return f"{row['method']} at {row['budget']}: {cell['why']}"
    why = reasons["methods"].get(row["method"])
    return f"{row['method']}: {why}" if why else f"{IN_NONE}: {row['task']}"


def _with_averages(numbers: pd.DataFrame) -> pd.DataFrame:
    """Decide on the averages by the other numbers of their rows."""
    scores = numbers[numbers["task"] != AVERAGE]
    rows = dict(iter(scores.groupby(_ROW)))
    for at in numbers.index[numbers["task"] == AVERAGE]:
        row = rows[tuple(numbers.loc[at, _ROW])]
        lacking = row.loc[row["experiment"] == "", "task"]
        if len(lacking):
            reason = f"average over columns without a cell: {', '.join(sorted(lacking))}"
            numbers.loc[at, "reason"] = reason
        else:
            numbers.loc[at, "experiment"] = row["experiment"].iloc[0]
    return numbers


def summary(numbers: pd.DataFrame) -> str:
    """`N of M`."""
    return f"{(numbers['experiment'] != '').sum():,} of {len(numbers):,}"


HEAD = """# Coverage

Written by `make coverage` from the configs; do not edit.

{papers} print {total:,} numbers (`results/reported/accuracy.csv`). One command recomputes
**{covered:,}** of them: `make sweep EXPERIMENT=...` runs the cells, `make tables` prints the main
tables beside them. An average counts if every other number of its row has a cell. No published
weights have run here, so no page says yet whether a recomputed number equals the printed one.
"""


def page(numbers: pd.DataFrame) -> str:
    """The page: by paper and table, how many numbers have a cell, and why the others have none.

    Args:
        numbers: as `cover` returns them.
    """
    *papers, last = dict.fromkeys(numbers["paper"])
    covered = (numbers["experiment"] != "").sum()
    head = HEAD.format(
        total=len(numbers), covered=covered, papers=f"{', '.join(papers)} and {last}"
    )
    head += "".join(f"\n{line}\n" for line in _other_documents(numbers))
    sections = [
        f"## {paper}: {summary(own)}\n\n{_counts(own)}\n{_reasons(own)}"
        for paper, own in numbers.groupby("paper")
    ]
    return "\n".join([head, *sections])


def _other_documents(numbers: pd.DataFrame) -> list[str]:
    """Sentences on the numbers whose cells have other documents than the papers'."""
    counts = Counter(numbers.loc[numbers["experiment"] != "", "task"])
    why = {name: getattr(task, "other_documents", "") for name, task in TASKS.items()}
    return [
        f"{counts[name]} of them are of other documents than their cells, {name}: {text}."
        for name, text in why.items()
        if text and counts[name]
    ]


def _tables(numbers: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """The numbers by table and model: main tables by their numbers, then figures."""
    places = numbers.groupby(["table", "model"])
    groups = [(str(table), str(model), rows) for (table, model), rows in places]
    return sorted(
        groups, key=lambda one: (one[0].startswith("Figure"), len(one[0]), one[0], one[1])
    )


def _counts(numbers: pd.DataFrame) -> str:
    lines = ["| table | model | numbers | with a cell | experiments |", "|---|---|---:|---:|---|"]
    for table, model, rows in _tables(numbers):
        names = sorted(set(rows["experiment"]) - {""})
        shown = ", ".join(f"`{name}`" for name in names) or "-"
        covered = (rows["experiment"] != "").sum()
        lines.append(f"| {table} | {model} | {len(rows)} | {covered} | {shown} |")
    return "\n".join(lines) + "\n"


def _reasons(numbers: pd.DataFrame) -> str:
    lines = ["| table | model | without a cell | reason |", "|---|---|---:|---|"]
    for table, model, rows in _tables(numbers):
        counts = Counter(rows.loc[rows["experiment"] == "", "reason"])
        lines += [
            f"| {table} | {model} | {count} | {reason} |" for reason, count in counts.most_common()
        ]
    return "\n".join(lines) + "\n"
