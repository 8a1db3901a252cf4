"""Weights in safetensors files, named and laid out as in torchvision and timm.

A name in a file is the path of a module and PyTorch's name of its array. Networks
name their modules as torchvision or timm does, so that the path needs no translation;
where the two differ, the network's `OTHER_NAMES` has functions from its names to the
others, and `OTHER_SHAPES` the shapes that are others there.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from models._layers import FrozenBatchNorm, UpConv

Naming = Literal["torchvision", "timm"]

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
# PyTorch's counter of batches, which nothing reads.
_UNUSED = "num_batches_tracked"
# Others are quantized: numbers without the scale that they are to be read with.
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """One array of a file.

    Attributes:
      variables: the model's variables that it is made of.
      to_torch: (values of the variables) -> the array as in PyTorch.
      from_torch: the inverse.
    """

    variables: tuple[nnx.Variable, ...]
    to_torch: Callable[..., jax.Array]
    from_torch: Callable[[jax.Array], tuple[jax.Array, ...]]

    @property
    def values(self) -> tuple[jax.Array, ...]:
        return tuple(variable.get_value() for variable in self.variables)

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.to_torch, *self.values).shape


def _as_it_is(variable: nnx.Variable) -> _Slot:
    return _Slot((variable,), lambda x: x, lambda x: (x,))


def _conv(kernel: nnx.Variable) -> _Slot:
    # (height, width, in, out) here, (out, in, height, width) there.
    return _Slot(
        (kernel,),
        lambda k: k.transpose(3, 2, 0, 1),
        lambda w: (w.transpose(2, 3, 1, 0),),
    )


def _conv_transpose(kernel: nnx.Variable) -> _Slot:
    # PyTorch's is the gradient of a convolution: mirrored, and (in, out, ...).
    return _Slot(
        (kernel,),
        lambda k: k[::-1, ::-1].transpose(2, 3, 0, 1),
        lambda w: (w.transpose(2, 3, 0, 1)[::-1, ::-1],),
    )


def _linear(kernel: nnx.Variable) -> _Slot:
    return _Slot((kernel,), lambda k: k.T, lambda w: (w.T,))


def _attention(module: nnx.MultiHeadAttention) -> dict[str, _Slot]:
    """Query, key and value in one matrix, one above the other, heads side by side."""
    parts = (module.query, module.key, module.value)
    heads, width, outputs = module.num_heads, module.in_features, module.out_features

    def fuse(*kernels: jax.Array) -> jax.Array:
        return jnp.concatenate([k.reshape(width, -1).T for k in kernels])

    def split(weight: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(w.T.reshape(width, heads, -1) for w in jnp.split(weight, 3))

    return {
        "qkv.weight": _Slot(tuple(part.kernel for part in parts), fuse, split),
        "qkv.bias": _Slot(
            tuple(part.bias for part in parts),
            lambda *biases: jnp.concatenate([b.reshape(-1) for b in biases]),
            lambda bias: tuple(b.reshape(heads, -1) for b in jnp.split(bias, 3)),
        ),
        "proj.weight": _Slot(
            (module.out.kernel,),
            lambda k: k.reshape(-1, outputs).T,
            lambda w: (w.T.reshape(heads, -1, outputs),),
        ),
        "proj.bias": _as_it_is(module.out.bias),
    }


_KERNELS = {
    nnx.Conv: _conv,
    UpConv: _conv_transpose,
    nnx.Linear: _linear,
}
_NORMS = (
    nnx.BatchNorm,
    FrozenBatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
)
_NORM_NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _slots_of(module: nnx.Module) -> dict[str, _Slot]:
    """The arrays of a module itself, by PyTorch's names."""
    if isinstance(module, nnx.MultiHeadAttention):
        return _attention(module)
    if isinstance(module, tuple(_KERNELS)):
        slots = {"weight": _KERNELS[type(module)](module.kernel)}
        if module.bias is not None:
            slots["bias"] = _as_it_is(module.bias)
        return slots
    variables = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param | nnx.BatchStat)
    }
    if isinstance(module, _NORMS):
        variables = {_NORM_NAMES[name]: value for name, value in variables.items()}
    return {name: _as_it_is(variable) for name, variable in variables.items()}


def _slots(model: nnx.Module) -> dict[str, _Slot]:
    """All arrays of a model, by the names of its own modules."""
    return {
        ".".join(map(str, (*path, name))): slot
        for path, module in nnx.iter_modules(model)
        # An attention's own linear maps are in its fused arrays.
        if not isinstance(module, nnx.LinearGeneral)
        for name, slot in _slots_of(module).items()
    }


def _renamed(model: nnx.Module, naming: str | None, names: Iterable[str]) -> dict:
    """Names in a file by the model's own, in the order given."""
    rename = getattr(model, "OTHER_NAMES", {}).get(naming, lambda name: name)
    return {name: rename(name) for name in names}


def _naming_of(model: nnx.Module, names: Iterable[str], found: set[str]) -> str | None:
    """The naming of a model under which it shares most names with a file."""
    namings = (None, *getattr(model, "OTHER_NAMES", {}))

    def shared(naming: str | None) -> int:
        return len(found & set(_renamed(model, naming, names).values()))

    return max(namings, key=shared)


def layout(model: nnx.Module, naming: str | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in a file, also for a model without values."""
    slots = _slots(model)
    others = getattr(model, "OTHER_SHAPES", {})
    return {
        in_file: others.get(in_file, slots[name].shape)
        for name, in_file in _renamed(model, naming, slots).items()
    }


def save_weights(
    model: nnx.Module, path: str | os.PathLike[str], *, naming: Naming | None = None
) -> None:
    """Writes parameters and running statistics to a safetensors file.

    Arrays have PyTorch's layout and the names of torchvision, or of timm for vision
    transformers. The file is complete or not there at all.

    >>> import models, tempfile
    >>> from flax import nnx
    >>> path = tempfile.mkdtemp() + "/resnet20.safetensors"
    >>> model = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(0))
    >>> models.save_weights(model, path)
    >>> other = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(1))
    >>> models.load_weights(other, path)
    >>> bool((other.fc.kernel[...] == model.fc.kernel[...]).all())
    True

    Args:
      model: any network of `models.create`.
      path: of the file.
      naming: whose names to use for networks that have different ones in torchvision
        and timm: VGG, MobileNetV2 and ViT in their ImageNet form.

    Raises:
      ValueError: if there is no such naming.
      FileNotFoundError: if there is no such folder.
    """
    if naming not in (None, *get_args(Naming)):
        known = ", ".join(get_args(Naming))
        raise ValueError(f"naming must be one of {known}; got {naming!r}")
    slots, shapes = _slots(model), layout(model, naming)
    arrays = {}
    for name, in_file in _renamed(model, naming, slots).items():
        # On the host, where a new shape needs no compiling.
        array = slots[name].to_torch(*jax.device_get(slots[name].values))
        arrays[in_file] = array.reshape(shapes[in_file]).copy()
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(save(arrays))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(
    model: nnx.Module, path: str | os.PathLike[str], *, new_head: bool = False
) -> None:
    """Reads parameters and running statistics from a safetensors file into a model.

    Files of torchvision and timm fit ResNet, ResNeXt, DenseNet, VGG, MobileNetV2, ViT
    and DeiT, whichever names they use; those of `save_weights` fit any network. A
    backbone, such as `pspnet.backbone`, is a model too. Values take the dtype of the
    model's variables. Either all are read or, after an error, none.

    Args:
      model: the network to change.
      path: of the file.
      new_head: leave the last layer as it is and the file's unread, for another number
        of classes or a backbone that has none.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is no safetensors file, or does not fit the model. All
        missing, unexpected, wrongly shaped and quantized arrays are listed.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise ValueError(_pickle_message(path))
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    with file:
        slots = _slots(model)
        found = {name for name in file.keys() if not name.endswith(_UNUSED)}  # noqa: SIM118
        naming = _naming_of(model, slots, found)
        in_file, shapes = _renamed(model, naming, slots), layout(model, naming)
        head = tuple(f"{layer}." for layer in getattr(model, "HEAD", ()))
        unexpected = found - set(in_file.values())
        in_head = {name for name in unexpected if name.startswith(head)}
        in_head |= {in_file[name] for name in in_file if name.startswith(head)}
        if new_head:
            unexpected -= in_head
            in_file = {k: v for k, v in in_file.items() if v not in in_head}
        problems = {}
        for theirs in in_file.values():
            if theirs not in found:
                problems[theirs] = f"missing: {theirs}"
                continue
            array = file.get_slice(theirs)
            shape, dtype = tuple(array.get_shape()), array.get_dtype()
            if shape != shapes[theirs]:
                problems[theirs] = (
                    f"{theirs} is {shape}, but {shapes[theirs]} in the model"
                )
            elif dtype not in _DTYPES:
                problems[theirs] = f"{theirs} is of {dtype}, not a floating-point type"
        problems |= {name: f"unexpected: {name}" for name in sorted(unexpected)}
        if problems:
            message = [f"{path} does not fit this {type(model).__name__}:"]
            message += problems.values()
            if in_head & problems.keys():
                message.append(
                    "if only the last layer differs: new_head=True leaves it as it is"
                )
            raise ValueError("\n  ".join(message))
        for name, theirs in in_file.items():
            slot = slots[name]
            values = slot.from_torch(file.get_tensor(theirs).reshape(slot.shape))
            for variable, value in zip(slot.variables, values, strict=True):
                variable[...] = jnp.asarray(value, variable.dtype)


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle file, which can run code when it is opened; only "
        "safetensors files are read. Convert it once, where PyTorch and safetensors "
        "are installed:\n"
        "  import torch, safetensors.torch\n"
        f"  weights = torch.load({str(path)!r}, map_location='cpu', "
        "weights_only=True)\n"
        "  weights = weights.get('model', weights)  # DeiT's are one level down\n"
        "  weights = {name: w.contiguous() for name, w in weights.items()}\n"
        f"  safetensors.torch.save_file(weights, "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
