"""Command line: python -m benchmarks COMMAND."""

import sys

from tyro.extras import SubcommandApp

from benchmarks.compare import compare
from benchmarks.input import input
from benchmarks.loop import loop
from benchmarks.networks import networks
from benchmarks.transforms import transforms
from train.errors import UsageError
from train.settings import wrong_settings_exit

app = SubcommandApp()
app.command(compare)
app.command(transforms)
app.command(input)
app.command(networks)
app.command(loop)


def main() -> None:
    """Runs the command line; errors that a user can fix are shown in one line."""
    try:
        with wrong_settings_exit():
            app.cli(
                prog="python -m benchmarks",
                description="Measure which techniques help, and what they cost.",
                args=sys.argv[1:] or ["--help"],
            )
    except (UsageError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
