"""All random draws of a run, behind an interface with which tests replay another framework's
draws."""

from __future__ import annotations

from typing import Protocol, Self

import mlx.core as mx
import numpy as np

from .sampler import chunk_size, draw, statistics

# The purpose of a draw: part of its key, so that no two draws of a run share one.
_START, _SAMPLE, _RENOISE, _CONSTRAINED, _INSIDE = range(5)
_FIRST = 0  # the step in the key of a draw without one


class Noise(Protocol):
    """Draws of one row by canvas and step, both from 0, so that a loop may skip draws that it does
    not need."""

    def start(self, canvas_index: int, shape: tuple[int, int], vocab_size: int) -> mx.array:
        """Return the canvas before its first step: uniform tokens, int32 [1, L]."""

    def sample(self, canvas_index: int, step: int, logits: mx.array) -> mx.array:
        """Return a proposal, int32 [1, L], drawn from temperature-scaled logits [1, L, V]; under
        `canvas_width="answer"` for as many columns as the logits have."""

    def renoise(
        self, canvas_index: int, step: int, shape: tuple[int, int], vocab_size: int
    ) -> mx.array:
        """Return uniform tokens, int32 [1, L], for positions that the step did not accept."""


class SeededNoise:
    """Draws from a seed. Row i of a run under seed s has the draws of seed s + i."""

    def __init__(self, seed: int, attempt: int = 0):
        self.seed, self.attempt = seed, attempt

    def reroll(self, attempt: int) -> Self:
        """Return other draws, under a seed derived from this one; attempt 0 is the first try."""
        return type(self)(self.seed, attempt)

    def start(self, canvas_index: int, shape: tuple[int, int], vocab_size: int) -> mx.array:
        return self._uniform((canvas_index, _FIRST, _START), shape, vocab_size)

    def sample(self, canvas_index: int, step: int, logits: mx.array) -> mx.array:
        B, L, V = logits.shape
        return draw(statistics(logits), self.gumbels(canvas_index, step, (B, L), V))

    def gumbels(
        self, canvas_index: int, step: int, shape: tuple[int, int], vocab_size: int
    ) -> tuple[mx.array, mx.array]:
        """Return the Gumbel noise that `sample` uses, for `sampler.draw`: a loop that has the
        masses of the chunks need not compute the logits."""
        size = chunk_size(vocab_size)
        key = self._key((canvas_index, step, _SAMPLE))
        noise = mx.random.gumbel((*_one_row(shape), vocab_size // size + size), key=key)
        chunks, inside = mx.split(noise, [vocab_size // size], axis=-1)
        return chunks, inside

    def under_constraint(
        self, canvas_index: int, step: int, length: int, most: int
    ) -> tuple[np.ndarray, mx.array]:
        """Return the noise of a proposal under a constraint: uniform numbers in [0, 1), float64
        [length, 2], and Gumbel noise, float32 [1, length, most]."""
        uniforms = np.random.default_rng(self._words((canvas_index, step, _CONSTRAINED)))
        key = self._key((canvas_index, step, _INSIDE))
        return uniforms.random((length, 2)), mx.random.gumbel((1, length, most), key=key)

    def renoise(
        self, canvas_index: int, step: int, shape: tuple[int, int], vocab_size: int
    ) -> mx.array:
        return self._uniform((canvas_index, step, _RENOISE), shape, vocab_size)

    def _uniform(
        self, draw: tuple[int, int, int], shape: tuple[int, int], vocab_size: int
    ) -> mx.array:
        return mx.random.randint(0, vocab_size, _one_row(shape), key=self._key(draw))

    def _key(self, draw: tuple[int, int, int]) -> mx.array:
        """Return a key hashed from the seed and the draw's purpose: no key is used twice."""
        return mx.random.key(int(self._words(draw).generate_state(1, np.uint64)[0]))

    def _words(self, draw: tuple[int, int, int]) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, self.attempt, *draw])


def _one_row(shape: tuple[int, int]) -> tuple[int, int]:
    if shape[0] != 1:
        raise ValueError(f"draws belong to one row: shapes are (1, L), got {shape}")
    return shape
