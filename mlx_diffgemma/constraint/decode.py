"""The likeliest string of tokens that a constraint allows, and what a budget of tokens allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConstraintError, NumbersError
from .tokens import FAR, TokenAutomaton

LEAST = -100.0  # every token has at least this log probability, so that forced ones stay possible


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """A string of L tokens up to the choice of a token of each class."""

    classes: np.ndarray  # int64 [L]: the class of each token
    states: np.ndarray  # int64 [L + 1]: from the first state to the last
    score: float  # log probability of the likeliest tokens of these classes, each at least LEAST


def check_budget(automaton: TokenAutomaton, budget: int) -> int:
    """Return the fewest tokens of an answer, end token included.

    Args:
      automaton: of the constraint.
      budget: how many tokens may be written.

    Raises:
      ConstraintError: if these are too few, or no string of tokens fits.
    """
    least = int(automaton.distance[0])
    if least == FAR:
        raise ConstraintError("no text of this checkpoint's tokens fits the constraint")
    if least > budget:
        raise ConstraintError(
            f"the shortest answer that fits the constraint has {least} tokens with its end, and "
            f"at most {budget} may be written; allow at least {least}"
        )
    return least


def endings(automaton: TokenAutomaton, remaining: int) -> np.ndarray:
    """Return the states in which a canvas may end, bool [S]: those from which the tokens that
    remain behind it suffice. Where none remain, that is the end alone."""
    return automaton.distance <= remaining


def best(
    automaton: TokenAutomaton, maxima: np.ndarray, endings: np.ndarray, start: int = 0
) -> Path:
    """Return the likeliest string with one token per row.

    Of several, it is the one that takes the edge, then the class, with the lowest number at the
    first position where they differ.

    Args:
      automaton: of the constraint.
      maxima: float [L, K]: the largest log probability of a token of each class, of independent
        positions. -inf counts as LEAST, like everything below it.
      endings: bool [S], the states that the string may lead to.
      start: the state before it.

    Raises:
      NumbersError: if a maximum is NaN.
      ValueError: if shapes disagree, or there is no such string.

    Source: Viterbi 1967, over sets of classes.
    """
    L, S = len(maxima), len(automaton.distance)
    check_shapes(automaton, maxima, endings)
    maxima = np.maximum(maxima, np.float32(LEAST))
    of_sets = automaton.classes_by_set.reduce(np.maximum, np.ascontiguousarray(maxima.T))
    of_sets = np.ascontiguousarray(of_sets.T).astype(np.float64)
    values = np.full((L + 1, S), -np.inf)
    values[L, endings] = 0.0
    edges = len(automaton.sources)
    along, further = np.empty(edges), np.empty(edges)
    live = np.flatnonzero(np.diff(automaton.first_edges))
    firsts = automaton.first_edges[live]
    for i in reversed(range(L)):
        of_sets[i].take(automaton.sets, out=along, mode="clip")
        values[i + 1].take(automaton.targets, out=further, mode="clip")
        along += further
        values[i, live] = np.maximum.reduceat(along, firsts)
    if values[0, start] == -np.inf:
        raise ValueError(f"no string of {L} tokens leads from state {start} to an allowed one")
    return _followed(automaton, maxima, of_sets, values, start)


def check_shapes(automaton: TokenAutomaton, numbers: np.ndarray, endings: np.ndarray) -> None:
    """Raise an error unless there is a number for each class, [L, K], and endings are bool [S]."""
    S, K = len(automaton.distance), len(automaton.sizes)
    if numbers.ndim != 2 or numbers.shape[1] != K or endings.shape != (S,):
        raise ValueError(
            f"numbers {numbers.shape} and endings {endings.shape} are not [L, {K}] and [{S}]"
        )
    if np.isnan(numbers).any():
        raise NumbersError("the model computes numbers that are NaN")


def _followed(
    automaton: TokenAutomaton,
    maxima: np.ndarray,
    of_sets: np.ndarray,
    values: np.ndarray,
    start: int,
) -> Path:
    """Return the best path that the values of states promise."""
    L = len(maxima)
    states, classes = [start], []
    borders = automaton.first_edges.tolist()
    for i in range(L):
        edge, last = borders[states[-1]], borders[states[-1] + 1]
        if last - edge > 1:
            along = of_sets[i].take(automaton.sets[edge:last])
            along += values[i + 1].take(automaton.targets[edge:last])
            edge += int(along.argmax())
        number = int(automaton.sets[edge])
        members = automaton.classes_of(number)
        classes.append(int(members[maxima[i].take(members).argmax()]))
        states.append(int(automaton.targets[edge]))
    score = float(values[0, start])
    return Path(np.array(classes, np.int64), np.array(states), score)


def certain(automaton: TokenAutomaton, length: int, endings: np.ndarray) -> np.ndarray:
    """Return the tokens that are the same in all strings of a length, int32 [L]; -1 where they
    differ.

    Args:
      automaton: whose strings begin in state 0.
      length: L.
      endings: bool [S], the states that a string may lead to.

    Raises:
      ValueError: if there is no such string.
    """
    S, sources, targets = len(automaton.distance), automaton.sources, automaton.targets
    later = np.zeros((length + 1, S), bool)
    later[length] = endings
    for i in reversed(range(length)):
        later[i, sources[later[i + 1, targets]]] = True
    if not later[0, 0]:
        raise ValueError(f"no string of {length} tokens leads to an allowed state")
    found = np.full(length, -1, np.int32)
    here = np.zeros(S, bool)
    here[0] = True
    for i in range(length):
        ways = here[sources] & later[i + 1, targets]
        sets = np.unique(automaton.sets[ways])
        here = np.zeros(S, bool)
        here[targets[ways]] = True
        if len(sets) > 1 or len(members := automaton.classes_of(int(sets[0]))) > 1:
            continue
        if automaton.sizes[members[0]] == 1:
            found[i] = int(np.argmax(automaton.classes == members[0]))
    return found
