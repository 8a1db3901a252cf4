"""Command line: python -m train TASK."""

import os
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import jax
import tyro
from tyro.extras import SubcommandApp

from train.config import TrainingConfig
from train.parallel import start_distributed
from train.errors import UsageError
from train.loop import NonFiniteLossError
from train.optimizers import OPTIMIZERS, PLACES, SCHEDULES, TRICKS
from train.preemption import EXIT_CODE, PreemptedError
from train.progress import make_console
from train.recipes import RECIPES
from train.tasks import TASKS


def _command(
    module: types.ModuleType, kind: type[TrainingConfig], chosen: str | None
) -> Callable[..., None]:
    """The command of a task, whose defaults are those of the chosen recipe."""
    recipes = {name: make() for name, make in RECIPES.items()}
    recipes = {name: found for name, found in recipes.items() if type(found) is kind}
    names = tyro.extras.literal_type_from_choices(recipes)
    default = recipes[chosen] if chosen in recipes else kind()

    def command(
        config: Annotated[kind, tyro.conf.OmitArgPrefixes] = default,
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
            console=make_console(quiet=jax.process_index() > 0),
        )

    command.__name__ = module.NAME
    command.__doc__ = command.__doc__.replace("Train.", kind.__doc__.splitlines()[0])
    return command


def _tricks() -> None:
    """List the techniques and places that --tricks takes, optimizers and schedules."""
    for flag, listed in (
        ("--tricks NAME,NAME,..., in the order of the chain", TRICKS),
        ("places that --tricks may name too", PLACES),
        ("--optimizer", OPTIMIZERS),
        ("--schedule", SCHEDULES),
    ):
        print(flag)
        for name, description in listed.items():
            print(f"  {name:18} {description}")


def _recipes() -> None:
    """List the settings of papers that --recipe takes."""
    for name, make in RECIPES.items():
        line, _, rest = make.__doc__.strip().partition("\n")
        print(f"{name}\n  {line}")
        for more in rest.strip().splitlines():
            print(f"  {more.strip()}".rstrip())


def _export(run: Path, output: Path | None = None, seed: int | None = None) -> None:
    """Write the weights of a run as safetensors, for torchvision, timm or --weights.

    Args:
      run: folder of the run; its last checkpoint is read.
      output: file to write; weights.safetensors in the run folder if unset. The name
        of the network is added where there are several.
      seed: whose weights, of several; the first if unset.
    """
    from train import trained

    console = make_console()
    trained.export(trained.open_trained(run, seed, console), output, console)


def _predict(
    run: Path,
    images: tuple[Path, ...],
    output: Path | None = None,
    seed: int | None = None,
) -> None:
    """Classify, segment or translate image files with the networks of a run.

    Args:
      run: folder of the run; its last checkpoint is read.
      images: files, or folders of them.
      output: folder for what is made of them; predictions in the run folder if unset.
      seed: whose networks, of several; the first if unset.
    """
    from train import trained

    console = make_console()
    found = trained.open_trained(run, seed, console)
    trained.predict(found, images, output, console)


def _samples(
    runs: tuple[Path, ...],
    labels: tuple[str, ...] = (),
    count: int = 6,
    output: Path = Path("samples.png"),
) -> None:
    """Lay what several runs make of the same examples side by side in one picture.

    Args:
      runs: folders of runs of one task on one dataset.
      labels: what to call each of them; their folders' names if unset.
      count: examples of the evaluation split to show.
      output: PNG file to write.
    """
    from train import trained

    if labels and len(labels) != len(runs):
        raise UsageError(f"{len(runs)} runs need as many labels, got {len(labels)}")
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    console = make_console()
    found = [trained.open_trained(run, None, console) for run in runs]
    trained.samples(found, labels or [run.name for run in runs], count, output)
    console.print(f"written: {output}")


def _make_app(arguments: list[str]) -> SubcommandApp:
    chosen = None
    for flag, value in zip(arguments, [*arguments[1:], None], strict=True):
        if flag == "--recipe":
            chosen = value
        elif flag.startswith("--recipe="):
            chosen = flag.partition("=")[2]
    app = SubcommandApp()
    for module, kind in TASKS.values():
        app.command(_command(module, kind, chosen), name=module.NAME)
    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    app.command(positional(_predict), name="predict")
    app.command(positional(_samples), name="samples")
    app.command(positional(_export), name="export")
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
        _fail(f"error: {error}")
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(
                "error: the device is out of memory: choose a smaller --batch-size, or "
                "cut batches into parts by --accumulate 2 or more"
            )
        if jax.distributed.is_initialized():
            _fail(traceback.format_exc())
        raise


def _fail(message: str) -> NoReturn:
    """Ends the process.

    One of several does so at once: JAX would wait for the others to end, for minutes,
    and they for this one.
    """
    if jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(message)


if __name__ == "__main__":
    main()
