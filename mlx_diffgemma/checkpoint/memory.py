"""How much memory there is, how much a model needs, and MLX's limits while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..config.generation import default_of
from ..config.model import TextConfig

WARN_ABOVE = 0.9  # of what the device recommends
CACHE_LIMIT_BYTES = 2 << 30  # MLX's allocator keeps at most this much freed memory for reuse
# float32 [L, V] arrays alive at the peak of a step: outputs, ratios, products (sampler.py)
_LOGITS_COPIES = 3


def context_bytes(config: TextConfig, tokens: int, element_bytes: int = 2) -> int:
    """Keys and values of `tokens` committed tokens; sliding layers keep at most `sliding_window -
    1`."""
    total = 0
    for layer in config.layers:
        kept = min(tokens, config.sliding_window - 1) if layer.is_sliding else tokens
        total += 2 * kept * layer.num_key_value_heads * layer.head_dim * element_bytes
    return total


def needed_bytes(
    config: TextConfig,
    weight_bytes: int,
    tokens: int,
    canvas_length: int,
    *,
    element_bytes: int = 2,
) -> int:
    """An estimate: weights, context, and the largest arrays of a step or of the prefill before it.

    `element_bytes` is the size of what is computed in: 2 on a GPU, 4 on the CPU backend.
    """
    logits = _LOGITS_COPIES * 4 * canvas_length * config.vocab_size
    # Scores and their softmax, of one full layer: heads of its size have no fused kernel.
    piece = min(tokens, default_of("prefill_step_size"))
    scores = 2 * config.num_attention_heads * piece * tokens * element_bytes
    return weight_bytes + context_bytes(config, tokens, element_bytes) + max(logits, scores)


def recommended_bytes() -> int:
    """What the device recommends to use at most; the machine's memory where it says nothing."""
    import mlx.core as mx

    info = mx.device_info()
    if mx.metal.is_available():
        return int(info["max_recommended_working_set_size"])
    return int(info.get("total_memory", 0)) or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )


_before: tuple[int, int | None] = (0, None)
_runs = 0  # inside `generation_limits`; the first one in sets the limits, the last one out resets


@contextmanager
def generation_limits() -> Iterator[None]:
    """Metal: all recommended memory may stay wired, as in mlx-lm. Everywhere: a bounded cache of
    freed memory. Runs may overlap."""
    global _runs, _before
    import mlx.core as mx

    if _runs == 0:
        cache_limit = mx.set_cache_limit(CACHE_LIMIT_BYTES)
        mx.set_cache_limit(min(cache_limit, CACHE_LIMIT_BYTES))  # not above what somebody had set
        is_metal = mx.metal.is_available()
        _before = cache_limit, mx.set_wired_limit(recommended_bytes()) if is_metal else None
    _runs += 1
    try:
        yield
    finally:
        _runs -= 1
        if _runs == 0:
            cache_limit, wired_limit = _before
            mx.set_cache_limit(cache_limit)
            if wired_limit is not None:
                mx.synchronize()  # nothing may still be running when memory is unwired
                mx.set_wired_limit(wired_limit)
