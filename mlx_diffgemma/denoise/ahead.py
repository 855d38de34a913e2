"""Standing text that is read instead of denoised: its tokens are committed for as long as the
model, reading them from left to right, finds them likely. It is trained for that too: the causal
half of its loss is that of reading (train/objective.py)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .sampler import statistics

_FEWEST, _MOST = 16, 256  # tokens that a pass reads ahead; more after one that kept all of them
_FEW = 4  # a pass that keeps fewer is a miss
_MISSES = 4  # in a row, until a canvas is denoised instead
_SURE_OF = 8  # tokens in a row from which on it is known where the text goes on
_SKIPPED = 64  # tokens of it that may be left out at once
_WINDOW = 512  # written tokens that are compared with it, at most


class Read(NamedTuple):
    """What the model predicts behind a text and behind each token ahead of it, n + 1 places."""

    ratios: np.ndarray  # float32 [n], the probability of each token over that of the likeliest
    likeliest: np.ndarray  # int32 [n + 1]
    confidence: np.ndarray  # float32 [n + 1], the probability of the likeliest


class Kept(NamedTuple):
    """What becomes of the tokens ahead."""

    number: int  # how many are kept
    instead: int | None  # the token behind them, where the model is sure of one
    goes_on: bool  # whether all are kept, and more of the text comes behind them


def predictions(outputs: mx.array, ahead: np.ndarray, cap: float) -> Read:
    """Return what the model predicts, which the host waits for.

    Args:
      outputs: [1, n + 1, V], the head's outputs for the last token of a text and the n ahead.
      ahead: int32 [n].
      cap: of the softcap.
    """
    seen = statistics(outputs, cap=cap)
    ratios = mx.take_along_axis(seen.ratios[0, :-1], mx.array(ahead)[:, None], axis=-1)[:, 0]
    mx.eval(ratios, seen.draft, seen.confidence)
    return Read(np.array(ratios), np.array(seen.draft[0]), np.array(seen.confidence[0]))


class ReadAhead:
    """Which tokens of a standing text come next, as far as that is known."""

    def __init__(self, tokens: np.ndarray, least_ratio: float, confidence: float) -> None:
        """Prepare for a row.

        Args:
          tokens: int32 [n], the text and its end token.
          least_ratio: of a token that is kept, its probability over that of the likeliest.
          confidence: the probability from which another token is taken instead.
        """
        self._tokens, self._least, self._confidence = tokens, least_ratio, confidence
        self._from, self._written = 0, np.zeros(0, np.int32)  # a place in it, and what came since
        self.at = 0  # the place where it goes on
        self._count, self._misses = _FEWEST, 0

    def ahead(self, most: int) -> np.ndarray:
        """Return the tokens that a pass should read behind what is written, int32 [up to `most`];
        none while the text does not fit."""
        if self._misses >= _MISSES:
            return self._tokens[:0]
        return self._tokens[self.at : self.at + min(most, self._count)]

    def keep(self, read: Read) -> Kept:
        """Return how much is kept of the tokens that were read ahead."""
        fits = read.ratios >= self._least
        n = len(fits)
        count = n if fits.all() else int(fits.argmin())
        self._count = min(2 * self._count, _MOST) if count == n else _FEWEST
        is_sure = read.confidence[count] >= self._confidence
        # A pass that kept few and gives no token to go on with is the last one before a canvas.
        self._misses = 0 if count >= _FEW else self._misses + 1 if is_sure else _MISSES
        goes_on = 0 < count == n and self.at + n < len(self._tokens)
        return Kept(count, int(read.likeliest[count]) if is_sure else None, goes_on)

    def committed(self, tokens: np.ndarray, *, is_read: bool) -> None:
        """Take note of what has been written, int32 [n]: read or, else, denoised."""
        self._written = np.concatenate([self._written, tokens])[-_WINDOW:]
        near = self._tokens[self._from : self._from + len(self._written) + _SKIPPED]
        self.at = self._from + place_behind(self._written, near)
        last = self._written[-_SURE_OF:]
        if np.array_equal(last, self._tokens[max(self._from, self.at - _SURE_OF) : self.at]):
            self._from, self._written = self.at, self._written[:0]
        if not is_read:
            self._misses = _MISSES - 1  # one more pass shows whether the text fits again


def place_behind(written: np.ndarray, text: np.ndarray) -> int:
    """Return the place in a text behind the part that `written` stands for: with the fewest tokens
    put in, left out or changed; of several the one nearest to as many tokens."""
    places = np.arange(len(text) + 1)
    costs = places.copy()
    for token in written:
        step = np.minimum(costs[1:] + 1, costs[:-1] + (text != token))
        best = np.concatenate([[costs[0] + 1], step])
        costs = np.minimum.accumulate(best - places) + places
    likely = np.flatnonzero(costs == costs.min())
    return int(likely[np.abs(likely - len(written)).argmin()])
