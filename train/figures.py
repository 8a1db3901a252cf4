"""Figures that runs leave behind."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a run needs no display
from matplotlib import pyplot as plt

from train.loop import Record


def save_curves(records: Sequence[Record], metric: str, path: Path) -> None:
    """Draws loss and metric over the epochs of one run."""
    epochs = [record["epoch"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for split, style in (("train", "--"), ("test", "-")):
        for axes, name in ((left, "loss"), (right, metric)):
            values = [record[f"{split}_{name}"] for record in records]
            axes.plot(epochs, values, style, label=split)
            axes.set(xlabel="epoch", ylabel=name)
    left.set_yscale("log")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
