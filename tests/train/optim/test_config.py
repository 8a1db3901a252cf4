"""The optimizer settings: what is refused, from Python and from the command line."""

import dataclasses
import re

import pytest
import tyro

from tests.shared import squeezed
from train.errors import UsageError
from train.optim.config import OPTIMIZERS, OptimizerConfig
from train.optim.schedules import SCHEDULES
from train.optim.techniques import TECHNIQUES

# Settings, the flags that give them, and the message.
BAD = [
    (
        {"techniques": ("rndom",)},
        "--techniques rndom",
        "unknown technique 'rndom'; known: scale_by_random (Random Gradient: ",
    ),
    (
        {"techniques": ("scale_by_random", "scale_by_random")},
        "--techniques scale_by_random,scale_by_random",
        "a technique is named twice: scale_by_random,scale_by_random",
    ),
    (
        {"techniques": ("barzilai_borwein_step", "perturbed_unit_step")},
        "--techniques barzilai_borwein_step,perturbed_unit_step",
        "take one of them",
    ),
    (
        {"techniques": ("scale_by_random", "perturbed_unit_step", "centralize")},
        "--techniques scale_by_random,perturbed_unit_step,centralize",
        "put it first, perturbed_unit_step,scale_by_random,centralize",
    ),
    (
        {"techniques": ("optimizer", "sam")},
        "--techniques optimizer,sam",
        "put it first, sam,optimizer",
    ),
    (
        {"techniques": ("optimizer", "decay")},
        "--techniques optimizer,decay",
        "in optimizer,decay: name it before `optimizer`, or take an optimizer with "
        "decoupled decay",
    ),
    (
        {"techniques": ("decay", "centralize"), "optimizer": "adamw"},
        "--techniques decay,centralize --optimizer adamw",
        "in decay,centralize,optimizer: name it after `optimizer`, or take an "
        "optimizer with L2 decay",
    ),
    (
        {"learning_rate": 0.0},
        "--learning-rate 0",
        "learning_rate must be greater than 0, got 0.0",
    ),
    (
        {"learning_rate": float("nan")},
        "--learning-rate nan",
        "learning_rate must be a finite number, got nan",
    ),
    (
        {"learning_rate": float("inf")},
        "--learning-rate inf",
        "learning_rate must be a finite number, got inf",
    ),
    ({"momentum": 1.0}, "--momentum 1", "momentum must be less than 1, got 1.0"),
    (
        {"momentum": -0.1},
        "--momentum -0.1",
        "momentum must be greater than or equal to 0, got -0.1",
    ),
    ({"b2": 1.0}, "--b2 1", "b2 must be less than 1, got 1.0"),
    (
        {"nesterov": True, "optimizer": "adam"},
        "--nesterov --optimizer adam",
        "nesterov is for sgd and sgdw, not adam",
    ),
    (
        {"nesterov": True, "momentum": 0.0},
        "--nesterov --momentum 0",
        "nesterov needs a momentum above 0, got 0",
    ),
    (
        {"weight_decay": -1.0},
        "--weight-decay -1",
        "weight_decay must be greater than or equal to 0, got -1.0",
    ),
    ({"clip_norm": 0.0}, "--clip-norm 0", "clip_norm must be greater than 0, got 0.0"),
    (
        {"warmup_epochs": -1.0},
        "--warmup-epochs -1",
        "warmup_epochs must be greater than or equal to 0, got -1.0",
    ),
    (
        {"schedule": "step"},
        "--schedule step",
        "the step schedule needs milestones, such as 60 120 160",
    ),
    (
        {"milestones": (60, 60)},
        "--milestones 60 60",
        "milestones must rise from 1 or more, got (60, 60)",
    ),
    (
        {"milestones": (0,)},
        "--milestones 0",
        "milestones must rise from 1 or more, got (0,)",
    ),
    (
        {"decay_factor": 0.0},
        "--decay-factor 0",
        "decay_factor must be greater than 0, got 0.0",
    ),
    (
        {"half_period": 0.0},
        "--half-period 0",
        "half_period must be greater than 0, got 0.0",
    ),
    (
        {"head_learning_rate": -0.1},
        "--head-learning-rate -0.1",
        "head_learning_rate must be greater than 0, got -0.1",
    ),
    (
        {"head_learning_rate": 0.1, "techniques": ("barzilai_borwein_step",)},
        "--head-learning-rate 0.1 --techniques barzilai_borwein_step",
        "barzilai_borwein_step has one learning rate for all parameters, got a "
        "head_learning_rate of 0.1: leave one of them out",
    ),
    ({"minval": 2.0}, "--minval 2", "minval 2.0 is above maxval 1.0: swap them"),
    ({"maxval": -1.0}, "--maxval -1", "minval 0.0 is above maxval -1.0: swap them"),
    (
        {"maxval": float("nan")},
        "--maxval nan",
        "maxval must be a finite number, got nan",
    ),
    (
        {"probability": 1.5},
        "--probability 1.5",
        "probability must be less than or equal to 1, got 1.5",
    ),
    (
        {"probability": -0.5},
        "--probability -0.5",
        "probability must be greater than or equal to 0, got -0.5",
    ),
    ({"rho": 0.0}, "--rho 0", "rho must be greater than 0, got 0.0"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [(changes, message) for changes, _, message in BAD]
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        OptimizerConfig(**changes)
    assert isinstance(raised.value, ValueError)
    with pytest.raises(UsageError, match=re.escape(message)):
        dataclasses.replace(OptimizerConfig(), **changes)


@pytest.mark.parametrize(
    ("flags", "message"), [(flags, message) for _, flags, message in BAD]
)
def test_bad_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as raised:
        tyro.cli(OptimizerConfig, args=flags.split())
    assert raised.value.code == 2
    assert squeezed(message) in squeezed(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "known"), [("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)]
)
def test_unknown_names_are_refused_with_those_that_are_known(name, known, capsys):
    message = f"unknown {name} 'xyz'; known: {', '.join(known)}"
    with pytest.raises(UsageError, match=f"^{message}$"):
        OptimizerConfig(**{name: "xyz"})
    with pytest.raises(SystemExit) as raised:
        tyro.cli(OptimizerConfig, args=[f"--{name}", "xyz"])
    assert raised.value.code == 2
    assert squeezed(message) in squeezed(capsys.readouterr().err)


def test_command_line():
    given = "--optimizer adamw --milestones 60 120"
    names = "scale_by_random,optimizer, centralize"
    got = tyro.cli(OptimizerConfig, args=[*given.split(), "--techniques", names])
    assert got == OptimizerConfig(
        optimizer="adamw",
        techniques=("scale_by_random", "optimizer", "centralize"),
        milestones=(60, 120),
    )
    assert tyro.cli(OptimizerConfig, args=["--techniques", ""]) == OptimizerConfig()


def test_every_setting_has_a_flag_and_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(OptimizerConfig, args=["--help"])
    text = squeezed(capsys.readouterr().out)
    for field in dataclasses.fields(OptimizerConfig):
        flag = f"--{field.name.replace('_', '-')}"
        explanation = text.partition(flag)[2].partition("(default")[0]
        assert re.search(r"[a-z;:,]{10,}", explanation.rpartition("--")[2]), flag
    assert "scale_by_random:probabilitythatastepisscaled." in text


def test_gradients_and_logs_are_those_of_the_techniques():
    assert OptimizerConfig().gradients_per_step == 1
    assert OptimizerConfig().logged == ()
    both = OptimizerConfig(techniques=("sam", "scale_by_random", "centralize", "decay"))
    assert both.gradients_per_step == 2
    assert both.logged == ("random_factor",)
    for name, row in TECHNIQUES.items():
        assert OptimizerConfig(techniques=(name,)).logged == row.logged
