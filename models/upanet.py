"""UPANets: dense connections with attention over channels and over pixels."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models._entry import CONVOLUTION, Entry
from models._layers import ImageShapeError, Layers, apply, average_pool, check_images

_STAGES = 4


def _plain_layer_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Layer normalisation without parameters, in float32, eps 1e-5."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y - y.mean(axes, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + 1e-5)
    return y.astype(x.dtype)


class ChannelMap(nnx.Module):
    """The same linear map over the channels of every pixel, and a normalisation."""

    def __init__(self, inputs: int, outputs: int, *, layers: Layers):
        self.linear = layers.linear(inputs, outputs)
        self.norm = layers.normalize(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, outputs)."""
        return self.norm(self.linear(x))


class UPABlock(nnx.Module):
    """Two 3x3 convolutions plus attention over channels ("CPA"), normalised together.

    Args:
      inputs: channels of the input.
      outputs: channels of the output.
      with_shortcut: whether a second channel map of the input is added behind the
        normalisation, as in the first block of a stage.
      layers: makes its layers.
    """

    def __init__(
        self, inputs: int, outputs: int, *, with_shortcut: bool, layers: Layers
    ):
        # The indices count the activations too.
        self.convs = nnx.Dict(
            {
                "0": layers.conv(inputs, 2 * outputs),
                "1": layers.normalize(2 * outputs),
                "3": layers.conv(2 * outputs, outputs),
                "4": layers.normalize(outputs),
            }
        )
        self.attention = ChannelMap(inputs, outputs, layers=layers)
        self.shortcut = nnx.data(None)
        if with_shortcut:
            self.shortcut = ChannelMap(inputs, outputs, layers=layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, outputs)."""
        y = nnx.relu(self.convs["1"](self.convs["0"](x)))
        y = nnx.relu(self.convs["4"](self.convs["3"](y)))
        y = _plain_layer_norm(y + self.attention(x), (1, 2, 3))
        return y if self.shortcut is None else y + self.shortcut(x)


class UPANet(nnx.Module):
    """Four densely connected stages, all of which the last layer sees.

    Args:
      filters: channels of the stem; the stages start with one, two, four and eight
        times as many channels.
      num_classes: number of output logits.
      layers: makes its layers.
      in_channels: channels of the input images.
      dense_blocks: number of those that follow the first one of a stage, each adding a
        quarter of that one's channels.
      image_size: height and width of the images, a multiple of 8: the attention over
        pixels has a weight for each.
      remat: whether activations inside a block are computed again for gradients.

    Raises:
      ImageShapeError: if image_size is not a multiple of 8.

    References:
      - C.-H. Tseng, H.-C. Chen, S.-J. Lee, J.-N. Feng, X.-J. Zeng, `UPANets: Learning
        from the Universal Pixel Attention Networks
        <https://arxiv.org/abs/2103.08640>`_, 2021
      - C.-H. Tseng et al., `Perturbed and Unit Gradient Descent
        <https://arxiv.org/abs/2110.00199>`_, 2021, which trains them
    """

    HEAD = ("head",)

    def __init__(
        self,
        filters: int,
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        dense_blocks: int = 4,
        image_size: int = 32,
        remat: bool = False,
    ):
        if image_size < 8 or image_size % 8:
            raise ImageShapeError(
                f"image_size must be a multiple of 8, got {image_size}"
            )
        self.stem = UPABlock(in_channels, filters, with_shortcut=True, layers=layers)
        channels = filters
        outputs = [channels]
        stages = []
        for i in range(_STAGES):
            width = filters << i
            first = UPABlock(channels, width, with_shortcut=True, layers=layers)
            stage, channels = [first], width
            for _ in range(dense_blocks):
                growth = width // 4
                block = UPABlock(channels, growth, with_shortcut=False, layers=layers)
                stage.append(block)
                channels += growth
            stages.append(nnx.List(stage))
            outputs.append(channels)
        self.stages = nnx.List(stages)
        sides = [image_size] + [image_size >> i for i in range(_STAGES)]
        self.pixels = nnx.List([layers.linear(side * side, 1) for side in sides])
        self.norm = layers.normalize(sum(outputs))
        self.head = layers.head(sum(outputs), num_classes)
        self.in_channels = in_channels
        self.image_size = image_size
        self.remat = remat

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, image_size, image_size, channels) to logits."""
        check_images(images, self.in_channels, exactly=self.image_size)
        x = apply(self.stem, images, remat=self.remat)
        maps = [x]
        for i, (first, *others) in enumerate(self.stages):
            x = apply(first, x, remat=self.remat)
            if i > 0:
                x = average_pool(x)
            for block in others:
                y = apply(block, x, remat=self.remat)
                x = jnp.concatenate((x, y), axis=-1)
            maps.append(x)
        # Coarsest first, the order of the authors' code.
        pairs = list(zip(maps, self.pixels, strict=True))[::-1]
        vectors = [self._vector(x, pixels) for x, pixels in pairs]
        return self.head(self.norm(jnp.concatenate(vectors, axis=-1)))

    def _vector(self, x: jax.Array, pixels: nnx.Linear) -> jax.Array:
        """The mean over pixels plus their weighted sum ("SPA"), (batch, channels)."""
        by_channel = x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)
        attended = pixels(by_channel)[..., 0]
        return _plain_layer_norm(by_channel.mean(axis=2) + attended, (1,))


def _entry(filters: int, num_parameters: int) -> Entry:
    return Entry(
        name=f"upanet{filters}",
        task="classification",
        description=f"UPANet-{filters}, the network of the PUGD authors",
        paper="Tseng et al., 2021, https://arxiv.org/abs/2103.08640",
        input_shape=(32, 32, 3),
        published={"num_classes": 10},
        num_parameters=num_parameters,
        options=("num_classes", "in_channels", "image_size", "remat", *CONVOLUTION),
        build=functools.partial(UPANet, filters),
    )


ENTRIES = (_entry(16, 1_512_431), _entry(32, 6_018_239), _entry(64, 24_017_183))
