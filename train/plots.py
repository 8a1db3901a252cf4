"""All figures: of runs, of datasets and of studies, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure  # not pyplot, which would need a display
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from train.contact_sheet import default_colors

Columns: TypeAlias = Sequence[tuple[str, Sequence[np.ndarray]]]
"""Pairs of a title and images, uint8 (height, width, 1 or 3); all equally many."""

_DPI = 120
_IMAGE_WIDTH = 1.8  # inches
_MOST_NAMES = 40  # classes that are named on an axis; more are numbered
_MOST_COUNTS = 12  # classes whose counts can be read in a matrix


def save_curves(
    records: Sequence[Mapping[str, float]],
    path: Path,
    *,
    losses: Sequence[str],
    metrics: Sequence[str],
    split: str,
) -> None:
    """Draws losses and metrics of a run over its epochs.

    Several seeds are drawn as thin lines, and their mean as a thick one.

    Args:
      records: one for each seed and epoch, with the keys "seed", "epoch", "train_NAME"
        and "SPLIT_NAME"; a record may lack some of the latter.
      path: the file to write.
      losses: names of what to draw on the left.
      metrics: names of what to draw on the right.
      split: name of the evaluation split.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, records, losses, split)
    _draw_curves(right, records, metrics, split)
    left.set_yscale("log")
    figure.savefig(path, dpi=_DPI)


def _draw_curves(
    axes: Axes,
    records: Sequence[Mapping[str, float]],
    names: Sequence[str],
    split: str,
) -> None:
    seeds = sorted({record["seed"] for record in records})
    for i, name in enumerate(names):
        for part, style in (("train", "--"), (split, "-")):
            key = f"{part}_{name}"
            curves = [
                {r["epoch"]: r[key] for r in records if r["seed"] == seed and key in r}
                for seed in seeds
            ]
            epochs = sorted(set.intersection(*map(set, curves)))
            if not epochs:
                continue
            # A line cannot show a single point.
            look = {"color": f"C{i}", "marker": "o" if len(epochs) == 1 else ""}
            if len(seeds) > 1:
                for curve in curves:
                    axes.plot(*zip(*curve.items()), style, lw=0.7, alpha=0.4, **look)
            means = [np.mean([curve[epoch] for curve in curves]) for epoch in epochs]
            axes.plot(epochs, means, style, label=key.replace("_", " "), **look)
    axes.set(xlabel="epoch", ylabel=names[-1].replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def save_confusion_matrix(
    confusion: np.ndarray, class_names: Sequence[str], path: Path
) -> None:
    """Draws how often each class was predicted for each true one.

    Colours are shares of a row, which is a true class; with few classes the counts
    stand in the cells.

    Args:
      confusion: int (classes, classes), the true classes in rows.
      class_names: their names.
      path: of the file to write.
    """
    n = len(class_names)
    side = 2 + 0.4 * min(n, _MOST_COUNTS) + 0.11 * max(0, min(n, 40) - _MOST_COUNTS)
    figure = Figure(figsize=(side, side))  # labels lie outside, and are cut out with it
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", fraction=0.05, shrink=0.85)
    axes.set(xlabel="predicted class", ylabel="true class")
    if n <= _MOST_NAMES:
        rotation = 90 if max(map(len, class_names)) > 2 else 0
        axes.set_xticks(range(n), class_names, rotation=rotation, parse_math=False)
        axes.set_yticks(range(n), class_names, parse_math=False)
        axes.tick_params(labelsize=9 if n <= _MOST_COUNTS else 7)
    if n <= _MOST_COUNTS:
        for row, column in np.argwhere(confusion):
            count = confusion[row, column]
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
            axes.text(column, row, text, color=color, ha="center", va="center", size=7)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")


def save_bars(
    values: Mapping[str, float], mean: float, path: Path, *, label: str
) -> None:
    """Draws a horizontal bar for each value from 0 to 1, and a line at their mean.

    Args:
      values: by name; NaN for those without one.
      mean: where to draw the line.
      path: of the file to write.
      label: what the values are.
    """
    figure = Figure(figsize=(6, 1.2 + 0.24 * len(values)), layout="constrained")
    axes = figure.subplots()
    places, widths = np.arange(len(values)), np.array(list(values.values()))
    axes.barh(places, np.nan_to_num(widths), height=0.7)
    for place, width in zip(places, widths, strict=True):
        text = "none" if np.isnan(width) else f"{width:.3f}"
        axes.text(1.02, place, text, va="center", size=9)
    axes.axvline(mean, color="black", linestyle="--", label=f"mean {mean:.3f}")
    axes.set_yticks(places, list(values), parse_math=False)
    axes.set(xlim=(0, 1), ylim=(len(values) - 0.4, -0.6), xlabel=label)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", frameon=False)
    figure.savefig(path, dpi=_DPI)


def save_comparison(
    path: Path,
    columns: Columns,
    legend: Sequence[Patch] = (),
) -> None:
    """Draws images side by side: a row for each example, a column for each title.

    Several runs are compared so: input, output of each run, truth.

    Args:
      path: of the file to write.
      columns: from left to right.
      legend: what stands below.

    Raises:
      ValueError: if columns differ in length.
    """
    rows = list(zip(*(images for _, images in columns), strict=True))
    heights, widths = zip(*(np.shape(row[0])[:2] for row in rows), strict=True)
    cell = _IMAGE_WIDTH * max(heights) / max(widths)
    size = _IMAGE_WIDTH * len(columns), cell * len(rows)
    figure = Figure(size, dpi=_DPI)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    gap = 0.06  # inches
    figure.subplots_adjust(0, 0, 1, 1, gap / _IMAGE_WIDTH, gap / cell)
    for axes, image in zip(grid.flat, (x for row in rows for x in row), strict=True):
        crisp = 2 * image.shape[1] <= _IMAGE_WIDTH * _DPI
        axes.imshow(
            np.broadcast_to(image, (*image.shape[:2], 3)),
            interpolation="nearest" if crisp else "auto",
        )
        axes.axis("off")
    for axes, (title, _) in zip(grid[0], columns, strict=True):
        axes.set_title(title, size=10, parse_math=False)
    if legend:
        # Outside the grid, where the crop to what is drawn finds it.
        longest = max(len(patch.get_label()) for patch in legend)
        across = max(1, int(size[0] / (0.45 + 0.085 * longest)))
        found = figure.legend(
            handles=legend,
            ncols=min(len(legend), across),
            loc="upper center",
            bbox_to_anchor=(0.5, -gap / size[1]),
            borderaxespad=0,
            frameon=False,
            handlelength=1.2,
            fontsize=9,
        )
        for text in found.get_texts():
            text.set_parse_math(False)
    figure.savefig(path, bbox_inches="tight", pad_inches=gap)


def save_titled(
    path: Path, images: Sequence[np.ndarray], titles: Sequence[str]
) -> None:
    """Draws images in a grid, each under its title.

    Args:
      path: of the file to write.
      images: uint8 (height, width, 1 or 3), of any sizes.
      titles: one for each.
    """
    across = min(len(images), 5)
    down = -(-len(images) // across)
    figure = Figure((_IMAGE_WIDTH * across, (_IMAGE_WIDTH + 0.3) * down), dpi=_DPI)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
        axes.set_title(title, size=9, parse_math=False)
    figure.savefig(path)


def class_colors(num_classes: int) -> np.ndarray:
    """Colours of classes that bring none: uint8 (classes, 3).

    Up to ten can be told apart under colour vision deficiency too.
    """
    if num_classes > 10:
        return default_colors(num_classes)
    colors = map(to_rgb, color_sequences["petroff10"][:num_classes])
    return np.rint(255 * np.array(list(colors))).astype(np.uint8)


def painted(mask: np.ndarray, colors: np.ndarray, ignore_label: int) -> np.ndarray:
    """A mask in the colours of its classes; ignored pixels are hatched in grey.

    >>> colors = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    >>> painted(np.array([[0, 1]]), colors, 255).tolist()
    [[[255, 0, 0], [0, 0, 255]]]

    Args:
      mask: int (height, width).
      colors: uint8 (classes, 3).
      ignore_label: value of pixels without a class.

    Returns:
      uint8 (height, width, 3).
    """
    rows, columns = np.indices(mask.shape)
    width = max(2, min(mask.shape) // 60)
    stripes = np.where((rows + columns) // width % 2, 220, 160).astype(np.uint8)
    ignored = mask == ignore_label
    return np.where(
        ignored[..., None], stripes[..., None], colors[np.where(ignored, 0, mask)]
    )


def class_legend(
    masks: Sequence[np.ndarray],
    class_names: Sequence[str],
    colors: np.ndarray,
    ignore_label: int,
) -> list[Patch]:
    """Entries for the classes that occur in masks, and for ignored pixels."""
    values = np.unique(np.concatenate([np.unique(mask) for mask in masks])).tolist()
    legend = [
        Patch(facecolor=colors[value] / 255, edgecolor="grey", label=class_names[value])
        for value in values
        if value != ignore_label
    ]
    if ignore_label in values:
        grey = {"facecolor": "0.85", "edgecolor": "0.6", "hatch": "//////"}
        legend.append(Patch(**grey, label="ignored"))
    return legend
