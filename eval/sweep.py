"""A sweep: the cells of every Hydra job, run where missing, each on its own: what fails is recorded, the others go on."""

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from secateur import cell, loaded
from secateur.answers import Answers, Unanswered
from secateur.job import Job
from secateur.progress import KEPT, Bar, Interrupt, complain
from secateur.pruners import build
from secateur.store import UNWRITABLE, DamagedRecord

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = "cells.json"  # what a job leaves in its Hydra folder for the summary
Outcome = dict[str, Any]


class _Sweep:
    """What the jobs of one sweep in this process share."""

    started = time.time()
    waiting: ClassVar[
        list[tuple[Job, str, Path]]
    ] = []  # cells others held, with the file of their outcome


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
        outcomes += [_failed(name, error, path) for name in cells[len(outcomes) :]]
    _leave(path, outcomes)


def finish() -> None:
    """Wait for the cells that other processes held when their turn came; run those that were given up."""
    while _Sweep.waiting:
        job, task, path = _Sweep.waiting.pop(0)
        Bar.show(1, f"waiting for another process: {job.pruner.name} {job.budget} {task}")
        try:
            outcome = _run_cell(job, task, wait=True)
        except Exception as error:  # Hydra would only warn of it
            outcome = _failed(f"{task} {job.pruner.name} {job.budget}", error, path)
        outcomes = json.loads(path.read_text())
        outcomes[job.tasks.index(task)] = outcome
        _leave(path, outcomes)


def _failed(name: str, error: Exception, path: Path) -> Outcome:
    """The outcome of a cell that went wrong outside its own run; a traceback goes beside the file of outcomes, `path`."""
    _stop_if_unwritable(error)
    message = str(error)
    if not isinstance(error, ValueError | OSError):  # not one of ours, which name the fix
        place = path.with_name("traceback.txt")
        place.write_text("".join(traceback.format_exception(error)))
        message = f"{type(error).__name__}: {error} (traceback in {place})"
    return {"state": "failed", "cell": name, "message": message}


def _leave(path: Path, outcomes: list[Outcome]) -> None:
    try:
        path.write_text(json.dumps(outcomes, indent=1))
    except OSError as error:
        _stop_if_unwritable(error)
        raise


def _stop_if_unwritable(error: Exception) -> None:
    """End the sweep on a full disk: nothing that follows could be stored."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        Bar.stop()
        complain(
            f"the results folder cannot be written any more ({error}), so the sweep ends here. {KEPT}"
        )
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
    if (
        result["state"] == "partial"
    ):  # was that the last shard? Whoever comes here last sees the answers of all
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
        return {
            "state": "failed",
            "message": f"failed earlier ({cause}); set retry_failed=true to run it again",
        }

    gc.enable()  # see scripts/sweep.py
    model = loaded.model(job.model, job.engine)
    try:
        documents = loaded.task(task, job.suite)
    except (ValueError, OSError) as error:  # of the data, which the other tasks do not need
        _stop_if_unwritable(error)
        return {"state": "failed", "message": str(error)}
    environment = cell.environment(model.device) | cell.sources(job.model, documents)
    try:
        record, samples = _answer(
            job, task, model, documents, store.answers(identity, part), store.all_answers(identity)
        )
        # memory may have made the batches smaller
        store.write(
            identity,
            record | {"environment": environment | {"batch_tokens": model.batch_tokens}},
            samples,
        )
    except Unanswered:
        return {"state": "partial"}
    except Exception as error:
        _stop_if_unwritable(error)
        if isinstance(error, cell.EmptyAnswers):  # nothing worth going on from
            store.forget_answers(identity)
        path = store.write_failure(identity, traceback.format_exc(), environment, job.config)
        return {
            "state": "failed",
            "message": f"{type(error).__name__}: {error} (traceback in {path})",
        }
    return {"state": "done"}


def _answer(
    job: Job, task: str, model: Any, loaded: Any, own: Path, files: list[Path]
) -> "tuple[dict[str, Any], pd.DataFrame]":
    """Run a cell from where its files of answers end, this process's own and all others."""
    from secateur.models import Answer

    documents = min(job.limit or len(loaded.eval_docs), len(loaded.eval_docs))
    with Answers(own, Answer, [file for file in files if file != own]) as answers:
        Bar.advance(len(answers) / documents)

        def answered() -> None:
            Interrupt.check()
            Bar.advance(1 / documents)

        model.use(job.pruner, job.budget, job.model["positions"])
        model.answers, model.shard, model.on_answer = answers, job.shard, answered
        return cell.run(model, loaded, task, job.limit, job.seed)
