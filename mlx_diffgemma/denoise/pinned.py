"""The given parts of an answer: pinned tokens, and what free positions between them may hold.

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

from ..errors import TemplateError
from .constrained import Span

FREE = -1  # instead of a pinned token


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Some tokens, as sorted ids. Rows may share a set, and with it its arrays."""

    ids: np.ndarray
    _masks: dict[int, mx.array] = field(default_factory=dict)

    def mask(self, vocab_size: int) -> mx.array:
        """Return which tokens are in the set, bool [1, 1, V]."""
        if vocab_size not in self._masks:
            mask = np.zeros((1, 1, vocab_size), bool)
            mask[..., self.ids] = True
            self._masks[vocab_size] = mx.array(mask)
        return self._masks[vocab_size]

    @cached_property
    def members(self) -> mx.array:
        """The ids, int64 [n]."""
        return mx.array(self.ids.astype(np.int64))


@dataclass(frozen=True, eq=False)
class Pinned:
    """The given parts of a row's answer, by position from its beginning; positions after the last
    given one are free."""

    tokens: np.ndarray  # int32 [N], FREE where the model writes
    among: TokenSet | None = None  # the tokens that free positions may hold; None for all
    # What free positions must fit together; each lies within one canvas, and given tokens in it
    # are those that it allows there.
    spans: Sequence[Span] = ()

    def canvas(self, start: int, length: int, vocab_size: int) -> PinnedCanvas:
        """Return the part in one canvas; `start` is the canvas's first position."""
        stop = start + length

        part = self.tokens[start:stop]
        tokens = np.pad(part, (0, length - len(part)), constant_values=FREE)[None]
        inside = [span for span in self.spans if start <= span.first < stop]
        if any(span.stop > stop for span in inside):
            raise TemplateError(
                f"a span crosses the border of two canvases, at position {stop}; one that is to "
                "hold as a whole must lie within one"
            )
        spans = [span.moved(-start) for span in inside]
        return PinnedCanvas(tokens, self.among, spans, vocab_size)


@dataclass(frozen=True, eq=False)
class PinnedCanvas:
    """The given parts of one canvas."""

    host_tokens: np.ndarray  # int32 [1, L], FREE where the model writes
    among: TokenSet | None
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
    def given(self) -> np.ndarray:
        """The pinned tokens alone, int32 [n]."""
        return self.host_tokens[self.host_tokens != FREE]

    @property
    def has_free(self) -> bool:
        """Whether any position is free."""
        return bool((self.host_tokens == FREE).any())

    @property
    def is_limited(self) -> bool:
        """Whether free positions may hold some tokens only."""
        return self.among is not None and self.has_free

    @property
    def allowed(self) -> mx.array | None:
        """Return which tokens free positions may hold, bool [1, 1, V]; None for all. Pinned ones do
        not count."""
        if self.among is None or not self.has_free:
            return None
        return self.among.mask(self.vocab_size)

    def kept_to(self, tokens: mx.array) -> mx.array:
        """Map uniform tokens [1, L] to uniform tokens of the set, or to pinned tokens."""
        if self.among is not None:
            members = self.among.members
            scaled = (tokens.astype(mx.int64) * members.size) // self.vocab_size
            tokens = members[scaled].astype(mx.int32)
        return self.over(tokens)

    def over(self, tokens: mx.array) -> mx.array:
        """Return tokens [1, W] with the pinned ones in their places."""
        W = tokens.shape[1]
        return mx.where(self.free[:, :W], tokens, self.tokens[:, :W])
