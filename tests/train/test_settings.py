"""Settings are checked where they are made: from Python, from JSON, from flags."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from tests.shared import squeezed
from train.config import TrainingConfig
from train.data.config import DataConfig
from train.errors import UsageError
from train.optim.config import OptimizerConfig
from train.optim.techniques import TechniqueOptions
from train.settings import (
    AnyPath,
    Choice,
    Finite,
    Fraction,
    NameList,
    NonNegative,
    Positive,
    from_json,
    settings,
)
from train.tasks import TASKS
from train.tasks.classification import ClassificationConfig
from train.tasks.recipes import RECIPES
from train.tasks.segmentation import SegmentationConfig
from train.tasks.translation import TranslationConfig

COLORS = {"red": "as blood", "blue": "as the sky"}
CONFIGS = (
    TechniqueOptions,
    OptimizerConfig,
    DataConfig,
    TrainingConfig,
    *(task.config_type for task in TASKS.values()),
)


@settings
class Inner:
    rate: Positive[float] = 0.5
    """Rate."""
    size: Finite[int] = 3
    """Size."""

    def __post_init__(self) -> None:
        if self.rate > self.size:
            raise UsageError(f"rate {self.rate} is above size {self.size}")


@settings
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    """Inner."""
    share: Fraction[float] = 0.0
    """Share."""
    weight: NonNegative[float] | None = None
    """Weight."""
    exact: bool = False
    """Exact."""
    mode: Literal["fast", "slow"] = "fast"
    """Mode."""
    color: Annotated[str, Choice("color", COLORS)] = "red"
    """Color."""
    colors: Annotated[tuple[str, ...], NameList("color", COLORS)] = ()
    """Colors."""
    file: AnyPath | None = None
    """File."""


def test_settings_are_frozen_and_take_keywords_only():
    config = Inner(rate=1, size=4)
    assert (config.rate, config.size) == (1.0, 4)
    assert config == Inner(rate=1.0, size=4)
    assert hash(config) == hash(Inner(rate=1.0, size=4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 2.0
    with pytest.raises(TypeError):
        Inner(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Ranges.
        ({"share": 1.0}, "share must be less than 1, got 1.0"),
        ({"share": -0.1}, "share must be greater than or equal to 0, got -0.1"),
        ({"share": math.nan}, "share must be a finite number, got nan"),
        ({"weight": -1}, "weight must be greater than or equal to 0, got -1"),
        ({"weight": math.inf}, "weight must be a finite number, got inf"),
        ({"weight": math.nan}, "weight must be a finite number, got nan"),
        # Types. Nothing is converted that is not meant.
        ({"share": "0.5"}, "share must be a valid number, got '0.5'"),
        ({"share": True}, "share must be a valid number, got True"),
        ({"share": None}, "share must be a valid number, got None"),
        ({"exact": 1}, "exact must be a valid boolean, got 1"),
        ({"exact": "true"}, "exact must be a valid boolean, got 'true'"),
        ({"colors": "red"}, "colors must be a valid tuple, got 'red'"),
        ({"colors": ("red", 1)}, "colors.1 must be a valid string, got 1"),
        ({"inner": {"rate": 1.0}}, "inner must be an instance of Inner, got {'rate'"),
        ({"inner": 3}, "inner must be an instance of Inner, got 3"),
        (
            {"file": 3},
            "file is not allowed: Input is not a valid path for <class "
            "'pathlib.Path'>, got 3",
        ),
        # Choices.
        ({"mode": "fsat"}, "mode must be 'fast' or 'slow', got 'fsat'"),
        ({"color": "rde"}, "unknown color 'rde'; did you mean red? known: red, blue"),
        ({"color": "x"}, "unknown color 'x'; known: red, blue"),
        ({"color": 3}, "color must be a valid string, got 3"),
        (
            {"colors": ("red", "bleu")},
            "unknown color 'bleu'; did you mean blue? known: red (as blood); blue (as",
        ),
        # Names.
        ({"shaer": 0.5}, "there is no setting 'shaer'"),
        # All that is wrong.
        (
            {"share": 1.0, "mode": "fsat"},
            "share must be less than 1, got 1.0; mode must be 'fast' or 'slow', got "
            "'fsat'",
        ),
    ],
)
def test_bad_settings_are_named_with_value_and_what_is_allowed(changes, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        Outer(**changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(Outer(), **changes)


def test_a_check_of_several_settings_runs_after_their_types():
    with pytest.raises(UsageError, match=r"^rate 4\.0 is above size 3$"):
        Inner(rate=4.0)
    with pytest.raises(UsageError, match=r"^rate 3\.0 is above size 2$"):
        dataclasses.replace(Inner(rate=3.0), size=2)
    with pytest.raises(UsageError, match=r"^rate must be a valid number, got '4'$"):
        Inner(rate="4")


def test_integers_are_numbers_and_lists_and_strings_do_for_tuples_and_paths():
    config = Outer(weight=2, colors=["blue", "red"], file="weights")
    assert (config.weight, type(config.weight)) == (2.0, float)
    assert config.colors == ("blue", "red")
    assert config.file == Path("weights")


######## JSON #########################################################################


def as_json(config):
    """Returns what a run folder holds."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def test_json_gives_the_same_settings():
    config = Outer(
        inner=Inner(rate=2.0),
        weight=0.25,
        color="blue",
        colors=("blue", "red"),
        file=Path("folder") / "weights",
    )
    found = from_json(Outer, as_json(config))
    assert found == config
    assert type(found.colors) is tuple
    assert isinstance(found.inner, Inner)


@pytest.mark.parametrize("name", RECIPES)
def test_json_gives_the_same_recipe(name):
    recipe = RECIPES[name]()
    assert from_json(type(recipe), as_json(recipe)) == recipe


@pytest.mark.parametrize("task", TASKS)
def test_json_gives_the_same_defaults_and_paths(task):
    kind = TASKS[task].config_type
    config = kind(
        data=DataConfig(data_dir=Path("/data"), crop=(3, 4)),
        checkpoint_minutes=math.inf,
    )
    assert from_json(kind, as_json(kind())) == kind()
    assert from_json(kind, as_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("mode"), "settings are missing: mode"),
        (
            lambda c: (c.pop("mode"), c["inner"].pop("rate")),
            "settings are missing: inner.rate, mode",
        ),
        (lambda c: c.update(more=1), "there is no setting 'more'"),
        (lambda c: c["inner"].update(more=1), "there is no setting 'inner.more'"),
        (lambda c: c.update(share="0.5"), "share must be a valid number, got '0.5'"),
        (
            lambda c: c["inner"].update(rate=-1),
            "inner.rate must be greater than 0, got -1",
        ),
        (lambda c: c["inner"].update(rate=9.0), "rate 9.0 is above size 3"),
        (lambda c: c.update(color="x"), "unknown color 'x'; known: red, blue"),
        (lambda c: c.update(inner=3), "inner must be an object, got 3"),
    ],
)
def test_json_of_other_settings_is_refused(change, message):
    content = as_json(Outer())
    change(content)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        from_json(Outer, content)


######## The command line #############################################################


def test_flags_give_the_settings():
    flags = "--inner.rate 2 --share 0.5 --exact --mode slow --color blue --file weights"
    found = tyro.cli(Outer, args=[*flags.split(), "--colors", "blue, red"])
    assert found == Outer(
        inner=Inner(rate=2.0),
        share=0.5,
        exact=True,
        mode="slow",
        color="blue",
        colors=("blue", "red"),
        file=Path("weights"),
    )


@pytest.mark.parametrize(
    ("given", "colors"),
    [
        (["blue,red"], ("blue", "red")),
        (["blue", "red"], ("blue", "red")),
        (["blue,", "red"], ("blue", "red")),
        ([""], ()),
        ([], ()),
    ],
)
def test_names_are_separated_by_commas_or_spaces(given, colors):
    found = tyro.cli(Outer, args=["--colors", *given, "--exact"])
    assert (found.colors, found.exact) == (colors, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--share 1", "share must be less than 1, got 1.0"),
        ("--weight nan", "weight must be a finite number, got nan"),
        ("--inner.rate 9", "rate 9.0 is above size 3"),
        ("--inner.size 2.5", "invalid literal for int() with base 10: '2.5'"),
        ("--mode fsat", "invalid choice 'fsat' for argument '--mode'"),
        ("--color rde", "unknown color 'rde'; did you mean red? known: red, blue"),
        (
            "--colors red,bleu",
            "unknown color 'bleu'; did you mean blue? known: red (as",
        ),
        ("--shaer 0.5", "Perhaps you meant: --share FLOAT"),
    ],
)
def test_bad_flags_are_shown_in_a_box(flags, message, capsys):
    with pytest.raises(SystemExit) as raised:
        tyro.cli(Outer, args=flags.split())
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert squeezed(message) in squeezed(printed.err)


def test_help_shows_the_names(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Outer, args=["--help"])
    text = squeezed(capsys.readouterr().out)
    assert "--color{red,blue}" in text
    assert "--colors[NAME...]" in text


######## The configs of runs ##########################################################


def fields_of_configs():
    return [
        pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
        for kind in CONFIGS
        for field in dataclasses.fields(kind)
    ]


class Stranger:
    """A type that no setting has."""

    def __repr__(self):
        return "a stranger"


_PAGE = r"(; see docs/\S+)?$"  # what needs explaining names its page


@pytest.mark.parametrize(("kind", "name"), fields_of_configs())
def test_a_wrong_type_is_refused_for_every_setting(kind, name):
    for wrong in (Stranger(), {"stranger": 1}, b"stranger"):
        got = f"got {re.escape(repr(wrong))}{_PAGE}"
        message = rf"^{name} (must be|is not allowed: ).+, {got}"
        with pytest.raises(UsageError, match=message):
            kind(**{name: wrong})


@pytest.mark.parametrize(("kind", "name"), fields_of_configs())
def test_numbers_are_no_texts_and_texts_no_numbers(kind, name):
    default = getattr(kind(), name)
    wrong = {bool: 1, int: "3", float: "0.5", str: 3}.get(type(default), True)
    with pytest.raises(
        UsageError, match=rf"^{name} .+, got {re.escape(repr(wrong))}{_PAGE}"
    ):
        kind(**{name: wrong})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
        for kind in CONFIGS
        for field in dataclasses.fields(kind)
        if isinstance(getattr(kind(), field.name), float)
        or field.name in ("clip_norm", "head_learning_rate")
    ],
)
def test_nan_is_refused_for_every_number(kind, name):
    with pytest.raises(UsageError, match=rf"^{name} must be .+, got nan$"):
        kind(**{name: math.nan})
    if name != "checkpoint_minutes":  # inf is for no checkpoint before the end
        with pytest.raises(UsageError, match=rf"^{name} must be .+, got inf$"):
            kind(**{name: math.inf})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            ClassificationConfig,
            {"precision": "bf16"},
            "precision must be 'float32' or 'bfloat16', got 'bf16'",
        ),
        (
            ClassificationConfig,
            {"model": "resnet9"},
            r"unknown model 'resnet9'; did you mean resnet8.*\? known: .*resnet8",
        ),
        (
            ClassificationConfig,
            {"label_smoothing": 1.0},
            "label_smoothing must be less than 1, got 1.0",
        ),
        (
            SegmentationConfig,
            {"class_weights": "balance"},
            "class_weights must be 'none' or 'balanced', got 'balance'",
        ),
        (SegmentationConfig, {"model": "resnet8"}, "unknown model 'resnet8'; known: "),
        (
            TranslationConfig,
            {"gan_loss": "ls"},
            "gan_loss must be 'bce' or 'lsgan', got 'ls'",
        ),
        (
            TranslationConfig,
            {"generator": "patchgan70"},
            "unknown generator 'patchgan70'; known: .*unet256",
        ),
        (
            TranslationConfig,
            {"l1_weight": -1},
            "l1_weight must be greater than or equal to 0, got -1",
        ),
        (
            DataConfig,
            {"augment": ("mirorr",)},
            "unknown augmentation 'mirorr'; known: .*random_flip",
        ),
        (
            DataConfig,
            {"eval_split": "train"},
            "eval_split must be 'test' or 'validation', got 'train'",
        ),
        (DataConfig, {"image_size": (0, 8)}, "image_size.0 must be greater than 0"),
        (DataConfig, {"crop": (8,)}, r"crop\.1 is not allowed: .*, got \(8,\)"),
        (DataConfig, {"crop": (8, 8, 3)}, r"crop is not allowed: .*, got \(8, 8, 3\)"),
        (
            TrainingConfig,
            {"epochs": 0},
            "epochs must be greater than or equal to 1, got 0",
        ),
        (
            TrainingConfig,
            {"seed": 2**31 - 2, "seeds": 3},
            r"seed \+ seeds must be at most 2147483648, got 2147483649",
        ),
        (TrainingConfig, {"seed": 2**31}, "seed must be less than 2147483648, got 2"),
        (
            TrainingConfig,
            {"batch_size": 8, "grad_accum": 3},
            "grad_accum must divide the batch size, 8; got 3",
        ),
    ],
)
def test_bad_settings_of_runs_are_refused(kind, changes, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        kind(**changes)


def test_a_change_of_a_recipe_is_checked():
    recipe = RECIPES["gc_cifar100_resnet50"]()
    with pytest.raises(UsageError, match="unknown model 'resnet'; did you mean resnet"):
        dataclasses.replace(recipe, model="resnet")
    with pytest.raises(UsageError, match="the step schedule needs milestones"):
        dataclasses.replace(recipe.optimizer, milestones=())
