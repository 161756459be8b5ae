"""Sweeps on a real SLURM: `make test-slurm` (root, and Debian's packages)."""

import subprocess
import sys
from pathlib import Path

import pytest
from slurm_node import missing, node
from sweeping import tables, wait_for

pytestmark = pytest.mark.slurm
GRID = ("-m", "pruner=none,random", "budget=16,32")
LAUNCHER = "hydra.launcher.parameters"
WORKERS = (
    *("hydra/launcher=submitit_slurm", "hydra.launcher.workers=2"),
    *(f"{LAUNCHER}.gpus_per_node=null", f"{LAUNCHER}.cpus_per_task=1", f"{LAUNCHER}.mem_gb=1"),
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a user of the node."""
    if problem := missing():
        pytest.skip(problem)
    with node(tmp_path_factory.mktemp("slurm") / "node") as environment:
        yield environment


@pytest.fixture(scope="module")
def reference(sweeps, tmp_path_factory):
    results = tmp_path_factory.mktemp("reference")
    code, printed = sweeps.here(results, *GRID)
    assert code == 0, printed
    return tables(results)


class Running:
    """A sweep on the cluster."""

    def __init__(self, sweeps, slurm: dict[str, str], results: Path, *overrides: str) -> None:
        self.slurm, self.results = slurm, results
        command = [sys.executable, *sweeps.command(results, *GRID, *WORKERS, *overrides)]
        self.process = subprocess.Popen(
            command,
            env=slurm | {"COLUMNS": "300"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Exit status, and what was printed."""
        try:
            printed, _ = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return self.process.returncode, " ".join(printed.split())

    def ask(self, *command: str) -> str:
        asked = subprocess.run(command, env=self.slurm, capture_output=True, text=True)
        return asked.stdout

    def logs(self) -> str:
        return "".join(p.read_text() for p in self.results.rglob("workers/*.err"))


def test_two_workers_make_the_same_tables(sweeps, slurm, reference, tmp_path):
    code, printed = Running(sweeps, slurm, tmp_path).end()
    assert code == 0, printed
    assert "4 jobs on 2 workers" in printed
    assert "cells: 6 done, 0 skipped, 0 failed" in printed
    assert "sacct" not in printed
    assert tables(tmp_path) == reference


# a method that takes its time, so that a worker can be stopped in the middle
SLOW = """
import os
import time
from dataclasses import dataclass
from secateur.pruners import ScoreTopK, register

@register("slow")
@dataclass(frozen=True)
class Slow(ScoreTopK):
    paper, status = "-", "official"

    def score(self, tokens):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return tokens.features.sum(-1)
"""


@pytest.mark.parametrize("what", ["killed", "preempted", "out of time"])
def test_a_stopped_worker(sweeps, slurm, tmp_path, what):
    """SLURM sends SIGTERM and SIGUSR2, or, before the time is over, SIGUSR2.

    A killed worker is not; it is named, though the cluster keeps no accounts, and the same command
    goes on.
    """
    (tmp_path / "slow.py").write_text(SLOW)
    words = (f"plugins=[{tmp_path / 'slow.py'}]", "pruner=none,slow", "budget=16", "strict=true")
    words = (*words, "tasks=[scienceqa_img]", "limit=30")
    limits = (f"{LAUNCHER}.timeout_min=2", f"+{LAUNCHER}.slurm_signal_delay_s=20")
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    # the method alone takes longer than a job that gets its signal after 100 seconds
    own = slurm | {"SLOW": "3.5" if what == "out of time" else "1"}
    running = Running(sweeps, own, stopped, *words, *(limits if what == "out of time" else ()))
    if what != "out of time":
        wait_for(lambda: list(stopped.rglob("*slow*.answers.jsonl")), 180)
        for job in running.ask("squeue", "-h", "-r", "-t", "R", "-o", "%i").split():
            for name in ("KILL",) if what == "killed" else ("TERM", "USR2"):
                running.ask("scancel", f"--signal={name}", job)
    code, printed = running.end(600)
    if what == "killed":
        assert code == 1
        assert "ended before this job; see " in printed
        code, printed = Running(sweeps, slurm, stopped, *words).end()
    else:
        assert "Caught signal SIGUSR2" in running.logs()
    assert code == 0, printed
    command = [sys.executable, *sweeps.command(undisturbed, *GRID, *words)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    # the sweep of the killed worker left a table of what it had
    assert tables(undisturbed).items() <= tables(stopped).items()


@pytest.mark.parametrize(
    ("parameter", "environment", "message"),
    [
        ("slurm_partition=nope", {}, "set hydra.launcher.parameters.slurm_partition"),
        ("name=x", {"PATH": str(Path(sys.executable).parent)}, "There is no SLURM here"),
    ],
)
def test_a_refusal_is_one_paragraph(sweeps, slurm, tmp_path, parameter, environment, message):
    running = Running(sweeps, slurm | environment, tmp_path, f"{LAUNCHER}.{parameter}")
    code, printed = running.end()
    assert code == 1
    assert "SLURM did not take the workers: " in printed
    assert message in printed
    assert "Traceback" not in printed


def test_a_machine_without_munge_is_told(sweeps, slurm, tmp_path):
    """The cluster's programs are there, but nobody signs their messages."""
    folder = Path(slurm["SLURM_CONF"]).parent
    text = (folder / "slurm.conf").read_text().replace("munge.socket", "no.socket")
    (tmp_path / "slurm.conf").write_text(text)
    own = slurm | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    code, printed = Running(sweeps, own, tmp_path / "results").end()
    assert code == 1
    assert "Start munge on this machine" in printed
