"""Expressions as automata, against Python's `re`."""

import re
import unicodedata

import pytest

from mlx_diffgemma.constraint.characters import category, shorthand
from mlx_diffgemma.constraint.ranges import SCALARS
from mlx_diffgemma.constraint.regex import regex, search
from mlx_diffgemma.errors import ConstraintError, LimitError
from tests.constraint import patterns
from tests.sampled import one_in

CHARACTERS = [chr(code) for low, high in SCALARS for code in range(low, high + 1)]


@pytest.mark.parametrize("seed", one_in(2, range(30)))
def test_drawn_expressions_match_what_re_matches(seed):
    assert patterns.differences(seed, length=5) == []


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"[0-9]+(\.[0-9]+)?", ("1.5", "1", "1.", ".5", "")),  # outlines-core can never write 1.5
        ("a,a", ("a,a", "a", "a,")),
        (r"\x41\u00e9\t\.\-", ("Aé\t.-", "Aé\t.")),
        ("(?x) a b # note\n c", ("abc", "a b c")),
        ("(?i)straße", ("STRAßE", "STRAẞE", "STRASSE")),
        ("(?i)[k-l]s", ("\u212as", "LS", "l\u017f", "ms")),
        ("(?i)[^k]", ("K", "\u212a", "x")),
        ("(?ai)k", ("K", "\u212a")),
        ("a{2", ("a{2", "aa")),
        ("[]a]]", ("]]", "a]", "]")),
        (r"[\b]", ("\b", "b")),
        (r"^(ab|^a$|b)$", ("ab", "a", "b", "ba")),
        ("((a*)*|b+)*", ("", "ab", "bba", "c")),
        ("[a\\-z-]", ("-", "a", "b")),
    ],
)
def test_expressions_by_hand_match_what_re_matches(pattern, texts):
    automaton = regex(pattern)
    assert [automaton.accepts(t) for t in texts] == [bool(re.fullmatch(pattern, t)) for t in texts]
    assert {automaton.accepts(text) for text in texts} == {True, False} or pattern == "[a\\-z-]"


def test_rusts_escapes_are_known():
    assert regex(r"\x{1F600}\u{41}\z").accepts("😀A")
    assert regex(r"\p{Lu}\pN\P{L}").accepts("É7.")
    assert not regex(r"\p{Lu}").accepts("é")
    assert regex("(?<year>[0-9]{4})").accepts("2026")


@pytest.mark.parametrize("letter", "dws")
def test_classes_hold_what_re_holds(letter):
    for reading, flag in (("unicode", ""), ("ascii", "(?a)")):
        compiled = re.compile(f"{flag}\\{letter}")
        inside = {c for c in CHARACTERS if compiled.fullmatch(c)}
        found = shorthand(letter, reading)
        assert {chr(code) for low, high in found for code in range(low, high + 1)} == inside
        assert not set(map(ord, inside)) & {
            code for low, high in shorthand(letter.upper(), reading) for code in range(low, high)
        }


def test_letters_of_any_case_are_those_of_re():
    characters = CHARACTERS[:0x2200] + CHARACTERS[0xF000:0xF800]
    for pattern in ("k", "s", "i", "µ", "ß", "ǆ", "θ", "[a-z]", "[^s]", "é", "ﬅ", "ΐ"):
        automaton, compiled = regex(f"(?i){pattern}"), re.compile(pattern, re.IGNORECASE)
        for character in characters:
            assert automaton.accepts(character) == bool(compiled.fullmatch(character)), character


def test_categories_are_those_of_unicodedata():
    members = {}
    for character in CHARACTERS:
        members.setdefault(unicodedata.category(character), []).append(ord(character))
    for name, codes in members.items():
        assert [code for low, high in category(name) for code in range(low, high + 1)] == codes
    assert category("Xx") is None


def test_a_schema_is_read_narrowly_where_dialects_differ():
    narrow, wide = search(r"^\d$", "narrow"), search(r"^\d$", "wide")
    assert narrow.accepts("5") and wide.accepts("5")
    assert not narrow.accepts("٣") and wide.accepts("٣")  # Python's digit, not ECMA's
    assert not search(r"^\D$", "narrow").accepts("٣")
    assert not search(r"^[^\d]$", "narrow").accepts("٣") and search(r"^[^\d]$", "wide").accepts("٣")
    assert not search("^a$", "narrow").accepts("a\n") and search("^a$", "wide").accepts("a\n")
    assert not search(r"^\S$", "narrow").accepts("\ufeff")
    assert search("b", "narrow").accepts("abc") and not search("b", "narrow").accepts("ac")


@pytest.mark.parametrize(
    ("pattern", "position", "words"),
    [
        ("a(?=b)", 1, "look-ahead"),
        ("(?<!b)a", 0, "look-behind"),
        (r"(a)\1", 3, "back-references"),
        (r"a\b", 1, "word boundaries"),
        ("a++", 2, "possessive"),
        ("(?>a)", 0, "atomic"),
        ("(?(1)a)", 0, "conditional"),
        ("a**", 2, "behind another"),
        ("*a", 0, "nothing to repeat"),
        ("a(b", 1, "not closed"),
        ("ab)", 2, "closes nothing"),
        ("[ab", 0, "not closed"),
        ("x[b-a]", 2, "ends before it begins"),
        ("a{3,1}", 1, "3 is more than 1"),
        ("[a&&b]", 2, "&&"),
        ("[[:alpha:]]", 1, "[:"),
        (r"\p{Greek}", 0, "general category"),
        (r"a\q", 1, "\\q is not supported"),
        ("(?m)^a", 4, "anchors of lines"),
        (r"\x4", 0, "hexadecimal"),
        ("(?t)a", 0, "flags are"),
    ],
)
def test_unsupported_expressions_are_refused_with_their_position(pattern, position, words):
    with pytest.raises(ConstraintError) as caught:
        regex(pattern)
    assert caught.value.position == position
    assert words in str(caught.value)
    assert f"character {position + 1}:" in str(caught.value)


@pytest.mark.parametrize("pattern", ["[]a]", r"a\z", r"\Aa", "(?<n>a)", r"\p{L}", "a{,2}", r"\a"])
def test_a_schema_refuses_what_dialects_read_in_two_ways(pattern):
    regex(pattern)
    with pytest.raises(ConstraintError, match=r"schema|two readings"):
        search(pattern, "narrow")


def test_large_expressions_are_refused():
    with pytest.raises(LimitError, match="more than 2000 states"):
        regex("(a|b)*a(a|b){12}")
    with pytest.raises(LimitError):
        regex("((((a{99}){99}){99}){99})")
    with pytest.raises(ConstraintError, match="nested more than"):
        regex("(" * 2000 + ")" * 2000)
