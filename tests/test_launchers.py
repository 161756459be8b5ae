"""One sweep on several processes: shares of jobs, and both launchers with submitit's executors."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from sweeping import SCRIPT, cells, tables, wait_for

from secateur.workers import SlurmQueue, split_jobs

GRID = ("-m", "pruner=none,random", "budget=16,32")
WORKERS = ("hydra/launcher=gpus", "hydra.launcher.workers=2")
# programs that stand for a cluster of two machines: sbatch runs the tasks of an array here,
# each with the variables that SLURM would set
SBATCH = """#!/bin/bash
script="${@: -1}"
cp "$script" "$CLUSTER/script"
for task in 0 1; do
  SLURM_JOB_ID=$((7 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 \\
  SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here \\
  setsid bash "$script" >"$CLUSTER/$task" 2>&1 </dev/null &
done
echo Submitted batch job 7
"""
SRUN = """#!/bin/bash
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""
SQUEUE = """#!/bin/bash
echo 7_0
echo 7_1
"""


@pytest.fixture(scope="module")
def reference(sweeps, tmp_path_factory):
    results = tmp_path_factory.mktemp("reference")
    code, printed = sweeps.here(results, *GRID)
    assert code == 0, printed
    return tables(results)


def start(sweeps, results: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    pytest.importorskip("submitit")
    command = [sys.executable, *sweeps.command(results, *overrides)]
    environment = os.environ | {"COLUMNS": "300", **environment}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=240)
    return process.returncode, " ".join(errors.split())


def test_jobs_are_shared_out_evenly_with_those_of_a_model_together():
    jobs = [(n, [f"pruner={n}", f"model={'ab'[n % 2]}"]) for n in range(8)]
    shares = split_jobs(jobs, 2)
    assert shares == [[jobs[n] for n in (0, 2, 4, 6)], [jobs[n] for n in (1, 3, 5, 7)]]
    for workers in range(1, 12):
        shares = split_jobs(jobs, workers)
        assert sorted(job for share in shares for job in share) == jobs
        assert {len(share) for share in shares} <= {8 // min(workers, 8), -(-8 // min(workers, 8))}
        loads = sum(len({job[1][1] for job in share}) for share in shares)
        assert loads <= len(shares) + 1


def test_a_slurm_job_has_ended_once_the_queue_lacks_it_twice(tmp_path, monkeypatch):
    """A queue that cannot be asked ends nothing, and is told once."""
    answers = [
        SimpleNamespace(returncode=0, stdout="7_1\n", stderr=""),
        SimpleNamespace(returncode=1, stdout="", stderr="Unable to contact slurm controller"),
        SimpleNamespace(returncode=1, stdout="", stderr="Unable to contact slurm controller"),
        SimpleNamespace(returncode=0, stdout="7_1\n", stderr=""),
        SimpleNamespace(returncode=1, stdout="", stderr="slurm_load_jobs error: Invalid job id"),
        SimpleNamespace(returncode=1, stdout="", stderr="slurm_load_jobs error: Invalid job id"),
    ]
    told: list[str] = []
    monkeypatch.setattr("secateur.workers.subprocess.run", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr("secateur.workers.console.print", told.append)
    jobs = [
        SimpleNamespace(job_id=f"7_{n}", paths=SimpleNamespace(result_pickle=tmp_path / str(n)))
        for n in range(2)
    ]
    queue = SlurmQueue()
    monkeypatch.setattr(SlurmQueue, "INTERVAL", 0.0)
    assert [queue.ended(jobs[0], jobs) for _ in range(4)] == [False, False, False, True]
    assert [queue.ended(jobs[1], jobs) for _ in range(2)] == [False, True]
    assert len(told) == 1
    (tmp_path / "0").touch()
    assert SlurmQueue().ended(jobs[0], jobs), "its result is there"


@pytest.mark.parametrize("name", ["gpus", "submitit_slurm"])
def test_every_launcher_composes(name):
    with initialize_config_dir(str(SCRIPT.parents[1] / "configs"), version_base="1.3"):
        launcher = compose(
            "sweep", [f"hydra/launcher={name}"], return_hydra_config=True
        ).hydra.launcher
    assert set(launcher) == {"_target_", "cluster", "workers", "max_num_timeout", "parameters"}
    assert launcher._target_ == "hydra_plugins.packed.Packed"


@pytest.mark.faults
def test_two_processes_make_the_same_tables(sweeps, reference, tmp_path):
    code, printed = end(start(sweeps, tmp_path, *GRID, *WORKERS))
    assert code == 0, printed
    assert "4 jobs on 2 workers" in printed
    assert "4 of 4 jobs through" in printed
    assert "cells: 6 done, 0 skipped, 0 failed" in printed
    assert tables(tmp_path) == reference


def test_the_number_of_processes_is_that_of_the_gpus_or_must_be_said(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from hydra_plugins.packed import Packed, _devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert _devices() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert _devices() == ["0", "1", "2"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"set hydra\.launcher\.workers=2"):
        Packed("local", None, 0, {}).launch([["budget=16"]], 0)


@pytest.mark.faults
def test_a_killed_worker_is_named_and_the_other_goes_on(sweeps, reference, tmp_path):
    process = start(sweeps, tmp_path, *GRID, *WORKERS)
    wait_for(lambda: list(tmp_path.rglob("*.answers.jsonl")), 120)
    os.kill(_workers(process.pid)[0], signal.SIGKILL)
    code, printed = end(process)
    assert code == 1
    assert "worker 0 ended before this job; see " in printed
    assert "the same command goes on from there" in printed
    finished = len(cells(tmp_path))
    assert finished >= 2, "the other worker's"
    code, printed = end(start(sweeps, tmp_path, *GRID, *WORKERS))
    assert code == 0, printed
    assert f"cells: {6 - finished} done, {finished} skipped, 0 failed" in printed
    assert tables(tmp_path) == reference


def _workers(pid: int) -> list[int]:
    """Processes two below: a controller of submitit's stands between."""

    def children(parent: int) -> list[int]:
        found = []
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
        return sorted(found)

    return [worker for controller in children(pid) for worker in children(controller)]


@pytest.mark.faults
def test_a_slurm_array_makes_the_same_tables(sweeps, reference, tmp_path):
    cluster = tmp_path / "cluster"
    cluster.mkdir()
    for name, program in (
        ("sbatch", SBATCH),
        ("srun", SRUN),
        ("squeue", SQUEUE),
        ("scancel", "#!/bin/bash\n"),
    ):
        (cluster / name).write_text(program)
        (cluster / name).chmod(0o755)
    environment = {
        "PATH": f"{cluster}:{os.environ['PATH']}",
        "CLUSTER": str(cluster),
        "PYTHON": sys.executable,
    }
    launcher = (
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.workers=2",
        "hydra.launcher.parameters.slurm_partition=gpu",
    )
    code, printed = end(start(sweeps, tmp_path / "results", *GRID, *launcher, **environment))
    assert code == 0, printed
    assert "cells: 6 done, 0 skipped, 0 failed" in printed
    assert tables(tmp_path / "results") == reference
    script = (cluster / "script").read_text()
    for line in (
        "--array=0-1%2",
        "--gpus-per-node=1",
        "--partition=gpu",
        "--time=720",
        "--mem=64GB",
    ):
        assert f"#SBATCH {line}\n" in script
