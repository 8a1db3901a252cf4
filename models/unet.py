"""A small U-Net for segmentation, with normalization and padded convolutions."""

import itertools

import jax.numpy as jnp
from flax import nnx

from models._convolution import max_pool
from models._entry import CONVOLUTION, Entry
from models._layers import DoubleConv, Layers, check_images
from models._network import Images, Network, PixelLogits

_WIDTHS = (16, 32, 64, 128)


class UNet(Network):
    """A network that goes down to an eighth of the resolution and up again.

    Skip connections join both paths at each resolution. Logits have the resolution of
    the images, whose height and width must be multiples of 8.

    Args:
      num_classes: number of logits of each pixel.
      layers: creates the layers.
      in_channels: channels of the input images.

    References:
      O. Ronneberger, P. Fischer, T. Brox, `U-Net: Convolutional Networks for
      Biomedical Image Segmentation <https://arxiv.org/abs/1505.04597>`_, 2015
    """

    def __init__(self, *, num_classes: int, layers: Layers, in_channels: int = 3):
        self.down = nnx.List(
            [
                DoubleConv(inputs, width, width, layers=layers)
                for inputs, width in itertools.pairwise((in_channels, *_WIDTHS))
            ]
        )
        steps = list(itertools.pairwise(_WIDTHS[::-1]))
        self.up = nnx.List(
            [layers.conv_transpose(*step, 2, use_bias=True) for step in steps]
        )
        self.merge = nnx.List(
            [DoubleConv(inputs, width, width, layers=layers) for inputs, width in steps]
        )
        self.head = layers.precise().conv(_WIDTHS[0], num_classes, 1, use_bias=True)
        self.in_channels = in_channels

    def __call__(self, images: Images) -> PixelLogits:
        """Maps float images (batch, height, width, channels) to logits of pixels."""
        check_images(images, self.in_channels, multiple=2 ** (len(_WIDTHS) - 1))
        x, skips = images, []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else max_pool(x, 2, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(jnp.concatenate((skips.pop(), up(x)), axis=-1))
        return self.head(x)


ENTRIES = (
    Entry(
        name="unet_small",
        task="segmentation",
        description="U-Net of 16 to 128 channels with batch normalization",
        paper="Ronneberger et al., 2015, https://arxiv.org/abs/1505.04597",
        input_shape=(64, 64, 3),
        published={"num_classes": 11},
        num_parameters=482_907,
        options=("num_classes", "in_channels", *CONVOLUTION),
        build=UNet,
    ),
)
