"""The methods of a study: baselines, and techniques that are compared with them.

Techniques that take two gradients per step are also compared with a baseline that
trains for twice the epochs.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import optax_tricks
from benchmarks.studies.tasks import StudyTask
from train.errors import UsageError
from train.optim.config import OptimizerConfig
from train.optim.techniques import TECHNIQUES
from train.settings import unknown_name

# The techniques of the four papers.
OURS = tuple(name for name in TECHNIQUES if name in optax_tricks.__all__)

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


def methods_of(
    task: StudyTask,
    names: Sequence[str] = OURS,
    base: OptimizerConfig | None = None,
) -> tuple[Method, ...]:
    """Returns the methods that compare some techniques with what they are added to.

    >>> from benchmarks.studies.tasks import STUDY_TASKS
    >>> [m.name for m in methods_of(STUDY_TASKS["segmentation"], ["sam"])]
    ['adam', 'adam, 2x epochs', 'sam']

    Args:
      task: the task to train for.
      names: techniques; several in one chain are joined by "+".
      base: settings of the base optimizer, which all techniques share; those of the
        task if None.

    Raises:
      UsageError: if a name is unknown or occurs twice, or if techniques cannot be
        joined.
    """
    chains = [_chain(name) for name in names]
    if not chains:
        raise UsageError(f"techniques must be one or more of {', '.join(TECHNIQUES)}")
    joined = ["+".join(chain) for chain in chains]
    for name in joined:
        if joined.count(name) > 1:
            raise UsageError(
                f"technique {name!r} is named twice: leave one of them out"
            )
    own_settings = dict(task.own_settings) if base is None else {}
    base = base or task.base
    if base.optimizer == "sgd":
        own_settings.setdefault(_STEP_TUNED, (_step_tuned(base), base.optimizer))

    longer = f"{base.optimizer}, 2x epochs"
    baselines = {
        base.optimizer: Method(name=base.optimizer, optimizer=base),
        longer: Method(name=longer, optimizer=base, epochs_factor=2),
    }
    methods = []
    for name, chain in zip(joined, chains, strict=True):
        optimizer, baseline = next(
            (
                own_settings[technique]
                for technique in chain
                if technique in own_settings
            ),
            (base, base.optimizer),
        )
        if baseline not in baselines:
            baselines[baseline] = Method(name=baseline, optimizer=optimizer)
        optimizer = dataclasses.replace(optimizer, techniques=chain)
        methods.append(
            Method(
                name=name,
                optimizer=optimizer,
                baseline=baseline,
                equal_gradients=longer if optimizer.gradients_per_step == 2 else None,
            )
        )
    needed = {name for m in methods for name in (m.baseline, m.equal_gradients)}
    return (*(m for m in baselines.values() if m.name in needed), *methods)


def _chain(name: str) -> tuple[str, ...]:
    """Returns the techniques of a method; what replaces the gradient comes first."""
    chain = tuple(_known(part.strip()) for part in name.split("+"))
    return tuple(sorted(chain, key=lambda x: -TECHNIQUES[x].gradients_per_step))


def _known(name: str) -> str:
    if name not in TECHNIQUES:
        error = unknown_name("technique", name, TECHNIQUES)
        hint = "; separate techniques by spaces, and join those of one chain by +"
        raise UsageError(f"{error}{hint if ',' in name else ''}")
    return name


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


def compared(methods: Sequence[Method]) -> Iterator[tuple[Method, str, str]]:
    """Yields each comparison: the method, its partner, and what both have in common."""
    for method in methods:
        if method.baseline:
            yield method, method.baseline, "epochs"
        if method.equal_gradients:
            yield method, method.equal_gradients, "gradients"
