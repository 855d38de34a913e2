"""What does a `match` slot cost at the real vocabulary: to compile, to hold, and in every step?

262,144 made-up spellings of the kind that the real tokenizer has (bytes, digits, words with and
without a space before them, runs of spaces; the real list cannot be downloaded here), and patterns
from narrow to one that allows nearly every token at every place. Compiling is outlines-core's
index and our tables from it; a step is the best string of the slot under random probabilities, on
one core.

Bound: none for compiling; a step of a slot of 16 tokens within the time of one denoise step of the
real model on the fastest chip of `floors.py`, about 100 ms. Floor of a step: reading the slot's
probabilities once.

Checked: every string that is found matches.

    python bench/match.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
from common import current_rss_bytes, finish, record

from mlx_diffgemma.constraint.automaton import Automaton

VOCABULARY, LENGTH, SPECIAL, STEPS = 262_144, 16, 24, 5
BOUND_MS = 100.0
PATTERNS = {
    "number": "[0-9]{1,16}",
    "date": r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]",
    "mail": r"[a-z0-9.]{1,40}@[a-z0-9]{1,40}\.(com|org)",
    "words": "[a-z ]+",
    "line": r"[^\n]*",
    "string": r'"([^"\\\\]|\\\\.)*"',
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="repeatable; all")
    parser.add_argument("--only", choices=PATTERNS, help="measure this one here; used by itself")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    print(f"bound: a step of {LENGTH} tokens within {BOUND_MS:g} ms")
    rows = {}
    for name in options.pattern or PATTERNS:  # a process each, so that memory is its own
        command = [sys.executable, __file__, "--only", name]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[name] = json.loads(found.stdout)
        print(f"{name}: {rows[name]}", flush=True)
    passed = all(row["step_ms"] <= BOUND_MS for row in rows.values())
    print("within the bound" if passed else "NOT within the bound")
    finish(
        record(
            "match",
            what="a match slot at the real vocabulary: compiling, memory, a step",
            shape={"vocabulary": VOCABULARY, "slot_tokens": LENGTH},
            units={
                "compile_seconds": "seconds",
                "held_bytes": "resident bytes more than before, once compiled",
                "moves": "pairs of state and token",
                "step_ms": "milliseconds, median, to choose the slot's string",
            },
            bound_ms=BOUND_MS,
            patterns=rows,
            passed=passed,
        ),
        save=options.save,
    )


def measure(name: str) -> dict[str, Any]:
    """One pattern, in this process."""
    spelled = spellings()
    before, started = current_rss_bytes(), time.perf_counter()
    automaton = Automaton.of_regex(PATTERNS[name], spelled)
    seconds = time.perf_counter() - started
    held = current_rss_bytes() - before
    length = max(automaton.lengths(LENGTH))
    started = time.perf_counter()
    sets = automaton.allowed(length)
    sets_seconds = time.perf_counter() - started
    rng, took = np.random.default_rng(0), []
    for _ in range(STEPS):
        probabilities = rng.random((length, VOCABULARY), np.float32)
        started = time.perf_counter()
        best = automaton.best(probabilities)
        took.append(1e3 * (time.perf_counter() - started))
        text = b"".join(spelled[token] for token in best.tolist())
        if re.fullmatch(PATTERNS[name].encode(), text) is None:
            raise SystemExit(f"{text!r} does not match {PATTERNS[name]!r}")
    return {
        "compile_seconds": round(seconds, 2),
        "held_bytes": held,
        "states": len(automaton.moves),
        "moves": sum(ways.tokens.size for ways in automaton.moves.values()),
        "tokens_allowed": max(len(tokens) for tokens in sets),
        "sets_seconds": round(sets_seconds, 3),
        "slot_tokens": length,
        "step_ms": round(median(took), 1),
    }


def spellings() -> dict[int, bytes]:
    """Of every token but the special ones."""
    rng = np.random.default_rng(0)
    texts = {bytes([i]) for i in range(256)} | {b" " * n for n in range(2, 32)}
    texts |= {chr(code).encode() for code in range(0xA0, 0x3000)}
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    weights = 1 / np.arange(2, 28)
    while len(texts) < VOCABULARY - SPECIAL:
        word = bytes(rng.choice(letters, int(rng.integers(2, 12)), p=weights / weights.sum()))
        shape = rng.integers(8)
        texts.add(b" " + word if shape < 4 else word.capitalize() if shape == 4 else word)
    return dict(enumerate(sorted(texts), SPECIAL))


if __name__ == "__main__":
    main()
