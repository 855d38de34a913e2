"""Parts one behind another as one automaton over tokens: given tokens, sets of tokens, automata.

A token may lead from one state to several, where a part may be longer or shorter. So a path is a
string together with the place of each part: a string counts once for each way to divide it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .groups import Groups
from .tokens import DEAD, TokenAutomaton, distances

_Edge = tuple[int, int, np.ndarray]  # source, target, classes


@dataclass(frozen=True, eq=False)
class Part:
    """An automaton over tokens, and the states at which its strings may end. It has no string of no
    tokens."""

    automaton: TokenAutomaton
    ends: np.ndarray  # bool [S]

    @classmethod
    def of_lifted(cls, automaton: TokenAutomaton) -> Part:
        """Return the part of a lifted automaton without its end tokens."""
        ends = np.zeros(len(automaton.distance), bool)
        ends[automaton.sources[automaton.targets == automaton.end]] = True
        ends[[0, automaton.end]] = False
        return cls(automaton, ends)

    @cached_property
    def _ways(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sources and targets of the edges that do not lead to the end token's state."""
        inner = (self.automaton.targets != self.automaton.end) | self.ends[self.automaton.end]
        return self.automaton.sources[inner], self.automaton.targets[inner]

    def lengths(self, most: int) -> list[int]:
        """Return the numbers of tokens, 1 to `most`, that its strings may have."""
        sources, targets = self._ways
        here, found = np.zeros(len(self.ends), bool), []
        here[0] = True
        for count in range(1, most + 1):
            reached = np.zeros_like(here)
            reached[targets[here[sources]]] = True
            here = reached
            if (here & self.ends).any():
                found.append(count)
        return found

    def edges(self) -> Iterator[tuple[int, int, int]]:
        """Yield source, target and number of the set of classes of each edge of its strings."""
        automaton = self.automaton
        keep = (automaton.targets != automaton.end) | self.ends[automaton.end]
        yield from zip(
            automaton.sources[keep].tolist(),
            automaton.targets[keep].tolist(),
            automaton.sets[keep].tolist(),
            strict=True,
        )


class Line:
    """An automaton that is being built. State 0 is the first one."""

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size
        self._count = 1
        self._given: list[tuple[int, int, int]] = []  # source, target, token
        self._sets: list[tuple[int, int, int]] = []  # source, target, number of the set
        self._known_sets: dict[int, tuple[int, np.ndarray]] = {}  # by id, which is kept
        self._parts: list[tuple[Part, list[tuple[int, int, int]]]] = []

    def state(self) -> int:
        """Return a new state."""
        self._count += 1
        return self._count - 1

    def token(self, source: int, token: int, target: int) -> None:
        """Let one token lead from one state to another."""
        self._given.append((source, target, token))

    def among(self, source: int, tokens: np.ndarray, target: int) -> None:
        """Let each of some tokens, int64 [n], lead from one state to another."""
        if len(tokens):
            number, _ = self._known_sets.setdefault(id(tokens), (len(self._known_sets), tokens))
            self._sets.append((source, target, number))

    def put(self, source: int, part: Part, target: int) -> range:
        """Let the strings of a part lead from one state to another, in states of their own; return
        these."""
        base = self._count
        self._count += len(part.ends)
        edges = []
        for one, other, number in part.edges():
            for start in (source, base) if one == 0 else (base + one,):
                edges.append((start, base + other, number))
                if part.ends[other]:
                    edges.append((start, target, number))
        self._parts.append((part, edges))
        return range(base, self._count)

    def automaton(self, end: int) -> TokenAutomaton:
        """Return the automaton; `end` becomes its last state, to which distances are."""
        classes, edges = self._edges()
        last = self._count
        renamed = [
            (last if s == end else s, last if t == end else t, found) for s, t, found in edges
        ]
        return _made(classes, renamed, last + 1)

    def part(self, end: int) -> Part:
        """Return the strings from state 0 to a state."""
        automaton = self.automaton(end)
        ends = np.zeros(len(automaton.distance), bool)
        ends[automaton.end] = True
        return Part(automaton, ends)

    def _edges(self) -> tuple[np.ndarray, list[_Edge]]:
        """Return the class of each token, and the edges."""
        given = np.unique(np.array([token for _, _, token in self._given], np.int64))
        found = np.zeros(self._size, np.int64)
        found[given] = 1 + np.arange(len(given))
        for _, tokens in self._known_sets.values():
            is_in = np.zeros(self._size, np.int64)
            is_in[tokens] = 1
            found = _both(found, is_in)
        for part in {id(part): part for part, _ in self._parts}.values():
            found = _both(found, part.automaton.classes.astype(np.int64))
        used = np.zeros(self._size, bool)
        used[given] = True
        for _, tokens in self._known_sets.values():
            used[tokens] = True
        for part, _ in self._parts:
            used |= part.automaton.classes != DEAD
        distinct, numbers = np.unique(np.where(used, found + 1, DEAD), return_inverse=True)
        classes = numbers + (distinct[0] != DEAD)
        edges: list[_Edge] = [(s, t, classes[[token]]) for s, t, token in self._given]
        members = [np.unique(classes[tokens]) for _, tokens in self._known_sets.values()]
        edges += [(s, t, members[number]) for s, t, number in self._sets]
        for part, own in self._parts:
            pairs = np.unique(
                part.automaton.classes.astype(np.int64) * (classes.max() + 1) + classes
            )
            theirs, ours = np.divmod(pairs, classes.max() + 1)
            starts = np.searchsorted(theirs, np.arange(len(part.automaton.sizes) + 1))
            sets: dict[int, np.ndarray] = {}
            for source, target, number in own:
                if number not in sets:
                    sets[number] = np.sort(
                        np.concatenate(
                            [
                                ours[starts[one] : starts[one + 1]]
                                for one in part.automaton.classes_of(number).tolist()
                            ]
                        )
                    )
                edges.append((source, target, sets[number]))
        return classes, edges


def _both(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return numbers that tell tokens apart which either of two numberings does."""
    _, found = np.unique(one * (int(other.max()) + 1) + other, return_inverse=True)
    return found.astype(np.int64)


def _made(classes: np.ndarray, edges: list[_Edge], states: int) -> TokenAutomaton:
    """Return the automaton of edges; the last state is the end."""
    joined: dict[tuple[int, int], list[np.ndarray]] = {}
    for source, target, found in edges:
        joined.setdefault((source, target), []).append(found)
    keys = sorted(joined)
    known: dict[bytes, int] = {}
    numbers = []
    for key in keys:
        parts = joined[key]
        members = parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))
        numbers.append(known.setdefault(members.astype(np.int64).tobytes(), len(known)))
    sources, targets = np.array(keys, np.int64).reshape(-1, 2).T
    K = int(classes.max()) + 1
    set_starts = np.append(0, np.cumsum([len(one) // 8 for one in known]))
    set_classes = np.frombuffer(b"".join(known), np.int64)
    by_class = np.argsort(set_classes, kind="stable")
    set_of = np.repeat(np.arange(len(known)), np.diff(set_starts))
    kind = np.uint16 if K < 1 << 16 else np.uint32
    return TokenAutomaton(
        classes.astype(kind),
        np.bincount(classes, minlength=K),
        None,
        sources,
        targets,
        np.array(numbers, np.int64),
        set_starts,
        set_classes,
        Groups.of(set_starts, set_classes),
        Groups.of(np.searchsorted(set_classes[by_class], np.arange(1, K + 1)), set_of[by_class]),
        np.searchsorted(sources, np.arange(states + 1)),
        distances(sources, targets, states),
    )
