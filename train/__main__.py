"""Command line: python -m train TASK."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from tyro.extras import SubcommandApp

from train.config import TrainingConfig
from train.devices import start_distributed
from train.errors import UsageError
from train.loop import NonFiniteLossError
from train.preemption import EXIT_CODE, PreemptedError
from train.recipes import RECIPES
from train.tasks import classification, segmentation, translation

_TASKS = (
    (classification, classification.ClassificationConfig),
    (segmentation, segmentation.SegmentationConfig),
    (translation, translation.TranslationConfig),
)


def _command(
    module: types.ModuleType, kind: type[TrainingConfig], chosen: str | None
) -> Callable[..., None]:
    """The command of a task, whose defaults are those of the chosen recipe."""
    recipes = {name: make() for name, make in RECIPES.items()}
    recipes = {name: found for name, found in recipes.items() if type(found) is kind}
    names = tyro.extras.literal_type_from_choices(recipes)

    def command(
        config: Annotated[kind, tyro.conf.OmitArgPrefixes] = recipes.get(
            chosen, kind()
        ),
        recipe: names | None = None,
        run_dir: Path | None = None,
        resume: Literal["auto", "never"] = "auto",
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> None:
        """Train.

        Args:
          config: what is trained, and by what.
          recipe: settings to start from, which other flags change; `python -m train
            recipes` lists them.
          run_dir: folder of metrics, checkpoints and figures; a new one under runs/ if
            unset.
          resume: auto goes on with the run in the folder if it is of the same config.
          coordinator: HOST:PORT of the first of several processes; SLURM, Open MPI and
            TPUs tell by themselves.
          num_processes: how many there are.
          process_id: which this one is, from 0.
        """
        from train import run

        del recipe  # its settings are in the config already
        start_distributed(coordinator, num_processes, process_id)
        run.train(
            module,
            config,
            run_dir=run_dir,
            resume=resume == "auto",
            console=Console(quiet=jax.process_index() > 0),
        )

    command.__name__ = module.NAME
    command.__doc__ = command.__doc__.replace("Train.", kind.__doc__.splitlines()[0])
    return command


def _tricks() -> None:
    """List the techniques that --tricks takes, and the optimizers."""
    from train.optimizers import OPTIMIZERS
    from train.tricks import TRICKS

    for title, listed in (("--tricks", TRICKS), ("--optimizer", OPTIMIZERS)):
        print(title)
        for name, description in listed.items():
            print(f"  {name:18} {description}")


def _recipes() -> None:
    """List the settings of papers that --recipe takes."""
    for name, make in RECIPES.items():
        line, _, rest = make.__doc__.strip().partition("\n")
        print(f"{name}\n  {line}")
        for more in rest.strip().splitlines():
            print(f"  {more.strip()}".rstrip())


def _make_app(arguments: list[str]) -> SubcommandApp:
    chosen = None
    for flag, value in zip(arguments, [*arguments[1:], None], strict=True):
        if flag == "--recipe":
            chosen = value
        elif flag.startswith("--recipe="):
            chosen = flag.partition("=")[2]
    app = SubcommandApp()
    for module, kind in _TASKS:
        app.command(_command(module, kind, chosen), name=module.NAME)
    app.command(_recipes, name="recipes")
    app.command(_tricks, name="tricks")
    return app


def main() -> None:
    """Runs the command line; errors a user can mend are one line, without a trace."""
    try:
        _make_app(sys.argv[1:]).cli(
            prog="python -m train", description="Train networks with the tricks."
        )
    except (UsageError, NonFiniteLossError, OSError) as error:
        sys.exit(f"error: {error}")
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            "error: the device is out of memory: choose a smaller --batch-size, or cut "
            "batches into parts by --accumulate 2 or more"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
