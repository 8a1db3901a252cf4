"""A second gradient leaves BatchNorm as plain SGD does, in every task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.shared import one_device_mesh
from train.data import Dataset
from train.data.dataset import Field, Reader, Split
from train.data.loaders import InMemoryLoader
from train.optim.config import OptimizerConfig
from train.program import Program
from train.tasks import TASKS

EXAMPLES = 4
IMAGE = Field(feature="x", kind="image", channels=3)
FIELDS = {
    "classification": {"image": IMAGE, "label": Field(feature="y", kind="label")},
    "segmentation": {"image": IMAGE, "mask": Field(feature="y", kind="mask")},
    "translation": {"input": IMAGE, "target": IMAGE},
}
SIDES = {"classification": 8, "segmentation": 16, "translation": 64}
OPTIONS = {"translation": {"techniques_on": "both"}}


@functools.cache
def state_after_a_step(name, techniques):
    """Returns the state of the networks before and after a step, and parameters."""
    task_type = TASKS[name]
    side = SIDES[name]
    reader = Reader(fields=FIELDS[name], size=(side, side), fit="crop")
    split = Split(name="train", records=(), reader=reader, cache=None, rows=range(0))
    dataset = Dataset(
        name="random",
        task=name,
        splits={"train": split},
        class_names=("a", "b", "c") if name != "translation" else (),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    config = task_type.config_type(
        **OPTIONS.get(name, {}),
        batch_size=EXAMPLES,
        optimizer=OptimizerConfig(techniques=techniques, learning_rate=0.01),
    )
    random = np.random.default_rng(0)
    arrays = {
        field: random.integers(0, 255 if dtype == np.uint8 else 3, (EXAMPLES, *shape))
        .clip(max=2 if field == "mask" else None)
        .astype(dtype)
        for field, (shape, dtype) in reader.spec.items()
    }
    mesh = one_device_mesh()
    loader = InMemoryLoader(arrays, mesh)
    task = task_type.create(config, dataset)
    program = Program(task, config, train_loader=loader, eval_loader=loader, mesh=mesh)
    state = program.init_state(0)
    before = jax.tree.map(jnp.copy, state.model_state)
    state = program.train_step(state, next(program.feeds(0)))
    return before, state.model_state, state.params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "technique"),
    [
        ("classification", "perturbed_unit_step"),
        ("classification", "barzilai_borwein_step"),
        ("segmentation", "perturbed_unit_step"),
        ("translation", "perturbed_unit_step"),
    ],
)
def test_statistics_are_those_of_plain_sgd(name, technique):
    before, plain, plain_params = state_after_a_step(name, ())
    _, other_state, other_params = state_after_a_step(name, (technique,))
    norms = 0
    for (path, leaf), (_, other), (_, old) in zip(
        *map(jax.tree.leaves_with_path, (plain, other_state, before)), strict=True
    ):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        np.testing.assert_allclose(
            leaf, other, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
        )
        norms += path[-1].key in ("mean", "var")
        assert path[-1].key == "count" or (leaf != old).any()
    assert norms >= 4
    assert any(
        (np.abs(a - b) > 1e-4).any()
        for a, b in zip(
            *map(jax.tree.leaves, (plain_params, other_params)), strict=True
        )
    )
