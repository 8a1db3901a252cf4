"""Vision transformers: ViT and DeiT.

Attributes are named as in timm, so that its weights fit by name.
"""

import functools
import re
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models._convolution import conv_general_dilated
from models._entry import PRECISION, Entry, classifier
from models._layers import ImageShapeError, LayerNorm, Layers, apply, check_images
from models._network import Images, Logits, Network

DOSOVITSKIY_2020 = "Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929"
TOUVRON_2020 = "Touvron et al., 2020, https://arxiv.org/abs/2012.12877"

_truncated = nnx.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


_TORCHVISION_NAMES = (
    (r"^cls_token", "class_token"),
    (r"^pos_embed", "encoder.pos_embedding"),
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.encoder_layer_\1.ln_"),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
)


def _torchvision_name(name: str) -> str:
    for pattern, replacement in _TORCHVISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")


def _torchvision_2021_name(name: str) -> str:
    name = _torchvision_name(name)
    return re.sub(r"\.mlp\.([03])\.", _numbered_from_one, name)


def _numbered_from_one(match: re.Match[str]) -> str:
    return f".mlp.linear_{1 + int(match[1]) // 3}."


class MLP(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, *, kernel_init: nnx.Initializer, layers: Layers):
        self.fc1 = layers.linear(width, 4 * width, kernel_init=kernel_init)
        self.fc2 = layers.linear(4 * width, width, kernel_init=kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., width) to the same shape."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class TransformerBlock(nnx.Module):
    """Attention and an MLP, each a residual branch after a normalization.

    Args:
      width: channels of a token.
      heads: number of heads of the attention.
      drop_rate: probability with which training skips a residual branch of an example
        (stochastic depth).
      kernel_init: initializer of all matrices.
      layers: creates the layers.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        drop_rate: float,
        *,
        kernel_init: nnx.Initializer,
        layers: Layers,
    ):
        self.norm1 = _norm(width, layers)
        self.attn = nnx.MultiHeadAttention(
            heads,
            width,
            decode=False,
            keep_rngs=False,
            kernel_init=kernel_init,
            dtype=layers.dtype,
            param_dtype=layers.param_dtype,
            rngs=layers.rngs,
        )
        self.norm2 = _norm(width, layers)
        self.mlp = MLP(width, kernel_init=kernel_init, layers=layers)
        self.drop_path = nnx.Dropout(drop_rate, broadcast_dims=(1, 2), rngs=layers.rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (batch, count, width) to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _norm(width: int, layers: Layers) -> LayerNorm:
    return LayerNorm(
        width, epsilon=1e-6, param_dtype=layers.param_dtype, rngs=layers.rngs
    )


class PatchEmbedding(nnx.Module):
    """A linear map of every patch to a token."""

    def __init__(self, channels: int, width: int, patch_size: int, *, layers: Layers):
        self.proj = nnx.Conv(
            channels,
            width,
            (patch_size, patch_size),
            strides=patch_size,
            padding=0,
            conv_general_dilated=conv_general_dilated,
            kernel_init=nnx.initializers.lecun_normal(),
            dtype=layers.dtype,
            param_dtype=layers.param_dtype,
            rngs=layers.rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to tokens (batch, patches, width)."""
        x = self.proj(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class VisionTransformer(Network):
    """A transformer over the patches of an image.

    Args:
      width: channels of a token.
      heads: number of heads of each attention.
      depth: number of blocks.
      num_classes: number of logits.
      layers: creates the layers.
      in_channels: channels of the input images.
      image_size: height and width of the images, a multiple of patch_size. Every patch
        has its own position embedding.
      patch_size: height and width of a patch.
      stochastic_depth: probability with which training skips a residual branch of the
        last block. It rises linearly from 0 in the first block. DeiT trains with 0.1.
      distilled: whether the network has a distillation token beside the class token,
        with its own head. Logits are the mean of both heads.
      init: "xavier" as in ViT, with a head of zeros, or "truncated" for a truncated
        normal of standard deviation 0.02 as in DeiT.
      remat: whether gradients recompute the activations inside a block.

    Raises:
      ImageShapeError: if patch_size does not divide image_size.

    References:
      - A. Dosovitskiy et al., `An Image is Worth 16x16 Words
        <https://arxiv.org/abs/2010.11929>`_, 2020
      - H. Touvron et al., `Training data-efficient image transformers & distillation
        through attention <https://arxiv.org/abs/2012.12877>`_, 2020
    """

    # The file in which torchvision publishes its weights has yet other names.
    other_names = MappingProxyType(
        {
            "torchvision": _torchvision_name,
            "torchvision, 2021": _torchvision_2021_name,
        }
    )

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        *,
        num_classes: int,
        layers: Layers,
        in_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        stochastic_depth: float = 0.0,
        distilled: bool = False,
        init: Literal["xavier", "truncated"] = "xavier",
        remat: bool = False,
    ):
        if image_size < patch_size or image_size % patch_size:
            raise ImageShapeError(
                f"image_size must be a multiple of patch_size, {patch_size}; got "
                f"{image_size}"
            )
        patches = (image_size // patch_size) ** 2
        num_special = 2 if distilled else 1
        key, dtype = layers.rngs.params, layers.param_dtype
        self.patch_embed = PatchEmbedding(in_channels, width, patch_size, layers=layers)
        self.cls_token = nnx.Param(_truncated(key(), (1, 1, width), dtype))
        self.dist_token: nnx.Param[jax.Array] | None = nnx.data(None)
        if distilled:
            self.dist_token = nnx.Param(_truncated(key(), (1, 1, width), dtype))
        shape = (1, num_special + patches, width)
        self.pos_embed = nnx.Param(_truncated(key(), shape, dtype))
        xavier = nnx.initializers.xavier_uniform()
        kernel_init = xavier if init == "xavier" else _truncated
        self.blocks = nnx.List(
            [
                TransformerBlock(
                    width,
                    heads,
                    stochastic_depth * i / max(1, depth - 1),
                    kernel_init=kernel_init,
                    layers=layers,
                )
                for i in range(depth)
            ]
        )
        self.norm = _norm(width, layers)
        head_init = nnx.initializers.zeros if init == "xavier" else _truncated
        self.head = layers.head(width, num_classes, kernel_init=head_init)
        self.head_paths = ("head", "head_dist") if distilled else ("head",)
        self.head_dist: nnx.Linear | None = nnx.data(None)
        if distilled:
            self.head_dist = layers.head(width, num_classes, kernel_init=head_init)
        self.in_channels = in_channels
        self.image_size = image_size
        self.remat = remat

    def __call__(self, images: Images) -> Logits:
        """Maps float images (batch, image_size, image_size, channels) to logits."""
        check_images(images, self.in_channels, exactly=self.image_size)
        x = self.patch_embed(images)
        tokens = [self.cls_token, self.dist_token]
        special = [
            jnp.broadcast_to(t[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
            for t in tokens
            if t is not None
        ]
        x = jnp.concatenate((*special, x), axis=1)
        x = x + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = apply(block, x, remat=self.remat)
        x = self.norm(x)
        logits = self.head(x[:, 0])
        if self.head_dist is None:
            return logits
        return (logits + self.head_dist(x[:, 1])) / 2


def _entry(
    name: str,
    description: str,
    num_parameters: int,
    width: int,
    heads: int,
    paper: str = TOUVRON_2020,
    *,
    init: Literal["xavier", "truncated"] = "truncated",
    distilled: bool = False,
) -> Entry:
    return classifier(
        name,
        description,
        paper,
        num_parameters,
        functools.partial(
            VisionTransformer, width, heads, 12, init=init, distilled=distilled
        ),
        options=(
            "num_classes",
            "in_channels",
            "image_size",
            "patch_size",
            "stochastic_depth",
            "remat",
            *PRECISION,
        ),
        small_images=False,
    )


ENTRIES = (
    _entry("deit_ti_16", "DeiT-Ti/16, the smallest DeiT", 5_717_416, 192, 3),
    _entry("deit_b_16", "DeiT-B/16", 86_567_656, 768, 12),
    _entry(
        "deit_b_16_distilled",
        "DeiT-B/16 with a distillation token",
        87_338_192,
        768,
        12,
        distilled=True,
    ),
    _entry(
        "vit_b_16", "ViT-B/16", 86_567_656, 768, 12, DOSOVITSKIY_2020, init="xavier"
    ),
)
