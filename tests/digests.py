"""Prints digests of what a few training steps give, to see that no number has changed.

    python tests/digests.py > before.txt
    (change the code)
    python tests/digests.py | diff before.txt -

Every technique is trained on each task from fixed seeds, on small images that are made
from random numbers. A line shows the SHA-256 of the exported weights, that of the
recorded metrics without the times, and the last training loss. The numbers are
comparable on one machine with one set of package versions only.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from PIL import Image

import train.__main__ as training
import train.data.__main__ as data

TECHNIQUES = (
    "",
    "scale_by_random",
    "centralize",
    "barzilai_borwein_step",
    "perturbed_unit_step",
    "sam",
    "perturbed_unit_step,scale_by_random,centralize",
)
TASKS = {
    "classification": (
        "--dataset=digits",
        "--epochs=1",
        "--batch-size=200",
        "--augment=pad_crop,random_flip",
    ),
    "segmentation": (
        "--dataset=segmentation_folder/small",
        "--epochs=2",
        "--batch-size=6",
        "--augment=random_scale_crop,color_jitter",
        "--class-weights=balanced",
    ),
    "translation": (
        "--dataset=paired_images/small",
        "--epochs=2",
        "--batch-size=6",
        "--techniques-on=both",
    ),
}
MORE = {
    "classification, two seeds": (
        "classification",
        *TASKS["classification"],
        "--techniques=scale_by_random",
        "--seeds=2",
    ),
    "classification, accumulated, averaged": (
        "classification",
        *TASKS["classification"],
        "--techniques=perturbed_unit_step",
        "--grad-accum=2",
        "--ema=0.9",
        "--clip-norm=1",
        "--optimizer=adamw",
        "--warmup-epochs=0.5",
    ),
    "segmentation, validated, streamed": (
        "segmentation",
        *TASKS["segmentation"],
        "--eval-split=validation",
        "--loader=grain",
        "--num-workers=0",
    ),
}


def main() -> None:
    """Prints a line for each run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["TFDS_DATA_DIR"] = str(root / "datasets")
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        make_datasets(root)
        for task, arguments in TASKS.items():
            for techniques in TECHNIQUES:
                name = f"{task} {techniques or 'sgd'}"
                chosen = f"--techniques={techniques}"
                show(root, name, (task, *arguments, chosen))
        for name, arguments in MORE.items():
            show(root, name, arguments)


def show(root: Path, name: str, arguments: tuple[str, ...]) -> None:
    """Trains, exports, and prints the digests."""
    folder = root / name.replace(" ", "-")
    call(training.main, *arguments, f"--run-dir={folder}")
    call(training.main, "export", folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["seconds"]
    records.sort(key=lambda record: (record["seed"], record["epoch"]))
    weights = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    losses = [
        v for k, v in records[-1].items() if k.startswith("train_") and "loss" in k
    ]
    print(
        f"{name}: weights {digest(*weights)} metrics "
        f"{digest(json.dumps(records, sort_keys=True).encode())} "
        f"losses {' '.join(f'{loss:.6f}' for loss in losses)}",
        flush=True,
    )


def digest(*contents: bytes) -> str:
    """Returns the beginning of the SHA-256 of some contents."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def call(command, *arguments: object) -> None:
    """Runs a command line in this process, without what it prints."""
    sys.argv = ["command", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()):
        command()


def make_datasets(root: Path) -> None:
    """Prepares a dataset for segmentation and one for translation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 18), ("test", 6)):
        for i in range(count):
            image = rng.integers(256, size=(64, 128, 3), dtype=np.uint8)
            mask = rng.integers(3, size=(32, 32), dtype=np.uint8)
            mask[0] = 255
            save(root / "pairs" / split / f"{i}.png", image)
            save(root / "masks" / split / "images" / f"{i}.png", image[:32, :32])
            save(root / "masks" / split / "masks" / f"{i}.png", mask)
    options = ("--source", root / "masks", "--classes", "a,b,c")
    call(data.main, "prepare", "segmentation_folder/small", *options)
    call(data.main, "prepare", "paired_images/small", "--source", root / "pairs")


def save(path: Path, array: np.ndarray) -> None:
    """Writes a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


if __name__ == "__main__":
    main()
