"""The device's memory, estimates of what a model needs, and MLX's limits during a run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..config.generation import default_of
from ..config.model import ModelConfig, TextConfig

WARN_ABOVE = 0.9  # of what the device recommends
CACHE_LIMIT_BYTES = 2 << 30  # MLX's allocator keeps at most this much freed memory for reuse
# float32 [L, V] arrays alive at the peak of a step: outputs, ratios, products (sampler.py)
_LOGITS_COPIES = 3
_SCORES_BYTES = 64 << 20  # of the vision tower's attention at a time, where no kernel is fused


def context_bytes(config: TextConfig, tokens: int, element_bytes: int = 2) -> int:
    """Return the bytes of keys and values of `tokens` committed tokens; sliding layers keep at most
    `sliding_window - 1`."""
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
    """Return an estimate: weights, context, and the largest arrays of a step or of the prefill.

    `element_bytes` is the size of the computation's type: 2 on a GPU, 4 on the CPU backend.
    """
    logits = _LOGITS_COPIES * 4 * canvas_length * config.vocab_size
    # Scores and their softmax in one full layer, whose head size has no fused kernel.
    piece = min(tokens, default_of("prefill_step_size"))
    scores = 2 * config.num_attention_heads * piece * tokens * element_bytes
    return weight_bytes + context_bytes(config, tokens, element_bytes) + max(logits, scores)


def row_bytes(
    config: TextConfig, tokens: int, canvas_length: int, *, element_bytes: int = 2
) -> int:
    """Return an estimate of what one row adds while it is written: its context of at most `tokens`
    tokens, once more while it grows, and its arrays of the logits' size."""
    logits = _LOGITS_COPIES * 4 * canvas_length * config.vocab_size
    return 2 * context_bytes(config, tokens + canvas_length, element_bytes) + logits


def image_bytes(config: ModelConfig, image_tokens: Sequence[int], *, element_bytes: int = 2) -> int:
    """Return an estimate of what images add while they are read: the largest one in the vision
    tower, and the features of all. Their tokens' contexts are those of other tokens.

    Args:
      config: of a model with vision.
      image_tokens: of each image.
      element_bytes: as for `needed_bytes`.
    """
    if config.vision is None or not image_tokens:
        return 0
    vision, patches = config.vision, max(image_tokens) * config.vision.pooling_kernel_size**2
    # Gate, up and their product; the residual, its norm, and queries, keys and values.
    numbers = 3 * vision.intermediate_size + 6 * vision.hidden_size
    inside = patches * (numbers * element_bytes + 2 * 4 * vision.patch_width)
    scores = 4 * min(_SCORES_BYTES, 4 * vision.num_attention_heads * patches**2)
    features = sum(image_tokens) * config.text.hidden_size * element_bytes
    return inside + scores + features


def array_bytes(*models: Any) -> int:
    """Return the bytes of models' arrays; those that they share count once."""
    from mlx.utils import tree_flatten

    leaves: Any = tree_flatten([model.parameters() for model in models])
    return sum({id(array): array.nbytes for _, array in leaves}.values())


def recommended_bytes() -> int:
    """Return the memory that the device recommends to use at most, else the machine's memory."""
    import mlx.core as mx

    info = mx.device_info()
    if mx.metal.is_available():
        return int(info["max_recommended_working_set_size"])
    return int(info.get("total_memory", 0)) or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )


_limits = threading.Lock()
_before: tuple[int, int | None] = (0, None)
_runs = 0  # inside `generation_limits`; the first one sets the limits, the last one resets them


@contextmanager
def generation_limits() -> Iterator[None]:
    """Limit MLX's memory during a run. On Metal all recommended memory may stay wired, as in
    mlx-lm; everywhere the cache of freed memory is bounded. Runs of any threads may overlap."""
    global _runs, _before
    import mlx.core as mx

    with _limits:
        if _runs == 0:
            cache_limit = mx.set_cache_limit(CACHE_LIMIT_BYTES)
            mx.set_cache_limit(min(cache_limit, CACHE_LIMIT_BYTES))  # not above an earlier limit
            is_metal = mx.metal.is_available()
            _before = cache_limit, mx.set_wired_limit(recommended_bytes()) if is_metal else None
        _runs += 1
    try:
        yield
    finally:
        with _limits:
            _runs -= 1
            if _runs == 0:
                cache_limit, wired_limit = _before
                mx.set_cache_limit(cache_limit)
                if wired_limit is not None:
                    mx.synchronize()  # no work may be running when memory is unwired
                    mx.set_wired_limit(wired_limit)
