"""lmms-eval's own task objects: definitions, prompts and scoring unmodified, data from the hub or from a local folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
import lmms_eval.tasks
from lmms_eval.api.task import Task, _resolve_hf_datasets_cache_dir
from lmms_eval.tasks import TaskManager
from tenacity import RetryError

from secateur.store import UNWRITABLE

# task -> data set, as lmms-eval 0.7.3 names it on the hub
TASKS = {
    "pope": "lmms-lab-encoder/POPE",
    "scienceqa_img": "lmms-lab-encoder/ScienceQA",
    "gqa": "lmms-lab-encoder/GQA",
    "mme": "lmms-lab-encoder/MME",
    "mmmu_val": "lmms-lab-encoder/MMMU",
    "mmstar": "Lin-Chen/MMStar",
}

_CACHE = "LMMS_EVAL_DATASETS_CACHE"  # where lmms-eval tells datasets to cache


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Work in `folder`, if any: `load_dataset("org/name")` prefers a local folder of that name to the hub.

    The cache of `datasets` knows such a folder by its name alone and would answer for another folder, or for what the files
    were before: every state of a folder gets a cache of its own.
    """
    if folder is None:
        yield
        return
    files = sorted(
        (str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns)
        for f in folder.rglob("*")
        if f.is_file()
    )
    state = hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:16]
    before = Path.cwd(), datasets.config.HF_DATASETS_CACHE, os.environ.get(_CACHE)
    own = Path(before[1]) / "secateur" / state
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE, os.environ[_CACHE] = own, str(own)
    _resolve_hf_datasets_cache_dir.cache_clear()  # lmms-eval asks once a process
    try:
        yield
    finally:
        os.chdir(before[0])
        datasets.config.HF_DATASETS_CACHE = before[1]
        os.environ.pop(_CACHE)
        if before[2] is not None:
            os.environ[_CACHE] = before[2]
        _resolve_hf_datasets_cache_dir.cache_clear()


@cache
def task_manager() -> TaskManager:
    """lmms-eval's index of the folders that define `TASKS`; an index of all its tasks takes seconds."""
    folders = sorted({str(_definition(name).parent) for name in TASKS})
    return TaskManager(verbosity="WARNING", include_path=folders, include_defaults=False)


def _definition(task: str) -> Path:
    """The YAML file in lmms-eval that defines a task."""
    (path,) = Path(lmms_eval.tasks.__file__).parent.glob(f"*/{task}.yaml")
    return path


def load_tasks(names: list[str], data_root: Path | None = None) -> dict[str, Task]:
    """Task objects by name, in chat form (messages with images in place).

    `data_root` holds the data sets under their hub names (`lmms-lab-encoder/POPE`, `Lin-Chen/MMStar`, ...); None means the hub.

    Raises:
        ValueError: a name that is not one of `TASKS`.
        FileNotFoundError: a data set that is neither under `data_root` nor reachable.
        OSError: the disk where data sets are kept is full or read-only.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(
            f"unknown task {', '.join(unknown)}; known tasks: {', '.join(TASKS)}. Set tasks=[...] to some of these."
        )
    tasks: dict[str, Task] = {}
    with _inside(data_root):
        for name in names:
            if data_root and not Path(TASKS[name]).is_dir():
                raise FileNotFoundError(_not_found(name, f"the folder {data_root}"))
            try:
                tasks.update(task_manager().load_task_or_group([name], task_type="chat"))
            except (OSError, RetryError) as error:
                cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
                if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
                    raise cause from error
                what = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
                raise FileNotFoundError(
                    f"{_not_found(name, 'the Hugging Face hub')} ({what})"
                ) from error
    return tasks


def _not_found(task: str, where: str) -> str:
    return (
        f"the data set {TASKS[task]} of task {task!r} was looked for in {where} and not found. Point suite.data_root at a folder "
        "that holds the data sets under their hub names, or log in to the hub and go online."
    )
