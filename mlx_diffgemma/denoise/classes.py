"""The device's part of a step under a constraint: a few thousand numbers per position in place of
the whole vocabulary, and tokens of the classes that the host has chosen from them.

The tokens of each class are cut into blocks of 512, then 32, 4 and 1, so that every block is full.
The device reduces the columns of blocks; the host joins the blocks of each class. A token is chosen
in two levels, as in `sampler.draw`: its block on the host, then the token among the block's few
columns on the device. Every operation is deterministic, and available on Metal, CUDA and CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..constraint.groups import Groups
from ..constraint.tokens import DEAD, TokenAutomaton
from ..model.backend import compiled_per_shape
from .sampler import Statistics, scaled_logits

_SIZES = 512, 32, 4, 1
LARGEST_BLOCK = _SIZES[0]  # tokens
# Numbers that are gathered at once: 64 MiB in float32.
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The tokens of an automaton's classes but DEAD, in N blocks."""

    columns: tuple[mx.array, ...]  # int32 [n, size], one per size: the tokens of blocks, ascending
    tokens: mx.array  # int32 [N, 512]: the same, -1 behind the end of smaller blocks
    by_class: Groups  # K - 1 groups of blocks, of all classes but DEAD
    starts: np.ndarray  # int64 [K + 1]: where each class's blocks begin in `members`
    members: np.ndarray  # int64 [N]: blocks, those of a class by their tokens

    @classmethod
    def of(cls, automaton: TokenAutomaton) -> Blocks:
        """Return the blocks of an automaton's classes."""
        order = np.argsort(automaton.classes, kind="stable")
        starts = np.append(0, np.cumsum(automaton.sizes))
        columns: list[list[np.ndarray]] = [[] for _ in _SIZES]
        owners: list[list[int]] = [[] for _ in _SIZES]
        for number in range(DEAD + 1, len(automaton.sizes)):
            rest = order[starts[number] : starts[number + 1]]
            for i, size in enumerate(_SIZES):
                count = len(rest) // size
                columns[i].append(rest[: count * size].reshape(count, size))
                owners[i] += [number] * count
                rest = rest[count * size :]
        # Sizes descend within a class, so a stable order leaves its blocks in that of their tokens.
        classes = np.array([number for one in owners for number in one], np.int64)
        members = np.argsort(classes, kind="stable")
        firsts = np.searchsorted(classes[members], np.arange(len(automaton.sizes) + 1))
        parts = [np.concatenate(one).astype(np.int32) for one in columns]
        tokens = np.full((len(classes), _SIZES[0]), -1, np.int32)
        at = 0
        for part in parts:
            tokens[at : at + len(part), : part.shape[1]] = part
            at += len(part)
        return cls(
            tuple(mx.array(one) for one in parts),
            mx.array(tokens),
            Groups.of(firsts[DEAD + 1 :], members),
            firsts,
            members,
        )

    def joined(self, operation: np.ufunc, numbers: np.ndarray, empty: float) -> np.ndarray:
        """Return numbers of blocks, [L, N], as float64 numbers of classes, [L, K]; `empty` is that
        of DEAD."""
        rows = np.ascontiguousarray(numbers.T).astype(np.float64)
        found = self.by_class.reduce(operation, rows)
        return np.concatenate([np.full((1, len(numbers)), empty), found]).T

    def largest(self, maxima: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Return for each position the block of a class that holds its likeliest token, the first
        if there are several: int32 [L].

        Args:
          maxima: [L, N], of blocks.
          classes: int [L], none of them DEAD.
        """
        found = np.empty(len(classes), np.int32)
        for i, number in enumerate(classes.tolist()):
            blocks = self.members[self.starts[number] : self.starts[number + 1]]
            found[i] = blocks[0] if len(blocks) == 1 else blocks[maxima[i, blocks].argmax()]
        return found

    def drawn(self, sums: np.ndarray, classes: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Draw for each position a block of a class by its mass: int32 [L].

        Args:
          sums: [L, N], of blocks; where all of a class are 0, its blocks count by their tokens.
          classes: int [L], none of them DEAD.
          uniforms: float [L], uniform in [0, 1).
        """
        found = np.empty(len(classes), np.int32)
        lengths = np.repeat(_SIZES, [len(one) for one in self.columns])
        for i, number in enumerate(classes.tolist()):
            blocks = self.members[self.starts[number] : self.starts[number + 1]]
            masses = np.cumsum(sums[i, blocks], dtype=np.float64)
            if masses[-1] == 0:
                masses = np.cumsum(lengths[blocks], dtype=np.float64)
            at = int(np.searchsorted(masses, uniforms[i] * masses[-1], side="right"))
            found[i] = blocks[min(at, int(np.searchsorted(masses, masses[-1])))]
        return found


def block_maxima(outputs: mx.array, blocks: Blocks) -> mx.array:
    """Return the largest output of each block: [1, W, N], of the outputs' type."""
    return _reduced(outputs, blocks, lambda columns: columns.max(axis=-1))


def block_sums(ratios: mx.array, blocks: Blocks) -> tuple[mx.array, mx.array]:
    """Return the sums of r and of r log r over each block: float32 [1, W, N] twice.

    Args:
      ratios: [1, W, V], see `Statistics`.
      blocks: of the constraint.
    """
    ratios = ratios.astype(mx.float32)
    sums = _reduced(ratios, blocks, lambda columns: columns.sum(axis=-1))
    return sums, _reduced(ratios, blocks, lambda columns: _products(columns).sum(axis=-1))


def block_log_p(
    maxima: mx.array, seen: Statistics, outputs: mx.array, heat: float | mx.array, cap: float
) -> mx.array:
    """Return the log probabilities of blocks' likeliest tokens: float32 [1, W, N].

    Args:
      maxima: [1, W, N], from `block_maxima`; cap and temperature are monotone, so that the largest
        output is the largest logit.
      seen: the statistics of the outputs.
      outputs: [1, W, V].
      heat: temperature.
      cap: of the softcap.
    """
    top = mx.take_along_axis(outputs, seen.draft[..., None], axis=-1)
    top = scaled_logits(top, heat, cap)
    return scaled_logits(maxima, heat, cap) - top + mx.log(seen.confidence)[..., None]


def class_sums(
    sums: np.ndarray, products: np.ndarray, confidence: np.ndarray, blocks: Blocks
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of p and of p log p over each class, float64 [L, K] twice, for `Strings`.

    Args:
      sums: [L, N], of the ratios r = p / confidence over blocks.
      products: [L, N], of r log r.
      confidence: [L], the probability of the likeliest token.
      blocks: of the constraint.
    """
    scale = confidence.astype(np.float64)[:, None]
    masses = blocks.joined(np.add, sums, 0.0) * scale
    return masses, blocks.joined(np.add, products, 0.0) * scale + masses * np.log(scale)


def likeliest_of(outputs: mx.array, chosen: mx.array, blocks: Blocks) -> mx.array:
    """Return the likeliest token of one block per position, the lowest if there are several: int32
    [1, W].

    Args:
      outputs: [1, W, V].
      chosen: int32 [1, W], blocks.
      blocks: of the constraint.
    """
    tokens, values = _inside(outputs, chosen, blocks)
    return _picked(tokens, mx.argmax(values, axis=-1, keepdims=True))


def draw_of(
    outputs: mx.array,
    chosen: mx.array,
    gumbels: mx.array,
    blocks: Blocks,
    heat: float | mx.array,
    cap: float,
) -> mx.array:
    """Draw a token of one block per position: int32 [1, W].

    Args:
      outputs: [1, W, V].
      chosen: int32 [1, W], blocks.
      gumbels: standard Gumbel noise, float32 [1, W, 512].
      blocks: of the constraint.
      heat: temperature.
      cap: of the softcap.

    Source: the Gumbel-max trick, arXiv 1611.01144.
    """
    tokens, values = _inside(outputs, chosen, blocks)
    logits = scaled_logits(values, heat, cap)
    logits = mx.where(tokens < 0, -mx.inf, logits + gumbels)
    return _picked(tokens, mx.argmax(logits, axis=-1, keepdims=True))


def _reduced(x: mx.array, blocks: Blocks, reduce: Callable[[mx.array], mx.array]) -> mx.array:
    """Return [1, W, N] numbers made of the columns [1, W, n, size] of blocks."""
    W, parts = x.shape[1], []
    for columns in blocks.columns:
        count, size = columns.shape
        step = max(1, _PIECE // (W * size))
        for at in range(0, count, step):
            few = columns[at : at + step]
            gathered = mx.take_along_axis(x, few.reshape(1, 1, -1), axis=-1)
            parts.append(reduce(gathered.reshape(1, W, -1, size)))
    return mx.concatenate(parts, axis=-1)


def _inside(outputs: mx.array, chosen: mx.array, blocks: Blocks) -> tuple[mx.array, mx.array]:
    """Return the tokens of one block per position and their outputs, [1, W, 512] both: -1 and -inf
    behind the end of the block."""
    tokens = blocks.tokens[chosen]
    values = mx.take_along_axis(outputs, mx.maximum(tokens, 0), axis=-1)
    return tokens, mx.where(tokens < 0, -mx.inf, values)


def _picked(tokens: mx.array, at: mx.array) -> mx.array:
    return mx.take_along_axis(tokens, at, axis=-1)[..., 0]


@compiled_per_shape
def _products(ratios: mx.array) -> mx.array:
    return mx.where(ratios > 0, ratios * mx.log(ratios), 0.0)
