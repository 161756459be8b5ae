"""Sweeps inside the test process, where the data stays loaded, or in a fork that may be killed."""

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from secateur.progress import console

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "sweep.py"


@dataclass
class Sweeps:
    """Sweeps over the documents in `data`; by default two tasks with four documents each."""

    data: Path
    common: tuple[str, ...] = ("limit=4", "tasks=[pope,gqa]", "budget=16")

    def command(self, results: Path, *overrides: str) -> list[str]:
        multirun, given = [o for o in overrides if o == "-m"], [o for o in overrides if o != "-m"]
        return [
            str(SCRIPT),
            *multirun,
            f"results={results}",
            f"suite.data_root={self.data}",
            *self.common,
            *given,
        ]

    def here(self, results: Path, *overrides: str) -> tuple[int, str]:
        """Exit code, and what was printed."""
        before = sys.argv, console.file, signal.getsignal(signal.SIGINT)
        printed = io.StringIO()
        sys.argv, console.file = self.command(results, *overrides), printed
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv, console.file, _ = before
            signal.signal(signal.SIGINT, before[2])
        return code, " ".join(printed.getvalue().split())

    def child(self, results: Path, *overrides: str) -> multiprocessing.Process:
        """The same in a fork; its output goes to a file next to the results."""

        def run() -> None:
            # Forks share tqdm's lock: one that is stopped or killed while it holds the lock would
            # stop all others.
            tqdm.set_lock(threading.RLock())
            code, printed = self.here(results, *overrides)
            results.with_name(f"{results.name}.{os.getpid()}.log").write_text(printed)
            os._exit(code)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        return process


def output(results: Path, process: multiprocessing.Process) -> str:
    return results.with_name(f"{results.name}.{process.pid}.log").read_text()


def tables(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (results / "tables").iterdir()}


def cells(results: Path) -> dict[str, Path]:
    return {
        f"{p.parts[-3]}/{p.parts[-2].rsplit('_', 1)[0]}": p.parent
        for p in results.glob("runs/*/*/*/*/record.json")
    }


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
