"""What MLX runs on, and so which graph it gets: the only place that asks.

The CPU backend multiplies packed weights one number at a time, has no grouped product worth the
name, and evaluates while it is asked to. There the model unpacks slices and multiplies those, and
nothing is built ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, wraps
from typing import Any

import mlx.core as mx

_as_on_gpu = ContextVar("as_on_gpu", default=False)
_in_training = ContextVar("in_training", default=False)


def is_cpu() -> bool:
    """Whether graphs are built for the CPU backend."""
    return not _as_on_gpu.get() and mx.default_device() == mx.cpu


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Builds the graph that GPUs get, whatever this machine has; for tests and counts."""
    token = _as_on_gpu.set(True)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)


def is_training() -> bool:
    """Whether gradients are going to be taken: nothing may be evaluated on the way, and what has
    no derivative may not be used."""
    return _in_training.get()


@contextmanager
def training() -> Iterator[None]:
    """Builds graphs that gradients can be taken of."""
    token = _in_training.set(True)
    try:
        yield
    finally:
        _in_training.reset(token)


def begin(x: mx.array) -> None:
    """Starts to compute what is going to be needed, on the CPU backend: building the graph of a
    small model takes a fifth of a step, and another core may as well work meanwhile. GPUs have
    the last step to work on."""
    if is_cpu() and not is_training():
        mx.async_eval(x)


def _another(function: Callable[..., Any]) -> Callable[..., Any]:
    """MLX keeps traces by function: a second trace of the same one would be the first."""
    return lambda *arguments: function(*arguments)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile` for any shape, traced once per backend."""

    @cache
    def trace_for(is_cpu: bool) -> Callable[..., Any]:
        return mx.compile(_another(function), shapeless=True)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return trace_for(is_cpu())(*arguments)

    return call


def compiled_per_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile` with a trace per shape of the first array, the least used ones forgotten.

    Compiled without shapes, every operand is broadcast, and a chain of more than five operations
    falls apart into several kernels. Compiled with them, MLX would keep a trace for every length
    of prompt that it ever saw.
    """

    @lru_cache(maxsize=64)
    def trace_for(shape: tuple[int, ...], is_cpu: bool) -> Callable[..., Any]:
        return mx.compile(_another(function))

    @wraps(function)
    def call(x: mx.array, *rest: Any) -> Any:
        return trace_for(tuple(x.shape), is_cpu())(x, *rest)

    return call
