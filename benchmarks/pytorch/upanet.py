"""Reference UPANets in PyTorch, which compute what the authors' code does."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Layer norm of each example as a whole, without parameters."""
    return F.layer_norm(x, x.shape[1:])


def double(inputs: int, outputs: int) -> nn.Module:
    layers = []
    for start, end in ((inputs, 2 * outputs), (2 * outputs, outputs)):
        conv = nn.Conv2d(start, end, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(end), nn.ReLU()]
    return nn.Sequential(*layers)


class ChannelMap(nn.Module):
    """A linear map over the channels of each pixel, then batch norm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.linear(x.movedim(1, -1)).movedim(-1, 1))


class Block(nn.Module):
    """Two convolutions and channel-pixel attention, both of the block's input.

    The first block of a stage (`first`) adds a second map of its input after the
    layer norm and may halve the size. The other blocks are dense: they append their
    output to their input.
    """

    def __init__(self, inputs: int, outputs: int, first: bool, halve: bool = False):
        super().__init__()
        self.convs = double(inputs, outputs)
        self.attention = ChannelMap(inputs, outputs)
        self.shortcut = ChannelMap(inputs, outputs) if first else None
        self.halve = halve

    def forward(self, x):
        y = normalize(self.convs(x) + self.attention(x))
        if self.shortcut is None:
            return torch.cat([x, y], 1)
        y = y + self.shortcut(x)
        return F.avg_pool2d(y, 2) if self.halve else y


class UPANet(nn.Module):
    """The networks with block=1: each stage has a first block and four dense ones."""

    def __init__(self, filters: int, num_classes: int = 10, size: int = 32):
        super().__init__()
        self.stem = Block(3, filters, first=True)
        self.stages = nn.ModuleList()
        inputs = filters
        for i in range(4):
            width = filters * 2**i
            blocks = [Block(inputs, width, first=True, halve=i > 0)]
            inputs = width
            for _ in range(4):
                blocks.append(Block(inputs, width // 4, first=False))
                inputs += width // 4
            self.stages.append(nn.Sequential(*blocks))
        # The stem and the first stage keep the image's size.
        sides = (size, size, size // 2, size // 4, size // 8)
        self.pixels = nn.ModuleList(nn.Linear(side**2, 1) for side in sides)
        self.norm = nn.BatchNorm1d(31 * filters)
        self.head = nn.Linear(31 * filters, num_classes)

    def forward(self, x):
        x = self.stem(x)
        outputs = [x]
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        vectors = []
        for y, pixels in zip(outputs, self.pixels, strict=True):
            flat = y.flatten(2)
            vectors.append(normalize(flat.mean(2) + pixels(flat).squeeze(2)))
        # The deepest one comes first.
        return self.head(self.norm(torch.cat(vectors[::-1], 1)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f"upanet{filters}": partial(UPANet, filters) for filters in (16, 32, 64)
}
