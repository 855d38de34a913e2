"""Parts one behind another over tokens, against every string and every way to divide it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from mlx_diffgemma.constraint.decode import best, certain
from mlx_diffgemma.constraint.line import Line, Part
from mlx_diffgemma.constraint.marginals import Strings
from mlx_diffgemma.constraint.regex import regex
from mlx_diffgemma.constraint.tokens import lift
from tests.constraint.cases import MASK, maxima, sums, vocabulary
from tests.sampled import one_in

TEXTS = ["a", "b", "ab", "ba", "c"]
WORDS = dict(enumerate(TEXTS, MASK + 1))  # by token
PATTERNS = ["a|ab", "[ab]+", "c?ab*", "(ab|ba)c", "a{1,3}"]


class Piece:
    """One part of a line, and which strings of tokens it has."""

    def __init__(self, rng: random.Random):
        self.kind = rng.choice(["token", "among", "pattern", "pattern"])
        self.token, self.few = rng.choice([*WORDS]), sorted(rng.sample([*WORDS], 2))
        self.dfa = regex(rng.choice(PATTERNS))

    def holds(self, tokens: tuple[int, ...]) -> bool:
        if self.kind == "token":
            return tokens == (self.token,)
        if self.kind == "among":
            return len(tokens) == 1 and tokens[0] in self.few
        return len(tokens) > 0 and self.dfa.accepts("".join(WORDS[t] for t in tokens))


def divisions(pieces: list[Piece], tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where each piece of a string may end, in every way."""
    if not pieces:
        return [()] if not tokens else []
    return [
        (count, *(count + later for later in rest))
        for count in range(1, len(tokens) + 1)
        if pieces[0].holds(tokens[:count])
        for rest in divisions(pieces[1:], tokens[count:])
    ]


def drawn(seed: int):
    """A line of pieces, its states between them, and log probabilities of positions."""
    rng = random.Random(seed)
    known = vocabulary(TEXTS)
    pieces = [Piece(rng) for _ in range(rng.randint(1, 4))]
    line, states = Line(known.size), [0]
    for piece in pieces:
        states.append(line.state())
        if piece.kind == "token":
            line.token(states[-2], piece.token, states[-1])
        elif piece.kind == "among":
            line.among(states[-2], np.array(piece.few), states[-1])
        else:
            line.put(states[-2], Part.of_lifted(lift(piece.dfa, known)), states[-1])
    automaton = line.automaton(states[-1])
    states[-1] = automaton.end
    length = rng.randint(len(pieces), 5)
    logits = np.random.default_rng(seed).normal(size=(length, known.size)) * 2
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return pieces, automaton, states, log_p


@pytest.mark.parametrize("seed", one_in(5, range(200)))
def test_a_line_has_the_strings_of_its_parts_once_for_each_way_to_divide_them(seed):
    pieces, automaton, states, log_p = drawn(seed)
    length = len(log_p)
    ways = {
        tokens: found
        for tokens in itertools.product(WORDS, repeat=length)
        if (found := divisions(pieces, tokens))
    }
    ends = np.zeros(len(automaton.distance), bool)
    ends[automaton.end] = True
    part = Part(automaton, ends)
    assert (length in part.lengths(length)) == bool(ways)
    if not ways:
        with pytest.raises(ValueError, match="no string"):
            certain(automaton, length, ends)
        return
    score = {tokens: log_p[np.arange(length), list(tokens)].sum() for tokens in ways}
    path = best(automaton, maxima(automaton, log_p), ends)
    assert path.score == pytest.approx(max(score.values()))
    strings = Strings.of(automaton, sums(automaton, np.exp(log_p)), ends)
    total = sum(np.exp(score[tokens]) * len(found) for tokens, found in ways.items())
    assert strings.log_total == pytest.approx(np.log(total))
    at, state = 0, 0
    for number, target in enumerate(states[1:]):
        chances = strings.passages(at, state, target)
        masses = np.zeros(length + 1)
        for tokens, found in ways.items():
            for cuts in found:
                if number == 0 or cuts[number - 1] == at:
                    masses[cuts[number]] += np.exp(score[tokens])
        np.testing.assert_allclose(chances, masses / masses.sum(), atol=1e-9)
        at, state = int(chances.argmax()), target
    same = [{tokens[i] for tokens in ways} for i in range(length)]
    expected = [min(some) if len(some) == 1 else -1 for some in same]
    assert certain(automaton, length, ends).tolist() == expected


def test_the_strings_of_a_part_may_be_put_in_a_line_again():
    inner = Line(4)
    inner.among(0, np.array([0, 1]), at := inner.state())
    inner.among(at, np.array([2]), at)
    part = inner.part(at)
    assert part.lengths(4) == [1, 2, 3, 4]
    line = Line(4)
    line.put(0, part, middle := line.state())
    line.token(middle, 3, end := line.state())
    assert line.part(end).lengths(4) == [2, 3, 4]


def test_a_string_that_does_not_fit_passes_nowhere():
    line = Line(4)
    line.among(0, np.array([0, 1]), at := line.state())
    line.token(at, 2, end := line.state())
    part = line.part(end)
    strings = Strings.of(part.automaton, sums(part.automaton, np.full((2, 4), 0.25)), part.ends)
    np.testing.assert_allclose(strings.passages(0, 0, at), [0, 1, 0])
    with pytest.raises(ValueError, match="in state 0 behind 1 tokens"):
        strings.passages(1, 0, at)
