"""Command line: python -m train.data list | prepare | info | show."""

if __name__ == "__main__":
    from train.signals import listen

    listen()  # before the imports below, which take seconds

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from absl import logging
from rich import box
from rich.markup import escape
from rich.table import Table

from train import data, plots
from train.command_line import choose_command, run_command
from train.data.preparation.builder import summarize
from train.data.preparation.measure import SplitStatistics
from train.errors import UsageError
from train.progress import make_console, shown_on

console = make_console()
progress = shown_on(console)

Name = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
DataDir = Path | None


def list_datasets(data_dir: DataDir = None) -> None:
    """List the datasets that can be prepared, and those that are prepared.

    Args:
      data_dir: folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if
        unset.
    """
    table = Table("name", "what it is", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, builder in data.BUILDERS.items():
        shown = f"{name}/NAME" if builder.NEEDS_NAME else name
        table.add_row(shown, (builder.__doc__ or "").partition("\n")[0])
    table.add_row(
        "cifar10, cifar100, imagenet2012, ...",
        "the catalogue of tensorflow-datasets",
    )
    console.print(table, soft_wrap=False)
    where = data_dir or data.default_data_dir()
    found = ", ".join(data.prepared(data_dir)) or "nothing yet"
    console.print(f"Prepared in {where}: {found}")


def prepare(
    name: Name,
    source: Path | None = None,
    data_dir: DataDir = None,
    skip_bad: bool = False,
    test_fraction: float | None = None,
    classes: str | None = None,
    ignore_label: int | None = None,
) -> None:
    """Check the files of a dataset and write them in the form that training reads.

    Args:
      name: name of the dataset; your own is image_folder/NAME,
        segmentation_folder/NAME or paired_images/NAME.
      source: folder, zip or tar with the files; docs/data.md shows the layouts.
      data_dir: folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if
        unset.
      skip_bad: leave out files that cannot be used, and list them.
      test_fraction: share of your own data to test on, if it has no split folders.
      classes: names of the classes in your own masks, from value 0: road,car,sky. With
        two classes, masks may be black and white: background,object.
      ignore_label: value of pixels without a class in your own masks, 255 if unset;
        with 0, the values of the classes begin at 1.
    """
    options = {
        "skip_bad": skip_bad or None,
        "test_fraction": test_fraction,
        "classes": classes and [name.strip() for name in classes.split(",")],
        "ignore_label": ignore_label,
    }
    before = data.folder_of(name, data_dir)
    if before is not None:
        console.print(
            f"{name} is prepared already; to do it again, remove {before} first"
        )
        return
    start = time.monotonic()
    builder = data.prepare(
        name,
        source=source,
        data_dir=data_dir,
        progress=progress,
        **{key: value for key, value in options.items() if value is not None},
    )
    seconds, peak = time.monotonic() - start, _peak_megabytes()
    console.print(f"prepared in {seconds:.1f} s, with at most {peak:,.0f} MB of memory")
    if builder is not None and builder.skipped:
        console.print(f"left out {summarize(builder.skipped)}")
    for note in builder.notes if builder is not None else ():
        console.print(f"note: {note}")
    info(name, data_dir)


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def info(name: Name, data_dir: DataDir = None) -> None:
    """Show splits, counts, sizes, class frequencies, and means of a prepared dataset.

    Args:
      name: name of the dataset.
      data_dir: folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if
        unset.
    """
    found = data.open_prepared(name, data_dir=data_dir, progress=progress)
    measured = found.statistics(progress)
    size = sum(file.stat().st_size for file in found.folder.glob("*.array_record*"))
    console.print(f"{name} in {found.folder}, {size / 1e6:.1f} MB")
    table = Table("split", "examples", "width x height", box=box.SIMPLE_HEAD)
    for key in measured["train"].mean:
        table.add_column(f"{key} mean / std")
    for split, of_split in measured.items():
        count = f"{of_split.num_examples:,}"
        table.add_row(split, count, _sizes(of_split), *_moments(of_split))
    console.print(table, soft_wrap=False)
    for key in measured["train"].counts:
        console.print(_frequencies(key, found, measured), soft_wrap=False)
    for split, of_split in measured.items():
        if of_split.num_measured < of_split.num_examples:
            console.print(
                f"{split}: measured on {of_split.num_measured:,} evenly spread examples"
            )


def _sizes(found: SplitStatistics) -> str:
    ranges = (
        str(low) if low == high else f"{low}-{high}"
        for low, high in (found.widths, found.heights)
    )
    return " x ".join(ranges)


def _moments(found: SplitStatistics) -> list[str]:
    return [
        " / ".join(
            "(" + ", ".join(f"{x:.4f}" for x in values) + ")"
            for values in (found.mean[key], found.std[key])
        )
        for key in found.mean
    ]


def _frequencies(
    key: str, dataset: data.Prepared, measured: dict[str, SplitStatistics]
) -> Table:
    table = Table("value", "class", box=box.SIMPLE_HEAD)
    for split in measured:
        of = "examples" if key == "label" else "pixels"
        table.add_column(f"{split}, % of {of}")
    counts = [found.counts[key] for found in measured.values()]
    for value in range(max(len(dataset.class_names), *map(len, counts))):
        cells = [_percent(of_split, value) for of_split in counts]
        known = value < len(dataset.class_names)
        if known or set(cells) != {"none"}:
            name = escape(dataset.class_names[value]) if known else "(ignored)"
            table.add_row(str(value), name, *cells)
    return table


def _percent(counts: Sequence[int], value: int) -> str:
    count = counts[value] if value < len(counts) else 0
    return f"{100 * count / sum(counts):.2f}" if count else "none"


def show(
    name: Name,
    output: Path | None = None,
    split: str = "train",
    task: Literal["classification", "segmentation", "translation"] | None = None,
    count: int = 24,
    seed: int = 0,
    data_dir: DataDir = None,
) -> None:
    """Draw examples of a prepared dataset, chosen at random, to a PNG file.

    Args:
      name: name of the dataset.
      output: the file; NAME-SPLIT.png in the current folder if unset.
      split: split to choose from.
      task: task whose images are drawn, if the dataset serves several.
      count: number of examples to draw.
      seed: seed of the choice.
      data_dir: folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if
        unset.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    if count > plots.MOST_EXAMPLES:
        raise UsageError(f"count must be at most {plots.MOST_EXAMPLES}, got {count}")
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, got {seed}")
    if output is not None and output.suffix != ".png":
        raise UsageError(f"output must be a file NAME.png, got {output}")
    found = data.open_prepared(name, data_dir=data_dir, progress=progress)
    if split not in found.sources:
        raise UsageError(
            f"{name} has no split {split!r}; it has {', '.join(found.sources)}"
        )
    source = found.sources[split]
    count = min(count, len(source))
    rows = np.random.default_rng(seed).choice(len(source), count, replace=False)
    records = source.__getitems__(rows.tolist())
    fields = found.fields(task)
    arrays = {key: [f.read(record) for record in records] for key, f in fields.items()}
    path = output or Path(f"{name.replace('/', '-')}-{split}.png")
    title = f"{name}, {count} of {len(source):,} in {split}"
    if "label" in fields:
        labels = np.stack(arrays["label"])
        names = (*found.class_names, "unlabeled")  # -1 means unlabeled
        captions = [names[label] for label in labels]
        images = {"image": arrays["image"]}
        plots.save_images(images, path, title=title, captions=captions)
    elif "mask" in fields:
        plots.save_masks(
            arrays["image"],
            {"mask": arrays["mask"]},
            path,
            class_names=found.class_names,
            colors=found.colors,
            ignore_label=found.ignore_label,
            blend=True,
            title=title,
        )
    else:
        images = {key: arrays[key] for key in ("input", "target")}
        plots.save_images(images, path, title=title)
    console.print(f"drew {title} to {path}")


def main() -> None:
    """Runs the command line; errors that a user can fix are one line."""
    logging.set_verbosity(logging.ERROR)  # TFDS logs what this does on purpose
    run_command(
        lambda: choose_command(
            {"list": list_datasets, "prepare": prepare, "info": info, "show": show},
            prog="python -m train.data",
            description="Prepare and inspect datasets.",
        )
    )


if __name__ == "__main__":
    main()
