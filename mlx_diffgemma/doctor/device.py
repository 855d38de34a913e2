"""The device under test, its reference, and the difference that rounding explains. No other file of
this folder asks which device it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..config.quantization import Quantization
from ..model.backend import as_on_gpu

TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_EPSILON = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}


@contextmanager
def under_test() -> Iterator[None]:
    """Compute on the device that MLX chose, by the graph that GPUs get. Where that device is MLX's
    CPU backend, its kernels are under test."""
    with as_on_gpu():
        yield


@contextmanager
def reference() -> Iterator[None]:
    """Compute on MLX's CPU backend, by the graph for it; for whole models."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def computed(build: Callable[[], mx.array | Iterable[mx.array]]) -> list[np.ndarray]:
    """Return the arrays that `build` makes on the device, with floats in float64. `build` runs on
    each call, so that nothing is taken from an earlier graph."""
    with under_test():
        return _to_host(build())


def expected(build: Callable[[], mx.array | Iterable[mx.array]]) -> list[np.ndarray]:
    """Return the arrays that `build` makes on the reference, with floats in float64."""
    with reference():
        return _to_host(build())


class Given(NamedTuple):
    """An operand, and the exact values that it holds after rounding to its type."""

    array: mx.array
    exact: np.ndarray


def given(values: np.ndarray, dtype: mx.Dtype) -> Given:
    """Return an operand for the device. The CPU backend rounds it, so that its exact values do not
    depend on the device."""
    with reference():
        array = mx.array(values.astype(np.float32)).astype(dtype)
        return Given(array, _to_host(array)[0])


def relative(found: np.ndarray, right: np.ndarray) -> float:
    """Return the largest difference, relative to the largest right value."""
    if found.shape != right.shape:
        raise ValueError(f"the device returned shape {found.shape}, expected {right.shape}")
    return float(np.max(np.abs(found - right)) / np.max(np.abs(right)))


def root_mean_square(found: np.ndarray, right: np.ndarray) -> float:
    """Return the root mean square of the difference, relative to that of the right values."""
    if found.shape != right.shape:
        raise ValueError(f"the device returned shape {found.shape}, expected {right.shape}")
    return float(np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)))


def share(differs: np.ndarray) -> float:
    """Return the share of True."""
    return float(np.mean(differs))


def tolerance(dtype: mx.Dtype, *, packed_terms: int = 0) -> float:
    """Return the largest difference, relative to the largest value, that rounding explains.

    In 16 bits a sound kernel rounds unpacked weights and its result, half a unit each, and adds in
    float32; twice that is allowed. In float32 matrix units may round operands to TF32, 11 bits
    (M5 and CUDA; mlx PR 3897). MLX's CPU backend computes float32 in full, but adds 16-bit products
    with packed weights in 16 bits: its error grows with the root of the number of terms.

    Args:
      dtype: the type of the operands.
      packed_terms: terms of each sum with packed weights; 0 for other kernels.
    """
    on_cpu = _is_cpu_backend()
    if dtype == mx.float32:
        return 5e-5 if on_cpu else 2e-3
    if packed_terms and on_cpu:
        return 1.5 * _EPSILON[dtype] * packed_terms**0.5
    return 4 * _EPSILON[dtype]


def logits_tolerance(dtype: mx.Dtype, *, is_packed: bool) -> float:
    """Return the largest root mean square difference of logits, relative to theirs, that rounding
    explains after all layers.

    With products that add in float32 (on the CPU backend, with casts around each) the random
    model's logits differ by up to 0.08 in bfloat16 and 0.005 in float16, the bundled one's by a
    fifth of that; twice and four times that is allowed. TF32 rounds as float16 does. With MLX's CPU
    backend as the device, float32 differs by 1e-5, packed bfloat16 by 0.26, packed float16 by
    0.025.
    """
    on_cpu = _is_cpu_backend()
    if dtype == mx.float32:
        return 1e-4 if on_cpu else 0.02
    if is_packed and on_cpu:
        return {mx.bfloat16: 0.4, mx.float16: 0.06}[dtype]
    return {mx.bfloat16: 0.16, mx.float16: 0.02}[dtype]


def has_plain_experts(dtype: mx.Dtype) -> bool:
    """Return whether the device multiplies unpacked experts in this type: MLX's CPU backend has
    `gather_mm` in float32 only."""
    return dtype == mx.float32 or not _is_cpu_backend()


def affordable(
    packings: Sequence[Quantization], dtype: mx.Dtype, *, is_long: bool = False
) -> Sequence[Quantization]:
    """Return the packings to check in this type, most used first: only the first where the type is
    slow."""
    return packings[:1] if is_slow(dtype, is_long=is_long) else packings


def is_slow(dtype: mx.Dtype, *, is_long: bool = False) -> bool:
    """Return whether products with packed weights take too long to check all of them: on MLX's CPU
    backend in float16, and for long checks in bfloat16. They take 40 and 9 times as long as in
    float32 there, by one kernel for all packings."""
    return _is_cpu_backend() and (dtype == mx.float16 or (is_long and dtype == mx.bfloat16))


def _is_cpu_backend() -> bool:
    return mx.default_device() == mx.cpu


def _to_host(built: mx.array | Iterable[mx.array]) -> list[np.ndarray]:
    arrays = [built] if isinstance(built, mx.array) else list(built)
    mx.eval(arrays)
    return [_host(array) for array in arrays]


def _host(array: mx.array) -> np.ndarray:
    if mx.issubdtype(array.dtype, mx.floating):
        return np.array(array.astype(mx.float32)).astype(np.float64)
    return np.array(array)
