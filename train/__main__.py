"""The command line, `python -m train TASK`."""

if __name__ == "__main__":
    from train.signals import listen

    listen()  # before the imports below, which take seconds

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.command_line import choose_command, run_command
from train.config import TrainingConfig
from train.errors import UsageError
from train.optim.chain import PLACES
from train.optim.config import OPTIMIZERS
from train.optim.schedules import SCHEDULES
from train.optim.techniques import TECHNIQUES
from train.processes import start_distributed
from train.progress import make_console
from train.run import run
from train.settings import Choice
from train.tasks import TASKS
from train.tasks.recipes import RECIPES


def _command(kind: type[TrainingConfig], chosen: str | None) -> Callable[..., None]:
    """Makes the command of a task, with the defaults of the chosen recipe."""
    recipes = {name: make() for name, make in RECIPES.items()}
    recipes = {name: config for name, config in recipes.items() if type(config) is kind}
    default = recipes[chosen] if chosen in recipes else kind()

    def command(
        config: Annotated[Any, tyro.conf.OmitArgPrefixes] = default,
        recipe: Annotated[str, Choice("recipe", recipes)] | None = None,
        run_dir: Path | None = None,
        resume: Literal["auto", "never"] = "auto",
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> None:
        """Train.

        Args:
          config: settings of the training.
          recipe: settings of a paper to start from, which other flags override;
            `python -m train recipes` lists them.
          run_dir: folder for metrics, checkpoints and figures; a new one under runs/ if
            unset.
          resume: auto continues the run in the folder if its settings are the same;
            never refuses a folder with a run.
          coordinator: HOST:PORT of the first process, if several train together; not
            needed with SLURM, Open MPI and on TPUs.
          num_processes: number of processes that train together.
          process_id: number of this process, counted from 0.
        """
        del recipe  # its settings are the defaults of the config
        start_distributed(
            coordinator, num_processes, process_id, show=make_console().print
        )
        run(config, run_dir=run_dir, resume=resume == "auto")

    command.__annotations__["config"] = Annotated[kind, tyro.conf.OmitArgPrefixes]
    command.__name__ = kind.task
    summary = (kind.__doc__ or "").splitlines()[0]
    command.__doc__ = (command.__doc__ or "").replace("Train.", summary)
    return command


def _techniques() -> None:
    """List the values of --techniques, --optimizer and --schedule."""
    techniques = {
        name: f"{row.title} ({row.paper}): {row.idea}"
        for name, row in TECHNIQUES.items()
    }
    for flag, listed in (
        ("--techniques NAME,NAME,..., in the order of the chain", techniques),
        ("places that --techniques can also name", PLACES),
        ("--optimizer", OPTIMIZERS),
        ("--schedule", SCHEDULES),
    ):
        print(flag)
        for name, description in listed.items():
            print(f"  {name:22} {description}")


def _recipes() -> None:
    """List the recipes, which are settings of papers, for --recipe."""
    for name, make in RECIPES.items():
        line, _, rest = (make.__doc__ or "").strip().partition("\n")
        print(f"{name}\n  {line}")
        for more in rest.strip().splitlines():
            print(f"  {more.strip()}".rstrip())


def _export(run: Path, output: Path | None = None, seed: int | None = None) -> None:
    """Save the weights of a run as safetensors, for torchvision, timm or --weights.

    Args:
      run: folder of the run; its last checkpoint is read.
      output: file to write; weights.safetensors in the run folder if unset. If
        there are several networks, each has its own file with its name in the name.
      seed: seed whose weights are saved; the first one if unset.
    """
    from train import predict

    console = make_console()
    predict.export(predict.load_run(run, seed, console), output, console)


def _predict(
    run: Path,
    images: tuple[Path, ...],
    output: Path | None = None,
    seed: int | None = None,
) -> None:
    """Classify, segment or translate image files with the networks of a run.

    Args:
      run: folder of the run; its last checkpoint is read.
      images: files, or folders of them; nothing is predicted if one has no image.
      output: folder for the results; predictions in the run folder if unset.
      seed: seed whose networks predict; the first one if unset.
    """
    from train import predict

    if not images:
        raise UsageError("name the image files, or folders of them, to predict")
    console = make_console()
    predict.predict(predict.load_run(run, seed, console), images, output, console)


def _compare(
    runs: tuple[Path, ...],
    labels: tuple[str, ...] = (),
    count: int = 6,
    output: Path | None = None,
) -> None:
    """Draw the predictions of several runs for the same examples, side by side.

    Args:
      runs: folders of runs of one task on one dataset.
      labels: a label for each run; the names of the folders if unset.
      count: number of examples to draw from the evaluation split.
      output: PNG file to write; comparison.png beside the first run if unset.
    """
    from train import predict

    if not runs:
        raise UsageError("name the folders of the runs to compare")
    if labels and len(labels) != len(runs):
        raise UsageError(f"labels must name all {len(runs)} runs, got {len(labels)}")
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    console = make_console()
    loaded = [predict.load_run(run, None, console) for run in runs]
    labels = labels or tuple(run.absolute().name for run in runs)
    console.print(f"written: {predict.compare(loaded, labels, count, output)}")


def _commands(arguments: list[str]) -> dict[str, Callable[..., None]]:
    recipe = _chosen_recipe(arguments)
    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    return {
        **{name: _command(task.config_type, recipe) for name, task in TASKS.items()},
        "predict": positional(_predict),
        "compare": positional(_compare),
        "export": positional(_export),
        "recipes": _recipes,
        "techniques": _techniques,
    }


_AFTER_COMMANDS = """
examples:
  python -m train classification --techniques centralize --run-dir runs/first
  python -m train predict runs/first photo.png
  python -m train segmentation --dataset digit_scenes --epochs 2
  python -m train classification --help

other command lines:
  python -m train.data  prepare datasets and show what they hold
  python -m benchmarks  compare techniques, and measure what they cost
"""


def _chosen_recipe(arguments: list[str]) -> str | None:
    """Returns the value of --recipe, which determines the defaults of other flags."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        if flag == "--recipe":
            return value
        if flag.startswith("--recipe="):
            return flag.partition("=")[2]
    return None


def main() -> None:
    """Runs the command line."""
    run_command(
        lambda: choose_command(
            _commands(sys.argv[1:]),
            prog="python -m train",
            description="Train networks with the techniques.",
            epilog=_AFTER_COMMANDS,
        )
    )


if __name__ == "__main__":
    main()
