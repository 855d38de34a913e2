"""A finite automaton that accepts the token strings of a slot and finds the likeliest one of a
given length. It is made from a list of options or a regular expression. Knows ids, not text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from outlines_core import Index, Vocabulary

from ..errors import TemplateError
from ..language.pattern import find_problem, syntax_problem

_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x[a-zA-Z]*\)")
_NO_TEXT = "no text of this checkpoint's tokens matches it"
_TINIEST = 1e-38  # a probability of 0 in float32 becomes this, so that it forbids no path


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """The moves from one state, sorted by target state."""

    tokens: np.ndarray  # int64 [moves]
    targets: np.ndarray  # int64 [groups]
    starts: np.ndarray  # int64 [groups], where each target's tokens begin in `tokens`
    counts: np.ndarray  # int64 [groups], number of each target's tokens


@dataclass(frozen=True, slots=True, eq=False)
class Automaton:
    """Deterministic, over token ids; states are numbers, the first is `initial`."""

    initial: int
    finals: frozenset[int]
    moves: Mapping[int, _Moves]
    _ends: dict[int, frozenset[int]] = field(default_factory=dict)  # see `_can_end`

    @classmethod
    def of_moves(
        cls, initial: int, finals: Iterable[int], moves: Mapping[int, Mapping[int, int]]
    ) -> Automaton:
        """Return the automaton of a table: state -> token -> next state."""
        return cls(initial, frozenset(finals), {s: _sorted(ways) for s, ways in moves.items()})

    @classmethod
    def of_options(cls, options: Iterable[Sequence[int]]) -> Automaton:
        """Return what accepts exactly these token strings: a trie."""
        moves: dict[int, dict[int, int]] = {0: {}}
        finals = set()
        for option in options:
            state = 0
            for token in option:
                state = moves[state].setdefault(token, len(moves))
                moves.setdefault(state, {})
            finals.add(state)
        return cls.of_moves(0, finals, moves)

    @classmethod
    def of_regex(cls, pattern: str, spellings: Mapping[int, bytes]) -> Automaton:
        """Return what accepts the token strings whose bytes match a regular expression as a whole.

        Args:
          pattern: Rust's syntax without what `find_problem` names.
          spellings: the bytes of every token that may be used.

        Raises:
          TemplateError: if the pattern is invalid or no token string matches it.

        Source: arXiv 2307.09702, by outlines-core.
        """
        if problem := find_problem(pattern):
            raise _unusable(pattern, problem.reason, problem.at)
        # A token of our own for every byte keeps outlines-core from refusing an expression because
        # of one part of it that the checkpoint's tokens cannot spell.
        own = 1 + max(spellings, default=-1)
        tokens: dict[bytes, list[int]] = {bytes([byte]): [own + byte] for byte in range(256)}
        for token, spelling in spellings.items():
            tokens.setdefault(spelling, []).append(token)
        index, has_nul = _compiled(pattern, Vocabulary(own + 256, tokens))
        transitions = index.get_transitions()
        first = index.get_initial_state()
        automaton = cls.of_moves(
            transitions[first][own] if has_nul else first,
            index.get_final_states(),
            {
                state: {token: target for token, target in ways.items() if token < own}
                for state, ways in transitions.items()
                if not (has_nul and state == first)
            },
        )
        if not automaton._has_string():
            raise _unusable(pattern, _NO_TEXT)
        return automaton

    def lengths(self, most: int) -> list[int]:
        """Return the lengths in tokens, from 1 to `most`, that some accepted string has."""
        return [n for n in range(1, most + 1) if self.initial in self._can_end(n)]

    def allowed(self, length: int) -> list[np.ndarray]:
        """Return the sorted ids at each place of the strings of one length. Every token belongs to
        some string, but not every combination of tokens is a string."""
        sets: list[np.ndarray] = []
        here = {self.initial}
        size = 1 + max(int(ways.tokens.max(initial=0)) for ways in self.moves.values())
        for i in range(length):
            ends, found, there = self._can_end(length - i - 1), np.zeros(size, bool), set[int]()
            for state in here:
                ways = self.moves[state]
                leads_on = np.array([target in ends for target in ways.targets.tolist()], bool)
                found[ways.tokens[np.repeat(leads_on, ways.counts)]] = True
                there.update(ways.targets[leads_on].tolist())
            members = np.flatnonzero(found).astype(np.int32)
            same = sets[-1] if sets and np.array_equal(sets[-1], members) else members
            sets.append(same)  # many places often have the same ids: these are kept once
            here = there
        return sets

    def best(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the likeliest string with one token per row, for independent rows.

        Args:
          probabilities: float32 [n, V], or values proportional to them; some accepted string must
            have n tokens.

        Returns:
          int32 [n].
        """
        n = len(probabilities)
        reached = [{self.initial}]  # states at each place that can still reach an end
        for i in range(n - 1):
            ends = self._can_end(n - i - 1)
            targets = {t for s in reached[-1] for t in self.moves[s].targets.tolist()}
            reached.append(targets & ends)
        values = [dict[int, float]() for _ in range(n)] + [dict.fromkeys(self.finals, 0.0)]
        for i in reversed(range(n)):
            for state in reached[i]:
                totals = self._totals(state, probabilities[i], values[i + 1])
                if totals.size and (best := totals.max()) > -np.inf:
                    values[i][state] = float(best)
        state, string = self.initial, np.empty(n, np.int32)
        for i in range(n):
            ways = self.moves[state]
            group = int(self._totals(state, probabilities[i], values[i + 1]).argmax())
            start = ways.starts[group]
            tokens = ways.tokens[start : start + ways.counts[group]]
            string[i] = tokens[probabilities[i][tokens].argmax()]
            state = int(ways.targets[group])
        return string

    def _totals(
        self, state: int, probabilities: np.ndarray, later: Mapping[int, float]
    ) -> np.ndarray:
        """Return for each target of a state the score of the best move to it and path from it to an
        end."""
        ways = self.moves[state]
        if not ways.tokens.size:
            return np.empty(0)
        onward = np.array([later.get(target, -np.inf) for target in ways.targets.tolist()])
        best = np.maximum.reduceat(probabilities[ways.tokens], ways.starts)
        return np.log(np.maximum(best, _TINIEST)) + onward

    def _has_string(self) -> bool:
        """Return whether some string of at least one token is accepted."""
        seen, waiting = set[int](), [self.initial]
        while waiting:
            targets = set(self.moves[waiting.pop()].targets.tolist()) - seen
            if targets & self.finals:
                return True
            seen |= targets
            waiting += targets
        return False

    def _can_end(self, length: int) -> frozenset[int]:
        """Return the states from which exactly `length` more tokens reach an end."""
        if length == 0:
            return self.finals
        if length not in self._ends:
            later = self._can_end(length - 1)
            self._ends[length] = frozenset(
                s for s, ways in self.moves.items() if later.intersection(ways.targets.tolist())
            )
        return self._ends[length]


def _compiled(pattern: str, vocabulary: Vocabulary) -> tuple[Index, bool]:
    r"""Return the index of a whole pattern, and whether it begins with a NUL of our own.

    outlines-core drops the moves from an accepting state. With `\z` at the end, no state accepts
    before the end of the text. It also refuses expressions that may begin with an assertion such as
    `\z`; only for these a NUL comes first, which costs several times as long for a `.{1,20}`.
    """
    # A comment at the end of a verbose expression ends with its line.
    body = f"{pattern}\n" if _VERBOSE.match(pattern) else pattern
    try:
        return Index(rf"(?:{body})\z", vocabulary), False
    except ValueError:
        try:
            return Index(rf"\x00(?:{body})\z", vocabulary), True
        except ValueError as error:
            raise _refused(pattern, str(error)) from error


def _refused(pattern: str, message: str) -> TemplateError:
    """Return outlines-core's error as a message for the author of the pattern."""
    if "incompatible" in message:
        return _unusable(pattern, _NO_TEXT)
    if problem := syntax_problem(pattern):
        return _unusable(pattern, problem.reason, problem.at)
    return _unusable(pattern, "it is not valid in the syntax of Rust's regex crate")


def _unusable(pattern: str, reason: str, at: int | None = None) -> TemplateError:
    shown = f'"{pattern}"' if pattern.isprintable() else repr(pattern)
    place = "" if at is None else f", character {at + 1}"
    return TemplateError(f"match {shown}{place}: {reason}")


def _sorted(ways: Mapping[int, int]) -> _Moves:
    tokens = np.fromiter(ways.keys(), np.int64, len(ways))
    targets = np.fromiter(ways.values(), np.int64, len(ways))
    order = np.lexsort((tokens, targets))
    distinct, starts, counts = np.unique(targets[order], return_index=True, return_counts=True)
    return _Moves(tokens[order], distinct, starts, counts)
