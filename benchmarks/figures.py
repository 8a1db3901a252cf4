"""Figures of studies."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


def save_learning_curves(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    path: Path,
    *,
    baselines: Collection[str] = (),
) -> None:
    """Draws the test error of each method, averaged over seeds.

    It is drawn over epochs, over gradient evaluations and over seconds of training,
    since methods differ in what an epoch costs.

    Args:
      curves: for each method, the curve of each seed. A curve has a point for each
        epoch, with the keys "epoch", "gradient_evaluations", "seconds" and "accuracy".
      path: the PNG file to write.
      baselines: the methods whose lines are dashed.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    keys = ("epoch", "gradient_evaluations", "seconds")
    for axes, key in zip(panels, keys, strict=True):
        for name, seeds in curves.items():
            x = np.mean([[point[key] for point in curve] for curve in seeds], axis=0)
            accuracy = [[point["accuracy"] for point in curve] for curve in seeds]
            error = 100 * (1 - np.mean(accuracy, axis=0))
            style = "--" if name in baselines else "-"
            axes.plot(x, error, style, lw=1.5, label=name)
        axes.set(xlabel=key.replace("_", " "), yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("error %, mean over seeds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
