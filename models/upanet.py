"""UPANets: densely connected networks with attention over channels and pixels."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models._entry import CONVOLUTION, Entry, classifier
from models._layers import (
    DoubleConv,
    ImageShapeError,
    Layers,
    apply,
    average_pool,
    check_images,
)
from models._network import Images, Logits, Network

_STAGES = 4


def _plain_layer_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Layer normalization without parameters, in float32, with eps of 1e-5."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y - y.mean(axes, keepdims=True)
    scaled: jax.Array = y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + 1e-5)
    return scaled.astype(x.dtype)


class ChannelMap(nnx.Module):
    """A linear map of the channels of every pixel, and a normalization."""

    def __init__(self, inputs: int, outputs: int, *, layers: Layers):
        self.linear = layers.linear(inputs, outputs)
        self.norm = layers.normalize(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, outputs)."""
        return self.norm(self.linear(x))


class UPABlock(nnx.Module):
    """Two 3x3 convolutions plus attention over channels ("CPA"), then layer norm.

    Args:
      inputs: channels of the input.
      outputs: channels of the output.
      with_shortcut: whether a second channel map of the input is added after the layer
        norm, as in the first block of a stage.
      layers: creates the layers.
    """

    def __init__(
        self, inputs: int, outputs: int, *, with_shortcut: bool, layers: Layers
    ):
        self.convs = DoubleConv(inputs, 2 * outputs, outputs, layers=layers)
        self.attention = ChannelMap(inputs, outputs, layers=layers)
        self.shortcut: ChannelMap | None = nnx.data(None)
        if with_shortcut:
            self.shortcut = ChannelMap(inputs, outputs, layers=layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, outputs)."""
        y = _plain_layer_norm(self.convs(x) + self.attention(x), (1, 2, 3))
        return y if self.shortcut is None else y + self.shortcut(x)


class UPANet(Network):
    """Four densely connected stages, whose outputs all enter the last layer.

    Args:
      filters: channels of the stem. The stages start with one, two, four and eight
        times as many channels.
      num_classes: number of logits.
      layers: creates the layers.
      in_channels: channels of the input images.
      dense_blocks: number of blocks after the first block of a stage. Each appends a
        quarter of the first block's channels.
      image_size: height and width of the images, a multiple of 8. The attention over
        pixels has a weight for each pixel.
      remat: whether gradients recompute the activations inside a block.

    Raises:
      ImageShapeError: if image_size is not a multiple of 8.

    References:
      - C.-H. Tseng, H.-C. Chen, S.-J. Lee, J.-N. Feng, X.-J. Zeng, `UPANets: Learning
        from the Universal Pixel Attention Networks
        <https://arxiv.org/abs/2103.08640>`_, 2021
      - C.-H. Tseng et al., `Perturbed and Unit Gradient Descent
        <https://arxiv.org/abs/2110.00199>`_, 2021, which trains UPANets
    """

    head_paths = ("head",)

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

    def __call__(self, images: Images) -> Logits:
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
        # As in the authors' code, the coarsest map comes first.
        pairs = list(zip(maps, self.pixels, strict=True))[::-1]
        vectors = [self._vector(x, pixels) for x, pixels in pairs]
        return self.head(self.norm(jnp.concatenate(vectors, axis=-1)))

    def _vector(self, x: jax.Array, pixels: nnx.Linear) -> jax.Array:
        """Returns the mean over pixels plus their weighted sum ("SPA").

        Args:
          x: (batch, height, width, channels).
          pixels: the weights of the sum.

        Returns:
          An array (batch, channels).
        """
        by_channel = x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)
        attended = pixels(by_channel)[..., 0]
        return _plain_layer_norm(by_channel.mean(axis=2) + attended, (1,))


def _entry(filters: int, num_parameters: int) -> Entry:
    return classifier(
        f"upanet{filters}",
        f"UPANet-{filters}, the network of the PUGD authors",
        "Tseng et al., 2021, https://arxiv.org/abs/2103.08640",
        num_parameters,
        functools.partial(UPANet, filters),
        options=("num_classes", "in_channels", "image_size", "remat", *CONVOLUTION),
        small_images=True,
    )


ENTRIES = (_entry(16, 1_512_431), _entry(32, 6_018_239), _entry(64, 24_017_183))
