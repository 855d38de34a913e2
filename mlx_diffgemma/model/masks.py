"""Attention masks: boolean arrays, True where a query may attend to a key. None means no mask.

Keys are numbered by their place in the padded batch, so that a row's padding, always on the left,
is one number per row.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

Mask = mx.array | Literal["causal"] | None


def causal_mask(
    start: int,
    count: int,
    *,
    first_key: int,
    window: int | None,
    padding: mx.array | None,
    blocks: mx.array | None = None,
) -> Mask:
    """Return the mask for `count` queries from place `start` on, over keys `first_key .. start +
    count - 1`.

    Args:
      start: place of the first query.
      count: queries.
      first_key: place of the first key; sliding layers have dropped the ones before.
      window: places that a query attends to, its own included; None for all before it.
      padding: int32 [B], places on the left of each row that hold no token; None where there are
        none.
      blocks: int32 [1 or B, count], the image that each query belongs to, -1 for none: tokens of an
        image attend to each other, those after them and beyond the window too.

    Returns:
      "causal" if that is enough, else bool [1 or B, 1, count, keys].
    """
    fits = window is None or start + count - first_key <= window
    if padding is None and blocks is None and fits:
        return "causal"
    query = mx.arange(start, start + count)[:, None]  # [S, 1]
    key = mx.arange(first_key, start + count)[None, :]  # [1, keys]
    allowed = key <= query
    if window is not None:
        allowed = allowed & (key > query - window)
    if blocks is not None:  # whose keys are the last ones
        together = (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None]
        allowed = allowed | mx.pad(together, [(0, 0), (0, 0), (start - first_key, 0)])
    if padding is None:
        return allowed[None, None] if allowed.ndim == 2 else allowed[:, None]
    # A padding query attends to itself: a row of a softmax must not be empty. No token attends to
    # it.
    allowed = (allowed & (key >= padding[:, None, None])) | (key == query)
    return allowed[:, None]  # [B, 1, S, keys]


def canvas_mask(keys: int, *, first_key: int, padding: mx.array | None) -> mx.array | None:
    """Return the mask for canvas queries over `keys` keys from place `first_key` on, the canvas's
    own included.

    All canvas queries attend to the same keys: the window of sliding layers ends at the canvas and
    does not move with the query.

    Returns:
      None, or bool [B, 1, 1, keys] where rows are padded.
    """
    if padding is None:
        return None
    key = mx.arange(first_key, first_key + keys)
    return (key >= padding[:, None])[:, None, None]
