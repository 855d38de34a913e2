"""Every check passes here, and each is seen to fail when its kernel is replaced by a wrong one, on
the device's side only."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import typer

from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.denoise import sampler
from mlx_diffgemma.doctor import device, exact
from mlx_diffgemma.doctor import sampling as sampling_checks
from mlx_diffgemma.doctor.checks import all_checks
from mlx_diffgemma.doctor.outcome import Check, run_check
from mlx_diffgemma.model import experts, layers
from mlx_diffgemma.model.context import LayerContext
from tests.sampled import one_in

PARTS = (
    "packed products",
    "plain products",
    "expert products",
    "attention",
    "compiled kernels",
    "sampling",
    "writes in place",
    "logits",
    "trajectories",
)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("part", PARTS)
def test_every_check_passes_on_this_machine(part, every):
    checks = [check for check in all_checks() if check.part == part]
    outcomes = [run_check(check) for check in checks[::every]]
    assert outcomes
    failed = [
        f"{o.check.name}: {o.error or o.difference} above {o.check.tolerance}"
        for o in outcomes
        if not o.passed
    ]
    assert not failed, "\n".join(failed)


def test_a_check_has_a_name_of_its_own_and_says_what_it_looks_for_and_what_to_avoid():
    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks)
    assert {check.part for check in checks} == set(PARTS)
    for check in checks:
        assert check.looks_for and check.avoid and check.tolerance >= 0, check.name
        for text in (check.name, check.looks_for, check.avoid):
            assert "\n" not in text and text == text.strip() and not text.endswith("."), text


def test_an_option_to_avoid_is_one_that_exists():
    app = typer.Typer()
    app.command()(generate)
    known = {flag for option in typer.main.get_command(app).params for flag in option.opts}
    named = {flag for check in all_checks() for flag in re.findall(r"--[a-z-]+", check.avoid)}
    assert named and named <= known


def test_a_gpu_gets_every_packing_in_every_type(monkeypatch):
    here = {check.name for check in all_checks()}
    monkeypatch.setattr(device, "_is_cpu_backend", lambda: False)
    there = [check.name for check in all_checks()]
    assert len(set(there)) == len(there) and here < set(there)
    for packing in exact.PACKINGS:
        for type_name in device.TYPES:
            assert f"packed product, {exact.name_of(packing)}, {type_name}" in there
            assert f"packed product over rows, {exact.name_of(packing)}, {type_name}" in there
    for type_name in ("bfloat16", "float16"):  # MLX's CPU backend has no such kernel
        name = f"plain experts, {type_name}, 2816 wide, sorted"
        assert name in there and name not in here


# A GPU's rounding


def tf32(x: mx.array) -> mx.array:
    """Round float32 to 11 bits, as matrix units of M5 and CUDA do; 16 bits fit."""
    if x.dtype != mx.float32:
        return x.astype(mx.float32)
    bits = (x.view(mx.uint32) + mx.array(0x1000, mx.uint32)) & mx.array(0xFFFFE000, mx.uint32)
    return bits.view(mx.float32)


def wide_packed(sound):
    def product(x, w, scales=None, biases=None, **rest):
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return sound(tf32(x), w, scales, biases, **rest).astype(x.dtype)

    return product


def wide_plain(sound):
    return lambda x, w, **rest: sound(tf32(x), tf32(w), **rest).astype(x.dtype)


def wide_linear(_):
    return lambda self, x: (tf32(x) @ tf32(self.weight).T).astype(x.dtype)


def wide_attention(sound):
    return lambda q, k, v, **rest: sound(tf32(q), tf32(k), tf32(v), **rest).astype(q.dtype)


@pytest.fixture
def rounding_of_gpus(monkeypatch):
    """Let products add in float32, and round float32 operands to TF32; list the checks of a GPU,
    with its tolerances. This is what the tolerances were chosen for, and no GPU is needed."""
    sound_scope = device.under_test

    @contextmanager
    def scope():
        with sound_scope(), monkeypatch.context() as patch:
            for owner, name, make in (
                (mx, "quantized_matmul", wide_packed),
                (mx, "gather_qmm", wide_packed),
                (mx, "gather_mm", wide_plain),
                (nn.Linear, "__call__", wide_linear),
                (mx.fast, "scaled_dot_product_attention", wide_attention),
            ):
                patch.setattr(owner, name, make(getattr(owner, name)))
            yield

    monkeypatch.setattr(device, "under_test", scope)
    monkeypatch.setattr(device, "_is_cpu_backend", lambda: False)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_tolerances_of_gpus_leave_room_for_their_rounding(rounding_of_gpus, every):
    looked_at = r"(product|experts|head|attention|layer).*, (bfloat16|float16)|^logits.*random"
    checks = [check for check in all_checks() if re.search(looked_at, check.name)]
    outcomes = [run_check(check) for check in checks[::every]]
    assert len(outcomes) > 150 / every
    assert not [o.check.name for o in outcomes if not o.difference < 0.7 * o.check.tolerance]


# Wrong kernels


@dataclass(frozen=True)
class Wrong:
    """A kernel that is wrong as a known bug made it: `name` of `owner` becomes `make(sound)`."""

    id: str
    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    fails: str  # a pattern: of the checks that run, exactly those whose name matches fail
    runs: str  # a pattern: the checks to run, some of them of its neighbours
    part: str  # of the failing checks; two are separated by a comma
    avoid: str = ""  # a part of what a failing check advises against


def for_mode(mode: str, change: Callable[..., Any]) -> Callable[..., Any]:
    """Change the packed operands of products in one mode."""

    def make(sound):
        def product(x, w, scales, biases=None, **rest):
            if rest["mode"] == mode:
                x, w, scales = change(x, w, scales, rest)
            return sound(x, w, scales, biases, **rest)

        return product

    return make


def without_tail(x: mx.array) -> mx.array:
    """Lose the terms behind the last whole block of 64."""
    whole = x.shape[-1] // 64 * 64
    return mx.where(mx.arange(x.shape[-1]) < whole, x, mx.zeros((), x.dtype))


def read_as_affine(sound):
    def product(x, w, scales, biases=None, **rest):
        if rest["mode"] != "mxfp4" or rest["transpose"]:
            return sound(x, w, scales, biases, **rest)
        steps = mx.power(2.0, scales.astype(mx.float32) - 127)
        rest["mode"] = "affine"
        return sound(x, w, steps, -8 * steps, **rest)

    return product


def wrong_over_rows(sound):
    def product(x, w, scales, biases=None, **rest):
        is_hit = rest["bits"] in (2, 4, 8) and rest["group_size"] in (32, 64)
        if is_hit and rest["mode"] == "affine" and not rest["transpose"]:
            x = x[..., ::-1]
        return sound(x, w, scales, biases, **rest)

    return product


def tail_over_rows(sound):
    def product(x, w, scales, biases=None, **rest):
        if rest["mode"] != "affine" and not rest["transpose"]:
            x = without_tail(x)
        return sound(x, w, scales, biases, **rest)

    return product


def without_biases(sound):
    return lambda w, scales, biases, **rest: sound(
        w, scales, None if biases is None else biases * 0, **rest
    )


def coarse(sound):
    def quantize(w, *, group_size, bits, mode):
        w = mx.round(w * 8) / 8 if (bits, group_size) == (4, 64) else w
        return sound(w, group_size=group_size, bits=bits, mode=mode)

    return quantize


def halves_in_float16(_):
    def product(self, x):
        middle = x.shape[-1] // 2
        return x[..., :middle] @ self.weight[:, :middle].T + (
            x[..., middle:] @ self.weight[:, middle:].T
        )

    return product


def flipped_weights(sound):
    def product(self, x):
        return sound(self, x[..., ::-1])

    return product


def gathering(change: Callable[..., mx.array]) -> Callable[..., Any]:
    """Change a grouped product: `change(sound, x, w, rest)`."""

    def make(sound):
        return lambda x, w, *operands, **rest: change(
            lambda x=x, w=w, **other: sound(x, w, *operands, **(rest | other)), x, w, rest
        )

    return make


def one_expert_zero(call, x, w, rest):
    return mx.where((rest["rhs_indices"] == 3)[:, None, None], 0, call())


def even_runs(call, x, w, rest):
    if not rest["sorted_indices"]:
        return call()
    pairs, count = rest["rhs_indices"], w.shape[0]
    return call(rhs_indices=mx.arange(pairs.size, dtype=mx.uint32) * count // pairs.size)


def lost_tail(call, x, w, rest):
    return call(x=without_tail(x)) if rest["sorted_indices"] else call()


def zero_if_view(call, x, w, rest):
    mx.eval(w)
    return call() if memoryview(w).c_contiguous else call() * 0


def first_row_only(call, x, w, rest):
    is_hit = rest["sorted_indices"] and x.ndim == 3
    return call(x=mx.broadcast_to(x[:1], x.shape)) if is_hit else call()


def last_rows_spoilt(call, x, w, rest):
    out, rows = call(), x.shape[0]
    if rows <= 32_768 or rows % 64 == 0:
        return out
    return mx.where((mx.arange(rows) >= rows - 64)[:, None, None], 0, out)


def neighbours_weights(call, x, w, rest):
    if rest["sorted_indices"]:
        return call()
    return call(rhs_indices=(rest["rhs_indices"] + 1) % w.shape[0])


def swapped_ends(sound):
    def partition(x, kth, axis=-1):
        order = sound(x, kth=kth, axis=axis)
        return mx.concatenate([order[..., -1:], order[..., 1:-1], order[..., :1]], axis=-1)

    return partition


def not_normalised(sound):
    def route(self, x):
        chosen, weights = sound(self, x)
        return chosen, weights * 1.5

    return route


def attending(change: Callable[..., mx.array]) -> Callable[..., Any]:
    """Change attention: `change(sound, q, k, v, mask)`."""

    def make(sound):
        def kernel(q, k, v, *, scale, mask=None):
            return change(
                lambda q=q, k=k, v=v, mask=mask: sound(q, k, v, scale=scale, mask=mask),
                q,
                k,
                v,
                mask,
            )

        return kernel

    return make


def is_array(mask: Any) -> bool:
    return isinstance(mask, mx.array)


def causal(q: mx.array, k: mx.array, shift: int) -> mx.array:
    L, S = q.shape[2], k.shape[2]
    return mx.arange(S) <= mx.arange(L)[:, None] + shift


def not_shifted(call, q, k, v, mask):
    """Leave the largest score in the exponent."""
    if mask is not None:
        return call()
    shared = q.shape[1] // k.shape[1]
    scores = q.astype(mx.float32) @ mx.repeat(k, shared, axis=1).astype(mx.float32).swapaxes(2, 3)
    weights = mx.exp(scores)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights @ mx.repeat(v, shared, axis=1).astype(mx.float32)).astype(q.dtype)


def heads_in_turn(call, q, k, v, mask):
    shared = q.shape[1] // k.shape[1]
    return call(k=mx.tile(k, (1, shared, 1, 1)), v=mx.tile(v, (1, shared, 1, 1)))


def wrong_stride(call, q, k, v, mask):
    mx.eval(k)
    return call() if memoryview(k).c_contiguous else call(k=mx.roll(k, 1, axis=2))


def half_of_long_heads(call, q, k, v, mask):
    return call() if q.shape[-1] <= 256 else call(q=mx.where(mx.arange(q.shape[-1]) < 256, q, 0))


def mean_of_the_first_block(sound):
    def norm(x, weight, eps):
        root = mx.sqrt(mx.mean(mx.square(x[..., :2048].astype(mx.float32)), -1, keepdims=True))
        out = x.astype(mx.float32) / root * (1 if weight is None else weight)
        return out.astype(x.dtype)

    return norm


def swapped_halves(sound):
    def rope(x, dims, **rest):
        turned = sound(mx.roll(x, dims // 2, axis=-1), dims, **rest)
        return mx.roll(turned, dims // 2, axis=-1)

    return rope


def adjacent_pairs(sound):
    return lambda x, dims, **rest: sound(x, dims, **(rest | {"traditional": True}))


def first_row_of_single_tokens(sound):
    def rope(x, dims, **rest):
        out = sound(x, dims, **rest)
        if x.shape[2] > 1:
            return out
        return mx.where((mx.arange(x.shape[0]) == 0)[:, None, None, None], out, 0)

    return rope


def one_position_for_all(sound):
    def rope(x, dims, *, offset, **rest):
        offset = int(offset[0].item()) if isinstance(offset, mx.array) else offset
        return sound(x, dims, offset=offset, **rest)

    return rope


def first_trace(sound):
    traces: dict[Any, mx.array] = {}
    return lambda x, *rest: traces.setdefault((x.shape, x.dtype), sound(x, *rest))


def first_temperature(sound):
    heats: list[mx.array] = []

    def scaled(outputs, heat, cap):
        heats.append(heat)
        return sound(outputs, heats[0], cap)

    return scaled


def squares_in_its_type(_):
    def norm(x, weight, eps):
        mean = mx.mean(x * x, axis=-1, keepdims=True)
        return (x.astype(mx.float32) * mx.rsqrt(mean.astype(mx.float32) + eps) * weight).astype(
            x.dtype
        )

    return norm


def in_low_precision(sound):
    return lambda x, axis, precise=False: sound(x, axis=axis)


def weights_in_bfloat16(sound):
    def weigh(*arguments):
        return tuple(x.astype(mx.bfloat16) for x in sound(*arguments))

    return weigh


def draws_any_chunk(sound):
    return lambda seen, gumbels: sound(seen._replace(masses=mx.ones_like(seen.masses)), gumbels)


def even_tokens_only(sound):
    return lambda low, high, shape, key: sound(low, high // 2, shape, key=key) * 2


def in_shared_memory(_):
    def written(self, start, keys, values):
        end = start + keys.shape[2]
        for old, new in ((self.keys, keys), (self.values, values)):
            mx.eval(old)
            np.asarray(old)[:, :, start:end] = np.array(new)
        return self

    return written


def one_place_late(sound):
    def written(self, start, keys, values):
        start = min(start + 1, self.keys.shape[2] - keys.shape[2])
        return sound(self, start, keys, values)

    return written


def all_rows_into_one(sound):
    def written(self, start, keys, values):
        alike = [mx.broadcast_to(x[-1:], x.shape) for x in (keys, values)]
        return sound(self, start, *alike)

    return written


def earlier_behind_later(_):
    def join(self, keys, values):
        return LayerContext(
            mx.concatenate([keys, self.keys], axis=2), mx.concatenate([values, self.values], axis=2)
        )

    return join


WRONG = (
    Wrong(
        "nvfp4 reads the next group's scale",
        mx,
        "quantized_matmul",
        for_mode("nvfp4", lambda x, w, s, rest: (x, w, mx.roll(s, 1, axis=-1))),
        fails=r"nvfp4",
        runs=r"^(packed product|head), (nvfp4|mxfp4|affine 4-bit, groups of 64), (f|b)",
        part="packed products",
        avoid="packed as nvfp4",
    ),
    Wrong(
        "affine sums lose what is behind the last 64 terms",
        mx,
        "quantized_matmul",
        for_mode("affine", lambda x, w, s, rest: (without_tail(x), w, s)),
        fails=r"groups of 32",
        runs=r"^packed product, affine \d-bit, groups of \d+, float32",
        part="packed products",
        avoid="groups of 32",
    ),
    Wrong(
        "products over rows are wrong in groups of 32 and 64",
        mx,
        "quantized_matmul",
        wrong_over_rows,
        fails=r"over rows, affine [248]-bit, groups of (32|64),",
        runs=r"^packed product( over rows)?, .*float32",
        part="packed products",
        avoid="embeddings packed as affine",
    ),
    Wrong(
        "products over rows lose the last 32 rows",
        mx,
        "quantized_matmul",
        tail_over_rows,
        fails=r"over rows, (mxfp4|mxfp8|nvfp4)",
        runs=r"^packed product( over rows)?, .*float32|soft embedding, .*float32",
        part="packed products",
        avoid="embeddings packed as",
    ),
    Wrong(
        "an mxfp4 table is read as affine",
        mx,
        "quantized_matmul",
        read_as_affine,
        fails=r"(over rows|soft embedding), mxfp4",
        runs=r"(over rows|soft embedding|head), (mxfp4|mxfp8|affine 4-bit, groups of 64), float32",
        part="packed products",
        avoid="embeddings packed as mxfp4",
    ),
    Wrong(
        "unpacking leaves out the biases",
        mx,
        "dequantize",
        without_biases,
        fails=r"affine",
        runs=r"^unpacking",
        part="packed products",
        avoid="packed as affine",
    ),
    Wrong(
        "packing to 4 bits rounds twice",
        mx,
        "quantize",
        coarse,
        fails=r"affine 4-bit, groups of 64",
        runs=r"^packing",
        part="packed products",
        avoid="convert",
    ),
    Wrong(
        "sums are kept in float16 and overflow",
        nn.Linear,
        "__call__",
        halves_in_float16,
        fails=r"partial sums above",
        runs=r"^plain product",
        part="plain products",
        avoid="use bfloat16",
    ),
    Wrong(
        "the operand is read backwards",
        nn.Linear,
        "__call__",
        flipped_weights,
        fails=r"^plain product, (float32|bfloat16|float16)|partial sums",
        runs=r"^plain product|^packed product, mxfp4, float32",
        part="plain products",
        avoid="float",
    ),
    Wrong(
        "one packed expert is zero",
        mx,
        "gather_qmm",
        gathering(one_expert_zero),
        fails=r"^packed experts",
        runs=r"^(packed experts, affine 4-bit, groups of 64|plain experts), (float32|bfloat16)",
        part="expert products",
        avoid="experts packed as affine 4-bit",
    ),
    Wrong(
        "sorted pairs are taken to be as many for each expert",
        mx,
        "gather_qmm",
        gathering(even_runs),
        fails=r", sorted$",
        runs=r"^packed experts, (mxfp4|affine 4-bit, groups of 64), float32",
        part="expert products",
        avoid="experts packed as",
    ),
    Wrong(
        "sorted experts lose what is behind the last 64 terms",
        mx,
        "gather_qmm",
        gathering(lost_tail),
        fails=r"352 wide",
        runs=r"^packed experts, (mxfp4|nvfp4|affine 4-bit, groups of 32), bfloat16, (352|704)",
        part="expert products",
        avoid="experts packed as",
    ),
    Wrong(
        "experts that are a view are zero",
        mx,
        "gather_qmm",
        gathering(zero_if_view),
        fails=r"view of a larger array",
        runs=r"view of a larger array|^packed experts, affine 4-bit, groups of 64, float32",
        part="expert products",
        avoid="new version of mlx",
    ),
    Wrong(
        "rows beyond 32,768 are spoilt",
        mx,
        "gather_qmm",
        gathering(last_rows_spoilt),
        fails=r"32,802 rows",
        runs=r"32,802 rows|^packed experts, mxfp4, float32",
        part="expert products",
        avoid="--prefill-step-size",
    ),
    Wrong(
        "unsorted pairs read the next expert",
        mx,
        "gather_qmm",
        gathering(neighbours_weights),
        fails=r"unsorted$",
        runs=r"^packed experts, (mxfp4|nvfp4), float32",
        part="expert products",
        avoid="experts packed as",
    ),
    Wrong(
        "unsorted pairs read the next plain expert",
        mx,
        "gather_mm",
        gathering(neighbours_weights),
        fails=r"unsorted$|^expert layer",
        runs=r"^plain experts, float32|^expert layer, plain, float32",
        part="expert products",
        avoid="float",
    ),
    Wrong(
        "sorted rows with an axis put in are all the first one",
        mx,
        "gather_mm",
        gathering(first_row_only),
        fails=r"plain experts, .*, sorted$|expert layer, plain",
        runs=r"^plain experts|^expert layer, plain|^expert layer, affine .*float32",
        part="expert products",
        avoid="float",
    ),
    Wrong(
        "experts' rows are not put back in order",
        experts.Experts,
        "_grouped_products",
        lambda sound: lambda self, x, chosen: sound(self, x, chosen)[::-1],
        fails=r"^expert layer",
        runs=r"^expert layer, .*float32|^packed experts, mxfp4, float32|^router, float32",
        part="expert products",
        avoid="float",
    ),
    Wrong(
        "the sum of experts leaves one out",
        experts,
        "_weighted_sum",
        lambda sound: lambda out, weights: sound(out[:, :1], weights[:, :1]),
        fails=r"^expert layer",
        runs=r"^expert layer|^plain experts",
        part="expert products",
        avoid="computing in",
    ),
    Wrong(
        "argpartition misses one",
        mx,
        "argpartition",
        swapped_ends,
        fails=r"^argpartition|^shortlist|^candidates|^router",
        runs=r"^argpartition|^shortlist|^candidates|^router|^argsort|^acceptance",
        part="expert products, sampling",
    ),
    Wrong(
        "the router's weights are not renormalised",
        experts.Router,
        "__call__",
        not_normalised,
        fails=r"^router",
        runs=r"^router|^expert layer, .*float32",
        part="expert products",
        avoid="computing in",
    ),
    Wrong(
        "a mask is ignored",
        mx.fast,
        "scaled_dot_product_attention",
        attending(lambda call, q, k, v, mask: call(mask=None if is_array(mask) else mask)),
        fails=r"padded|window",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "a mask is read from its last row up",
        mx.fast,
        "scaled_dot_product_attention",
        attending(
            lambda call, q, k, v, mask: call(mask=mask[..., ::-1, :] if is_array(mask) else mask)
        ),
        fails=r"window",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "causal sees one key too few",
        mx.fast,
        "scaled_dot_product_attention",
        attending(
            lambda call, q, k, v, mask: (
                call(mask=causal(q, k, k.shape[2] - q.shape[2] - 1) if mask == "causal" else mask)
                if not is_array(mask)
                else call()
            )
        ),
        fails=r"causal",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "causal is aligned with the first key",
        mx.fast,
        "scaled_dot_product_attention",
        attending(
            lambda call, q, k, v, mask: (
                call(mask=causal(q, k, 0)) if not is_array(mask) and mask == "causal" else call()
            )
        ),
        fails=r"causal",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "the largest score is not subtracted",
        mx.fast,
        "scaled_dot_product_attention",
        attending(not_shifted),
        fails=r"scores near 200",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "scores of long heads leave out their second half",
        mx.fast,
        "scaled_dot_product_attention",
        attending(half_of_long_heads),
        fails=r"heads of 512, (no|causal|padded|window|keys)",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "queries take heads of keys in turn",
        mx.fast,
        "scaled_dot_product_attention",
        attending(heads_in_turn),
        fails=r"heads of 256, (no mask|causal|padded|window|keys)",
        runs=r"^attention",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "keys in a larger buffer are read with another stride",
        mx.fast,
        "scaled_dot_product_attention",
        attending(wrong_stride),
        fails=r"larger buffer",
        runs=r"^attention, .*float32",
        part="attention",
        avoid="computing in float32",
    ),
    Wrong(
        "rope swaps the halves of a head",
        mx.fast,
        "rope",
        swapped_halves,
        fails=r"^rope",
        runs=r"^rope|no mask",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "rope turns neighbours",
        mx.fast,
        "rope",
        adjacent_pairs,
        fails=r"^rope",
        runs=r"^rope",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "rope turns only the first row of single tokens",
        mx.fast,
        "rope",
        first_row_of_single_tokens,
        fails=r"^rope",
        runs=r"^rope",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "rope turns all rows from one position",
        mx.fast,
        "rope",
        one_position_for_all,
        fails=r"^rope",
        runs=r"^rope",
        part="attention",
        avoid="computing in",
    ),
    Wrong(
        "a compiled function answers with its first trace",
        layers,
        "_geglu",
        first_trace,
        fails=r"^geglu",
        runs=r"^geglu|^norm|^residual",
        part="compiled kernels",
        avoid="MLX_DISABLE_COMPILE=1",
    ),
    Wrong(
        "a compiled function keeps its first temperature",
        sampler,
        "_scaled",
        first_temperature,
        fails=r"^softcap and temperature",
        runs=r"^softcap|^softmax|^norm",
        part="compiled kernels",
        avoid="MLX_DISABLE_COMPILE=1",
    ),
    Wrong(
        "squares are summed in float16",
        layers,
        "_rms",
        squares_in_its_type,
        fails=r"squares above",
        runs=r"^norm|^residual",
        part="compiled kernels",
        avoid="use bfloat16",
    ),
    Wrong(
        "norms take the mean of their first 2,048 columns",
        mx.fast,
        "rms_norm",
        mean_of_the_first_block,
        fails=r"^norm|^residual",
        runs=r"^norm.*(float32|range)|^residual.*float32|^geglu, float32",
        part="compiled kernels",
        avoid="",
    ),
    Wrong(
        "the norm forgets the residual",
        layers,
        "_add_rms",
        lambda sound: lambda residual, *rest: sound(mx.zeros_like(residual), *rest),
        fails=r"^residual",
        runs=r"^norm|^residual",
        part="compiled kernels",
        avoid="computing in",
    ),
    Wrong(
        "softmax adds up in 16 bits",
        mx,
        "softmax",
        in_low_precision,
        fails=r"16$",
        runs=r"^softmax",
        part="compiled kernels",
        avoid="float16",
    ),
    Wrong(
        "statistics are computed in bfloat16",
        sampler,
        "_weigh",
        weights_in_bfloat16,
        fails=r"float32",
        runs=r"^entropy",
        part="sampling",
        avoid="computing in float32",
    ),
    Wrong(
        "Gumbel noise is too small",
        mx.random,
        "gumbel",
        lambda sound: lambda shape, key: 0.9 * sound(shape, key=key),
        fails=r"^two-level",
        runs=r"^two-level|^noise|^random",
        part="sampling",
        avoid="--temp 0",
    ),
    Wrong(
        "every chunk of the vocabulary is as likely",
        sampling_checks,
        "draw",
        draws_any_chunk,
        fails=r"^two-level",
        runs=r"^two-level|^noise|^random|^entropy, float32",
        part="sampling",
        avoid="--temp 0",
    ),
    Wrong(
        "half of the vocabulary is never noise",
        mx.random,
        "randint",
        even_tokens_only,
        fails=r"^noise|^random",
        runs=r"^two-level|^noise|^random",
        part="sampling",
        avoid="",
    ),
    Wrong(
        "a seed is another one",
        mx.random,
        "key",
        lambda sound: lambda seed: sound(seed ^ 1),
        fails=r"^random bits",
        runs=r"^two-level|^noise|^random",
        part="sampling",
        avoid="seeds",
    ),
    Wrong(
        "a sort repeats its first place",
        mx,
        "argsort",
        lambda sound: (
            lambda x, axis=-1: mx.concatenate(
                [sound(x, axis=axis)[..., :1], sound(x, axis=axis)[..., :-1]], axis=-1
            )
        ),
        fails=r"^argsort|^acceptance|^candidates",
        runs=r"^argsort|^acceptance|^candidates|^shortlist|^argpartition, 8",
        part="sampling",
    ),
    Wrong(
        "a running sum starts a place late",
        mx,
        "cumsum",
        lambda sound: lambda x, axis: sound(mx.roll(x, 1, axis=axis), axis=axis),
        fails=r"^acceptance",
        runs=r"^acceptance|^argsort",
        part="sampling",
    ),
    Wrong(
        "a write in place changes the snapshot too",
        LayerContext,
        "written",
        in_shared_memory,
        fails=r"^a snapshot",
        runs=r"^(a snapshot|steps write).*float32",
        part="writes in place",
        avoid="batches",
    ),
    Wrong(
        "a canvas is written a place late",
        LayerContext,
        "written",
        one_place_late,
        fails=r"^steps write|^rows that share",
        runs=r"^steps write|^rows that share|^columns",
        part="writes in place",
    ),
    Wrong(
        "rows of a batch get one canvas",
        LayerContext,
        "written",
        all_rows_into_one,
        fails=r"^steps|^a snapshot",
        runs=r"^(rows that share|steps write|a snapshot|columns)",
        part="writes in place",
    ),
    Wrong(
        "put_along_axis writes the first column only",
        mx,
        "put_along_axis",
        lambda sound: lambda x, at, values, axis: sound(x, at[:, :1], values[:, :1], axis=axis),
        fails=r"^columns",
        runs=r"^(rows that share|steps write|columns)",
        part="writes in place",
        avoid="sparse",
    ),
    Wrong(
        "later keys are put before earlier ones",
        LayerContext,
        "join",
        earlier_behind_later,
        fails=r"^logits, (bundled|random) model|^answers",
        runs=r"^(logits|answers).*not packed, float32",
        part="logits, trajectories",
        avoid="not packed",
    ),
    Wrong(
        "an expert of a whole model is zero",
        mx,
        "gather_mm",
        gathering(one_expert_zero),
        fails=r"not packed",
        runs=r"^logits, .*(not packed|affine 4-bit, groups of 64), float32",
        part="logits",
        avoid="not packed",
    ),
    Wrong(
        "attention of a whole model ignores masks",
        mx.fast,
        "scaled_dot_product_attention",
        attending(lambda call, q, k, v, mask: call(mask=None)),
        fails=r"^answers|^logits",
        runs=r"^(logits, random model|answers, policy fast), not packed, float32",
        part="logits, trajectories",
        avoid="not packed",
    ),
)


@pytest.fixture
def put(monkeypatch):
    """Return a function that puts a wrong kernel in place of a sound one, for the device only; the
    reference never sees it. Compiled functions run as plain ones meanwhile, as a trace that MLX
    keeps would hold the kernel of its first call."""

    def put(wrong: Wrong) -> None:
        sound_scope, made = device.under_test, []

        @contextmanager
        def scope():
            with sound_scope(), monkeypatch.context() as patch:
                if not made:
                    made.append(wrong.make(getattr(wrong.owner, wrong.name)))
                patch.setattr(wrong.owner, wrong.name, made[0])
                mx.disable_compile()
                try:
                    yield
                finally:
                    mx.enable_compile()

        monkeypatch.setattr(device, "under_test", scope)

    return put


def assert_named(wrong: Wrong, put: Callable[[Wrong], None]) -> None:
    """Assert that exactly the expected checks fail, under their heading, with their advice."""
    checks = [check for check in all_checks() if re.search(wrong.runs, check.name)]
    put(wrong)
    failed = [outcome for outcome in map(run_check, checks) if not outcome.passed]
    expected = [check.name for check in checks if re.search(wrong.fails, check.name)]
    assert expected and [outcome.check.name for outcome in failed] == expected
    assert {outcome.check.part for outcome in failed} == set(wrong.part.split(", "))
    for outcome in failed:
        assert outcome.error is None, outcome.error
        assert wrong.avoid in outcome.check.avoid


@pytest.mark.parametrize("wrong", one_in(3, WRONG), ids=lambda wrong: wrong.id)
def test_a_wrong_kernel_fails_the_checks_that_look_for_it_and_no_others(wrong, put):
    assert_named(wrong, put)


@pytest.mark.parametrize(
    "wrong",
    one_in(3, [wrong for wrong in WRONG if "products" in wrong.part]),
    ids=lambda wrong: wrong.id,
)
def test_a_wrong_product_is_named_within_the_tolerances_of_gpus(wrong, rounding_of_gpus, put):
    assert_named(wrong, put)


def kind(check: Check) -> str:
    """A check's name without packing, type and size."""
    packings = "|".join(re.escape(exact.name_of(packing)) for packing in exact.PACKINGS)
    name = re.sub(rf", ({packings}|not packed)", "", check.name)
    return re.sub(r", (float32|bfloat16|float16)|, \d+ wide", "", name)


def test_every_kind_of_check_has_a_wrong_kernel():
    checks = all_checks()
    seen_to_fail = {
        kind(check)
        for check in checks
        for wrong in WRONG
        if re.search(wrong.runs, check.name) and re.search(wrong.fails, check.name)
    }
    assert {kind(check) for check in checks} == seen_to_fail
