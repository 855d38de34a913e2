"""What of an answer is given: tokens that stand, and what the free positions may hold.

Pinning is not the freezing that was found to leave warts (a token that the model accepted early and
may not take back): pinned text is not the model's guess but the caller's, so there is nothing to
take back, and the free positions around it stay open until the canvas has settled.
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

FREE = -1  # in place of a pinned token
ANY = -1  # in place of the index of a set of tokens


@dataclass(frozen=True, slots=True)
class Span:
    """Positions of one row that hold a string of an automaton, together."""

    row: int
    start: int
    length: int
    automaton: Automaton


@dataclass(frozen=True, eq=False)
class Pinned:
    """What is given of the answers of a batch, by position from their beginning; what comes behind
    the last given position is free."""

    tokens: np.ndarray  # int32 [B, N], FREE where the model writes
    # Sets of tokens, sorted ids; and which of them each position may hold, int32 [B, N] or None.
    sets: Sequence[np.ndarray] = ()
    choices: np.ndarray | None = None
    # Each is decided as a whole and lies within one canvas. Its positions need sets too.
    spans: Sequence[Span] = ()

    def canvas(self, start: int, length: int, vocab_size: int) -> PinnedCanvas:
        """The part of it that one canvas holds; `start` is that of its first position."""
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


@dataclass(frozen=True, eq=False)
class PinnedCanvas:
    """What is given in one canvas."""

    host_tokens: np.ndarray  # int32 [B, L], FREE where the model writes
    sets: tuple[np.ndarray, ...]
    choices: np.ndarray  # [B, L]
    spans: list[Span]
    vocab_size: int

    @cached_property
    def tokens(self) -> mx.array:
        """int32 [B, L]; what stands at free positions does not matter."""
        return mx.array(np.maximum(self.host_tokens, 0).astype(np.int32))

    @cached_property
    def free(self) -> mx.array:
        """bool [B, L]."""
        return mx.array(self.host_tokens == FREE)

    @property
    def has_free(self) -> np.ndarray:
        """Whether anything is left to write, bool [B]."""
        return (self.host_tokens == FREE).any(axis=1)

    @cached_property
    def _chosen(self) -> np.ndarray:
        """The set of each position, ANY also where it is pinned."""
        return np.where(self.host_tokens == FREE, self.choices, ANY)

    def allowed(self, width: int) -> mx.array | None:
        """What the first columns may hold, bool [B or 1, width or 1, V]; None for anything."""
        if self._only is not None:  # one set for all that is free: nothing of the canvas's size
            return self._only
        if not self._is_limited:
            return None
        return self._table[self._rows_of_table[:, :width]]

    def kept_to(self, tokens: mx.array) -> mx.array:
        """Uniform tokens [B, L] as uniform tokens of what each position may hold; pinned ones
        where there are any."""
        if self._is_limited:
            starts, sizes, members = self._members
            scaled = (tokens.astype(mx.int64) * sizes) // self.vocab_size
            limited = members[starts + scaled].astype(mx.int32)
            tokens = mx.where(self._has_set, limited, tokens)
        return self.over(tokens)

    def over(self, tokens: mx.array) -> mx.array:
        """Tokens [B, W] with the pinned ones in their places."""
        W = tokens.shape[1]
        return mx.where(self.free[:, :W], tokens, self.tokens[:, :W])

    def choose(self, seen: Statistics) -> mx.array:
        """The draft, with the likeliest string in each span: int32 [B, W]. A span that a narrow
        look has cut is left as it is."""
        draft = np.array(seen.draft)
        for span in self.spans:
            stop = span.start + span.length
            if stop <= draft.shape[1]:  # a host read per span and step
                probabilities = np.array(seen.ratios[span.row, span.start : stop])
                draft[span.row, span.start : stop] = span.automaton.best(probabilities)
        return mx.array(draft)

    @cached_property
    def in_span(self) -> mx.array:
        """Positions that are decided together with others, bool [B, L]."""
        inside = np.zeros(self.host_tokens.shape, bool)
        for span in self.spans:
            inside[span.row, span.start : span.start + span.length] = True
        return mx.array(inside)

    @cached_property
    def _is_limited(self) -> bool:
        return bool((self._chosen != ANY).any())

    @cached_property
    def _only(self) -> mx.array | None:
        """The one set of all free positions, bool [1, 1, V], where there is only one. It is not
        looked at where a position is pinned."""
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
        """Where the members of each position's set begin, how many they are, and all of them."""
        counts = np.array([len(members) for members in self.sets])
        starts = np.cumsum(counts) - counts
        chosen = np.maximum(self._chosen, 0)
        parts = (starts[chosen], counts[chosen], np.concatenate(self.sets))
        return tuple(mx.array(part.astype(np.int64)) for part in parts)  # type: ignore[return-value]
