"""The files of a training run: adapters in mlx-lm's format, and one checkpoint to resume from.

A checkpoint is a single file, put in place by a rename: the folder holds a complete one, the new or
the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.adapters import CONFIG, WEIGHTS
from ..config.training import TrainSettings
from ..errors import SourceError

STATE = "training_state.safetensors"
_FORMAT = "1"
# Settings that may change when a run is resumed.
_FREE = frozenset(
    "iters val_batches test_batches steps_per_report steps_per_eval save_every "
    "grad_checkpoint model".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The state of a run."""

    iteration: int  # batches trained on
    weights: dict[str, mx.array]
    optimizer: dict[str, Any]
    accumulated: dict[str, mx.array]  # gradients of an update that is not complete
    trained_tokens: int = 0  # read since the run began, without padding


def save(
    folder: Path,
    state: State,
    settings: TrainSettings,
    facts: Mapping[str, Any],
    *,
    numbered: bool,
) -> Path:
    """Write the state, the weights in mlx-lm's format, and their config.

    Args:
      folder: of the run; created if needed.
      state: everything that a run needs to resume.
      settings: its settings, written beside the weights.
      facts: of the model and the data, which must be the same on resume.
      numbered: also keep this state's weights under its number, as mlx-lm does.

    Raises:
      SourceError: if the folder cannot be written to.
    """
    arrays = {f"weights.{name}": array for name, array in state.weights.items()}
    flat = cast(list[tuple[str, mx.array]], tree_flatten(state.optimizer))
    arrays |= {f"optimizer.{name}": a for name, a in flat}
    arrays |= {f"accumulated.{name}": a for name, a in state.accumulated.items()}
    metadata = {
        "format": _FORMAT,
        "iteration": str(state.iteration),
        "trained_tokens": str(state.trained_tokens),
        "settings": json.dumps(settings.as_dict(), sort_keys=True),
        "facts": json.dumps(dict(facts), sort_keys=True),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = settings.as_dict() | {"iteration": state.iteration, **facts}
        _replace(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
        if numbered:
            _save(folder / f"{state.iteration:07d}_{WEIGHTS}", state.weights, {"format": "mlx"})
        # The state comes last: when it is at the end of a run, so are the weights.
        _save(folder / WEIGHTS, state.weights, {"format": "mlx"})
        _save(folder / STATE, arrays, metadata)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{folder} cannot be written to: {error}") from error
    return folder / STATE


def restore(folder: Path, settings: TrainSettings, facts: Mapping[str, Any]) -> State:
    """Return the last state of a run.

    Raises:
      SourceError: if there is none, or it belongs to other settings, another model or other data.
    """
    path = folder / STATE
    if not path.is_file():
        raise SourceError(f"{folder} has no {STATE} to go on from")
    try:
        loaded = mx.load(str(path), return_metadata=True)
        arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}")
        iteration = int(metadata["iteration"])
        trained_tokens = int(metadata.get("trained_tokens", 0))  # older states have none
        # A setting that did not exist yet had its default.
        before = TrainSettings().as_dict() | json.loads(metadata["settings"])
        known = json.loads(metadata["facts"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    now = json.loads(json.dumps(settings.as_dict()))
    changed = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    changed += [name for name in facts if name not in _FREE and known.get(name) != facts[name]]
    if changed:
        name = changed[0]
        was, is_ = (both.get(name) for both in ((before | known), (now | dict(facts))))
        raise SourceError(f"{path} was made with {name} {was!r}, and now it is {is_!r}")

    def part(prefix: str) -> dict[str, mx.array]:
        return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

    optimizer = cast(dict[str, Any], tree_unflatten(list(part("optimizer.").items())))
    weights, accumulated = part("weights."), part("accumulated.")
    return State(iteration, weights, optimizer, accumulated, trained_tokens)


def trained_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return the weights that training changes, by name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters())))


def _save(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    _put(path, lambda partial: mx.save_safetensors(str(partial), arrays, metadata))


def _replace(path: Path, content: bytes) -> None:
    _put(path, lambda partial: partial.write_bytes(content))


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file and rename it; remove it if writing fails."""
    partial = path.with_name(f".{path.name}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
