"""Which tokens of a document's images methods keep, for every family and layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image

from secateur.families import family_of
from secateur.families.base import View
from secateur.pruners import REGISTRY, InLLMPruner
from secateur.reporting.comparison import Cell
from secateur.reporting.images import Documents
from secateur.reporting.seeds import row_names
from secateur.settings import ModelIdentity
from secateur.store import Store

_COLUMNS = [
    *("doc_id", "prompt", "target", "answer", "score", "visual_tokens"),
    *("kept_indices", "crops"),
]


class NoView(ValueError):
    """It is not known which part of an image a token of the record covers."""


class Kept(NamedTuple):
    """A document and what methods keep of its images.

    Attributes:
        task, document: which one it is.
        row: its row of one of the cells.
        views: what the image encoder sees, over all images.
        masks: budget -> label -> for every view which of its tokens are kept, [rows, columns].
    """

    task: str
    document: int
    row: pd.Series
    views: list[View]
    masks: dict[str, dict[str, list[np.ndarray]]]


def samples(cell: Cell, results: Path, docs: Sequence[int] | None = None) -> pd.DataFrame:
    """The stored rows of a cell, with the kept tokens; of all documents or of `docs`.

    Raises:
        ValueError: an old record, which does not tell the crops.
    """
    path = Store(results).cell(cell.record.identity).folder / "samples.parquet"
    if "crops" not in pq.read_schema(path).names:
        raise ValueError(f"the samples of {cell.key} do not tell the crops; run the cell again")
    return pd.read_parquet(
        path, columns=_COLUMNS, filters=None if docs is None else [("doc_id", "in", list(docs))]
    )


def views(model: ModelIdentity, images: Sequence[Image.Image], row: pd.Series) -> list[list[View]]:
    """What the encoder sees of every image of a document.

    Raises:
        NoView: the images do not give the crops in the row, or it counts other images.
    """
    family, crops = family_of(model.family), [tuple(map(int, grid)) for grid in row["crops"]]
    if len(images) != len(row["kept_indices"]):
        raise NoView(
            f"document {row['doc_id']}: {len(images)} images here, {len(row['kept_indices'])} in "
            "the record"
        )
    found, used = [], 0
    for image in images:
        rows, columns = crops[min(used, len(crops) - 1)]
        own = family.views(model, image, (rows, columns))
        used += 1 + int(max(view.tokens.max() for view in own)) // (rows * columns)
        found.append(own)
    if used != len(crops):
        raise NoView(
            f"document {row['doc_id']}: its images give {used} crops, the record has {len(crops)}"
        )
    return found


def masks(
    model: ModelIdentity, method: str, seen: Sequence[Sequence[View]], row: pd.Series
) -> list[np.ndarray]:
    """Which tokens of every view a method keeps, [rows, columns] of booleans each.

    Tokens that cover no part of an image (CLS, merged ones, newlines) are left out.
    """
    family, found = family_of(model.family), []
    inside = issubclass(REGISTRY[method], InLLMPruner)
    for own, indices in zip(seen, row["kept_indices"], strict=True):
        numbers = np.asarray([index for index in indices if index >= 0], dtype=int)
        if inside:  # they count the places in the prompt
            numbers = np.asarray(family.prompt_order(model, own))[numbers]
        found += [np.isin(view.tokens, numbers[numbers >= 0]) for view in own]
    return found


def kept_documents(
    cells: Sequence[Cell],
    results: Path,
    source: Documents,
    documents: Sequence[tuple[str, int]] = (),
) -> list[Kept]:
    """What all methods keep of some documents, at every budget.

    Args:
        cells: of one setting.
        documents: (task, document) pairs; none: the first document of every task.

    Raises:
        ValueError: a cell did not answer a document, or no method was run on a task; as `views`.
    """
    names = row_names(cell.record.identity for cell in cells)
    pruned = [cell for cell in cells if cell.name != "none"]
    # of several seeds of a method, the first one
    pruned = sorted(pruned, key=lambda cell: (-cell.tokens, names[cell.method], cell.seed or 0))
    firsts = [
        (task, min(int(cell.rows["doc_id"].min()) for cell in pruned if cell.task == task))
        for task in dict.fromkeys(cell.task for cell in pruned)
    ]
    found = []
    for task, doc in documents or firsts:
        own = [cell for cell in pruned if cell.task == task]
        if not own:
            raise ValueError(
                f"no pruned cell of task {task}: the kept tokens of document {doc} cannot be shown"
            )
        shown: Kept | None = None
        for cell in own:
            label = names[cell.method]
            if shown and label in shown.masks.get(cell.budget, {}):
                continue
            rows = samples(cell, results, [doc])
            if rows.empty:
                raise ValueError(f"{cell.key} did not answer document {doc} of {task}")
            row, model = rows.iloc[0], cell.record.identity.model
            if shown is None:
                seen = views(model, source.images(task, row), row)
                shown = Kept(task, doc, row, [view for one in seen for view in one], {})
            shown.masks.setdefault(cell.budget, {})[label] = masks(model, cell.name, seen, row)
        assert shown is not None
        found.append(shown)
    return found
