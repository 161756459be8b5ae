"""What Hydra calls before and after a sweep: counts the jobs; prints tables, errors and counts."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from secateur.progress import console, print_error
from secateur.store import DamagedRecord, Store, read
from secateur.sweep import OUTCOMES, Outcome, State, begin, current

if TYPE_CHECKING:  # imports PyTorch, as the methods do
    from secateur.reporting.tables import Records

# where several jobs have the same cell, the first of these states counts
STATES: tuple[State, ...] = get_args(State)


class Summary(Callback):
    """Hydra callback: begins the sweep with its number of jobs, and prints what came of it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self._start(config, jobs=1)

    def _start(self, config: DictConfig, jobs: int) -> None:
        if config.hydra.job.chdir:
            print_error(
                "hydra.job.chdir=true would look for results and data in another folder for each "
                "job; leave it out"
            )
            sys.exit(1)
        try:  # before Hydra writes there, and before hours of a sweep that could not be logged
            Store(Path(config.results))
            self._logger = _logger(config)
        except (OSError, ValueError) as error:
            print_error(str(error))
            sys.exit(1)
        begin(jobs)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._start(config, jobs=1)  # the sweeper knows how many

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self._sum_up(
            sorted(Path(config.hydra.sweep.dir).glob(f"*/{OUTCOMES}")), Path(config.results)
        )

    def on_run_end(self, config: DictConfig, **result: Any) -> None:
        self._sum_up(
            [Path(result["job_return"].hydra_cfg.hydra.runtime.output_dir) / OUTCOMES],
            Path(config.results),
        )

    def _sum_up(self, files: list[Path], results: Path) -> None:
        """Print tables, errors and counts; exit 1 if any cell failed, or if this does.

        Hydra itself only warns of errors here.
        """
        try:
            current().finish()
            current().bar.stop()
            failed = _report(files, results, self._logger)
        except Exception:
            console.print_exception()
            failed = True
        if failed:
            sys.exit(1)


def _ablations(records: "Records", results: Path, stem: Path) -> list[Path]:
    """Draw the score against every field that the sweep varied; returns the files."""
    from secateur.reporting import ablation  # imports matplotlib

    varied = ablation.varied(record.identity for record in records)
    if not varied:
        return []
    from secateur.reporting.comparison import cell_of, compare

    store = Store(results)
    try:
        compared = compare([cell_of(record, store) for record in records])
    except ValueError as error:
        print_error(f"no figure of the varied fields: {error}")
        return []
    title = records[0].identity.title
    return [path for one in varied for path in ablation.write(one, compared, title, stem)]


def _logger(config: DictConfig) -> "Callable[[Records], bool]":
    """A function that logs the records of a sweep; returns whether all were logged."""
    if config.logger.name == "none":
        return lambda _: True
    from secateur.reporting.wandb_log import WandbLog

    return WandbLog.of(config).log


def _report(files: list[Path], results: Path, log: "Callable[[Records], bool]") -> bool:
    """Print tables, errors and counts, log the cells; returns whether anything failed."""
    from secateur.reporting import tables

    outcomes = [
        outcome for file in files if file.exists() for outcome in json.loads(file.read_text())
    ]
    by_cell: dict[str, Outcome] = {}
    for outcome in sorted(outcomes, key=lambda outcome: STATES.index(outcome["state"])):
        # the unpruned cell has no budget: a sweep over budgets has it several times
        by_cell.setdefault(outcome.get("folder", outcome["cell"]), outcome)
    finished = {o["folder"] for o in by_cell.values() if o["state"] in ("done", "skipped")}
    finished |= {
        o["unpruned"]
        for o in outcomes
        if "unpruned" in o and (Path(o["unpruned"]) / "record.json").exists()
    }
    records = []
    for folder in sorted(finished):
        try:
            records.append(read(Path(folder)))
        except DamagedRecord as error:
            by_cell[folder] = {"state": "failed", "cell": "table", "message": str(error)}
    for group in tables.by_setting(records):
        tables.show(group)
        stem = results / "tables" / tables.grid_stem(group)
        for path in [*tables.write(group, stem), *_ablations(group, results, stem)]:
            console.print(f"written: {path}", highlight=False)
    messages = {o["message"]: o["cell"] for o in reversed(by_cell.values()) if "message" in o}
    for message, where in messages.items():
        print_error(f"FAILED {where}: {message}")
    counts = Counter(outcome["state"] for outcome in by_cell.values())
    shown = [state for state in STATES if counts[state] or state in ("done", "skipped", "failed")]
    words = ", ".join(f"{counts[state]} {state}" for state in shown)
    console.print(f"cells: {words}", style="bold")
    logged = log(records)
    return bool(counts["failed"] or counts["locked"]) or not outcomes or not logged
