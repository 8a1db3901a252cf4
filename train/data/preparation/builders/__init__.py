"""Builders of datasets, one file each. Importing them registers them with TFDS."""

from train.data.preparation.builder import ImageBuilder
from train.data.preparation.builders.camvid import Camvid
from train.data.preparation.builders.digit_scenes import DigitScenes
from train.data.preparation.builders.digits import Digits
from train.data.preparation.builders.fashion_mnist_idx import FashionMnistIdx
from train.data.preparation.builders.fgvc_aircraft import FgvcAircraft
from train.data.preparation.builders.image_folder import ImageFolder
from train.data.preparation.builders.mini_imagenet import MiniImagenet
from train.data.preparation.builders.paired_images import PairedImages
from train.data.preparation.builders.segmentation_folder import SegmentationFolder
from train.data.preparation.builders.tiny_imagenet import TinyImagenet
from train.data.preparation.builders.voc2012_segmentation import Voc2012Segmentation

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
