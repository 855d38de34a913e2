"""Automata made from automata: both, either, not, one behind another, repeats."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .dfa import DFA, NOWHERE
from .minimise import finished
from .net import SLACK, Limits, Net, determinise
from .ranges import SCALARS


def intersection(one: DFA, other: DFA, limits: Limits | None = None) -> DFA:
    """Return the automaton of the strings that both accept."""
    return _product(one, other, limits or Limits(), minus=False)


def difference(one: DFA, other: DFA, limits: Limits | None = None) -> DFA:
    """Return the automaton of the strings of the first that the other does not accept."""
    return _product(one, other, limits or Limits(), minus=True)


def _product(one: DFA, other: DFA, limits: Limits, *, minus: bool) -> DFA:
    bounds = np.union1d(one.bounds, other.bounds).astype(np.int64)
    a = np.searchsorted(one.bounds, bounds, side="right") - 1
    b = np.searchsorted(other.bounds, bounds, side="right") - 1
    pairs, classes = np.unique(a * len(other.bounds) + b, return_inverse=True)
    sink = len(other)  # the other's state behind NOWHERE
    left = one.table[:, pairs // len(other.bounds)].astype(np.int64)
    right = np.append(
        np.where(other.table == NOWHERE, sink, other.table),
        np.full((1, len(other.bounds)), sink),
        axis=0,
    )[:, pairs % len(other.bounds)].astype(np.int64)
    width = sink + 1
    numbers = {0: 0}
    level, rows = np.array([0], np.int64), []
    while level.size:
        limits.check_time()
        limits.check_states(len(numbers), slack=SLACK)
        from_one, from_other = left[level // width], right[level % width]
        ways = from_one * width + from_other
        is_out = from_one == NOWHERE
        if not minus:
            is_out |= from_other == sink
        ways[is_out] = NOWHERE
        found, inverse = np.unique(ways, return_inverse=True)
        known = len(numbers)
        numbered = [
            NOWHERE if code == NOWHERE else numbers.setdefault(code, len(numbers))
            for code in found.tolist()
        ]
        rows.append(np.array(numbered, np.int32)[inverse.reshape(ways.shape)])
        level = np.array(list(numbers)[known:], np.int64)
    codes = np.fromiter(numbers, np.int64, len(numbers))
    ends = np.append(other.accepting, False)[codes % width]
    accepting = one.accepting[codes // width] & (~ends if minus else ends)
    result = finished(np.concatenate(rows), accepting, bounds, classes.ravel())
    limits.check_states(len(result))
    return result


def anything() -> DFA:
    """Return the automaton of every text."""
    net = Net()
    state = net.state()
    net.move(state, SCALARS, state)
    return determinise(net, state, state)


def complement(dfa: DFA, limits: Limits | None = None) -> DFA:
    """Return the automaton of every text that one does not accept."""
    return difference(anything(), dfa, limits)


def union(parts: Iterable[DFA], limits: Limits | None = None) -> DFA:
    """Return the automaton of the strings that some part accepts."""
    net = Net(limits)
    start, end = net.state(), net.state()
    for part in parts:
        net.put(start, part, end)
    return determinise(net, start, end)


def concatenate(parts: Iterable[DFA | str], limits: Limits | None = None) -> DFA:
    """Return the automaton of a string of each part, one behind another; a text is itself."""
    net = Net(limits)
    start = at = net.state()
    for part in parts:
        if isinstance(part, str):
            at = net.spell(at, part)
        else:
            behind = net.state()
            net.put(at, part, behind)
            at = behind
    return determinise(net, start, at)


def repeat(part: DFA, low: int, high: int | None, limits: Limits | None = None) -> DFA:
    """Return the automaton of `low` to `high` strings of a part, without a limit for None."""
    net = Net(limits)
    start = at = net.state()
    end = net.state()
    for i in range(low if high is None else high):
        if i >= low:
            net.skip(at, end)
        behind = net.state()
        net.put(at, part, behind)
        at = behind
    if high is None:
        hub = net.state()
        net.skip(at, hub)
        net.put(hub, part, hub)
        at = hub
    net.skip(at, end)
    return determinise(net, start, end)


def is_empty(dfa: DFA) -> bool:
    """Return whether no string is accepted."""
    return not dfa.accepting.any()
