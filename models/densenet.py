"""DenseNet-121, for ImageNet and for small images.

Attributes are named as in torchvision, so that its weights fit by name.
"""

import functools
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models._convolution import max_pool
from models._entry import CONVOLUTION, Entry, classifier, form
from models._layers import Layers, apply, average_pool, check_images
from models._network import Images, Logits, Network

_IN_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")


class DenseLayer(nnx.Module):
    """Appends `growth` channels, computed from all channels so far."""

    def __init__(self, inputs: int, growth: int, *, layers: Layers):
        self.norm1 = layers.normalize(inputs)
        self.conv1 = layers.conv(inputs, 4 * growth, 1)
        self.norm2 = layers.normalize(4 * growth)
        self.conv2 = layers.conv(4 * growth, growth)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., inputs + growth)."""
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return jnp.concatenate((x, y), axis=-1)


class Transition(nnx.Module):
    """Halves the number of channels and the resolution."""

    def __init__(self, inputs: int, *, layers: Layers):
        self.norm = layers.normalize(inputs)
        self.conv = layers.conv(inputs, inputs // 2, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, 2 n, 2 m, inputs) to (batch, n, m, inputs / 2)."""
        return average_pool(self.conv(nnx.relu(self.norm(x))))


class DenseNet(Network):
    """A network whose layers each take the outputs of all layers before them.

    Args:
      block_sizes: number of layers in each dense block.
      num_classes: number of logits.
      layers: creates the layers.
      in_channels: channels of the input images.
      growth: number of channels that a layer appends.
      small_images: whether the stem is a 3x3 convolution at full resolution instead of
        a 7x7 convolution of stride 2 with normalization and max pooling.
      remat: whether gradients recompute the activations inside a layer.

    References:
      G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, `Densely Connected
      Convolutional Networks <https://arxiv.org/abs/1608.06993>`_, 2016
    """

    head_paths = ("classifier",)
    # The names in the file in which torchvision publishes its weights.
    other_names = MappingProxyType(
        {"torchvision, 2017": functools.partial(re.sub, _IN_DENSE_LAYER, r"\1.\2")}
    )

    def __init__(
        self,
        block_sizes: Sequence[int],
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        growth: int = 32,
        small_images: bool,
        remat: bool = False,
    ):
        channels = 2 * growth
        features: dict[str, Any] = {}
        if small_images:
            features["conv0"] = layers.conv(in_channels, channels)
        else:
            features["conv0"] = layers.conv(in_channels, channels, 7, stride=2)
            features["norm0"] = layers.normalize(channels)
        for i, size in enumerate(block_sizes, start=1):
            block: dict[str, DenseLayer] = {}
            for j in range(1, size + 1):
                block[f"denselayer{j}"] = DenseLayer(channels, growth, layers=layers)
                channels += growth
            features[f"denseblock{i}"] = nnx.Dict(block)
            if i < len(block_sizes):
                features[f"transition{i}"] = Transition(channels, layers=layers)
                channels //= 2
        features[f"norm{len(block_sizes) + 1}"] = layers.normalize(channels)
        self.features = nnx.Dict(features)
        self.classifier = layers.head(channels, num_classes)
        self.block_sizes = tuple(block_sizes)
        self.in_channels = in_channels
        self.small_images = small_images
        self.remat = remat

    def __call__(self, images: Images) -> Logits:
        """Maps float images (batch, height, width, channels) to logits."""
        check_images(images, self.in_channels, at_least=8 if self.small_images else 32)
        x = self.features["conv0"](images)
        if not self.small_images:
            x = max_pool(nnx.relu(self.features["norm0"](x)), 3, 2, padding=1)
        for i, size in enumerate(self.block_sizes, start=1):
            for j in range(1, size + 1):
                layer = self.features[f"denseblock{i}"][f"denselayer{j}"]
                x = apply(layer, x, remat=self.remat)
            if i < len(self.block_sizes):
                x = self.features[f"transition{i}"](x)
        x = nnx.relu(self.features[f"norm{len(self.block_sizes) + 1}"](x))
        return self.classifier(x.mean(axis=(1, 2)))


def _entry(name: str, num_parameters: int, *, small_images: bool) -> Entry:
    return classifier(
        name,
        f"DenseNet-121 with growth 32 {form(small_images=small_images)}",
        "Huang et al., 2016, https://arxiv.org/abs/1608.06993",
        num_parameters,
        functools.partial(DenseNet, (6, 12, 24, 16), small_images=small_images),
        options=("num_classes", "in_channels", "remat", *CONVOLUTION),
        small_images=small_images,
    )


ENTRIES = (
    _entry("densenet121_cifar", 6_956_298, small_images=True),
    _entry("densenet121", 7_978_856, small_images=False),
)
