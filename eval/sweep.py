"""A sweep: the cells of every Hydra job, run where missing, each on its own: what fails is recorded, the others go on."""

import errno
import json
import re
import sys
import time
import traceback
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from eval import cell
from eval.answers import Answers, Unanswered
from eval.budget import Budget
from eval.checkpoints import fingerprint
from eval.progress import KEPT, Bar, Interrupt, complain
from eval.store import DamagedRecord, Store
from pruners import InLLMPruner, Pruner, build

OUTCOMES = "cells.json"  # what a job leaves in its Hydra folder for the summary
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NOT_OF_THE_MODEL = ("budgets", "pruner_fields")  # what its config holds for grids and pruners
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The checked settings of one Hydra job: one model, one method, one budget, several tasks."""

    model: dict[str, Any]
    pruner: Pruner | InLLMPruner
    budget: Budget
    suite: dict[str, Any]
    tasks: list[str]
    limit: int | None
    seed: int
    shard: tuple[int, int]  # number and count
    engine: dict[str, Any]  # how the model runs, which changes no answer: batch_tokens, cache, its limits and folder
    store: Store
    retry_failed: bool
    config: dict[str, Any]  # what all this came from

    @classmethod
    def of(cls, config: DictConfig) -> "Job":
        """Check a composed config.

        Raises:
            ValueError, OSError: a field that makes no sense, a folder that cannot be written; the message names the fix.
        """
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        tasks = [settings["tasks"]] if isinstance(settings["tasks"], str) else settings["tasks"]
        known = settings["suite"]["tasks"]
        unknown = sorted(set(tasks) - set(known))
        if unknown or not tasks:
            what = ", ".join(unknown) or "no task"
            raise ValueError(f"tasks={tasks}: {what} is not in suite {settings['suite']['name']!r}; it has {', '.join(known)}")
        limit = settings["suite"]["limit"] if settings["limit"] == "suite" else settings["limit"]
        for task in tasks:
            cell.check_limit(task, limit)
        return cls(
            model=settings["model"],
            pruner=build(**settings["pruner"]),
            budget=Budget.parse(settings["budget"]),
            suite=settings["suite"],
            tasks=tasks,
            limit=limit,
            seed=settings["seed"],
            shard=_shard(settings["shard"]),
            engine=_engine(settings),
            store=Store(Path(settings["results"])),
            retry_failed=settings["retry_failed"],
            config=settings,
        )

    def identity(self, task: str, pruner: Pruner | InLLMPruner | None = None) -> dict[str, Any]:
        """The identity of this job's cell of a task, or of the same cell under another method."""
        model = {key: value for key, value in self.model.items() if key not in ("device", *_NOT_OF_THE_MODEL)}
        suite = {key: self.suite[key] for key in ("name", "revision")}
        weights = fingerprint(self.model["pretrained"], self.model["revision"])
        return cell.identity(model, weights, pruner or self.pruner, self.budget, suite, task, self.limit, self.seed)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    number, count = map(int, match.groups()) if match else (0, 0)
    if number >= count:
        raise ValueError(f"shard={text}: write number/count, with numbers from 0: 0/4, 1/4, 2/4, 3/4")
    return number, count


def _engine(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["cache"] not in ("off", "memory", "disk"):
        raise ValueError(f"cache={settings['cache']!r} is not one of off, memory, disk")
    for name in ("batch_tokens", "cache_gb", "cache_disk_gb"):
        if settings[name] < 0:
            raise ValueError(f"{name}={settings[name]}: at least 0")
    return {
        "batch_tokens": 0 if settings["strict"] else settings["batch_tokens"],
        "limit_bytes": 0 if settings["cache"] == "off" else int(settings["cache_gb"] * 2**30),
        "disk_limit_bytes": int(settings["cache_disk_gb"] * 2**30),
        "folder": str(Path(settings["results"]) / "cache") if settings["cache"] == "disk" else None,
    }


class _Sweep:
    """What the jobs of one sweep in this process share."""

    started = time.time()
    waiting: ClassVar[list[tuple[Job, str, Path]]] = []  # cells others held, with the file of their outcome


def begin() -> None:
    """A new sweep: failures from here on are its own, and are not tried again by `retry_failed`."""
    _Sweep.started = time.time()
    _Sweep.waiting.clear()


def run_job(config: DictConfig) -> None:
    """Run the missing cells of one Hydra job and leave their outcomes in its output folder.

    Cells that another process is running are left for `finish`.
    """
    path = Path(HydraConfig.get().runtime.output_dir) / OUTCOMES
    outcomes: list[Outcome] = []
    cells = [f"pruner={config.pruner.name} budget={config.budget}"]
    try:
        job = Job.of(config)
        cells = [f"{task} {job.pruner.name} {job.budget}" for task in job.tasks]
        for task in job.tasks:
            Bar.show(len(job.tasks), f"{job.pruner.name} {job.budget} {task}")
            outcomes.append(_run_cell(job, task))
            if outcomes[-1]["state"] == "locked":
                _Sweep.waiting.append((job, task, path))
    except Exception as error:  # nothing more of this job can run
        _stop_if_unwritable(error)
        message = str(error)
        if not isinstance(error, ValueError | OSError):  # not one of ours, which name the fix
            place = path.with_name("traceback.txt")
            place.write_text(traceback.format_exc())
            message = f"{type(error).__name__}: {error} (traceback in {place})"
        outcomes += [{"state": "failed", "cell": name, "message": message} for name in cells[len(outcomes) :]]
    _leave(path, outcomes)


def finish() -> None:
    """Wait for the cells that other processes held when their turn came; run those that were given up."""
    while _Sweep.waiting:
        job, task, path = _Sweep.waiting.pop(0)
        Bar.show(1, f"waiting for another process: {job.pruner.name} {job.budget} {task}")
        try:
            outcome = _run_cell(job, task, wait=True)
        except (ValueError, OSError) as error:
            _stop_if_unwritable(error)
            outcome = {"state": "failed", "cell": f"{task} {job.pruner.name} {job.budget}", "message": str(error)}
        outcomes = json.loads(path.read_text())
        outcomes[job.tasks.index(task)] = outcome
        _leave(path, outcomes)


def _leave(path: Path, outcomes: list[Outcome]) -> None:
    try:
        path.write_text(json.dumps(outcomes, indent=1))
    except OSError as error:
        _stop_if_unwritable(error)
        raise


def _stop_if_unwritable(error: Exception) -> None:
    """End the sweep on a full disk: nothing that follows could be stored."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        Bar.stop()
        complain(f"the results folder cannot be written any more ({error}), so the sweep ends here. {KEPT}")
        sys.exit(1)


def _run_cell(job: Job, task: str, wait: bool = False) -> Outcome:
    """Run, skip or fail one cell, or leave it to the process that holds it. Raises what concerns the job as a whole."""
    Interrupt.check()
    identity = job.identity(task)
    outcome = {
        "cell": f"{task} {job.pruner.name} {identity['budget']}",
        "folder": str(job.store.folder(identity)),
        "unpruned": str(job.store.folder(job.identity(task, build("none")))),
    }
    number, count = job.shard
    part = f"-{number}of{count}" if count > 1 else ""
    with job.store.claim(identity, part, wait) as mine:
        if not mine:
            return outcome | {"state": "locked", "message": "another process is running it"}
        result = _settle(job, task, identity, part)
    if result["state"] == "partial":  # was that the last shard? Whoever comes here last sees the answers of all
        with job.store.claim(identity, wait=True):
            result = _settle(job, task, identity, part)
    return outcome | result


def _settle(job: Job, task: str, identity: dict[str, Any], part: str) -> Outcome:
    """Run, skip or fail a cell that is held."""
    store = job.store
    try:
        if store.has(identity):
            store.load(identity)
            store.forget_answers(identity)  # what a kill between sealing and tidying left
            Bar.advance(1)
            return {"state": "skipped"}
        earlier = store.failure(identity, since=_Sweep.started if job.retry_failed else 0)
    except DamagedRecord as error:
        return {"state": "failed", "message": str(error)}
    if earlier:
        cause = earlier.strip().splitlines()[-1]
        return {"state": "failed", "message": f"failed earlier ({cause}); set retry_failed=true to run it again"}

    model = _model(json.dumps(job.model), json.dumps(job.engine))
    try:
        loaded = _task(task, json.dumps(job.suite))
    except (ValueError, OSError) as error:  # of the data, which the other tasks do not need
        _stop_if_unwritable(error)
        return {"state": "failed", "message": str(error)}
    environment = cell.environment(str(model.device)) | {"batch_tokens": model.batch_tokens}
    try:
        record, samples = _answer(job, task, model, loaded, store.answers(identity, part), store.all_answers(identity))
        store.write(identity, record | {"environment": environment}, samples)
    except Unanswered:
        return {"state": "partial"}
    except Exception as error:
        _stop_if_unwritable(error)
        if isinstance(error, cell.EmptyAnswers):  # nothing worth going on from
            store.forget_answers(identity)
        path = store.write_failure(identity, traceback.format_exc(), environment, job.config)
        return {"state": "failed", "message": f"{type(error).__name__}: {error} (traceback in {path})"}
    return {"state": "done"}


def _answer(job: Job, task: str, model: Any, loaded: Any, own: Path, others: list[Path]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Run a cell from where its files of answers end."""
    from eval.models import Answer

    documents = min(job.limit or len(loaded.eval_docs), len(loaded.eval_docs))
    with Answers(own, Answer, others) as answers:
        Bar.advance(len(answers) / documents)

        def answered() -> None:
            Interrupt.check()
            Bar.advance(1 / documents)

        model.use(job.pruner, job.budget, job.model["positions"])
        model.answers, model.shard, model.on_answer = answers, job.shard, answered
        return cell.run(model, loaded, task, job.limit, job.seed)


@lru_cache(maxsize=1)
def _model(settings: str, engine: str) -> Any:
    """The model of a job; the last one stays loaded, with its cache, for the jobs that follow."""
    from eval.cache import EncodeCache
    from eval.models import PrunedModel

    options = {key: value for key, value in json.loads(settings).items() if key not in ("positions", *_NOT_OF_THE_MODEL)}
    limits = json.loads(engine)
    batch_tokens, folder = limits.pop("batch_tokens"), limits.pop("folder")
    return PrunedModel(**options, batch_tokens=batch_tokens, cache=EncodeCache(folder=folder and Path(folder), **limits))


@lru_cache
def _task(name: str, suite: str) -> Any:
    """A task of a suite, with its data in place."""
    from eval.tasks import load_tasks

    settings = json.loads(suite)
    root = Path(settings["data_root"]) if settings["data_root"] else None
    if settings["name"] == "shapes":
        from eval.shapes.datasets import build as build_shapes

        assert root is not None
        build_shapes(root)
    return load_tasks([name], root)[name]
