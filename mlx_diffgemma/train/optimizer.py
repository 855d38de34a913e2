"""Settings -> optimizer and schedule; mlx's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from ..errors import ConfigError
from ..recipe import TrainSettings

_KINDS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer of a run.

    Raises:
      ConfigError: if it does not take what `optimizer_config` gives it.
    """
    rate: float | Callable[[mx.array], mx.array] = settings.learning_rate
    if settings.lr_schedule is not None:
        try:
            rate = build_schedule(dict(settings.lr_schedule))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lr_schedule: {error}") from error
    config: Any = settings.optimizer_config or {}
    arguments = config.get(settings.optimizer) or {}
    try:
        return _KINDS[settings.optimizer](learning_rate=rate, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_config: {settings.optimizer}: {error}") from error
