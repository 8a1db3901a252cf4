"""MobileNetV2, for ImageNet and for small images.

Attributes are named as in torchvision, so that its weights fit by name.
"""

import functools
from types import MappingProxyType

import jax
from flax import nnx

from models._entry import CONVOLUTION, Entry
from models._layers import Layers, apply, check_images

# (expansion, channels, blocks, stride) of each stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _timm_names() -> dict[str, str]:
    """Names of timm's layers by those of torchvision's."""
    names = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        "features.18.0": "conv_head",
        "features.18.1": "bn2",
        "classifier.1": "classifier",
    }
    index = 1
    for stage, (expansion, _, blocks, _) in enumerate(_STAGES):
        for block in range(blocks):
            ours, theirs = f"features.{index}.conv", f"blocks.{stage}.{block}"
            parts = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            places = ["0.0", "0.1", "1.0", "1.1", "2", "3"]
            if expansion == 1:
                parts = ["conv_dw", "bn1", "conv_pw", "bn2"]
                places = ["0.0", "0.1", "1", "2"]
            for place, part in zip(places, parts, strict=True):
                names[f"{ours}.{place}"] = f"{theirs}.{part}"
            index += 1
    return names


_TIMM_NAMES = _timm_names()


def _timm_name(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{_TIMM_NAMES.get(layer, layer)}.{leaf}"


class ConvNormReLU(nnx.List):
    """A convolution, a normalisation and a ReLU, cut off above 6 if asked for."""

    def __init__(self, conv: nnx.Conv, *, cut_off: bool, layers: Layers):
        super().__init__([conv, layers.normalize(conv.out_features)])
        self.activation = nnx.relu6 if cut_off else nnx.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        conv, norm = self
        return self.activation(norm(conv(x)))


class InvertedResidual(nnx.Module):
    """1x1 to more channels, 3x3 on each channel alone, 1x1 to fewer without a ReLU.

    Args:
      inputs: channels of the input.
      outputs: channels of the output.
      expansion: channels in between for each of the input.
      stride: of the 3x3 convolution.
      small_images: whether an expansion of 1 has its 1x1 convolution too, and a
        shortcut to other channels one of its own, without a ReLU.
      layers: makes its layers.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expansion: int,
        stride: int,
        *,
        small_images: bool,
        layers: Layers,
    ):
        width = inputs * expansion
        activated = functools.partial(
            ConvNormReLU, cut_off=not small_images, layers=layers
        )
        steps = []
        if expansion > 1 or small_images:
            steps.append(activated(layers.conv(inputs, width, 1)))
        steps.append(activated(layers.conv(width, width, stride=stride, groups=width)))
        steps += [layers.conv(width, outputs, 1), layers.normalize(outputs)]
        self.conv = nnx.List(steps)
        self.has_shortcut = stride == 1 and (inputs == outputs or small_images)
        self.shortcut = nnx.List([])
        if self.has_shortcut and inputs != outputs:
            projection = layers.conv(inputs, outputs, 1)
            self.shortcut = nnx.List([projection, layers.normalize(outputs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        y = shortcut = x
        for step in self.conv:
            y = step(y)
        for step in self.shortcut:
            shortcut = step(shortcut)
        return y + shortcut if self.has_shortcut else y


class MobileNetV2(nnx.Module):
    """A network of inverted residuals for small devices.

    The form for small images keeps the resolution in its stem and second stage, has a
    plain ReLU and more shortcuts, as the CIFAR code has that published counts are of.

    Args:
      num_classes: number of output logits.
      layers: makes its layers.
      in_channels: channels of the input images.
      small_images: whether it has the form for them.
      remat: whether activations inside a block are computed again for gradients.

    References:
      M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, `MobileNetV2: Inverted
      Residuals and Linear Bottlenecks <https://arxiv.org/abs/1801.04381>`_, 2018
    """

    HEAD = ("classifier.1",)
    OTHER_NAMES = MappingProxyType({"timm": _timm_name})

    def __init__(
        self,
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        small_images: bool,
        remat: bool = False,
    ):
        activated = functools.partial(
            ConvNormReLU, cut_off=not small_images, layers=layers
        )
        stem_stride = 1 if small_images else 2
        features = [activated(layers.conv(in_channels, 32, stride=stem_stride))]
        channels = 32
        for i, (expansion, outputs, blocks, stride) in enumerate(_STAGES):
            for j in range(blocks):
                halves = j == 0 and not (small_images and i == 1)
                features.append(
                    InvertedResidual(
                        channels,
                        outputs,
                        expansion,
                        stride if halves else 1,
                        small_images=small_images,
                        layers=layers,
                    )
                )
                channels = outputs
        features.append(activated(layers.conv(channels, 1280, 1)))
        self.features = nnx.List(features)
        rate = 0.0 if small_images else 0.2
        init = nnx.initializers.normal(0.01)
        self.classifier = nnx.List(
            [
                nnx.Dropout(rate, rngs=layers.rngs),
                layers.head(1280, num_classes, kernel_init=init),
            ]
        )
        self.in_channels = in_channels
        self.remat = remat

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, height, width, channels) to logits."""
        check_images(images, self.in_channels)
        x = images
        for block in self.features:
            x = apply(block, x, remat=self.remat)
        dropout, head = self.classifier
        return head(dropout(x.mean(axis=(1, 2))))


def _entry(name: str, num_parameters: int, *, small_images: bool) -> Entry:
    return Entry(
        name=name,
        task="classification",
        description=f"MobileNetV2 in {'CIFAR' if small_images else 'ImageNet'} form",
        paper="Sandler et al., 2018, https://arxiv.org/abs/1801.04381",
        input_shape=(32, 32, 3) if small_images else (224, 224, 3),
        published={"num_classes": 10 if small_images else 1000},
        num_parameters=num_parameters,
        options=("num_classes", "in_channels", "remat", *CONVOLUTION),
        build=functools.partial(MobileNetV2, small_images=small_images),
    )


ENTRIES = (
    _entry("mobilenet_v2_cifar", 2_296_922, small_images=True),
    _entry("mobilenet_v2", 3_504_872, small_images=False),
)
