"""Settings of the papers, which `--recipe` takes by name.

Each recipe is a function that returns a config; other flags change it. Where a paper
leaves a setting open, the docstring says what we chose. A recipe claims nothing: once
it has been run, its docstring states hardware, minutes, score and number of runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from train.config import TrainingConfig
from train.data.config import DataConfig
from train.optim.config import OptimizerConfig
from train.tasks.classification import ClassificationConfig
from train.tasks.segmentation import SegmentationConfig
from train.tasks.translation import TranslationConfig

_PAD_AND_FLIP = ("pad_crop", "random_flip")


def rg_voc_pspnet101() -> SegmentationConfig:
    """Random Gradient, Table 1: PSPNet-101 on PASCAL VOC 2012, crops of 224.

    python -m train segmentation --recipe rg_voc_pspnet101 --backbone-weights FILE

    Published: mIoU 68.014, against 65.473 without (--techniques ''). Epochs are not
    published; we chose 100. A step is scaled with probability 0.5, as in the code.

    Not run: it needs PASCAL VOC 2012, ImageNet weights and a GPU for about a day.
    """
    return SegmentationConfig(
        data=DataConfig(
            dataset="voc2012_segmentation",
            eval_split="validation",
            image_size=(500, 500),
            crop=(224, 224),
            augment=("random_flip",),
        ),
        model="pspnet101",
        epochs=100,
        batch_size=4,
        optimizer=OptimizerConfig(
            learning_rate=0.001,
            momentum=0.95,
            weight_decay=5e-4,
            schedule="poly",
            techniques=("scale_by_random",),
            probability=0.5,
        ),
    )


def rg_voc_duc_hdc101() -> SegmentationConfig:
    """Random Gradient, Figure 3: ResNet-101-DUC+HDC on PASCAL VOC 2012.

    python -m train segmentation --recipe rg_voc_duc_hdc101 --momentum 0.95

    The figure compares momentum 0, 0.9 and 0.95, with and without the technique.

    Not run: it needs what rg_voc_pspnet101 needs.
    """
    return dataclasses.replace(rg_voc_pspnet101(), model="resnet101_duc_hdc")


def rg_cifar10_resnet34() -> ClassificationConfig:
    """Random Gradient, Figure 5: ResNet-34 on CIFAR-10 over momentum.

    python -m train classification --recipe rg_cifar10_resnet34 --momentum 0.5

    The paper also has --model mobilenet_v2_cifar and densenet121_cifar; the baseline
    has --techniques ''. A learning rate of 0.1 lies in the range where Figure 6 shows a
    gain.

    Not run: it needs CIFAR-10 and a GPU for hours.
    """
    return ClassificationConfig(
        data=DataConfig(dataset="cifar10", augment=_PAD_AND_FLIP),
        model="resnet34_cifar",
        epochs=100,
        batch_size=128,
        optimizer=OptimizerConfig(
            momentum=0.5,
            weight_decay=1e-4,
            schedule="poly",
            techniques=("scale_by_random",),
        ),
    )


def rg_maps_pix2pix() -> TranslationConfig:
    """Random Gradient, Figure 7: pix2pix on maps, with the generator's loss scaled.

    python -m train translation --recipe rg_maps_pix2pix

    The baseline has --techniques ''; `python -m train compare` draws both runs side by
    side. The normalization is not published; we chose batch norm, with its running
    averages at test time.

    Not run: it needs the maps dataset at 256 pixels and a GPU for about a day.
    """
    return dataclasses.replace(
        pix2pix_maps(),
        norm="batch",
        dropout_at_test=False,
        batch_size=8,
        optimizer=_pix2pix(techniques=("scale_by_random",)),
    )


def pix2pix_maps() -> TranslationConfig:
    """pix2pix (Isola et al., 2016): aerial photos to maps, batch size 1.

    python -m train.data prepare paired_images/maps --source maps.tar
    python -m train translation --recipe pix2pix_maps

    As in the paper, it normalizes over the one image and keeps dropout, at test time
    too.

    Not run: it needs the maps dataset at 256 pixels and a GPU for about a day.
    """
    return TranslationConfig(
        data=DataConfig(
            dataset="paired_images/maps",
            eval_split="validation",
            crop=(256, 256),
            augment=("random_flip",),
        ),
        generator="unet256",
        discriminator="patchgan70",
        norm="instance",
        dropout_at_test=True,
        epochs=200,
        batch_size=1,
        optimizer=_pix2pix(),
    )


def _pix2pix(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        learning_rate=2e-4,
        momentum=0.5,
        weight_decay=0.0,
        schedule="linear",
        **changes,
    )


def gc_cifar100_resnet50() -> ClassificationConfig:
    """Gradient Centralization, Table 2: ResNet-50 on CIFAR-100 with SGDM.

    python -m train classification --recipe gc_cifar100_resnet50 --seeds 10

    Published: 79.14 +- 0.33 %, against 78.23 +- 0.42 without (--techniques ''), over 10
    runs. Table 1 has --model resnet18_cifar, resnet101_cifar, resnext29_4x64d,
    vgg11_bn_cifar and densenet121_cifar.

    Not run: it needs CIFAR-100 and a GPU for about two days.
    """
    return ClassificationConfig(
        data=DataConfig(dataset="cifar100", augment=_PAD_AND_FLIP),
        model="resnet50_cifar",
        epochs=200,
        batch_size=128,
        optimizer=OptimizerConfig(
            schedule="step",
            milestones=(60, 120, 180),
            techniques=("centralize",),
            conv_only=True,
        ),
    )


def gc_mini_imagenet_resnet50() -> ClassificationConfig:
    """Gradient Centralization, Figure 5: ResNet-50 on Mini-ImageNet at 224 pixels.

    python -m train classification --recipe gc_mini_imagenet_resnet50

    Epochs and schedule are those for CIFAR-100.

    Not run: it needs Mini-ImageNet and a GPU for days.
    """
    recipe = gc_cifar100_resnet50()
    return dataclasses.replace(
        recipe,
        data=DataConfig(
            dataset="mini_imagenet",
            image_size=(224, 224),
            augment=("random_resized_crop", "random_flip"),
        ),
        model="resnet50",
        optimizer=dataclasses.replace(recipe.optimizer, conv_only=False),
    )


def gc_aircraft_resnet50() -> ClassificationConfig:
    """Gradient Centralization, Table 7: an ImageNet ResNet-50 fine-tuned on Aircraft.

    python -m train classification --recipe gc_aircraft_resnet50 --weights FILE

    Published: 87.77 +- 0.27 %, against 86.62 +- 0.31 without (--techniques ''). The
    paper also has --dataset cars196, stanford_dogs and caltech_birds2011. Photos are
    scaled to 512 and cropped to 448.

    Not run: it needs FGVC-Aircraft, ImageNet weights and a GPU for about a day.
    """
    return ClassificationConfig(
        data=DataConfig(
            dataset="fgvc_aircraft",
            image_size=(512, 512),
            crop=(448, 448),
            augment=("random_flip",),
        ),
        model="resnet50",
        epochs=100,
        batch_size=256,
        optimizer=OptimizerConfig(
            learning_rate=0.01,
            head_learning_rate=0.1,
            schedule="step",
            milestones=(50, 80),
            techniques=("centralize",),
        ),
    )


def step_tuned_cifar10_resnet20() -> ClassificationConfig:
    """Step-Tuned SGD: a residual network on CIFAR-10.

    python -m train classification --recipe step_tuned_cifar10_resnet20

    These are the paper's defaults, with its step decay, without momentum. It chose the
    learning rate from a grid, which we replace by 0.1. An epoch costs two gradients for
    each batch: compare with SGD of twice the epochs too.

    Not run: it needs CIFAR-10 and a GPU for hours.
    """
    return ClassificationConfig(
        data=DataConfig(dataset="cifar10", augment=_PAD_AND_FLIP),
        model="resnet20",
        epochs=200,
        batch_size=128,
        optimizer=OptimizerConfig(
            momentum=0.0,
            weight_decay=5e-4,
            schedule="robbins_monro",
            techniques=("barzilai_borwein_step",),
        ),
    )


def pugd_cifar10_upanet16() -> ClassificationConfig:
    """PUGD: UPANet-16 on CIFAR-10.

    python -m train classification --recipe pugd_cifar10_upanet16

    These are the settings of the authors' code; we chose 200 epochs. The paper also has
    --model upanet64 and --dataset cifar100.

    Not run: it needs CIFAR-10 and a GPU for about a day.
    """
    return ClassificationConfig(
        data=DataConfig(dataset="cifar10", augment=_PAD_AND_FLIP),
        model="upanet16",
        epochs=200,
        batch_size=100,
        optimizer=OptimizerConfig(techniques=("perturbed_unit_step",)),
    )


def pugd_cifar10_vit() -> ClassificationConfig:
    """PUGD: an ImageNet ViT-B/16 fine-tuned on CIFAR-10 at 224 pixels.

    python -m train classification --recipe pugd_cifar10_vit --weights FILE

    Published: 99.13 %; on CIFAR-100 93.95 %. Epochs and learning rate are not
    published; we chose 10 and 0.01.

    Not run: it needs CIFAR-10, ImageNet weights and a GPU for hours.
    """
    return ClassificationConfig(
        data=DataConfig(
            dataset="cifar10", image_size=(224, 224), augment=("random_flip",)
        ),
        model="vit_b_16",
        epochs=10,
        batch_size=100,
        precision="bfloat16",
        optimizer=OptimizerConfig(
            learning_rate=0.01, techniques=("perturbed_unit_step",)
        ),
    )


RECIPES: dict[str, Callable[[], TrainingConfig]] = {
    make.__name__: make
    for make in (
        rg_voc_pspnet101,
        rg_voc_duc_hdc101,
        rg_cifar10_resnet34,
        rg_maps_pix2pix,
        pix2pix_maps,
        gc_cifar100_resnet50,
        gc_mini_imagenet_resnet50,
        gc_aircraft_resnet50,
        step_tuned_cifar10_resnet20,
        pugd_cifar10_upanet16,
        pugd_cifar10_vit,
    )
}
