"""Command line: python -m train TASK."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.extras import SubcommandApp

from train.errors import UsageError
from train.loop import NonFiniteLossError
from train.tasks.classification import ClassificationConfig

app = SubcommandApp()


@app.command
def classification(
    config: Annotated[ClassificationConfig, tyro.conf.OmitArgPrefixes],
    seed: int = 0,
    run_dir: Path | None = None,
) -> None:
    """Train a network to tell the classes of images.

    Args:
      config: what is trained, and by what.
      seed: decides parameters, order of images and random tricks.
      run_dir: folder for metrics, figure and summary; a new one under runs/ if unset.
    """
    from train import run
    from train.tasks import classification as task

    run.train(task, config, seed=seed, run_dir=run_dir, console=Console())


@app.command
def tricks() -> None:
    """List the techniques that --tricks takes."""
    from train.optimizers import TRICKS

    for name, description in TRICKS.items():
        print(f"{name:18} {description}")


def main() -> None:
    """Runs the command line; errors a user can mend are one line, without a trace."""
    try:
        app.cli(prog="python -m train", description="Train networks with the tricks.")
    except (UsageError, NonFiniteLossError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
