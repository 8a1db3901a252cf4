import sys

import pytest

import benchmarks.__main__ as command_line


@pytest.fixture
def run(monkeypatch):
    """Runs `python -m benchmarks` with some arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        command_line.main()

    return run
