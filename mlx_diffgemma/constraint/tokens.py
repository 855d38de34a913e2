"""The lift of an automaton over code points to tokens.

All tokens that lead from the same states to the same states are one class: a few hundred classes
stand for 262,144 tokens, so that a step needs only one number per class from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .dfa import DFA, NOWHERE, SPECIAL
from .groups import Groups
from .utf8 import Continuations, continuations
from .vocabulary import Vocabulary

DEAD = 0  # the class of tokens that lead nowhere, from any state
FAR = np.iinfo(np.int32).max  # a distance: there is no way
_PIECE = 1 << 20  # numbers that are composed at once


@dataclass(frozen=True, slots=True, eq=False)
class TokenAutomaton:
    """An automaton over tokens, each of which belongs to one class.

    That of a `DFA` is deterministic: its states are those of the `DFA`, then those inside of a
    character, then `end`, which an answer reaches with its end token and stays in, filled with pad
    and end tokens. From every state that an edge leads to, the end is in reach. That of a `Line`
    has no maps: a token may lead from one state to several.
    """

    classes: np.ndarray  # uint16, or uint32 if there are many: [V]
    sizes: np.ndarray  # int64 [K], tokens of each class; class 0 is DEAD, and may have none
    maps: np.ndarray | None  # int32 [K, S]: the state behind a token of the class, or NOWHERE
    sources: np.ndarray  # int64 [E], ascending: edges, from state to state
    targets: np.ndarray  # int64 [E], ascending for each source
    sets: np.ndarray  # int64 [E]: the number of the set of classes that an edge takes
    set_starts: np.ndarray  # int64 [G + 1]: where each set begins in `set_classes`
    set_classes: np.ndarray  # int64, ascending for each set
    classes_by_set: Groups  # G groups of classes
    sets_by_class: Groups  # K - 1 groups of sets, of all classes but DEAD
    first_edges: np.ndarray  # int64 [S + 1]: where each state's edges begin
    distance: np.ndarray  # int32 [S]: fewest tokens to the end, end token included; or FAR

    @property
    def end(self) -> int:
        """The state behind the end token."""
        return len(self.distance) - 1

    def after(self, tokens: np.ndarray, state: int = 0) -> int:
        """Return the state behind some tokens, or NOWHERE.

        Args:
          tokens: int [n], below V.
          state: before them.
        """
        assert self.maps is not None
        for cls in self.classes[np.asarray(tokens, np.int64)].tolist():
            if state == NOWHERE:
                break
            state = int(self.maps[cls, state])
        return state

    def classes_of(self, number: int) -> np.ndarray:
        """Return the classes of one set, ascending."""
        return self.set_classes[self.set_starts[number] : self.set_starts[number + 1]]


def lift(dfa: DFA, vocabulary: Vocabulary, *, most_inside: int = 0) -> TokenAutomaton:
    """Return the automaton over tokens of an automaton over code points.

    A string of tokens leads to the end if its text, with the special tokens in it, is one that the
    DFA accepts, and an end token and any number of pad and end tokens follow. Characters may be
    spelled by byte tokens where `continuations` says so.

    Args:
      dfa: any; if it names end or pad tokens as special symbols, they do not count.
      vocabulary: the checkpoint's tokens.
      most_inside: states inside of characters at most, beside those of free text.

    Source: the transition monoid of the DFA, enumerated along the trie of all texts, each map of
      states to states only once.
    """
    parts = continuations(dfa, most_inside)
    maps, numbers = _text_maps(dfa, vocabulary)
    maps = _with_other_states(maps, len(parts.inside))
    more, tokens = _other_maps(dfa, vocabulary, parts)
    numbers[tokens] = len(maps) + np.arange(len(tokens))
    maps = np.vstack([maps, more])
    distance = _distances(maps)
    hopeless = np.append(distance == FAR, False)  # the last one is that of NOWHERE
    maps[hopeless[maps]] = NOWHERE
    classes, maps = _joined(maps, numbers)
    return _automaton(classes, maps, distance)


def _text_maps(dfa: DFA, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct maps of states that texts of tokens have, [M, S] with S for nowhere, and
    the number of each token's, int64 [V]; number 0 leads nowhere."""
    S = len(dfa)
    columns, column_of = _columns(dfa, vocabulary.alphabet)
    maps = _Maps(np.full((256, S + 1), S, columns.dtype))
    maps.number(maps.rows[:1])
    numbers = np.zeros(vocabulary.size, np.int64)
    before = np.zeros(0, np.int64)  # numbers of the maps of all prefixes, one character shorter
    for level in vocabulary.levels:
        symbols = column_of[level.characters]
        if not before.size:
            here, found = symbols, maps.number(columns)
        else:
            pairs = before[level.parents] * len(columns) + symbols
            distinct, here = _distinct(pairs, maps.count * len(columns))
            found = np.empty(len(distinct), np.int64)
            step = max(1, _PIECE // S)
            for at in range(0, len(distinct), step):
                first, second = np.divmod(distinct[at : at + step], len(columns))
                made = columns[second[:, None], maps.rows[first]]
                found[at : at + step] = maps.number(made)
        before = found[here]
        numbers[level.tokens] = before[level.nodes]
    used, numbers = _distinct(numbers, maps.count)
    if used[0] != 0:
        used, numbers = np.append(0, used), numbers + 1
    return maps.rows[used, :S].astype(np.int32), numbers


class _Maps:
    """Distinct rows, numbered in the order in which they are met."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.count = rows, 0  # room for some; those from `count` on are not used yet
        self._known: dict[bytes, int] = {}

    def number(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of rows, int64, and add those that are new."""
        found = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            found[i] = number = self._known.setdefault(row.tobytes(), self.count)
            if number == self.count:
                if number == len(self.rows):
                    self.rows = np.concatenate([self.rows, np.empty_like(self.rows)])
                self.rows[number] = row
                self.count += 1
        return found


def _columns(dfa: DFA, alphabet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct maps of single characters, [C, S + 1] with S for nowhere, and the number
    of each one's in an alphabet."""
    S = len(dfa)
    ranges = np.searchsorted(dfa.bounds, alphabet, side="right") - 1
    table = np.where(dfa.table == NOWHERE, S, dfa.table).T[np.unique(ranges)]
    table = np.column_stack([table, np.full(len(table), S)])
    columns, inverse = np.unique(table, axis=0, return_inverse=True)
    place = np.zeros(len(dfa.bounds), np.int64)
    place[np.unique(ranges)] = inverse.ravel()
    kind = np.uint16 if S < 1 << 16 else np.int32
    return np.ascontiguousarray(columns.astype(kind)), place[ranges]


def _distinct(numbers: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct numbers, ascending, and for each number its place among them."""
    occurs = np.zeros(bound, bool)
    occurs[numbers] = True
    distinct = np.flatnonzero(occurs)
    place = np.zeros(bound, np.int64)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[numbers]


def _with_other_states(maps: np.ndarray, inside: int) -> np.ndarray:
    """Return maps of the DFA's states as maps of all states: text leads nowhere from the others."""
    S = maps.shape[1]
    whole = np.full((len(maps), S + inside + 1), NOWHERE, np.int32)
    whole[:, :S] = np.where(maps == S, NOWHERE, maps)
    return whole


def _other_maps(
    dfa: DFA, vocabulary: Vocabulary, parts: Continuations
) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps of byte tokens, special tokens, end tokens and pad, and which tokens they
    are of."""
    S, end = len(dfa), len(dfa) + len(parts.inside)
    tokens = [*vocabulary.bytes, *vocabulary.specials, *vocabulary.ends, vocabulary.pad]
    maps = np.full((len(tokens), end + 1), NOWHERE, np.int32)
    for one, byte in zip(maps, vocabulary.bytes.values(), strict=False):
        if byte < 0xC0:
            one[S:end] = parts.inside[:, byte - 0x80]
        else:
            one[:S] = parts.leads[:, byte - 0xC0]
    at = len(vocabulary.bytes)
    symbols = SPECIAL + np.array(vocabulary.specials, np.int64)
    ranges = np.searchsorted(dfa.bounds, symbols, side="right") - 1
    maps[at : at + len(symbols), :S] = dfa.table[:, ranges].T
    maps[at + len(symbols) : -1, :S][:, dfa.accepting] = end
    maps[at + len(symbols) :, end] = end  # models write end tokens there, which become pad
    if vocabulary.pad in vocabulary.ends:
        maps[-1, :S][dfa.accepting] = end
    return maps, np.array(tokens, np.int64)


def _distances(maps: np.ndarray) -> np.ndarray:
    """Return the fewest tokens from each state to the last one, int32 [S]."""
    targets = np.sort(maps.T, axis=1)
    is_way = targets != NOWHERE
    is_way[:, 1:] &= targets[:, 1:] != targets[:, :-1]
    sources, _ = np.nonzero(is_way)
    return distances(sources, targets[is_way], maps.shape[1])


def distances(sources: np.ndarray, targets: np.ndarray, states: int) -> np.ndarray:
    """Return the fewest edges from each of some states to the last one, int32 [states].

    Args:
      sources: int [E], of edges.
      targets: int [E], of the same edges.
      states: their number.
    """
    distance = np.full(states, FAR, np.int32)
    distance[-1] = steps = 0
    is_here = distance == steps
    while is_here.any():
        steps += 1
        found = sources[is_here[targets]]
        distance[found] = np.minimum(distance[found], steps)
        is_here = distance == steps
    return distance


def _joined(maps: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of each token and the distinct maps of the classes that have tokens."""
    known = {np.full(maps.shape[1], NOWHERE, np.int32).tobytes(): DEAD}
    used, numbers = _distinct(numbers, len(maps))
    places = np.array([known.setdefault(maps[i].tobytes(), len(known)) for i in used.tolist()])
    distinct = np.frombuffer(b"".join(known), np.int32).reshape(len(known), -1)
    kind = np.uint16 if len(known) < 1 << 16 else np.uint32
    return places.astype(kind)[numbers], distinct


def _automaton(classes: np.ndarray, maps: np.ndarray, distance: np.ndarray) -> TokenAutomaton:
    """Return the automaton of maps, with its edges."""
    K, S = maps.shape
    order = np.argsort(maps.T, axis=1, kind="stable")
    targets = np.take_along_axis(maps.T, order, axis=1)
    is_edge = targets != NOWHERE
    keys = (np.arange(S)[:, None] * S + targets)[is_edge]
    members = order[is_edge]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    edges = keys[starts]
    known: dict[bytes, int] = {}
    borders = np.append(starts, len(keys)).tolist()
    sets = np.array(
        [known.setdefault(members[a:b].tobytes(), len(known)) for a, b in pairwise(borders)],
        np.int64,
    )
    set_starts = np.append(0, np.cumsum([len(one) // members.itemsize for one in known]))
    set_classes = np.frombuffer(b"".join(known), members.dtype).astype(np.int64)
    by_class = np.argsort(set_classes, kind="stable")
    set_of = np.repeat(np.arange(len(known)), np.diff(set_starts))
    return TokenAutomaton(
        classes,
        np.bincount(classes, minlength=K),
        maps,
        edges // S,
        edges % S,
        sets,
        set_starts,
        set_classes,
        Groups.of(set_starts, set_classes),
        Groups.of(np.searchsorted(set_classes[by_class], np.arange(1, K + 1)), set_of[by_class]),
        np.searchsorted(edges // S, np.arange(S + 1)),
        distance,
    )
