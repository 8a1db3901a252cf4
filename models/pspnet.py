"""PSPNet: a dilated residual network and pooling to a pyramid of grids."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models._entry import Entry
from models._layers import Layers, adaptive_average_pool, check_images, resize
from models.resnet import OPTIONS, ResNet

_BINS = (1, 2, 3, 6)


class ConvNormReLU(nnx.List):
    """A convolution, its normalisation and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, layers: Layers):
        conv = layers.conv(inputs, outputs, kernel_size)
        super().__init__([conv, layers.normalize(outputs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, outputs)."""
        conv, norm = self
        return nnx.relu(norm(conv(x)))


class PixelClassifier(nnx.Module):
    """A 3x3 convolution, dropout and a linear map of every pixel to logits."""

    def __init__(self, inputs: int, width: int, num_classes: int, *, layers: Layers):
        self.hidden = ConvNormReLU(inputs, width, 3, layers=layers)
        self.dropout = nnx.Dropout(0.1, rngs=layers.rngs)
        self.logits = layers.precise().conv(width, num_classes, 1, use_bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, classes)."""
        return self.logits(self.dropout(self.hidden(x)))


class PSPNet(nnx.Module):
    """Scene parsing with context from the whole image.

    Logits have the resolution of the images, whose height and width are multiples of
    8. ResNet weights of ImageNet are for `backbone`.

    Args:
      stage_sizes: number of blocks in each stage of the ResNet.
      num_classes: number of logits of each pixel.
      layers: makes its layers.
      in_channels: channels of the input images.
      zero_init_last_norm: whether every residual block starts as the identity.
      remat: whether activations inside a block are computed again for gradients.

    References:
      H. Zhao, J. Shi, X. Qi, X. Wang, J. Jia, `Pyramid Scene Parsing Network
      <https://arxiv.org/abs/1612.01105>`_, 2016
    """

    # Of the auxiliary logits' loss beside that of the logits.
    AUXILIARY_WEIGHT = 0.4

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
            dilations=((1,), (1,), (2,), (4,)),
        )
        self.pyramid = nnx.List(
            [ConvNormReLU(2048, 512, 1, layers=layers) for _ in _BINS]
        )
        self.head = PixelClassifier(4096, 512, num_classes, layers=layers)
        self.auxiliary_head = PixelClassifier(1024, 256, num_classes, layers=layers)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, height, width, channels) to logits of pixels."""
        return self._logits(self._features(images)[-1], images.shape)

    def with_auxiliary(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits, and those of the third stage for a second loss in training.

        The loss is that of the logits plus `AUXILIARY_WEIGHT` times the other's.
        """
        maps = self._features(images)
        auxiliary = resize(self.auxiliary_head(maps[-2]), *images.shape[1:3])
        return self._logits(maps[-1], images.shape), auxiliary

    def _features(self, images: jax.Array) -> list[jax.Array]:
        check_images(images, self.backbone.in_channels, multiple=8)
        return self.backbone.features(images)

    def _logits(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        pooled = [
            resize(level(adaptive_average_pool(x, bins)), *x.shape[1:3])
            for bins, level in zip(_BINS, self.pyramid, strict=True)
        ]
        logits = self.head(jnp.concatenate((x, *pooled), axis=-1))
        return resize(logits, *shape[1:3])


def _entry(depth: int, stage_sizes: tuple[int, ...], num_parameters: int) -> Entry:
    return Entry(
        name=f"pspnet{depth}",
        task="segmentation",
        description=f"PSPNet on a dilated ResNet-{depth}, with its auxiliary head",
        paper="Zhao et al., 2016, https://arxiv.org/abs/1612.01105",
        input_shape=(224, 224, 3),
        published={"num_classes": 21},
        num_parameters=num_parameters,
        options=OPTIONS,
        build=functools.partial(PSPNet, stage_sizes),
    )


ENTRIES = (
    _entry(50, (3, 4, 6, 3), 48_957_802),
    _entry(101, (3, 4, 23, 3), 67_949_930),
)
