"""The training loop: what it computes, reports and refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.small_tasks import (
    ONE_DEVICE,
    Normalized,
    Recorder,
    Regression,
    Rivals,
    error_of,
    make_data,
    make_program,
    one_step,
    train,
)
from train.data.loaders import InMemoryLoader
from train.errors import UsageError
from train.parallel import make_mesh
from train.program import Program
from train.run import Callbacks, NonFiniteLossError, train_seed
from train.step import _weight_of_latest

TWO_GRADIENTS = ("barzilai_borwein_step", "perturbed_unit_step", "sam")


def test_it_learns_and_reports():
    recorder = Recorder()
    state, sums = train_seed(make_program(config={"epochs": 30}), 0, recorder)
    found = recorder.epochs
    assert [r["epoch"] for r in found] == list(range(1, 31))
    # 30 examples in batches of 8: no example is left out of an epoch.
    assert [r["step"] for r in found] == [30 * epoch // 8 for epoch in range(1, 31)]
    assert int(state.step) == sum(recorder.counts) == 112
    assert found[-1]["test_error"] < 0.01 < found[0]["test_error"]
    assert found[-1]["test_error"] == sums["error"] / sums["count"]
    assert found[-1]["train_loss"] < 0.01
    assert found[0]["learning_rate"] > found[-1]["learning_rate"] > 0
    for name in ("train_gradient_norm", "train_update_norm", "train_parameter_norm"):
        assert found[0][name] > 0
    assert all(record["seconds"] > 0 for record in found)


class Counting(Regression):
    """Its counts are as large as those of a batch can be."""

    def evaluate(self, networks, batch, weights):
        return {
            "confusion": jnp.array([[2**31 - 1, 1], [0, 3]], jnp.int32),
            "loss": jnp.where(batch["x"][0, 0] == FIRST, 2.0**24, 1.0),
        }


FIRST = make_data(100, seed=1)["x"][0, 0]


def test_sums_of_an_evaluation_are_exact_for_any_number_of_batches():
    program = make_program(Counting(), num_test=100, config={"batch_size": 1})
    sums = program.evaluate(program.init_state(0))
    batches = 100 // 4  # four times as many examples as a training step has
    expected = batches * np.array([[2**31 - 1, 1], [0, 3]])
    np.testing.assert_array_equal(sums["confusion"], expected)
    assert sums["confusion"].dtype == np.int64
    assert sums["loss"] == 2**24 + batches - 1  # float32 has no odd numbers here
    assert sums["loss"].dtype == np.float64


def test_same_seed_same_numbers_other_seed_others():
    program = make_program(techniques=("scale_by_random",))
    first, _, state = train(program)
    second, _, same_state = train(program)
    other, _, _ = train(program, seed=1)
    assert first == second
    chex.assert_trees_all_equal(state.params, same_state.params)
    assert first[0]["train_loss"] != other[0]["train_loss"]
    assert first[0]["train_random_factor"] != other[0]["train_random_factor"]


def test_steps_are_logged_and_epochs_are_their_means():
    epochs, steps, _ = train(make_program(config={"log_every": 1}))
    assert [r["step"] for r in steps] == list(range(1, 12))
    ends = [0, *(r["step"] for r in epochs)]
    for i, record in enumerate(epochs):
        inside = [r["train_loss"] for r in steps[ends[i] : ends[i + 1]]]
        assert record["train_loss"] == pytest.approx(np.mean(inside), rel=1e-6)
        last = steps[ends[i + 1] - 1]
        assert record["train_update_norm"] == last["train_update_norm"]
    # Every second step, and the last of every epoch.
    _, sparse, _ = train(make_program(config={"log_every": 2}))
    assert [r["step"] for r in sparse] == [2, 3, 4, 6, 7, 8, 10, 11]
    assert [r for r in steps if r["step"] in (2, 3, 4, 6, 7, 8, 10, 11)] == sparse


class PartlyLabeled(Regression):
    """A regression that only learns from examples with a large target."""

    above = 0.0

    def loss(self, name, networks, batch):
        labeled = batch["y"] > self.above
        losses = self._losses(networks[name], batch) * labeled
        total, count = losses.sum(), labeled.sum(dtype=jnp.float32)
        return (total, count), {"twice": (2 * total, count)}


@pytest.mark.parametrize(("batch_size", "parts"), [(1, 1), (2, 1), (2, 2)])
def test_batches_without_labels_are_left_out(batch_size, parts):
    config = {"epochs": 2, "log_every": 1, "grad_accum": parts}
    program = make_program(PartlyLabeled(), config=config | {"batch_size": batch_size})
    epochs, steps, _ = train(program)
    for epoch in epochs:
        last = epoch["step"]
        first = last - program.steps_before(1)
        found = [s for s in steps if first < s["step"] <= last]
        labeled = [s["train_loss"] for s in found if "train_loss" in s]
        assert 0 < len(labeled) < len(found) == program.steps_before(1)
        assert min(labeled) > 0
        assert all("train_gradient_norm" in s for s in found)
        assert epoch["train_loss"] == pytest.approx(np.mean(labeled), rel=1e-6)
        assert epoch["train_twice"] == pytest.approx(2 * np.mean(labeled), rel=1e-6)


def test_a_run_without_labels_has_no_loss():
    task = PartlyLabeled()
    task.above = np.inf
    epochs, steps, _ = train(make_program(task, config={"log_every": 1}))
    assert (len(epochs), len(steps)) == (3, 11)
    assert not any("train_loss" in r or "train_twice" in r for r in epochs + steps)
    assert all("test_error" in r for r in epochs)


def test_evaluation_is_as_often_as_asked_for_and_at_the_end():
    epochs, _, _ = train(make_program(config={"eval_every": 2}))
    assert ["test_error" in r for r in epochs] == [False, True, True]
    assert all("train_loss" in r for r in epochs)


@pytest.mark.parametrize("decay", [0.5, 0.9999, 0.99999999])
def test_the_moving_average_leaves_out_the_start_and_is_evaluated(decay):
    program = make_program(Normalized(), config={"ema": decay, "batch_size": 30})
    state = program.init_state(0)
    data = make_data(10, seed=1)
    feeds = program.feeds(0)
    seen = []
    for step in range(1, 4):
        state = program.train_step(state, next(feeds))
        new = (state.params["model"], state.model_state["model"])
        seen.append(jax.tree.map(lambda x: np.array(x, np.float64), new))
        weights = decay ** np.arange(step - 1.0, -1, -1)
        average = jax.tree.map(
            lambda *xs, w=weights: np.average(xs, axis=0, weights=w), *seen
        )
        found = tuple(part["model"] for part in state.ema)
        chex.assert_trees_all_close(found, average, rtol=1e-5, atol=1e-7)
    (params, norms) = (part["layers"] for part in average)
    hidden = data["x"] @ params[0]["kernel"] + params[0]["bias"]
    hidden = (hidden - norms[1]["mean"]) / np.sqrt(norms[1]["var"] + 1e-5)
    hidden = hidden * params[1]["scale"] + params[1]["bias"]
    predicted = hidden @ params[2]["kernel"][:, 0] + params[2]["bias"]
    expected = np.square(predicted - data["y"]).mean()
    assert error_of(program, state) == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_the_latest_value_is_that_of_a_corrected_average():
    steps = np.array([1, 2, 10, 1000, 10**5, 2**24, 2**31 - 1])
    for decay in (1e-6, 0.5, 0.9, 0.9999, 1 - 1e-7):
        found = jax.vmap(lambda n, d=decay: _weight_of_latest(d, n))(jnp.asarray(steps))
        expected = (1 - decay) / -np.expm1(steps * np.log(decay))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert abs(found[0] - 1) < 1e-6


def test_the_moving_average_goes_on_from_a_saved_state():
    program = make_program(config={"ema": 0.99, "log_every": 1})
    _, _, end = train(program)
    stopped = StopInside(2)
    with pytest.raises(KeyboardInterrupt):
        train_seed(program, 0, stopped)
    _, _, state = train(program, state=stopped.state, seconds=stopped.seconds)
    chex.assert_trees_all_equal(state.ema, end.ema)


class StopInside(Callbacks):
    """Stops the loop at a step, with a copy of the state."""

    def __init__(self, step):
        self.step = step

    def on_steps(self, state, count, seconds):
        if int(state.step) == self.step:
            self.state, self.seconds = jax.tree.map(jnp.copy, state), seconds
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 5])  # the epochs end after 3, 7 and 11 steps
def test_a_run_goes_on_from_its_state(step):
    program = make_program(techniques=("scale_by_random",), config={"log_every": 1})
    expected, logs, end = train(program)
    stopped = StopInside(step)
    with pytest.raises(KeyboardInterrupt):
        train_seed(program, 0, stopped)
    finished = sum(record["step"] < step for record in expected)
    found, later, state = train(
        program,
        state=stopped.state,
        finished_epochs=finished,
        seconds=stopped.seconds,
    )
    assert found == expected[finished:]
    assert later == [r for r in logs if r["step"] > step]
    chex.assert_trees_all_equal(state.params, end.params)


def test_seconds_of_an_interrupted_epoch_go_on():
    program = make_program(config={"epochs": 1})
    for step in (1, 3):
        stopped = StopInside(step)
        with pytest.raises(KeyboardInterrupt):
            train_seed(make_program(config={"epochs": 1, "log_every": 1}), 0, stopped)
        recorder = Recorder()
        train_seed(program, 0, recorder, state=stopped.state, seconds=100.0)
        assert recorder.epochs[0]["seconds"] >= 100


@pytest.mark.parametrize("num_test", [1, 10, 1024, 1025])
def test_evaluation_counts_every_example_once(num_test):
    program = make_program(num_test=num_test)
    _, _, state = train(program)
    data = make_data(num_test, seed=1)
    model = state.params["model"]
    predicted = data["x"] @ np.asarray(model["kernel"])[:, 0] + np.asarray(
        model["bias"]
    )
    expected = np.square(predicted - data["y"]).mean()
    for _ in range(3):
        assert error_of(program, state) == pytest.approx(expected, rel=1e-4)


def test_evaluation_leaves_batch_statistics_out():
    # With statistics of the batch, one example would be its own mean.
    program = make_program(Normalized())
    _, _, state = train(program)
    rest = make_data(10, seed=1)
    singles = [
        Program(
            Normalized(),
            program.config,
            train_loader=InMemoryLoader(make_data(30)),
            eval_loader=InMemoryLoader({k: v[i : i + 1] for k, v in rest.items()}),
            mesh=ONE_DEVICE,
        )
        for i in range(10)
    ]
    errors = [error_of(single, state) for single in singles]
    assert np.std(errors) > 0.01
    assert error_of(program, state) == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    # Full batches of one direction: the kernel grows from step to step.
    settings = {"learning_rate": 0.05}
    config = {"epochs": 20, "batch_size": 30, "log_every": 4}
    program = make_program(Regression(bad_weight=1.9), config=config, **settings)
    recorder = Recorder()
    with pytest.raises(NonFiniteLossError, match=r"step (\d+) .*lower the") as raised:
        train_seed(program, 0, recorder)
    # The same run step by step: which is the first step taken at a steep kernel?
    good = make_program(config=config, **settings)
    state, feeds, steep = good.init_state(0), good.feeds(0), []
    for step in range(20):
        if float(jnp.abs(state.params["model"]["kernel"]).max()) > 1.9:
            steep.append(step)
        state = good.train_step(state, next(feeds))
    assert raised.value.step == steep[0] > 0
    # It stopped at the end of the epoch, which is one step.
    assert sum(recorder.counts) == steep[0]


def test_parameters_that_are_not_finite_stop_the_run_though_the_loss_is():
    program = make_program(config={"epochs": 1, "batch_size": 30}, learning_rate=1e38)
    with pytest.raises(NonFiniteLossError, match=r"step 0 "):
        train(program)


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (0, "batch_size must be .* 1, got 0"),
        (31, "from 1 to 30, the number of training"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch_size, message):
    with pytest.raises(UsageError, match=message):
        make_program(config={"batch_size": batch_size})


def test_batches_that_devices_or_parts_cannot_share_are_refused():
    with pytest.raises(UsageError, match=r"multiple of 8, the devices \(8\)"):
        make_program(mesh=make_mesh(), config={"batch_size": 12})
    with pytest.raises(UsageError, match=r"multiple of 16, .* grad_accum \(2\)"):
        make_program(mesh=make_mesh(), config={"batch_size": 24, "grad_accum": 2})
    with pytest.raises(UsageError, match="must divide the batch size, 8; got 3"):
        make_program(config={"grad_accum": 3})


def test_networks_are_trained_in_turn_each_on_its_own_loss():
    program = make_program(
        Rivals(), momentum=0.0, learning_rate=0.1, schedule="constant"
    )
    data = make_data(30)
    rows = np.asarray(next(program.feeds(0)).rows[0])
    x, y = data["x"][rows], data["y"][rows]
    params = jax.tree.map(np.array, program.init_state(0).params)
    state = one_step(program)

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
    _, logs, _ = train(program)
    for name in ("first", "second"):
        assert logs[-1][f"train_{name}_gradient_norm"] > 0
        assert f"{name}_learning_rate" in logs[-1]
    assert program.names_of("loss") == ("first_loss", "second_loss", "loss")


def test_a_whole_epoch_in_memory_moves_nothing_between_host_and_device():
    program = make_program(techniques=("scale_by_random",), config={"epochs": 2})
    state = program.clear_log(program.init_state(0))
    feed = next(program.feeds(0))
    with jax.transfer_guard("disallow"):
        for _ in range(program.steps_before(1)):
            state = program.train_step(state, feed)
    assert int(state.step) == program.steps_before(1)


def test_a_state_of_another_form_is_refused_rather_than_traced():
    # So a step is compiled once, whatever happens in a run.
    program = make_program()
    state = program.init_state(0)._replace(step=jnp.float32(0))
    with pytest.raises(TypeError):
        program.train_step(state, next(program.feeds(0)))


@pytest.mark.parametrize("technique", ["optimizer", *TWO_GRADIENTS])
def test_accumulated_gradients_are_those_of_the_whole_batch(technique):
    settings = {"techniques": (technique,), "weight_decay": 0.1}
    expected, _, state = train(make_program(**settings))
    found, _, other = train(make_program(config={"grad_accum": 4}, **settings))
    chex.assert_trees_all_close(other.params, state.params, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("technique", TWO_GRADIENTS)
@pytest.mark.parametrize("grad_accum", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_batch_statistics_after_two_gradients_are_those_after_one(
    technique, grad_accum
):
    config = {"batch_size": 12, "grad_accum": grad_accum}
    plain, other = (
        one_step(make_program(Normalized(), config=config, techniques=techniques))
        for techniques in ((), (technique,))
    )
    chex.assert_trees_all_close(other.model_state, plain.model_state, rtol=1e-6)
    difference = optax.tree.sub(other.params, plain.params)
    assert float(optax.tree.norm(difference)) > 1e-3


@pytest.mark.parametrize(
    ("techniques", "config", "losses"),
    [((), {}, 1), ((), {"ema": 0.9, "shard_params": True}, 1), (("sam",), {}, 2)],
)
def test_a_step_is_traced_once(techniques, config, losses):
    """Tracing takes most of the time of a start that compiles nothing."""
    traced = []

    class Traced(Regression):
        def loss(self, name, networks, batch):
            traced.append(name)
            return super().loss(name, networks, batch)

    make_program(Traced(), config=config, techniques=techniques)
    assert traced == ["model"] * losses
