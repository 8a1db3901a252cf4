import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.shared import one_device_mesh
from train.config import TrainingConfig
from train.data.loaders import InMemoryLoader
from train.parallel import make_mesh
from train.errors import UsageError
from train.loop import NonFiniteLossError, fit
from train.optim.optimizer import OptimizerConfig
from train.program import Program
from train.step import make_train_step, new_state


@dataclasses.dataclass
class Regression:
    """The smallest task there is; its loss is NaN where the kernel is steep."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    bad_weight: float = math.inf

    def create_networks(self, rngs):
        return {"model": nnx.Linear(2, 1, rngs=rngs)}

    def load(self, models):
        pass

    def optimizer_config(self, name):
        return self.optimizer

    def prepare(self, batch, key):
        return batch

    def _losses(self, model, batch):
        return jnp.square(model(batch["x"])[:, 0] - batch["y"])

    def loss(self, name, models, batch):
        loss = self._losses(models[name], batch).mean()
        if not hasattr(models[name], "kernel"):
            return loss, {}
        steep = jnp.abs(models[name].kernel[...]).max() > self.bad_weight
        return jnp.where(steep, jnp.nan, loss), {}

    def evaluate(self, models, batch):
        weight = batch["weight"]
        errors = self._losses(models["model"], batch) * weight
        return {"error": errors.sum(), "count": weight.sum()}

    def scores(self, totals):
        return {"error": totals["error"] / totals["count"]}


def make_data(n, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([2.0, -1.0])}


ONE_DEVICE = one_device_mesh()


def program(
    task=None, *, num_test=10, mesh=ONE_DEVICE, width=1, per_call=1, config=None, **kw
):
    settings = {"weight_decay": 0.0} | kw
    task = task or Regression()
    task.optimizer = OptimizerConfig(**settings)
    config = {"epochs": 3, "batch_size": 8} | (config or {})
    return Program(
        task,
        TrainingConfig(optimizer=task.optimizer, **config),
        train=InMemoryLoader(make_data(30), mesh),
        test=InMemoryLoader(make_data(num_test, seed=1), mesh),
        mesh=mesh,
        width=width,
        steps_per_call=per_call,
    )


def run(program, seeds=(0,), **resumed):
    """Records of epochs, of steps, and the last states."""
    epochs, steps = [], []
    for report in fit(program, seeds, **resumed):
        epochs += report.epoch
        steps += report.logs
    return epochs, steps, report.states


def without_seconds(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_it_learns_and_reports():
    found, _, (state,) = run(program(config={"epochs": 30}))
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
    compiled = program(techniques=("scale_by_random",))
    first, _, (state,) = run(compiled)
    second, _, (same_state,) = run(compiled)
    other, _, _ = run(compiled, seeds=(1,))
    assert without_seconds(first) == without_seconds(second)
    chex.assert_trees_all_equal(state.params, same_state.params)
    assert first[0]["train_loss"] != other[0]["train_loss"]
    assert first[0]["train_random_factor"] != other[0]["train_random_factor"]


def test_steps_are_logged_and_epochs_are_their_means():
    epochs, steps, _ = run(program(config={"log_every": 1}))
    assert [r["step"] for r in steps] == list(range(1, 12))
    ends = [0, *(r["step"] for r in epochs)]
    for i, record in enumerate(epochs):
        inside = [r["train_loss"] for r in steps[ends[i] : ends[i + 1]]]
        assert record["train_loss"] == pytest.approx(np.mean(inside), rel=1e-6)
        assert (
            record["train_update_norm"] == steps[ends[i + 1] - 1]["train_update_norm"]
        )
    # Every second step, and the last of every epoch.
    _, sparse, _ = run(program(config={"log_every": 2}))
    assert [r["step"] for r in sparse] == [2, 3, 4, 6, 7, 8, 10, 11]
    assert [r for r in steps if r["step"] in (2, 3, 4, 6, 7, 8, 10, 11)] == sparse


def test_evaluation_is_as_often_as_asked_for_and_at_the_end():
    epochs, _, _ = run(program(config={"eval_every": 2}))
    assert ["test_error" in r for r in epochs] == [False, True, True]
    assert all("train_loss" in r for r in epochs)


@pytest.mark.parametrize("per_call", [2, 3, 50])
def test_several_steps_in_a_call_are_the_same_steps(per_call):
    expected, logs, (state,) = run(program(techniques=("scale_by_random",)))
    compiled = program(techniques=("scale_by_random",), per_call=per_call)
    found, other_logs, (other,) = run(compiled)
    assert len(found) == len(expected)
    for a, b in zip(found + other_logs, expected + logs, strict=True):
        a, b = without_seconds([a, b])
        assert a == pytest.approx(b, rel=1e-5)
    chex.assert_trees_all_close(other.params, state.params, rtol=1e-5)
    assert int(other.step) == int(state.step)


@pytest.mark.parametrize(
    "tricks", [(), ("scale_by_random",), ("barzilai_borwein_step",), ("perturbed_unit_step",)]
)
def test_seeds_trained_together_are_those_trained_alone(tricks):
    alone, _, states = run(program(techniques=tricks), seeds=(3, 4, 5))
    compiled = program(techniques=tricks, width=3)
    together, _, (stacked,) = run(compiled, seeds=(3, 4, 5))
    assert [(r["epoch"], r["seed"]) for r in together] == [
        (epoch, seed) for epoch in (1, 2, 3) for seed in (3, 4, 5)
    ]
    for a, b in zip(together, alone, strict=True):
        a, b = without_seconds([a, b])
        assert a == pytest.approx(b, rel=1e-4)
    for i, state in enumerate(states):
        one = jax.tree.map(lambda x, i=i: x[i], stacked.params)
        chex.assert_trees_all_close(one, state.params, rtol=1e-4)


def test_average_is_the_moving_average_and_is_evaluated():
    compiled = program(config={"ema": 0.5, "log_every": 1, "batch_size": 30})
    state = compiled.init((0,))
    average = jax.tree.map(np.array, state.average[0]["model"])
    data = make_data(10, seed=1)
    feeds = compiled.feeds((0,), 0)
    for _ in range(3):
        state = compiled.train(state, next(feeds), 1)
        average = jax.tree.map(lambda a, p: (a + p) / 2, average, state.params["model"])
    chex.assert_trees_all_close(state.average[0]["model"], average, rtol=1e-6)
    predicted = data["x"] @ np.asarray(average["kernel"])[:, 0] + average["bias"]
    (totals,) = compiled.evaluate(state)
    expected = np.square(predicted - data["y"]).mean()
    assert compiled.task.scores(totals)["error"] == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_from_its_states():
    compiled = program(techniques=("scale_by_random",), config={"log_every": 2})
    expected, logs, (end, _) = run(compiled, seeds=(0, 1))
    stopped = fit(compiled, (0, 1))
    for report in stopped:
        if int(report.states[1].step) == 1:  # inside an epoch, seeds apart
            break
    assert int(report.states[0].step) == 3
    states = jax.tree.map(jnp.copy, report.states)
    stopped.close()
    found, later, (first, _) = run(compiled, seeds=(0, 1), states=states)
    assert without_seconds(found) == without_seconds(expected)
    chex.assert_trees_all_equal(first.params, end.params)
    assert later == [r for r in logs if r["step"] > (3 if r["seed"] == 0 else 1)]


@pytest.mark.parametrize("num_test", [1, 10, 1024, 1025])
def test_evaluation_counts_every_example_once(num_test):
    compiled = program(num_test=num_test)
    _, _, (state,) = run(compiled)
    data = make_data(num_test, seed=1)
    model = state.params["model"]
    kernel, bias = model["kernel"], model["bias"]
    predicted = data["x"] @ np.asarray(kernel)[:, 0] + np.asarray(bias)
    expected = np.square(predicted - data["y"]).mean()
    for _ in range(3):
        found = error(compiled, state)
        assert found == pytest.approx(expected, rel=1e-4)


def error(program, state):
    (totals,) = program.evaluate(state)
    return program.task.scores(totals)["error"]


class Normalised(Regression):
    def create_networks(self, rngs):
        layers = nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        return {"model": nnx.Sequential(*layers, nnx.Linear(4, 1, rngs=rngs))}


def test_evaluation_leaves_batch_statistics_out():
    # With statistics of the batch, one example would be its own mean.
    compiled = program(Normalised())
    _, _, (state,) = run(compiled)
    rest = make_data(10, seed=1)
    singles = [
        Program(
            Normalised(),
            compiled.config,
            train=InMemoryLoader(make_data(30)),
            test=InMemoryLoader({k: v[i : i + 1] for k, v in rest.items()}),
            mesh=ONE_DEVICE,
        )
        for i in range(10)
    ]
    errors = [error(single, state) for single in singles]
    assert np.std(errors) > 0.01
    assert error(compiled, state) == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    # Full batches of one direction: the kernel grows from step to step.
    settings = {"learning_rate": 0.05}
    config = {"epochs": 20, "batch_size": 30, "log_every": 4}
    compiled = program(Regression(bad_weight=1.9), config=config, **settings)
    seen = []

    def train():
        for report in fit(compiled, (0,)):
            seen.append(int(report.states[0].step))

    with pytest.raises(NonFiniteLossError, match=r"step (\d+) .*lower the") as raised:
        train()
    # The same run step by step: which is the first step taken at a steep kernel?
    good = program(config=config, **settings)
    state, feeds, steep = good.init((0,)), good.feeds((0,), 0), []
    for step in range(20):
        if float(jnp.abs(state.params["model"]["kernel"]).max()) > 1.9:
            steep.append(step)
        state = good.train(state, next(feeds), 1)
    assert raised.value.step == steep[0] > 0
    # It stopped at the end of the epoch, which is one step.
    assert max(seen) == steep[0]


def test_parameters_that_are_not_finite_stop_the_run_though_the_loss_is():
    compiled = program(config={"epochs": 1, "batch_size": 30}, learning_rate=1e38)
    with pytest.raises(NonFiniteLossError, match=r"step 0 "):
        run(compiled)


@pytest.mark.parametrize("batch_size", [0, -1, 31])
def test_a_batch_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(UsageError, match=rf"at least 1, got {batch_size}|1 to the 30"):
        program(config={"batch_size": batch_size})


def test_batches_that_devices_or_parts_cannot_share_are_refused():
    with pytest.raises(UsageError, match=r"multiple of 8, the devices \(8\)"):
        program(mesh=make_mesh(), config={"batch_size": 12})
    with pytest.raises(UsageError, match=r"multiple of 16, .*--accumulate \(2\)"):
        program(mesh=make_mesh(), config={"batch_size": 24, "grad_accum": 2})
    with pytest.raises(UsageError, match="must divide the batch size, 8; got 3"):
        program(config={"grad_accum": 3})


class Rivals(Regression):
    """Two networks: the first fits the targets, the second fits the first."""

    def create_networks(self, rngs):
        return {name: nnx.Linear(2, 1, rngs=rngs) for name in ("first", "second")}

    def loss(self, name, models, batch):
        first, second = (model(batch["x"])[:, 0] for model in models.values())
        if name == "first":
            return jnp.square(first - batch["y"]).mean(), {}
        return jnp.square(second - first).mean(), {}

    def evaluate(self, models, batch):
        loss, _ = self.loss("second", models, batch)
        return {"error": loss, "count": jnp.float32(1)}


def test_networks_are_trained_in_turn_each_on_its_own_loss():
    task = Rivals(OptimizerConfig(weight_decay=0.0, momentum=0.0, learning_rate=0.1))
    compiled = program(task, momentum=0.0, learning_rate=0.1, schedule="constant")
    state = compiled.init((0,))
    feeds = compiled.feeds((0,), 0)
    data = make_data(30)
    rows = np.asarray(next(compiled.feeds((0,), 0)).rows[0])
    x, y = data["x"][rows], data["y"][rows]
    params = jax.tree.map(np.array, state.params)
    state = compiled.train(state, next(feeds), 1)

    def stepped(layer, target):
        residual = x @ layer["kernel"][:, 0] + layer["bias"] - target
        return {
            "kernel": layer["kernel"] - 0.1 * (2 * x.T @ residual / 8)[:, None],
            "bias": layer["bias"] - 0.1 * 2 * residual.mean(),
        }

    first = stepped(params["first"], y)
    # The second sees the first as it is after its step.
    target = x @ first["kernel"][:, 0] + first["bias"]
    second = stepped(params["second"], target)
    chex.assert_trees_all_close(
        jax.device_get(state.params), {"first": first, "second": second}, rtol=1e-5
    )
    _, logs, _ = run(compiled)
    for name in ("first", "second"):
        assert logs[-1][f"train_{name}_gradient_norm"] > 0
        assert f"{name}_learning_rate" in logs[-1]


def test_a_whole_epoch_on_the_resident_path_moves_nothing_between_host_and_device():
    compiled = program(techniques=("scale_by_random",), config={"epochs": 2})
    state = compiled.reset(compiled.init((0,)))
    feeds = compiled.feeds((0,), 0)
    feed = next(feeds)
    with jax.transfer_guard("disallow"):
        for _ in range(compiled.steps_before(1)):
            state = compiled.train(state, feed, 1)
    assert int(state.step) == compiled.steps_before(1)


def test_a_state_of_another_form_is_refused_rather_than_traced():
    # So that a step is compiled once, whatever happens in a run.
    compiled = program()
    state = compiled.init((0,))
    state = state._replace(step=jnp.float32(0))
    with pytest.raises(TypeError):
        compiled.train(state, next(compiled.feeds((0,), 0)), 1)


def plain_step(task, networks, state, data, **options):
    step = jax.jit(make_train_step(task, networks, **options))
    return step(state, jax.tree.map(jnp.asarray, data))


@pytest.mark.parametrize(
    "tricks", [(), ("barzilai_borwein_step",), ("perturbed_unit_step",), ("sam",)]
)
def test_accumulated_gradients_are_those_of_the_whole_batch(tricks):
    config = OptimizerConfig(techniques=tricks, weight_decay=0.1)
    whole = program(**dataclasses.asdict(config))
    parts = program(**dataclasses.asdict(config), config={"grad_accum": 4})
    expected, _, (state,) = run(whole)
    found, _, (other,) = run(parts)
    chex.assert_trees_all_close(other.params, state.params, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        a, b = without_seconds([a, b])
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("trick", ["barzilai_borwein_step", "perturbed_unit_step", "sam"])
@pytest.mark.parametrize("grad_accum", [1, 3])
def test_batch_statistics_after_two_gradients_are_those_after_one(trick, accumulate):
    data = make_data(12)
    states = []
    for tricks in ((), (trick,)):
        task = Normalised(OptimizerConfig(techniques=tricks))
        compiled = program(Normalised(), techniques=tricks)
        networks = compiled._networks(
            task.create_networks(nnx.Rngs(0)), jax.random.key(0)
        )
        state = new_state(task.create_networks(nnx.Rngs(0)), networks, jax.random.key(0))
        state, _ = plain_step(task, networks, state, data, accumulate=accumulate)
        states.append(state)
    plain, tricky = states
    chex.assert_trees_all_close(tricky.model_state, plain.model_state, rtol=1e-6)
    difference = optax.tree.sub(tricky.params, plain.params)
    assert float(optax.tree.norm(difference)) > 1e-3
