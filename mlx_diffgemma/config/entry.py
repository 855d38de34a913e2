"""The entry of a setting: its help, default, bounds and options, kept on its dataclass field.

Checks, resolving, the commands' options and the reference page are made from the entries.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A setting's help, default, bounds and options; its name and type are the field's."""

    help: str  # one sentence, for options and the reference
    default: Any = None  # the value where neither user nor checkpoint gives one
    at_least: float | None = None
    above: float | None = None  # exclusive bound
    at_most: float | None = None
    below: float | None = None  # exclusive bound
    all_is: int | None = None  # a value outside the bounds that means "all"
    checkpoint: str | None = None  # its key in generation_config.json, dots between levels
    # The setting without which it has no effect, and the value that it needs.
    only_with: tuple[str, Any] | None = None
    commands: tuple[str, ...] = ()  # commands that have it as an option
    flags: tuple[str, ...] = ()  # of the option, if not made from the name
    command_default: Any = None  # if it differs from the library's
    shown_default: str | None = None  # in words, where `default` does not say it


def setting(entry: Entry, *, is_open: bool = False) -> Any:
    """Return a dataclass field with its entry. An open field is None until it is resolved."""
    return field(default=None if is_open else entry.default, metadata={"entry": entry})


def entries(cls: Any) -> dict[str, Entry]:
    """Return the entry of each setting of a dataclass, in their order."""
    return {f.name: f.metadata["entry"] for f in fields(cls) if "entry" in f.metadata}


@cache
def kinds(cls: Any) -> Mapping[str, Any]:
    """Return the type of each setting's value, without None and type variables."""
    hints = get_type_hints(cls)
    return {name: _without_none(hints[name]) for name in entries(cls)}


def choices(kind: Any) -> tuple[Any, ...]:
    """Return the values of a Literal; () for other types."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def check(settings: Any) -> None:
    """Check the type and bounds of every setting that has a value.

    Raises:
      ConfigError: names the setting, its range and what was given.
    """
    cls: Any = type(settings)
    for f in fields(cls):
        value = getattr(settings, f.name)
        if "entry" in f.metadata and (value is not None or f.default is not None):
            _check_value(f.name, value, f.metadata["entry"], kinds(cls)[f.name])


def _check_value(name: str, value: Any, entry: Entry, kind: Any) -> None:
    if known := choices(kind):
        if value not in known:
            raise ConfigError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    elif kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}")
    elif kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name} must be text, got {value!r}")
    elif get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be an object, got {value!r}")
    elif kind in (int, float):
        if entry.all_is is not None and value == entry.all_is and type(value) is kind:
            return
        low = entry.at_least if entry.above is None else entry.above
        if (
            not isinstance(value, int if kind is int else (int, float))
            or isinstance(value, bool)
            or not abs(value) <= sys.float_info.max  # a whole number may be too large for a float
            or not (-math.inf if low is None else low) <= value
            or value == entry.above
            or not value <= (math.inf if entry.at_most is None else entry.at_most)
            or not value < (math.inf if entry.below is None else entry.below)
        ):
            number = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name} must be {number}{range_of(entry)}, got {value!r}")


def range_of(entry: Entry) -> str:
    """Return the bounds in words, such as " at least 0 and at most 1"; "" without bounds."""
    words = [
        f"{word} {bound}"
        for word, bound in (
            ("at least", entry.at_least),
            ("above", entry.above),
            ("at most", entry.at_most),
            ("below", entry.below),
        )
        if bound is not None
    ]
    text = f" {' and '.join(words)}" if words else ""
    return text if entry.all_is is None else f"{text}, or {entry.all_is} for all"


def _without_none(hint: Any) -> Any:
    kept = [part for part in get_args(hint) if part is not NoneType and type(part) is not TypeVar]
    if get_origin(hint) is Literal or not kept or len(kept) == len(get_args(hint)):
        return hint
    return kept[0]
