"""VGG networks with batch normalisation, for ImageNet and for small images."""

import functools
from collections.abc import Sequence
from types import MappingProxyType

import jax
from flax import nnx

from models._entry import CONVOLUTION, Entry
from models._layers import Layers, adaptive_average_pool, check_images, max_pool

_POOL = "pool"
_CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
}


def _timm_name(name: str) -> str:
    name = name.replace("classifier.0", "pre_logits.fc1")
    name = name.replace("classifier.3", "pre_logits.fc2")
    return name.replace("classifier.6", "head.fc")


class VGG(nnx.Module):
    """Five stages of 3x3 convolutions, each with max pooling at its end.

    Convolutions have a bias, also in front of a normalisation, as in torchvision.
    Images have at least 32 pixels on a side.

    Args:
      convolutions: number of them in each of the five stages.
      num_classes: number of output logits.
      layers: makes its layers.
      in_channels: channels of the input images.
      small_images: whether one linear layer on the mean over pixels follows, and not
        three on a grid of 7x7 with dropout between them.

    References:
      K. Simonyan, A. Zisserman, `Very Deep Convolutional Networks for Large-Scale
      Image Recognition <https://arxiv.org/abs/1409.1556>`_, 2014
    """

    def __init__(
        self,
        convolutions: Sequence[int],
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        small_images: bool,
    ):
        # Keys count every layer, as in torchvision: conv, norm, ReLU, ..., pool.
        features: dict[str, nnx.Module] = {}
        plan: list[str] = []
        index, channels = 0, in_channels
        for count, width in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                features[str(index)] = layers.conv(channels, width, use_bias=True)
                features[str(index + 1)] = layers.normalize(width)
                plan.append(str(index))
                index, channels = index + 3, width
            plan.append(_POOL)
            index += 1
        self.features = nnx.Dict(features)
        self.plan = tuple(plan)
        head = functools.partial(layers.head, kernel_init=nnx.initializers.normal(0.01))
        if small_images:
            self.classifier = head(channels, num_classes)
        else:
            init = nnx.initializers.normal(0.01)
            self.classifier = nnx.Dict(
                {
                    "0": layers.linear(channels * 49, 4096, kernel_init=init),
                    "3": layers.linear(4096, 4096, kernel_init=init),
                    "6": head(4096, num_classes),
                }
            )
            self.dropout = nnx.Dropout(0.5, rngs=layers.rngs)
        self.in_channels = in_channels
        self.small_images = small_images

    # timm applies the hidden linear layers as convolutions.
    OTHER_NAMES = MappingProxyType({"timm": _timm_name})
    OTHER_SHAPES = MappingProxyType(
        {
            "pre_logits.fc1.weight": (4096, 512, 7, 7),
            "pre_logits.fc2.weight": (4096, 4096, 1, 1),
        }
    )

    @property
    def HEAD(self) -> tuple[str, ...]:  # noqa: N802 - a constant of each form
        """The layer that depends on the number of classes."""
        return ("classifier",) if self.small_images else ("classifier.6",)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float images (batch, height, width, channels) to logits."""
        check_images(images, self.in_channels, at_least=32)
        x = images
        for step in self.plan:
            if step == _POOL:
                x = max_pool(x, 2, 2)
            else:
                conv, norm = self.features[step], self.features[str(int(step) + 1)]
                x = nnx.relu(norm(conv(x)))
        if self.small_images:
            return self.classifier(x.mean(axis=(1, 2)))
        x = adaptive_average_pool(x, 7)
        # Channels before pixels: the order in which torchvision's weights are.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.classifier["0"](x)))
        x = self.dropout(nnx.relu(self.classifier["3"](x)))
        return self.classifier["6"](x)


def _entry(depth: int, num_parameters: int, *, small_images: bool) -> Entry:
    form = "CIFAR" if small_images else "ImageNet"
    return Entry(
        name=f"vgg{depth}_bn" + ("_cifar" if small_images else ""),
        task="classification",
        description=f"VGG-{depth} with batch normalisation in {form} form",
        paper="Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556",
        input_shape=(32, 32, 3) if small_images else (224, 224, 3),
        published={"num_classes": 10 if small_images else 1000},
        num_parameters=num_parameters,
        options=("num_classes", "in_channels", *CONVOLUTION),
        build=functools.partial(VGG, _CONVOLUTIONS[depth], small_images=small_images),
    )


ENTRIES = (
    _entry(11, 9_231_114, small_images=True),
    _entry(16, 14_728_266, small_images=True),
    _entry(11, 132_868_840, small_images=False),
    _entry(16, 138_365_992, small_images=False),
)
