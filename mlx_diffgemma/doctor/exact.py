"""The same arithmetic in NumPy and float64, written apart from MLX: what a device is compared
with."""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..config.quantization import QUANTIZATION_MODES, Quantization
from .device import Given, given

PACKINGS = tuple(
    Quantization(group_size, bits, mode)
    for mode, (all_bits, group_sizes) in QUANTIZATION_MODES.items()
    for bits in all_bits
    for group_size in group_sizes
)
# The packings of published checkpoints, the most used one first.
PUBLISHED = (
    Quantization(64, 4),
    Quantization(64, 8),
    Quantization(32, 4, "mxfp4"),
    Quantization(32, 8, "mxfp8"),
    Quantization(16, 4, "nvfp4"),
)
PACKINGS_BY_USE = (*PUBLISHED, *(p for p in PACKINGS if p not in PUBLISHED))
_HALVES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of FP4: one sign, two exponent, one mantissa bit


def name_of(packing: Quantization) -> str:
    """Return a packing in words: "affine 4-bit, groups of 64", "mxfp4"."""
    if packing.mode == "affine":
        return f"affine {packing.bits}-bit, groups of {packing.group_size}"
    return packing.mode


class Packed(NamedTuple):
    """Packed weights for the device, and the values that they stand for."""

    weight: mx.array  # uint32 [..., inputs * bits / 32]
    scales: mx.array
    biases: mx.array | None
    exact: np.ndarray  # float64 [..., inputs]


def packed(packing: Quantization, shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> Packed:
    """Return random codes and scales. Every code occurs, and every group has its own scale, so that
    one read for another group shows."""
    rng = np.random.default_rng([17, seed])
    *rest, inputs = shape
    groups = (*rest, inputs // packing.group_size)
    codes = rng.integers(0, 256, (*rest, inputs * packing.bits // 8), dtype=np.uint8)
    if packing.mode == "mxfp8":
        codes[(codes & 0x7F) == 0x7F] = 0x38  # NaN becomes 1
    weight = codes.view(np.uint32)
    if packing.mode == "affine":
        steps = 2**packing.bits - 1
        scale = rng.uniform(0.5, 2.0, groups) / steps
        scales = given(scale, dtype)
        biases = given(-scale * steps * rng.uniform(0.4, 0.6, groups), dtype)
        exact = decode(weight, scales.exact, biases.exact, packing)
        return Packed(mx.array(weight), scales.array, biases.array, exact)
    # The middle of the codes' range, so that sums fit float16.
    lowest, highest = {"mxfp4": (124, 127), "mxfp8": (118, 121), "nvfp4": (0x20, 0x38)}[
        packing.mode
    ]
    bytes_ = rng.integers(lowest, highest, groups, dtype=np.uint8)
    return Packed(mx.array(weight), mx.array(bytes_), None, decode(weight, bytes_, None, packing))


def decode(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, packing: Quantization
) -> np.ndarray:
    """Return the values of packed weights: uint32 [..., inputs * bits / 32] -> float64 [...,
    inputs].

    Codes follow each other from the lowest bit up, without gaps. Affine codes are whole numbers;
    those of the other modes are floats of 4 or 8 bits, and their scales are codes too.

    Source: the OCP Microscaling Formats (MX) Specification 1.0, and MLX's documentation of
    `mlx.core.quantize`.
    """
    stream = np.unpackbits(weight.view(np.uint8), axis=-1, bitorder="little")
    bits = stream.reshape(*weight.shape[:-1], -1, packing.bits)
    codes = bits @ (1 << np.arange(packing.bits))
    if packing.mode == "affine":
        assert biases is not None
        return codes * _each(scales, packing) + _each(biases, packing)
    values = _float8(codes) if packing.mode == "mxfp8" else _float4(codes)
    factors = _float8(scales) if packing.mode == "nvfp4" else 2.0 ** (scales.astype(float) - 127)
    return values * _each(factors, packing)


def _each(groups: np.ndarray, packing: Quantization) -> np.ndarray:
    return np.repeat(groups, packing.group_size, axis=-1)


def _float4(codes: np.ndarray) -> np.ndarray:
    return np.where(codes & 8, -1, 1) * _HALVES[codes & 7]


def _float8(codes: np.ndarray) -> np.ndarray:
    """Return the values of E4M3: one sign, four exponent and three mantissa bits, without
    infinities."""
    codes = codes.astype(int)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    size = np.where(codes & 0x7F == 0x7F, np.nan, size)
    return np.where(codes & 128, -1, 1) * size


def drawn(seed: int, shape: tuple[int, ...], dtype: mx.Dtype, scale: float = 1.0) -> Given:
    """Return an operand of normal values."""
    return given(np.random.default_rng([18, seed]).normal(0, scale, shape), dtype)


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, allowed: np.ndarray | None
) -> np.ndarray:
    """Return softmax(q k) v for queries [B, N, L, H] and keys and values [B, K, S, H], which N / K
    heads share."""
    shared = queries.shape[1] // keys.shape[1]
    scores = queries @ np.repeat(keys, shared, axis=1).swapaxes(2, 3)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    return softmax(scores) @ np.repeat(values, shared, axis=1)


def rotated(x: np.ndarray, positions: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """Rotate pairs (i, i + H/2) of x [B, heads, S, H] by position over period; positions [B, S]."""
    angles = positions[:, None, :, None] / periods  # [B, 1, S, H/2]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ],
        axis=-1,
    )


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    """Return x over its root mean square, times a weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def geglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return gelu(gate) * up, with the tanh approximation."""
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner)) * up
