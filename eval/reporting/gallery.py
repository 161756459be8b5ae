"""Documents of a sweep: image, prompt, answers, and which tokens of the image the methods keep."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image

from secateur.families import family_of
from secateur.reporting.comparison import Cell
from secateur.reporting.seeds import row_names
from secateur.settings import ModelIdentity
from secateur.store import Store

PER_SIDE = 2  # documents shown per task and method that is right
_COLUMNS = ["doc_id", "prompt", "target", "answer", "score", "visual_tokens", "kept_indices"]


class Documents:
    """The images of a suite's tasks by document, checked against the prompt in a record.

    Args:
        data_root: folder with the data sets; None means the hub. The data sets of the shapes suite
            are generated there if they are missing.

    Raises:
        FileNotFoundError: a data set is not there.
    """

    def __init__(self, suite: str, tasks: Sequence[str], data_root: Path | None) -> None:
        from secateur.tasks.load import load_tasks  # lmms-eval takes seconds to import

        if suite == "shapes" and data_root:
            from secateur.shapes.datasets import build

            build(data_root)
        self._tasks = load_tasks(list(tasks), data_root)

    def images(self, task: str, row: pd.Series) -> list[Image.Image]:
        """The images of a row's document.

        Raises:
            ValueError: the data set has no such document, or another question in its place.
        """
        documents = self._tasks[task].eval_docs
        if not 0 <= row["doc_id"] < len(documents):
            raise ValueError(
                f"{task}: the data set here has no document {row['doc_id']}; "
                "it is not the one the cells ran on"
            )
        messages = self._tasks[task].doc_to_messages(documents[row["doc_id"]])
        parts = [part for message in messages for part in message["content"]]
        if not all(
            part["text"].strip() in row["prompt"] for part in parts if part["type"] == "text"
        ):
            raise ValueError(
                f"{task}: document {row['doc_id']} here asks another question than the record; "
                "it is not the same data set"
            )
        return [part["url"].convert("RGB") for part in parts if part["type"] == "image"]


class Rivals(NamedTuple):
    """Two methods at one budget."""

    budget: str
    methods: tuple[str, str]


class Disagreement(NamedTuple):
    """A document that one of two methods answers right and the other wrong."""

    task: str
    row: pd.Series  # of the method that is right
    answers: dict[str, str]  # by method
    right: str
    kept: dict[str, tuple[int, ...]]  # by method


def rivals(comparison: pd.DataFrame, names: Sequence[str] = ()) -> Rivals | None:
    """Two methods to compare.

    Returns:
        The methods of `names`; without names, the two best at the smallest budget, in the last task
        that two methods ran at it. None: no two methods ran one task at one budget.

    Raises:
        ValueError: a name is not in the comparison, or the two share no budget of a task.
    """
    rows = comparison[comparison["method"] != "none"]
    unknown = sorted(set(names) - set(rows["method"]))
    if unknown or (names and len(set(names)) != 2):
        raise ValueError(
            f"rivals {', '.join(names)}: choose two of {', '.join(sorted(set(rows['method'])))}"
        )
    if names:
        rows = rows[rows["method"].isin(list(names))]
    shared = rows.groupby(["task", "budget"]).filter(lambda own: own["method"].nunique() >= 2)
    if shared.empty:
        if names:
            raise ValueError(f"rivals {', '.join(names)}: they share no budget of a task")
        return None
    budget = shared.groupby("budget")["tokens"].mean().idxmin()
    shared = shared[shared["budget"] == budget]
    last = shared[shared["task"] == shared["task"].iloc[-1]]
    best = last.sort_values("value", ascending=False, kind="stable")["method"].head(2)
    return Rivals(str(budget), (best.iloc[0], best.iloc[1]))


def disagreements(
    cells: Sequence[Cell], pair: Rivals, results: Path
) -> tuple[dict[str, dict[str, int]], list[Disagreement]]:
    """The documents that exactly one of two methods answers right.

    Returns:
        Their number by task and by the method that is right; the first `PER_SIDE` of each.
    """
    counts: dict[str, dict[str, int]] = {}
    names = row_names(cell.record.identity for cell in cells)
    shown = []
    for task in dict.fromkeys(cell.task for cell in cells):
        at_budget = [cell for cell in cells if (cell.task, cell.budget) == (task, pair.budget)]
        # of several seeds of a method, the first one
        own = {
            names[cell.method]: cell
            for cell in sorted(at_budget, key=lambda cell: -(cell.seed or 0))
            if names[cell.method] in pair.methods
        }
        if len(own) < 2:
            continue
        rows = {
            method: samples(own[method], results).set_index("doc_id", drop=False)
            for method in pair.methods
        }
        both = rows[pair.methods[0]].index.intersection(rows[pair.methods[1]].index)
        right = {method: rows[method].loc[both, "score"] == 1 for method in pair.methods}
        counts[task] = {}
        for method, other in (pair.methods, pair.methods[::-1]):
            chosen = both[right[method] & ~right[other]]
            counts[task][method] = len(chosen)
            for doc in chosen[:PER_SIDE]:
                pictured = {name: rows[name].loc[doc] for name in pair.methods}
                shown.append(
                    Disagreement(
                        task=task,
                        row=pictured[method],
                        answers={name: row["answer"] for name, row in pictured.items()},
                        right=method,
                        kept={name: patches(row) for name, row in pictured.items()},
                    )
                )
    return counts, shown


def samples(cell: Cell, results: Path, docs: Sequence[int] | None = None) -> pd.DataFrame:
    """The stored rows of a cell, with the kept tokens; of all documents or of `docs`."""
    path = Store(results).cell(cell.record.identity).folder / "samples.parquet"
    return pd.read_parquet(
        path, columns=_COLUMNS, filters=None if docs is None else [("doc_id", "in", list(docs))]
    )


def patches(row: pd.Series) -> tuple[int, ...]:
    """The kept patches of a document's first image.

    Tokens that are no patch (CLS, merged ones) have negative indices and are left out.
    """
    return (
        tuple(int(index) for index in row["kept_indices"][0] if index >= 0)
        if len(row["kept_indices"])
        else ()
    )


def as_seen(
    model: ModelIdentity, images: Sequence[Image.Image], row: pd.Series
) -> tuple[Image.Image, tuple[int, int]] | None:
    """The image as the model's encoder sees it, and the grid of its tokens.

    None: the tokens form no single grid. So it is with several images, with LLaVA-NeXT's crops, and
    with Qwen unless `image_side` is set.
    """
    side = math.isqrt(row["visual_tokens"])
    if len(images) != 1 or side**2 != row["visual_tokens"]:
        return None
    seen = family_of(model.family).as_seen(model, images[0])
    return None if seen is None else (seen, (side, side))
