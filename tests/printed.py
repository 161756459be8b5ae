"""Full-size cells whose scores are those that a table of a paper prints."""

import dataclasses

import numpy as np
import pandas as pd
from cells import cell, changed, rows

from secateur.paths import CONFIGS
from secateur.reporting import reported
from secateur.reporting.comparison import Cell
from secateur.reporting.layouts import PaperLayout, layouts, yaml
from secateur.reporting.verdicts import foreign_documents
from secateur.tasks import TASKS
from secateur.tasks.metrics import PERCEPTION

LAYOUTS = {layout.stem: layout for layout in layouts()}
NUMBERS = reported.load_reported()
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
CATEGORIES = sorted(PERCEPTION | set(COGNITION))
LARGEST = 20_000  # documents of one cell; VQAv2 has ten times as many
FULL = {"llava_1_5_7b": 576, "llava_next_7b": 2880}


def stand_ins(monkeypatch, layout: PaperLayout) -> None:
    """Let every column of a table be a task with cells, also those that have no task here."""
    for task in layout.tasks:
        if task not in TASKS or foreign_documents(task):
            plain = dataclasses.replace(TASKS["gqa"], name=task, title=task, documents=5000)
            monkeypatch.setitem(TASKS, task, plain)


def numbers(layout: PaperLayout) -> pd.DataFrame:
    """The printed numbers of a table."""
    return NUMBERS[
        (NUMBERS["paper"] == layout.paper)
        & (NUMBERS["table"] == layout.table)
        & (NUMBERS["model"] == layout.model)
    ]


def samples(task: str, metric: str, score: float) -> pd.DataFrame:
    """Documents that give a printed score, as near as their number allows."""
    share = score / TASKS[task].metrics[metric].highest
    documents = min(TASKS[task].documents, LARGEST)
    if task != "mme":
        # MMBench scores the rotations of a question together; here each has one
        own = rows(task, share, documents)
        return own.assign(unit=[f"{document}/0" for document in own["doc_id"]])
    images = 85 * len(CATEGORIES)  # as many of each category, two questions each
    own = rows(task, share, 2 * images)
    image = np.arange(2 * images) // 2
    right = image < round(share * images)  # so each category has the same share, but for an image
    return own.assign(
        image_id=[f"{CATEGORIES[one % len(CATEGORIES)]}/{one}" for one in image],
        score=right.astype(float),
    )


def as_printed(
    stem: str,
    rows_of: dict[str, tuple[str, ...]] | None = None,
    tasks: list[str] | None = None,
    **shifts: float,
) -> list[Cell]:
    """Cells of a table with its experiment's inputs, of every column that is a task here.

    Args:
        rows_of: budget -> methods; None: all rows.
        tasks: the columns; None: all that are tasks here.
        shifts: method -> points by which its ratios to the unpruned scores are off.
    """
    layout, found = LAYOUTS[stem], []
    own = numbers(layout)
    columns = [task for task in tasks or layout.tasks if task in TASKS]
    full = FULL[layout.model]
    base = own[own["method"] == "none"].set_index("task")["value"]
    for row in own[own["task"].isin(columns)].to_dict("records"):
        method, budget, task = row["method"], row["budget"], row["task"]
        if method != "none" and rows_of is not None and method not in rows_of.get(budget, ()):
            continue
        value = row["value"] + base[task] * shifts.get(method, 0.0) / 100
        tokens = float(full if budget == "full" else budget)
        data = samples(task, row["metric"], value)
        found.append(cell(layout.model, method, budget, task, data, tokens, full))
    inputs = yaml(CONFIGS / "experiment" / f"{layout.experiment}.yaml")["model"]
    return changed(found, {f"identity.model.{name}": value for name, value in inputs.items()})
