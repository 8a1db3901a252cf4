"""Compiled programs that are kept for the next start."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

_BYTES = 2**30  # the programs that were used least recently make room for others


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache folder.

    Nothing changes if JAX has been given a folder, as by the environment variable
    ``JAX_COMPILATION_CACHE_DIR``, or if the cache folder cannot be made.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A program that cannot be read is compiled again, and one that cannot be written
    # is compiled the next time.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")


def _cache_folder() -> Path:
    """Returns a folder for this kind of processor.

    JAX does not tell processors apart, and a program for another one may crash.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "optax_tricks" / "compiled" / _processor()


def _processor() -> str:
    lines = [platform.machine(), platform.processor()]
    try:
        with open("/proc/cpuinfo") as file:
            named = ("model name", "flags", "Features")
            lines += sorted({line for line in file if line.startswith(named)})
    except OSError:  # not on Linux
        pass
    return hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()
