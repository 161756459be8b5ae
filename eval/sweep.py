"""A sweep runs the missing cells of every Hydra job; a cell that fails does not stop the others."""

import gc
import json
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from secateur.answers import Answers, Unanswered
from secateur.model_pool import ModelPool, load_task
from secateur.progress import KEPT, Interrupt, ProgressBar, print_error
from secateur.store import UNWRITABLE, DamagedRecord, StoredCell

# The methods in `secateur.pruners` import PyTorch, which takes more than a second. Whoever only
# begins a sweep or starts workers does not need them, so the methods below import what does.
if TYPE_CHECKING:
    import pandas as pd
    from lmms_eval.api.task import Task

    from secateur.job import Job
    from secateur.models import PrunedModel
    from secateur.records import Results

OUTCOMES = "cells.json"  # what a job leaves in its Hydra folder for the summary


# partial: some shards have answered, others have not yet; locked: another process runs it
State = Literal["done", "skipped", "failed", "partial", "locked"]


class Outcome(TypedDict):
    """What came of a cell."""

    state: NotRequired[State]
    cell: NotRequired[str]  # task, method and budget, for messages
    message: NotRequired[str]  # why it failed
    folder: NotRequired[str]  # of its record
    unpruned: NotRequired[str]  # folder of the unpruned model's cell


class Sweep:
    """The jobs of one sweep that run in this process, and what they share.

    Failures from its start on are its own: `retry_failed` does not run them again.
    """

    def __init__(self, jobs: int) -> None:
        for name in ("httpx", "httpx2"):  # one line per request to the hub
            logging.getLogger(name).setLevel(logging.WARNING)
        self.bar = ProgressBar(jobs)
        self.interrupt = Interrupt()
        self.pool = ModelPool()
        self.started = time.time()
        # cells that other processes held, each with the file of its outcome
        self.waiting: list[tuple[Job, str, Path]] = []

    def run_job(self, config: DictConfig, path: Path) -> None:
        """Run the missing cells of one Hydra job and write their outcomes to the file `path`.

        Cells that another process is running are left for `finish`.
        """
        from secateur.job import Job
        from secateur.precheck import check_hub, check_schedule

        self.interrupt.catch()
        outcomes: list[Outcome] = []
        cells = [f"pruner={config.pruner.name} budget={config.budget}"]
        try:
            job = Job.of(config)
            check_schedule(job)
            check_hub(job)
            cells = [f"{task} {job.pruner.name} {job.budget}" for task in job.tasks]
            for task in job.tasks:
                self.bar.show(len(job.tasks), f"{job.pruner.name} {job.budget} {task}")
                outcomes.append(self._run_cell(job, task))
                if outcomes[-1]["state"] == "locked":
                    self.waiting.append((job, task, path))
        except Exception as error:  # the rest of this job cannot run
            outcomes += [self._failed(name, error, path) for name in cells[len(outcomes) :]]
        self._write(path, outcomes)

    def finish(self) -> None:
        """Wait for the cells that other processes held; run those that were given up."""
        while self.waiting:
            job, task, path = self.waiting.pop(0)
            name = f"{job.pruner.name} {job.budget}"
            try:
                holder = job.cell(task).holder()
                self.bar.show(1, f"waiting for {holder}: {name} {task}")
                outcome = self._run_cell(job, task, wait=True)
            except Exception as error:  # Hydra would only warn of it
                outcome = self._failed(f"{task} {name}", error, path)
            outcomes = json.loads(path.read_text())
            outcomes[job.tasks.index(task)] = outcome
            self._write(path, outcomes)

    def _failed(self, name: str, error: Exception, path: Path) -> Outcome:
        """The outcome of a cell that failed before or after its run.

        An error without a message of ours leaves its traceback next to `path`.
        """
        self._stop_if_unwritable(error)
        message = str(error)
        if not isinstance(error, ValueError | OSError):  # those are ours and name the fix
            place = path.with_name("traceback.txt")
            place.write_text("".join(traceback.format_exception(error)))
            message = f"{type(error).__name__}: {error} (traceback in {place})"
        return {"state": "failed", "cell": name, "message": message}

    def _write(self, path: Path, outcomes: list[Outcome]) -> None:
        try:
            path.write_text(json.dumps(outcomes, indent=1))
        except OSError as error:
            self._stop_if_unwritable(error)
            raise

    def _stop_if_unwritable(self, error: Exception) -> None:
        """End the sweep on a full disk: no later result could be stored."""
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            self.bar.stop()
            print_error(
                f"the results folder cannot be written any more ({error}), so the sweep ends here. "
                f"{KEPT}"
            )
            sys.exit(1)

    def _run_cell(self, job: "Job", task: str, wait: bool = False) -> Outcome:
        """Run, skip or fail one cell, or leave it to the process that holds it.

        Raises what concerns the job as a whole.
        """
        from secateur.pruners import build

        self.interrupt.check()
        stored = job.cell(task)
        outcome: Outcome = {
            "cell": f"{task} {job.pruner.name} {stored.identity.budget}",
            "folder": str(stored.folder),
            "unpruned": str(job.cell(task, build("none")).folder),
        }
        number, count = job.shard
        part = f"-{number}of{count}" if count > 1 else ""
        with stored.claim(part, wait) as mine:
            if not mine:
                holder = stored.holder(part)
                return outcome | {"state": "locked", "message": f"{holder} is running it"}
            result = self._run_or_skip(job, task, stored, part)
        # The last shard to finish scores the cell: after its own answers each shard looks, one
        # at a time, whether all answers are there.
        if result["state"] == "partial":
            with stored.claim(wait=True):
                result = self._run_or_skip(job, task, stored, part)
        return outcome | result

    def _run_or_skip(self, job: "Job", task: str, stored: StoredCell, part: str) -> Outcome:
        """Run, skip or fail a cell that this process holds."""
        from secateur import cell

        try:
            if stored.exists():
                stored.read()
                stored.forget_answers()  # left by a kill right after the record was written
                self.bar.advance(1)
                return {"state": "skipped"}
            earlier = stored.failure(since=self.started if job.retry_failed else 0)
        except DamagedRecord as error:
            return {"state": "failed", "message": str(error)}
        if earlier:
            cause = earlier.strip().splitlines()[-1]
            return {
                "state": "failed",
                "message": f"failed earlier ({cause}); set retry_failed=true to run it again",
            }

        gc.enable()  # see scripts/sweep.py
        try:
            documents = load_task(task, job.suite)
        except (ValueError, OSError) as error:  # of the data, which the other tasks do not need
            self._stop_if_unwritable(error)
            return {"state": "failed", "message": str(error)}
        model = self.pool.get(job.model, job.engine)
        environment = cell.environment(model.device)
        environment = environment.model_copy(update=cell.sources(job.model, documents))
        try:
            with tempfile.TemporaryDirectory() as files:
                results, samples = self._answer(
                    job, task, model, documents, stored, part, Path(files)
                )
                # read after the run: a lack of memory makes the batches smaller
                shared = sum(answer.shared for answer in model.answers.values())
                ran = {"batch_tokens": model.batch_tokens, "shared_prefixes": shared}
                stored.write(results, environment.model_copy(update=ran), samples, Path(files))
        except Unanswered:
            return {"state": "partial"}
        except Exception as error:
            self._stop_if_unwritable(error)
            if isinstance(error, cell.EmptyAnswers):  # these answers are worth nothing
                stored.forget_answers()
            config = job.model_dump(mode="json")
            path = stored.write_failure(traceback.format_exc(), environment, config)
            return {
                "state": "failed",
                "message": f"{type(error).__name__}: {error} (traceback in {path})",
            }
        return {"state": "done"}

    def _answer(
        self,
        job: "Job",
        task: str,
        model: "PrunedModel",
        loaded: "Task",
        stored: StoredCell,
        part: str,
        files: Path,
    ) -> "tuple[Results, pd.DataFrame]":
        """Run a cell. Answers in this process's file and in those of others are not asked again."""
        from secateur import cell
        from secateur.models import Answer

        documents = min(job.limit or len(loaded.eval_docs), len(loaded.eval_docs))
        own = stored.answers_file(part)
        others = [file for file in stored.answers_files() if file != own]
        with Answers(own, Answer, stored.identity.digest, others) as answers:
            self.bar.advance(len(answers) / documents)

            def on_answer() -> None:
                self.interrupt.check()
                self.bar.advance(1 / documents)

            model.use(job.pruner, job.budget, job.model.positions)
            model.answers, model.shard, model.on_answer = answers, job.shard, on_answer
            return cell.run(model, loaded, job.suite.find(task), job.limit, job.task_seed, files)


# The only global of a sweep: Hydra calls the summary and the job function by name and hands
# nothing from one to the other. The summary cannot hold it, since Hydra pickles its callbacks.
_current: Sweep | None = None


def begin(jobs: int) -> Sweep:
    """A new sweep of so many jobs in this process, the current one from now on."""
    global _current
    _current = Sweep(jobs)
    return _current


def current() -> Sweep:
    """The current sweep of this process; a new one of a single job if there is none."""
    return _current or begin(1)


def run_job(config: DictConfig) -> None:
    """Run a job of the current sweep; its outcomes go to Hydra's output folder."""
    current().run_job(config, Path(HydraConfig.get().runtime.output_dir) / OUTCOMES)
