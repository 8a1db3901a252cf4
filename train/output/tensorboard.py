"""TensorBoard events of a run: the scalars of every seed, and figures."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

_FOLDER = "tensorboard"


class TensorBoard(contextlib.AbstractContextManager["TensorBoard"]):
    """Writes the events of one seed of a run."""

    def __init__(self, folder: Path, seed: int, *, first_step: int | None = None):
        """Opens a file.

        Args:
          folder: the folder of the run.
          seed: the seed.
          first_step: the first step that is to come; what an earlier part of the run
            wrote from there on is hidden.
        """
        from tensorboardX import SummaryWriter  # half a second, not for every command

        self._writer = SummaryWriter(
            str(folder / _FOLDER / f"seed{seed}"), purge_step=first_step
        )

    def add(self, kind: str, record: Mapping[str, float]) -> None:
        """Adds the scalars of a record at its step, as `kind/name`."""
        for name, value in record.items():
            if name not in ("seed", "step"):
                self._writer.add_scalar(f"{kind}/{name}", value, int(record["step"]))

    def add_figures(self, step: int, paths: Iterable[Path]) -> None:
        """Adds PNG files under their names."""
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
