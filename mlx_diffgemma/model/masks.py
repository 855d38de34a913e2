"""Who may look at whom. Boolean arrays, True = may look; None = everybody sees everything.

Keys are numbered by their place in the padded batch, so that a row's padding, always on the left,
is one number per row.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

Mask = mx.array | Literal["causal"] | None


def causal_mask(
    start: int, count: int, *, first_key: int, window: int | None, padding: mx.array | None
) -> Mask:
    """For `count` queries from place `start` on, over keys `first_key .. start + count - 1`.

    Args:
      start: place of the first query.
      count: queries.
      first_key: place of the first key at hand; sliding layers have dropped the ones before.
      window: how many places a query sees, its own included; None for all before it.
      padding: int32 [B], places on the left of each row that hold no token; None where there are
        none.

    Returns:
      "causal" where that says it all, else bool [1 or B, 1, count, keys].
    """
    fits = window is None or start + count - first_key <= window
    if padding is None and fits:
        return "causal"
    query = mx.arange(start, start + count)[:, None]  # [S, 1]
    key = mx.arange(first_key, start + count)[None, :]  # [1, keys]
    allowed = key <= query
    if window is not None:
        allowed = allowed & (key > query - window)
    if padding is None:
        return allowed[None, None]
    # A padding query sees itself: a row of a softmax must not be empty. No token ever looks at it.
    allowed = (allowed & (key >= padding[:, None, None])) | (key == query)
    return allowed[:, None]  # [B, 1, S, keys]


def canvas_mask(keys: int, *, first_key: int, padding: mx.array | None) -> mx.array | None:
    """For canvas queries over `keys` keys from place `first_key` on, the canvas's own included.

    Every canvas row sees the same keys: the window of sliding layers ends at the canvas and does
    not move with the row.

    Returns:
      None, or bool [B, 1, 1, keys] where rows are padded.
    """
    if padding is None:
        return None
    key = mx.arange(first_key, first_key + keys)
    return (key >= padding[:, None])[:, None, None]
