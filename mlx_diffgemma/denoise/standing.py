"""Text that stands where a canvas is written, for a warm start: laid along the distributions of a
step that does not see it, and kept where the model finds it likely too.

A canvas that shows the standing text from the beginning, a part of it made noise, does not do: the
model was trained to trust what is no noise, so that a wrong token that would fit stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from .ahead import ReadAhead

NONE = -1  # instead of a token that is kept
_SHIFT = 2.0  # the cost of skipping tokens or columns, in tokens that are not kept
_SKIPPED = 0.01  # the cost of each token that is skipped
_EQUAL = 0.1  # any agreement, for texts that are compared with each other
_ON, _BETWEEN, _OVER = range(3)  # behind a column with a token, one without, skipped tokens


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Text that stands in some columns of a canvas."""

    tokens: np.ndarray  # int32 [n]
    first: int  # column
    stop: int
    begins: int = 0  # the token that stands in the first column, if nothing has moved
    is_whole: bool = False  # whether its last token belongs into the last column


class Stands(Protocol):
    """What stands where a row writes."""

    @property
    def reading(self) -> ReadAhead | None:
        """How it is read before a canvas is denoised; None if it is not."""

    def columns(self, width: int) -> int:
        """Return how many columns of the next canvas are likely to be needed."""

    def texts(self, begin: int, width: int) -> Sequence[Standing]:
        """Return the texts in the row's canvas of some width, the first columns of which are given;
        none while nothing is to be kept."""

    def kept(self, kept: Kept) -> None:
        """Take note of what a step has kept of them."""

    def committed(self, tokens: np.ndarray, *, is_read: bool = False) -> None:
        """Take note of what has been written, int32 [n], read or denoised."""


class StandingAnswer:
    """A whole answer that stands; each canvas is one part of it."""

    def __init__(
        self, tokens: np.ndarray, ends: tuple[int, int], *, reading: ReadAhead | None = None
    ) -> None:
        """Prepare for a row.

        Args:
          tokens: int32 [n].
          ends: the token behind them, and the one that fills a canvas after it.
          reading: of the tokens and the first end, if they are read too.
        """
        self._tokens, self._ends, self._at = tokens, ends, 0
        self.reading = reading

    def columns(self, width: int) -> int:
        return min(width, max(0, len(self._tokens) - self._at) + 1)

    def texts(self, begin: int, width: int) -> Sequence[Standing]:
        part, begins = self._near(width)
        return [Standing(part, begin, width, begins)]

    def kept(self, kept: Kept) -> None:
        pass

    def committed(self, tokens: np.ndarray, *, is_read: bool = False) -> None:
        if self.reading is not None:
            self.reading.committed(tokens, is_read=is_read)
            self._at = min(self.reading.at, len(self._tokens))
            return
        part, begins = self._near(len(tokens))
        are_equal = (tokens[:, None] == part[None]).astype(float)
        reached = self._at + lay(are_equal, _EQUAL, begins=begins).reached - begins
        self._at = min(reached, len(self._tokens))

    def _near(self, width: int) -> tuple[np.ndarray, int]:
        """Return the text around the place where the next canvas begins, and that place in it."""
        start, stop = max(0, self._at - width), self._at + 2 * width
        part = self._tokens[start:stop]
        if stop >= len(self._tokens):
            end, fill = self._ends
            part = np.concatenate([part, [end], np.full(width, fill)])
        return part.astype(np.int32), self._at - start


class Kept(NamedTuple):
    """What a step keeps of the texts that stand in its canvas."""

    tokens: np.ndarray  # int32 [1, W], NONE where nothing is kept
    reached: list[int]  # the place behind the last token kept of each text

    def length(self, ends: Sequence[int]) -> int | None:
        """Return the columns up to the first end token that is kept, included; None without one."""
        columns = np.flatnonzero(np.isin(self.tokens[0], ends))
        return int(columns[0]) + 1 if columns.size else None


class Laid(NamedTuple):
    """Standing text along columns."""

    places: np.ndarray  # int [W]: the place in the text of the token kept in each column, or NONE
    reached: int  # the place behind the last one kept; where the text began, if there is none


def lay(ratios: np.ndarray, agreement: float, *, begins: int = 0, is_whole: bool = False) -> Laid:
    """Lay tokens along columns, in order, so that the kept ones are many and likely.

    A column keeps the token that lies there or not. To keep costs what the ratio says in nats, not
    to keep ln(1 / agreement), and to skip tokens or columns twice that.

    Args:
      ratios: float [W, n], the probability of each token in each column over that of the column's
        likeliest.
      agreement: the least ratio of a token that is kept, above 0.
      begins: the place in the text that lies in the first column at no cost.
      is_whole: whether all of the text lies in these columns; else its end need not.

    Source: alignment with affine gaps, Gotoh, J. Mol. Biol. 162 (1982), 705.
    """
    W, n = ratios.shape
    loss = -math.log(agreement)
    gain = np.full((W, n), -loss)
    fits = ratios >= agreement
    gain[fits] = np.log(ratios[fits])
    # Best scores [n + 1] behind some columns, with so many tokens behind too.
    on = np.full(n + 1, -_SHIFT * loss)
    on[begins] = 0.0
    between = np.full(n + 1, -np.inf)
    trail = []  # where the best scores came from
    for column in range(W + 1):
        over, skipped_from = _skipping(np.maximum(on, between), loss)
        layers = np.stack([on, between, over])
        from_layer = layers.argmax(axis=0)
        is_opened = np.maximum(on, over) - _SHIFT * loss > between
        opened_from = np.where(is_opened, np.where(on >= over, _ON, _OVER), _BETWEEN)
        trail.append((from_layer, opened_from, skipped_from, between > on))
        if column < W:
            between = np.maximum(between, np.maximum(on, over) - _SHIFT * loss) - loss
            on = np.concatenate([[-np.inf], layers.max(axis=0)[:-1] + gain[column]])
    place = n if is_whole else int(layers.max(axis=0).argmax())
    layer, places = int(layers[:, place].argmax()), np.full(W, NONE)
    column = W
    while column > 0:
        from_layer, opened_from, skipped_from, is_between = trail[column]
        if layer == _OVER:
            place = int(skipped_from[place])
            layer = _BETWEEN if is_between[place] else _ON
        column -= 1
        if layer == _ON:
            place -= 1
            if fits[column, place]:
                places[column] = place
            layer = int(trail[column][0][place])
        else:
            layer = int(trail[column][1][place])
    kept = places[places != NONE]
    return Laid(places, int(kept[-1]) + 1 if kept.size else begins)


def _skipping(behind: np.ndarray, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the best scores [n + 1] after at least one skipped token, and the places before."""
    costs = _SKIPPED * loss * np.arange(len(behind))
    raised = behind + costs
    best = np.maximum.accumulate(raised)
    at = np.where(raised == best, np.arange(len(behind)), 0)
    at = np.maximum.accumulate(at)
    over = np.full(len(behind), -np.inf)
    over[1:] = best[:-1] - _SHIFT * loss - costs[1:]
    return over, np.concatenate([[0], at[:-1]])


def keep(texts: Sequence[Standing], ratios: mx.array, agreement: float) -> Kept:
    """Return what a canvas of W columns keeps of the texts that stand in it.

    Args:
      texts: in different columns.
      ratios: float32 [1, W, V], see `Statistics`. The host waits for a few columns of it.
      agreement: see `lay`.
    """
    W = ratios.shape[1]
    kept, reached = np.full((1, W), NONE, np.int32), []
    for text in texts:
        stop = min(text.stop, W)
        ids, columns = np.unique(text.tokens, return_inverse=True)
        seen = np.array(mx.take(ratios[0, text.first : stop], mx.array(ids), axis=-1))
        laid = lay(seen[:, columns], agreement, begins=text.begins, is_whole=text.is_whole)
        is_kept = laid.places != NONE
        kept[0, text.first : stop][is_kept] = text.tokens[laid.places[is_kept]]
        reached.append(laid.reached)
    return Kept(kept, reached)
