"""Reads and writes weights in safetensors files, as torchvision and timm have them."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from models._layout import head_of, layout, naming_of, renamed, slots_of
from models._misfit import Stored, misfit, prefix_of, shorten
from models._network import Network

Naming = Literal["torchvision", "timm"]

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
# Names of PyTorch's counters of batches end in this. Nothing reads them.
_UNUSED = "num_batches_tracked"
_VARIANCE = "running_var"


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
    slots, shapes = slots_of(model), layout(model, naming)
    arrays = {}
    for name, in_file in renamed(model, naming, slots).items():
        # On the host, because there new shapes need no compilation.
        array = slots[name].to_torch(*jax.device_get(slots[name].values))
        arrays[in_file] = array.reshape(shapes[in_file]).copy()
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(save(arrays))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(
    model: Network, path: str | os.PathLike[str], *, new_head: bool = False
) -> None:
    """Reads parameters and running statistics from a safetensors file into a model.

    Files of torchvision and timm fit ResNet, ResNeXt, DenseNet, VGG, MobileNetV2, ViT
    and DeiT, with the names of either library. Files of `save_weights` fit any network.
    A backbone, such as `pspnet.backbone`, is a network too. A prefix that all names in
    the file share is ignored, such as `module.` of PyTorch's DataParallel. Values are
    cast to the dtype of the model's variables. After an error the model is unchanged.

    Args:
      model: the network to change. One of your own must subclass `Network`.
      path: path of the file.
      new_head: whether to skip the layers below `model.head_paths`. The model keeps its
        values, and values in the file are ignored. This is for another number of
        classes, or for a backbone, which has no head.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a safetensors file, does not fit the model, or
        holds NaN, infinity, numbers that the dtype of the model cannot hold, or
        negative running variances. The message names the first few arrays that are
        wrong, and the network that the file seems to be for.
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
        stored = {
            name: Stored(tuple(array.get_shape()), array.get_dtype())
            for name in file.keys()  # noqa: SIM118
            if not name.endswith(_UNUSED)
            for array in [file.get_slice(name)]
        }
        slots = slots_of(model)
        prefix = prefix_of(model, stored)
        stored = {name.removeprefix(prefix): array for name, array in stored.items()}
        in_file = renamed(model, naming_of(model, slots, set(stored)), slots)
        problem = misfit(model, stored, new_head=new_head)
        if problem:
            raise ValueError(
                f"{path} does not fit this {type(model).__name__}: {problem}"
            )
        if new_head:
            head = head_of(model)
            in_file = {k: v for k, v in in_file.items() if not k.startswith(head)}

        def read(name: str) -> Any:
            return file.get_tensor(prefix + in_file[name])

        bad = [
            in_file[name]
            for name in in_file
            if not _is_finite_in(slots[name].variables[0].dtype, read(name))
        ]
        if bad:
            raise ValueError(
                f"{path} has NaN, infinity or numbers too large for the dtype of the "
                f"model in {shorten(bad)}"
            )
        negative = [
            in_file[name]
            for name in in_file
            if name.endswith(_VARIANCE) and (read(name) < 0).any()
        ]
        if negative:
            raise ValueError(
                f"{path} has running variances below 0 in {shorten(negative)}: it is "
                "damaged, or holds other arrays under these names"
            )
        for name, slot in ((name, slots[name]) for name in in_file):
            values = slot.from_torch(read(name).reshape(slot.shape))
            for variable, value in zip(slot.variables, values, strict=True):
                variable[...] = jnp.asarray(value, variable.dtype)


def _is_finite_in(dtype: Any, array: Any) -> bool:
    """Says whether all entries of a NumPy array are finite numbers of dtype."""
    # On the host, because there new shapes need no compilation. NaN is no number <= x.
    limit = float(jnp.finfo(dtype).max)
    if array.dtype.itemsize == 2:  # the minimum of a bfloat16 NaN would warn
        array = array.astype("float32")
    return not array.size or (
        -limit <= float(array.min()) and float(array.max()) <= limit
    )


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
