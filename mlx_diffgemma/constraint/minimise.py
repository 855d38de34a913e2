"""The minimal automaton of a table of states.

The result has no dead state, and its states are numbered in the order in which they are reached, so
that two tables of one language give the same automaton.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from .dfa import DFA, NOWHERE

_SMALL = 20_000  # cells of a table up to which plain loops are faster


def finished(
    table: np.ndarray, accepting: np.ndarray, bounds: np.ndarray, classes: np.ndarray
) -> DFA:
    """Return the minimal automaton of a table whose initial state is 0.

    `table` is [S, C]; `bounds` and `classes` are [R]: the first symbol of each range, and its
    column of the table.
    """
    table, accepting = _without_dead(table, accepting)
    group = _equivalent(table, accepting)
    first = np.unique(group, return_index=True)[1]
    table = _mapped(table[first], group)
    accepting = accepting[first]
    order = _reached(table, int(group[0]))
    place = np.full(len(table), NOWHERE, np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    table, accepting = _mapped(table[order], place), accepting[order]
    same = np.zeros(len(classes), bool)
    distinct = equal_columns(table)[0][classes]
    same[1:] = distinct[1:] == distinct[:-1]
    return DFA(
        bounds[~same].astype(np.int32),
        np.ascontiguousarray(table[:, classes[~same]]).astype(np.int32),
        accepting,
    )


def equal_columns(table: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the class of each column of a table, and the first column of each class."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    classes = np.empty(table.shape[1], np.int64)
    for i, column in enumerate(np.ascontiguousarray(table.T)):
        number = known.setdefault(column.tobytes(), len(known))
        if number == len(first):
            first.append(i)
        classes[i] = number
    return classes, first


def _mapped(table: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return a table with other numbers of states; NOWHERE stays."""
    return np.where(table == NOWHERE, NOWHERE, numbers[table]).astype(np.int32)


def _edges(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs (state, next state), sorted by state."""
    sources, columns = np.nonzero(table != NOWHERE)
    pairs = np.unique(sources.astype(np.int64) * len(table) + table[sources, columns])
    return pairs // len(table), pairs % len(table)


def _without_dead(table: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return table and accepting states without those that lead to no accepting one."""
    sources, targets = _edges(table)
    alive = accepting.copy()
    while True:
        more = alive.copy()
        more[sources[alive[targets]]] = True
        if (more == alive).all():
            break
        alive = more
    if not alive[0]:
        return np.full((1, table.shape[1]), NOWHERE, np.int32), np.zeros(1, bool)
    numbers = np.where(alive, np.cumsum(alive) - 1, NOWHERE).astype(np.int32)
    return _mapped(table[alive], numbers), accepting[alive]


def _equivalent(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Return for each state the number of its class of equivalent states.

    Refines by 64-bit hashes of what each symbol leads to (Moore's algorithm, without sorting
    rows), and checks the result exactly.
    """
    columns = table.shape[1]
    order = np.argsort(table, axis=1, kind="stable")
    targets = np.take_along_axis(table, order, axis=1).ravel()
    begins = np.flatnonzero(np.diff(targets, prepend=-2) | (np.arange(targets.size) % columns == 0))
    for seed in count():
        rng = np.random.default_rng(seed)
        drawn = np.array(rng.integers(1, 2**64, columns, dtype=np.uint64))
        weights: np.ndarray = np.add.reduceat(drawn[order].ravel(), begins)
        to = targets[begins]
        weights[to == NOWHERE] = 0
        rows = np.flatnonzero(begins % columns == 0)
        group = _refined(accepting, rows, to, weights)
        first = np.unique(group, return_index=True)[1][group]
        lead = np.where(table == NOWHERE, NOWHERE, group[table])
        if (lead == lead[first]).all() and (accepting == accepting[first]).all():
            return group
    raise AssertionError  # never reached: another seed separates what collides


def _refined(
    accepting: np.ndarray, rows: np.ndarray, to: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    factor, half = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
    mark = np.where(accepting, np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))
    known, step = -1, 1
    while True:
        for _ in range(step):
            mixed = np.add.reduceat(weights * mark[to], rows) + mark * factor
            mixed ^= mixed >> half
            mark = mixed * factor
            mark ^= mark >> half
        ascending = np.sort(mark)
        distinct = 1 + int(np.count_nonzero(ascending[1:] != ascending[:-1]))
        if distinct == known:
            return np.unique(mark, return_inverse=True)[1].ravel()
        known, step = distinct, min(2 * step, 32)


def _reached(table: np.ndarray, start: int) -> np.ndarray:
    """Return the states in the order in which they are reached: level by level, and within one by
    state and symbol."""
    if table.size < _SMALL:
        rows, known, waiting = table.tolist(), {NOWHERE, start}, [start]
        for here in waiting:
            more = [target for target in dict.fromkeys(rows[here]) if target not in known]
            waiting += more
            known.update(more)
        return np.array(waiting)
    seen = np.zeros(len(table), bool)
    seen[start] = True
    levels = [np.array([start])]
    while levels[-1].size:
        ways = table[levels[-1]].ravel()
        ways = ways[ways != NOWHERE]
        ways = ways[~seen[ways]]
        found, first = np.unique(ways, return_index=True)
        seen[found] = True
        levels.append(found[np.argsort(first)])
    return np.concatenate(levels)
