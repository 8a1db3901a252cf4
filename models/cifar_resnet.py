"""Residual networks in the form of He et al. for CIFAR, with option-A shortcuts.

Three stages of `depth // 6` blocks with 16, 32 and 64 channels. A shortcut to more
channels takes every second pixel and pads with zeros, so it has no parameters.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models._entry import Entry


def _conv(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        kernel_size=(3, 3),
        strides=stride,
        padding=1,  # on every side, also where a stride of 2 would need less
        use_bias=False,  # a norm follows
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        rngs=rngs,
    )


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # Flax's momentum is the weight of the old value: 0.9 here is 0.1 in PyTorch.
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(inputs, outputs, stride, rngs)
        self.norm1 = _norm(outputs, rngs)
        self.conv2 = _conv(outputs, outputs, 1, rngs)
        self.norm2 = _norm(outputs, rngs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        channels = (before, self.new_channels - before)
        return nnx.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), channels)))


class CifarResNet(nnx.Module):
    """A residual network of `depth` = 6 n + 2 layers for small images.

    Args:
      depth: number of layers with weights on the longest path, 6 n + 2.
      num_classes: number of output logits.
      in_channels: channels of the input images.
      rngs: where the parameters' keys come from.

    Raises:
      ValueError: if depth is not 6 n + 2 with n of at least 1.

    References:
      K. He, X. Zhang, S. Ren, J. Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015, section 4.2
    """

    def __init__(
        self, depth: int, *, num_classes: int, in_channels: int = 3, rngs: nnx.Rngs
    ):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1, got {depth}.")
        self.stem = _conv(in_channels, 16, 1, rngs)
        self.stem_norm = _norm(16, rngs)
        blocks, width = [], 16
        for stage, outputs in enumerate((16, 32, 64)):
            for i in range(depth // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(width, outputs, stride, rngs=rngs))
                width = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, height, width, channels) to logits."""
        x = nnx.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def _entry(depth: int, num_parameters: int) -> Entry:
    return Entry(
        name=f"resnet{depth}",
        description=f"ResNet-{depth} in CIFAR form with parameter-free shortcuts",
        paper="He et al., 2015, https://arxiv.org/abs/1512.03385",
        input_shape=(32, 32, 3),
        num_parameters=num_parameters,
        num_classes=10,
        build=functools.partial(CifarResNet, depth),
    )


ENTRIES = (
    _entry(8, 75_290),
    _entry(20, 269_722),
    _entry(32, 464_154),
    _entry(44, 658_586),
    _entry(56, 853_018),
    _entry(110, 1_727_962),
)
