"""A canvas under a constraint: the likeliest string that fits as the draft, and proposals and
entropies from the model's distribution under the condition that the string fits.

The device reduces the vocabulary to a few thousand numbers per position, the host decides on
classes of tokens, and the device picks the tokens. The host waits once per step for that, for all
rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    ratio_factors,
    under_constraint,
)
from .sampler import Statistics, probability_of


@dataclass(frozen=True, slots=True, eq=False)
class TokenConstraint:
    """What the answers of rows must fit, over one checkpoint's tokens. Rows may share it."""

    automaton: TokenAutomaton
    blocks: Blocks
    # Proposals: each position by itself, or a whole string that fits.
    draws: Literal["positions", "strings"] = "positions"
    # What self-conditioning gets: the model's own distribution, or that under the constraint.
    belief: Literal["model", "constrained"] = "model"

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


class Look(NamedTuple):
    """A forward pass over a canvas under a constraint."""

    constraint: CanvasConstraint
    outputs: mx.array  # [1, W, V], before the softcap
    thought: Statistics  # of the outputs
    heat: mx.array
    cap: float
    # For draws: uniform numbers, float64 [L, 3], and Gumbel noise, float32 [1, L, 512]; None where
    # the likeliest string is the proposal.
    noise: tuple[np.ndarray, mx.array] | None


class Choice(NamedTuple):
    """What is chosen for a canvas of W columns."""

    seen: Statistics  # of the distributions under the constraint
    proposal: mx.array  # int32 [1, W]
    probability: mx.array  # float32 [1, W], of the proposal's tokens under the constraint


def choose(looks: Sequence[Look]) -> list[Choice]:
    """Choose draft and proposal for each canvas. The host waits once.

    A canvas whose numbers are not finite keeps the model's own statistics: its row fails for that
    once it ends.
    """
    parts = [_numbers(look) for look in looks]
    sizes = [part.size for part in parts]
    flat = np.array(mx.concatenate([part.reshape(-1) for part in parts]))
    pieces = np.split(flat, np.cumsum(sizes)[:-1])
    return [
        _choose(look, piece.reshape(part.shape[1:]))
        for look, piece, part in zip(looks, pieces, parts, strict=True)
    ]


def _numbers(look: Look) -> mx.array:
    """Return what the host needs of each chosen column: float32 [1, n, 3 N + 1] for N blocks."""
    blocks, thought = look.constraint.row.blocks, _cut(look)
    outputs = _columns(look, look.outputs)
    maxima = block_log_p(block_maxima(outputs, blocks), thought, outputs, look.heat, look.cap)
    sums, products = block_sums(thought.ratios, blocks)
    return mx.concatenate([maxima, sums, products, thought.confidence[..., None]], axis=-1)


def _choose(look: Look, numbers: np.ndarray) -> Choice:
    thought, row = look.thought, look.constraint.row
    if not np.isfinite(numbers).all():
        return Choice(thought, thought.draft, thought.confidence)
    W, blocks = thought.draft.shape[1], row.blocks
    maxima, sums, products = np.split(numbers[:, :-1], 3, axis=1)
    ends, start = look.constraint.endings(W), look.constraint.start
    by_class = blocks.joined(np.maximum, maxima, -np.inf)
    path = best(row.automaton, by_class, ends, start)
    masses, products = class_sums(sums, products, numbers[:, -1], blocks)
    strings = Strings.of(row.automaton, masses, ends, start)
    found = strings.marginals(products)
    outputs, cut = _columns(look, look.outputs), _cut(look)
    draft = likeliest_of(outputs, _row(blocks.largest(maxima, path.classes)), blocks)
    at = np.arange(len(path.classes)), path.classes
    largest = np.maximum(by_class[at], LEAST)  # as `best` and `Strings` have it
    certainty = mx.array(
        np.minimum(np.exp(largest) * found.factors[at], 1)[None].astype(np.float32)
    )
    proposal, probability = draft, certainty
    if look.noise is not None:
        classes, proposal = _drawn(look, strings, found, sums, outputs)
        probability = _certainty(proposal, classes, found, cut)
    pad = look.constraint.pad_token_id
    seen = thought._replace(
        draft=_wide(look, draft, pad),
        entropy=_wide(look, mx.array(found.entropy[None].astype(np.float32)), 0),
        confidence=_wide(look, certainty, 1),
    )
    if row.belief == "constrained":
        seen = _with_belief(look, seen, found, numbers[:, -1])
    return Choice(seen, _wide(look, proposal, pad), _wide(look, probability, 1))


def _drawn(
    look: Look, strings: Strings, found: Marginals, sums: np.ndarray, outputs: mx.array
) -> tuple[np.ndarray, mx.array]:
    """Return the classes and the tokens, int32 [1, n], of a proposal that is drawn."""
    assert look.noise is not None
    row, columns = look.constraint.row, look.constraint.columns(look.thought.draft.shape[1])
    uniforms, gumbels = look.noise[0][columns], look.noise[1][:, columns]
    if row.draws == "strings":
        classes = strings.sample(uniforms[:, :2]).classes
    else:
        classes = found.draw(uniforms[:, 0])
    chosen = _row(row.blocks.drawn(sums, classes, uniforms[:, 2]))
    return classes, draw_of(outputs, chosen, gumbels, row.blocks, look.heat, look.cap)


def _certainty(
    tokens: mx.array, classes: np.ndarray, found: Marginals, cut: Statistics
) -> mx.array:
    """Return the probability of tokens under the constraint, float32 [1, n]."""
    factors = found.factors[np.arange(len(classes)), classes]
    factors = np.minimum(factors, np.finfo(np.float32).max).astype(np.float32)
    return mx.minimum(probability_of(tokens, cut) * mx.array(factors[None]), 1)


def _with_belief(
    look: Look, seen: Statistics, found: Marginals, confidence: np.ndarray
) -> Statistics:
    """Return statistics whose weights are probabilities under the constraint, in the columns that
    are chosen."""
    ratios, weights = _columns(look, seen.ratios), seen.weights
    factors, draft = ratio_factors(found.factors, confidence), _columns(look, seen.draft)
    own = under_constraint(ratios, factors, draft, look.constraint.row.blocks)
    columns = look.constraint.columns(weights.shape[1])
    before, behind = slice(0, columns.start), slice(columns.stop, None)
    own = mx.concatenate(
        [weights[:, before], own.astype(weights.dtype), weights[:, behind]], axis=1
    )
    ones = mx.ones((1, columns.stop - columns.start))
    total = mx.concatenate([seen.total[:, before], ones, seen.total[:, behind]], axis=1)
    return seen._replace(weights=own, total=total)


def _columns(look: Look, x: mx.array) -> mx.array:
    columns = look.constraint.columns(x.shape[1])
    whole = (columns.start, columns.stop) == (0, x.shape[1])
    return x if whole else x[:, columns]


def _cut(look: Look) -> Statistics:
    return Statistics(*(_columns(look, x) for x in look.thought))


def _wide(look: Look, x: mx.array, fill: float) -> mx.array:
    """Return [1, n] numbers of the chosen columns as [1, W], filled on both sides."""
    W = look.thought.draft.shape[1]
    columns = look.constraint.columns(W)
    return mx.pad(x, [(0, 0), (columns.start, W - columns.stop)], constant_values=fill)


def _row(numbers: np.ndarray) -> mx.array:
    return mx.array(numbers[None].astype(np.int32))
