"""What stands before and behind a sweep: the count of cells ahead, the tables and the counts of outcomes."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from secateur.progress import Bar, complain, console
from secateur.reporting import tables
from secateur.store import DamagedRecord, Store
from secateur.sweep import OUTCOMES, Outcome, begin, finish

# of one cell in several jobs the first of these counts; partial: some shards have answered, others not yet
STATES = ("done", "skipped", "failed", "partial", "locked")


class Summary(Callback):
    """Hydra callback: counts the jobs ahead for the progress bar, and sums the sweep up behind them."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        begin()
        try:  # before Hydra writes there, and before hours of a sweep whose runs could not be logged
            Store(Path(config.results))
            self._logger = _logger(config)
        except (OSError, ValueError) as error:
            complain(str(error))
            sys.exit(1)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.on_run_start(config)
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        overrides = OverridesParser.create().parse_overrides(
            [*params, *config.hydra.overrides.task]
        )
        swept = {
            o.get_key_element(): len(list(o.sweep_string_iterator()))
            for o in overrides
            if o.is_sweep_override()
        }
        Bar.jobs = 1
        for override in overrides:
            Bar.jobs *= swept.pop(override.get_key_element(), 1)

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
        """Print counts, errors and tables; exit 1 if any cell failed, or if this itself does: Hydra only warns of errors here."""
        try:
            finish()
            failed = _report(files, results, self._logger)
        except Exception:
            console.print_exception()
            failed = True
        if failed:
            sys.exit(1)


def _logger(config: DictConfig) -> Callable[[tables.Records], bool]:
    """What hands the records of a sweep on; gives whether all of them arrived."""
    if config.logger.name == "none":
        return lambda _: True
    from secateur.reporting.wandb_log import WandbLog

    return WandbLog.of(config).log


def _report(files: list[Path], results: Path, log: Callable[[tables.Records], bool]) -> bool:
    """Print tables, errors and counts, log the cells; whether anything failed."""
    Bar.stop()
    outcomes = [
        outcome for file in files if file.exists() for outcome in json.loads(file.read_text())
    ]
    by_cell: dict[str, Outcome] = {}
    for outcome in sorted(outcomes, key=lambda outcome: STATES.index(outcome["state"])):
        # the unpruned cell has no budget: a sweep over budgets meets it several times
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
            records.append(Store.read(Path(folder)))
        except DamagedRecord as error:
            by_cell[folder] = {"state": "failed", "cell": "table", "message": str(error)}
    for group in tables.by_setting(records):
        tables.show(group)
        for path in tables.write(group, results / "tables"):
            console.print(f"written: {path}", highlight=False)
    messages = {o["message"]: o["cell"] for o in reversed(by_cell.values()) if "message" in o}
    for message, where in messages.items():
        complain(f"FAILED {where}: {message}")
    counts = Counter(outcome["state"] for outcome in by_cell.values())
    shown = [state for state in STATES if counts[state] or state in ("done", "skipped", "failed")]
    console.print(", ".join(f"{counts[state]} cells {state}" for state in shown), style="bold")
    logged = log(records)
    return bool(counts["failed"] or counts["locked"]) or not outcomes or not logged
