"""A sweep on several processes: shares of jobs, what a worker does, what happens when one dies."""

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

from secateur import hub
from secateur.progress import KEPT, console
from secateur.sweep import OUTCOMES, Outcome, begin

NumberedOverrides = tuple[
    int, list[str]
]  # a job before it is composed: number in the sweep, overrides


def split_jobs(jobs: Sequence[NumberedOverrides], workers: int) -> list[list[NumberedOverrides]]:
    """Equal shares, the jobs of one model together, so that a worker loads few models."""

    def model(job: NumberedOverrides) -> list[str]:
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
    """The function of every worker, with the sweep's config and the function that runs a job."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig
    commits: dict[Any, hub.Resolved]  # a worker that starts later must not see a newer one

    def __call__(self, share: list[NumberedOverrides], device: str | None, state: Any) -> None:
        """Run a share of the sweep.

        Args:
            share: the jobs.
            device: the GPU, as CUDA_VISIBLE_DEVICES names it; None: all there are.
            state: of Hydra's singletons.
        """
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        hub.adopt(self.commits)
        Singleton.set_state(state)
        setup_globals()
        sweep = begin(len(share))
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
        sweep.finish()
        sweep.bar.stop()

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit queues when a worker is preempted: the same call; it skips what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def wait(running: list[Any], shares: list[list[NumberedOverrides]], folder: Path) -> None:
    """Print each job that ends, until all workers have ended.

    Writes a failed outcome for every job that a worker did not finish.
    """
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
                cell = " ".join(overrides)
                outcome: Outcome = {"state": "failed", "cell": cell, "message": message}
                (place / OUTCOMES).write_text(json.dumps([outcome]))
