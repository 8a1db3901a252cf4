"""Pre-activation residual networks: ResNet-18 and Wide ResNet, for small images."""

import functools
from collections.abc import Sequence

import jax
from flax import nnx

from models._entry import CONVOLUTION, Entry, classifier
from models._layers import Layers, apply, check_images
from models._network import Images, Logits, Network


class PreActBlock(nnx.Module):
    """Two 3x3 convolutions, each preceded by its normalization and a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, layers: Layers):
        self.bn1 = layers.normalize(inputs)
        self.conv1 = layers.conv(inputs, outputs, stride=stride)
        self.bn2 = layers.normalize(outputs)
        self.conv2 = layers.conv(outputs, outputs)
        self.downsample: nnx.Conv | None = nnx.data(None)
        if stride != 1 or inputs != outputs:
            self.downsample = layers.conv(inputs, outputs, 1, stride=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        y = nnx.relu(self.bn1(x))
        # A projection takes the activation, an identity the input of the block.
        shortcut = x if self.downsample is None else self.downsample(y)
        y = nnx.relu(self.bn2(self.conv1(y)))
        return self.conv2(y) + shortcut


class PreActResNet(Network):
    """A residual network whose sums pass from block to block unchanged.

    Args:
      stage_sizes: number of blocks of each stage.
      num_classes: number of logits.
      layers: creates the layers.
      in_channels: channels of the input images.
      stem: channels of the first convolution.
      width: channels of the first stage. Each stage doubles them.
      remat: whether gradients recompute the activations inside a block.

    References:
      - K. He, X. Zhang, S. Ren, J. Sun, `Identity Mappings in Deep Residual Networks
        <https://arxiv.org/abs/1603.05027>`_, 2016
      - S. Zagoruyko, N. Komodakis, `Wide Residual Networks
        <https://arxiv.org/abs/1605.07146>`_, 2016
    """

    head_paths = ("fc",)

    def __init__(
        self,
        stage_sizes: Sequence[int],
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        stem: int,
        width: int,
        remat: bool = False,
    ):
        self.conv1 = layers.conv(in_channels, stem)
        channels = stem
        for i, size in enumerate(stage_sizes):
            blocks = []
            for j in range(size):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(PreActBlock(channels, width << i, stride, layers=layers))
                channels = width << i
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self.bn1 = layers.normalize(channels)
        self.fc = layers.head(channels, num_classes)
        self.in_channels = in_channels
        self.num_stages = len(stage_sizes)
        self.remat = remat

    def __call__(self, images: Images) -> Logits:
        """Maps float images (batch, height, width, channels) to logits."""
        check_images(images, self.in_channels)
        x = self.conv1(images)
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = apply(block, x, remat=self.remat)
        return self.fc(nnx.relu(self.bn1(x)).mean(axis=(1, 2)))


def _entry(
    name: str,
    description: str,
    paper: str,
    num_parameters: int,
    stage_sizes: tuple[int, ...],
    stem: int,
    width: int,
) -> Entry:
    return classifier(
        name,
        description,
        paper,
        num_parameters,
        functools.partial(PreActResNet, stage_sizes, stem=stem, width=width),
        options=("num_classes", "in_channels", "remat", *CONVOLUTION),
        small_images=True,
    )


ENTRIES = (
    _entry(
        "preact_resnet18",
        "Pre-activation ResNet-18 in CIFAR form",
        "He et al., 2016, https://arxiv.org/abs/1603.05027",
        11_172_170,
        (2, 2, 2, 2),
        stem=64,
        width=64,
    ),
    _entry(
        "wide_resnet28_10",
        "Wide ResNet-28-10",
        "Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146",
        36_479_194,
        (4, 4, 4),
        stem=16,
        width=160,
    ),
)
