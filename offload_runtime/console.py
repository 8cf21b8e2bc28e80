"""rich's console on stdout, for the commands that print tables."""

import sys

from rich.console import Console


class PipeConsole(Console):
    """Raises BrokenPipeError when the reader has gone; newer versions of rich exit by themselves."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def table_console() -> Console:
    return PipeConsole(file=sys.stdout)
