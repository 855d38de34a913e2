"""What a regular expression of a slot may not use, found before anything is compiled. Knows text
only."""

from __future__ import annotations

import re
from typing import NamedTuple


class Problem(NamedTuple):
    """Why an expression cannot be used."""

    at: int  # index of the character
    reason: str


_SYNTAX = "; the syntax is that of Rust's regex crate"
_WHOLE = "the whole slot is matched anyway; leave out"
# Outside of a character class: what begins so -> why it is refused. The first that fits counts.
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
    """Return the first thing in an expression that cannot be used, if any is known.

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
    """Return what Python's parser says about an expression that its compiler has refused, where
    the two mean the same by it."""
    try:
        re.compile(pattern)
    except re.error as error:
        if error.pos is not None and error.msg.startswith(_COMMON_MISTAKES):
            return Problem(error.pos, error.msg)
    return None


def _end_of_class(pattern: str, start: int) -> int:
    """Where the expression goes on behind a character class; classes may hold classes."""
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
