"""lmms-eval's own task objects: definitions, prompts and scoring unmodified, data from the hub or from a local folder."""

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lmms_eval.api.task import Task
from lmms_eval.tasks import TaskManager

TASKS = ("pope", "scienceqa_img", "gqa", "mme", "mmmu_val", "mmstar")


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Work in `folder`: `load_dataset("org/name")` prefers a local folder of that name to the hub."""
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


@cache
def task_manager() -> TaskManager:
    """lmms-eval's index of task definitions; making it takes seconds."""
    return TaskManager(verbosity="WARNING")


def load_tasks(names: list[str], data_root: Path | None = None) -> dict[str, Task]:
    """Task objects by name, in chat form (messages with images in place).

    `data_root` holds the data sets under their hub names (`lmms-lab-encoder/POPE`, `Lin-Chen/MMStar`, ...); None means the hub.

    Raises:
        ValueError: a name that is not one of `TASKS`.
        FileNotFoundError: a data set that is neither under `data_root` nor reachable.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; known tasks: {', '.join(TASKS)}. Set tasks=[...] to some of these.")
    tasks: dict[str, Task] = {}
    with _inside(data_root):
        for name in names:
            try:
                tasks.update(task_manager().load_task_or_group([name], task_type="chat"))
            except (OSError, ConnectionError) as error:
                where = f"the folder {data_root}" if data_root else "the Hugging Face hub"
                raise FileNotFoundError(
                    f"the data set of task {name!r} was looked for in {where} and not found ({type(error).__name__}: {error}). "
                    "Point suite.data_root at a folder that holds the data sets under their hub names, or log in and go online."
                ) from error
    return tasks
