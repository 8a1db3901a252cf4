"""What a run says of its data, on the command line and in its config."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from jax.sharding import Mesh
from tyro.constructors import PrimitiveConstructorSpec

from train.data import augment
from train.data._dataset import Dataset
from train.data._prepared import load
from train.data.augment import Augmentation
from train.data.inputs import Input, open_inputs
from train.errors import UsageError
from train.progress import Progress, silent

AUGMENTATIONS = {
    "pad_crop": "random crop after padding by 4 pixels",
    "mirror": "left and right changed in one half of the images",
    "random_resized_crop": "a random part of the image, scaled to its size",
    "random_scale_crop": "scaled by a factor from 0.5 to 2, then cropped",
    "color_jitter": "brightness, contrast and saturation changed by up to 0.4",
    "cutout": "a square of half the image's height left out",
}

# They change what an image looks like: in a pair that is what is to be predicted.
_PHOTOMETRIC = ("color_jitter", "cutout")

# They crop by themselves.
_RESIZING = ("random_resized_crop", "random_scale_crop")


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


Size = Annotated[
    tuple[int, int] | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|HxW",
        instance_from_str=_parse_size,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda v: ["x".join(map(str, v)) if v else "None"],
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The images to train and evaluate on."""

    dataset: str = "digits"
    """Name of a prepared dataset; `python -m train.data list` shows them."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Validation is a fifth of the training images, where there is none already."""
    image_size: Size = None
    """Pixels that images are brought to; needed only if they differ in size."""
    crop: Size = None
    """Pixels that training images are cropped to, at random; all of them if unset."""
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
    """Random changes: pad_crop, mirror, random_resized_crop, random_scale_crop,
    color_jitter, cutout."""
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    """Which half of a pair is translated into which; A is on the left."""
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
            direction=self.direction,
            data_dir=self.data_dir,
            progress=progress,
        )
        return dataset.hold_out() if self.evaluate_on == "validation" else dataset

    def open(
        self, dataset: Dataset, mesh: Mesh | None = None, progress: Progress = silent
    ) -> tuple[Input, Input]:
        """The inputs to train and to evaluate on, on the devices of a mesh."""
        splits = {name: dataset.split(name) for name in ("train", self.evaluate_on)}
        inputs = open_inputs(
            splits, mesh, mode=self.input, num_workers=self.workers, progress=progress
        )
        return inputs["train"], inputs[self.evaluate_on]

    def training_size(self, dataset: Dataset) -> tuple[int, int]:
        """(height, width) of images as they are trained on.

        Raises:
          UsageError: if the crop is larger than the images.
        """
        size = dataset.split("train").reader.size
        if self.crop is None:
            return size
        if self.crop[0] > size[0] or self.crop[1] > size[1]:
            cropped, whole = ("x".join(map(str, x)) for x in (self.crop, size))
            raise UsageError(
                f"a crop of {cropped} does not fit images of {whole}: choose a smaller "
                "--crop, or bring them to a larger --image-size"
            )
        return self.crop

    def augmentation(self, dataset: Dataset, normalize: Augmentation) -> Augmentation:
        """The random changes, with the normalisation where it belongs among them.

        Raises:
          UsageError: if the crop is larger than the images, or a pair would be changed
            in its looks.
        """
        photometric = [name for name in self.augment if name in _PHOTOMETRIC]
        if photometric and dataset.task == "translation":
            raise UsageError(
                f"{photometric[0]} changes what is to be predicted in a pair: leave it "
                "out of --augment"
            )
        size = self.training_size(dataset)
        ignore_label = dataset.split("train").reader.ignore_label
        made = {
            "pad_crop": lambda: augment.pad_crop(ignore_label=ignore_label),
            "mirror": lambda: augment.mirror(),
            "random_resized_crop": lambda: augment.random_resized_crop(size),
            "random_scale_crop": lambda: augment.random_scale_crop(
                size, ignore_label=ignore_label
            ),
            "color_jitter": lambda: augment.color_jitter(),
            "cutout": lambda: augment.cutout(max(1, size[0] // 2)),
        }
        changes = [made[name]() for name in self.augment if name != "cutout"]
        if self.crop and not set(_RESIZING) & set(self.augment):
            changes.append(augment.random_crop(size))
        # What cutout leaves is then the mean colour, as its paper has it.
        after = [made["cutout"]()] if "cutout" in self.augment else []
        return augment.chain(*changes, normalize, *after)
