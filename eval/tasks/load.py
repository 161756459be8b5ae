"""lmms-eval's own task objects; their data come from the hub or a local folder."""

import contextlib
import copy
import hashlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import get_token
from lmms_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lmms_eval.api.task import Task, _resolve_hf_datasets_cache_dir
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from PIL import Image
from tenacity import RetryError

from secateur import hub
from secateur.store import UNWRITABLE
from secateur.tasks import Task as Entry
from secateur.tasks import find_task
from secateur.tasks.by_name import definition_folder

_CACHE = "LMMS_EVAL_DATASETS_CACHE"  # where lmms-eval tells datasets to cache


@contextlib.contextmanager
def _inside(folder: Path | None, dataset: str) -> Iterator[None]:
    """Work in `folder`, so that `load_dataset("org/name")` reads its subfolder of that name.

    The cache of `datasets` tells such data sets apart by name alone: it would answer for another
    folder, or for older files. So every state of a data set's folder gets a cache of its own.
    """
    if folder is None:
        yield
        return
    files = sorted(
        (str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns)
        for f in (folder / dataset).rglob("*")
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


def manager_of(entry: Entry) -> TaskManager:
    """lmms-eval's index of the folder that defines a task; one of all its tasks takes seconds."""
    return _manager(definition_folder() / entry.folder)


@cache
def _manager(folder: Path) -> TaskManager:
    return TaskManager(verbosity="WARNING", include_path=str(folder), include_defaults=False)


def load_tasks(
    names: list[str],
    data_root: Path | None = None,
    revision: str | None = None,
    include_path: Path | None = None,
) -> dict[str, Task]:
    """Task objects by name, in chat form (messages with images in place).

    Args:
        names: of tasks, as `secateur.tasks.find_task` takes them.
        data_root: folder with the data sets under their hub names (`lmms-lab-encoder/POPE`,
            `Lin-Chen/MMStar`, ...); None means the hub.
        revision: of the data sets on the hub; None: the newest.
        include_path: folder with YAML files of other tasks.

    Raises:
        ValueError: no task that can be run here has the name; or a task that the table of tasks
            does not list has an unknown metric, or a first document without images or with videos.
        FileNotFoundError: a data set that is neither under `data_root` nor reachable, or the path
            of `data_root` has a character that `datasets` reads as a pattern.
        OSError: the disk where data sets are kept is full or read-only.
    """
    if data_root and (special := sorted(set("[]*?") & set(str(data_root.resolve())))):
        raise FileNotFoundError(
            f"suite.data_root={data_root}: its path has {' '.join(special)}, which the library "
            "datasets reads as a pattern; use a folder with another name"
        )
    entries = {name: find_task(name, include_path) for name in names}
    tasks: dict[str, Task] = {}
    for name, entry in entries.items():
        dataset = entry.dataset
        if data_root and not (data_root / dataset).is_dir():
            raise FileNotFoundError(_not_found(name, dataset, f"the folder {data_root}"))
        if entry.name == "mmbench_en" and os.environ.get("NUM_IMAGE", "1") != "1":
            raise ValueError(
                "NUM_IMAGE is set, with which lmms-eval shows the image of MMBench twice; unset it"
            )
        try:
            with _inside(data_root, dataset):
                tasks[name] = _load(entry, None if data_root else revision)
        except (OSError, RetryError) as error:
            last = error.last_attempt.exception() if isinstance(error, RetryError) else None
            cause = last or error
            if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
                raise cause from error
            if hub.hub_error(cause):
                why = hub.explain(cause, dataset, "dataset", "suite.data_root")
                raise FileNotFoundError(
                    f"the data set {dataset} of task {name!r}: {why}."
                ) from error
            place = "the Hugging Face hub"
            raise FileNotFoundError(
                f"{_not_found(name, dataset, place)} ({hub.first_line(cause)})"
            ) from error
    return tasks


def _load(entry: Entry, revision: str | None) -> Task:
    manager = manager_of(entry)
    config = manager._get_config(entry.lmms_name)
    options = config.get("dataset_kwargs") or {}
    if revision:
        options = options | {"revision": revision}
    if options.get("token") is True and get_token() is None:
        # lmms-eval asks for a login, which public data sets do not need
        options = options | {"token": None}
    wanted = {"task": entry.lmms_name, "dataset_kwargs": options, **entry.overrides()}
    if not entry.listed:
        _check_metrics(entry.name, config)
    loads_more = getattr(config.get("process_docs"), "__globals__", {})
    if "load_dataset" in loads_more:
        wanted["process_docs"] = config["process_docs"]  # the same function, not a new import of it
    try:
        with _loading_the_same(entry.dataset, revision, loads_more):
            (task,) = manager.load_task_or_group([wanted], task_type="chat").values()
    except Exception as error:
        if entry.listed or isinstance(error, OSError | RetryError):
            raise
        raise ValueError(
            f"lmms-eval cannot load task {entry.name}: {type(error).__name__}: {error}"
        ) from error
    task.set_config("task", entry.name)
    _check_commit(entry.dataset, revision, task)
    if not entry.listed:
        _check_first_document(entry, task)
    return task


@contextlib.contextmanager
def _loading_the_same(dataset: str, revision: str | None, code: dict[str, Any]) -> Iterator[None]:
    """Let a task's own `load_dataset` read the same commit, and ask for no login without one.

    GQA loads its images by itself, from the newest commit and always with a login.

    Args:
        code: globals of the task's module; without `load_dataset` nothing is done.
    """
    if "load_dataset" not in code:
        yield
        return
    load = code["load_dataset"]

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
        if options.get("token") is True and get_token() is None:
            options["token"] = None
        if revision and path == dataset:
            options.setdefault("revision", revision)
        return load(path, *arguments, **options)

    code["load_dataset"] = load_dataset
    try:
        yield
    finally:
        code["load_dataset"] = load


def _check_commit(dataset: str, revision: str | None, task: Task) -> None:
    """Check that documents are of the commit that was asked for.

    Where the hub does not answer, `datasets` takes the newest commit in its cache.

    Raises:
        FileNotFoundError: they are of another.
    """
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        return
    paths = [file["filename"] for file in getattr(task.eval_docs, "cache_files", [])]
    found = {part for path in paths for part in re.findall("/([0-9a-f]{40})/", path)}
    if found - {revision}:
        raise FileNotFoundError(
            f"the data set {dataset}: the hub did not give commit {revision}, and the local cache "
            f"has commit {', '.join(found)}. Set suite.revision to that one, or go online"
        )


def _check_metrics(name: str, config: dict[str, Any]) -> None:
    """Check that lmms-eval knows the metrics and aggregations of a task.

    Raises:
        ValueError: it does not.
    """
    for metric in config.get("metric_list") or []:
        metric_name, aggregation = metric["metric"], metric.get("aggregation")
        computed = config.get("process_results") is not None
        if metric_name not in METRIC_REGISTRY and not (computed and aggregation):
            raise ValueError(
                f"task {name} has an unknown metric {metric_name!r}; lmms-eval knows "
                f"{', '.join(sorted(METRIC_REGISTRY))}. Any other one needs process_results and "
                "an aggregation"
            )
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            raise ValueError(
                f"task {name} has an unknown aggregation {aggregation!r} of {metric_name!r}; "
                f"lmms-eval knows {', '.join(sorted(AGGREGATION_REGISTRY))}, or a !function"
            )


def _check_first_document(entry: Entry, task: Task) -> None:
    """Check that the first document shows images, and that its scoring gives the metric.

    Raises:
        ValueError: it does not.
    """
    first = task.eval_docs[0]
    images, videos, audios = ChatMessages(messages=task.doc_to_messages(first)).extract_media()
    if videos or audios:
        raise ValueError(
            f"task {entry.name} shows {'videos' if videos else 'sounds'}, which are not supported"
        )
    if not images:
        raise ValueError(f"task {entry.name} shows no image in its first document")
    if not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"task {entry.name} shows media that are no images")
    config = vars(task.config)
    if config["process_results"] is None or entry.judge:
        return
    try:
        # not through the task, which tries five times
        given = config["process_results"](copy.deepcopy(first), ["A"])
    except Exception as error:
        raise ValueError(
            f"the scoring of task {entry.name} fails on its first document: "
            f"{type(error).__name__}: {error}"
        ) from error
    listed = [metric["metric"] for metric in config["metric_list"]]
    if not set(given) & set(listed):
        raise ValueError(
            f"task {entry.name} lists the metrics {', '.join(listed)}, and its scoring gives "
            f"{', '.join(map(str, given))}"
        )


def _not_found(task: str, dataset: str, place: str) -> str:
    return (
        f"the data set {dataset} of task {task!r} was looked for in {place} and not found. "
        "Point suite.data_root at a folder that holds the data sets under their hub names, "
        "or log in to the hub and go online."
    )
