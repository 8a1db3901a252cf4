"""The settings of a study."""

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.studies.methods import OURS, Method, methods_of
from benchmarks.studies.plan import parse_duration
from benchmarks.studies.tasks import STUDY_TASKS, StudyTask
from train.config import TrainingConfig
from train.data.config import DataConfig, Size
from train.errors import UsageError
from train.optim.config import OPTIMIZERS
from train.settings import AnyPath, Choice, Positive, refuse, settings


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
    techniques: Annotated[tuple[str, ...], pydantic.Field(strict=False)] = OURS
    """Techniques to compare, separated by spaces; those of one chain are joined by +,
    as in centralize+perturbed_unit_step. `sam` is there to compare with."""
    base_optimizer: Annotated[str, Choice("optimizer", OPTIMIZERS)] | None = None
    """Optimizer that the techniques are added to, with a learning rate; that of the
    task if unset."""
    learning_rate: Positive[float] | None = None
    """One learning rate for all methods, instead of their own rates."""
    trials: Annotated[int, pydantic.Field(ge=2)] | None = None
    """Learning rates to try for each method, at least 2, before it is compared with the
    best one. All methods try the same rates, on validation examples and from two seeds
    that are not compared."""
    epochs: Positive[int] | None = None
    """Passes over the training examples; within a budget, the most passes. 15 for
    classification and 10 for the others if unset."""
    batch_size: Positive[int] | None = None
    """Examples in a step; if unset, that of the task, or a tenth of the training
    examples if they are few."""
    seeds: Annotated[int, pydantic.Field(ge=2)] | None = None
    """Runs of each method, at least 2; all methods have the same seeds. 5 if unset;
    within a budget, the most runs, 20 if unset."""
    budget: Duration = None
    """Time for all of it, as 90s, 30m or 1.5h. As many seeds as fit are trained. If
    fewer than 3 fit, the epochs are cut for 3 seeds, and for 2 if they must be."""
    eval_split: Literal["test", "validation"] = "test"
    """Split to evaluate on; validation is for choosing settings, and holds out a fifth
    of the training examples if the dataset has no such split."""
    train_examples: Positive[int] | None = None
    """Train on so many of the training examples, of each class as many as possible;
    all of them if unset."""
    image_size: Size = None
    """Resize images to this height and width; needed only if they differ in size."""
    data_dir: AnyPath | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""

    def __post_init__(self) -> None:
        own = self.study_task.base.optimizer
        if self.base_optimizer not in (None, own) and self.learning_rate is None:
            raise UsageError(
                f"base_optimizer {self.base_optimizer} needs a learning_rate; only "
                f"{own} has one of its own here"
            )
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
                raise UsageError(f"trials and {name} exclude each other: {reason}")
        if self.eval_split == "validation":
            raise UsageError(
                "trials are judged on validation examples, so methods must be compared "
                "on others: leave eval_split out"
            )

    @property
    def study_task(self) -> StudyTask:
        """What the study knows about its task."""
        return STUDY_TASKS[self.task]

    @property
    def methods(self) -> tuple[Method, ...]:
        """The baselines and the techniques, with the settings of their optimizers."""
        base = self.study_task.base
        if self.base_optimizer in (None, base.optimizer):
            methods = methods_of(self.study_task, self.techniques)
        else:
            base = dataclasses.replace(base, optimizer=self.base_optimizer)
            methods = methods_of(self.study_task, self.techniques, base)
        if self.learning_rate is None:
            return methods
        return tuple(
            dataclasses.replace(
                method,
                optimizer=dataclasses.replace(
                    method.optimizer, learning_rate=self.learning_rate
                ),
            )
            for method in methods
        )

    @property
    def data(self) -> DataConfig:
        """The settings of the data."""
        default = self.study_task.config_type().data.dataset
        return DataConfig(
            dataset=self.dataset or default,
            eval_split=self.eval_split,
            train_examples=self.train_examples,
            image_size=self.image_size,
            data_dir=self.data_dir,
        )

    def run_config(
        self, method: Method, epochs: int, batch_size: int
    ) -> TrainingConfig:
        """Returns the settings of the runs of a method.

        Args:
          method: the method.
          epochs: epochs of the study, which a method may multiply.
          batch_size: examples in a step.
        """
        network: dict[str, Any] = {}
        if self.model is not None:
            network[self.study_task.network] = self.model
        return self.study_task.config_type(
            data=self.data,
            epochs=epochs * method.epochs_factor,
            batch_size=batch_size,
            optimizer=method.optimizer,
            **network,
        )

    def described(self) -> dict[str, Any]:
        """Returns what makes it another study.

        More seeds or more time belong to the same one.
        """
        all_settings = dataclasses.asdict(self)
        for name in ("seeds", "budget"):
            del all_settings[name]
        return all_settings | {
            "dataset": self.data.dataset,
            "methods": {m.name: dataclasses.asdict(m) for m in self.methods},
        }
