"""What all benchmarks share: their command line, folders and tables."""

import csv
import dataclasses
import re

import pytest
from rich.console import Console

from benchmarks.report import make_table, open_report, rows_of
from benchmarks.timing import Ratio
from train.output.run_folder import RunFolderError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transforms", "--rounds", 0), "rounds must be greater than 0, got 0"),
        (("input", "--rounds", 0), "rounds must be greater than 0, got 0"),
        (("loop", "--rounds", 0), "rounds must be greater than 0, got 0"),
        (("speed", "--rounds", 0), "rounds must be greater than 0, got 0"),
        (("networks", "--batch-size", 0), "batch_size must be greater than 0, got 0"),
        (
            ("networks", "--names", "resnet8", "alexnet*"),
            r"no network is named 'alexnet\*'; known: ",
        ),
        (
            ("compare", "classification", "--seeds", 1),
            "seeds must be greater than or equal to 2, got 1",
        ),
        (
            ("compare", "classification", "--learning-rate", -1),
            "learning_rate must be greater than 0, got -1.0",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    run, arguments, message, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        run(*arguments, "--run-dir", tmp_path / "run")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line)
    assert not (tmp_path / "run").exists()


@dataclasses.dataclass
class Measurement:
    name: str
    ratio: Ratio


def test_a_report_saves_rows_and_says_where(tmp_path, capsys):
    config = {"rounds": 1}
    with open_report("name", config, tmp_path / "run") as report:
        report.folder.start()
        measurements = [Measurement("a", Ratio(1.0, 0.5, 2.0))]
        report.save_rows(rows_of(measurements, {"pillow": "12.0"}))
    assert capsys.readouterr().out == f"Written to {tmp_path / 'run'}\n"
    with (tmp_path / "run" / "rows.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == "a"
    limits = [row[f"ratio_{name}"] for name in ("median", "low", "high")]
    assert limits == ["1.0", "0.5", "2.0"]
    assert row["pillow"] == "12.0"
    for column in ("commit", "python", "jax", "device", "processor"):
        assert row[column]
    with (
        pytest.raises(RunFolderError, match="already holds this run"),
        open_report("name", config, tmp_path / "run"),
    ):
        pass
    with open_report("name", config, tmp_path / "run", resume=True) as report:
        assert report.folder.config == config


def test_a_table_that_is_too_wide_loses_nothing():
    console = Console(width=30)
    with console.capture() as captured:
        console.print(make_table(("name", "value"), [("long " * 6, "word " * 6)]))
    printed = captured.get()
    assert "…" not in printed
    assert (printed.count("long"), printed.count("word")) == (6, 6)
