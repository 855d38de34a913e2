"""The texts that facts about a string allow, before they are spelled as JSON."""

from __future__ import annotations

from .build import anything, difference, intersection, is_empty
from .dfa import DFA
from .facts import Facts
from .formats import format_texts
from .json_text import of_length, texts_except
from .net import Limits
from .regex import search

_COUNTED = 100  # more characters are not counted to see that no text is left


def texts_of(facts: Facts, limits: Limits) -> DFA | None:
    """Return the automaton of the texts, or None where any text is allowed."""
    found = [format_texts(name) for name in facts.formats]
    parts = [part for part in found if part is not None]
    parts += [search(p, "narrow", limits) for p, is_wanted in facts.patterns if is_wanted]
    if facts.min_length or facts.max_length is not None:
        limits.check_states(max(facts.min_length, facts.max_length or 0))
        parts.append(of_length(facts.min_length, facts.max_length))
    unwanted = [search(p, "wide", limits) for p, is_wanted in facts.patterns if not is_wanted]
    words = tuple(value for value in facts.excluded if isinstance(value, str))
    if not parts and not unwanted and not words:
        return None
    result = parts[0] if parts else anything()
    for part in parts[1:]:
        result = intersection(result, part, limits)
    for part in unwanted:
        result = difference(result, part, limits)
    return intersection(result, texts_except(words), limits) if words else result


def is_counted(facts: Facts) -> bool:
    """Return whether the automaton counts the characters of the texts."""
    return facts.max_length is not None or facts.min_length > 1


def has_no_string(facts: Facts, limits: Limits) -> bool:
    """Return whether no text is allowed, however patterns are read. Formats are left out: what is
    known of them is a part of what they allow."""
    if facts.max_length is not None and facts.min_length > facts.max_length:
        return True
    if not facts.patterns:
        return False
    high = facts.max_length
    low, high = min(facts.min_length, _COUNTED), None if (high or 0) > _COUNTED else high
    result = of_length(low, high)
    for pattern, is_wanted in facts.patterns:
        if is_wanted:
            result = intersection(result, search(pattern, "wide", limits), limits)
        else:
            result = difference(result, search(pattern, "narrow", limits), limits)
    return is_empty(result)
