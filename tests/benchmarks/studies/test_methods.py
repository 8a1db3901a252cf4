"""Which methods are compared with which, and what is refused."""

import dataclasses

import pytest

import optax_tricks
from benchmarks.studies.methods import OURS, USUAL_RATES, compared, methods_of
from benchmarks.studies.tasks import STUDY_TASKS
from train.errors import UsageError
from train.optim.config import OPTIMIZERS, OptimizerConfig
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
    ("text", "name", "techniques", "options"),
    [
        ("sam:rho=0.1", "sam:rho=0.1", ("sam",), {"rho": 0.1}),
        (" sam : rho = 1e-1 ", "sam:rho=1e-1", ("sam",), {"rho": 0.1}),
        ("sam:rho=1", "sam:rho=1", ("sam",), {"rho": 1}),
        (
            "sam:rho=0.1:norms_only=true",
            "sam:rho=0.1:norms_only=true",
            ("sam",),
            {"rho": 0.1, "norms_only": True},
        ),
        (
            "centralize:conv_only=true+sam:rho=0.2",
            "sam:rho=0.2+centralize:conv_only=true",
            ("sam", "centralize"),
            {"rho": 0.2, "conv_only": True},
        ),
        (
            "optimizer+sam+centralize",
            "sam+optimizer+centralize",
            ("sam", "optimizer", "centralize"),
            {},
        ),
        ("decay+centralize", "decay+centralize", ("decay", "centralize"), {}),
        (
            "scale_by_random:minval=0.5:maxval=1.5:probability=0.25",
            "scale_by_random:minval=0.5:maxval=1.5:probability=0.25",
            ("scale_by_random",),
            {"minval": 0.5, "maxval": 1.5, "probability": 0.25},
        ),
        (
            "barzilai_borwein_step:min_scale=1:max_scale=1",
            "barzilai_borwein_step:min_scale=1:max_scale=1",
            ("barzilai_borwein_step",),
            {"min_scale": 1, "max_scale": 1},
        ),
    ],
)
def test_techniques_and_their_options_are_read(text, name, techniques, options):
    method = methods_of(CLASSIFICATION, [text])[-1]
    assert method.name == name
    assert method.optimizer.techniques == techniques
    assert {key: getattr(method.optimizer, key) for key in options} == options
    # A name is read as itself, so that a study can be repeated from its table.
    assert methods_of(CLASSIFICATION, [name])[-1] == method


def test_options_belong_to_one_method():
    chosen = ["sam", "sam:rho=0.1", "sam:rho=0.2+centralize", "centralize"]
    methods = methods_of(CLASSIFICATION, chosen)
    assert [m.optimizer.rho for m in methods[2:]] == [0.05, 0.1, 0.2, 0.05]
    assert names(methods)[2:] == chosen


def test_the_optimizer_takes_the_place_that_is_named():
    before, after = methods_of(CLASSIFICATION, ["centralize", "optimizer+centralize"])[
        -2:
    ]
    assert before.optimizer.chain == ("decay", "centralize", "optimizer")
    assert after.optimizer.chain == ("decay", "optimizer", "centralize")


def test_optimizers_have_their_usual_rates_and_the_same_baseline():
    base = OptimizerConfig(learning_rate=0.3, momentum=0.5, head_learning_rate=3.0)
    methods = methods_of(CLASSIFICATION, [], base, ["adam", "lamb"])
    assert names(methods) == ["sgd", "adam", "lamb"]
    for method in methods[1:]:
        assert method.baseline == "sgd"
        assert method.optimizer.optimizer == method.name
        assert method.optimizer.learning_rate == USUAL_RATES[method.name]
        assert method.optimizer.momentum == 0.9
        # The last layer learns as many times faster as with the base optimizer.
        ratio = method.optimizer.head_learning_rate / method.optimizer.learning_rate
        assert ratio == pytest.approx(10)
    assert USUAL_RATES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([], "techniques must be one or more of scale_by_random, "),
        (["centralise"], "unknown technique 'centralise'; did you mean centralize?"),
        (["sam", "centralize", "sam"], "technique 'sam' is named twice"),
        (["sam+centralize", "centralize+sam"], "'sam.centralize' is named twice"),
        (["centralize+centralize"], "a technique is named twice"),
        (["sam+perturbed_unit_step"], "both replace the gradient"),
        (["optimizer"], "optimizer has no technique: join it with one, as optimizer"),
        (["optimizer+decay"], "optimizer.decay has no technique"),
        (["optimizer:rho=1+sam"], "unknown option of optimizer 'rho'; known: none"),
        (["normalize:rho=1"], "unknown option of normalize 'rho'; known: none"),
        (["sam:rh=1"], "unknown option of sam 'rh'; did you mean rho?"),
        (["sam:"], "unknown option of sam ''; "),
        (["sam:conv_only=true"], "unknown option of sam 'conv_only'; "),
        (["sam:rho"], "rho of sam must be a number, true or false, got ''; write sam:"),
        (["sam:rho=big"], "rho of sam must be a number, true or false, got 'big'"),
        (["sam:rho=null"], "rho of sam must be a number, true or false, got 'null'"),
        (["sam:rho=[1]"], "rho of sam must be a number"),
        (["sam:rho=1=2"], "rho of sam must be a number"),
        (["sam:rho=0.1:rho=0.2"], "rho of sam is set twice"),
        (["sam:rho=0.1", "sam:rho=1e-1"], "technique 'sam:rho=0.1' is named twice"),
        (["sam:rho=1:norms_only=true", "sam:norms_only=true:rho=1"], "named twice"),
        (["sam:rho=-1"], "rho must be greater than 0, got -1"),
        (["sam:rho=NaN"], "rho must be a finite number, got nan"),
        (["sam:rho=true"], "rho must be a valid number, got True"),
        (["sam:norms_only=1"], "norms_only must be a valid boolean, got 1"),
        (["scale_by_random:minval=2"], "minval 2.0 is above maxval 1.0: swap them"),
        (
            ["barzilai_borwein_step:max_scale=0.1"],
            "min_scale 0.5 is above max_scale 0.1",
        ),
    ],
)
def test_wrong_techniques_are_refused(chosen, message):
    with pytest.raises(UsageError, match=message):
        methods_of(CLASSIFICATION, chosen)
