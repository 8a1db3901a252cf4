"""Command line: python -m benchmarks COMMAND."""

if __name__ == "__main__":
    from train.signals import listen

    listen()  # before the imports below, which take seconds


from benchmarks.compile import compile
from benchmarks.gpu import gpu
from benchmarks.input import input
from benchmarks.loop import loop
from benchmarks.networks import networks
from benchmarks.speed import speed
from benchmarks.studies.compare import compare
from benchmarks.studies.declared import studies
from benchmarks.studies.pairs import pairs
from benchmarks.transforms import transforms
from train.command_line import choose_command, run_command

_COMMANDS = (
    *(compare, pairs, studies, speed, transforms, input, networks, loop, compile, gpu),
)


def main() -> None:
    """Runs the command line; errors that a user can fix are shown in one line."""
    run_command(
        lambda: choose_command(
            {command.__name__: command for command in _COMMANDS},
            prog="python -m benchmarks",
            description="Measure which techniques help, and what they cost.",
            compile_anew=(
                "speed",
                "networks",
                "loop",
                "compile",
                "gpu",
            ),  # they time compilation
        )
    )


if __name__ == "__main__":
    main()
