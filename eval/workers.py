"""The jobs of a sweep on several processes: how they are shared out, what a worker does, what becomes of a dead one's jobs."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from secateur.progress import KEPT, Bar, console
from secateur.sweep import OUTCOMES, finish

Job = tuple[int, list[str]]  # number in the sweep, and overrides


def packs(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs shared out evenly, those of one model side by side, so that a worker loads as few models as can be."""

    def model(job: Job) -> list[str]:
        return [
            override
            for override in job[1]
            if override.lstrip("+~").startswith(("model=", "model.", "model@"))
        ]

    ordered, count = sorted(jobs, key=model), min(workers, len(jobs))
    return [
        ordered[len(jobs) * rank // count : len(jobs) * (rank + 1) // count]
        for rank in range(count)
    ]


@dataclass
class Worker:
    """What every worker gets: the sweep's configuration and the function that runs a job."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    def __call__(self, share: list[Job], device: str | None, state: Any) -> None:
        """Run a share of the sweep on a GPU (as CUDA_VISIBLE_DEVICES names it; None: whatever there is).

        `state` is that of Hydra's singletons.
        """
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        Singleton.set_state(state)
        setup_globals()
        Bar.jobs = len(share)
        for number, overrides in share:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            run_job(
                task_function=self.task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=self.hydra_context,
            )
        finish()
        Bar.stop()

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit queues when a worker is preempted: the same again, which skips what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def wait(running: list[Any], shares: list[list[Job]], folder: Path) -> None:
    """Tell which jobs are through until all workers have ended; leave a failure for every job that a worker did not finish."""
    left = {number: " ".join(overrides) for share in shares for number, overrides in share}
    total, ended = len(left), False
    while not ended:
        ended = all(job.done() for job in running)
        for number in [number for number in left if (folder / str(number) / OUTCOMES).exists()]:
            console.print(
                f"{total - len(left) + 1} of {total} jobs through: {left.pop(number)}",
                highlight=False,
                markup=False,
            )
        time.sleep(0 if ended else 1)
    for rank, (job, share) in enumerate(zip(running, shares, strict=True)):
        for number, overrides in share:
            if number in left:
                place = folder / str(number)
                place.mkdir(exist_ok=True)
                message = f"worker {rank} ended before this job; see {job.paths.stderr}. {KEPT}"
                outcome = {"state": "failed", "cell": " ".join(overrides), "message": message}
                (place / OUTCOMES).write_text(json.dumps([outcome]))
