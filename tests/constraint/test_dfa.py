"""The automaton that constraints are made of, by hand."""

import numpy as np

from mlx_diffgemma.constraint.dfa import DFA, NOWHERE, SPECIAL

# "a" any number of times, then the special token 5.
LETTERS = DFA(
    np.array([0, 97, 98, SPECIAL + 5, SPECIAL + 6], np.int32),
    np.array([[NOWHERE, 0, NOWHERE, 1, NOWHERE], [NOWHERE] * 5], np.int32),
    np.array([False, True]),
)


def test_whole_strings_are_accepted():
    assert LETTERS.accepts([97, 97, SPECIAL + 5])
    assert LETTERS.accepts([SPECIAL + 5])
    assert not LETTERS.accepts("aa")
    assert not LETTERS.accepts([97, SPECIAL + 6])
    assert not LETTERS.accepts([SPECIAL + 5, 97])
    assert not LETTERS.accepts("")


def test_no_step_leads_out_of_nowhere():
    assert LETTERS.step(0, ord("b")) == NOWHERE
    assert LETTERS.step(NOWHERE, ord("a")) == NOWHERE
    assert len(LETTERS) == 2
