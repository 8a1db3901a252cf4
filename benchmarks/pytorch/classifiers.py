"""PyTorch reference networks, written from the papers and independent of JAX."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, size, stride=1, groups=1, bias=False):
    """Return a convolution padded so that stride 1 keeps the size."""
    return nn.Conv2d(
        inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias
    )


def global_average(x):
    return x.mean(dim=(2, 3))


# ---------------------------------------------------------------------------
# ResNet (He et al. 2015) and ResNeXt (Xie et al. 2016): normalization after the
# convolution, and the last ReLU after the addition.
# ---------------------------------------------------------------------------


def projection(inputs, outputs, stride):
    """Option B: a 1x1 convolution and a norm, only where the shape changes."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        # Half of the zeros before the channels and half after them.
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


def pad_shortcut(inputs, outputs, stride):
    if stride == 1 and inputs == outputs:
        return None
    return PadShortcut(inputs, outputs, stride)


class BasicBlock(nn.Module):
    def __init__(self, inputs, base, stride, shortcut=projection):
        super().__init__()
        self.outputs = base
        self.conv1 = conv(inputs, base, 3, stride)
        self.bn1 = nn.BatchNorm2d(base)
        self.conv2 = conv(base, base, 3)
        self.bn2 = nn.BatchNorm2d(base)
        self.downsample = shortcut(inputs, base, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """The middle convolution has `cardinality` groups of `base * group_ratio`."""

    def __init__(
        self, inputs, base, stride, cardinality=1, group_ratio=1.0, expansion=4
    ):
        super().__init__()
        width = int(base * group_ratio) * cardinality
        self.outputs = base * expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        # The stride is in the 3x3 convolution ("v1.5"), not in the first 1x1 one.
        self.conv2 = conv(width, width, 3, stride, groups=cardinality)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, self.outputs, 1)
        self.bn3 = nn.BatchNorm2d(self.outputs)
        self.downsample = projection(inputs, self.outputs, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... that double the width, and `fc`."""

    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: Sequence[int],
        *,
        base: int = 64,
        stem: int = 64,
        stem_size: int = 7,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.imagenet = stem_size == 7
        self.conv1 = conv(3, stem, stem_size, stride=2 if self.imagenet else 1)
        self.bn1 = nn.BatchNorm2d(stem)
        channels = stem
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, base * 2**i, stride))
                channels = blocks[-1].outputs
            setattr(self, self.stages[i], nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(global_average(x))


def resnext(cardinality, group_width):
    """Return the block whose groups are `group_width` wide in a 64 channel stage."""
    return partial(Bottleneck, cardinality=cardinality, group_ratio=group_width / 64)


def cifar_resnet(block, depths, num_classes=10):
    return ResNet(block, depths, stem_size=3, num_classes=num_classes)


def small_resnet(depth, num_classes=10):
    """Section 4.2 of He et al. 2015: 6n + 2 layers of 16, 32 and 64 channels."""
    return ResNet(
        partial(BasicBlock, shortcut=pad_shortcut),
        [(depth - 2) // 6] * 3,
        base=16,
        stem=16,
        stem_size=3,
        num_classes=num_classes,
    )


def resnext29(cardinality, num_classes=10):
    """Three stages of three blocks whose output is twice the grouped width."""
    # The published size is reached with a 1x1 stem.
    block = partial(Bottleneck, cardinality=cardinality, expansion=2 * cardinality)
    return ResNet(block, [3, 3, 3], stem_size=1, num_classes=num_classes)


# ---------------------------------------------------------------------------
# Pre-activation ResNet (He et al. 2016), Wide ResNet (Zagoruyko & Komodakis 2016).
# ---------------------------------------------------------------------------


class PreActBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        changed = stride != 1 or inputs != width
        self.downsample = conv(inputs, width, 1, stride) if changed else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        # Only the projection starts from the pre-activated input.
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y)))
        return y + shortcut


class PreActResNet(nn.Module):
    def __init__(self, depths, widths, stem, num_classes=10):
        super().__init__()
        self.conv1 = conv(3, stem, 3)
        channels = stem
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(PreActBlock(channels, width, 2 if i and not j else 1))
                channels = width
            setattr(self, self.stages[i], nn.Sequential(*blocks))
        # The sum of the last block has not been normalized yet.
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(global_average(F.relu(self.bn1(x))))


# ---------------------------------------------------------------------------
# VGG (Simonyan & Zisserman 2014) with batch normalization.
# ---------------------------------------------------------------------------

# Convolutions of each of the five stages; a 2x2 max pooling ends every stage.
VGG_DEPTHS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


def vgg_features(depth):
    layers, channels = [], 3
    for convs, width in zip(VGG_DEPTHS[depth], (64, 128, 256, 512, 512), strict=True):
        for _ in range(convs):
            layers += [conv(channels, width, 3, bias=True)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers)


class VGG(nn.Module):
    def __init__(self, depth, num_classes=1000):
        super().__init__()
        self.features = vgg_features(depth)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x):
        # Images of other sizes than 224 are averaged or repeated to 7x7.
        x = F.adaptive_avg_pool2d(self.features(x), 7)
        return self.classifier(x.flatten(1))


class CifarVGG(nn.Module):
    def __init__(self, depth, num_classes=10):
        super().__init__()
        self.features = vgg_features(depth)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x):
        return self.classifier(global_average(self.features(x)))


# ---------------------------------------------------------------------------
# DenseNet-BC (Huang et al. 2016): growth 32, bottlenecks of 4 * 32 channels, and
# transitions that halve the channels.
# ---------------------------------------------------------------------------


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth, 3)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], dim=1)  # New channels come last.


class Transition(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = conv(inputs, outputs, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, depths, growth=32, imagenet=True, num_classes=1000):
        super().__init__()
        channels = 2 * growth
        self.features = nn.Sequential()
        if imagenet:
            self.features.add_module("conv0", conv(3, channels, 7, 2))
            self.features.add_module("norm0", nn.BatchNorm2d(channels))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        else:
            # Every dense layer begins with a norm, so the stem needs none.
            self.features.add_module("conv0", conv(3, channels, 3))
        for i, depth in enumerate(depths, start=1):
            block = nn.Sequential()
            for j in range(1, depth + 1):
                block.add_module(f"denselayer{j}", DenseLayer(channels, growth))
                channels += growth
            self.features.add_module(f"denseblock{i}", block)
            if i < len(depths):
                transition = Transition(channels, channels // 2)
                self.features.add_module(f"transition{i}", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x):
        return self.classifier(global_average(F.relu(self.features(x))))


# ---------------------------------------------------------------------------
# MobileNetV2 (Sandler et al. 2018).
# ---------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expand, activation, project):
        super().__init__()
        hidden = inputs * expand
        layers = []
        # The CIFAR form has the 1x1 expansion even where it expands by one.
        if expand != 1 or project:
            layers += [conv_norm(inputs, hidden, 1, activation=activation)]
        layers += [conv_norm(hidden, hidden, 3, stride, hidden, activation)]
        # The last convolution is linear: no activation follows its norm.
        layers += [conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and (inputs == outputs or project)
        if self.residual and inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, outputs, 1), nn.BatchNorm2d(outputs)
            )
        else:
            self.shortcut = nn.Identity()

    def forward(self, x):
        y = self.conv(x)
        return y + self.shortcut(x) if self.residual else y


def conv_norm(inputs, outputs, size, stride=1, groups=1, activation=nn.ReLU6):
    return nn.Sequential(
        conv(inputs, outputs, size, stride, groups),
        nn.BatchNorm2d(outputs),
        activation(),
    )


class MobileNetV2(nn.Module):
    def __init__(self, cifar=False, num_classes=1000):
        super().__init__()
        activation = nn.ReLU if cifar else nn.ReLU6
        strides = (1, 1, 2, 2, 1, 2, 1) if cifar else (1, 2, 2, 2, 1, 2, 1)
        layers = [conv_norm(3, 32, 3, 1 if cifar else 2, activation=activation)]
        channels = 32
        # Expansion, channels and blocks of the seven stages: table 2 of the paper.
        for (expand, width, blocks), stride in zip(
            [
                (1, 16, 1),
                (6, 24, 2),
                (6, 32, 3),
                (6, 64, 4),
                (6, 96, 3),
                (6, 160, 3),
                (6, 320, 1),
            ],
            strides,
            strict=True,
        ):
            for j in range(blocks):
                layers.append(
                    InvertedResidual(
                        channels,
                        width,
                        1 if j else stride,
                        expand,
                        activation,
                        project=cifar,
                    )
                )
                channels = width
        layers.append(conv_norm(channels, 1280, 1, activation=activation))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.0 if cifar else 0.2), nn.Linear(1280, num_classes)
        )

    def forward(self, x):
        return self.classifier(global_average(self.features(x)))


# ---------------------------------------------------------------------------
# ViT (Dosovitskiy et al. 2020) and DeiT (Touvron et al. 2020): pre-norm encoders
# with the class token first, learned positions on every token, a last norm and a
# linear head on the class token.
# ---------------------------------------------------------------------------


def token(count, width):
    return nn.Parameter(0.02 * torch.randn(1, count, width))


def patches(projected):
    """Turn (batch, width, rows, columns) into (batch, rows * columns, width)."""
    return projected.flatten(2).transpose(1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        # The positions of the dropouts, of rate zero, are part of the key names.
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(4 * width, width),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, tokens, width, depth, heads):
        super().__init__()
        self.pos_embedding = token(tokens, width)
        self.layers = nn.Sequential()
        for i in range(depth):
            self.layers.add_module(f"encoder_layer_{i}", EncoderLayer(width, heads))
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.ln(self.layers(x + self.pos_embedding))


class ViT(nn.Module):
    """A vision transformer with torchvision's names."""

    def __init__(
        self,
        width=768,
        depth=12,
        heads=12,
        *,
        num_classes=1000,
        image_size=224,
        patch_size=16,
    ):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.class_token = token(1, width)
        tokens = (image_size // patch_size) ** 2 + 1
        self.encoder = Encoder(tokens, width, depth, heads)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(width, num_classes))

    def forward(self, x):
        x = patches(self.conv_proj(x))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.heads(self.encoder(x)[:, 0])


class Attention(nn.Module):
    """Multi-head self-attention written out, unlike that of `EncoderLayer`."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        # The outputs of `qkv` are ordered (query, key, value) x heads x channels.
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.unbind(dim=2)
        logits = torch.einsum("bqhc,bkhc->bhqk", query, key) * query.shape[-1] ** -0.5
        y = torch.einsum("bhqk,bkhc->bqhc", logits.softmax(dim=-1), value)
        return self.proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x):
        return patches(self.proj(x))


class DeiT(nn.Module):
    """A vision transformer with timm's names, with or without distillation."""

    def __init__(
        self,
        width=768,
        depth=12,
        heads=12,
        *,
        distilled=False,
        num_classes=1000,
        image_size=224,
        patch_size=16,
    ):
        super().__init__()
        self.distilled = distilled
        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = token(1, width)
        extra = 1
        if distilled:
            self.dist_token = token(1, width)
            extra = 2
        self.pos_embed = token((image_size // patch_size) ** 2 + extra, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        if distilled:
            self.head_dist = nn.Linear(width, num_classes)

    def tokens(self, x):
        """Return the normalized tokens: class, distillation, then patches."""
        x = self.patch_embed(x)
        first = [self.cls_token] + ([self.dist_token] if self.distilled else [])
        first = [extra.expand(len(x), -1, -1) for extra in first]
        x = torch.cat([*first, x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))

    def both_heads(self, x):
        """Return the logits of the class and of the distillation token."""
        x = self.tokens(x)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def forward(self, x):
        if self.distilled:
            return sum(self.both_heads(x)) / 2
        return self.head(self.tokens(x)[:, 0])


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnext50_32x4d": partial(ResNet, resnext(32, 4), (3, 4, 6, 3)),
    "resnext101_32x4d": partial(ResNet, resnext(32, 4), (3, 4, 23, 3)),
    "resnet18_cifar": partial(cifar_resnet, BasicBlock, (2, 2, 2, 2)),
    "resnet34_cifar": partial(cifar_resnet, BasicBlock, (3, 4, 6, 3)),
    "resnet50_cifar": partial(cifar_resnet, Bottleneck, (3, 4, 6, 3)),
    "resnet101_cifar": partial(cifar_resnet, Bottleneck, (3, 4, 23, 3)),
    "resnet8": partial(small_resnet, 8),
    "resnet20": partial(small_resnet, 20),
    "resnet32": partial(small_resnet, 32),
    "resnet44": partial(small_resnet, 44),
    "resnet56": partial(small_resnet, 56),
    "resnet110": partial(small_resnet, 110),
    "preact_resnet18": partial(PreActResNet, (2, 2, 2, 2), (64, 128, 256, 512), 64),
    "wide_resnet28_10": partial(PreActResNet, (4, 4, 4), (160, 320, 640), 16),
    "resnext29_2x64d": partial(resnext29, 2),
    "resnext29_4x64d": partial(resnext29, 4),
    "vgg11_bn": partial(VGG, 11),
    "vgg16_bn": partial(VGG, 16),
    "vgg11_bn_cifar": partial(CifarVGG, 11),
    "vgg16_bn_cifar": partial(CifarVGG, 16),
    "densenet121": partial(DenseNet, (6, 12, 24, 16)),
    "densenet121_cifar": partial(
        DenseNet, (6, 12, 24, 16), imagenet=False, num_classes=10
    ),
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_cifar": partial(MobileNetV2, cifar=True, num_classes=10),
    "vit_b_16": ViT,
    "deit_b_16": DeiT,
    "deit_b_16_distilled": partial(DeiT, distilled=True),
    "deit_ti_16": partial(DeiT, width=192, heads=3),
}
