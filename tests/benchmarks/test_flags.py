"""Flags that take several values are the same in all commands."""

import typing

import pytest
import tyro

from benchmarks.compile import CompileConfig
from benchmarks.gpu import GpuConfig
from benchmarks.networks import NetworksConfig
from benchmarks.speed import SpeedConfig
from benchmarks.studies.config import CompareConfig
from train.data.config import DataConfig
from train.optim.config import OptimizerConfig
from train.settings import Separated

WITH_SEVERAL = {
    CompareConfig: {"techniques", "optimizers"},
    CompileConfig: {"target", "networks", "techniques"},
    DataConfig: {"augment"},
    GpuConfig: {"parts"},
    NetworksConfig: {"names"},
    OptimizerConfig: {"milestones", "techniques"},
    SpeedConfig: {"tables", "networks"},
}


@pytest.mark.parametrize("kind", WITH_SEVERAL)
def test_all_flags_with_several_values_split_them_alike(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    several = {name for name, hint in hints.items() if "..." in str(hint)}
    assert several == WITH_SEVERAL[kind]
    for name in several:
        metadata = hints[name].__metadata__
        assert any(isinstance(each, Separated) for each in metadata), name


@pytest.mark.parametrize(
    ("kind", "flags", "name", "values"),
    [
        (OptimizerConfig, "--milestones 2,4 8", "milestones", (2, 4, 8)),
        (CompileConfig, "--networks resnet8,u*", "networks", ("resnet8", "u*")),
        (NetworksConfig, "--names resnet8,resnet20", "names", ("resnet8", "resnet20")),
        (SpeedConfig, "--networks resnet8, unet64", "networks", ("resnet8", "unet64")),
        (
            CompareConfig,
            "classification --techniques sam,centralize+sam",
            "techniques",
            ("sam", "centralize+sam"),
        ),
        (
            CompareConfig,
            "classification --optimizers adam,lamb",
            "optimizers",
            ("adam", "lamb"),
        ),
    ],
)
def test_several_values_are_separated_by_spaces_or_commas(kind, flags, name, values):
    assert getattr(tyro.cli(kind, args=flags.split()), name) == values


def test_a_wrong_number_among_several_is_named(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(OptimizerConfig, args=["--milestones", "2,x"])
    assert "'x'" in capsys.readouterr().err
