"""The settings of a study."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.studies.methods import (
    OURS,
    Method,
    is_step_tuned,
    methods_of,
    with_learning_rate,
    with_optimizer,
)
from benchmarks.studies.plan import parse_duration
from benchmarks.studies.tasks import STUDY_TASKS, StudyTask
from train.config import TrainingConfig
from train.data.config import DataConfig, Size
from train.errors import UsageError, see
from train.files import digest
from train.optim.config import OPTIMIZERS, OptimizerConfig
from train.settings import (
    AnyPath,
    Choice,
    Fraction,
    NonNegative,
    Positive,
    Separated,
    refuse,
    settings,
)
from train.tasks.recipes import RECIPES


def _parse_budget(arguments: list[str]) -> float | None:
    if arguments[0] == "None":
        return None
    try:
        return parse_duration(arguments[0])
    except UsageError as error:
        refuse(error)


Duration = Annotated[
    Positive[float] | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TIME",
        instance_from_str=_parse_budget,
        is_instance=lambda value: value is None or isinstance(value, float),
        str_from_instance=lambda value: [f"{value:g}s" if value else "None"],
    ),
]


@settings
class CompareConfig:
    """Train a baseline and each technique over the same seeds."""

    task: tyro.conf.Positional[Annotated[str, Choice("task", STUDY_TASKS)]]
    """Task of the networks."""
    dataset: str | None = None
    """Name of a prepared dataset, such as image_folder/NAME; `python -m train.data
    list` shows them. digits or digit_scenes if unset."""
    model: str | None = None
    """Network to train, or the generator for translation; a small one if unset."""
    techniques_on: Literal["generator", "both"] | None = None
    """Networks that are trained with the techniques, for translation; the generator if
    unset."""
    techniques: Annotated[tuple[str, ...], Separated(str)] = OURS
    """Techniques to compare; those of one chain are joined by +, as in
    centralize+perturbed_unit_step, and options follow a colon, as in sam:rho=0.1.
    `optimizer` is the place of the base optimizer, if not after all techniques."""
    optimizers: Annotated[tuple[str, ...], Separated(str)] = ()
    """Other optimizers to compare with the base optimizer."""
    base_optimizer: Annotated[str, Choice("optimizer", OPTIMIZERS)] | None = None
    """Optimizer that the techniques are added to; that of the task if unset."""
    recipe: Annotated[str, Choice("recipe", RECIPES)] | None = None
    """Settings of a paper for everything but the techniques, as `python -m train
    recipes` lists them; the flags that are given override them."""
    weights: AnyPath | None = None
    """Pretrained weights that all runs start from, of the backbone for segmentation.
    The head is new, and images are normalized as for ImageNet."""
    learning_rate: Positive[float] | None = None
    """One learning rate for all methods, instead of their own rates."""
    momentum: Fraction[float] | None = None
    """One momentum for all methods but Step-Tuned SGD, which has none. All of them then
    have the other settings of the base optimizer too."""
    weight_decay: NonNegative[float] | None = None
    """One weight decay for all methods, instead of their own."""
    trials: Annotated[int, pydantic.Field(ge=2)] | None = None
    """Learning rates to try for each method, at least 2, before it is compared with the
    best one. Methods with the same optimizer try the same rates, on validation examples
    and from two seeds that are not compared."""
    epochs: Positive[int] | None = None
    """Passes over the training examples; within a budget, the most passes. 15 for
    classification and 10 for the others if unset."""
    eval_every: Positive[int] = 1
    """Epochs between two points of the learning curves."""
    batch_size: Positive[int] | None = None
    """Examples in a step; if unset, that of the task, or a tenth of the training
    examples if they are few."""
    seeds: Annotated[int, pydantic.Field(ge=2)] | None = None
    """Runs of each method, at least 2; all methods have the same seeds. 5 if unset;
    within a budget, the most runs, 20 if unset."""
    budget: Duration = None
    """Time for all of it, as 90s, 30m or 1.5h. As many seeds as fit are trained. If
    fewer than 3 fit, the epochs are cut for 3 seeds, and for 2 if they must be."""
    runners: Positive[int] = 1
    """Processes that share the runs. Several commands with the same --run-dir share
    them too."""
    ray: str | None = None
    """Address of a Ray cluster whose workers are the runners, or `auto`. All of them
    must see --run-dir and the datasets under the same paths."""
    eval_split: Literal["test", "validation"] | None = None
    """Split to evaluate on, test if unset; validation is for choosing settings, and
    holds out a fifth of the training examples if the dataset has no such split."""
    train_examples: Positive[int] | None = None
    """Train on so many of the training examples, of each class as many as possible;
    all of them if unset."""
    image_size: Size = None
    """Resize images to this height and width; needed only if they differ in size."""
    data_dir: AnyPath | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""

    def __post_init__(self) -> None:
        if type(self._start) is not self.study_task.config_type:
            raise UsageError(f"recipe {self.recipe} is not for {self.task}")
        if self.weights is not None and self.task == "translation":
            raise UsageError("weights are not for translation: leave them out")
        if self.techniques_on is not None and self.task != "translation":
            raise UsageError("techniques_on is for translation alone: leave it out")
        if self.optimizers and self.learning_rate is not None:
            raise UsageError(
                "optimizers and learning_rate exclude each other: other optimizers "
                "need other rates; choose them with trials"
            )
        if self.budget is not None and self.runners > 1:
            raise UsageError("a budget is for one process: leave runners or it out")
        if self.ray is not None and self.runners == 1:
            raise UsageError("ray needs the number of runners, at least 2")
        if self.trials is not None:
            self._check_trials()
        for method in self.methods:
            self.run_config(method, 1, 1)  # refuses what does not fit the task

    def _check_trials(self) -> None:
        for name, reason in (
            ("learning_rate", "the trials choose one for each method"),
            ("budget", "it has no room for trials"),
        ):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"trials and {name} exclude each other: {reason}"
                    + see("compare.md#what-is-compared")
                )
        if self.data.eval_split == "validation":
            raise UsageError(
                "trials are judged on validation examples, so methods must be compared "
                "on others: leave eval_split out, or set it to test"
                + see("compare.md#what-is-compared")
            )

    @property
    def study_task(self) -> StudyTask:
        """What the study knows about its task."""
        return STUDY_TASKS[self.task]

    @property
    def _start(self) -> TrainingConfig:
        """The settings that the flags change."""
        return RECIPES[self.recipe]() if self.recipe else self.study_task.config_type()

    @property
    def base(self) -> OptimizerConfig:
        """The settings of the base optimizer."""
        base = self.study_task.base
        if self.recipe:
            base = dataclasses.replace(self._start.optimizer, techniques=())
        if self.base_optimizer not in (None, base.optimizer):
            base = with_optimizer(base, self.base_optimizer)
        return self._changed(base)

    def _changed(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Returns settings with those that are the same for all methods."""
        given: dict[str, Any] = {}
        if self.momentum is not None and not is_step_tuned(optimizer):
            given["momentum"] = self.momentum
        if self.weight_decay is not None:
            given["weight_decay"] = self.weight_decay
        if self.learning_rate is not None:
            optimizer = with_learning_rate(optimizer, self.learning_rate)
        return dataclasses.replace(optimizer, **given)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The baselines and what they are compared with, with their settings."""
        # The baseline of Random Gradient's own settings is named after their momentum.
        own = (
            not self.recipe
            and self.momentum is None
            and self.base.optimizer == self.study_task.base.optimizer
        )
        methods = methods_of(
            self.study_task,
            self.techniques,
            base=None if own else self.base,
            optimizers=self.optimizers,
        )
        return tuple(
            dataclasses.replace(method, optimizer=self._changed(method.optimizer))
            for method in methods
        )

    @property
    def data(self) -> DataConfig:
        """The settings of the data."""
        given: dict[str, Any] = {
            "dataset": self.dataset,
            "eval_split": self.eval_split,
            "train_examples": self.train_examples,
            "image_size": self.image_size,
            "data_dir": self.data_dir,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self._start.data, **given)

    @property
    def usual_epochs(self) -> int:
        """Passes over the training examples if there is no budget."""
        usual = self._start.epochs if self.recipe else self.study_task.epochs
        return self.epochs or usual

    @property
    def usual_batch_size(self) -> int:
        """Examples in a step if there are enough of them."""
        return self.batch_size or self._start.batch_size

    def run_config(
        self, method: Method, epochs: int, batch_size: int
    ) -> TrainingConfig:
        """Returns the settings of the runs of a method.

        Args:
          method: the method.
          epochs: epochs of the study, which a method may multiply.
          batch_size: examples in a step.
        """
        changes: dict[str, Any] = {}
        if self.model is not None:
            changes[self.study_task.network] = self.model
        if self.techniques_on is not None:
            changes["techniques_on"] = self.techniques_on
        if self.weights is not None:
            changes |= _pretrained(self.task, self.weights)
        epochs *= method.epochs_factor
        return dataclasses.replace(
            self._start,
            data=self.data,
            epochs=epochs,
            batch_size=batch_size,
            eval_every=self.eval_every,
            optimizer=_stretched(method.optimizer, epochs / self._start.epochs),
            **changes,
        )

    def described(self) -> dict[str, Any]:
        """Returns what makes it another study.

        More seeds or more time belong to the same one, and so does who runs them.
        """
        all_settings = dataclasses.asdict(self)
        for name in ("seeds", "budget", "runners", "ray"):
            del all_settings[name]
        return all_settings | {
            "dataset": self.data.dataset,
            "weights": self.weights and _named(self.weights),
            "methods": {m.name: dataclasses.asdict(m) for m in self.methods},
        }


def _pretrained(task: str, weights: Path) -> dict[str, Any]:
    """Returns the settings of runs that start from pretrained weights."""
    own: dict[str, Any] = {"backbone_weights": weights}
    if task == "classification":
        own = {"weights": weights, "new_head": True}
    return {"normalization": "imagenet", **own}


def _named(weights: Path) -> str:
    """Returns the name of a file and what tells it from others of the same name."""
    if not weights.is_file():
        raise UsageError(f"weights {weights} is not a file: give the path of one")
    return f"{weights.name}, sha256 {digest(weights)}"


def _stretched(optimizer: OptimizerConfig, factor: float) -> OptimizerConfig:
    """Returns the settings for a run of more epochs, or of fewer."""
    scaled = {max(1, round(factor * epoch)) for epoch in optimizer.milestones}
    return dataclasses.replace(optimizer, milestones=tuple(sorted(scaled)))
