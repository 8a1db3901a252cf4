"""Sweeps over many points, of which continuous integration tests a part."""

import pytest


def parts(count: int) -> list:
    """Numbers the parts of a sweep: all but the first wait for `make sweep`.

    Each part is to take one point in `count`. Events come in turns, such as writing a
    file, bringing it to disk and renaming it, so `count` should be a prime above 3.
    """
    return [0, *(left_to_sweep(part) for part in range(1, count))]


def left_to_sweep(value):
    """A parameter of a test that waits for `make sweep`."""
    return pytest.param(value, marks=pytest.mark.sweep)
