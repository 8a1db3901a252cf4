"""The studies that are declared: their settings, for anyone to run.

`desk` studies fit two CPU cores, `lab` studies an hour on one GPU, and `paper` studies
have the settings of a paper. `benchmarks.studies.papers` says which claims each one
goes with.

>>> study = STUDIES["digits_nulls"]
>>> study.config().task, study.scale
('classification', 'desk')
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import OURS

Scale = Literal["paper", "lab", "desk"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A declared study.

    Attributes:
      name: its name.
      scale: how much hardware it takes.
      about: network and data in words.
      settings: the settings of `CompareConfig` that are not the default.
      pretrained: whether its runs start from weights that whoever runs it names.
    """

    name: str
    scale: Scale
    about: str
    settings: Mapping[str, Any]
    pretrained: bool = False

    def config(self, **changes: Any) -> CompareConfig:
        """Returns the settings of the study.

        Args:
          changes: settings that belong to who runs it, such as `seeds` and `weights`.
        """
        return CompareConfig(**{**self.settings, **changes})


STUDIES: dict[str, Study] = {}


def _declare(
    scale: Scale,
    name: str,
    about: str,
    task: str,
    *,
    pretrained: bool = False,
    **settings: Any,
) -> None:
    STUDIES[name] = Study(
        name=name,
        scale=scale,
        about=about,
        settings={"task": task, **settings},
        pretrained=pretrained,
    )


_desk = functools.partial(_declare, "desk")
_lab = functools.partial(_declare, "lab")
_paper = functools.partial(_declare, "paper")

_ALL = (*OURS, "sam", "centralize+perturbed_unit_step")

# ------------------------------- Two CPU cores ----------------------------------------

_desk(
    "digits_nulls",
    "ResNet-8 on digits, and each technique without its idea",
    "classification",
    trials=3,
    seeds=10,
    optimizers=("adam", "rmsprop"),
    techniques=(
        *("scale_by_random", "scale_by_mean", "optimizer+scale_by_mean"),
        *("scale_each_by_random", "scale_by_triangle"),
        *("centralize", "optax_centralize", "centralize:conv_only=true"),
        *("optimizer+centralize", "barzilai_borwein_step"),
        "barzilai_borwein_step:min_scale=1:max_scale=1",
        *("perturbed_unit_step", "normalize", "sam", "sam:norms_only=true"),
        "centralize+perturbed_unit_step",
    ),
)
for name, title, dataset, images, epochs, trials in (
    ("cifar10_1000_tuned", "CIFAR-10", "image_folder/cifar10", 1_000, 10, 3),
    ("cifar10_10000", "CIFAR-10", "image_folder/cifar10", 10_000, 4, 3),
    ("fashion_1000", "Fashion-MNIST", "fashion_mnist_idx", 1_000, 10, None),
):
    _desk(
        name,
        f"ResNet-8 on {title}, {images:,} images",
        "classification",
        dataset=dataset,
        train_examples=images,
        epochs=epochs,
        eval_every=epochs // 2,
        trials=trials,
        seeds=10 if images == 1_000 else 5,
        optimizers=("adam",),
        techniques=_ALL,
    )
_desk(
    "cifar10_1000_resnet20",
    "ResNet-20 on CIFAR-10, 1,000 images",
    "classification",
    model="resnet20",
    dataset="image_folder/cifar10",
    train_examples=1_000,
    epochs=10,
    eval_every=10,
    trials=3,
    seeds=5,
    optimizers=("adam",),
    techniques=_ALL,
)
# Rates that are small and large for SGD, with a momentum at which the paper sees gains
# and one at which it does not.
for momentum in (0.5, 0.9):
    for size, rate in (("small", 0.03), ("large", 1.0)):
        _desk(
            f"rg_digits_{size}_{momentum}",
            f"ResNet-8 on digits, momentum {momentum} and a {size} learning rate",
            "classification",
            momentum=momentum,
            learning_rate=rate,
            seeds=10,
            techniques=("scale_by_random", "scale_by_mean", "scale_each_by_random"),
        )
for size, rate in (("small", 0.03), ("large", 1.0)):
    _desk(
        f"rg_cifar10_{size}",
        f"ResNet-8 on CIFAR-10, 1,000 images, momentum 0.5 and a {size} learning rate",
        "classification",
        dataset="image_folder/cifar10",
        train_examples=1_000,
        epochs=10,
        eval_every=5,
        momentum=0.5,
        learning_rate=rate,
        seeds=10,
        techniques=(
            *("scale_by_random", "scale_by_mean", "optimizer+scale_by_mean"),
            *("scale_each_by_random", "scale_by_triangle"),
        ),
    )
_desk(
    "fine_tuning",
    "ResNet-20 from CIFAR-10, fine-tuned to 300 images of digits at 16x16",
    "classification",
    pretrained=True,
    model="resnet20",
    dataset="digits",
    image_size=(16, 16),
    train_examples=300,
    epochs=10,
    trials=3,
    seeds=10,
    techniques=("centralize", "perturbed_unit_step"),
)


def _wrong_axis(name: str, about: str, **settings: Any) -> None:
    _desk(
        name,
        f"{about}, and the mean over other axes",
        "classification",
        trials=3,
        techniques=("centralize", "optax_centralize"),
        **settings,
    )


_wrong_axis(
    "wrong_axis_digits",
    "MobileNetV2 on digits",
    model="mobilenet_v2_cifar",
    seeds=10,
)
_wrong_axis(
    "wrong_axis_cifar10",
    "ResNet-8 on CIFAR-10, 1,000 images",
    dataset="image_folder/cifar10",
    train_examples=1000,
    epochs=10,
    eval_every=5,
    seeds=10,
)
_wrong_axis(
    "wrong_axis_vit",
    "ViT-Ti/16 on 300 images of digits at 32x32",
    model="deit_ti_16",
    dataset="digits",
    image_size=(32, 32),
    train_examples=300,
    base_optimizer="adam",
    seeds=10,
)
_desk(
    "scenes_segmentation",
    "small U-Net on drawn scenes of digits, 100 images",
    "segmentation",
    train_examples=100,
    trials=3,
    seeds=5,
    eval_every=2,
    optimizers=("sgd",),
    techniques=OURS,
)
_desk(
    "scenes_translation",
    "small pix2pix on drawn scenes of digits, 100 images",
    "translation",
    train_examples=100,
    seeds=5,
    eval_every=2,
    techniques=("scale_by_random", "scale_by_mean", "centralize", "optax_centralize"),
)
_desk(
    "camvid_100",
    "small U-Net on CamVid at 60x80, 100 images",
    "segmentation",
    dataset="camvid",
    image_size=(60, 80),
    train_examples=100,
    epochs=20,
    eval_every=10,
    seeds=5,
    optimizers=("sgd",),
    techniques=OURS,
)
for name, networks, techniques in (
    ("maps_generator", "generator", ("centralize", "optax_centralize")),
    ("maps_both", "both", ()),
):
    _desk(
        name,
        f"small pix2pix on maps at 64x64, 300 images, techniques on "
        f"{'both networks' if networks == 'both' else 'the generator'}",
        "translation",
        dataset="paired_images/maps",
        image_size=(64, 64),
        techniques_on=networks,
        train_examples=300,
        # It has no other split to test on, and nothing is chosen by it.
        eval_split="validation",
        epochs=5,
        eval_every=5,
        seeds=5,
        techniques=("scale_by_random", "scale_by_mean", *techniques),
    )

# ---------------------------- An hour on one GPU --------------------------------------

_lab(
    "rg_camvid_pspnet50",
    "PSPNet-50 on CamVid",
    "segmentation",
    dataset="camvid",
    model="pspnet50",
    epochs=40,
    seeds=5,
    techniques=OURS,
)
_lab(
    "rg_cifar10_lab",
    "ResNet-34 on CIFAR-10, 20 epochs",
    "classification",
    recipe="rg_cifar10_resnet34",
    epochs=20,
    seeds=5,
    techniques=("scale_by_random", "scale_by_mean"),
)
_lab(
    "rg_maps_lab",
    "pix2pix on maps, 20 epochs",
    "translation",
    recipe="rg_maps_pix2pix",
    epochs=20,
    seeds=5,
    techniques=("scale_by_random", "scale_by_mean"),
)
_lab(
    "gc_cifar10_lab",
    "ResNet-18 on CIFAR-10, 20 epochs",
    "classification",
    recipe="rg_cifar10_resnet34",
    model="resnet18_cifar",
    momentum=0.9,
    weight_decay=5e-4,
    epochs=20,
    seeds=5,
    techniques=("centralize", "optax_centralize"),
)
_lab(
    "step_tuned_lab",
    "ResNet-20 on CIFAR-10, 40 epochs",
    "classification",
    recipe="step_tuned_cifar10_resnet20",
    epochs=40,
    seeds=5,
    techniques=(
        "barzilai_borwein_step",
        "barzilai_borwein_step:min_scale=1:max_scale=1",
    ),
    optimizers=("adam", "rmsprop"),
)
_lab(
    "pugd_lab",
    "UPANet-16 on CIFAR-10, 20 epochs",
    "classification",
    recipe="pugd_cifar10_upanet16",
    epochs=20,
    seeds=5,
    techniques=("perturbed_unit_step", "normalize", "sam"),
)

# --------------------------- Settings of the papers -----------------------------------

for number, (rate, momentum) in enumerate(
    ((0.01, 0.95), (0.001, 0.95), (0.01, 0.9), (0.0001, 0.95)), start=1
):
    _paper(
        f"rg_voc_{number}",
        f"PSPNet-101 on PASCAL VOC 2012, rate {rate}, momentum {momentum}",
        "segmentation",
        recipe="rg_voc_pspnet101",
        techniques=("scale_by_random",),
        learning_rate=rate,
        momentum=momentum,
    )
_paper(
    "rg_voc_ranges",
    "PSPNet-101 on PASCAL VOC 2012, ranges of the factor",
    "segmentation",
    recipe="rg_voc_pspnet101",
    techniques=(
        "scale_by_random",
        *(
            f"scale_by_random:minval={low}:maxval={high}"
            for low, high in ((0.5, 1.0), (0.0, 2.0), (1.0, 2.0), (0.0, 3.0))
        ),
    ),
)
for momentum in (0.0, 0.9, 0.95):
    _paper(
        f"rg_duc_{momentum:g}",
        f"ResNet-101-DUC+HDC on PASCAL VOC 2012, momentum {momentum}",
        "segmentation",
        recipe="rg_voc_duc_hdc101",
        techniques=("scale_by_random",),
        momentum=momentum,
    )
for model in (
    *("resnet34_cifar", "mobilenet_v2_cifar", "densenet121_cifar", "resnext29_4x64d"),
):
    _paper(
        f"rg_cifar10_{'resnet34' if model == 'resnet34_cifar' else model}",
        f"{model} on CIFAR-10",
        "classification",
        recipe="rg_cifar10_resnet34",
        model=model,
        techniques=("scale_by_random",),
    )
_paper(
    "rg_maps",
    "pix2pix on maps",
    "translation",
    recipe="rg_maps_pix2pix",
    techniques=("scale_by_random",),
)


def _gc_cifar100(name: str, about: str, **settings: Any) -> None:
    _paper(
        name,
        f"{about} on CIFAR-100",
        "classification",
        recipe="gc_cifar100_resnet50",
        techniques=("centralize",),
        seeds=10,
        **settings,
    )


for model in (
    *("resnet18_cifar", "resnet101_cifar", "resnext29_4x64d", "vgg11_bn_cifar"),
    "densenet121_cifar",
):
    _gc_cifar100(f"gc_cifar100_{model}", model, model=model)
for optimizer in ("sgd", "adam", "adagrad", "sgdw", "adamw"):
    _gc_cifar100(
        f"gc_optimizers_{optimizer}",
        f"ResNet-50 with {optimizer}",
        base_optimizer=optimizer,
        **({"weight_decay": 1e-3} if optimizer in ("sgdw", "adamw") else {}),
    )
for decay in ("0", "1e-4", "2e-4", "1e-3"):  # 5e-4 is gc_optimizers_sgd
    _gc_cifar100(
        f"gc_decay_{decay}",
        f"ResNet-50, weight decay {decay},",
        weight_decay=float(decay),
    )
for optimizer, written in (
    *(("sgd", "0.05"), ("sgd", "0.2")),
    *(("adam", "0.0005"), ("adam", "0.0015")),
):
    _gc_cifar100(
        f"gc_rate_{optimizer}_{written}",
        f"ResNet-50, {optimizer} at {written},",
        base_optimizer=optimizer,
        learning_rate=float(written),
    )
for name, dataset in (
    *(("aircraft", "fgvc_aircraft"), ("cars", "cars196")),
    *(("dogs", "stanford_dogs"), ("cub", "caltech_birds2011")),
):
    _paper(
        f"gc_{name}",
        f"ResNet-50 from ImageNet, fine-tuned on {dataset}",
        "classification",
        pretrained=True,
        recipe="gc_aircraft_resnet50",
        dataset=dataset,
        techniques=("centralize",),
    )
_paper(
    "gc_mini_imagenet",
    "ResNet-50 on Mini-ImageNet",
    "classification",
    recipe="gc_mini_imagenet_resnet50",
    techniques=("centralize",),
)
_paper(
    "step_tuned_cifar10",
    "ResNet-20 on CIFAR-10",
    "classification",
    recipe="step_tuned_cifar10_resnet20",
    techniques=("barzilai_borwein_step",),
    optimizers=("adam", "rmsprop"),
)
_paper(
    "pugd_upanet16",
    "UPANet-16 on CIFAR-10",
    "classification",
    recipe="pugd_cifar10_upanet16",
    techniques=("perturbed_unit_step", "sam"),
)
for dataset in ("cifar10", "cifar100"):
    _paper(
        f"pugd_vit_{dataset}",
        f"ViT-B/16 from ImageNet, fine-tuned on {dataset}",
        "classification",
        pretrained=True,
        recipe="pugd_cifar10_vit",
        dataset=dataset,
        techniques=("perturbed_unit_step",),
    )
