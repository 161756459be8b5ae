"""A real SLURM of one node on this machine, beside any other: own ports, own keys, one folder.

As a script: says whether it can run here and, if not, what is missing. Exit status 0 or 77.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PACKAGES = "munge slurmctld slurmd slurm-client"
_SBIN = "/usr/sbin"


def missing() -> str:
    """What hinders a SLURM here, and how to get it; empty: nothing does."""
    if sys.platform != "linux":
        return "SLURM runs on Linux only."
    path = f"{os.environ['PATH']}:{_SBIN}"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if lacking:
        return (
            f"No real SLURM was tried: {', '.join(lacking)} are missing. On Debian or Ubuntu: "
            f"apt-get install -y --no-install-recommends {PACKAGES}"
        )
    if os.geteuid() != 0:
        return (
            "No real SLURM was tried: slurmd starts jobs for other users, so it needs root. "
            "Run the same command as root, for example in a container."
        )
    return ""


def _ports(count: int) -> list[int]:
    """Free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def _config(folder: Path) -> str:
    host = socket.gethostname()
    controller, node = _ports(2)
    fields = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmdPort": node,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # a job that is queued again waits until its old credentials have expired
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": 5,
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
    }
    lines = [f"{name}={value}" for name, value in fields.items()]
    size = f"CPUs={max(2, os.cpu_count() or 2)} RealMemory=4000 State=UNKNOWN"
    lines += [f"NodeName={host} NodeAddr=127.0.0.1 {size}"]
    lines += ["PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
    return "\n".join([*lines, ""])


@contextlib.contextmanager
def node(folder: Path) -> Iterator[dict[str, str]]:
    """SLURM while the block runs; gives the environment of its users.

    Raises:
        RuntimeError: the node does not become ready; the message has the ends of the logs.
    """
    folder.mkdir(mode=0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o400)
    (folder / "slurm.conf").write_text(_config(folder))
    path = f"{os.environ['PATH']}:{_SBIN}"
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/{file}" for name, file in _MUNGE_FILES.items()]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with (folder / f"{command[0]}.out").open("wb") as out:
                running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1)
        _await_idle(folder, environment)
        yield environment
    finally:
        _cancel_all(environment)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in reversed(running):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


_MUNGE_FILES = {"key": "key", "log": "munged.log", "pid": "munged.pid", "seed": "munged.seed"}


def _cancel_all(environment: dict[str, str]) -> None:
    """End the jobs of a test that failed: they would outlive the node."""
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    for _ in range(40):
        command = ["squeue", "--noheader"]
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not asked.stdout.strip():
            return
        time.sleep(0.5)


def _await_idle(folder: Path, environment: dict[str, str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        command = ["sinfo", "-h", "-o", "%T"]
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
        if asked.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = [*folder.glob("*.log"), *folder.glob("*.out")]
    ends = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs)
    raise RuntimeError(f"no node is ready: {asked.stdout} {asked.stderr}\n{ends}")


if __name__ == "__main__":
    if problem := missing():
        print(problem, file=sys.stderr)
        sys.exit(77)
