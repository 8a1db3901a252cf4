"""Learning rates over the steps of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.errors import UsageError
from train.optim.schedules import SCHEDULES, make_schedule

RUN = {"peak": 0.2, "total_steps": 100, "steps_per_epoch": 10}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2, 0.2]),
        ("step", [0.2, 0.2, 0.02, 0.002]),
        ("poly", [0.2, 0.2 * 0.51**0.9, 0.2 * 0.5**0.9, 0.2 * 0.01**0.9]),
        ("cosine", [0.2, 0.1 * (1 + np.cos(0.49 * np.pi)), 0.1, None]),
        ("linear", [0.2, 0.2, 0.2, 0.2 * 0.02]),
        ("one_cycle", [0.008, None, None, None]),
        ("triangular", [0.05, 0.05 + 0.15 * 0.9, 0.2, 0.2 - 0.15 * 0.9]),
        ("robbins_monro", [0.2, 0.2 * 50**-0.501, 0.2 * 51**-0.501, None]),
    ],
)
def test_schedules(schedule, expected):
    # A triangle rises in the ten steps of an epoch.
    steps = [0, 9, 10, 19] if schedule == "triangular" else [0, 49, 50, 99]
    rate = make_schedule(schedule, **RUN, milestones=(5, 9), half_period=1)
    for step, value in zip(steps, expected, strict=True):
        if value is not None:
            np.testing.assert_allclose(rate(step), value, rtol=1e-5)


def test_the_step_schedule_takes_its_factor():
    rate = make_schedule("step", **RUN, milestones=(2, 4), decay_factor=0.5)
    found = [float(rate(step)) for step in (0, 19, 20, 39, 40, 99)]
    assert found == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05, 0.05])


def test_one_cycle_rises_to_the_learning_rate_and_falls_to_nothing():
    rate = make_schedule("one_cycle", **RUN)
    rates = np.array([rate(step) for step in range(101)])
    assert rates.argmax() == 30
    np.testing.assert_allclose(rates[[30, 100]], [0.2, 0.2 / 25 / 1e4], rtol=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_positive_scalars_and_never_above_the_peak(schedule):
    rate = jax.jit(make_schedule(schedule, **RUN, milestones=(5,), half_period=1.5))
    found = [rate(jnp.int32(step)) for step in range(101)]
    assert {x.shape for x in found} == {()}
    rates = np.array(found)
    assert np.isfinite(rates).all()
    assert (rates[:-1] > 0).all()
    assert rates[-1] >= 0
    assert rates.max() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_comes_before_any_schedule(schedule):
    made = make_schedule(schedule, **RUN, milestones=(5,), warmup_epochs=1.5)
    rate = jax.jit(made)
    start = rate(15)
    np.testing.assert_allclose(
        [rate(step) for step in range(15)],
        start * np.arange(1, 16) / 16,
        rtol=1e-5,
    )
    # After it the schedule runs over the steps that are left.
    shorter = RUN | {"total_steps": 85}
    if schedule != "step":
        after = jax.jit(make_schedule(schedule, **shorter))
        np.testing.assert_allclose(
            [rate(step) for step in range(15, 101)],
            [after(step) for step in range(86)],
            rtol=1e-5,
            atol=1e-9,
        )
    else:  # milestones are epochs of the run, warm-up included
        found = [rate(step) for step in (15, 49, 50)]
        np.testing.assert_allclose(found, [0.2, 0.2, 0.02], rtol=1e-6)
    if schedule in ("linear", "cosine", "poly", "one_cycle"):  # ends with the run
        assert rate(100) < 1e-5


@pytest.mark.parametrize(("epochs", "steps"), [(2.0, 20), (2.5, 25), (9.0, 90)])
def test_a_warm_up_that_leaves_no_step_is_refused(epochs, steps):
    message = rf"a warm-up of {epochs:g} epochs takes {steps} of 20 steps: shorten it"
    with pytest.raises(UsageError, match=message):
        make_schedule(
            "constant",
            peak=0.2,
            total_steps=20,
            steps_per_epoch=10,
            warmup_epochs=epochs,
        )


def test_an_unknown_schedule_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="unknown schedule 'cosin'; known: constant, "):
        make_schedule("cosin", **RUN)
