"""The base of PSPNet and ResNet-DUC+HDC: a ResNet with dilated convolutions."""

import abc
import functools
from collections.abc import Sequence

import jax

from models._entry import Entry
from models._layers import Layers, check_images
from models._network import Images, Network
from models.resnet import OPTIONS, ResNet

STRIDE = 8
_STAGE_SIZES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class DilatedSegmenter(Network):
    """The base class of segmentation networks on a dilated ResNet.

    The last two stages of the ResNet dilate their convolutions and keep the resolution.
    So height and width of the features are an eighth of the images'. A subclass adds a
    decoder.

    Args:
      stage_sizes: number of blocks in each stage of the ResNet.
      num_classes: number of logits of each pixel.
      layers: creates the layers.
      in_channels: channels of the input images.
      zero_init_last_norm: whether every residual block starts as the identity.
      remat: whether gradients recompute the activations inside a block.

    Attributes:
      dilations: dilations of the blocks in each stage, as in `ResNet`.
      backbone: the ResNet, which takes pretrained ImageNet weights.
    """

    dilations: Sequence[Sequence[int]]
    backbone: ResNet

    def __init__(
        self,
        stage_sizes: Sequence[int],
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        zero_init_last_norm: bool = False,
        remat: bool = False,
    ):
        self.backbone = ResNet(
            stage_sizes,
            num_classes=None,
            layers=layers,
            in_channels=in_channels,
            expansion=4,
            zero_init_last_norm=zero_init_last_norm,
            remat=remat,
            strides=(1, 2, 1, 1),
            dilations=self.dilations,
        )
        self.add_decoder(num_classes, layers)

    @abc.abstractmethod
    def add_decoder(self, num_classes: int, layers: Layers) -> None:
        """Creates the layers that follow the backbone."""

    def features(self, images: Images) -> list[jax.Array]:
        """Maps images to the feature map of each stage of the backbone.

        Args:
          images: (batch, height, width, channels).

        Returns:
          Four arrays (batch, rows, columns, features), the finest first. The last three
          have an eighth of the images' height and width.

        Raises:
          ImageShapeError: if height or width is not a multiple of 8.
        """
        check_images(images, self.backbone.in_channels, multiple=STRIDE)
        return self.backbone.features(images)


def dilated_segmenter(
    network: type[DilatedSegmenter],
    depth: int,
    num_parameters: int,
    *,
    name: str,
    description: str,
    paper: str,
) -> Entry:
    """Returns the entry of a segmentation network on a ResNet-50 or ResNet-101.

    Args:
      network: the class of the network.
      depth: 50 or 101.
      num_parameters: as in `Entry`.
      name: as in `Entry`.
      description: as in `Entry`.
      paper: as in `Entry`.
    """
    return Entry(
        name=name,
        task="segmentation",
        description=description,
        paper=paper,
        input_shape=(224, 224, 3),
        published={"num_classes": 21},
        num_parameters=num_parameters,
        options=OPTIONS,
        build=functools.partial(network, _STAGE_SIZES[depth]),
    )
