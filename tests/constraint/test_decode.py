"""Strings under a constraint: the likeliest, their distribution and draws, against all strings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_diffgemma.constraint.decode import LEAST, best, check_budget, endings
from mlx_diffgemma.constraint.dfa import NOWHERE
from mlx_diffgemma.constraint.marginals import Strings
from mlx_diffgemma.constraint.tokens import TokenAutomaton, lift
from mlx_diffgemma.errors import ConstraintError, NumbersError
from tests.constraint.automata import dfa, either, many, one_of, person, times
from tests.constraint.cases import (
    END,
    MASK,
    PAD,
    Case,
    case,
    cases,
    check,
    maxima,
    sums,
    vocabulary,
)
from tests.sampled import one_in

TEXTS = [*'{}[]",:. 0123456789truefalsnmvipg\\', '{"', '":', '": "', '","', "name", "true", " true"]


@pytest.mark.parametrize("first", one_in(3, range(0, 10_000, 1000)))
def test_draft_and_marginals_are_those_of_all_strings(first):
    for one in cases(30, first):
        check(one)


def some_case() -> Case:
    """The first case with many strings of classes that are likely enough to be drawn."""
    for one in cases(1000):
        scores = dict(one.strings())
        likely = [string for string, score in scores.items() if score > max(scores.values()) - 3]
        if len({tuple(one.automaton.classes[list(string)].tolist()) for string in likely}) > 15:
            return one
    raise AssertionError("no such case")


def test_positions_are_drawn_as_often_as_their_marginals_say():
    one = some_case()
    p, automaton = np.exp(one.log_p), one.automaton
    strings = Strings.of(automaton, sums(automaton, p), one.endings, one.start)
    found = strings.marginals(sums(automaton, p * one.log_p))
    rng, count = np.random.default_rng(0), 4000
    draws = np.array([found.draw(rng.random(len(p))) for _ in range(count)])
    for i, masses in enumerate(found.masses):
        often = np.bincount(draws[:, i], minlength=len(masses))
        assert not often[masses == 0].any()
        np.testing.assert_allclose(often / count, masses, atol=5 * math.sqrt(0.25 / count))


def test_uniform_numbers_at_both_ends_draw_something_possible():
    one = some_case()
    p, automaton = np.exp(one.log_p), one.automaton
    strings = Strings.of(automaton, sums(automaton, p), one.endings, one.start)
    found = strings.marginals(sums(automaton, p * one.log_p))
    for uniform in (0.0, 1 - 2**-53):
        classes = found.draw(np.full(len(p), uniform))
        assert (found.masses[np.arange(len(p)), classes] > 0).all()


def answer() -> TokenAutomaton:
    return lift(person(), vocabulary(list(dict.fromkeys(TEXTS)), with_bytes=True))


@pytest.mark.parametrize("scale", [0.3, 3, 30])
def test_a_draft_of_a_whole_canvas_fits_and_scores_what_its_tokens_do(scale):
    automaton, L = answer(), 96
    rng = np.random.default_rng(1)
    logits = rng.normal(0, scale, (L, len(automaton.classes)))
    log_p = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    path = best(automaton, maxima(automaton, log_p), endings(automaton, 0))
    inside = automaton.classes[None] == path.classes[:, None]
    clamped = np.maximum(log_p, LEAST)
    tokens = np.where(inside, clamped, -np.inf).argmax(axis=1)
    assert automaton.after(tokens) == automaton.end
    assert path.score == pytest.approx(
        clamped[np.arange(L), tokens].sum(dtype=np.float64), abs=1e-6
    )
    text = tokens[: int(np.flatnonzero(tokens == PAD)[0]) - 1] if PAD in tokens else tokens[:-1]
    spelled = b"".join(spelling(token) for token in text.tolist()).decode()
    assert person().accepts(spelled)
    p = np.exp(log_p.astype(np.float64))
    strings = Strings.of(automaton, sums(automaton, p), endings(automaton, 0))
    found = strings.marginals(sums(automaton, p * log_p))
    np.testing.assert_allclose(found.masses.sum(axis=1), 1, atol=1e-10)
    assert strings.log_total >= path.score
    assert (found.entropy >= 0).all()


def spelling(token: int) -> bytes:
    texts = list(dict.fromkeys(TEXTS))
    at = token - MASK - 1
    return texts[at].encode() if at < len(texts) else bytes([at - len(texts)])


@pytest.mark.parametrize("expression", ["record", "loop", "choices"])
def test_every_budget_from_the_least_on_finishes_in_canvases_of_four(expression):
    if expression == "record":
        automaton = answer()
    else:
        made = (
            either("abc", "abcabcabca", "cab")
            if expression == "choices"
            else times(one_of("abc"), 3, 3) + many("ab")
        )
        automaton = lift(dfa(made), vocabulary(["a", "b", "c", "ab", "abc"]))
    least, rng = check_budget(automaton, 10_000), np.random.default_rng(0)
    for budget in range(least, least + 24):
        assert check_budget(automaton, budget) == least
        state, written = 0, 0
        while state != automaton.end:
            width = min(4, budget - written)
            numbers = rng.normal(-5, 4, (width, len(automaton.sizes))).astype(np.float32)
            path = best(automaton, numbers, endings(automaton, budget - written - width), state)
            members = [np.flatnonzero(automaton.classes == cls)[0] for cls in path.classes]
            state = automaton.after(np.array(members), state)
            assert state == path.states[-1] != NOWHERE
            written += width
            assert written <= budget
    with pytest.raises(
        ConstraintError, match=f"has {least} tokens .* at most {least - 1} .* at least {least}"
    ):
        check_budget(automaton, least - 1)
    with pytest.raises(ValueError, match="no string"):
        best(
            automaton,
            np.zeros((least - 1, len(automaton.sizes)), np.float32),
            endings(automaton, 0),
        )
    with pytest.raises(ValueError, match="no string"):
        Strings.of(automaton, np.ones((least - 1, len(automaton.sizes))), endings(automaton, 0))


def test_a_constraint_that_no_token_spells_is_refused():
    automaton = lift(dfa("x"), vocabulary(["a"]))
    with pytest.raises(ConstraintError, match="no text of this checkpoint's tokens fits"):
        check_budget(automaton, 100)


def test_a_token_without_any_probability_is_written_where_nothing_else_fits():
    automaton = lift(dfa("ab"), vocabulary(["a", "b", "c"]))
    numbers = np.full((4, len(automaton.sizes)), -np.inf, np.float32)
    numbers[:, automaton.classes[MASK + 3]] = 0  # the model is sure of c
    path = best(automaton, numbers, endings(automaton, 0))
    assert automaton.after([MASK + 1, MASK + 2, END, PAD]) == path.states[-1] == automaton.end
    assert path.classes[:3].tolist() == automaton.classes[[MASK + 1, MASK + 2, END]].tolist()
    assert path.score == 4 * LEAST
    p = np.exp(numbers.astype(np.float64))
    strings = Strings.of(automaton, p, endings(automaton, 0))
    found = strings.marginals(np.zeros_like(p))
    np.testing.assert_allclose(found.masses[np.arange(3), path.classes[:3]], 1, atol=1e-12)
    drawn = found.draw(np.full(4, 0.5)).tolist()
    assert drawn[:3] == path.classes[:3].tolist()
    # Two tokens end the answer, three may stand behind it, and the model prefers none.
    np.testing.assert_allclose(found.entropy, [0, 0, math.log(2), math.log(3)], atol=1e-9)


def test_of_equal_strings_the_lowest_edge_and_class_win():
    automaton = lift(dfa(either("a", "b", "ab")), vocabulary(["a", "b", "ab"]))
    numbers = np.zeros((4, len(automaton.sizes)), np.float32)
    first = best(automaton, numbers, endings(automaton, 0))
    edges = [automaton.first_edges[0], automaton.first_edges[0]]
    assert first.states[1] == automaton.targets[edges[0]]
    assert first.classes[0] == automaton.classes_of(automaton.sets[edges[0]])[0]


def test_numbers_that_are_not_numbers_are_refused():
    automaton = lift(dfa("ab"), vocabulary(["a", "b"]))
    numbers = np.zeros((3, len(automaton.sizes)), np.float32)
    strings = Strings.of(automaton, np.exp(numbers), endings(automaton, 0))
    numbers[1, 2] = np.nan
    with pytest.raises(NumbersError, match="NaN"):
        best(automaton, numbers, endings(automaton, 0))
    with pytest.raises(NumbersError, match="NaN"):
        Strings.of(automaton, numbers, endings(automaton, 0))
    with pytest.raises(NumbersError, match="NaN"):
        strings.marginals(numbers)


def test_shapes_that_disagree_are_named():
    automaton = lift(dfa("ab"), vocabulary(["a", "b"]))
    K = len(automaton.sizes)
    with pytest.raises(ValueError, match=rf"\(3, {K + 1}\)"):
        best(automaton, np.zeros((3, K + 1), np.float32), endings(automaton, 0))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        Strings.of(automaton, np.ones((3, K)), np.ones(2, bool))


def test_some_drawn_constraints_have_no_string():
    assert any(case(seed) is None for seed in range(100))
