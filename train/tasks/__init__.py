"""The tasks that networks are trained for, one file for each."""

from train.config import TrainingConfig
from train.data import Dataset
from train.progress import Progress, silent
from train.tasks.base import Task, check_images
from train.tasks.classification import Classification
from train.tasks.segmentation import Segmentation
from train.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Segmentation, Translation)
}

__all__ = ["TASKS", "Task", "open_task"]


def open_task(
    config: TrainingConfig, progress: Progress = silent
) -> tuple[Task, Dataset]:
    """Loads the data of a run and makes its task.

    Raises:
      UsageError: if config, data and networks do not fit together.
    """
    dataset = config.data.load(config.task, progress)
    task = TASKS[config.task].create(config, dataset)
    check_images(task, dataset)
    return task, dataset
