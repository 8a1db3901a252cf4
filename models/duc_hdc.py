"""ResNet with hybrid dilated convolution and dense upsampling convolution."""

import functools
from collections.abc import Sequence

import jax
from flax import nnx

from models._entry import Entry
from models._layers import Layers, check_images
from models.resnet import OPTIONS, ResNet

_STRIDE = 8


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Spreads groups of factor x factor channels over as many pixels.

    >>> import jax.numpy as jnp
    >>> from models.duc_hdc import pixel_shuffle
    >>> pixel_shuffle(jnp.arange(4).reshape(1, 1, 1, 4), 2)[0, :, :, 0].tolist()
    [[0, 1], [2, 3]]

    Args:
      x: (batch, height, width, factor * factor * channels); the entries of one output
        channel lie side by side, row after row, as in PyTorch's `PixelShuffle`.
      factor: by which height and width grow.

    Returns:
      (batch, factor * height, factor * width, channels).
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, -1, factor, factor)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    outputs = channels // factor**2
    return x.reshape(batch, height * factor, width * factor, outputs)


class DUCHDC(nnx.Module):
    """Segmentation without gridding holes and without interpolation.

    The dilations 1, 2, 5, 9 of the third stage and 5, 9, 17 of the fourth ("HDC") see
    every pixel of their field; the last convolution predicts all 8x8 pixels of a cell
    at once ("DUC"), with neither norm nor ReLU behind it, as in the paper. Height and
    width of images are multiples of 8. ResNet weights of ImageNet are for `backbone`.

    Args:
      stage_sizes: number of blocks in each stage of the ResNet.
      num_classes: number of logits of each pixel.
      layers: makes its layers.
      in_channels: channels of the input images.
      zero_init_last_norm: whether every residual block starts as the identity.
      remat: whether activations inside a block are computed again for gradients.

    References:
      P. Wang, P. Chen, Y. Yuan, D. Liu, Z. Huang, X. Hou, G. Cottrell, `Understanding
      Convolution for Semantic Segmentation <https://arxiv.org/abs/1702.08502>`_, 2017
    """

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
            dilations=((1,), (1,), (1, 2, 5, 9), (5, 9, 17)),
        )
        outputs = num_classes * _STRIDE**2
        self.duc = layers.precise().conv(2048, outputs, use_bias=True)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, height, width, channels) to logits of pixels."""
        check_images(images, self.backbone.in_channels, multiple=_STRIDE)
        return pixel_shuffle(self.duc(self.backbone.features(images)[-1]), _STRIDE)


def _entry(depth: int, stage_sizes: tuple[int, ...], num_parameters: int) -> Entry:
    return Entry(
        name=f"resnet{depth}_duc_hdc",
        task="segmentation",
        description=f"ResNet-{depth} with dense upsampling and hybrid dilation",
        paper="Wang et al., 2017, https://arxiv.org/abs/1702.08502",
        input_shape=(224, 224, 3),
        published={"num_classes": 21},
        num_parameters=num_parameters,
        options=OPTIONS,
        build=functools.partial(DUCHDC, stage_sizes),
    )


ENTRIES = (
    _entry(50, (3, 4, 6, 3), 48_281_984),
    _entry(101, (3, 4, 23, 3), 67_274_112),
)
