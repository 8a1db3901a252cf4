"""Progress is seen on a terminal of any width, and without one."""

import io

import pytest
from rich.console import Console

from train import progress


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_time_left_is_seen_on_a_terminal_of_any_width(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    with progress.shown_on(console)("writing", 60) as reporter:
        reporter.advance(30)
        reporter.describe("epoch 6/8 loss 0.0090 accuracy 0.9686 1,718 images/s")
        reporter.advance(20)
    last = [line for line in file.getvalue().split("\r") if "50/60" in line]
    assert last
    assert "left" in last[-1]
    assert "epoch 6/8" in last[-1]


def test_plain_lines_come_now_and_then(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.shown_on(progress.make_console())("writing", 10) as reporter:
        for _ in range(10):
            reporter.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "4/10, 24 s left: writing",
        "7/10, 12 s left: writing",
        "10/10, 0 s left: writing",
    ]


def test_what_was_done_before_does_not_count_as_fast(monkeypatch, capsys):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.shown_on(progress.make_console())("training", 100) as reporter:
        reporter.advance(90)  # steps of the checkpoint
        reporter.advance()
    assert capsys.readouterr().out == "91/100, 90 s left: training\n"


@pytest.mark.parametrize("width", ["20", "200"])
def test_text_is_shown_as_it_is(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", width)
    text = "written to [runs]/" + "long/" * 20
    progress.make_console().print(text)
    assert capsys.readouterr().out == text + "\n"


def test_silence_counts_too():
    with progress.silent("writing", 10) as reporter:
        reporter.advance(3)
    assert reporter.done == 3
