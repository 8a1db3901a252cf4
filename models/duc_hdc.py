"""ResNet with hybrid dilated convolution and dense upsampling convolution."""

import jax

from models._dilated import STRIDE, DilatedSegmenter, dilated_segmenter
from models._entry import Entry
from models._layers import Layers
from models._network import Images, PixelLogits


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Rearranges groups of factor x factor channels as factor x factor pixels.

    >>> import jax.numpy as jnp
    >>> from models.duc_hdc import pixel_shuffle
    >>> pixel_shuffle(jnp.arange(4).reshape(1, 1, 1, 4), 2)[0, :, :, 0].tolist()
    [[0, 1], [2, 3]]

    Args:
      x: (batch, height, width, channels * factor * factor). The entries of an output
        channel lie side by side, row after row, as in PyTorch's `PixelShuffle`.
      factor: the factor by which height and width grow.

    Returns:
      An array (batch, factor * height, factor * width, channels).
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, -1, factor, factor)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    outputs = channels // factor**2
    return x.reshape(batch, height * factor, width * factor, outputs)


class DUCHDC(DilatedSegmenter):
    """Segmentation without gridding artifacts and without interpolation.

    With the dilations 1, 2, 5, 9 of the third stage and 5, 9, 17 of the fourth ("HDC"),
    an output depends on every pixel of its receptive field. The last convolution
    predicts all 8x8 pixels of a cell at once ("DUC"); as in the authors' code, neither
    a norm nor a ReLU follows it. Height and width of images must be multiples of 8.
    Arguments are those of `DilatedSegmenter`.

    References:
      P. Wang, P. Chen, Y. Yuan, D. Liu, Z. Huang, X. Hou, G. Cottrell, `Understanding
      Convolution for Semantic Segmentation <https://arxiv.org/abs/1702.08502>`_, 2017
    """

    dilations = ((1,), (1,), (1, 2, 5, 9), (5, 9, 17))

    def add_decoder(self, num_classes: int, layers: Layers) -> None:
        """Creates the convolution that predicts all pixels of a cell."""
        outputs = num_classes * STRIDE**2
        self.duc = layers.precise().conv(2048, outputs, use_bias=True)

    def __call__(self, images: Images) -> PixelLogits:
        """Maps float images (batch, height, width, channels) to logits of pixels."""
        return pixel_shuffle(self.duc(self.features(images)[-1]), STRIDE)


def _entry(depth: int, num_parameters: int) -> Entry:
    return dilated_segmenter(
        DUCHDC,
        depth,
        num_parameters,
        name=f"resnet{depth}_duc_hdc",
        description=f"ResNet-{depth} with dense upsampling and hybrid dilation",
        paper="Wang et al., 2017, https://arxiv.org/abs/1702.08502",
    )


ENTRIES = (_entry(50, 48_281_984), _entry(101, 67_274_112))
