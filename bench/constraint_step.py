"""What does a constraint cost the host: to lift to tokens, and in every step?

JSON objects of 65 to 1,900 states (`tests/constraint/automata.py`), a canvas of 256 positions, and
a vocabulary of the published size. Two made-up distributions: "noise" is normal logits, without a
preferred text; "peaked" gives 20 nats more to the tokens of one text that fits. All times are
processor time of one thread: the draft is exact Viterbi, the marginals are those of every position
with their entropy, which include the distribution of whole strings.

The reductions over the vocabulary are the device's work. Here numpy stands in for it, apart from
the rest: one pass for class maxima, two for class sums of p and p log p.

Bound: issue 19, per step: a draft within 15 ms at 200 states, 30 at 500, 100 at 2,000; marginals
within 60, 150 and 300; the median lift within 100 ms.

Checked: every draft is accepted, its score is the sum of its classes' maxima, and marginals sum to
1.

    python bench/constraint_step.py --tokenizer FOLDER    the tokenizer of a checkpoint
    python bench/constraint_step.py                       made-up spellings
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import current_rss_bytes, finish, record

from mlx_diffgemma import load_tokenizer
from mlx_diffgemma.constraint.decode import best, endings
from mlx_diffgemma.constraint.dfa import DFA
from mlx_diffgemma.constraint.marginals import Strings
from mlx_diffgemma.constraint.tokens import DEAD, TokenAutomaton, lift
from mlx_diffgemma.constraint.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.constraint.automata import (
    BOOLEAN,
    DIGIT,
    NUMBER,
    STRING,
    Part,
    anything,
    array,
    dfa,
    either,
    json_object,
    limited,
    person,
    times,
)

VOCABULARY, SPECIAL = 262_144, 24
L, SIGMA, SURE = 256, 4.0, 20.0
DRAFT_MS = {200: 15.0, 500: 30.0, 2000: 100.0}
MARGINALS_MS = {200: 60.0, 500: 150.0, 2000: 300.0}
LIFT_MS = 100.0
KEYS = (
    "identifier title description createdAt updatedAt owner priority labels status milestone "
    "comments assignee reviewers extra notes summary url path ref sha branch"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    before = current_rss_bytes()
    vocabulary, made_ms = timed(lambda: tokens_of(options.tokenizer), 1)
    rows = {}
    for name, automaton in automata().items():
        rows[name] = measure(automaton, vocabulary, options.repeats)
        print(f"{name}: {rows[name]}", flush=True)
    lift_ms = median(row["lift_ms"] for row in rows.values())
    passed = lift_ms <= LIFT_MS and all(row["within_bounds"] for row in rows.values())
    print("within the bounds" if passed else "NOT within the bounds")
    finish(
        record(
            "constraint_step",
            what="what a constraint costs the host, to lift and per step, at the real vocabulary",
            shape={"vocabulary": vocabulary.size, "positions": L},
            units={
                "lift_ms": "processor milliseconds, median",
                "draft_ms": "processor milliseconds per step, median, by distribution",
                "marginals_ms": "the same",
                "maxima_stand_in_ms": "the device's reductions by numpy, per step",
                "sums_stand_in_ms": "the same",
            },
            spellings="a checkpoint's" if options.tokenizer else "made up",
            vocabulary_ms=made_ms,
            median_lift_ms=lift_ms,
            held_bytes=current_rss_bytes() - before,
            automata=rows,
            passed=passed,
        ),
        save=options.save,
    )


def tokens_of(folder: Path | None) -> Vocabulary:
    if folder is not None:
        return Vocabulary.of_tokenizer(load_tokenizer(folder), VOCABULARY, (1, 106, 50), 0)
    made = {
        token: f"<0x{text[0]:02X}>" if len(text) == 1 else text.decode().replace(" ", "▁")
        for token, text in spellings().items()
    }
    return Vocabulary.of_spellings(made, range(SPECIAL), VOCABULARY, (1,), 0)


def automata() -> dict[str, DFA]:
    """From about 65 to 1,900 states."""
    address = json_object(
        {"street": STRING, "city": STRING, "zip": times(DIGIT, 5, 5)}, frozenset({"city"})
    )
    kinds = either(*(f'"{kind}"' for kind in ("book", "film", "music", "game", "tool")))
    item = json_object({"id": NUMBER, "title": STRING, "price": NUMBER, "kind": kinds})
    fields = {"name": STRING, "email": STRING, "address": address, "items": array(item)}
    return {
        "person": person(),
        "order": dfa(json_object(fields, frozenset({"name", "items"}))),
        "any JSON": dfa(anything(2)),
        "6 fields": dfa(fields_of(6, 1)),
        "12 fields": dfa(fields_of(12, 1)),
        "500 characters": dfa(json_object({"note": limited(500), "by": limited(200)})),
        "40 optional strings": dfa(json_object({f"f{i}": STRING for i in range(40)}, frozenset())),
        "two records": dfa(
            json_object({"first": fields_of(13, 1), "second": array(fields_of(13, 0))})
        ),
        "lists of records": dfa(
            json_object(
                {"first": fields_of(20, 1), "list": array(fields_of(20, 1))}, frozenset({"list"})
            )
        ),
    }


def fields_of(count: int, depth: int) -> Part:
    """A JSON object of many kinds of fields, all but two optional."""
    entry = {"key": STRING, "value": NUMBER, "w": limited(20)}
    choice = either('"red"', '"green"', '"blue"')
    small = {"a": STRING, "b": BOOLEAN, "cc": NUMBER, "dd": choice}
    kinds = [
        STRING,
        limited(30),
        STRING,
        NUMBER,
        BOOLEAN,
        array(STRING),
        anything(depth),
        array(json_object(entry, frozenset({"key"}))),
        json_object(small, frozenset()),
    ]
    members = {key: kinds[i % len(kinds)] for i, key in enumerate(KEYS[:count])}
    return json_object(members, frozenset(KEYS[:2]))


def measure(automaton: DFA, vocabulary: Vocabulary, repeats: int) -> dict[str, Any]:
    lifted, lift_ms = timed(lambda: lift(automaton, vocabulary), repeats)
    row: dict[str, Any] = {
        "states": len(automaton),
        "lifted_states": lifted.maps.shape[1],
        "classes": len(lifted.sizes),
        "edges": len(lifted.sources),
        "sets": len(lifted.set_starts) - 1,
        "lift_ms": lift_ms,
        "draft_ms": {},
        "marginals_ms": {},
    }
    order = np.argsort(lifted.classes, kind="stable")
    for name in ("noise", "peaked"):
        log_p = distribution(lifted, is_peaked=name == "peaked")
        maxima, row["maxima_stand_in_ms"] = timed(partial(reduced, lifted, order, log_p), 1)
        both, row["sums_stand_in_ms"] = timed(partial(sums, lifted, order, log_p), 1)
        step(row, name, lifted, maxima, both, repeats)
    states = min((size for size in DRAFT_MS if len(automaton) <= size * 1.1), default=2000)
    row["within_bounds"] = (
        max(row["draft_ms"].values()) <= DRAFT_MS[states]
        and max(row["marginals_ms"].values()) <= MARGINALS_MS[states]
    )
    return row


def step(
    row: dict[str, Any],
    name: str,
    lifted: TokenAutomaton,
    maxima: np.ndarray,
    both: tuple[np.ndarray, np.ndarray],
    repeats: int,
) -> None:
    ends = endings(lifted, 0)
    path, row["draft_ms"][name] = timed(lambda: best(lifted, maxima, ends), repeats)
    state = 0
    for number in path.classes.tolist():
        state = int(lifted.maps[number, state])
    score = maxima[np.arange(L), path.classes].sum(dtype=np.float64)
    if state != lifted.end or abs(score - path.score) > 1e-6 * abs(score):
        raise SystemExit(f"the draft leads to {state} and scores {path.score}, not {score}")
    found, row["marginals_ms"][name] = timed(
        lambda: Strings.of(lifted, both[0], ends).marginals(both[1]), repeats
    )
    if np.abs(found.masses.sum(axis=1) - 1).max() > 1e-9:
        raise SystemExit("the marginals do not sum to 1")


def spellings() -> dict[int, bytes]:
    """Made-up spellings of every token but the special ones, of the kinds that the real tokenizer
    has: bytes, characters, runs of spaces, words with and without a space before them."""
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


def distribution(lifted: TokenAutomaton, *, is_peaked: bool) -> np.ndarray:
    """Return log probabilities, float32 [L, V]."""
    rng = np.random.default_rng(0)
    logits = SIGMA * rng.standard_normal((L, len(lifted.classes)), np.float32)
    if is_peaked:
        liked = np.log(rng.random((L, len(lifted.sizes))))
        path = best(lifted, liked, endings(lifted, 0))
        for i, number in enumerate(path.classes.tolist()):
            logits[i, rng.choice(np.flatnonzero(lifted.classes == number))] += SURE
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def reduced(lifted: TokenAutomaton, order: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """Return class maxima, float32 [L, K]."""
    return by_class(lifted, order, log_p, np.maximum, -np.inf)


def sums(
    lifted: TokenAutomaton, order: np.ndarray, log_p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return class sums of p and of p log p, [L, K] both."""
    p = np.exp(log_p)
    masses = by_class(lifted, order, p, np.add, 0)
    return masses, by_class(lifted, order, p * log_p, np.add, 0)


def by_class(
    lifted: TokenAutomaton, order: np.ndarray, x: np.ndarray, operation: np.ufunc, empty: float
) -> np.ndarray:
    first = 0 if lifted.sizes[DEAD] else DEAD + 1
    starts = np.cumsum(lifted.sizes)[:-1]
    starts = np.append(0, starts) if first == 0 else starts
    found = np.full((len(x), len(lifted.sizes)), empty, x.dtype)
    for row, values in zip(found, x, strict=True):
        row[first:] = operation.reduceat(values[order], starts)
    return found


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return a result and the median processor time of getting it, in milliseconds."""
    took = []
    for _ in range(repeats):
        started = time.process_time()
        result = work()
        took.append(1e3 * (time.process_time() - started))
    return result, round(median(took), 1)


if __name__ == "__main__":
    main()
