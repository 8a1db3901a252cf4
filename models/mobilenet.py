"""MobileNetV2, for ImageNet and for small images.

Attributes are named as in torchvision, so that its weights fit by name.
"""

import functools
from types import MappingProxyType

import jax
from flax import nnx

from models._entry import CONVOLUTION, Entry, classifier, form
from models._layers import ConvNorm, Layers, Normalization, apply, check_images
from models._network import Images, Logits, Network

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
    """Returns the names of timm's layers by those of torchvision's."""
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


def _activated(conv: nnx.Conv, *, small_images: bool, layers: Layers) -> ConvNorm:
    activation = nnx.relu if small_images else nnx.relu6
    return ConvNorm(conv, layers=layers, activation=activation)


class InvertedResidual(nnx.Module):
    """A block that is wide inside and narrow at both ends.

    A 1x1 convolution expands the channels, a 3x3 convolution filters each of them, and
    another 1x1 convolution, which has no ReLU, reduces them again.

    Args:
      inputs: channels of the input.
      outputs: channels of the output.
      expansion: ratio of inner channels to input channels.
      stride: stride of the 3x3 convolution.
      small_images: whether the first 1x1 convolution stays with an expansion of 1, and
        a shortcut to another number of channels is a 1x1 convolution.
      layers: creates the layers.
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
            _activated, small_images=small_images, layers=layers
        )
        steps: list[ConvNorm | nnx.Conv | Normalization] = []
        if expansion > 1 or small_images:
            steps.append(activated(layers.conv(inputs, width, 1)))
        steps.append(activated(layers.conv(width, width, stride=stride, groups=width)))
        steps += [layers.conv(width, outputs, 1), layers.normalize(outputs)]
        self.conv = nnx.List(steps)
        self.has_shortcut = stride == 1 and (inputs == outputs or small_images)
        self.shortcut: nnx.List[nnx.Conv | Normalization] = nnx.List([])
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


class MobileNetV2(Network):
    """A network of inverted residuals for small devices.

    The form for small images keeps the resolution in its stem and second stage. It uses
    ReLU instead of ReLU6 and has more shortcuts. So does the CIFAR code from which the
    published parameter counts are.

    Args:
      num_classes: number of logits.
      layers: creates the layers.
      in_channels: channels of the input images.
      small_images: whether the network has the form for small images.
      remat: whether gradients recompute the activations inside a block.

    References:
      M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, `MobileNetV2: Inverted
      Residuals and Linear Bottlenecks <https://arxiv.org/abs/1801.04381>`_, 2018
    """

    head_paths = ("classifier.1",)
    other_names = MappingProxyType({"timm": _timm_name})

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
            _activated, small_images=small_images, layers=layers
        )
        stem_stride = 1 if small_images else 2
        stem = activated(layers.conv(in_channels, 32, stride=stem_stride))
        features: list[ConvNorm | InvertedResidual] = [stem]
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

    def __call__(self, images: Images) -> Logits:
        """Maps float images (batch, height, width, channels) to logits."""
        check_images(images, self.in_channels)
        x = images
        for block in self.features:
            x = apply(block, x, remat=self.remat)
        x = x.mean(axis=(1, 2))
        for layer in self.classifier:
            x = layer(x)
        return x


def _entry(name: str, num_parameters: int, *, small_images: bool) -> Entry:
    return classifier(
        name,
        f"MobileNetV2 {form(small_images=small_images)}",
        "Sandler et al., 2018, https://arxiv.org/abs/1801.04381",
        num_parameters,
        functools.partial(MobileNetV2, small_images=small_images),
        options=("num_classes", "in_channels", "remat", *CONVOLUTION),
        small_images=small_images,
    )


ENTRIES = (
    _entry("mobilenet_v2_cifar", 2_296_922, small_images=True),
    _entry("mobilenet_v2", 3_504_872, small_images=False),
)
