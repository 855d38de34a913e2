"""MLX's limits while a model runs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_diffgemma.checkpoint.memory import CACHE_LIMIT_BYTES, generation_limits, recommended_bytes


def _cache_limit() -> int:
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_the_cache_is_bounded_during_a_run_and_as_before_after_it():
    before = mx.set_cache_limit(8 << 30)
    try:
        with generation_limits():
            assert _cache_limit() == CACHE_LIMIT_BYTES
        assert _cache_limit() == 8 << 30
    finally:
        mx.set_cache_limit(before)


def test_a_smaller_limit_of_the_user_stays():
    before = mx.set_cache_limit(1 << 20)
    try:
        with generation_limits():
            assert _cache_limit() == 1 << 20
    finally:
        mx.set_cache_limit(before)


def test_limits_come_back_after_an_error():
    before = _cache_limit()
    with pytest.raises(RuntimeError), generation_limits():
        raise RuntimeError
    assert _cache_limit() == before


def test_the_machine_recommends_some_memory():
    assert recommended_bytes() > 1 << 30
