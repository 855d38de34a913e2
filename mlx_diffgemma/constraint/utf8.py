"""States inside of a character, for tokens that are single bytes.

Most characters have no token of their own. An answer spells them by byte tokens, one to four in a
row. Where an automaton takes free text, this adds the states between the bytes of a character.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from .dfa import DFA, NOWHERE

_FIRST, _END = 0x80, 0x110000  # the characters of several bytes, and one past them
_SURROGATES = 0xD800, 0xE000
_LEAST = 0x80, 0x800, 0x10000  # the first character of 2, 3 and 4 bytes
_LEADS = 64  # bytes from 0xC0 on
_MOST_RANGES = 64  # of characters with targets of their own, in a state that takes free text


@dataclass(frozen=True, slots=True, eq=False)
class Continuations:
    """The states inside of characters; state n of them is state S + n of the whole."""

    leads: np.ndarray  # int32 [S, 64]: from a state, behind the bytes 0xC0 to 0xFF
    inside: np.ndarray  # int32 [N, 64]: behind the bytes 0x80 to 0xBF


def continuations(dfa: DFA, most: int = 0) -> Continuations:
    """Return the states between the bytes of characters, for free text, and elsewhere as long as
    they are not more than `most`.

    Free text is a state that most characters of several bytes lead back to; bytes may also begin a
    character in a state from which most lead there. Everywhere else they lead nowhere: a string
    of counted length would need seven more states for each character. Exactly the sequences that
    RFC 3629 allows lead on, each to the state behind its character.
    """
    S, starts = len(dfa), dfa.bounds.tolist()
    sizes = np.diff(np.clip([*starts, _END], _FIRST, _END))
    sizes -= np.diff(np.clip([*starts, _END], *_SURROGATES))
    table = np.asarray(dfa.table)
    loops = ((table == np.arange(S)[:, None]) * sizes).sum(axis=1)
    is_free = np.append(2 * loops > sizes.sum(), False)  # the last one is that of NOWHERE
    several = [at for at, size in enumerate(sizes.tolist()) if size]
    nowhere = np.full(_LEADS, NOWHERE, np.int32)
    leads = np.tile(nowhere, (S, 1))
    made = _Inside(S)
    known: dict[bytes, np.ndarray] = {}
    for state in np.flatnonzero((is_free[table[:, several]]).any(axis=1)).tolist():
        targets = table[state]
        key = targets[several].tobytes()
        if key not in known:
            reached = np.bincount(targets[several] + 1, sizes[several])
            most = int(reached.argmax())
            is_text = most > 0 and is_free[most - 1] and 2 * reached[most] > sizes.sum()
            ranges = np.count_nonzero(np.diff(targets[several])) + 1
            known[key] = nowhere
            if is_text and ranges <= _MOST_RANGES:
                known[key] = made.leads(starts, targets.tolist())
        leads[state] = known[key]
    most += len(made.states)
    has_way = (table[:, several] != NOWHERE).any(axis=1) & (leads == NOWHERE).all(axis=1)
    for state in np.flatnonzero(has_way).tolist() if most > len(made.states) else ():
        targets = table[state]
        if np.count_nonzero(np.diff(targets[several])) + 1 > _MOST_RANGES:
            continue
        kept = len(made.states)
        leads[state] = made.leads(starts, targets.tolist())
        if len(made.states) > most:
            leads[state] = nowhere
            made.forget(kept)
            break
    inside = np.array(made.states, np.int32).reshape(-1, 64)
    return Continuations(leads, inside)


@dataclass(slots=True)
class _Inside:
    """States inside of characters, made as they are needed; equal ones are one."""

    first: int  # the number of the first of them
    states: list[tuple[int, ...]] = field(default_factory=list)
    known: dict[tuple[int, ...], int] = field(default_factory=dict)
    ways: dict[tuple[int, int], int] = field(default_factory=dict)  # see `_to`

    def leads(self, starts: list[int], targets: list[int]) -> np.ndarray:
        """Return the states behind the lead bytes, where characters from `starts` on lead to
        `targets`."""
        found = np.full(_LEADS, NOWHERE, np.int32)
        for count, (low, high) in enumerate(((0, 32), (32, 48), (48, 56)), start=1):
            pieces = _pieces(starts, targets, _LEAST[count - 1])
            size = 64**count
            for lead in range(low, high):
                found[lead] = self._state(pieces, count, (lead - low) * size)
        return found

    def forget(self, kept: int) -> None:
        """Keep the first states alone."""
        del self.states[kept:]
        last = self.first + kept
        self.known = {state: number for state, number in self.known.items() if number < last}
        self.ways = {way: number for way, number in self.ways.items() if number < last}

    def _state(self, pieces: tuple[list[int], list[int]], count: int, base: int) -> int:
        """Return the state with `count` bytes to come, of the characters from `base` on."""
        starts, targets = pieces
        first = bisect_right(starts, base) - 1
        last = bisect_right(starts, base + 64**count - 1) - 1
        if first == last or len(set(targets[first : last + 1])) == 1:
            return self._to(targets[first], count)
        size = 64 ** (count - 1)
        return self._made(tuple(self._state(pieces, count - 1, base + size * i) for i in range(64)))

    def _to(self, target: int, count: int) -> int:
        """Return the state from which any `count` bytes lead to `target`."""
        if target == NOWHERE or count == 0:
            return target
        if (target, count) not in self.ways:
            self.ways[target, count] = self._made((self._to(target, count - 1),) * 64)
        return self.ways[target, count]

    def _made(self, state: tuple[int, ...]) -> int:
        if set(state) == {NOWHERE}:
            return NOWHERE
        if state not in self.known:
            self.known[state] = self.first + len(self.states)
            self.states.append(state)
        return self.known[state]


def _pieces(starts: list[int], targets: list[int], least: int) -> tuple[list[int], list[int]]:
    """Return starts and targets of ranges in which what no encoding may hold leads nowhere:
    characters with fewer bytes, surrogates, and what is past the last character."""
    cuts = sorted({*starts, 0, least, *_SURROGATES, _END})
    kept = []
    for cut in cuts:
        is_char = least <= cut < _END and not _SURROGATES[0] <= cut < _SURROGATES[1]
        kept.append(targets[bisect_right(starts, cut) - 1] if is_char else NOWHERE)
    return cuts, kept
