"""lmms-eval's own task objects, unmodified; their data come from the hub or a local folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
import lmms_eval.tasks
from huggingface_hub import get_token
from lmms_eval.api.task import Task, _resolve_hf_datasets_cache_dir
from lmms_eval.tasks import TaskManager
from tenacity import RetryError

from secateur.store import UNWRITABLE
from secateur.tasks import TASKS, find_task

_CACHE = "LMMS_EVAL_DATASETS_CACHE"  # where lmms-eval tells datasets to cache


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Work in `folder`, so that `load_dataset("org/name")` reads its subfolder of that name.

    The cache of `datasets` tells such data sets apart by name alone: it would answer for another
    folder, or for older files. So every state of a folder gets a cache of its own.
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
    _resolve_hf_datasets_cache_dir.cache_clear()  # lmms-eval asks once per process
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
    """lmms-eval's index of the tasks of `TASKS`; an index of all its tasks would take seconds."""
    root = Path(lmms_eval.tasks.__file__).parent
    folders = sorted({str(root / task.folder) for task in TASKS.values()})
    return TaskManager(verbosity="WARNING", include_path=folders, include_defaults=False)


def load_tasks(
    names: list[str], data_root: Path | None = None, revision: str | None = None
) -> dict[str, Task]:
    """Task objects by name, in chat form (messages with images in place).

    Args:
        names: tasks of `TASKS`.
        data_root: folder with the data sets under their hub names (`lmms-lab-encoder/POPE`,
            `Lin-Chen/MMStar`, ...); None means the hub.
        revision: of the data sets on the hub; None: the newest.

    Raises:
        ValueError: a name that is not one of `TASKS`.
        FileNotFoundError: a data set that is neither under `data_root` nor reachable, or the path
            of `data_root` has a character that `datasets` reads as a pattern.
        OSError: the disk where data sets are kept is full or read-only.
    """
    if data_root and (special := sorted(set("[]*?") & set(str(data_root.resolve())))):
        raise FileNotFoundError(
            f"suite.data_root={data_root}: its path has {' '.join(special)}, which the library "
            "datasets reads as a pattern; use a folder with another name"
        )
    datasets_of = {name: find_task(name).dataset for name in names}
    tasks: dict[str, Task] = {}
    with _inside(data_root):
        for name, dataset in datasets_of.items():
            if data_root and not Path(dataset).is_dir():
                raise FileNotFoundError(_not_found(name, dataset, f"the folder {data_root}"))
            try:
                tasks.update(_load(name, None if data_root else revision))
            except (OSError, RetryError) as error:
                cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
                if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
                    raise cause from error
                what = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
                place = "the Hugging Face hub"
                raise FileNotFoundError(f"{_not_found(name, dataset, place)} ({what})") from error
    return tasks


def _load(name: str, revision: str | None) -> dict[str, Task]:
    manager = task_manager()
    options = manager._get_config(name).get("dataset_kwargs") or {}
    if revision:
        options = options | {"revision": revision}
    if options.get("token") is True and get_token() is None:
        # lmms-eval asks for a login, which public data sets do not need
        options = options | {"token": None}
    wanted = {"task": name, "dataset_kwargs": options}
    return manager.load_task_or_group([wanted], task_type="chat")


def _not_found(task: str, dataset: str, place: str) -> str:
    return (
        f"the data set {dataset} of task {task!r} was looked for in {place} and not found. "
        "Point suite.data_root at a folder that holds the data sets under their hub names, "
        "or log in to the hub and go online."
    )
