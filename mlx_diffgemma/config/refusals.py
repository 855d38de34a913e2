"""Refuses settings of a run that have no effect, or contradict each other or the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from ..errors import ConfigError
from .entry import entries

_COLDEST = 1e-4  # below it, logits / temperature overflow float32


class Sizes(Protocol):
    """The facts about a checkpoint that bound settings."""

    @property
    def canvas_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def refuse_idle(
    given: Any,
    values: Mapping[str, Any],
    policys: Mapping[str, Any],
    left_out: Collection[str] = (),
) -> None:
    """Raise ConfigError for a setting that has no effect.

    Args:
      given: the user's settings, None where they are open.
      values: all values, filled in.
      policys: those that the policy sets.
      left_out: those that it would set elsewhere; what goes with them is not idle there.
    """
    for name, entry in entries(type(given)).items():
        if entry.only_with is None or getattr(given, name) is None:
            continue
        other, wanted = entry.only_with
        if other in left_out and getattr(given, other) is None:
            continue
        if values[other] != wanted:
            is_policys = getattr(given, other) is None and other in policys
            which = f", which policy {values['policy']!r} sets" * is_policys
            raise ConfigError(
                f"{name} has no effect with {other} {values[other]!r}{which}, only with {wanted!r}"
            )


def refuse_contradictions(
    values: Mapping[str, Any], extra: tuple[int, ...], checkpoint: Sizes
) -> None:
    """Raise ConfigError for values that contradict each other or the checkpoint."""
    vocab_size, canvas_length = checkpoint.vocab_size, values["canvas_length"]
    t_min, t_max, temperature = values["t_min"], values["t_max"], values["temperature"]
    if canvas_length > checkpoint.canvas_length:
        raise ConfigError(
            f"canvas_length {canvas_length} is longer than "
            f"the checkpoint's {checkpoint.canvas_length}"
        )
    if t_min > t_max:
        raise ConfigError(
            f"t_min {t_min} is above t_max {t_max}; the temperature falls from t_max to t_min"
        )
    if temperature and temperature * t_min < _COLDEST:
        raise ConfigError(
            f"temperature {temperature} times t_min {t_min} is below {_COLDEST}; "
            "0 is the greedy limit"
        )
    for name in ("top_candidates", "sparse_tokens"):
        if values[name] > vocab_size:
            raise ConfigError(
                f"{name} {values[name]} is more than the {vocab_size} tokens there are"
            )
    if (values["canvas_width"], values["stop_on"]) == ("answer", "canvas"):
        raise ConfigError(
            "canvas_width 'answer' drops what stop_on 'canvas' waits for; "
            "stop_on must be 'answer' too"
        )
    if values["warm_read"] and not values["warm_start"]:
        raise ConfigError("warm_read has no effect without warm_start; it must be 0 then")
    if bad := [t for t in extra if not isinstance(t, int) or not 0 <= t < vocab_size]:
        raise ConfigError(f"extra end tokens {bad} are outside the vocabulary of {vocab_size}")
