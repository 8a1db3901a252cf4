"""Settings as frozen dataclasses that check their fields when they are made.

Pydantic checks types, literals and ranges, whether the values come from Python, from
the command line or from a file. An error is reported in one line. Values are not
converted to another type, so neither "3" nor True is accepted as an integer. There are
three exceptions: integers are accepted as floats, lists as tuples and strings as paths.

>>> from typing import Literal
>>> @settings
... class Config:
...     epochs: Positive[int] = 20
...     precision: Literal["float32", "bfloat16"] = "float32"
>>> Config(precision="bf16")
Traceback (most recent call last):
train.errors.UsageError: precision must be 'float32' or 'bfloat16', got 'bf16'
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast, dataclass_transform

import pydantic
import pydantic.dataclasses
from pydantic_core import core_schema
from tyro.constructors import PrimitiveConstructorSpec

from train.errors import UsageError
from train.names import did_you_mean

T = TypeVar("T")
Number = TypeVar("Number", int, float)

_FINITE = pydantic.Field(allow_inf_nan=False)
Finite = Annotated[Number, _FINITE]
"""A number that is neither infinite nor NaN."""
Positive = Annotated[Number, pydantic.Field(gt=0), _FINITE]
"""A finite number above 0."""
NonNegative = Annotated[Number, pydantic.Field(ge=0), _FINITE]
"""A finite number of at least 0."""
Fraction = Annotated[Number, pydantic.Field(ge=0, lt=1), _FINITE]
"""A number in [0, 1)."""
AnyPath = Annotated[Path, pydantic.Field(strict=False)]
"""A path, or a string that names one."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes a class a frozen, keyword-only dataclass whose fields are checked.

    The constructor raises `UsageError`, a `ValueError`, if a value is not allowed. The
    message names the setting, its value and what is allowed. `dataclasses.replace` and
    `from_json` also check the fields.
    """
    checked: Any = pydantic.dataclasses.dataclass(
        frozen=True,
        kw_only=True,
        slots=True,
        config=pydantic.ConfigDict(
            strict=True, extra="forbid", arbitrary_types_allowed=True
        ),
    )(cls)
    construct = checked.__init__

    @functools.wraps(construct)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            construct(self, **values)
        except pydantic.ValidationError as error:
            refuse(UsageError(_explain(error)))

    checked.__init__ = __init__
    return cast(type[T], checked)


@contextlib.contextmanager
def wrong_settings_exit() -> Iterator[None]:
    """Makes a wrong setting end the process with one line and exit code 2.

    This is for command lines, where tyro makes the configs. Without it, tyro would show
    the error in a box, under other names.
    """
    token = _exits.set(True)
    try:
        yield
    finally:
        _exits.reset(token)


_exits = contextvars.ContextVar("_exits", default=False)


def refuse(error: UsageError) -> NoReturn:
    """Raises an error, or ends the process within `wrong_settings_exit`."""
    if _exits.get():
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    raise error from None


def from_json(kind: type[T], content: Mapping[str, Any]) -> T:
    """Makes settings from JSON that was written from `dataclasses.asdict`.

    >>> import dataclasses, json
    >>> from train.config import TrainingConfig
    >>> config = TrainingConfig(epochs=3, seeds=2)
    >>> from_json(TrainingConfig, json.loads(json.dumps(dataclasses.asdict(config)))
    ...     ) == config
    True

    Args:
      kind: the class of the settings.
      content: the settings by name, as `json.loads` returns them.

    Raises:
      UsageError: if a setting is missing, unknown or not allowed.
    """
    try:
        # From JSON text, pydantic accepts a list as a tuple and a dict as a config.
        config = pydantic.TypeAdapter(kind).validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        raise UsageError(_explain(error)) from None
    missing = set(_names(dataclasses.asdict(config))) - set(_names(content))  # type: ignore[call-overload]
    if missing:
        raise UsageError(f"settings are missing: {', '.join(sorted(missing))}")
    return config


def _names(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all settings that are not nested configs."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explain(error: pydantic.ValidationError) -> str:
    """Describes all problems in one line."""
    return "; ".join(map(_explain_one, error.errors()))


def _explain_one(problem: Any) -> str:
    if problem["type"] == "value_error":  # raised by the settings' own checks
        return str(problem["ctx"]["error"])
    name = ".".join(map(str, problem["loc"])) or "config"
    if problem["type"] == "unexpected_keyword_argument":
        return f"there is no setting {name!r}"
    message = problem["msg"]
    if message.startswith("Input should be "):
        allowed = message.replace("Input should be", "must be")
    else:
        allowed = f"is not allowed: {message}"
    return f"{name} {allowed}, got {problem['input']!r}"


class Choice(PrimitiveConstructorSpec[str]):
    """Annotates a setting that is one of several names.

    >>> @settings
    ... class Config:
    ...     optimizer: Annotated[str, Choice("optimizer", ("sgd", "adam"))] = "sgd"
    >>> Config(optimizer="ad")
    Traceback (most recent call last):
    train.errors.UsageError: unknown optimizer 'ad'; did you mean adam? known: sgd, adam
    """

    def __init__(self, what: str, known: Iterable[str]):
        """Makes the annotation.

        Args:
          what: the kind of thing that is named, for error messages.
          known: the names that are allowed.
        """
        names = {name: name for name in known}
        super().__init__(
            nargs=1,
            metavar="{" + ",".join(names) + "}",
            instance_from_str=lambda arguments: parse(arguments[0]),
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
        )

        def check(name: str) -> str:
            return _check_name(what, name, names)

        def parse(name: str) -> str:
            try:
                return check(name)
            except UsageError as error:
                refuse(error)

        object.__setattr__(self, "_check", check)  # the base class is frozen

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Checks the name after the type."""
        schema = handler(source)
        return core_schema.no_info_after_validator_function(self._check, schema)  # type: ignore[attr-defined]


class Separated(PrimitiveConstructorSpec[tuple[T, ...]]):
    """Annotates a tuple whose values are separated by spaces or commas."""

    def __init__(self, kind: type[T]):
        """Makes the annotation.

        Args:
          kind: the type of a value, which is made from its text.
        """
        unit = "NAME" if kind is str else kind.__name__.upper()
        super().__init__(
            nargs="*",
            metavar=f"[{unit} ...]",
            instance_from_str=lambda texts: tuple(map(kind, _split(texts))),
            is_instance=lambda values: isinstance(values, tuple),
            str_from_instance=lambda values: [*map(str, values)],
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Accepts a list as a tuple."""
        return handler(source) | {"strict": False}


class NameList(Separated[str]):
    """Annotates a tuple of known names, separated by spaces or commas."""

    def __init__(self, what: str, known: Mapping[str, str]):
        """Makes the annotation.

        Args:
          what: the kind of thing that is named, for error messages.
          known: a description of each name that is allowed, which may be empty.
        """
        super().__init__(str)
        shown = {
            name: f"{name} ({text})" if text else name for name, text in known.items()
        }

        def check(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(_check_name(what, name, shown) for name in names)

        object.__setattr__(self, "_check", check)  # the base class is frozen

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Checks the names after the type."""
        schema = super().__get_pydantic_core_schema__(source, handler)
        return core_schema.no_info_after_validator_function(self._check, schema)  # type: ignore[attr-defined]


def _split(texts: list[str]) -> list[str]:
    values = (value.strip() for text in texts for value in text.split(","))
    return [*filter(None, values)]


def _check_name(what: str, name: str, known: Mapping[str, str]) -> str:
    if name not in known:
        raise unknown_name(what, name, known, known.values())
    return name


def unknown_name(
    what: str, name: str, known: Iterable[str], shown: Iterable[str] | None = None
) -> UsageError:
    """Returns the error for a name that is not known, which suggests similar ones.

    >>> str(unknown_name("color", "gren", ["green", "blue"]))
    "unknown color 'gren'; did you mean green? known: green, blue"

    Args:
      what: the kind of thing that is named.
      name: the name.
      known: the names that are known.
      shown: how the message shows each of them; the names if unset.
    """
    known = list(known)
    shown = known if shown is None else list(shown)
    listed = ("; " if any("(" in text for text in shown) else ", ").join(shown)
    guess = did_you_mean(name, known)
    return UsageError(f"unknown {what} {name!r}; {guess}known: {listed}")
