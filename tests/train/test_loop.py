import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.data.inputs import Resident
from train.loop import NonFiniteLossError, fit, make_program
from train.optimizers import OptimizerConfig


@dataclasses.dataclass
class Regression:
    """The smallest task there is; `bad_step` makes its loss NaN there."""

    bad_weight: float = math.inf

    def create_model(self, rngs):
        return nnx.Linear(2, 1, rngs=rngs)

    def prepare(self, batch, key):
        return batch

    def _losses(self, model, batch):
        return jnp.square(model(batch["x"])[:, 0] - batch["y"])

    def loss(self, model, batch):
        loss = self._losses(model, batch).mean()
        steep = jnp.abs(model.kernel[...]).max() > self.bad_weight
        return jnp.where(steep, jnp.nan, loss), {}

    def evaluate(self, model, batch):
        weight = batch["weight"]
        return {"error": ((self._losses(model, batch) * weight).sum(), weight.sum())}


def make_data(n, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([2.0, -1.0])}


def program(task=None, *, epochs=3, num_test=10, batch_size=8, **optimizer):
    return make_program(
        task or Regression(),
        OptimizerConfig(**{"weight_decay": 0.0} | optimizer),
        train=Resident(make_data(30)),
        test=Resident(make_data(num_test, seed=1)),
        batch_size=batch_size,
        epochs=epochs,
    )


def records(program, seed=0, epochs=3):
    found = []
    state = fit(program, jax.random.key(seed), epochs, on_epoch=found.append)
    return found, state


def test_it_learns_and_reports():
    found, state = records(program(epochs=30), epochs=30)
    assert [r["epoch"] for r in found] == list(range(1, 31))
    # 30 examples in batches of 8: no example is left out of an epoch.
    assert [r["step"] for r in found] == [30 * epoch // 8 for epoch in range(1, 31)]
    assert int(state.step) == 112
    assert found[-1]["test_error"] < 0.01 < found[0]["test_error"]
    assert found[-1]["train_loss"] < 0.01
    assert found[0]["learning_rate"] > found[-1]["learning_rate"] > 0
    for name in ("train_gradient_norm", "train_update_norm", "train_parameter_norm"):
        assert found[0][name] > 0
    assert all(record["seconds"] > 0 for record in found)


def test_same_seed_same_numbers_other_seed_others():
    compiled = program(tricks=("random",))

    def numbers(seed):
        found, state = records(compiled, seed)
        return [{k: v for k, v in r.items() if k != "seconds"} for r in found], state

    first, state = numbers(0)
    second, same_state = numbers(0)
    other, _ = numbers(1)
    assert first == second
    chex.assert_trees_all_equal(state.params, same_state.params)
    assert first[0]["train_loss"] != other[0]["train_loss"]
    assert first[0]["train_random_factor"] != other[0]["train_random_factor"]


@pytest.mark.parametrize("num_test", [1, 10, 1024, 1025])
def test_evaluation_counts_every_example_once(num_test):
    compiled = program(num_test=num_test)
    _, state = records(compiled, epochs=1)
    data = make_data(num_test, seed=1)
    kernel, bias = state.params["kernel"], state.params["bias"]
    predicted = data["x"] @ np.asarray(kernel)[:, 0] + np.asarray(bias)
    expected = np.square(predicted - data["y"]).mean()
    for _ in range(3):
        found = compiled.evaluate(state)["test_error"]
        assert found == pytest.approx(expected, rel=1e-4)


def test_evaluation_leaves_batch_statistics_out():
    class Normalised(Regression):
        def create_model(self, rngs):
            layers = nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            return nnx.Sequential(*layers, nnx.Linear(4, 1, rngs=rngs))

        def loss(self, model, batch):
            return self._losses(model, batch).mean(), {}

    # With statistics of the batch, one example would be its own mean.
    compiled = program(Normalised(), num_test=1)
    other = program(Normalised(), num_test=10)
    _, state = records(compiled, epochs=1)
    first = other.evaluate(state)["test_error"]
    rest = make_data(10, seed=1)
    single = [
        make_program(
            Normalised(),
            OptimizerConfig(),
            train=Resident(make_data(30)),
            test=Resident({k: v[i : i + 1] for k, v in rest.items()}),
            batch_size=8,
            epochs=1,
        ).evaluate(state)["test_error"]
        for i in (0, 9)
    ]
    assert compiled.evaluate(state)["test_error"] == pytest.approx(single[0], rel=1e-4)
    assert first != pytest.approx(single[0], rel=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    # Full batches of one direction: the kernel grows from step to step.
    task = Regression(bad_weight=1.9)
    compiled = program(task, epochs=20, batch_size=30, learning_rate=0.05)
    with pytest.raises(NonFiniteLossError, match=r"step (\d+) .*lower the") as error:
        records(compiled, epochs=20)
    found = []
    good = program(epochs=20, batch_size=30, learning_rate=0.05)
    state = good.init(jax.random.key(0))
    # The same run step by step: which is the first step taken at a steep kernel?
    for step, feed in zip(range(20), good.feeds(jax.random.key(1), 0), strict=False):
        if float(jnp.abs(state.params["kernel"]).max()) > 1.9:
            found.append(step)
        state, _ = good.step(state, feed)
    assert error.value.step == found[0] > 0


@pytest.mark.parametrize("batch_size", [0, -1, 31])
def test_a_batch_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"{batch_size} must be from 1 to the 30"):
        program(batch_size=batch_size)


def test_step_is_compiled_once():
    # A compiled program cannot be traced again; a state that changed its form from
    # step to step would be refused instead.
    for tricks in ((), ("random", "centralize"), ("perturbed_unit",)):
        compiled = program(tricks=tricks, epochs=5)
        assert isinstance(compiled.step, jax.stages.Compiled)
        records(compiled, epochs=5)
