"""A sweep: the cells of every Hydra job, run where missing, counted, and summed up in tables."""

import json
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval import cell, tables
from eval.budget import Budget
from eval.checkpoints import fingerprint
from eval.store import DamagedRecord, Store
from pruners import InLLMPruner, Pruner, build

OUTCOMES = "cells.json"  # what a job leaves in its Hydra folder for the summary
console = Console(file=sys.stderr)  # the real one, also while a task's own output is caught


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
    store: Store
    retry_failed: bool

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
            store=Store(Path(settings["results"])),
            retry_failed=settings["retry_failed"],
        )

    def identity(self, task: str, pruner: Pruner | InLLMPruner | None = None) -> dict[str, Any]:
        """The identity of this job's cell of a task, or of the same cell under another method."""
        model = {key: value for key, value in self.model.items() if key not in ("budgets", "device", "relevance_space")}
        suite = {key: self.suite[key] for key in ("name", "revision")}
        weights = fingerprint(self.model["pretrained"], self.model["revision"])
        return cell.identity(model, weights, pruner or self.pruner, self.budget, suite, task, self.limit, self.seed)


class Interrupt:
    """Ctrl-C that cannot get lost: some libraries swallow the exception in the middle of a load, so it is asked for again."""

    _requested = False

    @classmethod
    def catch(cls) -> None:
        signal.signal(signal.SIGINT, cls._handle)

    @classmethod
    def _handle(cls, _number: int, _frame: Any) -> None:
        cls._requested = True
        raise KeyboardInterrupt

    @classmethod
    def check(cls) -> None:
        if cls._requested:
            raise KeyboardInterrupt


class Bar:
    """Progress over the cells of the whole sweep, shared by the jobs of this process."""

    jobs = 1
    _progress: Progress | None = None
    _task: TaskID

    @classmethod
    def show(cls, cells_a_job: int, text: str) -> None:
        if cls._progress is None:
            count = TextColumn("{task.completed:.1f} of {task.total:.0f} cells")
            columns = [
                BarColumn(),
                count,
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            ]
            cls._progress = Progress(*columns, console=console)
            cls._progress.start()
            cls._task = cls._progress.add_task(text, total=cls.jobs * cells_a_job)
        cls._progress.update(cls._task, description=text)

    @classmethod
    def advance(cls, cells: float) -> None:
        if cls._progress:
            cls._progress.advance(cls._task, cells)

    @classmethod
    def stop(cls) -> None:
        if cls._progress:
            cls._progress.stop()
            cls._progress = None


def run_job(config: DictConfig) -> None:
    """Run the missing cells of one Hydra job and leave their outcomes in its output folder."""
    outcomes: list[dict[str, Any]] = []
    try:
        job = Job.of(config)
        for task in job.tasks:
            Bar.show(len(job.tasks), f"{job.pruner.name} {job.budget} {task}")
            outcomes.append(_run_cell(job, task))
    except (ValueError, OSError) as error:  # nothing in this job can run
        what = f"pruner={config.pruner.name} budget={config.budget}"
        outcomes.append({"state": "failed", "cell": what, "message": str(error)})
    (Path(HydraConfig.get().runtime.output_dir) / OUTCOMES).write_text(json.dumps(outcomes, indent=1))


def _run_cell(job: Job, task: str) -> dict[str, Any]:
    """Run, skip or fail one cell. Raises only what is wrong with the model or the data as a whole."""
    Interrupt.check()
    identity = job.identity(task)
    outcome = {
        "cell": f"{task} {job.pruner.name} {identity['budget']}",
        "folder": str(job.store.folder(identity)),
        "unpruned": str(job.store.folder(job.identity(task, build("none")))),
    }
    try:
        if job.store.has(identity):
            job.store.load(identity)
            Bar.advance(1)
            return outcome | {"state": "skipped"}
    except DamagedRecord as error:
        return outcome | {"state": "failed", "message": str(error)}
    earlier = job.store.failure(identity)
    if earlier and not job.retry_failed:
        cause = earlier.strip().splitlines()[-1]
        return outcome | {
            "state": "failed",
            "message": f"failed in an earlier run ({cause}); set retry_failed=true to run it again",
        }

    model, loaded = _model(json.dumps(job.model)), _task(task, json.dumps(job.suite))
    model.use(job.pruner, job.budget, job.model["positions"])
    documents = min(job.limit or len(loaded.eval_docs), len(loaded.eval_docs))

    def answered() -> None:
        Interrupt.check()
        Bar.advance(1 / documents)

    model.on_answer = answered
    environment = cell.environment(str(model.device))
    try:
        record, samples = cell.run(model, loaded, task, job.limit, job.seed)
    except Exception as error:
        path = job.store.write_failure(identity, traceback.format_exc(), environment)
        return outcome | {"state": "failed", "message": f"{type(error).__name__}: {error} (traceback in {path})"}
    job.store.write(identity, record | {"environment": environment}, samples)
    return outcome | {"state": "done"}


@lru_cache(maxsize=1)
def _model(settings: str) -> Any:
    """The model of a job; the last one stays loaded for the jobs that follow."""
    from eval.models import PrunedLlava

    options = {
        key: value
        for key, value in json.loads(settings).items()
        if key not in ("name", "budgets", "positions", "relevance_space")
    }
    return PrunedLlava(**options)


@lru_cache
def _task(name: str, suite: str) -> Any:
    """A task of a suite, with its data in place."""
    from eval.tasks import load_tasks

    settings = json.loads(suite)
    root = Path(settings["data_root"]) if settings["data_root"] else None
    if settings["name"] == "shapes":
        from eval.shapes.datasets import build as build_shapes

        assert root is not None
        root = build_shapes(root)
    return load_tasks([name], root)[name]


class Summary(Callback):
    """Hydra callback: counts the jobs ahead for the progress bar, and sums the sweep up behind them."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:  # before Hydra writes there
            Store(Path(config.results))
        except OSError as error:
            _complain(str(error))
            sys.exit(1)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.on_run_start(config)
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
        swept = {o.get_key_element(): len(list(o.sweep_string_iterator())) for o in overrides if o.is_sweep_override()}
        Bar.jobs = 1
        for override in overrides:
            Bar.jobs *= swept.pop(override.get_key_element(), 1)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        _sum_up(sorted(Path(config.hydra.sweep.dir).glob(f"*/{OUTCOMES}")), Path(config.results))

    def on_run_end(self, config: DictConfig, **result: Any) -> None:
        _sum_up([Path(result["job_return"].hydra_cfg.hydra.runtime.output_dir) / OUTCOMES], Path(config.results))


def _complain(paragraph: str) -> None:
    console.print(paragraph, style="red", highlight=False, markup=False)


def _sum_up(files: list[Path], results: Path) -> None:
    """Print counts, errors and tables; exit 1 if any cell failed, or if this itself does: Hydra only warns of errors here."""
    try:
        failed = _report(files, results)
    except Exception:
        console.print_exception()
        failed = True
    if failed:
        sys.exit(1)


def _report(files: list[Path], results: Path) -> bool:
    """Print tables, errors and counts; whether anything failed."""
    Bar.stop()
    outcomes = [outcome for file in files if file.exists() for outcome in json.loads(file.read_text())]
    finished = {o["folder"] for o in outcomes if o["state"] in ("done", "skipped")}
    finished |= {o["unpruned"] for o in outcomes if "unpruned" in o and (Path(o["unpruned"]) / "record.json").exists()}
    records = []
    for folder in sorted(finished):
        try:
            records.append(Store.read(Path(folder)))
        except DamagedRecord as error:
            outcomes.append({"state": "failed", "cell": "table", "folder": folder, "message": str(error)})
    for group in tables.by_setting(records):
        tables.show(group)
        for path in tables.write(group, results / "tables"):
            console.print(f"written: {path}", highlight=False)
    messages = {o["message"]: o["cell"] for o in reversed(outcomes) if o["state"] == "failed"}
    for message, where in messages.items():
        _complain(f"FAILED {where}: {message}")
    # the unpruned cell has no budget: a sweep over budgets meets it several times
    states = Counter({o.get("folder", o["cell"]): o["state"] for o in reversed(outcomes)}.values())
    console.print(", ".join(f"{states[state]} cells {state}" for state in ("done", "skipped", "failed")), style="bold")
    return bool(states["failed"]) or not outcomes
