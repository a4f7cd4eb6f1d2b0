"""The output of commands: as wide as the terminal, or with long lines when another program reads it."""

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPED_WIDTH = 250


def console() -> Console:
    output = Console(highlight=False)
    return output if output.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


class StepPrinter:
    """Prints each finished step, with the seconds since the start."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()

    def __call__(self, step: str, detail: str) -> None:
        self._console.print(f"[dim]{self.seconds:7.1f} s[/]  {step:<10}  {escape(detail)}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started
