"""Four gradient techniques as optax gradient transformations.

Each factory returns an `optax.GradientTransformationExtraArgs`, which can stand in an
`optax.chain` with any other. `optax_tricks.nnx`, which is imported by its full name and
needs Flax, computes the two gradients that some of the techniques evaluate per step.
"""

from optax_tricks._barzilai_borwein_step import (
    BarzilaiBorweinStepState,
    barzilai_borwein_step,
)
from optax_tricks._centralize import centralize
from optax_tricks._global_norms import global_norms
from optax_tricks._logged_scalars import logged_scalars
from optax_tricks._perturbed_unit_step import (
    PerturbedUnitStepState,
    perturbed_unit_step,
)
from optax_tricks._pugd import pugd
from optax_tricks._scale_by_random import ScaleByRandomState, scale_by_random
from optax_tricks._step_tuned_sgd import step_tuned_sgd
from optax_tricks._triangular_schedule import triangular_schedule

__version__ = "0.1.0"

__all__ = [
    "BarzilaiBorweinStepState",
    "PerturbedUnitStepState",
    "ScaleByRandomState",
    "barzilai_borwein_step",
    "centralize",
    "global_norms",
    "logged_scalars",
    "perturbed_unit_step",
    "pugd",
    "scale_by_random",
    "step_tuned_sgd",
    "triangular_schedule",
]
