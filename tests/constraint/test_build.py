"""Automata from nets and from each other, against `re` and against trying every string."""

import itertools
import re

import numpy as np
import pytest

from mlx_diffgemma.constraint import build
from mlx_diffgemma.constraint.dfa import NOWHERE, SPECIAL
from mlx_diffgemma.constraint.net import Limits, Net, determinise
from mlx_diffgemma.constraint.ranges import of_characters, single
from mlx_diffgemma.constraint.regex import regex
from mlx_diffgemma.errors import LimitError

STRINGS = ["".join(s) for n in range(7) for s in itertools.product("abc", repeat=n)]
PATTERNS = ["(ab|c)*", "a{1,3}b?", "[^b]*c", "(a|b)*abb", "", "a*b*c*", "(aa|aaa)*", "[^a]+"]
PAIRS = list(itertools.combinations(PATTERNS, 2))


def accepted(automaton):
    return {text for text in STRINGS if automaton.accepts(text)}


def matched(pattern):
    return {text for text in STRINGS if re.fullmatch(pattern, text)}


def is_trim(automaton):
    """Whether every state is reached, reaches an end, and differs from every other one."""
    table, alive = automaton.table, automaton.accepting.copy()
    reached = {0}
    for _ in range(len(automaton)):
        reached |= {t for s in reached for t in table[s].tolist()} - {NOWHERE}
        alive |= np.where(table == NOWHERE, False, alive[table]).any(axis=1)
    different = {
        (row.tobytes(), bool(end)) for row, end in zip(table, automaton.accepting, strict=True)
    }
    return len(reached) == len(automaton) and alive.all() and len(different) == len(automaton)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_automata_of_two_expressions_combine_as_their_sets_do(one, other):
    a, b = regex(one), regex(other)
    results = {
        build.intersection(a, b): matched(one) & matched(other),
        build.difference(a, b): matched(one) - matched(other),
        build.union([a, b]): matched(one) | matched(other),
        build.concatenate([a, "b", b]): matched(f"(?:{one})b(?:{other})"),
        build.repeat(a, 1, 3): matched(f"(?:{one}){{1,3}}"),
        build.repeat(b, 2, None): matched(f"(?:{other}){{2,}}"),
        build.complement(a): set(STRINGS) - matched(one),
    }
    for automaton, expected in results.items():
        assert accepted(automaton) == expected
        assert is_trim(automaton) or build.is_empty(automaton)


def test_equal_languages_have_equal_automata():
    for one, other in (("(a|b)*", "(a*b*)*"), ("a(ba)*", "(ab)*a"), ("a{2}|a{3}", "aaa?")):
        a, b = regex(one), regex(other)
        assert (a.bounds.tolist(), a.table.tolist()) == (b.bounds.tolist(), b.table.tolist())
        assert a.accepting.tolist() == b.accepting.tolist()


def test_minimal_automata_have_the_known_sizes():
    assert len(regex("(a|b)*abb")) == 4
    assert len(regex("(a|b)*a(a|b){5}")) == 64
    assert len(regex("(aaa)*")) == 3
    assert len(build.repeat(regex("a"), 0, 300)) == 301


def test_no_string_at_all_is_one_state():
    nothing = build.intersection(regex("a"), regex("b"))
    assert build.is_empty(nothing) and len(nothing) == 1
    assert accepted(build.union([nothing, regex("a")])) == {"a"}
    assert build.is_empty(build.concatenate([regex("a"), nothing]))
    assert accepted(build.repeat(nothing, 0, None)) == {""}


def test_special_tokens_are_symbols_of_their_own():
    net = Net()
    start, end = net.state(), net.state()
    at = net.spell(start, [SPECIAL + 7, ord("a")])
    net.move(at, single(SPECIAL + 8), end)
    call = determinise(net, start, end)
    assert call.accepts([SPECIAL + 7, 97, SPECIAL + 8])
    assert not call.accepts([SPECIAL + 6, 97, SPECIAL + 8])
    either = build.union([call, regex("[^x]*")])
    assert either.accepts([SPECIAL + 7, 97, SPECIAL + 8]) and either.accepts("abc")
    assert not either.accepts([97, SPECIAL + 7])
    assert not build.complement(call).accepts([SPECIAL + 7])  # it is about texts


def test_characters_stay_within_unicode():
    everything = build.anything()
    assert everything.accepts("a\U0010ffff\0") and not everything.accepts([0xD800])
    assert not everything.accepts([SPECIAL])


def test_limits_of_states_and_time_hold():
    with pytest.raises(LimitError, match="more than 50 states"):
        regex("a{60}", Limits(states=50))
    assert len(regex("a{49}", Limits(states=50))) == 50
    with pytest.raises(LimitError, match="takes longer"):
        regex("a", Limits(seconds=-1))
    with pytest.raises(LimitError):
        net = Net(Limits(states=10))
        for _ in range(10_000):
            net.state()


def test_an_automaton_that_is_put_in_twice_stays_apart():
    net = Net()
    start, middle, end = net.state(), net.state(), net.state()
    word = regex("(ab)*")
    net.put(start, word, middle)
    net.move(middle, of_characters("c"), end)
    net.put(end, word, end)
    assert accepted(determinise(net, start, end)) == matched("(ab)*c(ab)*")
