"""Standing text that is read instead of denoised: its tokens are committed for as long as the
model, reading them from left to right, finds them likely. It is trained for that too: the causal
half of its loss is that of reading (train/objective.py)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .sampler import statistics

CONFIDENCE = 0.8  # the probability from which another token is taken instead of one that stands
_FIRST_PASS, _LONGEST_PASS = 4, 256  # tokens; twice as many behind a pass that kept all
_MISS_BELOW = 4  # a pass that keeps fewer is a miss
_MOST_MISSES = 4  # in a row, until a canvas is denoised instead
_READS_FROM = 0.5  # of a pass's tokens: likely ones that show that the model can read
_SURE_OF = 8  # tokens in a row from which on it is known where the text goes on
_UNLIKE = 0.75  # edits per written token from which on these are not of the text
_SKIPPED = 64  # tokens of it that may be left out at once
_WINDOW = 512  # written tokens that are compared with it, at most


class Predictions(NamedTuple):
    """What the model predicts behind a text and behind each token ahead of it, n + 1 places."""

    ratios: np.ndarray  # float32 [n], the probability of each token over that of the likeliest
    likeliest: np.ndarray  # int32 [n + 1]
    confidence: np.ndarray  # float32 [n + 1], the probability of the likeliest


class Verdict(NamedTuple):
    """What becomes of the tokens ahead."""

    kept: int  # how many are committed
    instead: int | None  # the token in place of the next one, where the model is sure of it
    is_whole: bool  # whether all are, and more of the text comes behind them

    def written(self, ahead: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the tokens to commit, int32 [n], and how many of them are to be read again, since
        the next pass predicts what comes behind them."""
        if self.instead is not None:
            return np.append(ahead[: self.kept], np.int32(self.instead)), 1
        return ahead[: self.kept], int(self.is_whole)


def predict(outputs: mx.array, ahead: np.ndarray, cap: float) -> Predictions:
    """Return what the model predicts, which the host waits for.

    Args:
      outputs: [1, n + 1, V], the head's outputs for the last token of a text and the n ahead.
      ahead: int32 [n].
      cap: of the softcap.
    """
    seen = statistics(outputs, cap=cap)
    ratios = mx.take_along_axis(seen.ratios[0, :-1], mx.array(ahead)[:, None], axis=-1)[:, 0]
    mx.eval(ratios, seen.draft, seen.confidence)
    return Predictions(np.array(ratios), np.array(seen.draft[0]), np.array(seen.confidence[0]))


class ReadAhead:
    """Which tokens of a standing text come next, as far as that is known."""

    def __init__(
        self, tokens: np.ndarray, least_ratio: float, confidence: float = CONFIDENCE
    ) -> None:
        """Prepare for a row.

        Args:
          tokens: int32 [n], the text and its end token.
          least_ratio: of a token that is kept, its probability over that of the likeliest.
          confidence: the probability from which another token is taken instead.
        """
        self._tokens, self._least, self._confidence = tokens, least_ratio, confidence
        self._from, self._written = 0, np.zeros(0, np.int32)  # a place in it, and what came since
        self.at = 0  # the place where it goes on
        self._pass, self._misses = _FIRST_PASS, 0
        self._reads = False  # whether the model has found enough of the text likely

    def ahead(self, most: int) -> np.ndarray:
        """Return the tokens that a pass should read behind what is written, int32 [up to `most`];
        none while the text does not fit."""
        if self._misses >= _MOST_MISSES:
            return self._tokens[:0]
        return self._tokens[self.at : self.at + min(most, self._pass)]

    def judge(self, seen: Predictions) -> Verdict:
        """Return what becomes of the tokens that were read ahead."""
        fits = seen.ratios >= self._least
        if fits.all():
            self._pass, self._misses, self._reads = min(2 * self._pass, _LONGEST_PASS), 0, True
            n = len(fits)
            return Verdict(n, None, self.at + n < len(self._tokens))
        count, self._pass = int(fits.argmin()), _FIRST_PASS
        # A model that was not trained to read may be sure of anything, but finds little likely.
        self._reads |= count >= _MISS_BELOW or fits.mean() >= _READS_FROM
        is_sure = self._reads and bool(seen.confidence[count] >= self._confidence)
        # A pass that kept few and gives no token to go on with is the last one before a canvas.
        missed = self._misses + 1 if is_sure else _MOST_MISSES
        self._misses = 0 if count >= _MISS_BELOW else missed
        return Verdict(count, int(seen.likeliest[count]) if is_sure else None, False)

    def pause(self) -> None:
        """Read nothing more before a canvas is denoised."""
        self._misses = _MOST_MISSES

    def committed(self, tokens: np.ndarray, *, is_read: bool) -> None:
        """Take note of what has been written, int32 [n]: read or, else, denoised."""
        self._written = np.concatenate([self._written, tokens])[-_WINDOW:]
        near = self._tokens[self._from : self._from + len(self._written) + _SKIPPED]
        place, edits = place_behind(self._written, near)
        last = self._written[-_SURE_OF:]
        if len(self._written) > _SURE_OF and edits >= _UNLIKE * len(self._written):
            self.at, self._written = self._from, last
        else:
            self.at = self._from + place
            before = self._tokens[max(self._from, self.at - _SURE_OF) : self.at]
            if np.array_equal(last, before):
                self._from, self._written = self.at, self._written[:0]
        if not is_read:
            self._misses = _MOST_MISSES - 1  # one more pass shows whether the text fits again


def place_behind(written: np.ndarray, text: np.ndarray) -> tuple[int, int]:
    """Return the place in a text behind the part that `written` stands for, with the fewest tokens
    put in, left out or changed, and how many these are; of several places the one nearest to as
    many tokens."""
    places = np.arange(len(text) + 1)
    costs = places.copy()
    for token in written:
        step = np.minimum(costs[1:] + 1, costs[:-1] + (text != token))
        best = np.concatenate([[costs[0] + 1], step])
        costs = np.minimum.accumulate(best - places) + places
    likely = np.flatnonzero(costs == costs.min())
    return int(likely[np.abs(likely - len(written)).argmin()]), int(costs.min())
