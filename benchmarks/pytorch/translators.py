"""Reference networks of pix2pix in PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class ConvNorm(nn.Module):
    """A convolution and optionally its batch norm."""

    def __init__(self, conv: nn.Module, norm: bool):
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else None

    def forward(self, x):
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class UNetGenerator(nn.Module):
    """Isola et al. 2017, with `depth` halvings of the image.

    Only the last convolution has a bias: the authors' code leaves it out by the
    kind of norm in use, also of the two down convolutions that no norm follows.
    """

    def __init__(self, depth: int, filters: int = 64, channels: int = 3):
        super().__init__()
        widths = [filters * min(2**i, 8) for i in range(depth)]
        self.down = nn.ModuleList()
        inputs = channels
        for i, width in enumerate(widths):
            conv = nn.Conv2d(inputs, width, 4, stride=2, padding=1, bias=False)
            self.down.append(ConvNorm(conv, norm=0 < i < depth - 1))
            inputs = width
        self.up = nn.ModuleList()
        for i in range(depth):
            last = i == depth - 1
            # After the innermost block, the skip provides half of the channels.
            inputs = widths[-1 - i] * (1 if i == 0 else 2)
            outputs = channels if last else widths[-2 - i]
            conv = nn.ConvTranspose2d(
                inputs, outputs, 4, stride=2, padding=1, bias=last
            )
            self.up.append(ConvNorm(conv, norm=not last))
        # These are the blocks from 512 to 512 channels, except the innermost.
        self.dropped = range(1, depth - 4)

    def forward(self, x):
        x = self.down[0](x)
        skips = []
        for layer in self.down[1:]:
            x = F.leaky_relu(x, 0.2)
            # The authors' activation works in place and so changes the skip too.
            # This makes no difference, because a ReLU follows each concatenation and
            # relu(leaky_relu(x)) = relu(x).
            skips.append(x)
            x = layer(x)
        for i, layer in enumerate(self.up):
            x = layer(F.relu(x))
            if i in self.dropped:
                x = F.dropout(x, 0.5, self.training)
            if skips:
                x = torch.cat([skips.pop(), x], 1)
        return torch.tanh(x)


class Discriminator(nn.Module):
    """Convolutions with LeakyReLU between them and the authors' choice of biases."""

    def __init__(
        self,
        widths: tuple[int, ...],
        strides: tuple[int, ...],
        norms: tuple[bool, ...],
        biases: tuple[bool, ...],
        size: int,
        channels: int = 6,
    ):
        super().__init__()
        self.layers = nn.ModuleList()
        for width, stride, norm, bias in zip(
            widths, strides, norms, biases, strict=True
        ):
            padding = 1 if size == 4 else 0
            conv = nn.Conv2d(channels, width, size, stride, padding, bias=bias)
            self.layers.append(ConvNorm(conv, norm))
            channels = width

    def forward(self, x):
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(F.leaky_relu(x, 0.2))
        return x


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unet256": partial(UNetGenerator, 8),
    "unet128": partial(UNetGenerator, 7),
    "unet64": partial(UNetGenerator, 6),
    "unet64_small": partial(UNetGenerator, 6, filters=16),
    "patchgan70": partial(
        Discriminator,
        widths=(64, 128, 256, 512, 1),
        strides=(2, 2, 2, 1, 1),
        norms=(False, True, True, True, False),
        biases=(True, False, False, False, True),
        size=4,
    ),
    "patchgan16": partial(
        Discriminator,
        widths=(64, 128, 1),
        strides=(2, 1, 1),
        norms=(False, True, False),
        biases=(True, False, True),
        size=4,
    ),
    # With batch norm, the authors' code has no last bias here.
    "pixelgan": partial(
        Discriminator,
        widths=(64, 128, 1),
        strides=(1, 1, 1),
        norms=(False, True, False),
        biases=(True, False, False),
        size=1,
    ),
}
