"""Figures of studies."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a study needs no display
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


def save_learning_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the test error of each method, averaged over seeds.

    Once over epochs, once over gradient evaluations and once over seconds of
    training, since methods differ in what an epoch costs.

    Args:
      rows: one for each run, with "method" and the "curve" of its epochs.
      path: the image to write.
    """
    curves = defaultdict(list)
    for row in rows:
        if row["failure"] is None:
            curves[row["method"]].append(row["curve"])
    panels = ("epoch", "gradient_evaluations", "seconds")
    figure, all_axes = plt.subplots(
        1, 3, figsize=(13, 4.2), sharey=True, layout="constrained"
    )
    for axes, x in zip(all_axes, panels, strict=True):
        for name, runs in curves.items():
            at = np.mean([[point[x] for point in run] for run in runs], axis=0)
            accuracy = [[point["accuracy"] for point in run] for run in runs]
            error = 100 * (1 - np.mean(accuracy, axis=0))
            baseline = name.startswith("sgd")
            axes.plot(at, error, "--" if baseline else "-", lw=1.5, label=name)
        axes.set(xlabel=x.replace("_", " "), yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    all_axes[0].set_ylabel("error %, mean over seeds")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
