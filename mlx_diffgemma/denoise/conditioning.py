"""Self-conditioning: the soft embeddings that a step gets from the last one's distributions, for
several rows together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..model import DiffusionGemma
from .canvas import Canvas

# Head, statistics and soft embedding go in pieces of whole rows: at most so many numbers over the
# vocabulary at once (64 MiB in float32), and at least one row. A large model's canvas is more, and
# fills the device alone.
_PIECE = 1 << 24


def self_conditioning(
    model: DiffusionGemma, canvases: Sequence[Canvas], mean_row: mx.array | None
) -> mx.array | None:
    """Return the soft embeddings [1, T, M] of all rows; None if no row has one."""
    if all(canvas.belief is None for canvas in canvases):
        return None
    alone = [c.belief is None or _is_sparse(c) for c in canvases]
    widths = [_believed(c) for c in canvases]
    parts = []
    for rows in pieces(widths, alone, model.config.text.vocab_size):
        first = canvases[rows[0]]
        if first.belief is None:  # adds exactly 0, as no self-conditioning does
            hidden = model.config.text.hidden_size
            parts.append(mx.zeros((1, first.plan.width, hidden), model.dtype))
        elif _is_sparse(first):
            parts.append(_placed(model, first, _sparse_embedding(model, first, mean_row)))
        else:
            beliefs = [_dense_belief(canvases[row]) for row in rows]
            weights, totals = (joined(x) for x in zip(*beliefs, strict=True))
            soft, at = model.mean_embedding(weights, totals), 0
            for row in rows:
                own = columns(soft, at, at + widths[row])
                parts.append(_placed(model, canvases[row], own))
                at += widths[row]
    return joined(parts)


def _believed(canvas: Canvas) -> int:
    """Return the columns that the next step computes and the last one computed."""
    W = canvas.plan.width
    return W if canvas.belief is None else min(W, canvas.belief.weights.shape[1])


def _is_sparse(canvas: Canvas) -> bool:
    belief = canvas.belief
    return (
        belief is not None
        and belief.likeliest is not None
        and canvas.plan.dense < _believed(canvas)
    )


def _dense_belief(canvas: Canvas) -> tuple[mx.array, mx.array]:
    """Return weights [1, W, V] and totals [1, W] of a row's last step."""
    belief, W = canvas.belief, _believed(canvas)
    assert belief is not None
    return columns(belief.weights, 0, W), columns(belief.total, 0, W)


def _sparse_embedding(model: DiffusionGemma, canvas: Canvas, mean_row: mx.array | None) -> mx.array:
    """Return a row's soft embedding [1, W, M] from the likeliest tokens, and exact for the most
    uncertain positions."""
    belief, W = canvas.belief, _believed(canvas)
    assert belief is not None and belief.likeliest is not None and mean_row is not None
    ids, probabilities = (x[:, :W] for x in belief.likeliest)
    soft = model.sparse_embedding(ids, probabilities, mean_row)
    if count := canvas.plan.dense:
        unsure = mx.argpartition(-belief.entropy[:, :W], kth=count - 1, axis=-1)
        unsure = unsure[:, :count, None]
        weights = mx.take_along_axis(belief.weights[:, :W], unsure, axis=1)
        total = mx.take_along_axis(belief.total[:, :W], unsure[..., 0], axis=1)
        exact = model.mean_embedding(weights, total)
        soft = mx.put_along_axis(soft, mx.broadcast_to(unsure, exact.shape), exact, axis=1)
    return soft


def _placed(model: DiffusionGemma, canvas: Canvas, soft: mx.array) -> mx.array:
    """Return a row's soft embedding for all columns of its next step: 0 where the last one did not
    compute one, and the pinned tokens' embeddings in their places."""
    W = canvas.plan.width
    if soft.shape[1] < W:
        soft = mx.pad(soft, [(0, 0), (0, W - soft.shape[1]), (0, 0)])
    if canvas.pinned is None:
        return soft
    given = model.embed(canvas.pinned.tokens[:, :W])
    return mx.where(canvas.pinned.free[:, :W, None], soft, given)


def pieces(
    widths: Sequence[int], alone: Sequence[bool], vocab_size: int
) -> Iterator[Sequence[int]]:
    """Yield neighbouring rows whose columns are multiplied with the vocabulary at once."""
    piece: list[int] = []
    for row, width in enumerate(widths):
        total = sum(widths[r] for r in piece) + width
        if piece and (alone[row] or alone[piece[-1]] or total * vocab_size > _PIECE):
            yield piece
            piece = []
        piece.append(row)
    yield piece


def columns(x: mx.array, start: int, stop: int) -> mx.array:
    """Return some columns of [1, W, ...]."""
    return x if (start, stop) == (0, x.shape[1]) else x[:, start:stop]


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Return parts [1, W, ...] of several rows beside each other."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=1)
