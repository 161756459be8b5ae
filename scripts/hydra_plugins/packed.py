"""Hydra's launcher for several processes: one per GPU of this machine, or a SLURM array.

Hydra looks for it in this folder.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from secateur import hub
from secateur.progress import console
from secateur.workers import Worker, split_jobs, wait


class Packed(Launcher):
    """Hydra launcher: every worker runs its share of the sweep's jobs in one process.

    When a worker dies, the jobs it had not finished fail; the others go on. A SLURM job that is
    preempted or out of time is queued again and goes on from its last answer.

    Args:
        cluster: `local` or `slurm`.
        workers: how many; None: one per GPU of this machine. Local workers get one GPU each, by
            rank; with more workers than GPUs they share.
        max_num_timeout: how often a SLURM job that ran out of time is queued again.
        parameters: arguments of `submitit.AutoExecutor.update_parameters`, for each worker.

    Raises:
        ImportError: submitit is not installed.
        ValueError: `workers` is None and there is no GPU.
    """

    def __init__(
        self,
        cluster: Literal["local", "slurm"],
        workers: int | None,
        max_num_timeout: int,
        parameters: dict[str, Any],
    ) -> None:
        self.cluster, self.workers, self.max_num_timeout, self.parameters = (
            cluster,
            workers,
            max_num_timeout,
            dict(parameters),
        )

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.worker = Worker(hydra_context, task_function, config, {})

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        try:
            import submitit
        except ImportError as error:
            raise ImportError(
                "this launcher needs submitit: pip install 'secateur[slurm]'"
            ) from error
        self.worker.commits = hub.known()  # the sweeper has asked for all of them
        devices = _devices() if self.cluster == "local" else []
        workers = len(devices) if self.workers is None else self.workers
        if workers < 1:
            raise ValueError(
                f"{workers} workers: there is no GPU here to count; "
                "set hydra.launcher.workers=2 for two processes"
            )
        shares = split_jobs(
            [(initial_job_idx + n, list(overrides)) for n, overrides in enumerate(job_overrides)],
            workers,
        )
        folder = Path(self.worker.config.hydra.sweep.dir).resolve()
        executor = submitit.AutoExecutor(
            folder / "workers", self.cluster, slurm_max_num_timeout=self.max_num_timeout
        )
        executor.update_parameters(**self.parameters)
        with executor.batch():
            running = [
                executor.submit(
                    self.worker,
                    share,
                    devices[rank % len(devices)] if devices else None,
                    Singleton.get_state(),
                )
                for rank, share in enumerate(shares)
            ]
        console.print(
            f"{len(job_overrides)} jobs on {len(running)} workers; "
            f"their logs: {folder / 'workers'}",
            highlight=False,
        )
        try:
            wait(running, shares, folder)
        except BaseException:
            for job in running:
                job.cancel(check=False)
            raise
        return []


def _devices() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    )
