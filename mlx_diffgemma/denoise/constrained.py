"""A canvas under a constraint: the likeliest string that fits as the draft, and proposals and
entropies from the model's distribution under the condition that the string fits.

The device reduces the vocabulary to a few thousand numbers per position, the host decides on
classes of tokens, and the device picks the tokens. The host waits once per step for that, for all
rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..constraint.decode import LEAST, best, check_budget, endings
from ..constraint.marginals import Marginals, Strings
from ..constraint.tokens import TokenAutomaton
from .classes import (
    Blocks,
    block_log_p,
    block_maxima,
    block_sums,
    class_sums,
    draw_of,
    likeliest_of,
)
from .sampler import Statistics, probability_of


@dataclass(frozen=True, slots=True, eq=False)
class TokenConstraint:
    """What the answers of rows must fit, over one checkpoint's tokens. Rows may share it."""

    automaton: TokenAutomaton
    blocks: Blocks

    @classmethod
    def of(cls, automaton: TokenAutomaton) -> TokenConstraint:
        """Prepare an automaton for rows."""
        return cls(automaton, Blocks.of(automaton))

    def check_budget(self, budget: int) -> None:
        """Raise `ConstraintError` if so many tokens are too few for any answer."""
        check_budget(self.automaton, budget)

    def after(self, tokens: np.ndarray, state: int) -> int:
        """Return the state behind some tokens."""
        return self.automaton.after(tokens, state)


@dataclass(frozen=True, slots=True, eq=False)
class CanvasConstraint:
    """What one canvas must fit."""

    row: TokenConstraint
    start: int  # the state behind all tokens before the first free one
    left: int  # tokens that may still be written, from the canvas's beginning on
    skip: int  # given tokens at the canvas's beginning
    pad_token_id: int

    def columns(self, width: int) -> slice:
        """Return the columns that are chosen; behind them there are pad tokens."""
        return slice(self.skip, min(width, self.left))

    def endings(self, width: int) -> np.ndarray:
        """Return the states that may stand behind these columns, bool [S]."""
        return endings(self.row.automaton, max(0, self.left - width))


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """What some columns of a canvas must fit, whatever stands around them."""

    row: TokenConstraint
    first: int
    stop: int
    ends: np.ndarray  # bool [S]: the states that may stand behind the last column
    # Called in each step with the strings that fit; the canvas has settled where it says so.
    watch: Callable[[Strings], bool] | None = None

    def columns(self, width: int) -> slice:
        """Return the columns."""
        assert self.stop <= width
        return slice(self.first, self.stop)

    def endings(self, width: int) -> np.ndarray:
        """Return the states that may stand behind these columns, bool [S]."""
        return self.ends

    def moved(self, places: int) -> Span:
        """Return the same, some places further on."""
        return replace(self, first=self.first + places, stop=self.stop + places)


class Choice(NamedTuple):
    """What is chosen for a canvas of W columns."""

    seen: Statistics  # of the distributions under the constraints
    proposal: mx.array  # int32 [1, W]
    probability: mx.array  # float32 [1, W], of the proposal's tokens under the constraints
    is_decided: bool = False  # a span's `watch` said so


class Look(NamedTuple):
    """A forward pass over a canvas under constraints."""

    constraints: Sequence[CanvasConstraint | Span]  # of different columns
    outputs: mx.array  # [1, W, V], before the softcap
    free: Choice  # what would be chosen without them, of the statistics of the outputs
    heat: mx.array
    cap: float
    # For draws: uniform numbers, float64 [L, 2], and Gumbel noise, float32 [1, L, 512]; None where
    # the likeliest string is the proposal.
    noise: tuple[np.ndarray, mx.array] | None

    @property
    def width(self) -> int:
        return int(self.outputs.shape[1])


class _Part(NamedTuple):
    """The columns of a look that one constraint speaks of, n of them."""

    bound: CanvasConstraint | Span
    columns: slice
    width: int  # of the canvas
    outputs: mx.array  # [1, n, V]
    thought: Statistics
    heat: mx.array
    cap: float
    noise: tuple[np.ndarray, mx.array] | None


def choose(looks: Sequence[Look]) -> list[Choice]:
    """Choose draft and proposal for each canvas. The host waits once.

    A canvas whose numbers are not finite keeps the model's own statistics: its row fails for that
    once it ends.
    """
    parts = [[_part(look, bound) for bound in look.constraints] for look in looks]
    numbers = [_numbers(part) for some in parts for part in some]
    flat = np.array(mx.concatenate([one.reshape(-1) for one in numbers]))
    pieces = iter(np.split(flat, np.cumsum([one.size for one in numbers])[:-1]))
    shapes = iter([one.shape[1:] for one in numbers])
    found = []
    for look, some in zip(looks, parts, strict=True):
        choice = look.free
        for part in some:
            choice = _choose(part, next(pieces).reshape(next(shapes)), choice)
        found.append(choice)
    return found


def _part(look: Look, bound: CanvasConstraint | Span) -> _Part:
    columns = bound.columns(look.width)
    is_whole = (columns.start, columns.stop) == (0, look.width)
    outputs, thought, noise = look.outputs, look.free.seen, look.noise
    if not is_whole:
        outputs, thought = outputs[:, columns], Statistics(*(x[:, columns] for x in thought))
    if noise is not None:
        noise = noise[0][columns], noise[1][:, columns]
    return _Part(bound, columns, look.width, outputs, thought, look.heat, look.cap, noise)


def _numbers(part: _Part) -> mx.array:
    """Return what the host needs of each column: float32 [1, n, 3 N + 1] for N blocks."""
    blocks, thought = part.bound.row.blocks, part.thought
    maxima = block_maxima(part.outputs, blocks)
    maxima = block_log_p(maxima, thought, part.outputs, part.heat, part.cap)
    sums, products = block_sums(thought.ratios, blocks)
    return mx.concatenate([maxima, sums, products, thought.confidence[..., None]], axis=-1)


def _choose(part: _Part, numbers: np.ndarray, before: Choice) -> Choice:
    """Return a choice with this part of it chosen."""
    bound, row, thought = part.bound, part.bound.row, part.thought
    if not np.isfinite(numbers).all():
        return before
    blocks, outputs = row.blocks, part.outputs
    maxima, sums, products = np.split(numbers[:, :-1], 3, axis=1)
    ends = bound.endings(part.width)
    start = 0 if isinstance(bound, Span) else bound.start
    by_class = blocks.joined(np.maximum, maxima, -np.inf)
    path = best(row.automaton, by_class, ends, start)
    masses, products = class_sums(sums, products, numbers[:, -1], blocks)
    strings = Strings.of(row.automaton, masses, ends, start)
    found = strings.marginals(products)
    draft = likeliest_of(outputs, _row(blocks.largest(maxima, path.classes)), blocks)
    at = np.arange(len(path.classes)), path.classes
    largest = np.maximum(by_class[at], LEAST)  # as `best` and `Strings` have it
    certainty = mx.array(
        np.minimum(np.exp(largest) * found.factors[at], 1)[None].astype(np.float32)
    )
    proposal, probability = draft, certainty
    if part.noise is not None:
        classes, proposal = _drawn(part, part.noise, found, sums)
        probability = _certainty(proposal, classes, found, thought)
    is_decided = before.is_decided
    if isinstance(bound, Span):
        if bound.watch is not None:
            is_decided |= bound.watch(strings)
    else:
        before = _filled(before, bound.pad_token_id)
    seen = before.seen
    seen = seen._replace(
        draft=_put(part, seen.draft, draft),
        entropy=_put(part, seen.entropy, mx.array(found.entropy[None].astype(np.float32))),
        confidence=_put(part, seen.confidence, certainty),
    )
    return Choice(
        seen,
        _put(part, before.proposal, proposal),
        _put(part, before.probability, probability),
        is_decided,
    )


def _filled(choice: Choice, token: int) -> Choice:
    """Return a choice of one token everywhere, with certainty."""
    seen = choice.seen
    draft = mx.full(seen.draft.shape, token, mx.int32)
    zeros, ones = mx.zeros(seen.entropy.shape), mx.ones(seen.confidence.shape)
    seen = seen._replace(draft=draft, entropy=zeros, confidence=ones)
    return Choice(seen, draft, ones, choice.is_decided)


def _drawn(
    part: _Part,
    noise: tuple[np.ndarray, mx.array],
    found: Marginals,
    sums: np.ndarray,
) -> tuple[np.ndarray, mx.array]:
    """Return the classes and the tokens, int32 [1, n], of a proposal that is drawn, each position
    by itself."""
    blocks, (uniforms, gumbels) = part.bound.row.blocks, noise
    classes = found.draw(uniforms[:, 0])
    chosen = _row(blocks.drawn(sums, classes, uniforms[:, 1]))
    tokens = draw_of(part.outputs, chosen, gumbels, blocks, part.heat, part.cap)
    return classes, tokens


def _certainty(
    tokens: mx.array, classes: np.ndarray, found: Marginals, cut: Statistics
) -> mx.array:
    """Return the probability of tokens under the constraint, float32 [1, n]."""
    factors = found.factors[np.arange(len(classes)), classes]
    factors = np.minimum(factors, np.finfo(np.float32).max).astype(np.float32)
    return mx.minimum(probability_of(tokens, cut) * mx.array(factors[None]), 1)


def _put(part: _Part, whole: mx.array, own: mx.array) -> mx.array:
    """Return the numbers of all columns, [1, W, ...], with a part's own in its columns."""
    if own.shape[1] == whole.shape[1]:
        return own
    before, behind = whole[:, : part.columns.start], whole[:, part.columns.stop :]
    return mx.concatenate([before, own, behind], axis=1)


def _row(numbers: np.ndarray) -> mx.array:
    return mx.array(numbers[None].astype(np.int32))
