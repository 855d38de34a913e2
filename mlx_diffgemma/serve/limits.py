"""Checks of requests against the server's bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from ..config.serving import Limits
from .errors import ApiError, refused


def check_length(things: Sized | None, most: int, param: str) -> None:
    """Refuse a list that is too long.

    Raises:
      ApiError: names the field and the bound.
    """
    if things is not None and len(things) > most:
        raise _too_much(param, f"{len(things)} entries", f"{most}")


def check_choices(limits: Limits, count: int, param: str = "n") -> None:
    """Refuse too many answers to one request.

    Raises:
      ApiError: as `check_length`.
    """
    if count > limits.max_choices:
        raise ApiError(
            400, f"{param} is {count}; this server gives at most {limits.max_choices}", param=param
        )


def check_stops(limits: Limits, stops: Sequence[str], param: str = "stop") -> tuple[str, ...]:
    """Return stop strings; refuse too many, and long or empty ones.

    Raises:
      ApiError: as `check_length`.
    """
    check_length(stops, limits.max_stops, param)
    for stop in stops:
        if not 1 <= len(stop) <= limits.max_stop_characters:
            most = f"1 to {limits.max_stop_characters}"
            raise _too_much(param, f"a string of {len(stop)} characters", most)
    return tuple(stops)


def check_schema(limits: Limits, schema: Any, param: str) -> None:
    """Refuse a JSON Schema, or texts, that are too large or too deep.

    `unevaluatedProperties` beside `patternProperties` is refused too: there `jsonschema`, which
    checks answers, searches for expressions with Python's `re`, which may take forever.

    Raises:
      ApiError: as `check_length`.
    """
    depth, level = 0, [schema]
    while level:
        depth += 1
        if depth > limits.max_schema_depth:
            raise _too_much(param, "deeper levels", f"{limits.max_schema_depth} levels")
        level = [inner for value in level for inner in _inside(value)]
    names = set(keys_of(schema))
    if {"patternProperties", "unevaluatedProperties"} <= names:
        raise refused(param, "unevaluatedProperties beside patternProperties")
    if (size := _characters(schema)) > limits.max_schema_bytes:
        raise _too_much(param, f"{size} characters", f"{limits.max_schema_bytes}")


def _too_much(param: str, what: str, most: str) -> ApiError:
    return ApiError(400, f"{param} has {what}; this server takes {most}", param=param)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def keys_of(schema: Any) -> Iterator[str]:
    """Yield every key within a JSON value, however deep."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each
        waiting += _inside(each)


def _characters(value: Any) -> int:
    """Return about how many characters a JSON value has, without writing it."""
    total, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        total += len(each) if isinstance(each, str) else 2
        if isinstance(each, dict):
            total += sum(map(len, each))
        waiting += _inside(each)
    return total
