"""The methods of a study: baselines, and what is compared with them.

Techniques that take two gradients per step are also compared with a baseline that
trains for twice the epochs.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import optax_tricks
from benchmarks.studies.tasks import StudyTask
from train.errors import UsageError
from train.optim.chain import PLACES
from train.optim.config import OPTIMIZERS, OptimizerConfig
from train.optim.techniques import TECHNIQUES
from train.settings import unknown_name

# The techniques of the four papers.
OURS = tuple(name for name in TECHNIQUES if name in optax_tricks.__all__)

# Learning rates to start from, for optimizers that a task has none for.
USUAL_RATES = {
    **{"sgd": 0.1, "sgdw": 0.1, "adagrad": 0.01, "rmsprop": 0.001},
    **{"adam": 0.001, "adamw": 0.001, "lamb": 0.01, "muon": 0.02},
}

_STEP_TUNED = "barzilai_borwein_step"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of the study.

    Attributes:
      name: the name of the method in tables.
      optimizer: the settings of its optimizer.
      baseline: the method that it is compared with at equal epochs; None for a
        baseline.
      equal_gradients: another method that takes the same number of gradients in all;
        None if the baseline does.
      epochs_factor: factor on the epochs of the study.
    """

    name: str
    optimizer: OptimizerConfig
    baseline: str | None = None
    equal_gradients: str | None = None
    epochs_factor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Chain:
    """The techniques of a method, and their options.

    Attributes:
      name: the name of the method.
      techniques: the names in the order of the chain.
      options: values of fields of `TechniqueOptions`.
    """

    name: str
    techniques: tuple[str, ...]
    options: dict[str, Any]


def methods_of(
    task: StudyTask,
    names: Sequence[str] = OURS,
    base: OptimizerConfig | None = None,
    optimizers: Sequence[str] = (),
) -> tuple[Method, ...]:
    """Returns the methods that compare some techniques with what they are added to.

    >>> from benchmarks.studies.tasks import STUDY_TASKS
    >>> segmentation = STUDY_TASKS["segmentation"]
    >>> [m.name for m in methods_of(segmentation, ["sam:rho=0.1"], None, ["sgd"])]
    ['adam', 'adam, 2x epochs', 'sgd', 'sam:rho=0.1']

    Args:
      task: the task to train for.
      names: techniques, with their options after colons; several in one chain are
        joined by "+". `optimizer` among them is the place of the base optimizer.
      base: settings of the base optimizer, which all techniques share; those of the
        task if None.
      optimizers: other optimizers to compare with the base optimizer.

    Raises:
      UsageError: if a name is unknown or occurs twice, or if techniques cannot be
        joined.
    """
    chains = list(map(_chain, names))
    if not chains and not optimizers:
        raise UsageError(f"techniques must be one or more of {', '.join(TECHNIQUES)}")
    own_settings = dict(task.own_settings) if base is None else {}
    base = base or task.base
    if base.optimizer == "sgd":
        own_settings.setdefault(_STEP_TUNED, (_step_tuned(base), base.optimizer))
    _check_twice("technique", [(c.name, (c.techniques, c.options)) for c in chains])
    _check_twice("optimizer", [(name, name) for name in (base.optimizer, *optimizers)])

    longer = f"{base.optimizer}, 2x epochs"
    baselines = {
        base.optimizer: Method(name=base.optimizer, optimizer=base),
        longer: Method(name=longer, optimizer=base, epochs_factor=2),
    }
    methods = [_other(base, name) for name in optimizers]
    for chain in chains:
        optimizer, baseline = next(
            (own_settings[name] for name in chain.techniques if name in own_settings),
            (base, base.optimizer),
        )
        if baseline not in baselines:
            baselines[baseline] = Method(name=baseline, optimizer=optimizer)
        optimizer = dataclasses.replace(
            optimizer, techniques=chain.techniques, **chain.options
        )
        methods.append(
            Method(
                name=chain.name,
                optimizer=optimizer,
                baseline=baseline,
                equal_gradients=longer if optimizer.gradients_per_step == 2 else None,
            )
        )
    needed = {name for m in methods for name in (m.baseline, m.equal_gradients)}
    return (*(m for m in baselines.values() if m.name in needed), *methods)


def _check_twice(what: str, named: Sequence[tuple[str, object]]) -> None:
    """Refuses names of which two mean the same."""
    meanings = [meaning for _, meaning in named]
    for name, meaning in named:
        if meanings.count(meaning) > 1:
            raise UsageError(f"{what} {name!r} is named twice: leave one of them out")


def _other(base: OptimizerConfig, name: str) -> Method:
    """Returns another optimizer as a method, with its usual learning rate."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    optimizer = with_optimizer(base, name)
    return Method(name=name, optimizer=optimizer, baseline=base.optimizer)


def with_optimizer(base: OptimizerConfig, name: str) -> OptimizerConfig:
    """Returns settings with another optimizer and its usual learning rate.

    The schedule of Step-Tuned SGD is not for other optimizers.
    """
    changed = with_learning_rate(base, USUAL_RATES[name])
    schedule = "cosine" if base.schedule == "robbins_monro" else base.schedule
    return dataclasses.replace(changed, optimizer=name, momentum=0.9, schedule=schedule)


def with_learning_rate(optimizer: OptimizerConfig, rate: float) -> OptimizerConfig:
    """Returns settings with another learning rate, and that of the head in proportion.

    >>> base = OptimizerConfig(learning_rate=0.01, head_learning_rate=0.1)
    >>> with_learning_rate(base, 0.02).head_learning_rate
    0.2
    """
    head = optimizer.head_learning_rate
    if head is not None:
        head *= rate / optimizer.learning_rate
    return dataclasses.replace(optimizer, learning_rate=rate, head_learning_rate=head)


def _chain(text: str) -> _Chain:
    """Parses the techniques of a method; what replaces the gradient comes first."""
    parts = sorted(map(_part, text.split("+")), key=lambda part: -_gradients(part[0]))
    techniques = tuple(name for name, _ in parts)
    if not TECHNIQUES.keys() & techniques:
        raise UsageError(
            f"{text} has no technique: join it with one, as optimizer+centralize"
        )
    return _Chain(
        name="+".join(
            ":".join([name, *(f"{key}={text}" for key, text in own.items())])
            for name, own in parts
        ),
        techniques=techniques,
        options={
            key: _value(name, key, text)
            for name, own in parts
            for key, text in own.items()
        },
    )


def _gradients(name: str) -> int:
    return 1 if name in PLACES else TECHNIQUES[name].gradients_per_step


def _part(text: str) -> tuple[str, dict[str, str]]:
    """Splits one technique of a chain into its name and the texts of its options."""
    name, *options = (part.strip() for part in text.split(":"))
    if name not in {**TECHNIQUES, **PLACES}:
        raise unknown_name("technique", name, TECHNIQUES)
    known = TECHNIQUES[name].options if name in TECHNIQUES else ()
    found: dict[str, str] = {}
    for option in options:
        key, value = (part.strip() for part in option.partition("=")[::2])
        if key not in known:
            raise unknown_name(f"option of {name}", key, known or ["none"])
        if key in found:
            raise UsageError(f"{key} of {name} is set twice: leave one of them out")
        found[key] = value
    return name, found


def _value(name: str, key: str, text: str) -> float | bool:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, float | int):
        raise UsageError(
            f"{key} of {name} must be a number, true or false, got {text!r}; write "
            f"{name}:{key}=VALUE"
        )
    return value


def _step_tuned(base: OptimizerConfig) -> OptimizerConfig:
    """Returns settings for Step-Tuned SGD, which has a schedule of its own.

    It has no momentum, so it takes the steps that SGD with momentum takes in the end.
    """
    return dataclasses.replace(
        base,
        momentum=0.0,
        learning_rate=round(base.learning_rate / (1 - base.momentum), 6),
        schedule="robbins_monro",
    )


def is_step_tuned(optimizer: OptimizerConfig) -> bool:
    """Whether the settings are those of Step-Tuned SGD, which has no momentum."""
    return _STEP_TUNED in optimizer.techniques and optimizer.optimizer == "sgd"


def compared(methods: Sequence[Method]) -> Iterator[tuple[Method, str, str]]:
    """Yields each comparison: the method, its partner, and what both have in common."""
    for method in methods:
        if method.baseline:
            yield method, method.baseline, "epochs"
        if method.equal_gradients:
            yield method, method.equal_gradients, "gradients"
