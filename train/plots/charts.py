"""Charts: curves of runs and studies, and scores of classes."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from train.plots._common import FONT_SIZE, class_colors, new_figure, shortened

Point: TypeAlias = Mapping[str, float]

_LONGEST_NAME = 2.5  # inches
_MOST_NAMES = 40  # classes that are named on an axis; more are numbered
_MOST_COUNTS = 12  # classes whose counts can be read in a matrix

# ------------------------------- Curves of runs ---------------------------------------


def save_curves(
    records: Sequence[Point],
    path: Path,
    *,
    losses: Sequence[str],
    metrics: Sequence[str],
    split: str,
) -> None:
    """Draws the losses and metrics of a run over its epochs.

    Several seeds are drawn as thin lines. A thick line is their mean, at the epochs at
    which all of them have a value.

    Args:
      records: one for each seed and epoch, with the keys "seed", "epoch", "train_NAME"
        and "SPLIT_NAME"; any of the latter two may be missing.
      path: the PNG file to write.
      losses: names of what to draw on the left.
      metrics: names of what to draw on the right.
      split: name of the evaluation split.
    """
    with new_figure(path, (9, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        for axes, names in ((left, losses), (right, metrics)):
            colors = class_colors(len(names)) / 255
            for name, color in zip(names, colors, strict=True):
                _draw_seeds(axes, records, f"train_{name}", "--", color)
                _draw_seeds(axes, records, f"{split}_{name}", "-", color)
            axes.set_ylabel(names[-1].replace("_", " "))
            _number_epochs(axes)
            axes.grid(alpha=0.3)
            if axes.lines:  # a legend above the axes hides no line
                where = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
                axes.legend(**where, ncols=2, frameon=False)
        _use_log_scale(left)
        num_seeds = len({record["seed"] for record in records})
        if num_seeds > 1:
            figure.suptitle(f"thin lines: {num_seeds} seeds; thick lines: their mean")


def save_learning_curves(
    curves: Mapping[str, Sequence[Sequence[Point]]],
    path: Path,
    *,
    score: str = "accuracy",
    ylabel: str = "test error (%)",
    baselines: Collection[str] = (),
) -> None:
    """Draws the test error of each technique: the mean over seeds, and their range.

    The error is drawn over epochs, over gradient evaluations and over seconds, since
    techniques differ in what an epoch costs. If the seeds of a technique have curves of
    different lengths, they are drawn up to the end of the shortest.

    Args:
      curves: for each technique, the curve of each seed. A curve has a point for each
        epoch, with the keys "epoch", "gradient_evaluations", "seconds" and `score`.
      path: the PNG file to write.
      score: key of the score in [0, 1]; the error is 1 - score.
      ylabel: the label of the error.
      baselines: the techniques whose lines are dashed.
    """
    with new_figure(path, (13, 4.2)) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        colors = class_colors(len(curves)) / 255
        lines: dict[str, Line2D] = {}
        keys = ("epoch", "gradient_evaluations", "seconds")
        for axes, key in zip(panels, keys, strict=True):
            for (name, seeds), color in zip(curves.items(), colors, strict=True):
                points = list(zip(*seeds, strict=False))  # of all seeds, by epoch
                if not points:
                    continue
                x = np.array([[p[key] for p in epoch] for epoch in points])
                scores = np.array([[p[score] for p in epoch] for epoch in points])
                x, errors = x.mean(axis=1), 100 * (1 - scores)
                low, high = errors.min(axis=1), errors.max(axis=1)
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                dashes = "--" if name in baselines else "-"
                lines[name] = _draw_line(axes, x, errors.mean(axis=1), dashes, color)
            axes.set_xlabel(key.replace("_", " "))
            axes.grid(alpha=0.3)
        _number_epochs(panels[0])
        panels[0].set_ylabel(ylabel)
        _use_log_scale(panels[0])
        if any(len(seeds) > 1 for seeds in curves.values()):
            figure.suptitle("mean over seeds; bands from the lowest to the highest")
        if lines:
            labels = [shortened(name, _LONGEST_NAME) for name in lines]
            figure.legend(
                list(lines.values()), labels, loc="outside right center", frameon=False
            )


def _draw_seeds(
    axes: Axes,
    records: Sequence[Point],
    key: str,
    dashes: str,
    color: Float[np.ndarray, "3"],
) -> None:
    """Draws one quantity over epochs, with a line for each seed and their mean."""
    seeds = sorted({record["seed"] for record in records})
    curves = [
        {r["epoch"]: r[key] for r in records if r["seed"] == seed and key in r}
        for seed in seeds
    ]
    if not any(curves):
        return
    if len(seeds) > 1:
        for curve in curves:
            epochs = sorted(curve)
            values = [curve[epoch] for epoch in epochs]
            _draw_line(axes, epochs, values, dashes, color, linewidth=0.7, alpha=0.5)
    epochs = sorted(set.intersection(*map(set, curves)))
    means = np.array([np.mean([curve[epoch] for curve in curves]) for epoch in epochs])
    _draw_line(axes, epochs, means, dashes, color, label=key.replace("_", " "))


def _draw_line(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    dashes: str,
    color: Float[np.ndarray, "3"],
    **look: Any,
) -> Line2D:
    """Draws a line with gaps at what is not finite.

    A point without neighbors, which a line cannot show, becomes a dot: hollow if the
    line would be dashed.
    """
    finite = np.isfinite(y)
    around = np.pad(finite, 1)
    lone = finite & ~around[:-2] & ~around[2:]
    if lone.any():
        fill = color if dashes == "-" else "white"
        look |= {"marker": "o", "markerfacecolor": fill, "markevery": lone}
    y = np.where(finite, y, np.nan)
    (line,) = axes.plot(x, y, dashes, color=color, markersize=4, **look)
    return line


def _number_epochs(axes: Axes) -> None:
    """Labels the x-axis with whole epochs."""
    axes.set_xlabel("epoch")
    ticks = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    axes.xaxis.set_major_locator(ticks)


def _use_log_scale(axes: Axes) -> None:
    """Makes the y-axis logarithmic if all values are positive."""
    values = np.concatenate(
        [[], *(np.asarray(line.get_ydata()) for line in axes.lines)]
    )
    values = values[np.isfinite(values)]
    if not values.size or values.min() <= 0:
        return
    axes.set_yscale("log")
    ratio = values.max() / values.min()
    if ratio < 5:  # perhaps fewer than two of the ticks at 1, 2 and 5
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:  # over many decades the ticks at 2 and 5 would run into each other
        subs = (1, 2, 5) if ratio < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


# ----------------------------- Scores of classes --------------------------------------


def save_confusion_matrix(
    confusion: Integer[np.ndarray, "classes classes"],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draws how often each class was predicted for each true class.

    Colors are shares of a row. With few classes, the counts stand in the cells.

    Args:
      confusion: the counts, with the true classes in rows.
      class_names: the names of the classes.
      path: the PNG file to write.
    """
    n = len(class_names)
    side = (
        2
        + 0.4 * min(n, _MOST_COUNTS)
        + 0.11 * max(0, min(n, _MOST_NAMES) - _MOST_COUNTS)
    )
    with new_figure(path, (side, side), crop=True) as figure:
        axes = figure.subplots()
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(
            image, label="share of the true class", fraction=0.05, shrink=0.85
        )
        axes.set(xlabel="predicted class", ylabel="true class")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        if n <= _MOST_NAMES:
            names = [shortened(name, _LONGEST_NAME) for name in class_names]
            axes.set_xticks(range(n), names, rotation=90 * (max(map(len, names)) > 2))
            axes.set_yticks(range(n), names)
            axes.tick_params(labelsize=FONT_SIZE if n <= _MOST_COUNTS else 7)
        if n <= _MOST_COUNTS:
            for row, column in np.argwhere(confusion).tolist():
                count = _short_count(confusion[row, column].item())
                color = "white" if shares[row, column] > 0.5 else "black"
                look: dict[str, Any] = {"ha": "center", "va": "center", "size": 7}
                axes.text(column, row, count, color=color, **look)


def save_bars(
    values: Mapping[str, float], mean: float, path: Path, *, label: str
) -> None:
    """Draws a horizontal bar for each value in [0, 1], and a line at their mean.

    Args:
      values: the values by name; NaN where there is none.
      mean: where to draw the line.
      path: the PNG file to write.
      label: the label of the values.
    """
    n = len(values)
    height, size = (0.24, FONT_SIZE) if n <= _MOST_NAMES else (0.15, 7)
    with new_figure(path, (6, 1.2 + height * n)) as figure:
        axes = figure.subplots()
        axes.barh(range(n), np.nan_to_num(list(values.values())), height=0.7)
        for place, value in enumerate(values.values()):
            text = "none" if math.isnan(value) else f"{value:.3f}"
            axes.text(1.02, place, text, va="center", size=size)
        line = axes.axvline(mean, color="black", linestyle="--")
        names = [shortened(name, _LONGEST_NAME) for name in values]
        axes.set_yticks(range(n), names, size=size)
        axes.set(xlim=(0, 1), ylim=(n - 0.4, -0.6), xlabel=label)
        axes.grid(axis="x", alpha=0.3)
        labels = [f"mean {mean:.3f}"]
        figure.legend([line], labels, loc="outside upper right", frameon=False)


def save_differences(
    differences: Mapping[str, Sequence[tuple[str, tuple[float, float, float], bool]]],
    path: Path,
) -> None:
    """Draws differences with their intervals, in a panel for each technique.

    Args:
      differences: for each technique, (name of the study, (mean, low, high), whether
        it is clear) of each study that has it. What is clear has a filled dot.
      path: the PNG file to write.
    """
    rows = max((len(found) for found in differences.values()), default=0)
    with new_figure(path, (11, 1.6 + 0.36 * max(1, rows) * 2)) as figure:
        panels = figure.subplots(2, math.ceil(len(differences) / 2), squeeze=False)
        for axes, (name, found) in zip(panels.flat, differences.items(), strict=False):
            for place, (_, (mean, low, high), clear) in enumerate(found):
                axes.plot([low, high], [place] * 2, color="C0")
                fill = "C0" if clear else "white"
                axes.plot(mean, place, "o", color="C0", markerfacecolor=fill)
            axes.axvline(0, color="black", linewidth=0.8)
            labels = [shortened(study, _LONGEST_NAME) for study, _, _ in found]
            axes.set_yticks(range(len(found)), labels)
            last = max(1, len(found)) - 0.5
            axes.set(ylim=(last, -0.5), xlabel="points", title=name)
            axes.grid(axis="x", alpha=0.3)


def save_profiles(ratios: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws performance profiles (Dolan and Moré, 2002).

    Args:
      ratios: for each method, its cost in each study divided by that of the best
        method; infinity where it has none.
      path: the PNG file to write.
    """
    finite = [r for found in ratios.values() for r in found if math.isfinite(r)]
    end = 1.1 * max(finite, default=1.0)
    with new_figure(path, (6, 3.6)) as figure:
        axes = figure.subplots()
        for name, found in ratios.items():
            at = sorted(ratio for ratio in found if math.isfinite(ratio))
            shares = [(i + 1) / len(found) for i in range(len(at))]
            x, y = [1.0, *at, end], [0.0, *shares, shares[-1] if shares else 0.0]
            axes.step(x, y, where="post", label=shortened(name, _LONGEST_NAME))
        axes.set(xlim=(1, end), ylim=(-0.03, 1.03), ylabel="share of the studies")
        axes.set_xlabel("gradients, divided by those of the best method")
        axes.grid(alpha=0.3)
        if ratios:
            figure.legend(loc="outside right center", frameon=False)


def _short_count(count: int) -> str:
    """Writes a count in at most four characters, up to ten million."""
    if count < 10_000:
        return f"{count}"
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.0f}M"
