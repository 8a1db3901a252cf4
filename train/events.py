"""What TensorBoard shows of a run: scalars of every seed, and figures."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from train.step import Record

_FOLDER = "tensorboard"


class Events(contextlib.AbstractContextManager):
    """Writes the events of a run, each seed's to a folder of its own."""

    def __init__(self, folder: Path, seeds: Iterable[int], *, first_step: int):
        """Opens the files; what an earlier part of the run said from then on is hidden.

        Args:
          folder: of the run.
          seeds: of the run.
          first_step: the first step that is to come.
        """
        from tensorboardX import SummaryWriter  # half a second, not for every command

        self._writers = {
            seed: SummaryWriter(
                str(folder / _FOLDER / f"seed{seed}"), purge_step=first_step
            )
            for seed in seeds
        }

    def add(self, kind: str, record: Record) -> None:
        """Adds the scalars of a record at its step, as `kind/name`."""
        writer = self._writers[int(record["seed"])]
        for name, value in record.items():
            if name not in ("seed", "step"):
                writer.add_scalar(f"{kind}/{name}", value, int(record["step"]))

    def add_figures(self, seed: int, step: int, paths: Iterable[Path]) -> None:
        """Adds PNG files under their names."""
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writers[seed].add_image(path.stem, pixels, step, dataformats="HWC")

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()
