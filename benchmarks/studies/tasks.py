"""What a study has to know about each task: its score, and the settings of its runs."""

import dataclasses
from collections.abc import Callable, Mapping

from train.config import TrainingConfig
from train.data import Dataset
from train.optim.config import OptimizerConfig
from train.tasks.classification import ClassificationConfig
from train.tasks.segmentation import SegmentationConfig
from train.tasks.translation import TranslationConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StudyTask:
    """A task as a study sees it. Scores are in [0, 1] and are shown in percent.

    Attributes:
      config_type: the settings of its runs.
      score: the name of the score.
      title: the score in words.
      error_title: the distance from the best score in words.
      lower_is_better: whether a lower score is better.
      worst: the score of a run that diverged, from the dataset and the split.
      network: the setting that names the network.
      epochs: passes over the training examples, if none are set.
      base: settings of the base optimizer.
      own_settings: techniques that have the settings of their paper instead, each with
        the name of the baseline that has them too.
    """

    config_type: type[TrainingConfig]
    score: str
    title: str
    error_title: str
    lower_is_better: bool = False
    worst: Callable[[Dataset, str], float]
    network: str = "model"
    epochs: int
    base: OptimizerConfig
    own_settings: Mapping[str, tuple[OptimizerConfig, str]] = dataclasses.field(
        default_factory=dict
    )

    def better(self, score: float, than: float) -> float:
        """Returns by how much a score is better than another; negative if worse."""
        return than - score if self.lower_is_better else score - than

    def error(self, score: float) -> float:
        """Returns the distance of a score from the best one."""
        return score if self.lower_is_better else 1 - score


def _guessing(dataset: Dataset, split: str) -> float:
    """Returns the accuracy of guessing."""
    del split
    return 1 / dataset.num_classes


def _one_class(dataset: Dataset, split: str) -> float:
    """Returns the mean IoU of one who takes all pixels for the commonest class."""
    found = dataset.class_counts.get(split, dataset.class_counts["train"])
    counts = found[: dataset.num_classes]
    return float(counts.max() / counts.sum() / (counts > 0).sum())


# SGD, Gradient Centralization and PUGD have the momentum, decay and schedule of the
# paper on PUGD. (The paper on Gradient Centralization lowers the rate in steps.) Random
# Gradient has the settings of its paper's code. Step-Tuned SGD has its own schedule and
# no momentum. Its paper does not state the decay, so it has the decay of SGD. The
# papers' learning rates are for other networks and data, so each method has the best of
# the same six rates on held-out training images; see docs/digits.md.
_SGD = OptimizerConfig(learning_rate=0.3)
_RANDOM_GRADIENT = OptimizerConfig(
    learning_rate=1.0, momentum=0.5, weight_decay=1e-4, schedule="poly"
)
_STEP_TUNED = OptimizerConfig(
    learning_rate=3.0, momentum=0.0, weight_decay=5e-4, schedule="robbins_monro"
)
_RANDOM = (
    *("scale_by_random", "scale_by_mean", "scale_each_by_random", "scale_by_triangle"),
)

STUDY_TASKS = {
    "classification": StudyTask(
        config_type=ClassificationConfig,
        score="accuracy",
        title="accuracy",
        error_title="error",
        worst=_guessing,
        epochs=15,
        base=_SGD,
        own_settings={
            **dict.fromkeys(_RANDOM, (_RANDOM_GRADIENT, "sgd, momentum 0.5")),
            "barzilai_borwein_step": (_STEP_TUNED, "sgd"),
        },
    ),
    "segmentation": StudyTask(
        config_type=SegmentationConfig,
        score="mean_iou",
        title="mean IoU",
        error_title="1 - mean IoU",
        worst=_one_class,
        epochs=10,
        base=SegmentationConfig().optimizer,
    ),
    "translation": StudyTask(
        config_type=TranslationConfig,
        score="l1",
        title="L1 error",
        error_title="L1 error",
        lower_is_better=True,
        worst=lambda dataset, split: 1.0,
        network="generator",
        epochs=10,
        base=TranslationConfig().optimizer,
    ),
}
