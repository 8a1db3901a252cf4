"""What every benchmark leaves behind: rows in a folder, and tables on the console."""

import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from train.output.run_folder import RunFolder, environment, open_run_folder
from train.progress import make_console

Row = dict[str, Any]
Cells = Sequence[str]

# The rows of a benchmark that continues where it was stopped.
ROWS = "rows.jsonl"


class Report:
    """Saves and shows the results of a benchmark.

    Attributes:
      folder: the folder to write to.
      console: where tables are shown.
    """

    def __init__(self, folder: RunFolder, console: Console):
        self.folder = folder
        self.console = console

    def save_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `rows.csv`, with the columns of the first row."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        self.folder.write_text("rows.csv", file.getvalue())

    def append_row(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends a row to a CSV file; it is on disk when this returns.

        Args:
          name: name of the file, all of whose rows have the same columns.
          row: the values by column.
        """
        path = self.folder.path / name
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def show(self, header: Cells, rows: Sequence[Cells], title: str = "") -> None:
        """Prints a table under its title."""
        if title:
            self.console.print(f"\n{title}")
        self.console.print(make_table(header, rows), soft_wrap=False)


@contextlib.contextmanager
def open_report(
    name: str,
    config: Mapping[str, Any],
    run_dir: Path | None,
    *,
    resume: bool = False,
    quiet: bool = False,
    share: bool = False,
) -> Iterator[Report]:
    """Opens the folder of a benchmark, and says at the end where it is.

    Args:
      name: the beginning of the name of a new folder.
      config: all settings.
      run_dir: the folder; a new one under runs/ if unset.
      resume: whether a folder with results of the same settings may be continued.
      quiet: whether nothing is printed.
      share: whether to wait for another process that has the folder.

    Raises:
      RunFolderError: if the folder cannot be used.
    """
    console = make_console(quiet=quiet)

    def on_wait() -> None:
        console.print("waiting for another process that plans this study")

    with open_run_folder(
        run_dir,
        name,
        dict(config),
        resume=resume,
        on_wait=on_wait if share else None,
    ) as folder:
        yield Report(folder, console)
        console.print(f"Written to {folder.path}")


def make_table(header: Cells, rows: Sequence[Cells]) -> Table:
    """Makes a narrow table, as log files have 80 columns; cells wrap if they must."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(header: Cells, rows: Sequence[Cells]) -> str:
    """Returns a table in Markdown.

    >>> print(markdown(("method", "ms"), [("sgd", "1.5")]), end="")
    | method | ms |
    | --- | --- |
    | sgd | 1.5 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def with_range(value: float, low: float, high: float, spec: str = ".2f") -> str:
    """Formats a number with the limits of its range.

    >>> with_range(1.0, 0.5, 2.0), with_range(1.0, -0.5, 2.0, "+.1f")
    ('1.00 [0.50, 2.00]', '+1.0 [-0.5, +2.0]')
    """
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def rows_of(
    measurements: Sequence[Any], versions: Mapping[str, str] | None = None
) -> list[Row]:
    """Turns measurements into rows that also state versions and hardware.

    Args:
      measurements: dataclasses with a field `ratio`, a `benchmarks.timing.Ratio`, which
        becomes the columns ratio_median, ratio_low and ratio_high.
      versions: further versions, by the name of the package.
    """
    where = environment() | dict(versions or {})
    rows = [dataclasses.asdict(measurement) | where for measurement in measurements]
    for row in rows:
        row |= {f"ratio_{k}": v for k, v in row.pop("ratio")._asdict().items()}
    return rows
