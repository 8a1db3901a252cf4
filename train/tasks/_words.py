"""Shares of classes in words."""

from collections.abc import Sequence

import numpy as np


def in_words(shares: np.ndarray, class_names: Sequence[str], most: int = 5) -> str:
    """The largest shares first, in percent; none below a half.

    >>> in_words(np.array([0.0, 0.9, 0.1]), ["cat", "dog", "cow"])
    'dog 90 %, cow 10 %'
    """
    largest = np.argsort(-shares, kind="stable")[:most]
    return ", ".join(
        f"{class_names[i]} {100 * shares[i]:.0f} %"
        for i in largest
        if shares[i] > 0.005
    )
