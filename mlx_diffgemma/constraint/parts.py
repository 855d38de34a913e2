"""Choices, free text, and parts one behind another, as automata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import ConstraintError
from .build import concatenate
from .dfa import DFA
from .json_text import of_length
from .net import Limits, Net, determinise


def choices(texts: Sequence[str], limits: Limits | None = None) -> DFA:
    """Return the automaton of some texts.

    Raises:
      ConstraintError: if there is none, or one is empty or no text.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable) or not texts:
        raise ConstraintError(f"choices are a list of texts with one in it at least, got {texts!r}")
    net = Net(limits)
    start, end = net.state(), net.state()
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise ConstraintError(f"choice {i + 1} must be a text that is not empty, got {text!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConstraintError(f"choice {i + 1} holds half a character: {text!r}")
        net.skip(net.spell(start, text), end)
    return determinise(net, start, end)


def free_text(low: int = 0, high: int | None = None, limits: Limits | None = None) -> DFA:
    """Return the automaton of any text of `low` to `high` characters, without a limit for None."""
    (limits or Limits()).check_states(max(low, high or 0) + 1)
    if low < 0 or (high is not None and high < low):
        raise ConstraintError(f"a text of {low} to {high} characters is not possible")
    return of_length(low, high)


def in_a_row(parts: Iterable[DFA | str], limits: Limits | None = None) -> DFA:
    """Return the automaton of a template: literal texts, and automata for its slots.

    Only the whole must fit: a slot's own text may hold what the next literal begins with.

    Raises:
      LimitError: if it has too many states.
    """
    return concatenate(parts, limits)
