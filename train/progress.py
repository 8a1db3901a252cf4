"""Progress with time left: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.table import Column

from train.names import printable

_SECONDS_BETWEEN_LINES = 10.0
_WIDE = 100


class _PrintableConsole(Console):
    """A console on which only rich itself moves the cursor."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):
            if segment.control is None:
                segment = segment._replace(text=printable(segment.text))
            yield segment


def make_console(*, quiet: bool = False) -> Console:
    """Makes a console that shows text as it is, as file names may have brackets.

    Long lines are not wrapped. Print tables with `soft_wrap=False` to fit the terminal.

    Args:
      quiet: whether it prints nothing.
    """
    return _PrintableConsole(highlight=False, markup=False, soft_wrap=True, quiet=quiet)


class Reporter:
    """Counts the steps of long work; this base class shows nothing.

    Attributes:
      text: what to show beside the count.
      total: number of steps.
      done: number of steps so far.
    """

    def __init__(self, text: str, total: int):
        self.text = text
        self.total = total
        self.done = 0

    def advance(self, steps: int = 1) -> None:
        """Counts steps."""
        self.done += steps
        self._show()

    def describe(self, text: str) -> None:
        """Replaces the text."""
        self.text = text
        self._show()

    def _show(self) -> None:
        pass


Progress: TypeAlias = Callable[[str, int], contextlib.AbstractContextManager[Reporter]]
"""Shows the progress of long work: (text, total) -> Reporter."""


class _Bar(Reporter):
    def __init__(self, text: str, total: int, progress: RichProgress):
        super().__init__(text, total)
        self._progress = progress
        self._task = progress.add_task(text, total=total)

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, description=self.text)


class _Lines(Reporter):
    def __init__(self, text: str, total: int, console: Console):
        super().__init__(text, total)
        self._console = console
        self._first: tuple[float, int] | None = None  # time and count of the first step
        self._last = 0.0

    def _show(self) -> None:
        if not self.done:
            return
        now = time.monotonic()
        if self._first is None:  # what was done before takes no time
            self._first, self._last = (now, self.done), now
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        start, done_at_start = self._first
        seconds_per_step = (now - start) / max(1, self.done - done_at_start)
        left = seconds_per_step * (self.total - self.done)
        self._console.print(
            f"{self.done:,}/{self.total:,}, {left:.0f} s left: {self.text}"
        )


@contextlib.contextmanager
def silent(text: str, total: int) -> Iterator[Reporter]:
    """Shows nothing."""
    yield Reporter(text, total)


def shown_on(console: Console) -> Progress:
    """Returns a `Progress` that shows a bar on a terminal, and lines elsewhere."""

    @contextlib.contextmanager
    def progress(text: str, total: int) -> Iterator[Reporter]:
        if not console.is_terminal:
            yield _Lines(text, total, console)
            return
        # A narrow terminal shortens the text, not the time left.
        flexible = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=flexible),
            *([BarColumn(bar_width=20)] if console.width >= _WIDE else []),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
        )
        shown = RichProgress(*columns, console=console, transient=True, expand=True)
        with shown as bar:
            yield _Bar(text, total, bar)

    return progress
