"""TensorBoard events of a run: the scalars of every seed, and figures."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_FOLDER = "tensorboard"
_VERSION = "brain.Event:2"  # of the format of the file


class TensorBoard(contextlib.AbstractContextManager["TensorBoard"]):
    """Writes the events of one seed of a run.

    Each event is written before the method returns. tensorboardX's `SummaryWriter`
    would leave that to a thread, whose failure on a full disk stops the run for ever.
    """

    def __init__(self, folder: Path, seed: int, *, first_step: int | None = None):
        """Opens a file.

        Args:
          folder: the folder of the run.
          seed: the seed.
          first_step: the first step that is to come; what an earlier part of the run
            wrote from there on is hidden.

        Raises:
          OSError: if the file cannot be written, as for the other methods.
        """
        # Half a second, which not every command needs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        path = folder / _FOLDER / f"seed{seed}"
        path.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"  # else two of one second share a file
        self._writer = EventsWriter(str(path / "events"), suffix)
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(first_step, file_version=_VERSION)
            self._write(first_step, session_log=start)

    def add(self, kind: str, record: Mapping[str, float]) -> None:
        """Adds the scalars of a record at its step, as `kind/name`."""
        from tensorboardX.summary import scalar

        for name, value in record.items():
            if name not in ("seed", "step"):
                summary = scalar(f"{kind}/{name}", value)
                self._write(int(record["step"]), summary=summary)
        self._writer.flush()

    def add_figures(self, step: int, paths: Iterable[Path]) -> None:
        """Adds PNG files under their names."""
        from tensorboardX.summary import image

        for path in paths:
            with Image.open(path) as figure:
                pixels = np.asarray(figure.convert("RGB"))
            summary = image(path.stem, pixels, dataformats="HWC")
            self._write(step, summary=summary)
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
