"""Residual networks: ResNet and ResNeXt, for ImageNet and for small images.

Attributes are named as in torchvision, so that its weights fit by name.
"""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models._convolution import max_pool
from models._entry import CONVOLUTION, Entry, classifier, form
from models._layers import ConvNorm, Layers, apply, check_images, stored
from models._network import Images, Logits, Network

_HE_2015 = "He et al., 2015, https://arxiv.org/abs/1512.03385"
_XIE_2016 = "Xie et al., 2016, https://arxiv.org/abs/1611.05431"


class _PaddedShortcut(nnx.Module):
    """A shortcut without parameters: option A of He et al.

    It takes every `stride`-th pixel and pads the channels with zeros on both sides.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.stride = stride
        before = (outputs - inputs) // 2
        self.padding = (before, outputs - inputs - before)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.padding))


class _Residual(nnx.Module):
    """A residual block; a subclass defines the branch that the shortcut is added to."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        padded_shortcut: bool,
        layers: Layers,
    ):
        if stride == 1 and inputs == outputs:
            self.downsample: _PaddedShortcut | ConvNorm | None = nnx.data(None)
        elif padded_shortcut:
            self.downsample = _PaddedShortcut(inputs, outputs, stride)
        else:
            # A 1x1 convolution: option B of He et al.
            conv = layers.conv(inputs, outputs, 1, stride=stride)
            self.downsample = ConvNorm(conv, layers=layers, activation=None)

    @abc.abstractmethod
    def residual(self, x: jax.Array) -> jax.Array:
        """Returns the output of the branch, (batch, ..., outputs)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return stored(nnx.relu(self.residual(x) + shortcut))


class BasicBlock(_Residual):
    """Two 3x3 convolutions."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        *,
        last_scale_init: nnx.Initializer,
        padded_shortcut: bool,
        layers: Layers,
    ):
        self.conv1 = layers.conv(inputs, width, stride=stride, dilation=dilation)
        self.bn1 = layers.normalize(width)
        self.conv2 = layers.conv(width, width, dilation=dilation)
        self.bn2 = layers.normalize(width, scale_init=last_scale_init)
        super().__init__(
            inputs, width, stride, padded_shortcut=padded_shortcut, layers=layers
        )

    def residual(self, x: jax.Array) -> jax.Array:
        """Returns the output of the branch."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(_Residual):
    """A 3x3 convolution, which may be grouped, between two 1x1 convolutions.

    The 3x3 convolution has the stride, as in torchvision and unlike in the paper.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        *,
        expansion: int,
        groups: int,
        last_scale_init: nnx.Initializer,
        padded_shortcut: bool,
        layers: Layers,
    ):
        outputs = width * expansion
        self.conv1 = layers.conv(inputs, width, 1)
        self.bn1 = layers.normalize(width)
        self.conv2 = layers.conv(
            width, width, stride=stride, dilation=dilation, groups=groups
        )
        self.bn2 = layers.normalize(width)
        self.conv3 = layers.conv(width, outputs, 1)
        self.bn3 = layers.normalize(outputs, scale_init=last_scale_init)
        super().__init__(
            inputs, outputs, stride, padded_shortcut=padded_shortcut, layers=layers
        )

    def residual(self, x: jax.Array) -> jax.Array:
        """Returns the output of the branch."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNet(Network):
    """A residual network, whose stages halve the resolution.

    Args:
      stage_sizes: number of blocks of each stage.
      num_classes: number of logits; None for a network without a head, which only has
        `features`.
      layers: creates the layers.
      in_channels: channels of the input images.
      width: channels inside the blocks of the first stage. Each later stage doubles the
        number of channels.
      expansion: ratio of a block's output channels to its inner channels. 1 gives
        blocks of two 3x3 convolutions, more gives bottlenecks.
      groups: groups of a bottleneck's 3x3 convolution. More than one gives a ResNeXt.
      stem: kernel size of the first convolution. With 7 it has a stride of 2 and is
        followed by max pooling. Smaller ones keep the resolution of small images.
      padded_shortcut: whether shortcuts to more channels have no parameters (option A
        of He et al.) instead of a 1x1 convolution (option B).
      zero_init_last_norm: whether every block starts as the identity (Goyal et al.,
        2017).
      remat: whether gradients recompute the activations inside a block, which takes
        less memory and about a third more time.
      strides: stride of each stage.
      dilations: dilations of the 3x3 convolutions in each stage, repeated over its
        blocks.

    Raises:
      ValueError: if zero_init_last_norm is set with a norm that has no trained scale,
        or if a network without a head is called.

    References:
      - K. He, X. Zhang, S. Ren, J. Sun, `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015
      - S. Xie, R. Girshick, P. Dollár, Z. Tu, K. He, `Aggregated Residual
        Transformations for Deep Neural Networks
        <https://arxiv.org/abs/1611.05431>`_, 2016
    """

    head_paths = ("fc",)

    def __init__(
        self,
        stage_sizes: Sequence[int],
        *,
        num_classes: int | None,
        layers: Layers,
        in_channels: int = 3,
        width: int = 64,
        expansion: int = 1,
        groups: int = 1,
        stem: Literal[7, 3, 1] = 7,
        padded_shortcut: bool = False,
        zero_init_last_norm: bool = False,
        remat: bool = False,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[Sequence[int]] = ((1,), (1,), (1,), (1,)),
    ):
        if zero_init_last_norm and layers.norm not in ("batch", "group"):
            raise ValueError(
                "zero_init_last_norm needs norm 'batch' or 'group', whose scale is "
                f"trained; got {layers.norm!r}"
            )
        channels = 16 if padded_shortcut else 64
        self.halves_in_stem = stem == 7
        self.conv1 = layers.conv(
            in_channels, channels, stem, stride=2 if self.halves_in_stem else 1
        )
        self.bn1 = layers.normalize(channels)
        block: Callable[..., _Residual] = BasicBlock
        if expansion > 1:
            block = functools.partial(Bottleneck, expansion=expansion, groups=groups)
        init = nnx.initializers.zeros if zero_init_last_norm else nnx.initializers.ones
        for i, size in enumerate(stage_sizes):
            blocks = []
            for j in range(size):
                blocks.append(
                    block(
                        channels,
                        width << i,
                        strides[i] if j == 0 else 1,
                        dilations[i][j % len(dilations[i])],
                        last_scale_init=init,
                        padded_shortcut=padded_shortcut,
                        layers=layers,
                    )
                )
                channels = (width << i) * expansion
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self.fc: nnx.Linear | None = nnx.data(None)
        if num_classes is not None:
            self.fc = layers.head(channels, num_classes)
        self.in_channels = in_channels
        self.num_stages = len(stage_sizes)
        self.remat = remat

    def features(self, images: Images) -> list[jax.Array]:
        """Maps images to the feature map of each stage, the finest first.

        Args:
          images: (batch, height, width, channels).

        Returns:
          For each stage an array (batch, rows, columns, features).

        Raises:
          ImageShapeError: if the number of channels is not that of the network.
        """
        check_images(images, self.in_channels)
        x = nnx.relu(self.bn1(self.conv1(images)))
        if self.halves_in_stem:
            x = max_pool(x, 3, 2, padding=1)
        maps = []
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = apply(block, x, remat=self.remat)
            maps.append(x)
        return maps

    def __call__(self, images: Images) -> Logits:
        """Maps float images to logits.

        Args:
          images: (batch, height, width, channels).

        Returns:
          Logits (batch, num_classes).
        """
        if self.fc is None:
            raise ValueError(
                "a ResNet with num_classes=None has no logits: use features"
            )
        return self.fc(self.features(images)[-1].mean(axis=(1, 2)))


OPTIONS = ("num_classes", "in_channels", "zero_init_last_norm", "remat", *CONVOLUTION)


def _entry(
    name: str,
    description: str,
    num_parameters: int,
    stage_sizes: tuple[int, ...],
    *,
    paper: str = _HE_2015,
    small_images: bool,
    **options: Any,
) -> Entry:
    return classifier(
        name,
        f"{description} {form(small_images=small_images)}",
        paper,
        num_parameters,
        functools.partial(ResNet, stage_sizes, **options),
        options=OPTIONS,
        small_images=small_images,
    )


_imagenet = functools.partial(_entry, small_images=False)
_cifar = functools.partial(_entry, small_images=True, stem=3)


def _thin(depth: int, num_parameters: int) -> Entry:
    return _cifar(
        f"resnet{depth}",
        f"ResNet-{depth} with 16 to 64 channels and parameter-free shortcuts",
        num_parameters,
        (depth // 6,) * 3,
        width=16,
        padded_shortcut=True,
    )


def _resnext29(groups: int, num_parameters: int) -> Entry:
    return _cifar(
        f"resnext29_{groups}x64d",
        f"ResNeXt-29 {groups}x64d",
        num_parameters,
        (3, 3, 3),
        paper=_XIE_2016,
        stem=1,
        width=64 * groups,
        expansion=2,
        groups=groups,
    )


_RESNEXT: Mapping[str, Any] = {
    "paper": _XIE_2016,
    "width": 128,
    "expansion": 2,
    "groups": 32,
}

ENTRIES = (
    _thin(8, 75_290),
    _thin(20, 269_722),
    _thin(32, 464_154),
    _thin(44, 658_586),
    _thin(56, 853_018),
    _thin(110, 1_727_962),
    _cifar("resnet18_cifar", "ResNet-18", 11_173_962, (2, 2, 2, 2)),
    _cifar("resnet34_cifar", "ResNet-34", 21_282_122, (3, 4, 6, 3)),
    _cifar("resnet50_cifar", "ResNet-50", 23_520_842, (3, 4, 6, 3), expansion=4),
    _cifar("resnet101_cifar", "ResNet-101", 42_512_970, (3, 4, 23, 3), expansion=4),
    _imagenet("resnet18", "ResNet-18", 11_689_512, (2, 2, 2, 2)),
    _imagenet("resnet34", "ResNet-34", 21_797_672, (3, 4, 6, 3)),
    _imagenet("resnet50", "ResNet-50", 25_557_032, (3, 4, 6, 3), expansion=4),
    _imagenet("resnet101", "ResNet-101", 44_549_160, (3, 4, 23, 3), expansion=4),
    _resnext29(2, 9_128_778),
    _resnext29(4, 27_104_586),
    _imagenet(
        "resnext50_32x4d", "ResNeXt-50 32x4d", 25_028_904, (3, 4, 6, 3), **_RESNEXT
    ),
    _imagenet(
        "resnext101_32x4d", "ResNeXt-101 32x4d", 44_177_704, (3, 4, 23, 3), **_RESNEXT
    ),
)
