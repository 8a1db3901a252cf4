"""Progress with time left: a bar on a terminal, plain lines elsewhere."""

import abc
import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class Reporter(abc.ABC):
    """Counts steps and shows what is known of them.

    Attributes:
      done: steps so far.
      text: what to show beside them.
    """

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.text = ""

    def advance(self, steps: int) -> None:
        """Counts steps."""
        self.done += steps
        self._show()

    def describe(self, text: str) -> None:
        """Says what goes on, in a few words."""
        self.text = text
        self._show()

    @abc.abstractmethod
    def _show(self) -> None: ...


class _Bar(Reporter):
    def __init__(self, total: int, progress: Progress):
        super().__init__(total)
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, description=self.text)


class _Lines(Reporter):
    def __init__(self, total: int, console: Console):
        super().__init__(total)
        self._console = console
        self._start = self._last = time.monotonic()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES or not self.done:
            return
        self._last = now
        left = (now - self._start) / self.done * (self.total - self.done)
        self._console.print(
            f"step {self.done}/{self.total}, {left:.0f} s left: {self.text}",
            highlight=False,
            soft_wrap=True,
        )


@contextlib.contextmanager
def progress(total: int, console: Console) -> Iterator[Reporter]:
    """Shows progress over `total` steps while its block runs."""
    if not console.is_terminal:
        yield _Lines(total, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(total, bar)
