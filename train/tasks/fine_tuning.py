"""Settings to fine-tune pretrained networks, for tasks that normalize photos."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from tyro.constructors import PrimitiveConstructorSpec

import models
from train.config import TrainingConfig
from train.data import Dataset, augment
from train.data.augment import Augmentation
from train.errors import UsageError, see
from train.settings import settings, unknown_name
from train.tasks.base import Batch

_Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
# What torchvision and most of timm train with.
_IMAGENET: _Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NORMALIZATIONS = ("dataset", "imagenet")


def _check_normalization(value: Any) -> str | _Statistics:
    """Checks a setting from Python or from JSON, where pairs are lists."""
    if isinstance(value, str):
        if value not in _NORMALIZATIONS:
            raise unknown_name("normalization", value, _NORMALIZATIONS)
        return value
    pair = value if isinstance(value, tuple | list) else ()
    parts = [tuple(part) for part in pair if isinstance(part, tuple | list)]
    if (
        len(parts) == len(pair) == 2
        and len(parts[0]) == len(parts[1]) in (1, 3)
        and all(type(x) in (int, float) for part in parts for x in part)
        and all(0 <= m <= 1 for m in parts[0])
        and all(0 < s <= 1 for s in parts[1])
    ):
        return tuple(map(float, parts[0])), tuple(map(float, parts[1]))
    raise UsageError(
        "normalization must be 'dataset', 'imagenet' or a pair (mean, std), each with "
        f"one or three numbers for images in [0, 1], got {value!r}"
        + see("finetuning.md")
    )


def _parse_normalization(arguments: list[str]) -> str | _Statistics:
    (text,) = arguments
    if "/" not in text:
        return _check_normalization(text)
    try:
        mean, std = (
            tuple(float(number) for number in part.split(","))
            for part in text.split("/")
        )
    except ValueError:
        raise ValueError(
            f"{text!r} is not MEAN/STD: write 0.5,0.5,0.5/0.25,0.25,0.25"
        ) from None
    return _check_normalization((mean, std))


def _normalization_as_text(value: str | _Statistics) -> list[str]:
    if isinstance(value, str):
        return [value]
    return ["/".join(",".join(map(str, part)) for part in value)]


Normalization = Annotated[
    str | _Statistics,
    pydantic.PlainValidator(_check_normalization),
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="dataset|imagenet|MEAN/STD",
        instance_from_str=_parse_normalization,
        is_instance=lambda value: isinstance(value, str | tuple),
        str_from_instance=_normalization_as_text,
    ),
]


@settings
class FineTuningConfig(TrainingConfig):
    """Settings to fine-tune a pretrained network."""

    freeze: Literal["none", "backbone"] = "none"
    """What keeps its pretrained parameters: backbone trains the last layers alone."""
    normalization: Normalization = "dataset"
    """Mean and standard deviation of the images: those of the dataset, those of
    ImageNet for networks of torchvision and timm, or a number per channel, such as
    0.5,0.5,0.5/0.25,0.25,0.25. Three channels turn gray images into RGB."""

    def check_network(
        self, model: str, norm: str | None, weights: Path | None, setting: str
    ) -> None:
        """Checks the settings that depend on the network.

        Args:
          model: name of the network.
          norm: the normalization of its layers; None for its own.
          weights: the file that it starts from, if any.
          setting: the name of the setting of this file.

        Raises:
          UsageError: if the network has no choice of norm, or if parameters would be
            kept that are not pretrained.
        """
        if norm is not None and "norm" not in models.describe(model).options:
            raise UsageError(
                f"{model} has no choice of norm, got {norm!r}: leave norm out, or take "
                f"one of {', '.join(_with_norm(models.describe(model).task))}"
            )
        for is_kept, what in (
            (self.freeze == "backbone", "freeze 'backbone'"),
            (norm == "frozen_batch", "norm 'frozen_batch'"),
        ):
            if is_kept and weights is None:
                raise UsageError(
                    f"{what} keeps what is pretrained, but the network starts from "
                    f"random parameters: name a file with {setting}"
                    + see("finetuning.md")
                )


def _with_norm(task: Any) -> list[str]:
    return [n for n in models.names(task=task) if "norm" in models.describe(n).options]


def make_normalize(
    config: FineTuningConfig, dataset: Dataset
) -> tuple[Augmentation, int]:
    """Returns the normalization of images, and the channels of its results.

    Raises:
      UsageError: if the images have other channels than the normalization.
    """
    channels = len(dataset.mean)
    mean, std = dataset.mean, dataset.std
    if config.normalization == "imagenet":
        mean, std = _IMAGENET
    elif not isinstance(config.normalization, str):
        mean, std = config.normalization
    normalize = augment.normalize(mean, std)
    if len(mean) == channels:
        return normalize, channels
    if channels == 1:
        return augment.chain(_gray_to_rgb, normalize), len(mean)
    raise UsageError(
        f"normalization has one channel, but images of {dataset.name} have {channels}: "
        f"give {channels} means and {channels} standard deviations"
    )


def _gray_to_rgb(key: jax.Array, batch: Batch) -> Batch:
    """Repeats the only channel; the key does not matter."""
    del key
    return batch | {"image": jnp.repeat(batch["image"], 3, axis=-1)}


class Frozen(nnx.BatchStat):
    """A parameter that is not trained.

    It is no `nnx.Param`, so it has no gradient, no weight decay and no optimizer state.
    """


def freeze(network: nnx.Module, *, trained: Iterable[str] = ()) -> None:
    """Makes the parameters of a network constant.

    Args:
      network: the network to change.
      trained: dotted paths of the modules whose parameters stay trainable.
    """
    prefixes = tuple(f"{path}." for path in trained)
    for path, module in list(nnx.iter_modules(network)):
        if _dotted(path).startswith(prefixes):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, Frozen(value.get_value()))


def _dotted(path: Sequence[Any]) -> str:
    return "".join(f"{part}." for part in path)
