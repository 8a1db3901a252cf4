"""Residual networks: ResNet and ResNeXt, for ImageNet and for small images.

Attributes are named as in torchvision, so that its weights fit by name.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models._entry import CONVOLUTION, Entry
from models._layers import Layers, apply, check_images, max_pool

HE_2015 = "He et al., 2015, https://arxiv.org/abs/1512.03385"
XIE_2016 = "Xie et al., 2016, https://arxiv.org/abs/1611.05431"


class _PaddedShortcut(nnx.Module):
    """Option A: every `stride`-th pixel, and zeros for new channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.stride = stride
        before = (outputs - inputs) // 2
        self.padding = (before, outputs - inputs - before)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.padding))


class _Projection(nnx.List):
    """Option B: a 1x1 convolution and a normalisation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = self
        return norm(conv(x))


class _Residual(nnx.Module):
    """A block: its class says what is added to the shortcut."""

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
            self.downsample = nnx.data(None)
        elif padded_shortcut:
            self.downsample = _PaddedShortcut(inputs, outputs, stride)
        else:
            conv = layers.conv(inputs, outputs, 1, stride=stride)
            self.downsample = _Projection([conv, layers.normalize(outputs)])

    def residual(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return nnx.relu(self.residual(x) + shortcut)


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
        """What is added to the shortcut."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(_Residual):
    """A 3x3 convolution, of groups perhaps, between two 1x1 ones.

    The stride is that of the 3x3 convolution, as in torchvision and unlike the paper.
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
        """What is added to the shortcut."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNet(nnx.Module):
    """A residual network of blocks in stages, each of half the resolution.

    Args:
      stage_sizes: number of blocks of each stage.
      num_classes: number of output logits; None for a network without a head.
      layers: makes its layers.
      in_channels: channels of the input images.
      width: channels inside the first stage's blocks, doubled by each stage.
      expansion: channels of a block's output for each one inside; 1 for blocks of
        two 3x3 convolutions, more for bottlenecks.
      groups: of a bottleneck's 3x3 convolution; more than one makes it a ResNeXt.
      stem: kernel size of the first convolution. One of 7 has a stride of 2 and max
        pooling behind it; smaller ones, for small images, keep the resolution.
      padded_shortcut: whether shortcuts to more channels have no parameters (option A
        of He et al.) instead of a 1x1 convolution (option B).
      zero_init_last_norm: whether every block starts as the identity (Goyal et al.,
        2017).
      remat: whether activations inside a block are computed again for gradients:
        less memory, about a third more time.
      strides: of each stage.
      dilations: of the 3x3 convolutions in each stage, repeated over its blocks.

    Raises:
      ValueError: if zero_init_last_norm is asked for where no norm can have it.

    References:
      - K. He, X. Zhang, S. Ren, J. Sun, `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015
      - S. Xie, R. Girshick, P. Dollár, Z. Tu, K. He, `Aggregated Residual
        Transformations for Deep Neural Networks
        <https://arxiv.org/abs/1611.05431>`_, 2016
    """

    HEAD = ("fc",)

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
        block = BasicBlock
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
        self.fc = nnx.data(None)
        if num_classes is not None:
            self.fc = layers.head(channels, num_classes)
        self.in_channels = in_channels
        self.num_stages = len(stage_sizes)
        self.remat = remat

    def features(self, images: jax.Array) -> list[jax.Array]:
        """Maps images to the feature map of each stage, the finest first."""
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

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, height, width, channels) to logits."""
        return self.fc(self.features(images)[-1].mean(axis=(1, 2)))


OPTIONS = ("num_classes", "in_channels", "zero_init_last_norm", "remat", *CONVOLUTION)


def _imagenet(
    name: str,
    description: str,
    num_parameters: int,
    stage_sizes: tuple[int, ...],
    paper: str = HE_2015,
    **form: Any,
) -> Entry:
    return Entry(
        name=name,
        task="classification",
        description=f"{description} in ImageNet form",
        paper=paper,
        input_shape=(224, 224, 3),
        published={"num_classes": 1000},
        num_parameters=num_parameters,
        options=OPTIONS,
        build=functools.partial(ResNet, stage_sizes, **form),
    )


def _cifar(
    name: str,
    description: str,
    num_parameters: int,
    stage_sizes: tuple[int, ...],
    paper: str = HE_2015,
    stem: Literal[3, 1] = 3,
    **form: Any,
) -> Entry:
    return Entry(
        name=name,
        task="classification",
        description=f"{description} in CIFAR form",
        paper=paper,
        input_shape=(32, 32, 3),
        published={"num_classes": 10},
        num_parameters=num_parameters,
        options=OPTIONS,
        build=functools.partial(ResNet, stage_sizes, stem=stem, **form),
    )


def _thin(depth: int, num_parameters: int) -> Entry:
    return _cifar(
        f"resnet{depth}",
        f"ResNet-{depth}, 16 to 64 channels and parameter-free shortcuts,",
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
        paper=XIE_2016,
        stem=1,
        width=64 * groups,
        expansion=2,
        groups=groups,
    )


_RESNEXT: Mapping[str, Any] = {
    "paper": XIE_2016,
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
