"""A sweep on several processes: shares of jobs, what a worker does, what happens when one dies."""

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
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


class SlurmQueue:
    """Which workers have left SLURM's queue.

    `squeue` tells it at once and on every cluster. submitit asks `sacct`, which needs a database of
    accounts and is asked every ten minutes only.
    """

    INTERVAL = 10.0  # seconds from one question to the next

    def __init__(self) -> None:
        self._asked = -math.inf
        self._absent: dict[str, int] = {}  # how many answers in a row did not have it
        self._told = False

    def ended(self, job: Any, others: list[Any]) -> bool:
        """Whether a job has left its result, or was not in the queue twice in a row.

        Args:
            others: the jobs that are asked about together.
        """
        if job.paths.result_pickle.exists():
            return True
        if time.monotonic() - self._asked >= self.INTERVAL:
            self._asked = time.monotonic()
            self._ask([other.job_id for other in others])
        return self._absent.get(job.job_id, 0) > 1

    def _ask(self, names: list[str]) -> None:
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(names)}"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
            # squeue calls it an error if it knows none of them any more
            failed = asked.returncode != 0 and "Invalid job id" not in asked.stderr
            reason = asked.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            failed, reason = True, str(error)
        if failed:
            if not self._told:
                console.print(f"squeue does not tell the state of the workers: {reason}")
            self._told = True
            return
        queued = set(asked.stdout.split())
        for name in names:
            self._absent[name] = 0 if name in queued else self._absent.get(name, 0) + 1


def wait(
    running: list[Any],
    shares: list[list[NumberedOverrides]],
    folder: Path,
    ended: Callable[[Any, list[Any]], bool] = lambda job, _: job.done(),
) -> None:
    """Print each job that ends, until all workers have ended.

    Writes a failed outcome for every job that a worker did not finish.

    Args:
        ended: whether a worker has ended; its second argument is all workers.
    """
    left = {number: " ".join(overrides) for share in shares for number, overrides in share}
    total, over = len(left), False
    while not over:
        over = all(ended(job, running) for job in running)
        for number in [number for number in left if (folder / str(number) / OUTCOMES).exists()]:
            console.print(
                f"{total - len(left) + 1} of {total} jobs through: {left.pop(number)}",
                highlight=False,
                markup=False,
            )
        time.sleep(0 if over else 1)
    for rank, (job, share) in enumerate(zip(running, shares, strict=True)):
        for number, overrides in share:
            if number in left:
                place = folder / str(number)
                place.mkdir(exist_ok=True)
                message = f"worker {rank} ended before this job; see {job.paths.stderr}. {KEPT}"
                cell = " ".join(overrides)
                outcome: Outcome = {"state": "failed", "cell": cell, "message": message}
                (place / OUTCOMES).write_text(json.dumps([outcome]))
