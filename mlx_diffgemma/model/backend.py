"""What MLX runs on, and so which graph it gets: the only place that asks.

The CPU backend multiplies packed weights one number at a time, has no grouped product worth the
name, and evaluates while it is asked to. There the model unpacks slices and multiplies those, and
nothing is built ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

import mlx.core as mx

_as_on_gpu = ContextVar("as_on_gpu", default=False)


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


def compiled_per_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile` with a trace per shape of the first array, the least used ones forgotten.

    Compiled without shapes, every operand is broadcast, and a chain of more than five operations
    falls apart into several kernels. Compiled with them, MLX would keep a trace for every length
    of prompt that it ever saw.
    """

    @lru_cache(maxsize=64)
    def trace_for(shape: tuple[int, ...]) -> Callable[..., Any]:
        return mx.compile(function)

    @wraps(function)
    def call(x: mx.array, *rest: Any) -> Any:
        return trace_for(tuple(x.shape))(x, *rest)

    return call
