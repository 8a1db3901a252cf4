"""Builders of datasets, one file each; importing them registers them with TFDS."""

from train.data._builder import ImageBuilder
from train.data.builders.camvid import Camvid
from train.data.builders.digit_scenes import DigitScenes
from train.data.builders.digits import Digits
from train.data.builders.fashion_mnist_idx import FashionMnistIdx
from train.data.builders.fgvc_aircraft import FgvcAircraft
from train.data.builders.image_folder import ImageFolder
from train.data.builders.mini_imagenet import MiniImagenet
from train.data.builders.paired_images import PairedImages
from train.data.builders.segmentation_folder import SegmentationFolder
from train.data.builders.tiny_imagenet import TinyImagenet
from train.data.builders.voc2012_segmentation import Voc2012Segmentation

BUILDERS: dict[str, type[ImageBuilder]] = {
    builder.name: builder
    for builder in (
        Digits,
        DigitScenes,
        ImageFolder,
        FashionMnistIdx,
        TinyImagenet,
        MiniImagenet,
        FgvcAircraft,
        Camvid,
        Voc2012Segmentation,
        SegmentationFolder,
        PairedImages,
    )
}

__all__ = ["BUILDERS"]
