"""What the command lines share: commands, flags, paths, and how they end."""

import contextlib
import functools
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax
import tyro

from train.compilation_cache import keep_compiled_programs
from train.cpu import set_up_cpu
from train.errors import NonFiniteLossError, UsageError, see
from train.names import did_you_mean, printable
from train.settings import refuse, unknown_name, wrong_settings_exit
from train.signals import StoppedError

# Every command has it, so it is not among the parameters of any.
_NO_CACHE = "--no-compilation-cache"


def run_command(command: Callable[[], object]) -> None:
    """Runs a command, and shows errors that a user can fix in one line.

    Args:
      command: parses `sys.argv` and does the work.
    """
    sys.argv[1:] = map(_with_home, sys.argv[1:])
    set_up_cpu()
    try:
        with wrong_settings_exit():
            command()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `python -m train recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, NonFiniteLossError, OSError) as error:
        _fail(f"error: {error}")
    except StoppedError as error:  # and so have the other processes
        print(printable(str(error)), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(
                "error: the device is out of memory: choose a smaller --batch-size, or "
                "split batches into parts with --grad-accum 2 or more"
                + see("training.md#when-something-happens")
            )
        if jax.distributed.is_initialized():
            time.sleep(2)  # if another process has ended, a better error ends this one
            _fail(traceback.format_exc())
        raise


def choose_command(
    commands: Mapping[str, Callable[..., None]],
    *,
    prog: str,
    description: str,
    epilog: str = "",
    compile_anew: Collection[str] = (),
) -> None:
    """Runs the command that the first argument names, or lists all of them.

    To be called by `run_command`.

    Args:
      commands: functions by name, whose parameters tyro turns into flags.
      prog: how the program is called.
      description: what it does, in a line.
      epilog: what is shown below the list of commands.
      compile_anew: names of the commands that never keep compiled programs.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND ...\n\n{description}\n\ncommands:")
        for each, command in commands.items():
            summary = (command.__doc__ or "").strip().splitlines()[0]
            print(f"  {each:15} {summary}")
        print(f"\nany command:\n  {_NO_CACHE}  compile anew, and keep no programs")
        print(epilog.rstrip())
        return
    if name.startswith("-"):
        refuse(UsageError(f"name a command before {name}: {', '.join(commands)}"))
    if name not in commands:
        refuse(unknown_name("command", name, commands))
    command, prog = commands[name], f"{prog} {name}"

    # Called when all arguments are known, as a misspelt flag must not be ignored.
    @functools.wraps(command)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    call, unknown = tyro.cli(
        parsed, prog=prog, args=arguments, return_unknown_args=True
    )
    if _NO_CACHE in unknown:
        unknown.remove(_NO_CACHE)
    elif name not in compile_anew:
        keep_compiled_programs()
    if unknown:
        known = [*_flags_of(command), _NO_CACHE]
        refuse(_unknown_arguments(unknown, known, prog))
    call()


def _unknown_arguments(
    unknown: Sequence[str], known: Sequence[str], prog: str
) -> UsageError:
    """Returns the error for arguments that a command does not have."""
    flags = [x.partition("=")[0] for x in unknown if x.startswith("-")]
    problems = [f"unknown flag {x}; {did_you_mean(x, known)}" for x in flags]
    said = "".join(problems) or f"unexpected argument {unknown[0]!r}; "
    return UsageError(f"{said}`{prog} --help` lists all")


def _flags_of(command: Callable[..., None]) -> list[str]:
    """Returns the flags that the help of a command lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"])
    return re.findall(r"(?:^|│|,)\s+(--[a-z][a-z0-9-]*)", printed.getvalue(), re.M)


def _with_home(argument: str) -> str:
    """Expands the ~ of --flag=~/folder, which shells leave as it is.

    >>> _with_home("--run-dir=~/runs/a") == "--run-dir=" + _with_home("~/runs/a")
    True
    >>> _with_home("--techniques=decay"), _with_home("a=~b")
    ('--techniques=decay', 'a=~b')
    """
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return os.path.expanduser(argument)
    return flag + equals + os.path.expanduser(value)


def _fail(message: str) -> NoReturn:
    """Prints an error and ends the process.

    One of several processes ends at once. Otherwise JAX would wait for the others for
    minutes, while they wait for this one.
    """
    if jax.distributed.is_initialized():
        print(printable(message), file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(printable(message))
