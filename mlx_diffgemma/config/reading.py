"""Functions that read JSON files and check single values in them."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Raw = Mapping[str, Any]

LARGEST = 2**31 - 1  # dimension that MLX can count


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
      ConfigError: if the file cannot be read, is not JSON, or holds no object; it names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless digits or nesting
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def warn_unknown(raw: Raw, known: set[str] | frozenset[str], where: str) -> None:
    """Name all unknown keys in one warning."""
    if unknown := sorted(set(raw) - known):
        warnings.warn(f"{where}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=2)


def integer(raw: Raw, key: str, where: str) -> int:
    """Return a dimension: a whole number of at least 1."""
    value = raw.get(key)
    if value is None:
        raise ConfigError(f"{where}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {key} must be a whole number of at least 1, got {value!r}")
    if value > LARGEST:
        raise ConfigError(f"{where}: {key} is {value}, more than the {LARGEST} that MLX can count")
    return value


def positive(raw: Raw, key: str, where: str, default: float) -> float:
    """Return a finite number above 0."""
    value = raw.get(key, default)
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not 0 < value <= sys.float_info.max
    ):
        raise ConfigError(f"{where}: {key} must be a number above 0, got {value!r}")
    return float(value)


def refuse_unless(
    raw: Raw, key: str, allowed: tuple[Any, ...], where: str, *, default: Any
) -> None:
    """Raise ConfigError for an unsupported value."""
    value = raw.get(key, default)
    if value not in allowed:
        raise ConfigError(
            f"{where}: {key} is {value!r}; only {' or '.join(map(repr, allowed))} is supported"
        )


def refuse_other_tokens(token: Any, vocab_size: int, where: str) -> None:
    """Raise ConfigError for a value that is not a token id of the vocabulary."""
    if not (isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size):
        raise ConfigError(f"{where} {token!r} is outside the vocabulary of {vocab_size}")
