"""The schedule of a training run's learning rate: names, as mlx-lm has them, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

# Of `mlx.optimizers.schedulers`: fewest and most arguments.
SCHEDULES = {
    "cosine_decay": (2, 3),
    "exponential_decay": (2, 2),
    "linear_schedule": (3, 3),
    "step_decay": (3, 3),
}


def check_schedule(schedule: Mapping[str, Any]) -> None:
    """Check the value of `lr_schedule`.

    Raises:
      ConfigError: if it is no schedule.
    """
    if unknown := sorted(set(schedule) - {"name", "arguments", "warmup", "warmup_init"}):
        raise ConfigError(f"lr_schedule: unknown keys {', '.join(map(str, unknown))}")
    if schedule.get("name") not in SCHEDULES:
        raise ConfigError(
            f"lr_schedule: name must be one of {', '.join(SCHEDULES)}, got {schedule.get('name')!r}"
        )
    arguments = schedule.get("arguments")
    if not isinstance(arguments, (list, tuple)) or not all(map(_is_number, arguments)):
        raise ConfigError(f"lr_schedule: arguments must be a list of numbers, got {arguments!r}")
    least, most = SCHEDULES[schedule["name"]]
    if not least <= len(arguments) <= most:
        raise ConfigError(
            f"lr_schedule: {schedule['name']} takes {least} to {most} arguments, "
            f"got {len(arguments)}"
        )
    for key in ("warmup", "warmup_init"):
        if key in schedule and not (_is_number(schedule[key]) and schedule[key] >= 0):
            raise ConfigError(f"lr_schedule: {key} must be >= 0, got {schedule[key]!r}")
    if not isinstance(schedule.get("warmup", 0), int):
        raise ConfigError(f"lr_schedule: warmup must be a whole number, got {schedule['warmup']!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
