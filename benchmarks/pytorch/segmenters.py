"""Reference segmentation networks in PyTorch, written from their papers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Dilations of layer3 and layer4, repeated over the blocks of the layer.
DILATED = ((2,), (4,))
HYBRID = ((1, 2, 5, 9), (5, 9, 17))


def conv_norm_relu(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def resize(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, dilation: int):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # Padding equal to the dilation keeps the size.
        self.conv2 = nn.Conv2d(
            width,
            width,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            bias=False,
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    """ResNet without its classifier, at an eighth of the input's size."""

    def __init__(self, depth: int, dilations: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        plan = zip(BLOCKS[depth], (1, 2, 1, 1), ((1,), (1,), *dilations), strict=True)
        for i, (blocks, stride, cycle) in enumerate(plan):
            width = 64 * 2**i
            layer = []
            for j in range(blocks):
                dilation = cycle[j % len(cycle)]
                layer.append(
                    Bottleneck(inputs, width, stride if j == 0 else 1, dilation)
                )
                inputs = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)


class PSPNet(nn.Module):
    """Zhao et al. 2017, "Pyramid Scene Parsing Network"."""

    bins = (1, 2, 3, 6)

    def __init__(self, depth: int, num_classes: int = 21):
        super().__init__()
        self.backbone = Backbone(depth, DILATED)
        self.pyramid = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(2048, 512, 1)) for _ in self.bins
        )
        self.head = nn.Sequential(
            *conv_norm_relu(4096, 512, 3),
            nn.Dropout(0.1),
            nn.Conv2d(512, num_classes, 1),
        )
        self.aux_head = nn.Sequential(
            *conv_norm_relu(1024, 256, 3),
            nn.Dropout(0.1),
            nn.Conv2d(256, num_classes, 1),
        )

    def forward(self, image):
        size = image.shape[2:]
        middle, x = self.backbone(image)
        pooled = [
            resize(level(F.adaptive_avg_pool2d(x, bins)), x.shape[2:])
            for bins, level in zip(self.bins, self.pyramid, strict=True)
        ]
        logits = resize(self.head(torch.cat([x, *pooled], 1)), size)
        if not self.training:
            return logits
        return logits, resize(self.aux_head(middle), size)


class DUCHDC(nn.Module):
    """Wang et al. 2017, "Understanding Convolution for Semantic Segmentation".

    The authors' code has no norm and no ReLU between the last convolution and
    the shuffle; `norm_act=False` builds that, with a bias in the convolution.
    """

    def __init__(self, depth: int, num_classes: int = 21, norm_act: bool = True):
        super().__init__()
        self.backbone = Backbone(depth, HYBRID)
        channels = 64 * num_classes
        if norm_act:
            layers = conv_norm_relu(2048, channels, 3)
        else:
            layers = [nn.Conv2d(2048, channels, 3, padding=1)]
        self.duc = nn.Sequential(*layers, nn.PixelShuffle(8))

    def forward(self, image):
        return self.duc(self.backbone(image)[1])


class UNet(nn.Module):
    """Ronneberger et al. 2015 with padding, batch norm and fewer channels."""

    widths = (16, 32, 64, 128)

    def __init__(self, num_classes: int = 11):
        super().__init__()
        inputs = (3, *self.widths[:-1])
        self.down = nn.ModuleList(map(self.double, inputs, self.widths))
        # From the deepest level up: 128 to 64, 64 to 32, 32 to 16.
        steps = list(zip(self.widths[:0:-1], self.widths[-2::-1], strict=True))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in steps
        )
        self.merge = nn.ModuleList(self.double(*step) for step in steps)
        self.head = nn.Conv2d(self.widths[0], num_classes, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            *conv_norm_relu(inputs, outputs, 3), *conv_norm_relu(outputs, outputs, 3)
        )

    def forward(self, x):
        skips = []
        for level in self.down:
            x = level(x if not skips else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "pspnet50": partial(PSPNet, 50),
    "pspnet101": partial(PSPNet, 101),
    "resnet50_duc_hdc": partial(DUCHDC, 50),
    "resnet101_duc_hdc": partial(DUCHDC, 101),
    "unet_small": UNet,
}
