"""Sums and maxima over groups of rows, where most groups are small and a few hold nearly all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 8  # members of every group that are taken one by one, of all groups at once


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Groups of rows; a row may be in several."""

    order: np.ndarray  # int64 [G]: the groups, those with most members first
    back: np.ndarray  # int64 [G]: the place of each group in that order
    rounds: tuple[np.ndarray, ...]  # the first members, second ones, ... of groups in that order
    large: tuple[np.ndarray, ...]  # in that order: further members

    @classmethod
    def of(cls, starts: np.ndarray, members: np.ndarray) -> Groups:
        """Return groups of at least one row each.

        Args:
          starts: int64 [G + 1], where each group begins in `members`.
          members: int64, the rows.
        """
        lengths = np.diff(starts)
        order = np.argsort(-lengths, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        most = min(_ROUNDS, int(lengths.max(initial=0)))
        counts = [int(np.count_nonzero(lengths > i)) for i in range(most)]
        rounds = tuple(members[starts[order[:count]] + i] for i, count in enumerate(counts))
        large = tuple(
            members[starts[group] + _ROUNDS : starts[group + 1]]
            for group in order[: int(np.count_nonzero(lengths > _ROUNDS))]
        )
        return cls(order, back, rounds, large)

    def reduce(self, operation: np.ufunc, rows: np.ndarray) -> np.ndarray:
        """Return each group's rows combined by an operation such as `np.maximum`.

        Args:
          operation: associative, of two numbers.
          rows: [N, L].

        Returns:
          [G, L], of the same type.
        """
        found = rows.take(self.rounds[0], axis=0)
        for members in self.rounds[1:]:
            part = found[: len(members)]
            operation(part, rows.take(members, axis=0), out=part)
        for one, members in zip(found, self.large, strict=False):
            operation(one, operation.reduce(rows.take(members, axis=0), axis=0), out=one)
        return found.take(self.back, axis=0)
