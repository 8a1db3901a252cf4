"""What a run says of its data, on the command line and in its config."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from train.data import augment
from train.data._dataset import Dataset
from train.data._prepared import load
from train.data.augment import Augmentation
from train.data.inputs import Input, open_inputs
from train.progress import Progress, silent

AUGMENTATIONS = {
    "pad_crop": "random crop after padding by 4 pixels",
    "mirror": "left and right changed in one half of the images",
    "random_resized_crop": "a random part of the image, scaled to its size",
    "color_jitter": "brightness, contrast and saturation changed by up to 0.4",
    "cutout": "a square of half the image's height left out",
}


def _parse_augment(arguments: list[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in arguments[0].split(",") if name.strip())
    for name in names:
        if name not in AUGMENTATIONS:
            known = "; ".join(f"{k} ({v})" for k, v in AUGMENTATIONS.items())
            raise ValueError(f"unknown augmentation {name!r}; known: {known}")
    return names


def _parse_size(arguments: list[str]) -> tuple[int, int] | None:
    if arguments[0] == "None":
        return None
    height, _, width = arguments[0].partition("x")
    sides = (height, width or height)
    if not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"{arguments[0]!r} is no size: write 224, or 360x480")
    return int(sides[0]), int(sides[1])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The images to train and evaluate on."""

    dataset: str = "digits"
    """Name of a prepared dataset; `python -m train.data list` shows them."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Validation is a fifth of the training images, where there is none already."""
    image_size: Annotated[
        tuple[int, int] | None,
        PrimitiveConstructorSpec(
            nargs=1,
            metavar="N|HxW",
            instance_from_str=_parse_size,
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda v: ["x".join(map(str, v)) if v else "None"],
        ),
    ] = None
    """Pixels that images are brought to; needed only if they differ in size."""
    augment: Annotated[
        tuple[str, ...],
        PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME,NAME,...",
            instance_from_str=_parse_augment,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(value)],
        ),
    ] = ()
    """Random changes: pad_crop, mirror, random_resized_crop, color_jitter, cutout."""
    input: Literal["auto", "resident", "stream"] = "auto"
    """In the device's memory, or decoded while training; auto goes by the size."""
    workers: int | None = None
    """Processes that decode a stream; 0 for threads."""
    data_dir: Path | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""

    def load(self, task: str, progress: Progress = silent) -> Dataset:
        """The dataset for a task, with the split to evaluate on."""
        dataset = load(
            self.dataset,
            task=task,
            size=self.image_size,
            data_dir=self.data_dir,
            progress=progress,
        )
        return dataset.hold_out() if self.evaluate_on == "validation" else dataset

    def open(
        self, dataset: Dataset, progress: Progress = silent
    ) -> tuple[Input, Input]:
        """The inputs to train and to evaluate on."""
        splits = {name: dataset.split(name) for name in ("train", self.evaluate_on)}
        inputs = open_inputs(
            splits, mode=self.input, num_workers=self.workers, progress=progress
        )
        return inputs["train"], inputs[self.evaluate_on]

    def augmentation(self, dataset: Dataset) -> Augmentation:
        """The random changes, then normalisation by the training images."""
        size = dataset.split("train").reader.size
        made = {
            "pad_crop": lambda: augment.pad_crop(),
            "mirror": lambda: augment.mirror(),
            "random_resized_crop": lambda: augment.random_resized_crop(size),
            "color_jitter": lambda: augment.color_jitter(),
            "cutout": lambda: augment.cutout(max(1, size[0] // 2)),
        }
        # What cutout leaves is then the mean colour, as its paper has it.
        names = [*(name for name in self.augment if name != "cutout")]
        after = [name for name in self.augment if name == "cutout"]
        return augment.chain(
            *(made[name]() for name in names),
            augment.normalize(dataset.mean, dataset.std),
            *(made[name]() for name in after),
        )
