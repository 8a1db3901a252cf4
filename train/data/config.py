"""The config of the data of a run."""

import dataclasses
import math
from typing import Annotated, Literal

import pydantic
from jax.sharding import Mesh
from tyro.constructors import PrimitiveConstructorSpec

from train.data import augment
from train.data.augment import Augmentation
from train.data.dataset import Dataset, RandomResizedCrop, Split
from train.data.loaders import Loader, memory_limit, open_loaders
from train.data.preparation.prepared import load
from train.errors import UsageError
from train.progress import Progress, silent
from train.settings import AnyPath, NameList, NonNegative, Positive, settings

AUGMENTATIONS = {
    "pad_crop": "random crop after padding by 4 pixels",
    "random_flip": "left and right exchanged in half of the images",
    "random_resized_crop": "a random part of the stored image, resized",
    "random_scale_crop": "scaled by a factor from 0.5 to 2, then cropped",
    "color_jitter": "brightness, contrast and saturation changed by up to 0.4",
    "cutout": "a square of half the image's height erased",
}

# They change the looks of an image, which is what the network predicts in a pair.
_PHOTOMETRIC = ("color_jitter", "cutout")

# They bring images to the training size, so that no other crop is needed.
_RESIZING = ("random_resized_crop", "random_scale_crop")


def _parse_size(arguments: list[str]) -> tuple[int, int] | None:
    if arguments[0] == "None":
        return None
    height, _, width = arguments[0].partition("x")
    sides = (height, width or height)
    if not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"{arguments[0]!r} is no size: write 224, or 360x480")
    return int(sides[0]), int(sides[1])


Size = Annotated[
    Annotated[tuple[Positive[int], Positive[int]], pydantic.Field(strict=False)] | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|HxW",
        instance_from_str=_parse_size,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda v: ["x".join(map(str, v)) if v else "None"],
    ),
]


@settings
class DataConfig:
    """The images to train and evaluate on."""

    dataset: str = "digits"
    """Name of a prepared dataset; `python -m train.data list` shows them."""
    eval_split: Literal["test", "validation"] = "test"
    """Split to evaluate on; a fifth of the training images is held out for validation
    if the dataset has no such split."""
    train_examples: Positive[int] | None = None
    """Train on so many of the training images, of each class as many as possible; the
    same ones in every run. All of them if unset."""
    image_size: Size = None
    """Resize images to this height and width; needed only if they differ in size."""
    crop: Size = None
    """Height and width of random crops of training images; not cropped if unset."""
    augment: Annotated[tuple[str, ...], NameList("augmentation", AUGMENTATIONS)] = ()
    """Random changes of training images: pad_crop, random_flip, random_resized_crop,
    random_scale_crop, color_jitter, cutout."""
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    """Which half of a pair is translated into the other; A is on the left."""
    loader: Literal["auto", "memory", "grain"] = "auto"
    """Keep images in the memory of the device, or decode them with Grain while
    training; auto keeps them if they fit in a quarter of the memory."""
    num_workers: NonNegative[int] | None = None
    """Processes in which Grain decodes; 0 for threads. Chosen by the number of cores if
    unset."""
    data_dir: AnyPath | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""

    def load(self, task: str, progress: Progress = silent) -> Dataset:
        """Loads the dataset for a task, with the split to evaluate on.

        The first call decodes all images to measure them. If they are to be kept in
        memory, the same pass writes the cache from which `open` reads.
        """
        train_size = None if self._crops_stored_images else self.image_size
        sizes = {("train", train_size), (self.eval_split, self.image_size)}
        dataset = load(
            self.dataset,
            task=task,
            size=self.image_size,
            direction=self.direction,
            data_dir=self.data_dir,
            progress=progress,
            cache=() if self.loader == "grain" else sizes,
            max_cache_bytes=memory_limit() if self.loader == "auto" else math.inf,
        )
        if self.eval_split == "validation":
            dataset = dataset.hold_out()
        if self.train_examples is None:
            return dataset
        train = dataset.split("train")
        if self.train_examples > len(train):
            raise UsageError(
                f"train_examples must be at most {len(train)}, the training images of "
                f"{self.dataset}, got {self.train_examples}"
            )
        fewer = {"train": train.subset(self.train_examples)}
        return dataclasses.replace(dataset, splits={**dataset.splits, **fewer})

    def open(
        self, dataset: Dataset, mesh: Mesh | None = None, progress: Progress = silent
    ) -> tuple[Loader, Loader]:
        """Opens the loaders to train and to evaluate on, on the devices of a mesh.

        Raises:
          UsageError: if the dataset has no such splits, or images cannot be kept in
            memory that `random_resized_crop` cuts while they are decoded.
        """
        loaders = open_loaders(
            {
                "train": self.training_split(dataset),
                "eval": dataset.split(self.eval_split),
            },
            mesh,
            mode=self.loader,
            num_workers=self.num_workers,
            progress=progress,
        )
        return loaders["train"], loaders["eval"]

    def training_split(self, dataset: Dataset) -> Split:
        """Returns the training split with the reader that training takes.

        `random_resized_crop` cuts its boxes from the images as they are stored, so that
        it loses no detail. Where these have one size, they are read at that size and
        cropped on the device. Where they differ in size, they are cropped while they
        are decoded. In all other cases images are brought to `image_size`, as those to
        evaluate on are.
        """
        split = dataset.split("train")
        if not self._crops_stored_images:
            return split
        if split.stored_size is not None:
            reader = dataclasses.replace(split.reader, size=split.stored_size)
        else:
            reader = dataclasses.replace(
                split.reader,
                size=self.training_size(dataset),
                random_crop=RandomResizedCrop(),
            )
        return dataclasses.replace(split, reader=reader)

    @property
    def _crops_stored_images(self) -> bool:
        return "random_resized_crop" in self.augment

    def training_size(self, dataset: Dataset) -> tuple[int, int]:
        """Returns (height, width) of the images that the network is trained on.

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
                "crop or a larger image_size"
            )
        return self.crop

    def augmentation(self, dataset: Dataset, normalize: Augmentation) -> Augmentation:
        """Returns the random changes made on the device, and the normalization.

        Raises:
          UsageError: if the crop is larger than the images, or the looks of a pair
            would be changed.
        """
        photometric = [name for name in self.augment if name in _PHOTOMETRIC]
        if photometric and dataset.task == "translation":
            raise UsageError(
                f"{photometric[0]} changes what is to be predicted in a pair: leave it "
                "out of augment"
            )
        size = self.training_size(dataset)
        ignore_label = dataset.split("train").reader.ignore_label
        made = {
            "pad_crop": lambda: augment.pad_crop(ignore_label=ignore_label),
            "random_flip": lambda: augment.random_flip(),
            "random_resized_crop": lambda: augment.random_resized_crop(size),
            "random_scale_crop": lambda: augment.random_scale_crop(
                size, ignore_label=ignore_label
            ),
            "color_jitter": lambda: augment.color_jitter(),
            "cutout": lambda: augment.cutout(max(1, size[0] // 2)),
        }
        elsewhere = {"cutout"}  # comes after the normalization
        if self.training_split(dataset).reader.random_crop is not None:
            elsewhere.add("random_resized_crop")  # happens while images are decoded
        changes = [made[name]() for name in self.augment if name not in elsewhere]
        if self.crop and not set(_RESIZING) & set(self.augment):
            changes.append(augment.random_crop(size))
        # There, cutout erases to the mean color, as in its paper.
        after = [made["cutout"]()] if "cutout" in self.augment else []
        return augment.chain(*changes, normalize, *after)
