"""Progress on stderr, for the parts of a run that take minutes: prefill and calibration."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers.utils import logging


def quiet_unless_terminal() -> None:
    """Keep transformers' loading bar out of logs and pipes."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


class Working:
    """A bar that disappears when the work is done. Only drawn on a terminal."""

    def __init__(self, console: Console, what: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(what, total=None)
        self.running = False

    def __enter__(self) -> "Working":
        self.progress.start()
        self.running = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def update(self, done: int, total: int) -> None:
        """Called by the engine: units done, units in all."""
        if self.running:
            self.progress.update(self.task, completed=done, total=total)

    def finish(self) -> None:
        """Take the bar off the terminal; called before the first text."""
        if self.running:
            self.running = False
            self.progress.stop()
