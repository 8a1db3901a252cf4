"""PSPNet: a dilated residual network and pooling to a pyramid of grids."""

import jax
import jax.numpy as jnp
from flax import nnx

from models._dilated import DilatedSegmenter, dilated_segmenter
from models._entry import Entry
from models._layers import ConvNorm, Layers, adaptive_average_pool, resize
from models._network import Images, PixelLogits

_BINS = (1, 2, 3, 6)


class PixelClassifier(nnx.Module):
    """A 3x3 convolution, dropout and a linear map of every pixel to logits."""

    def __init__(self, inputs: int, width: int, num_classes: int, *, layers: Layers):
        self.hidden = ConvNorm(layers.conv(inputs, width), layers=layers)
        self.dropout = nnx.Dropout(0.1, rngs=layers.rngs)
        self.logits = layers.precise().conv(width, num_classes, 1, use_bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, classes)."""
        return self.logits(self.dropout(self.hidden(x)))


class PSPNet(DilatedSegmenter):
    """Scene parsing with context from the whole image.

    Logits have the resolution of the images, whose height and width must be multiples
    of 8. Arguments are those of `DilatedSegmenter`.

    References:
      H. Zhao, J. Shi, X. Qi, X. Wang, J. Jia, `Pyramid Scene Parsing Network
      <https://arxiv.org/abs/1612.01105>`_, 2016
    """

    dilations = ((1,), (1,), (2,), (4,))
    auxiliary_weight = 0.4

    def add_decoder(self, num_classes: int, layers: Layers) -> None:
        """Creates the pyramid, the head and the auxiliary head."""
        self.pyramid = nnx.List(
            [ConvNorm(layers.conv(2048, 512, 1), layers=layers) for _ in _BINS]
        )
        self.head = PixelClassifier(4096, 512, num_classes, layers=layers)
        self.auxiliary_head = PixelClassifier(1024, 256, num_classes, layers=layers)

    def __call__(self, images: Images) -> PixelLogits:
        """Maps float images (batch, height, width, channels) to logits of pixels."""
        return self._logits(self.features(images)[-1], images.shape)

    def with_auxiliary(self, images: Images) -> tuple[PixelLogits, PixelLogits]:
        """Maps images to logits and to auxiliary logits from the third stage.

        Args:
          images: (batch, height, width, channels).

        Returns:
          Two arrays (batch, height, width, classes). The training loss is the loss of
          the first plus `auxiliary_weight` times that of the second.
        """
        maps = self.features(images)
        auxiliary = resize(self.auxiliary_head(maps[-2]), *images.shape[1:3])
        return self._logits(maps[-1], images.shape), auxiliary

    def _logits(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        pooled = [
            resize(level(adaptive_average_pool(x, bins)), *x.shape[1:3])
            for bins, level in zip(_BINS, self.pyramid, strict=True)
        ]
        logits = self.head(jnp.concatenate((x, *pooled), axis=-1))
        return resize(logits, *shape[1:3])


def _entry(depth: int, num_parameters: int) -> Entry:
    return dilated_segmenter(
        PSPNet,
        depth,
        num_parameters,
        name=f"pspnet{depth}",
        description=f"PSPNet on a dilated ResNet-{depth}, with its auxiliary head",
        paper="Zhao et al., 2016, https://arxiv.org/abs/1612.01105",
    )


ENTRIES = (_entry(50, 48_957_802), _entry(101, 67_949_930))
