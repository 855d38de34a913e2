"""The choice of the graph by MLX's backend. No other file asks which backend it is.

The CPU backend multiplies packed weights one number at a time, has no fast grouped product, and
evaluates synchronously. There the model unpacks slices and multiplies those, and builds no step
ahead.
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
    """Return whether graphs are built for the CPU backend."""
    return not _as_on_gpu.get() and mx.default_device() == mx.cpu


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Build the graph for GPUs on any machine; for tests and counts."""
    token = _as_on_gpu.set(True)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)


def is_training() -> bool:
    """Return whether gradients will be taken: the graph may then not evaluate anything or use
    operations without a derivative."""
    return _in_training.get()


@contextmanager
def training() -> Iterator[None]:
    """Build graphs of which gradients can be taken."""
    token = _in_training.set(True)
    try:
        yield
    finally:
        _in_training.reset(token)


def begin(x: mx.array) -> None:
    """Start to compute an array early on the CPU backend: building the graph of a small model takes
    a fifth of a step, and another core can compute meanwhile. GPUs are busy with the last step."""
    if is_cpu() and not is_training():
        mx.async_eval(x)


_TRACES = 32  # of a function, one per shape: 15 to 45 kB and 0.1 to 0.5 ms of Python each


def _another(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a distinct function: MLX keeps traces by function, so the same one would return its
    first trace."""
    return lambda *arguments: function(*arguments)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply `mx.compile` for any shape, with one trace per backend.

    In training the function is run as it is: a trace without shapes that was made while gradients
    were taken gave wrong values later, for arrays of other shapes without gradients (MLX 0.32.4:
    norms of the vision tower's width, then of the text's).
    """

    @cache
    def trace_for(is_cpu: bool) -> Callable[..., Any]:
        return mx.compile(_another(function), shapeless=True)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if is_training() else trace_for(is_cpu())(*arguments)

    return call


def compiled_per_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply `mx.compile` with a trace per shape of the first array; drop the least recently used
    ones.

    Without shapes, every operand is broadcast, and a chain of more than five operations is split
    into several kernels. With shapes, MLX itself would keep a trace for every length of prompt.
    """

    @lru_cache(maxsize=_TRACES)
    def trace_for(shape: tuple[int, ...], is_cpu: bool) -> Callable[..., Any]:
        return mx.compile(_another(function))

    @wraps(function)
    def call(x: mx.array, *rest: Any) -> Any:
        return trace_for(tuple(x.shape), is_cpu())(x, *rest)

    return call
