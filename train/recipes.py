"""Settings of the papers by name, for `--recipe`."""

from collections.abc import Callable

from train.config import TrainingConfig

RECIPES: dict[str, Callable[[], TrainingConfig]] = {}
