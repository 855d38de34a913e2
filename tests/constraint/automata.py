"""Automata for tests and measurements of constraints: drawn ones, and expressions made of parts."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np

from mlx_diffgemma.constraint.dfa import DFA, NOWHERE, SPECIAL

MOST = 0x10FFFF


@dataclass(frozen=True)
class Part:
    """An expression: symbols in ranges, parts in a row, one of several, or any number of one."""

    kind: str
    parts: tuple[Part, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Part | str) -> Part:
        return Part("row", (self, of(other)))

    def __radd__(self, other: str) -> Part:
        return of(other) + self

    def __or__(self, other: Part | str) -> Part:
        return Part("either", (self, of(other)))


def of(text: Part | str) -> Part:
    """Return a text as a part."""
    if isinstance(text, Part):
        return text
    return row(*(symbols((ord(c), ord(c))) for c in text))


def symbols(*ranges: tuple[int, int]) -> Part:
    return Part("symbol", ranges=ranges)


def special(token: int) -> Part:
    return symbols((SPECIAL + token, SPECIAL + token))


def but(characters: str, low: int = 0) -> Part:
    """Any code point from `low` on but these."""
    ranges, start = [], low
    for code in sorted(map(ord, characters)):
        if start < code:
            ranges.append((start, code - 1))
        start = max(start, code + 1)
    return symbols(*ranges, (start, MOST))


def one_of(characters: str) -> Part:
    return symbols(*((ord(c), ord(c)) for c in characters))


def row(*parts: Part | str) -> Part:
    return Part("row", tuple(map(of, parts)))


def either(*parts: Part | str) -> Part:
    return Part("either", tuple(map(of, parts)))


def many(part: Part | str) -> Part:
    return Part("many", (of(part),))


def maybe(part: Part | str) -> Part:
    return either("", part)


def times(part: Part | str, low: int, high: int) -> Part:
    """`low` to `high` of one part."""
    return Part("times", (of(part),), ((low, high),))


def dfa(expression: Part | str) -> DFA:
    """Return the smallest automaton of an expression."""
    edges: list[dict[int, list[tuple[int, int]]]] = []
    free: list[set[int]] = []
    built: dict[tuple[int, int], int] = {}  # parts that occur twice before the same end are shared

    def new(*ways: int) -> int:
        edges.append({})
        free.append(set(ways))
        return len(edges) - 1

    def build(part: Part, end: int) -> int:
        """Return the state from which a part leads to `end`."""
        key = id(part), end
        if key not in built:
            built[key] = fragment(part, end)
        return built[key]

    def fragment(part: Part, end: int) -> int:
        if part.kind == "symbol":
            start = new()
            edges[start][end] = list(part.ranges)
            return start
        if part.kind == "row":
            for inner in reversed(part.parts):
                end = build(inner, end)
            return end
        if part.kind == "many":
            start = new(end)
            free[start].add(build(part.parts[0], start))
            return start
        if part.kind == "times":
            ((low, high),) = part.ranges
            here = end
            for count in range(high, 0, -1):
                here = build(part.parts[0], here)
                here = new(here, end) if count > low else here
            return here
        return new(*(build(inner, end) for inner in part.parts))

    end = new()
    return _deterministic(edges, free, build(of(expression), end), end)


def _deterministic(
    edges: list[dict[int, list[tuple[int, int]]]], free: list[set[int]], start: int, end: int
) -> DFA:
    cuts = {0}
    for ways in edges:
        for low, high in (pair for ranges in ways.values() for pair in ranges):
            cuts |= {low, high + 1}
    bounds = np.array(sorted(cuts), np.int64)
    columns = [
        [
            (target, column)
            for target, ranges in ways.items()
            for low, high in ranges
            for column in range(*np.searchsorted(bounds, (low, high + 1)))
        ]
        for ways in edges
    ]

    def closed(states: set[int]) -> frozenset[int]:
        seen, waiting = set(states), list(states)
        while waiting:
            more = free[waiting.pop()] - seen
            seen |= more
            waiting += more
        # Only states that read something, or end, tell sets apart.
        return frozenset(s for s in seen if columns[s] or s == end)

    first = closed({start})
    numbers, waiting, rows = {first: 0}, deque([first]), []
    while waiting:
        here: dict[int, set[int]] = {}
        for state in waiting.popleft():
            for target, column in columns[state]:
                here.setdefault(column, set()).add(target)
        known: dict[frozenset[int], int] = {}
        line = [NOWHERE] * len(bounds)
        for column, targets in here.items():
            key = frozenset(targets)
            if key not in known:
                target = closed(targets)
                if target not in numbers:
                    numbers[target] = len(numbers)
                    waiting.append(target)
                known[key] = numbers[target]
            line[column] = known[key]
        rows.append(line)
    accepting = np.array([end in states for states in numbers], bool)
    return _smallest(bounds, np.array(rows, np.int32), accepting)


def _smallest(bounds: np.ndarray, table: np.ndarray, accepting: np.ndarray) -> DFA:
    """Return the automaton with equal states joined and hopeless ones removed."""
    table = np.where(table == NOWHERE, len(table), table)
    table = np.vstack([table, np.full((1, table.shape[1]), len(table))])
    accepting = np.append(accepting, False)
    group, count = accepting.astype(np.int64), 0
    while True:
        _, group = np.unique(np.column_stack([group, group[table]]), axis=0, return_inverse=True)
        group = group.ravel()
        if group.max() + 1 == count:
            break
        count = group.max() + 1
    order = [group[0]] + [g for g in range(count) if g not in (group[0], group[-1])]
    place = np.full(count, NOWHERE)
    place[order] = np.arange(len(order))
    if group[0] == group[-1]:  # no string at all
        return DFA(np.zeros(1, np.int32), np.full((1, 1), NOWHERE, np.int32), np.zeros(1, bool))
    chosen = [int(np.flatnonzero(group == g)[0]) for g in order]
    table, accepting = place[group[table[chosen]]], accepting[chosen]
    keep = np.append(True, (table[:, 1:] != table[:, :-1]).any(axis=0))
    return DFA(bounds[keep].astype(np.int32), table[:, keep].astype(np.int32), accepting)


def drawn(rng: random.Random, states: int, alphabet: str, density: float = 0.5) -> DFA:
    """Return a drawn automaton without hopeless states, over some characters."""
    cuts = sorted({0} | {ord(c) for c in alphabet} | {ord(c) + 1 for c in alphabet})
    while True:
        table = np.full((states, len(cuts)), NOWHERE)
        for state in range(states):
            for character in alphabet:
                if rng.random() < density:
                    table[state, cuts.index(ord(character))] = rng.randrange(states)
        accepting = np.array([rng.random() < 0.3 for _ in range(states)])
        reached = {0}
        waiting = [0]
        while waiting:
            more = set(table[waiting.pop()].tolist()) - reached - {NOWHERE}
            reached |= more
            waiting += more
        lost = [s for s in range(states) if s not in reached]
        table[lost], accepting[lost] = NOWHERE, False
        made = _smallest(np.array(cuts), table, accepting)
        if made.accepting.any():
            return made


SPACE = many(one_of(" \t\n\r"))
HEX = one_of("0123456789abcdefABCDEF")
PLAIN = but('"\\', low=0x20)
ESCAPE = "\\" + (one_of('"\\/bfnrt') | ("u" + times(HEX, 4, 4)))
DIGIT = one_of("0123456789")
NUMBER = row(
    maybe("-"),
    either("0", one_of("123456789") + many(DIGIT)),
    maybe("." + DIGIT + many(DIGIT)),
    maybe(one_of("eE") + maybe(one_of("+-")) + DIGIT + many(DIGIT)),
)
STRING = '"' + many(PLAIN | ESCAPE) + '"'
BOOLEAN = either("true", "false")


def limited(length: int) -> Part:
    """A JSON string of at most some characters, with short escapes."""
    return '"' + times(PLAIN | ("\\" + one_of('"\\/bfnrt')), 0, length) + '"'


def array(item: Part) -> Part:
    more = many(row(SPACE, ",", SPACE, item))
    return row("[", SPACE, maybe(row(item, more, SPACE)), "]")


def json_object(members: dict[str, Part], required: frozenset[str] | None = None) -> Part:
    """A JSON object with keys in this order; all are required by default."""
    tails = {False: of(""), True: of("")}  # by: whether a member stands before
    for key, value in reversed(members.items()):
        member = row(f'"{key}"', SPACE, ":", SPACE, value, SPACE)
        optional = required is not None and key not in required
        new = {}
        for behind in (False, True):
            taken = row("," + SPACE if behind else "", member, tails[True])
            new[behind] = either(taken, tails[behind]) if optional else taken
        tails = new
    return row("{", SPACE, tails[False], "}")


def anything(depth: int) -> Part:
    """Any JSON value, nested so deep."""
    value = either(STRING, NUMBER, BOOLEAN, "null")
    for _ in range(depth):
        pair = row(STRING, SPACE, ":", SPACE, value)
        pairs = row(pair, many(row(SPACE, ",", SPACE, pair)), SPACE)
        value = either(
            STRING, NUMBER, BOOLEAN, "null", array(value), row("{", SPACE, maybe(pairs), "}")
        )
    return value


def person() -> DFA:
    """About 200 states."""
    fields = {"name": STRING, "age": NUMBER, "vip": BOOLEAN, "tags": array(STRING)}
    return dfa(json_object(fields, frozenset({"name"})))
