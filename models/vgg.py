"""VGG networks with batch normalization, for ImageNet and for small images."""

import functools
from collections.abc import Sequence
from types import MappingProxyType

from flax import nnx

from models._convolution import max_pool
from models._entry import CONVOLUTION, Entry, classifier, form
from models._layers import (
    Layers,
    Normalization,
    adaptive_average_pool,
    check_images,
)
from models._network import Images, Logits, Network

_POOL = "pool"
_CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
}


def _timm_name(name: str) -> str:
    name = name.replace("classifier.0", "pre_logits.fc1")
    name = name.replace("classifier.3", "pre_logits.fc2")
    return name.replace("classifier.6", "head.fc")


class VGG(Network):
    """Five stages of 3x3 convolutions, each followed by max pooling.

    As in torchvision, convolutions have a bias even before a normalization. Images have
    at least 32 pixels on a side.

    Args:
      convolutions: number of convolutions in each of the five stages.
      num_classes: number of logits.
      layers: creates the layers.
      in_channels: channels of the input images.
      small_images: whether the classifier is one linear layer on the mean over pixels
        instead of three on a grid of 7x7 with dropout between them.

    References:
      K. Simonyan, A. Zisserman, `Very Deep Convolutional Networks for Large-Scale
      Image Recognition <https://arxiv.org/abs/1409.1556>`_, 2014
    """

    # timm applies the hidden linear layers as convolutions.
    other_names = MappingProxyType({"timm": _timm_name})
    other_shapes = MappingProxyType(
        {
            "pre_logits.fc1.weight": (4096, 512, 7, 7),
            "pre_logits.fc2.weight": (4096, 4096, 1, 1),
        }
    )

    def __init__(
        self,
        convolutions: Sequence[int],
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        small_images: bool,
    ):
        # As in torchvision, keys count every layer: conv, norm, ReLU, ..., pool.
        features: dict[str, nnx.Conv | Normalization] = {}
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
        self.head_paths = ("classifier",) if small_images else ("classifier.6",)
        if small_images:
            self.classifier: nnx.Linear | nnx.Dict[nnx.Linear] = head(
                channels, num_classes
            )
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

    def __call__(self, images: Images) -> Logits:
        """Maps float images (batch, height, width, channels) to logits."""
        check_images(images, self.in_channels, at_least=32)
        x = images
        for step in self.plan:
            if step == _POOL:
                x = max_pool(x, 2, 2)
            else:
                conv, norm = self.features[step], self.features[str(int(step) + 1)]
                x = nnx.relu(norm(conv(x)))
        if isinstance(self.classifier, nnx.Linear):
            return self.classifier(x.mean(axis=(1, 2)))
        x = adaptive_average_pool(x, 7)
        # torchvision's weights expect the channels before the pixels.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.classifier["0"](x)))
        x = self.dropout(nnx.relu(self.classifier["3"](x)))
        return self.classifier["6"](x)


def _entry(depth: int, num_parameters: int, *, small_images: bool) -> Entry:
    in_form = form(small_images=small_images)
    return classifier(
        f"vgg{depth}_bn" + ("_cifar" if small_images else ""),
        f"VGG-{depth} with batch normalization {in_form}",
        "Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556",
        num_parameters,
        functools.partial(VGG, _CONVOLUTIONS[depth], small_images=small_images),
        options=("num_classes", "in_channels", *CONVOLUTION),
        small_images=small_images,
    )


ENTRIES = (
    _entry(11, 9_231_114, small_images=True),
    _entry(16, 14_728_266, small_images=True),
    _entry(11, 132_868_840, small_images=False),
    _entry(16, 138_365_992, small_images=False),
)
