"""The optimizer and the learning rate's schedule of a run, from mlx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..config.training import TrainSettings
from ..errors import ConfigError

Rate = float | Callable[[mx.array], mx.array]

_KINDS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
# Of the learning rate, for weights that Muon does not train.
_REST_SCALE = 0.1


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """Return the optimizer of a run.

    Muon makes the update of a matrix orthogonal, which does not suit vectors, tables, routers and
    stacks of experts: these get AdamW, with the arguments of `adamw` and `learning_rate_scale`
    (0.1) of the learning rate. MLX's Muon adds its weight decay to the gradient before that, so it
    would dominate the update where a gradient is small: here it is 0 unless `muon` sets it.

    Raises:
      ConfigError: if `optimizer_config` has arguments that it does not take.
    """
    rate: Rate = settings.learning_rate
    if settings.lr_schedule is not None:
        from mlx_lm.tuner.utils import build_schedule  # imports transformers

        try:
            rate = build_schedule(dict(settings.lr_schedule))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lr_schedule: {error}") from error
    chosen = _made(settings, settings.optimizer, rate)
    if settings.optimizer != "muon":
        return chosen
    return optim.MultiOptimizer([chosen, _made(settings, "adamw", rate, _REST_SCALE)], [is_matrix])


def _made(
    settings: TrainSettings, kind: str, rate: Rate, scale: float | None = None
) -> optim.Optimizer:
    """Return an optimizer with its own arguments, which may scale the rate if `scale` is given."""
    config: Any = settings.optimizer_config or {}
    try:
        arguments = dict(config.get(kind) or {})
        if scale is not None:
            scale = float(arguments.pop("learning_rate_scale", scale))
            if not scale >= 0:
                raise ValueError(f"learning_rate_scale must be at least 0, got {scale}")
            rate = _scaled(rate, scale)
        if kind == "muon":
            arguments.setdefault("weight_decay", 0.0)
        return _KINDS[kind](learning_rate=rate, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_config: {kind}: {error}") from error


def _scaled(rate: Rate, scale: float) -> Rate:
    return (lambda step: scale * rate(step)) if callable(rate) else scale * rate


def is_matrix(name: str, weight: mx.array) -> bool:
    """Return whether a weight is used as a matrix: not so tables, and a router's few rows are
    scores."""
    return weight.ndim == 2 and "embed_tokens" not in name and "router" not in name
