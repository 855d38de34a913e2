"""The given parts of an answer: pinned tokens, and the sets of tokens that free positions may hold.

Pinning is not freezing, which keeps tokens that the model accepted too early and left errors when
tried: pinned text is the caller's, not a guess of the model, and the free positions around it stay
open until the canvas has settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..constraint.automaton import Automaton
from ..errors import TemplateError
from .sampler import Statistics

FREE = -1  # instead of a pinned token
ANY = -1  # instead of the index of a set of tokens


@dataclass(frozen=True, slots=True)
class Span:
    """Positions of one row that together hold a string of an automaton."""

    row: int
    start: int
    length: int
    automaton: Automaton


@dataclass(frozen=True, eq=False)
class Pinned:
    """The given parts of a batch's answers, by position from their beginning; positions after the
    last given one are free."""

    tokens: np.ndarray  # int32 [B, N], FREE where the model writes
    # Sets of tokens, as sorted ids; and the index of each position's set, int32 [B, N] or None.
    sets: Sequence[np.ndarray] = ()
    choices: np.ndarray | None = None
    # Each span is decided as a whole and lies within one canvas. Its positions need sets too.
    spans: Sequence[Span] = ()

    def canvas(self, start: int, length: int, vocab_size: int) -> PinnedCanvas:
        """Return the part in one canvas; `start` is the canvas's first position."""
        B, stop = len(self.tokens), start + length

        def cut(given: np.ndarray, fill: int) -> np.ndarray:
            part = given[:, start:stop]
            return np.pad(part, [(0, 0), (0, length - part.shape[1])], constant_values=fill)

        choices = np.full((B, length), ANY) if self.choices is None else cut(self.choices, ANY)
        inside = [s for s in self.spans if start <= s.start < stop]
        if any(s.start + s.length > stop for s in inside):
            raise TemplateError(
                f"a span crosses the border of two canvases, at position {stop}; one that is to "
                "hold as a whole must lie within one"
            )
        return PinnedCanvas(
            cut(self.tokens, FREE),
            tuple(self.sets),
            choices,
            [Span(s.row, s.start - start, s.length, s.automaton) for s in inside],
            vocab_size,
        )


def begun_with(rows: Sequence[Sequence[int]], length: int, vocab_size: int) -> PinnedCanvas | None:
    """Return a canvas whose rows begin with the given tokens; None if no row has any."""
    if not any(rows):
        return None
    tokens = np.full((len(rows), length), FREE, np.int32)
    for place, given in zip(tokens, rows, strict=True):
        place[: len(given)] = given[:length]
    return Pinned(tokens).canvas(0, length, vocab_size)


@dataclass(frozen=True, eq=False)
class PinnedCanvas:
    """The given parts of one canvas."""

    host_tokens: np.ndarray  # int32 [B, L], FREE where the model writes
    sets: tuple[np.ndarray, ...]
    choices: np.ndarray  # [B, L]
    spans: list[Span]
    vocab_size: int

    @cached_property
    def tokens(self) -> mx.array:
        """Pinned tokens, int32 [B, L]; the values at free positions do not matter."""
        return mx.array(np.maximum(self.host_tokens, 0).astype(np.int32))

    @cached_property
    def free(self) -> mx.array:
        """Free positions, bool [B, L]."""
        return mx.array(self.host_tokens == FREE)

    @property
    def has_free(self) -> np.ndarray:
        """Whether a row has free positions, bool [B]."""
        return (self.host_tokens == FREE).any(axis=1)

    @cached_property
    def _chosen(self) -> np.ndarray:
        """The set of each position, ANY also at pinned ones."""
        return np.where(self.host_tokens == FREE, self.choices, ANY)

    def allowed(self, width: int) -> mx.array | None:
        """Return which tokens the first columns may hold, bool [B or 1, width or 1, V]; None for
        all."""
        if self._only is not None:  # one set for all: no array of the canvas's size
            return self._only
        if not self._is_limited:
            return None
        return self._table[self._rows_of_table[:, :width]]

    def kept_to(self, tokens: mx.array) -> mx.array:
        """Map uniform tokens [B, L] to uniform tokens of each position's set, or to its pinned
        token."""
        if self._is_limited:
            starts, sizes, members = self._members
            scaled = (tokens.astype(mx.int64) * sizes) // self.vocab_size
            limited = members[starts + scaled].astype(mx.int32)
            tokens = mx.where(self._has_set, limited, tokens)
        return self.over(tokens)

    def over(self, tokens: mx.array) -> mx.array:
        """Return tokens [B, W] with the pinned ones in their places."""
        W = tokens.shape[1]
        return mx.where(self.free[:, :W], tokens, self.tokens[:, :W])

    def choose(self, seen: Statistics) -> mx.array:
        """Return the draft with the likeliest string in each span: int32 [B, W]. A span that a
        narrow canvas cuts is not changed."""
        draft = np.array(seen.draft)
        for span in self.spans:
            stop = span.start + span.length
            if stop <= draft.shape[1]:  # a host read per span and step
                probabilities = np.array(seen.ratios[span.row, span.start : stop])
                draft[span.row, span.start : stop] = span.automaton.best(probabilities)
        return mx.array(draft)

    @cached_property
    def in_span(self) -> mx.array:
        """Positions that belong to a span, bool [B, L]."""
        inside = np.zeros(self.host_tokens.shape, bool)
        for span in self.spans:
            inside[span.row, span.start : span.start + span.length] = True
        return mx.array(inside)

    @cached_property
    def _is_limited(self) -> bool:
        return bool((self._chosen != ANY).any())

    @cached_property
    def _only(self) -> mx.array | None:
        """Return the set of all free positions, bool [1, 1, V], if they share one. Pinned positions
        do not count."""
        used = np.unique(self._chosen[self.host_tokens == FREE])
        if used.size != 1 or used[0] == ANY:
            return None
        return self._table[int(used[0]) + 1][None, None]

    @cached_property
    def _table(self) -> mx.array:
        """bool [1 + sets, V]; the first row allows everything."""
        table = np.zeros((1 + len(self.sets), self.vocab_size), bool)
        table[0] = True
        for row, members in zip(table[1:], self.sets, strict=True):
            row[members] = True
        return mx.array(table)

    @cached_property
    def _rows_of_table(self) -> mx.array:
        return mx.array((self._chosen + 1).astype(np.int32))

    @cached_property
    def _has_set(self) -> mx.array:
        return mx.array(self._chosen != ANY)

    @cached_property
    def _members(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return where the members of each position's set begin, their numbers, and the members of
        all sets."""
        counts = np.array([len(members) for members in self.sets])
        starts = np.cumsum(counts) - counts
        chosen = np.maximum(self._chosen, 0)
        parts = (starts[chosen], counts[chosen], np.concatenate(self.sets))
        return tuple(mx.array(part.astype(np.int64)) for part in parts)  # type: ignore[return-value]
