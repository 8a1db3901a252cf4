"""Devices to compile for, whether they are there or not.

A compiler needs a description of the devices, not the devices: XLA for GPUs takes the
numbers of one GPU, and libtpu knows all TPUs by name.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from train.errors import UsageError, see
from train.names import did_you_mean

_GPUS_PER_HOST = 8
_H100_BYTES = 84_942_979_072

# What XLA asks a driver for, from the data sheet and the CUDA documentation for compute
# capability 9.0.
_H100 = f"""
gpu_device_info {{
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: {_H100_BYTES}
  l2_cache_size: 52428800
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiler:
    """A compiler, which comes in packages of its own.

    Attributes:
      platform: the name that JAX has for its devices.
      module: the module that tells whether it is installed.
      packages: the packages whose versions count.
      group: the dependency group that installs it.
      environment: variables that must be set before it is loaded.
      options: options of each compilation.
    """

    platform: str
    module: str
    packages: tuple[str, ...]
    group: str
    environment: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def is_installed(self) -> bool:
        """Whether the packages are there."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # not even the package that it is in
            return False

    @property
    def versions(self) -> str:
        """The packages with their versions."""
        return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in self.packages)

    def load(self) -> None:
        """Prepares the process to compile; call it before JAX starts.

        Raises:
          UsageError: if the compiler is not installed.
        """
        if not self.is_installed:
            raise UsageError(
                f"the compiler for {self.platform} is not installed: in an environment "
                f"of its own, `pip install -e . --group {self.group}`"
                + see("compile.md")
            )
        # The devices may be there and busy: neither they nor their memory are needed.
        jax.config.update("jax_platforms", "cpu")
        os.environ.update(self.environment)


CUDA = Compiler(
    platform="cuda",
    module="jax_plugins.xla_cuda12",
    packages=("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"),
    group="compile-cuda",
    environment={"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
    # Without a GPU nothing can be tuned by measuring, and Triton cannot be chosen.
    options={"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
)
TPU = Compiler(
    platform="tpu",
    module="libtpu",
    packages=("libtpu",),
    group="compile-tpu",
    environment={
        # No other process has the TPU, whatever the lock file of one that was killed
        # says.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # The machine is none of those in a TPU pod.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    },
    options={},
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: the name on the command line, such as "v5e:2x2".
      compiler: the compiler for it.
      topology: what the compiler takes for these devices.
      memory_bytes: memory of each chip that a program can use.
    """

    name: str
    compiler: Compiler
    topology: Mapping[str, Any]
    memory_bytes: int

    def devices(self) -> list[jax.Device]:
        """Returns the devices, on which nothing runs; each is one chip.

        Raises:
          UsageError: if the compiler does not know such a topology.
        """
        try:
            description = topologies.get_topology_desc(
                platform=self.compiler.platform, **self.topology
            )
        except jax.errors.JaxRuntimeError as error:
            raise UsageError(
                f"the compiler knows no target {self.name!r}: {error}; known are, for "
                f"example, {_EXAMPLES}"
            ) from error
        return list(description.devices)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tpu:
    """A generation of TPUs.

    Attributes:
      dimensions: number of dimensions of its topologies.
      gibibytes: memory of a chip.
    """

    dimensions: int
    gibibytes: float


_TPUS = {
    "v5e": _Tpu(dimensions=2, gibibytes=15.75),
    "v5p": _Tpu(dimensions=3, gibibytes=95.0),
    "v6e": _Tpu(dimensions=2, gibibytes=31.25),
}
_EXAMPLES = "h100, h100:8, v5e:1x1, v5e:2x2, v5e:4x4, v5e:16x16, v5p:2x2x1, v6e:2x2"


def find_target(name: str) -> Target:
    """Returns a target by its name.

    >>> find_target("h100:16").topology["topology"]
    '1x2x8'
    >>> find_target("v5e:4x4").topology
    {'topology_name': 'v5e:4x4'}

    Raises:
      UsageError: if there is no such target. The message lists some that there are.
    """
    kind, colon, shape = name.partition(":")
    sides = [
        int(side) for side in shape.split("x") if re.fullmatch("[1-9][0-9]*", side)
    ]
    is_shape = shape == "x".join(map(str, sides)) and bool(colon) == bool(sides)
    if kind == "h100" and is_shape and len(sides) <= 1:
        count = sides[0] if sides else 1
        hosts = math.ceil(count / _GPUS_PER_HOST)
        if count % hosts == 0:
            return Target(
                name=name,
                compiler=CUDA,
                topology={
                    "target_config": _H100,
                    "topology": f"1x{hosts}x{count // hosts}",
                },
                memory_bytes=_H100_BYTES,
            )
    if kind in _TPUS and is_shape and len(sides) == _TPUS[kind].dimensions:
        topology: dict[str, Any] = {"topology_name": name}
        if math.prod(sides) == 1:
            topology["chips_per_host_bounds"] = (1, 1, 1)
        return Target(
            name=name,
            compiler=TPU,
            topology=topology,
            memory_bytes=int(_TPUS[kind].gibibytes * 2**30),
        )
    guess = did_you_mean(kind, ["h100", *_TPUS])
    raise UsageError(
        f"unknown target {name!r}; {guess}known are, for example, {_EXAMPLES}"
    )
