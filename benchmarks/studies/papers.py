"""What the papers publish, and the studies that try the same.

Each claim names the studies of `benchmarks.studies.catalogue` that go with it: those
with the settings of the paper, and smaller ones of the same technique for an hour on
one GPU and for two CPU cores.

>>> CLAIMS[0].source
'Random Gradient, Table 1'
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A pair of published numbers.

    Attributes:
      setting: network, optimizer or setting of the row.
      without: the number without the technique, as printed.
      technique: the number with it, as printed.
      study: the study with the settings of the paper; "" if there is none.
    """

    setting: str
    without: str
    technique: str
    study: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A table or figure of a paper.

    Attributes:
      source: paper and number of the table or figure.
      says: what it shows, in a sentence.
      technique: the technique.
      metric: what its numbers are; "" if it prints none.
      rows: its numbers.
      needs: what it takes to run it with the settings of the paper.
      paper: studies with the settings of the paper.
      lab: studies of the same technique for an hour on one GPU.
      desk: studies of the same technique on two CPU cores.
    """

    source: str
    says: str
    technique: str
    metric: str = ""
    rows: Sequence[Published] = ()
    needs: str
    paper: Sequence[str] = ()
    lab: Sequence[str] = ()
    desk: Sequence[str] = ()

    @property
    def studies(self) -> tuple[str, ...]:
        """The studies that go with it, those with the paper's settings first."""
        own = (*(row.study for row in self.rows), *self.paper)
        return tuple(
            dict.fromkeys(name for name in (*own, *self.lab, *self.desk) if name)
        )


_RESNET50 = "CIFAR-100, and one GPU for about two days per row"

CLAIMS = (
    Claim(
        source="Random Gradient, Table 1",
        says="PSPNet-101 on PASCAL VOC 2012: better in two of four settings, and worse "
        "at the smallest rate and where rate and momentum are highest",
        technique="scale_by_random",
        metric="mean IoU (%)",
        rows=(
            Published("rate 0.01, momentum 0.95", "31.940", "28.357", "rg_voc_1"),
            Published("rate 0.001, momentum 0.95", "65.473", "68.014", "rg_voc_2"),
            Published("rate 0.01, momentum 0.9", "28.121", "47.620", "rg_voc_3"),
            Published("rate 0.0001, momentum 0.95", "69.076", "68.681", "rg_voc_4"),
        ),
        needs="PASCAL VOC 2012, ImageNet weights, and one GPU for a day per row",
        lab=("rg_camvid_pspnet50",),
        desk=("scenes_segmentation", "camvid_100"),
    ),
    Claim(
        source="Random Gradient, Figure 1",
        says="of several ranges of the factor, 0 to 1 is best",
        technique="scale_by_random",
        needs="PASCAL VOC 2012, ImageNet weights, and one GPU for days",
        paper=("rg_voc_ranges",),
        desk=("digits_nulls",),
    ),
    Claim(
        source="Random Gradient, Figures 2 and 3",
        says="ResNet-101-DUC+HDC on PASCAL VOC 2012: helps at momentum 0.9 and 0.95, "
        "not at 0",
        technique="scale_by_random",
        needs="PASCAL VOC 2012, ImageNet weights, and one GPU for days",
        paper=("rg_duc_0", "rg_duc_0.9", "rg_duc_0.95"),
        desk=("scenes_segmentation", "camvid_100"),
    ),
    Claim(
        source="Random Gradient, Figures 4 to 6",
        says="ResNet-34, MobileNetV2, DenseNet-121 and ResNeXt on CIFAR-10: helps at "
        "momentum up to 0.5 and learning rates from 0.1",
        technique="scale_by_random",
        needs="CIFAR-10, and one GPU for hours per network and setting",
        paper=(
            *("rg_cifar10_resnet34", "rg_cifar10_mobilenet_v2_cifar"),
            *("rg_cifar10_densenet121_cifar", "rg_cifar10_resnext29_4x64d"),
        ),
        lab=("rg_cifar10_lab",),
        desk=(
            *("digits_nulls", "cifar10_1000_tuned", "cifar10_10000"),
            "cifar10_1000_resnet20",
            *("rg_digits_small_0.5", "rg_digits_large_0.5"),
            *("rg_digits_small_0.9", "rg_digits_large_0.9"),
            *("rg_cifar10_small", "rg_cifar10_large"),
        ),
    ),
    Claim(
        source="Random Gradient, Figures 7 and 8",
        says="pix2pix on maps and Cityscapes: sharper samples",
        technique="scale_by_random",
        needs="the maps dataset at 256 pixels, and one GPU for a day",
        paper=("rg_maps",),
        lab=("rg_maps_lab",),
        desk=("scenes_translation", "maps_generator", "maps_both"),
    ),
    Claim(
        source="Gradient Centralization, Table 1",
        says="networks on CIFAR-100: helps all of them",
        technique="centralize",
        metric="test accuracy (%)",
        rows=tuple(
            Published(name, without, technique, f"gc_cifar100_{model}")
            for name, model, without, technique in (
                ("ResNet-18", "resnet18_cifar", "76.87 ± 0.26", "78.82 ± 0.31"),
                ("ResNet-101", "resnet101_cifar", "78.82 ± 0.42", "80.21 ± 0.31"),
                ("ResNeXt-29", "resnext29_4x64d", "79.70 ± 0.30", "80.53 ± 0.33"),
                ("VGG-11", "vgg11_bn_cifar", "70.94 ± 0.34", "71.69 ± 0.37"),
                ("DenseNet-121", "densenet121_cifar", "79.31 ± 0.33", "79.68 ± 0.40"),
            )
        ),
        needs="CIFAR-100, and one GPU for hours to days per network",
        lab=("gc_cifar10_lab",),
        desk=(
            *("digits_nulls", "cifar10_1000_tuned", "cifar10_10000"),
            *("cifar10_1000_resnet20", "fashion_1000"),
        ),
    ),
    Claim(
        source="Gradient Centralization, Table 2",
        says="ResNet-50 on CIFAR-100: helps every optimizer",
        technique="centralize",
        metric="test accuracy (%)",
        rows=tuple(
            Published(name, without, technique, f"gc_optimizers_{name.lower()}")
            for name, without, technique in (
                ("SGD", "78.23 ± 0.42", "79.14 ± 0.33"),
                ("Adam", "71.64 ± 0.56", "72.80 ± 0.62"),
                ("Adagrad", "70.34 ± 0.31", "71.58 ± 0.37"),
                ("SGDW", "74.02 ± 0.27", "76.82 ± 0.29"),
                ("AdamW", "74.12 ± 0.42", "75.07 ± 0.37"),
            )
        ),
        needs=_RESNET50,
        desk=("scenes_segmentation", "camvid_100"),
    ),
    Claim(
        source="Gradient Centralization, Table 3",
        says="ResNet-50 on CIFAR-100: helps at every weight decay",
        technique="centralize",
        metric="test accuracy (%)",
        rows=(
            Published("decay 0", "71.62 ± 0.31", "72.83 ± 0.29", "gc_decay_0"),
            Published("decay 1e-4", "73.91 ± 0.35", "76.56 ± 0.31", "gc_decay_1e-4"),
            Published("decay 2e-4", "75.57 ± 0.33", "77.62 ± 0.37", "gc_decay_2e-4"),
            Published(
                "decay 5e-4", "78.23 ± 0.42", "79.14 ± 0.33", "gc_optimizers_sgd"
            ),
            Published("decay 1e-3", "77.43 ± 0.30", "78.10 ± 0.36", "gc_decay_1e-3"),
        ),
        needs=_RESNET50,
    ),
    Claim(
        source="Gradient Centralization, Table 4",
        says="ResNet-50 on CIFAR-100: helps at every learning rate",
        technique="centralize",
        metric="test accuracy (%)",
        rows=(
            Published(
                "SGD, rate 0.05", "76.81 ± 0.27", "78.12 ± 0.33", "gc_rate_sgd_0.05"
            ),
            Published(
                "SGD, rate 0.1", "78.23 ± 0.42", "79.14 ± 0.33", "gc_optimizers_sgd"
            ),
            Published(
                "SGD, rate 0.2", "76.53 ± 0.32", "77.71 ± 0.35", "gc_rate_sgd_0.2"
            ),
            Published(
                "Adam, rate 0.0005",
                "73.88 ± 0.46",
                "74.32 ± 0.55",
                "gc_rate_adam_0.0005",
            ),
            Published(
                "Adam, rate 0.001", "71.64 ± 0.56", "72.80 ± 0.62", "gc_optimizers_adam"
            ),
            Published(
                "Adam, rate 0.0015",
                "70.63 ± 0.44",
                "71.22 ± 0.49",
                "gc_rate_adam_0.0015",
            ),
        ),
        needs=_RESNET50,
    ),
    Claim(
        source="Gradient Centralization, Table 5",
        says="ResNet-50 and ResNet-101 on ImageNet: helps with batch and group norm",
        technique="centralize",
        metric="top-1 error (%)",
        rows=(
            Published("ResNet-50, batch norm", "23.71", "23.21"),
            Published("ResNet-50, group norm", "24.50", "23.53"),
            Published("ResNet-101, batch norm", "22.37", "21.82"),
            Published("ResNet-101, group norm", "23.34", "22.14"),
        ),
        needs="ImageNet, and several GPUs for days per row",
    ),
    Claim(
        source="Gradient Centralization, Table 7",
        says="an ImageNet ResNet-50 fine-tuned: helps on all four datasets",
        technique="centralize",
        metric="test accuracy (%)",
        rows=(
            Published("Aircraft", "86.62 ± 0.31", "87.77 ± 0.27", "gc_aircraft"),
            Published("Cars", "88.66 ± 0.22", "90.03 ± 0.26", "gc_cars"),
            Published("Dogs", "76.16 ± 0.25", "78.23 ± 0.24", "gc_dogs"),
            Published("CUB", "82.07 ± 0.26", "83.40 ± 0.30", "gc_cub"),
        ),
        needs="the dataset, ImageNet weights, and one GPU for a day per row",
        desk=("fine_tuning",),
    ),
    Claim(
        source="Gradient Centralization, Figures 4 and 5",
        says="Mini-ImageNet: smaller gradients, and better with batch norm and weight "
        "standardization",
        technique="centralize",
        needs="Mini-ImageNet, and one GPU for days",
        paper=("gc_mini_imagenet",),
        desk=("wrong_axis_digits", "wrong_axis_cifar10", "wrong_axis_vit"),
    ),
    Claim(
        source="Step-Tuned SGD, figures",
        says="residual networks on CIFAR: above SGD, RMSprop and Adam at medium stages",
        technique="barzilai_borwein_step",
        needs="CIFAR-10, and one GPU for half a day",
        paper=("step_tuned_cifar10",),
        lab=("step_tuned_lab",),
        desk=(
            *("digits_nulls", "cifar10_1000_tuned", "cifar10_10000"),
            "cifar10_1000_resnet20",
        ),
    ),
    Claim(
        source="PUGD, UPANet",
        says="UPANet on CIFAR-10: better than SGD",
        technique="perturbed_unit_step",
        needs="CIFAR-10, and one GPU for a day",
        paper=("pugd_upanet16",),
        lab=("pugd_lab",),
        desk=(
            *("digits_nulls", "cifar10_1000_tuned", "cifar10_10000"),
            *("cifar10_1000_resnet20", "fashion_1000"),
        ),
    ),
    Claim(
        source="PUGD, fine-tuned transformers",
        says="ViT-B/16 and DeiT-B/16 from ImageNet",
        technique="perturbed_unit_step",
        metric="test accuracy (%)",
        rows=(
            Published(
                "ViT-B/16, CIFAR-10", "not published", "99.13", "pugd_vit_cifar10"
            ),
            Published(
                "ViT-B/16, CIFAR-100", "not published", "93.95", "pugd_vit_cifar100"
            ),
            Published("ViT-B/16, Tiny ImageNet", "not published", "90.74"),
            Published("DeiT-B/16, Tiny ImageNet", "not published", "91.02"),
        ),
        needs="the dataset, ImageNet weights, and one GPU for hours per row",
        desk=("fine_tuning",),
    ),
)
