"""Automata over tokens, held against trying every string."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
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


def accepts(automaton: Automaton, string: tuple[int, ...]) -> bool:
    state = automaton.initial
    for token in string:
        ways = automaton.moves[state]
        targets = np.repeat(ways.targets, ways.counts)[ways.tokens == token]
        if not targets.size:
            return False
        (state,) = targets.tolist()
    return state in automaton.finals


Sample = Callable[[], str]


def random_pattern(rng: random.Random, letters: str, depth: int = 3) -> tuple[str, Sample]:
    """An expression that Python and Rust read alike, and what draws texts that match it."""
    kind = rng.randrange(6) if depth else 0
    if kind == 0:
        letter = rng.choice(letters)
        return re.escape(letter), lambda: letter
    if kind == 1:
        members = rng.sample(letters, rng.randint(1, 3))
        if rng.random() < 0.3:
            others = [c for c in letters if c not in members]
            return f"[^{re.escape(''.join(members))}]", lambda: rng.choice(others)
        return f"[{re.escape(''.join(members))}]", lambda: rng.choice(members)
    first, draw_first = random_pattern(rng, letters, depth - 1)
    if kind in (2, 3):
        second, draw_second = random_pattern(rng, letters, depth - 1)
        if kind == 2:
            return first + second, lambda: draw_first() + draw_second()
        group = rng.choice(["(", "(?:", "(?P<x>"]) if "(?P" not in first + second else "("
        return f"{group}{first}|{second})", lambda: rng.choice([draw_first, draw_second])()
    low, high, sign = rng.choice(
        [(0, 4, "*"), (1, 4, "+"), (0, 1, "?"), (2, 2, "{2}"), (1, 3, "{1,3}"), (2, 4, "{2,}")]
    )
    lazy = rng.choice(["", "?"])
    return (
        f"(?:{first}){sign}{lazy}",
        lambda: "".join(draw_first() for _ in range(rng.randint(low, high))),
    )


def spelled(text: bytes, spellings: Mapping[int, bytes]) -> Iterator[tuple[int, ...]]:
    """Every token string with these bytes."""
    if not text:
        yield ()
    for token, spelling in spellings.items():
        if text.startswith(spelling):
            for rest in spelled(text[len(spelling) :], spellings):
                yield (token, *rest)


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"[0-9]+(\.[0-9]+)?", ["1", "12", "1.2", "12.21"]),
        (r"a(,a)*", ["a", "a,a", "a,a,a"]),
        ("a|ab", ["a", "ab"]),
        ("a*?", ["a", "aa"]),
        ("(a|z)1?", ["a", "a1"]),  # no token spells z, which is no reason to refuse the rest
        ("(?i)A1?", ["a", "a1"]),
    ],
)
def test_a_string_that_passes_an_accepting_state_is_accepted(pattern, texts):
    spellings = {**BYTES, 20: b".", 21: b",", 22: b",a"}
    automaton = Automaton.of_regex(pattern, spellings)
    for text in texts:
        strings = list(spelled(text.encode(), spellings))
        assert strings and all(accepts(automaton, string) for string in strings), text


@pytest.mark.parametrize("seed", range(80))
def test_a_random_regex_accepts_what_python_does_and_nothing_else(seed):
    pattern, _ = random_pattern(random.Random(seed), "12abé")
    matching = {n: strings(pattern, n) for n in (1, 2, 3)}
    try:
        automaton = Automaton.of_regex(pattern, BYTES)
    except TemplateError as error:
        assert "no text of this checkpoint's tokens matches it" in str(error)
        assert not any(matching.values())
        return
    for length, expected in matching.items():
        found = {s for s in product(BYTES, repeat=length) if accepts(automaton, s)}
        assert found == expected, pattern


# Words of Gemma's vocabulary: with and without a space before them, pieces, runs, byte tokens.
GEMMA = (
    " the|the| a|a|ing| in|in| Par|is|Paris| Paris|s|t| |  |    |\n|\n\n|\t|0|1|2|3|.|..|...|,| ,"
    '|, |"|": "|{|}|{"|":|-|--|é|è| é|ü|€|—|日本|語|한|🙂|th|e|h|i|he|x|xx|==|=|()|(|)'
).split("|")
SPELLINGS = dict(
    enumerate([*(word.encode() for word in GEMMA), b"\xc3", b"\xa9", b"\xe2", b"\x82"])
)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_regex_over_real_words_accepts_what_python_does(seed):
    rng = random.Random(seed)
    pattern, draw = random_pattern(rng, " .,aehist012é語\n", depth=4)
    automaton = Automaton.of_regex(pattern, SPELLINGS)
    tokens = list(SPELLINGS)
    texts = {text for _ in range(20) if len(text := draw()) in range(1, 13)}
    assert texts
    tried = 0
    for text in sorted(texts):
        assert re.fullmatch(pattern, text)
        for string, _ in zip(spelled(text.encode(), SPELLINGS), range(50), strict=False):
            assert accepts(automaton, string), (pattern, text, string)
            tried += 1
            other = list(string)  # one token put in, taken out or changed
            at = rng.randrange(len(other))
            other[at : at + rng.randrange(2)] = rng.sample(tokens, rng.randrange(2))
            changed = b"".join(SPELLINGS[token] for token in other)
            try:
                matches = re.fullmatch(pattern, changed.decode()) is not None
            except UnicodeDecodeError:
                matches = False
            assert accepts(automaton, tuple(other)) == matches, (pattern, changed)
    assert tried


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r'match "\(", character 1: missing \), unterminated subpattern'),
        ("a)|(?:b", r"character 2: this \) closes nothing"),
        ("a{2", "is not valid in the syntax of Rust's regex crate"),
        (r"[^\s\S]", "no text of this checkpoint's tokens matches it"),
        ("zzz", "no text of this checkpoint's tokens matches it"),
        ("", "no text of this checkpoint's tokens matches it"),
        (r"a(?=a)b", "character 2: look-ahead and look-behind are not supported"),
        ("^1", "character 1: the whole slot is matched anyway"),
    ],
)
def test_a_pattern_that_cannot_be_used(pattern, message):
    with pytest.raises(TemplateError, match=message):
        Automaton.of_regex(pattern, BYTES)


def test_a_verbose_expression_may_end_in_a_comment():
    spellings = {i: bytes([c]) for i, c in enumerate(b"ab 1")}
    automaton = Automaton.of_regex("(?x) a b+ # letters", spellings)
    assert automaton.lengths(4) == [2, 3, 4]
