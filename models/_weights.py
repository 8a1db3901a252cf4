"""Reads and writes weights in safetensors files, laid out as in torchvision and timm.

A name in a file is the path of a module and PyTorch's name of its array. Networks name
their modules as torchvision or timm does, so paths need no translation. Where these two
differ, `Network.other_names` and `Network.other_shapes` translate.
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
from models._network import Network

Naming = Literal["torchvision", "timm"]

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
# Names of PyTorch's counters of batches end in this. Nothing reads them.
_UNUSED = "num_batches_tracked"
# Arrays of other dtypes are quantized, and their scales are missing.
_DTYPES = ("F64", "F32", "F16", "BF16")

_Variable = nnx.Variable[jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """One array of a file.

    Attributes:
      variables: the variables of the model whose values the array holds.
      to_torch: a function from the values to the array as in PyTorch.
      from_torch: the inverse of `to_torch`.
    """

    variables: tuple[_Variable, ...]
    to_torch: Callable[..., jax.Array]
    from_torch: Callable[[jax.Array], tuple[jax.Array, ...]]

    @property
    def values(self) -> tuple[jax.Array, ...]:
        return tuple(variable.get_value() for variable in self.variables)

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = jax.eval_shape(self.to_torch, *self.values).shape
        return shape


def _unchanged(variable: _Variable) -> _Slot:
    return _Slot((variable,), lambda x: x, lambda x: (x,))


def _conv(kernel: _Variable) -> _Slot:
    # (height, width, in, out) in Flax, (out, in, height, width) in PyTorch.
    return _Slot(
        (kernel,),
        lambda k: k.transpose(3, 2, 0, 1),
        lambda w: (w.transpose(2, 3, 1, 0),),
    )


def _conv_transpose(kernel: _Variable) -> _Slot:
    # PyTorch computes the gradient of a convolution, so its kernel is mirrored and has
    # the shape (in, out, height, width).
    return _Slot(
        (kernel,),
        lambda k: k[::-1, ::-1].transpose(2, 3, 0, 1),
        lambda w: (w.transpose(2, 3, 0, 1)[::-1, ::-1],),
    )


def _linear(kernel: _Variable) -> _Slot:
    return _Slot((kernel,), lambda k: k.T, lambda w: (w.T,))


def _attention(module: nnx.MultiHeadAttention) -> dict[str, _Slot]:
    """Returns the arrays of an attention layer, by PyTorch's names.

    PyTorch stacks query, key and value in one matrix, with the heads side by side.
    """
    parts = (module.query, module.key, module.value)
    heads, width, outputs = module.num_heads, module.in_features, module.out_features

    def fuse(*kernels: jax.Array) -> jax.Array:
        return jnp.concatenate([k.reshape(width, -1).T for k in kernels])

    def split(weight: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(w.T.reshape(width, heads, -1) for w in jnp.split(weight, 3))

    return {
        "qkv.weight": _Slot(tuple(part.kernel for part in parts), fuse, split),
        "qkv.bias": _Slot(
            tuple(_bias(part) for part in parts),
            lambda *biases: jnp.concatenate([b.reshape(-1) for b in biases]),
            lambda bias: tuple(b.reshape(heads, -1) for b in jnp.split(bias, 3)),
        ),
        "proj.weight": _Slot(
            (module.out.kernel,),
            lambda k: k.reshape(-1, outputs).T,
            lambda w: (w.T.reshape(heads, -1, outputs),),
        ),
        "proj.bias": _unchanged(_bias(module.out)),
    }


def _bias(module: nnx.LinearGeneral) -> _Variable:
    if module.bias is None:
        raise ValueError("attention without biases has no layout in a weights file")
    return module.bias


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
    """Returns the arrays of a module, but not of its submodules.

    Keys are PyTorch's names.
    """
    if isinstance(module, nnx.MultiHeadAttention):
        return _attention(module)
    if isinstance(module, nnx.Conv | UpConv | nnx.Linear):
        slots = {"weight": _weight(module)}
        if module.bias is not None:
            slots["bias"] = _unchanged(module.bias)
        return slots
    variables = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param | nnx.BatchStat)
    }
    if isinstance(module, _NORMS):
        variables = {_NORM_NAMES[name]: value for name, value in variables.items()}
    return {name: _unchanged(variable) for name, variable in variables.items()}


def _weight(module: nnx.Conv | UpConv | nnx.Linear) -> _Slot:
    if isinstance(module, nnx.Conv):
        return _conv(module.kernel)
    if isinstance(module, UpConv):
        return _conv_transpose(module.kernel)
    return _linear(module.kernel)


def _slots(model: Network) -> dict[str, _Slot]:
    """Returns all arrays of a model, by the names of the modules in the model."""
    return {
        ".".join(map(str, (*path, name))): slot
        for path, module in nnx.iter_modules(model)
        # The arrays of an attention layer include its linear maps.
        if not isinstance(module, nnx.LinearGeneral)
        for name, slot in _slots_of(module).items()
    }


def _renamed(
    model: Network, naming: str | None, names: Iterable[str]
) -> dict[str, str]:
    """Returns the names in a file by the model's own names, in the order given."""
    rename = model.other_names.get(naming) if naming else None
    return {name: rename(name) if rename else name for name in names}


def _naming_of(model: Network, names: Iterable[str], found: set[str]) -> str | None:
    """Returns the naming under which a model shares most names with a file."""
    names = tuple(names)

    def num_shared(naming: str | None) -> int:
        return len(found & set(_renamed(model, naming, names).values()))

    return max((None, *model.other_names), key=num_shared)


def layout(model: Network, naming: str | None) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the arrays in a file.

    The model may be abstract (`nnx.eval_shape`).
    """
    slots = _slots(model)
    return {
        in_file: model.other_shapes.get(in_file, slots[name].shape)
        for name, in_file in _renamed(model, naming, slots).items()
    }


def save_weights(
    model: Network, path: str | os.PathLike[str], *, naming: Naming | None = None
) -> None:
    """Writes parameters and running statistics to a safetensors file.

    Arrays have PyTorch's layout and the names of torchvision, or those of timm for
    vision transformers. The file appears only when it is complete.

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
      model: a network. One of your own must subclass `Network`.
      path: path of the file. An existing file is replaced.
      naming: the library whose names to use, for networks whose names differ between
        torchvision and timm: VGG, MobileNetV2 and ViT in their ImageNet form.

    Raises:
      ValueError: if there is no such naming.
      FileNotFoundError: if the folder of the file does not exist.
    """
    if naming not in (None, *get_args(Naming)):
        known = ", ".join(get_args(Naming))
        raise ValueError(f"naming must be one of {known}; got {naming!r}")
    slots, shapes = _slots(model), layout(model, naming)
    arrays = {}
    for name, in_file in _renamed(model, naming, slots).items():
        # On the host, because there new shapes need no compilation.
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
    model: Network, path: str | os.PathLike[str], *, new_head: bool = False
) -> None:
    """Reads parameters and running statistics from a safetensors file into a model.

    Files of torchvision and timm fit ResNet, ResNeXt, DenseNet, VGG, MobileNetV2, ViT
    and DeiT, with the names of either library. Files of `save_weights` fit any network.
    A backbone, such as `pspnet.backbone`, is a network too. Values are cast to the
    dtype of the model's variables. After an error the model is unchanged.

    Args:
      model: the network to change. One of your own must subclass `Network`.
      path: path of the file.
      new_head: whether to skip the layers below `model.head_paths`. The model keeps its
        values, and values in the file are ignored. This is for another number of
        classes, or for a backbone, which has no head.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a safetensors file or does not fit the model. The
        message lists all missing, unexpected, wrongly shaped and quantized arrays.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise ValueError(_pickle_message(path))
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with file:
        slots = _slots(model)
        found = {name for name in file.keys() if not name.endswith(_UNUSED)}  # noqa: SIM118
        naming = _naming_of(model, slots, found)
        in_file, shapes = _renamed(model, naming, slots), layout(model, naming)
        head = tuple(f"{module}." for module in model.head_paths)
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
                    f"{theirs} has shape {shape}, but {shapes[theirs]} in the model"
                )
            elif dtype not in _DTYPES:
                problems[theirs] = (
                    f"{theirs} has dtype {dtype}, which is not a floating-point type"
                )
        problems |= {name: f"unexpected: {name}" for name in sorted(unexpected)}
        if problems:
            message = [f"{path} does not fit this {type(model).__name__}:"]
            message += problems.values()
            if in_head & problems.keys():
                message.append(
                    "if only the last layer differs, skip it with new_head=True"
                )
            raise ValueError("\n  ".join(message))
        for name, theirs in in_file.items():
            slot = slots[name]
            values = slot.from_torch(file.get_tensor(theirs).reshape(slot.shape))
            for variable, value in zip(slot.variables, values, strict=True):
                variable[...] = jnp.asarray(value, variable.dtype)


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle file. Opening one can run any code, so only safetensors "
        "files are read. Convert it once, where PyTorch and safetensors are "
        "installed:\n"
        "  import torch, safetensors.torch\n"
        f"  weights = torch.load({str(path)!r}, map_location='cpu', "
        "weights_only=True)\n"
        "  weights = weights.get('model', weights)  # for files of DeiT\n"
        "  weights = {name: w.contiguous() for name, w in weights.items()}\n"
        f"  safetensors.torch.save_file(weights, "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
