"""Nets, which automata are made from: states with moves on sets of symbols and skips on nothing.

A net becomes a `DFA` by the subset construction.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import numpy as np

from ..errors import LimitError
from .dfa import DFA, NOWHERE
from .minimise import equal_columns, finished
from .ranges import Ranges, single, union

DEFAULT_STATES, MOST_STATES = 2_000, 10_000
DEFAULT_SECONDS = 10.0
# Before it is made minimal, an automaton may have this many times as many states as after.
SLACK = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an automaton may become, and how much processor time that may take."""

    states: int = DEFAULT_STATES
    seconds: float = DEFAULT_SECONDS
    started: float = field(default_factory=time.thread_time)
    begun: float = field(default_factory=time.monotonic)

    def check_time(self) -> None:
        """Raise LimitError if the time is over."""
        if time.monotonic() - self.begun <= self.seconds:
            return  # the other clock is slow to read in some containers
        if time.thread_time() - self.started > self.seconds:
            raise LimitError(
                f"the constraint takes longer to compile than {self.seconds:g} s; simplify it"
            )

    def used(self) -> float:
        """Return the part of the time that is over."""
        return (time.thread_time() - self.started) / max(self.seconds, 1e-9)

    def check_states(self, states: int, *, slack: int = 1) -> None:
        """Raise LimitError if there are too many states."""
        if states > self.states * slack:
            raise LimitError(
                f"the constraint needs more than {self.states} states; simplify it, or raise the "
                f"limit, which may be {MOST_STATES} at most"
            )


class Net:
    """A nondeterministic automaton that is being built."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.moves: list[list[tuple[int, int]]] = []  # per state: (number of a label, target)
        self.skips: list[list[int]] = []
        # Per state: skips at the beginning of the text only (False), at its end only (True).
        self.anchors: dict[int, list[tuple[bool, int]]] = {}
        self.labels: dict[Ranges, int] = {}
        # Per automaton that was put in: its moves. It is kept, so that its id stays its own.
        self._parts: dict[int, tuple[DFA, list[list[tuple[int, int]]], list[int]]] = {}

    def state(self) -> int:
        """Return a new state."""
        self.moves.append([])
        self.skips.append([])
        if len(self.moves) % 1024 == 0:
            self._check()
        return len(self.moves) - 1

    def move(self, source: int, symbols: Ranges, target: int) -> None:
        """Let any of the symbols lead from one state to another."""
        if symbols:
            label = self.labels.setdefault(symbols, len(self.labels))
            self.moves[source].append((label, target))

    def skip(self, source: int, target: int) -> None:
        """Let nothing lead from one state to another."""
        self.skips[source].append(target)

    def anchor(self, source: int, target: int, *, end: bool) -> None:
        """Let nothing lead from one state to another, at the end of the text or else at its
        beginning."""
        self.anchors.setdefault(source, []).append((end, target))

    def spell(self, source: int, text: str | Iterable[int]) -> int:
        """Return the state behind a text, or a string of symbols, from a state on."""
        for symbol in map(ord, text) if isinstance(text, str) else text:
            target = self.state()
            self.move(source, single(symbol), target)
            source = target
        return source

    def put(self, source: int, part: DFA, target: int) -> None:
        """Put an automaton between two states."""
        if id(part) not in self._parts:
            moves, finals = _moves_of(part)
            numbered = [
                [(self.labels.setdefault(symbols, len(self.labels)), to) for symbols, to in ways]
                for ways in moves
            ]
            self._parts[id(part)] = part, numbered, finals
        _, ways_of_all, finals = self._parts[id(part)]
        base = len(self.moves)
        self.moves += [[(label, base + to) for label, to in ways] for ways in ways_of_all]
        self.skips += [[] for _ in ways_of_all]
        self._check()
        self.skip(source, base)
        for state in finals:
            self.skip(base + state, target)

    def _check(self) -> None:
        self.limits.check_time()
        # Most states of a net are still there when it is minimal.
        self.limits.check_states(len(self.moves), slack=2 * SLACK)


@lru_cache(128)
def _moves_of(part: DFA) -> tuple[list[list[tuple[Ranges, int]]], list[int]]:
    """Return each state's moves, and the accepting states."""
    classes, first = equal_columns(part.table)
    borders = [*part.bounds.tolist(), 1 << 30]
    ranges: list[list[tuple[int, int]]] = [[] for _ in first]
    for i, number in enumerate(classes.tolist()):
        ranges[number].append((borders[i], borders[i + 1] - 1))
    known: dict[tuple[int, ...], Ranges] = {}
    moves = []
    for row in part.table[:, first].tolist():
        by_target: dict[int, list[int]] = {}
        for number, target in enumerate(row):
            if target != NOWHERE:
                by_target.setdefault(target, []).append(number)
        ways = []
        for target, numbers in by_target.items():
            key = tuple(numbers)
            if key not in known:
                known[key] = union(pair for number in numbers for pair in ranges[number])
            ways.append((known[key], target))
        moves.append(ways)
    return moves, np.flatnonzero(part.accepting).tolist()


def determinise(net: Net, start: int, final: int) -> DFA:
    """Return the minimal automaton of the strings that lead from one state to another.

    Raises:
      LimitError: if it has too many states or takes too long.
    """
    atoms = _Atoms(net.labels)
    closures = _Closures(net, final)
    sets: list[tuple[int, ...]] = [closures.at_start(start)]
    accepting = [closures.accepts_nothing(start)]
    numbers: dict[tuple[int, ...], int] = {}  # the initial state stands alone: it knows anchors
    sources: list[int] = []
    masks: list[int] = []
    targets: list[int] = []
    for here in count():
        if here == len(sets):
            break
        if here % 256 == 0:
            net.limits.check_time()
            net.limits.check_states(len(sets), slack=SLACK)
        by_label: dict[int, list[int]] = {}
        for state in sets[here]:
            for label, target in net.moves[state]:
                by_label.setdefault(label, []).append(target)
        for mask, labels in atoms.blocks(tuple(sorted(by_label))):
            if len(labels) == 1:
                reached = closures.of_all(by_label[labels[0]])
            else:
                reached = closures.of_all([t for label in labels for t in by_label[label]])
            number = numbers.get(reached)
            if number is None:
                number = numbers[reached] = len(sets)
                sets.append(reached)
                accepting.append(closures.accepts(reached))
            sources.append(here)
            masks.append(mask)
            targets.append(number)
    table = atoms.table(len(sets), sources, masks, targets)
    result = finished(table, np.array(accepting), atoms.bounds, atoms.classes)
    net.limits.check_states(len(result))
    return result


class _Atoms:
    """The classes of symbols that no label of a net tells apart."""

    def __init__(self, labels: Iterable[Ranges]) -> None:
        known = list(labels)
        edges = {0} | {low for label in known for low, _ in label}
        edges |= {high + 1 for label in known for _, high in label}
        self.bounds = np.array(sorted(edges), np.int64)
        member = np.zeros((len(known), len(self.bounds) + 1), np.int8)
        for row, label in enumerate(known):
            if label:
                pairs = np.array(label, np.int64)
                np.add.at(member[row], np.searchsorted(self.bounds, pairs[:, 0]), 1)
                np.add.at(member[row], np.searchsorted(self.bounds, pairs[:, 1] + 1), -1)
        inside = np.cumsum(member, axis=1, dtype=np.int8)[:, :-1].astype(bool)
        self.classes, first = equal_columns(inside)  # of each range of symbols
        self._size = len(first)
        self._masks = [
            int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little")
            for row in inside[:, first]
        ]
        self._blocks: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        self._numbers: dict[int, int] = {}  # of the masks in use

    def blocks(self, labels: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        """Return a partition of the symbols of some labels: (number of the set, its labels)."""
        if labels not in self._blocks:
            parts: list[tuple[int, tuple[int, ...]]] = []
            for label in labels:
                rest, split = self._masks[label], []
                for mask, holders in parts:
                    if inner := mask & rest:
                        split.append((inner, (*holders, label)))
                    if outer := mask & ~rest:
                        split.append((outer, holders))
                    rest &= ~mask
                if rest:
                    split.append((rest, (label,)))
                parts = split
            self._blocks[labels] = [
                (self._numbers.setdefault(mask, len(self._numbers)), holders)
                for mask, holders in parts
            ]
        return self._blocks[labels]

    def table(
        self, states: int, sources: list[int], masks: list[int], targets: list[int]
    ) -> np.ndarray:
        """Return int32 [states, classes]."""
        width = (self._size + 7) // 8
        members = []
        for mask in self._numbers:
            bits = np.frombuffer(mask.to_bytes(width, "little"), np.uint8)
            members.append(np.flatnonzero(np.unpackbits(bits, bitorder="little")))
        table = np.full((states, self._size), NOWHERE, np.int32)
        if sources:
            sizes = np.array([len(found) for found in members])
            order = np.array(masks)
            columns = np.concatenate([members[mask] for mask in masks])
            table[np.repeat(sources, sizes[order]), columns] = np.repeat(targets, sizes[order])
        return table


class _Closures:
    """Which states of a net are reached by skips. Only states with moves, the final one and those
    before an anchor are kept."""

    def __init__(self, net: Net, final: int) -> None:
        self._net, self._final = net, final
        self._known: dict[int, tuple[int, ...]] = {}

    def of(self, state: int) -> tuple[int, ...]:
        found = self._known.get(state)
        if found is None:
            found = self._known[state] = self._walk([state], ())
        return found

    def of_all(self, states: Sequence[int]) -> tuple[int, ...]:
        if len(states) == 1:
            return self.of(states[0])
        return tuple(sorted({reached for state in states for reached in self.of(state)}))

    def at_start(self, state: int) -> tuple[int, ...]:
        return self._walk([state], (False,))

    def accepts_nothing(self, start: int) -> bool:
        """Return whether the empty text is accepted."""
        return self._final in self._walk([start], (False, True))

    def accepts(self, states: Sequence[int]) -> bool:
        if self._final in states:
            return True
        return bool(self._net.anchors) and self._final in self._walk(states, (True,))

    def _walk(self, states: Sequence[int], anchors: tuple[bool, ...]) -> tuple[int, ...]:
        seen, waiting = set(states), list(states)
        while waiting:
            state = waiting.pop()
            ways = self._net.skips[state]
            if anchors and state in self._net.anchors:
                ways = [*ways, *(to for end, to in self._net.anchors[state] if end in anchors)]
            for target in ways:
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        moves, kept = self._net.moves, self._net.anchors
        return tuple(sorted(s for s in seen if moves[s] or s == self._final or s in kept))
