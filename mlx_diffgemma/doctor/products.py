"""Checks of products with packed and plain weights, in every packing that MLX has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.quantization import Quantization
from ..model.products import head, linear, weighted_rows
from . import device
from .device import TYPES, Given, affordable, computed, given, relative, tolerance
from .exact import PACKINGS, PACKINGS_BY_USE, PUBLISHED, Packed, decode, drawn, name_of, packed
from .outcome import Check

PART = "packed products"
PLAIN = "plain products"
# Rows of the operand: one, few and many take different kernels, and the last tile is not full.
_ROWS = (1, 5, 40)
_OUTPUTS = 128  # a multiple of it is what CUDA's kernels for tensor cores want
# Terms of a sum over the table's rows: a whole number of groups, but not of MLX's blocks of 64.
_TABLE_ROWS = 544
_VOCABULARY = 1024


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    for packing in PACKINGS:
        yield _unpacking(packing)
        yield _packing(packing)
    for type_name, dtype in TYPES.items():
        for packing in affordable(PACKINGS_BY_USE, dtype):
            yield _by_rows(packing, type_name)
            yield _over_rows(packing, type_name)
        for packing in affordable(PUBLISHED, dtype):
            yield _soft_embedding(packing, type_name)
            yield _head(packing, type_name)
    for type_name, dtype in TYPES.items():
        yield Check(
            f"plain product, {type_name}",
            PLAIN,
            tolerance(dtype),
            "matrix kernels of M5 that compilers translated wrongly (mlx issues 3586 and 3797)",
            f"checkpoints that are not packed, computed in {type_name}",
            partial(_plain_product, dtype),
        )
    yield Check(
        "plain product, partial sums above float16's range",
        PLAIN,
        tolerance(mx.float16),
        "sums kept in float16, which overflow to infinity",
        "float16; use bfloat16",
        _large_sums,
    )


def _by_rows(packing: Quantization, type_name: str) -> Check:
    words, dtype = name_of(packing), TYPES[type_name]
    return Check(
        f"packed product, {words}, {type_name}",
        PART,
        tolerance(dtype, packed_terms=_inputs(packing)),
        "M5 kernels that lost the last terms of a sum whose length is not a multiple of 64 "
        "(mlx issue 3887), and one group's scale used for another",
        f"checkpoints packed as {words}, computed in {type_name}",
        partial(_product, packing, dtype),
    )


def _over_rows(packing: Quantization, type_name: str) -> Check:
    words, dtype = name_of(packing), TYPES[type_name]
    return Check(
        f"packed product over rows, {words}, {type_name}",
        PART,
        tolerance(dtype, packed_terms=_TABLE_ROWS),
        "quantized_matmul(transpose=False), wrong on Metal (mlx issues 4201 and 4250) and, "
        "where the sum's length is not a multiple of 64, on CUDA (mlx issue 3444)",
        f"embeddings packed as {words}, computed in {type_name}",
        partial(_product_over_rows, packing, dtype),
    )


def _unpacking(packing: Quantization) -> Check:
    words = name_of(packing)
    return Check(
        f"unpacking, {words}",
        PART,
        # One multiplication and one addition in float32.
        1e-6,
        "rows of a packed embedding read in another mode than the table's (mlx-vlm issue 1356)",
        f"checkpoints packed as {words}",
        partial(_unpacked, packing),
    )


def _packing(packing: Quantization) -> Check:
    words = name_of(packing)
    return Check(
        f"packing, {words}",
        PART,
        # A scale that is rounded otherwise moves single codes by one step; together they must cost
        # what they cost on the CPU backend.
        0.02,
        "packing that loses more precision on the device than on the CPU backend",
        f"converting to {words} on this device; convert on another machine",
        partial(_packing_error, packing),
    )


def _soft_embedding(packing: Quantization, type_name: str) -> Check:
    words, dtype = name_of(packing), TYPES[type_name]
    return Check(
        f"soft embedding, {words}, {type_name}",
        PART,
        tolerance(dtype, packed_terms=_VOCABULARY),
        "a packed table multiplied in another mode than its own (mlx-vlm issue 1356)",
        f"embeddings packed as {words}, computed in {type_name}",
        partial(_mean_row, packing, dtype),
    )


def _head(packing: Quantization, type_name: str) -> Check:
    words, dtype = name_of(packing), TYPES[type_name]
    return Check(
        f"head, {words}, {type_name}",
        PART,
        tolerance(dtype, packed_terms=_inputs(packing)),
        "a packed table multiplied in another mode than its own (mlx-vlm issue 1356)",
        f"embeddings packed as {words}, computed in {type_name}",
        partial(_outputs_of_head, packing, dtype),
    )


def _inputs(packing: Quantization) -> int:
    """Return a width that is no multiple of 64 where the groups allow it."""
    return {128: 384, 64: 704}.get(packing.group_size, 352)


def _multiplied(x: mx.array, weights: Packed, packing: Quantization, transpose: bool) -> mx.array:
    return mx.quantized_matmul(
        x,
        weights.weight,
        weights.scales,
        weights.biases,
        transpose=transpose,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
    )


def _product(packing: Quantization, dtype: mx.Dtype) -> float:
    weights = packed(packing, (_OUTPUTS, _inputs(packing)), dtype, 1)
    operands = [drawn(rows, (rows, _inputs(packing)), dtype) for rows in _ROWS]
    found = computed(lambda: [_multiplied(x.array, weights, packing, True) for x in operands])
    pairs = zip(found, operands, strict=True)
    return max_of(relative(out, x.exact @ weights.exact.T) for out, x in pairs)


def _product_over_rows(packing: Quantization, dtype: mx.Dtype) -> float:
    weights = packed(packing, (_TABLE_ROWS, _OUTPUTS), dtype, 2)
    operands = [drawn(rows, (rows, _TABLE_ROWS), dtype) for rows in _ROWS]
    found = computed(lambda: [_multiplied(x.array, weights, packing, False) for x in operands])
    pairs = zip(found, operands, strict=True)
    return max_of(relative(out, x.exact @ weights.exact) for out, x in pairs)


def _unpacked(packing: Quantization) -> float:
    weights = packed(packing, (64, 384), mx.float32, 3)
    (found,) = computed(
        lambda: mx.dequantize(
            weights.weight,
            weights.scales,
            weights.biases,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
            dtype=mx.float32,
        )
    )
    return relative(found, weights.exact)


def _packing_error(packing: Quantization) -> float:
    values = drawn(4, (64, 384), mx.float32)

    def pack() -> tuple[mx.array, ...]:
        return mx.quantize(
            values.array, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
        )

    def error(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray | None = None) -> float:
        return device.root_mean_square(decode(codes, scales, biases, packing), values.exact)

    here, there = error(*computed(pack)), error(*device.expected(pack))
    return max(0.0, here / there - 1) if math.isfinite(here) else here


def _table(packing: Quantization, dtype: mx.Dtype) -> tuple[nn.QuantizedEmbedding, Packed]:
    weights = packed(packing, (_VOCABULARY, _inputs(packing)), dtype, 5)
    with device.reference():  # the table's own random weights are not used
        table = nn.QuantizedEmbedding(1, 128, packing.group_size, packing.bits, mode=packing.mode)
    table.weight, table.scales = weights.weight, weights.scales
    if weights.biases is not None:
        table.biases = weights.biases
    return table, weights


def _mean_row(packing: Quantization, dtype: mx.Dtype) -> float:
    table, weights = _table(packing, dtype)
    # As in a denoising step: most of the probability on few tokens.
    chances = np.random.default_rng(6).dirichlet(np.full(_VOCABULARY, 0.05), (1, 9))
    shares = given(chances, dtype)
    (found,) = computed(lambda: weighted_rows(table, shares.array))
    return relative(found, shares.exact @ weights.exact)


def _outputs_of_head(packing: Quantization, dtype: mx.Dtype) -> float:
    table, weights = _table(packing, dtype)
    x = drawn(7, (1, 9, _inputs(packing)), dtype)
    (found,) = computed(lambda: head(table, x.array))
    return relative(found, x.exact @ weights.exact.T)


def _plain(weights: Given) -> nn.Linear:
    with device.reference():  # the module's own random weights are not used
        module = nn.Linear(1, 1, bias=False)
    module.weight = weights.array
    return module


def _plain_product(dtype: mx.Dtype) -> float:
    weights = drawn(8, (_OUTPUTS, 704), dtype)
    operands = [drawn(9 + rows, (rows, 704), dtype) for rows in _ROWS]
    found = computed(lambda: [linear(_plain(weights), x.array) for x in operands])
    pairs = zip(found, operands, strict=True)
    return max_of(relative(out, x.exact @ weights.exact.T) for out, x in pairs)


def _large_sums() -> float:
    """Multiply so that half of each sum is 300,000, and the other half takes it back."""
    signs = np.where(np.arange(704) < 352, 1.0, -1.0)
    x = given(np.full((40, 704), 32.0) + np.eye(40, 704), mx.float16)
    weights = given(26.0 * signs * np.ones((_OUTPUTS, 1)), mx.float16)
    (found,) = computed(lambda: linear(_plain(weights), x.array))
    return relative(found, x.exact @ weights.exact.T)


def max_of(differences: Iterator[float]) -> float:
    """Return the largest difference; NaN if one is."""
    return float(np.max(list(differences)))
