"""The given parts of an answer: pinned tokens, and the sets of tokens that free positions may hold.

Pinning is not freezing, which keeps tokens that the model accepted too early and left errors when
tried: pinned text is the caller's, not a guess of the model, and the free positions around it stay
open until the canvas has settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """Positions that together hold a string of an automaton."""

    start: int
    length: int
    automaton: Automaton


@dataclass(frozen=True, eq=False)
class TokenSets:
    """Sets of tokens as sorted ids. Rows may share them, and with them their arrays."""

    ids: Sequence[np.ndarray]
    _tables: dict[int, mx.array] = field(default_factory=dict)

    def table(self, vocab_size: int) -> mx.array:
        """Return which tokens are in each set, bool [1 + sets, V]; the first row allows all."""
        if vocab_size not in self._tables:
            table = np.zeros((1 + len(self.ids), vocab_size), bool)
            table[0] = True
            for row, members in zip(table[1:], self.ids, strict=True):
                row[members] = True
            self._tables[vocab_size] = mx.array(table)
        return self._tables[vocab_size]

    @cached_property
    def members(self) -> tuple[np.ndarray, np.ndarray, mx.array]:
        """Return where each set begins in the members of all, their numbers, and those members."""
        counts = np.array([len(members) for members in self.ids])
        joined = np.concatenate(self.ids).astype(np.int64)
        return np.cumsum(counts) - counts, counts, mx.array(joined)


NO_SETS = TokenSets(())


@dataclass(frozen=True, eq=False)
class Pinned:
    """The given parts of a row's answer, by position from its beginning; positions after the last
    given one are free."""

    tokens: np.ndarray  # int32 [N], FREE where the model writes
    # Sets of tokens, and the index of each position's set, int32 [N] or None.
    sets: TokenSets = NO_SETS
    choices: np.ndarray | None = None
    # Each span is decided as a whole and lies within one canvas. Its positions need sets too.
    spans: Sequence[Span] = ()

    def canvas(self, start: int, length: int, vocab_size: int) -> PinnedCanvas:
        """Return the part in one canvas; `start` is the canvas's first position."""
        stop = start + length

        def cut(given: np.ndarray, fill: int) -> np.ndarray:
            part = given[start:stop]
            return np.pad(part, (0, length - len(part)), constant_values=fill)[None]

        choices = np.full((1, length), ANY) if self.choices is None else cut(self.choices, ANY)
        inside = [s for s in self.spans if start <= s.start < stop]
        if any(s.start + s.length > stop for s in inside):
            raise TemplateError(
                f"a span crosses the border of two canvases, at position {stop}; one that is to "
                "hold as a whole must lie within one"
            )
        return PinnedCanvas(
            cut(self.tokens, FREE),
            self.sets,
            choices,
            [Span(s.start - start, s.length, s.automaton) for s in inside],
            vocab_size,
        )


@dataclass(frozen=True, eq=False)
class PinnedCanvas:
    """The given parts of one canvas."""

    host_tokens: np.ndarray  # int32 [1, L], FREE where the model writes
    sets: TokenSets
    choices: np.ndarray  # [1, L]
    spans: list[Span]
    vocab_size: int

    @cached_property
    def tokens(self) -> mx.array:
        """Pinned tokens, int32 [1, L]; the values at free positions do not matter."""
        return mx.array(np.maximum(self.host_tokens, 0).astype(np.int32))

    @cached_property
    def free(self) -> mx.array:
        """Free positions, bool [1, L]."""
        return mx.array(self.host_tokens == FREE)

    @property
    def has_free(self) -> bool:
        """Whether any position is free."""
        return bool((self.host_tokens == FREE).any())

    @cached_property
    def _chosen(self) -> np.ndarray:
        """The set of each position, ANY also at pinned ones."""
        return np.where(self.host_tokens == FREE, self.choices, ANY)

    @property
    def is_limited(self) -> bool:
        """Whether a set of tokens limits any free position."""
        return bool((self._chosen != ANY).any())

    def allowed(self, width: int) -> mx.array | None:
        """Return which tokens the first columns may hold, bool [1, width or 1, V]; None for all."""
        if self._only is not None:  # one set for all: no array of the canvas's size
            return self._only
        if not self.is_limited:
            return None
        return self.sets.table(self.vocab_size)[self._rows_of_table[:, :width]]

    def kept_to(self, tokens: mx.array) -> mx.array:
        """Map uniform tokens [1, L] to uniform tokens of each position's set, or to its pinned
        token."""
        if self.is_limited:
            starts, sizes, members = self._members
            scaled = (tokens.astype(mx.int64) * sizes) // self.vocab_size
            limited = members[starts + scaled].astype(mx.int32)
            tokens = mx.where(self._has_set, limited, tokens)
        return self.over(tokens)

    def over(self, tokens: mx.array) -> mx.array:
        """Return tokens [1, W] with the pinned ones in their places."""
        W = tokens.shape[1]
        return mx.where(self.free[:, :W], tokens, self.tokens[:, :W])

    def choose(self, seen: Statistics) -> mx.array:
        """Return the draft with the likeliest string in each span: int32 [1, W]. A span that a
        narrow canvas cuts is not changed."""
        draft = np.array(seen.draft)
        for span in self.spans:
            stop = span.start + span.length
            if stop <= draft.shape[1]:  # a host read per span and step
                probabilities = np.array(seen.ratios[0, span.start : stop])
                draft[0, span.start : stop] = span.automaton.best(probabilities)
        return mx.array(draft)

    @cached_property
    def in_span(self) -> mx.array:
        """Positions that belong to a span, bool [1, L]."""
        inside = np.zeros(self.host_tokens.shape, bool)
        for span in self.spans:
            inside[0, span.start : span.start + span.length] = True
        return mx.array(inside)

    @cached_property
    def _only(self) -> mx.array | None:
        """Return the set of all free positions, bool [1, 1, V], if they share one. Pinned positions
        do not count."""
        used = np.unique(self._chosen[self.host_tokens == FREE])
        if used.size != 1 or used[0] == ANY:
            return None
        return self.sets.table(self.vocab_size)[int(used[0]) + 1][None, None]

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
        starts, counts, members = self.sets.members
        chosen = np.maximum(self._chosen, 0)
        return mx.array(starts[chosen]), mx.array(counts[chosen]), members
