"""Automata over tokens, held against trying every string."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from mlx_diffgemma.constraint.automaton import Automaton
from mlx_diffgemma.errors import TemplateError

BYTES = {10: b"1", 11: b"2", 12: b"a", 13: b"\xc3", 14: b"\xa9", 15: b"12", 16: b"b", 17: b"a1"}
PATTERNS = ["[0-9]{1,3}", "a*1", "(a|b)+2?", "é+", "(12|a1)*b", "."]


def strings(pattern: str, length: int) -> set[tuple[int, ...]]:
    found = set()
    for string in product(BYTES, repeat=length):
        try:
            text = b"".join(BYTES[token] for token in string).decode()
        except UnicodeDecodeError:
            continue
        if re.fullmatch(pattern, text):
            found.add(string)
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_is_every_string_of_tokens_whose_text_matches(pattern):
    automaton = Automaton.of_regex(pattern, BYTES)
    assert automaton.lengths(3) == [n for n in (1, 2, 3) if strings(pattern, n)]
    for length in automaton.lengths(3):
        expected = strings(pattern, length)
        allowed = automaton.allowed(length)
        for i, tokens in enumerate(allowed):
            assert tokens.tolist() == sorted({string[i] for string in expected})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_best_string_is_the_likeliest_of_all(pattern, seed):
    automaton = Automaton.of_regex(pattern, BYTES)
    rng = np.random.default_rng(seed)
    for length in automaton.lengths(3):
        p = rng.dirichlet(np.full(20, 0.3), length).astype(np.float32)
        best = tuple(automaton.best(p).tolist())
        logs = {s: sum(np.log(p[i, t]) for i, t in enumerate(s)) for s in strings(pattern, length)}
        assert best in logs
        assert logs[best] == pytest.approx(max(logs.values()), rel=1e-5)


def test_a_string_is_found_where_every_probability_is_lost():
    automaton = Automaton.of_options([[1, 2], [3, 4]])
    best = automaton.best(np.zeros((2, 6), np.float32)).tolist()
    assert best in ([1, 2], [3, 4])


def test_options_are_taken_whole():
    automaton = Automaton.of_options([[1, 2], [3, 4], [5], [1, 2, 3]])
    assert automaton.lengths(9) == [1, 2, 3]
    assert [tokens.tolist() for tokens in automaton.allowed(2)] == [[1, 3], [2, 4]]
    p = np.full((2, 6), 0.1, np.float32)
    p[0, 1], p[1, 4] = 0.5, 0.4  # each the likeliest at its place, but no option together
    assert automaton.best(p).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "cannot be used: Failed to build DFA"),
        (r"[^\s\S]", "no text of this checkpoint's tokens matches it"),
        ("zzz", "no text of this checkpoint's tokens matches it"),
        (r"(?=a)b", "cannot be used"),
        ("^1", "the whole slot is matched anyway"),
    ],
)
def test_a_pattern_that_cannot_be_used(pattern, message):
    with pytest.raises(TemplateError, match=message):
        Automaton.of_regex(pattern, BYTES)
