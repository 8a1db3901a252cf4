"""The generators and discriminators of pix2pix, as in its PyTorch code."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models._entry import CONVOLUTION, Entry
from models._layers import Identity, Layers, Normalization, UpConv, check_images
from models._network import Images, Network, PatchLogits

ISOLA_2016 = "Isola et al., 2016, https://arxiv.org/abs/1611.07004"

_normal = nnx.initializers.normal(0.02)


def _scale_around_one(key: jax.Array, shape: Any, dtype: Any = None) -> jax.Array:
    return 1.0 + _normal(key, shape, dtype)


class ConvNorm(nnx.Module):
    """A convolution and, if `normalized`, its normalization.

    The initial scales of the normalization are random.
    """

    def __init__(self, conv: nnx.Conv | UpConv, normalized: bool, *, layers: Layers):
        self.conv = conv
        self.norm: Normalization = Identity()
        if normalized:
            channels = conv.out_features
            self.norm = layers.normalize(channels, scale_init=_scale_around_one)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        return self.norm(self.conv(x))


class _NoiseDropout(nnx.Dropout):
    """Dropout that stays on at test time, where it is the noise of a generator."""

    def __call__(self, inputs: jax.Array, **options: Any) -> jax.Array:
        return super().__call__(inputs, **options | {"deterministic": False})


class Generator(Network):
    """A U-Net that halves the resolution `depth` times and then doubles it again.

    Height and width of images must be multiples of 2 to the power of depth. Values of
    input and output images lie in [-1, 1].

    Args:
      depth: number of halvings.
      layers: creates the layers.
      in_channels: channels of the input images.
      out_channels: channels of the output images.
      width: channels of the first layer. The others have up to eight times as many.
      dropout_at_test: whether dropout stays on at test time, as in the paper.

    References:
      P. Isola, J.-Y. Zhu, T. Zhou, A. Efros, `Image-to-Image Translation with
      Conditional Adversarial Networks <https://arxiv.org/abs/1611.07004>`_, 2016
    """

    def __init__(
        self,
        depth: int,
        *,
        layers: Layers,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        dropout_at_test: bool = False,
    ):
        widths = [width * min(2**i, 8) for i in range(depth)]
        down = []
        for i, step in enumerate(itertools.pairwise((in_channels, *widths))):
            conv = layers.conv(*step, 4, stride=2, kernel_init=_normal)
            down.append(ConvNorm(conv, 0 < i < depth - 1, layers=layers))
        self.down = nnx.List(down)
        up = []
        for i in range(depth - 1):
            # All but the innermost also take a skip with as many channels.
            inputs = widths[-1 - i] * (1 if i == 0 else 2)
            doubling = layers.conv_transpose(
                inputs, widths[-2 - i], 4, kernel_init=_normal
            )
            up.append(ConvNorm(doubling, True, layers=layers))
        last = layers.precise().conv_transpose(
            2 * widths[0], out_channels, 4, use_bias=True, kernel_init=_normal
        )
        self.up = nnx.List([*up, ConvNorm(last, False, layers=layers)])
        kind = _NoiseDropout if dropout_at_test else nnx.Dropout
        # They follow the blocks with the most channels, except the innermost.
        self.dropouts = nnx.List(
            [kind(0.5, rngs=layers.rngs) for _ in range(depth - 5)]
        )
        self.depth = depth
        self.in_channels = in_channels

    def __call__(self, images: Images) -> Images:
        """Maps float images (batch, height, width, channels) to images in [-1, 1]."""
        check_images(images, self.in_channels, multiple=2**self.depth)
        x, skips = images, []
        for i, layer in enumerate(self.down):
            x = layer(x if i == 0 else nnx.leaky_relu(x, 0.2))
            skips.append(x)
        skips.pop()
        for i, layer in enumerate(self.up):
            x = layer(nnx.relu(x))
            if 0 < i <= len(self.dropouts):
                x = self.dropouts[i - 1](x)
            if skips:
                x = jnp.concatenate((skips.pop(), x), axis=-1)
        return jnp.tanh(x)


class Discriminator(Network):
    """Tells real patches of an image from fake ones.

    It takes the input image and the output image of a generator side by side in the
    channels.

    Args:
      widths: channels of each layer except the last, which has one.
      strides: stride of each layer.
      kernel_size: kernel size of all layers, 4 or 1.
      last_bias: whether the last convolution has a bias; with None it has one if the
        convolutions before a normalization have one.
      layers: creates the layers.
      in_channels: channels of input image and output image together.

    References:
      P. Isola, J.-Y. Zhu, T. Zhou, A. Efros, `Image-to-Image Translation with
      Conditional Adversarial Networks <https://arxiv.org/abs/1611.07004>`_, 2016
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        kernel_size: int,
        *,
        last_bias: bool | None,
        layers: Layers,
        in_channels: int = 6,
    ):
        channels = (in_channels, *widths, 1)
        steps = []
        for i, (inputs, width) in enumerate(itertools.pairwise(channels)):
            is_first, is_last = i == 0, i == len(widths)
            conv = (layers.precise() if is_last else layers).conv(
                inputs,
                width,
                kernel_size,
                stride=strides[i],
                use_bias=True if is_first else last_bias if is_last else None,
                kernel_init=_normal,
            )
            steps.append(ConvNorm(conv, not is_first and not is_last, layers=layers))
        self.layers = nnx.List(steps)
        self.in_channels = in_channels
        # The smallest image gives a single patch. A kernel of size 4 without a stride
        # loses a pixel.
        lost = strides.count(1) if kernel_size > 1 else 0
        self.at_least = (1 + lost) * math.prod(strides)

    def __call__(self, images: Images) -> PatchLogits:
        """Maps (batch, height, width, channels) to logits (batch, rows, columns, 1)."""
        check_images(images, self.in_channels, at_least=self.at_least)
        x = images
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else nnx.leaky_relu(x, 0.2))
        return x


def _generator(
    name: str, description: str, depth: int, num_parameters: int, *, width: int = 64
) -> Entry:
    return Entry(
        name=name,
        task="translation",
        description=description,
        paper=ISOLA_2016,
        input_shape=(2**depth, 2**depth, 3),
        published={},
        num_parameters=num_parameters,
        options=("in_channels", "out_channels", "dropout_at_test", *CONVOLUTION),
        build=functools.partial(Generator, depth, width=width),
    )


def _discriminator(
    name: str,
    description: str,
    num_parameters: int,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    kernel_size: int,
    *,
    last_bias: bool | None,
) -> Entry:
    return Entry(
        name=name,
        task="translation",
        description=description,
        paper=ISOLA_2016,
        input_shape=(256, 256, 6),
        published={},
        num_parameters=num_parameters,
        options=("in_channels", *CONVOLUTION),
        build=functools.partial(
            Discriminator, widths, strides, kernel_size, last_bias=last_bias
        ),
    )


ENTRIES = (
    _generator("unet256", "U-Net generator with 8 halvings", 8, 54_413_955),
    _generator("unet128", "U-Net generator with 7 halvings", 7, 41_828_995),
    _generator("unet64", "U-Net generator with 6 halvings", 6, 29_244_035),
    _generator(
        "unet64_small",
        "U-Net generator with 6 halvings and a quarter of the channels",
        6,
        1_830_563,
        width=16,
    ),
    _discriminator(
        "patchgan70",
        "PatchGAN discriminator of 70x70 patches",
        2_768_705,
        (64, 128, 256, 512),
        (2, 2, 2, 1, 1),
        4,
        last_bias=True,
    ),
    _discriminator(
        "patchgan16",
        "PatchGAN discriminator of 16x16 patches",
        139_585,
        (64, 128),
        (2, 1, 1),
        4,
        last_bias=True,
    ),
    _discriminator(
        "pixelgan",
        "PixelGAN discriminator of single pixels",
        9_024,
        (64, 128),
        (1, 1, 1),
        1,
        last_bias=None,
    ),
)
