"""Checks of a slot's regular expression for unsupported syntax, before it is compiled."""

from __future__ import annotations

import re
from typing import NamedTuple


class Problem(NamedTuple):
    """Why an expression cannot be used."""

    at: int  # index of the character
    reason: str


_SYNTAX = "; the syntax is that of Rust's regex crate"
_WHOLE = "the whole slot is matched anyway; leave out"
# Outside of a character class: beginning of a construct -> why it is refused. The first match
# counts.
_REFUSED = (
    (r"\\[1-9]|\\[kg][<{'0-9]|\(\?P=", "back-references are not supported"),
    (r"\(\?<?[=!]", "look-ahead and look-behind are not supported"),
    (r"\\[bB<>]", "word boundaries are not supported"),
    (r"[\^$]|\\[AzZG]", _WHOLE),
    (r"\(\?>", "atomic groups are not supported"),
    (r"\(\?\(", "conditional groups are not supported"),
    (r"\(\?#", "comments are not supported"),
    (r"\(\?(?:[0-9+]|R\)|&|P>)|\\K", "recursion and \\K are not supported"),
    (r"(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\+", "possessive quantifiers are not supported"),
)
_COMMON_MISTAKES = (
    "missing ), unterminated subpattern",
    "unterminated character set",
    "nothing to repeat",
    "bad character range",
    "min repeat greater than max repeat",
)
_STEP = re.compile(r"\\(?:[pPxuU]\{[^}]*\}|.)|.", re.DOTALL)


def find_problem(pattern: str) -> Problem | None:
    """Return the first unsupported construct of an expression, or None if none is found.

    None does not mean that the expression is valid: its compiler finds the other mistakes.
    """
    at = groups = 0
    while at < len(pattern):
        if pattern[at] == "[":
            at = _end_of_class(pattern, at)
            continue
        for form, reason in _REFUSED:
            if found := re.compile(form).match(pattern, at):
                tail = f" {found[0]}" if reason is _WHOLE else f": {found[0]}{_SYNTAX}"
                return Problem(at, reason + tail)
        step = _STEP.match(pattern, at)
        assert step is not None
        groups += {"(": 1, ")": -1}.get(step[0], 0)
        if groups < 0:
            return Problem(at, "this ) closes nothing; write \\) for the character")
        at = step.end()
    return None


def syntax_problem(pattern: str) -> Problem | None:
    """Return the error of Python's parser for an expression that the compiler has refused, if both
    read it alike."""
    try:
        re.compile(pattern)
    except re.error as error:
        if error.pos is not None and error.msg.startswith(_COMMON_MISTAKES):
            return Problem(error.pos, error.msg)
    return None


def _end_of_class(pattern: str, start: int) -> int:
    """Return the index after a character class; classes may be nested."""
    depth, at = 0, start
    while at < len(pattern):
        if pattern[at] == "[":
            depth += 1
            opening = re.compile(r"\^?\]?").match(pattern, at + 1)
            assert opening is not None
            at = opening.end()  # a ] at the beginning is a character
            continue
        if pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 2 if pattern[at] == "\\" else 1
    return len(pattern)
