"""What a sweep shows while it runs, and how it is stopped."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# the real stderr, also while the output of a task is captured
console = Console(file=sys.stderr, markup=False)  # paths and answers may contain brackets
KEPT = "Finished cells and answers are kept; the same command goes on from there."


def print_error(paragraph: str) -> None:
    """Print a message in red on the real stderr."""
    console.print(paragraph, style="red", highlight=False)


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its status. A file it cannot read or write is one paragraph."""
    try:
        code = main()
    except OSError as error:
        print_error(
            f"{error}. The script stopped there; files that it wrote before are complete. Make "
            "room or give access, then run it again."
        )
        code = 1
    sys.exit(code)


def count(text: str) -> int:
    """A number of at least 1 on a script's command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


class Interrupt:
    """Ctrl-C that is not lost: some libraries swallow KeyboardInterrupt while they load.

    `check` raises it again. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._requested = False

    def catch(self) -> None:
        """Handle Ctrl-C from now on."""
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, _number: int, _frame: Any) -> None:
        if self._requested:
            console.show_cursor()
            # not through sys.stderr, which may be captured at the moment
            os.write(2, f"\nInterrupted twice. {KEPT}\n".encode())
            os._exit(130)
        self._requested = True
        raise KeyboardInterrupt

    def check(self) -> None:
        if self._requested:
            raise KeyboardInterrupt


class ProgressBar:
    """Progress over the cells of all `jobs` of a sweep that run in this process."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.completed:.1f} of {task.total:.0f} cells"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        )

    def show(self, cells_per_job: int, text: str) -> None:
        """Say what runs now. The first call draws the bar and fixes its length."""
        if not self._bar.tasks:
            self._bar.start()
            self._bar.add_task(text, total=self.jobs * cells_per_job)
        self._bar.update(self._bar.task_ids[0], description=text)

    def advance(self, cells: float) -> None:
        if self._bar.tasks:
            self._bar.advance(self._bar.task_ids[0], cells)

    def stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
