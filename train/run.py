"""One run of one task, with all that it leaves behind."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from train.figures import save_curves
from train.loop import Record, fit
from train.progress import shown_on
from train.run_folder import open_run_folder


def train(
    task: types.ModuleType,
    config: Any,
    *,
    seed: int,
    run_dir: Path | None,
    console: Console,
) -> list[Record]:
    """Trains as configured and writes metrics, a figure and a summary.

    Args:
      task: a module of `train.tasks`: its `build(config)` and `METRIC` are used.
      config: the task's config.
      seed: decides parameters, order of examples and random tricks.
      run_dir: where to write; None for a new folder under runs/.
      console: where to show progress and result.

    Returns:
      One record for each epoch, as in `metrics.jsonl`.

    Raises:
      RunFolderError: before training, if the folder cannot be used.
      NonFiniteLossError: if the loss stops being a number.
    """
    described = dataclasses.asdict(config) | {"seed": seed}
    name = f"{task.NAME}-{config.data.dataset}"
    with open_run_folder(run_dir, name, described, resume=False) as folder:
        program = task.build(config, progress=shown_on(console))
        folder.start()
        records: list[Record] = []
        total = program.steps_before(config.epochs)
        with shown_on(console)(f"epoch 1/{config.epochs}", total) as reporter:

            def on_epoch(record: Record) -> None:
                records.append(record)
                folder.append("metrics.jsonl", record)
                epoch = int(record["epoch"])
                steps = program.steps_before(epoch) - program.steps_before(epoch - 1)
                speed = steps * program.batch_size / record["seconds"]
                reporter.describe(
                    f"epoch {epoch}/{config.epochs} "
                    f"loss {record['train_loss']:.4f} "
                    f"{task.METRIC} {record[f'test_{task.METRIC}']:.4f} "
                    f"{speed:,.0f} images/s"
                )

            fit(
                program,
                jax.random.key(seed),
                config.epochs,
                on_epoch=on_epoch,
                on_steps=reporter.advance,
            )
        seconds = sum(record["seconds"] for record in records)
        folder.write(
            "summary.json",
            {
                **{k: v for k, v in records[-1].items() if k != "seconds"},
                "gradient_evaluations": total * config.optimizer.gradients_per_step,
                "train_seconds": seconds,
                "compile_seconds": program.compile_seconds,
            },
        )
        save_curves(records, task.METRIC, folder.path / "curves.png")
        last = records[-1]
        score = last[f"test_{task.METRIC}"]
        console.print(
            f"{config.data.evaluate_on} {task.METRIC} {score:.4f}, "
            f"loss {last['test_loss']:.4f} after {total} steps in {seconds:.1f} s "
            f"(compiled in {program.compile_seconds:.1f} s); written to {folder.path}",
            highlight=False,
            soft_wrap=True,
        )
    return records
