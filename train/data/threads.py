"""Maps a function over items in threads."""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields `function(item)` for each item in order, computed in threads.

    Only a few results wait to be taken at any time, so the memory does not grow with
    the number of items. PIL decodes without holding Python's lock, so that decoding
    large images uses all cores.

    >>> list(map_threads(len, ["a", "bc"]))
    [1, 2]
    """
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        window = collections.deque(
            pool.submit(function, item)
            for item in itertools.islice(items, 4 * (os.cpu_count() or 1))
        )
        while window:
            result = window.popleft().result()
            window.extend(pool.submit(function, x) for x in itertools.islice(items, 1))
            yield result
