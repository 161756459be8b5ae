"""The images of the documents that a sweep answered."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from PIL import Image


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
