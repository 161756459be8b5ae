"""What a sweep shows while it runs, and how it is stopped."""

import os
import signal
import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(file=sys.stderr)  # the real one, also while a task's own output is caught
KEPT = "Finished cells and answers are kept; the same command goes on from there."


def complain(paragraph: str) -> None:
    console.print(paragraph, style="red", highlight=False, markup=False)


class Interrupt:
    """Ctrl-C that cannot get lost: some libraries swallow the exception in the middle of a load, so it is asked for again.

    The second one ends the process at once.
    """

    _requested = False

    @classmethod
    def catch(cls) -> None:
        signal.signal(signal.SIGINT, cls._handle)

    @classmethod
    def _handle(cls, _number: int, _frame: Any) -> None:
        if cls._requested:
            console.show_cursor()
            os.write(
                2, f"\nInterrupted twice. {KEPT}\n".encode()
            )  # sys.stderr may be a task's at the moment
            os._exit(130)
        cls._requested = True
        raise KeyboardInterrupt

    @classmethod
    def check(cls) -> None:
        if cls._requested:
            raise KeyboardInterrupt


class Bar:
    """Progress over the cells of the whole sweep, shared by the jobs of this process."""

    jobs = 1
    _progress: Progress | None = None
    _task: TaskID

    @classmethod
    def show(cls, cells_a_job: int, text: str) -> None:
        if cls._progress is None:
            count = TextColumn("{task.completed:.1f} of {task.total:.0f} cells")
            columns = [
                BarColumn(),
                count,
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            ]
            cls._progress = Progress(*columns, console=console)
            cls._progress.start()
            cls._task = cls._progress.add_task(text, total=cls.jobs * cells_a_job)
        cls._progress.update(cls._task, description=text)

    @classmethod
    def advance(cls, cells: float) -> None:
        if cls._progress:
            cls._progress.advance(cls._task, cells)

    @classmethod
    def stop(cls) -> None:
        if cls._progress:
            cls._progress.stop()
            cls._progress = None
