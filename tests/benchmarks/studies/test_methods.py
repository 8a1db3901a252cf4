"""Which methods are compared with which, and what is refused."""

import dataclasses

import pytest

import optax_tricks
from benchmarks.studies.methods import OURS, compared, methods_of
from benchmarks.studies.tasks import STUDY_TASKS
from train.errors import UsageError
from train.optim.config import OptimizerConfig
from train.optim.techniques import TECHNIQUES

CLASSIFICATION = STUDY_TASKS["classification"]


def names(methods):
    return [method.name for method in methods]


@pytest.mark.parametrize("task", STUDY_TASKS)
def test_every_technique_has_a_baseline_that_differs_by_it_alone(task):
    methods = methods_of(STUDY_TASKS[task])
    by_name = {method.name: method for method in methods}
    techniques = [m for m in methods if m.optimizer.techniques]
    expected = [name for name in TECHNIQUES if name in optax_tricks.__all__]
    assert len(expected) >= 4
    assert names(techniques) == expected == list(OURS)
    for method in techniques:
        assert method.optimizer.techniques == (method.name,)
        baseline = by_name[method.baseline]
        assert not baseline.optimizer.techniques
        assert baseline.epochs_factor == 1
        own_schedule = method.optimizer.schedule == "robbins_monro"  # Step-Tuned SGD
        if not own_schedule:
            without = dataclasses.replace(method.optimizer, techniques=())
            assert without == baseline.optimizer
        if method.optimizer.gradients_per_step == 2:
            assert by_name[method.equal_gradients].epochs_factor == 2


def test_digits_have_the_methods_of_their_page():
    assert names(methods_of(CLASSIFICATION)) == [
        *("sgd", "sgd, 2x epochs", "sgd, momentum 0.5", "scale_by_random"),
        *("centralize", "barzilai_borwein_step", "perturbed_unit_step"),
    ]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["centralize"], ["sgd", "centralize"]),
        (["scale_by_random"], ["sgd, momentum 0.5", "scale_by_random"]),
        (["sam"], ["sgd", "sgd, 2x epochs", "sam"]),
        (
            ["centralize + perturbed_unit_step"],
            ["sgd", "sgd, 2x epochs", "perturbed_unit_step+centralize"],
        ),
        (
            ["centralize", "scale_by_random+centralize"],
            ["sgd", "sgd, momentum 0.5", "centralize", "scale_by_random+centralize"],
        ),
    ],
)
def test_only_the_baselines_that_are_needed_are_trained(chosen, expected):
    methods = methods_of(CLASSIFICATION, chosen)
    assert names(methods) == expected
    for method, partner, _ in compared(methods):
        assert partner in expected
        assert method.name == "+".join(method.optimizer.techniques)


def test_a_base_optimizer_is_that_of_all_methods():
    adam = OptimizerConfig(optimizer="adam", learning_rate=0.01)
    methods = methods_of(CLASSIFICATION, base=adam)
    assert names(methods)[:2] == ["adam", "adam, 2x epochs"]
    assert {m.optimizer.optimizer for m in methods} == {"adam"}
    assert {m.optimizer.learning_rate for m in methods} == {0.01}


def test_step_tuned_sgd_takes_the_steps_of_its_baseline_without_momentum():
    base = OptimizerConfig(learning_rate=0.2, momentum=0.9, schedule="poly")
    *_, step_tuned = methods_of(CLASSIFICATION, ["barzilai_borwein_step"], base)
    assert step_tuned.optimizer.learning_rate == 2.0
    assert step_tuned.optimizer.momentum == 0
    assert step_tuned.optimizer.schedule == "robbins_monro"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([], "techniques must be one or more of scale_by_random, "),
        (["centralise"], "unknown technique 'centralise'; did you mean centralize?"),
        (["centralize,sam"], "separate techniques by spaces, and join"),
        (["sam", "centralize", "sam"], "technique 'sam' is named twice"),
        (["sam+centralize", "centralize+sam"], "'sam.centralize' is named twice"),
        (["centralize+centralize"], "a technique is named twice"),
        (["sam+perturbed_unit_step"], "both replace the gradient"),
    ],
)
def test_wrong_techniques_are_refused(chosen, message):
    with pytest.raises(UsageError, match=message):
        methods_of(CLASSIFICATION, chosen)
