"""Hydra's launcher for several processes: one per GPU of this machine, or a SLURM array.

Hydra looks for it in this folder.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from secateur import hub
from secateur.progress import console, print_error
from secateur.workers import SlurmQueue, Worker, split_jobs, wait


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
        self.worker.commits = hub.known()  # the sweeper has asked for all of them
        folder = Path(self.worker.config.hydra.sweep.dir).resolve()
        try:
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
        except (RuntimeError, submitit.core.utils.FailedJobError) as error:
            print_error(_not_submitted(str(error)))
            sys.exit(1)
        console.print(
            f"{len(job_overrides)} jobs on {len(running)} workers; "
            f"their logs: {folder / 'workers'}",
            highlight=False,
        )
        try:
            if self.cluster == "slurm":
                wait(running, shares, folder, SlurmQueue().ended)
            else:
                wait(running, shares, folder)
        except BaseException:
            for job in running:
                job.cancel(check=False)
            raise
        return []


def _not_submitted(error: str) -> str:
    """Why SLURM did not take the workers, and the cure, in one paragraph."""
    said = [line for line in error.splitlines() if line.startswith(("sbatch:", "srun:"))]
    cause = " ".join(said) or error.strip().splitlines()[0]
    if "munge" in cause.lower():
        cure = "Start munge on this machine (systemctl start munge), or use a login node."
    elif "contact slurm controller" in cause.lower():
        cure = "The cluster's controller is down, or SLURM_CONF names another cluster's."
    elif any(word in cause.lower() for word in ("partition", "account", "qos", "constraint")):
        cure = (
            "`sinfo` lists the partitions, `sacctmgr show assoc user=$USER` your accounts: set "
            "hydra.launcher.parameters.slurm_partition, slurm_account or slurm_qos."
        )
    elif "Could not detect" in cause:
        cure = "There is no SLURM here: run on a login node, or use hydra/launcher=gpus."
    else:
        cure = "Change hydra.launcher.parameters, listed in configs/hydra/launcher."
    return f"SLURM did not take the workers: {cause}. {cure} Nothing was run."


def _devices() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    )
