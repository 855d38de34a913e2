"""Drawn expressions against Python's `re`, both ways, on every string up to a length.

usage: python -m tests.constraint.patterns [COUNT]     500 by default
"""

from __future__ import annotations

import itertools
import re
import sys
from random import Random

from mlx_diffgemma.constraint.dfa import DFA, NOWHERE
from mlx_diffgemma.constraint.regex import regex, search

ALPHABET, LENGTH = "a1\n", 6
ATOMS = ("a", "A", "1", ".", r"\n", r"\d", r"\W", r"\s", r"\w", r"\D", "[Ab]", "[^a1]", "[a-c\\d]")
ENDS = ("", "*", "+", "?", "{2}", "{1,2}", "{0,1}", "{2,}", "*?", "+?", "??", "{1,3}?", "{,2}")
FLAGS = ("", "", "", "(?i)", "(?s)", "(?is)", "(?a)")


def draw(rng: Random, depth: int = 2) -> str:
    """Return an expression without anchors."""
    kind = rng.randrange(4 if depth else 1)
    if kind == 0:
        return rng.choice(ATOMS) + rng.choice(ENDS)
    if kind == 1:
        return "".join(draw(rng, depth - 1) for _ in range(rng.randint(2, 3)))
    group = rng.choice(("(", "(?:", f"(?P<n{rng.randrange(10**9)}>", "(?i:", "(?s-i:"))
    inner = "|".join(draw(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    return f"{group}{inner}){rng.choice(ENDS)}"


def strings(length: int) -> list[str]:
    return ["".join(s) for n in range(length + 1) for s in itertools.product(ALPHABET, repeat=n)]


def accepted(automaton: DFA, length: int) -> set[str]:
    """Return the strings up to a length that an automaton accepts."""
    found, level = set(), {"": 0}
    for _ in range(length + 1):
        found |= {text for text, state in level.items() if automaton.accepting[state]}
        ways = ((t + c, automaton.step(s, ord(c))) for t, s in level.items() for c in ALPHABET)
        level = {text: state for text, state in ways if state != NOWHERE}
    return found


def differences(seed: int, length: int = LENGTH) -> list[tuple[str, str]]:
    """Return what one drawn expression accepts and `re` does not, or the reverse."""
    rng = Random(seed)
    body = draw(rng)
    whole = rng.choice(FLAGS) + body
    texts = strings(length)
    matched = {text for text in texts if re.fullmatch(whole, text)}
    wrong = [(whole, text) for text in matched ^ accepted(regex(whole), length)]
    # As ECMA 262 reads them, $ stands at the end only, and \s and . know other spaces and line
    # ends, none of which is in this alphabet.
    sought = rng.choice(("", "^")) + body.replace("{,2}", "{0,2}") + rng.choice(("", "$"))
    strict = re.sub(r"\$$", r"\\Z", sought)
    for reading, pattern in (("wide", sought), ("narrow", strict)):
        matched = {text for text in texts if re.search(pattern, text)}
        automaton = search(sought, reading)
        wrong += [(sought, text) for text in matched ^ accepted(automaton, length)]
    return wrong


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    wrong = [difference for seed in range(count) for difference in differences(seed)]
    print(f"{count} expressions, strings to {LENGTH}: {len(wrong)} differences", wrong[:5])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
