"""What does a JSON Schema cost as an automaton, how many can be held, and is it sound?

Cases are schemas with instances that are valid and instances that are not, one JSON object a line:
{"name", "schema", "tests": [{"valid", "data"}]}. Each valid instance is written in four ways:
compact, as json.dumps does but with every character as itself, indented by 2, and in ASCII. Its
keys come in the order of the schema, or with --as-given as they are.

A case is clean if it compiles, all spellings of its valid instances are accepted and no invalid
instance is. Bound: no invalid instance is accepted; the median of compiling at most 0.1 s of
processor time, 95% at most 2 s; at most 300 MB more memory.

outlines-core (its regular expression of the schema, matched by Python) and llguidance, where they
are installed, are measured beside it with --others. A case over which one of the three takes more
than 20 s of processor time counts as refused.

    python bench/constraint.py --cases FILE [--states N] [--others] [--draws 50]
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from common import finish, peak_rss_bytes, record

from mlx_diffgemma.constraint.dfa import DFA
from mlx_diffgemma.constraint.dialect import validator_of
from mlx_diffgemma.constraint.net import DEFAULT_STATES
from mlx_diffgemma.constraint.schema import json_schema
from mlx_diffgemma.errors import ConstraintError

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.constraint.schemas import Draws

READING_ORDER = ("$ref", "allOf", "anyOf", "oneOf", "if", "dependencies", "dependentSchemas")
MOST_SECONDS = 20  # of processor time, for a case
BOUNDS = {"median_seconds": 0.1, "p95_seconds": 2.0, "more_bytes": 300e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Path, required=True, help="JSON lines, may be gzipped")
    parser.add_argument("--states", type=int, default=DEFAULT_STATES)
    parser.add_argument("--as-given", action="store_true", help="keep the order of keys")
    parser.add_argument("--others", action="store_true", help="outlines-core and llguidance too")
    parser.add_argument("--draws", type=int, default=0, help="random strings of each automaton")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--each", action="store_true", help="print every case that is not clean")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    opened = gzip.open if options.cases.suffix == ".gz" else open
    with opened(options.cases, "rt", encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    cases = [case for case in cases if not options.only or options.only in case["name"]]
    for case in cases:
        case["texts"] = list(spellings(case, options.as_given))
    rows = {"ours": measure(cases, lambda schema: ours(schema, options.states), options)}
    if options.others:
        rows |= {name: measure(cases, make(), options) for name, make in OTHERS.items()}
    for name, row in rows.items():
        print(f"{name}: {row}")
    found = rows["ours"]
    passed = not found["invalid_accepted"] and not found.get("draws_invalid")
    passed &= all(found[name] <= most for name, most in BOUNDS.items())
    print("within the bounds" if passed else "NOT within the bounds")
    finish(
        record(
            "constraint",
            what="JSON Schemas as automata: coverage, soundness, states, compile time",
            shape={"cases": len(cases), "states": options.states, "as_given": options.as_given},
            units={"seconds": "of processor time, to compile", "more_bytes": "peak of the process"},
            bounds=BOUNDS,
            rows=rows,
            passed=passed,
        ),
        save=options.save,
    )


Accepts = Callable[[str], bool]
Compile = Callable[[Any], tuple[Accepts, int, DFA | None]]


def ours(schema: Any, states: int) -> tuple[Accepts, int, DFA | None]:
    found = json_schema(schema, states=states)
    return found.dfa.accepts, len(found.dfa), found.dfa


def measure(cases: list[dict[str, Any]], build: Compile, options: Any) -> dict[str, Any]:
    """Compile all cases; count what is accepted."""
    before, seconds, states = peak_rss_bytes(), [], []
    counts: Counter[str] = Counter(valid_accepted=0, invalid_accepted=0, clean=0)
    refused: Counter[str] = Counter()
    for case in cases:
        started = time.process_time()
        try:
            with limited(MOST_SECONDS):
                accepts, size, dfa = build(case["schema"])
                took = time.process_time() - started
                accepted = [accepts(text) for _, text in case["texts"]]
        except (ConstraintError, ValueError, TimeoutError) as error:
            seconds.append(time.process_time() - started)
            refused[str(getattr(error, "keyword", None) or type(error).__name__)] += 1
            if options.each:
                print(f"refused {case['name']} {seconds[-1]:.2f} s: {str(error)[:300]}", flush=True)
            continue
        seconds.append(took)
        states.append(size)
        is_clean = True
        for (valid, text), is_accepted in zip(case["texts"], accepted, strict=True):
            kind = "valid" if valid else "invalid"
            counts[kind] += 1
            counts[f"{kind}_accepted"] += is_accepted
            is_clean &= is_accepted == valid
            if options.each and is_accepted != valid:
                print(f"{kind} {case['name']} {size}: {text[:300]!r}", flush=True)
        counts["clean"] += is_clean
        if options.draws and dfa is not None:
            counts.update(draw_and_validate(case, dfa, options))
    last = quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return {
        "compiled": len(states),
        **counts,
        "median_states": median(states or [0]),
        "median_seconds": round(median(seconds), 4),
        "p90_seconds": round(last[89], 3),
        "p95_seconds": round(last[94], 3),
        "p99_seconds": round(last[98], 3),
        "more_bytes": peak_rss_bytes() - before,
        "refused": dict(refused.most_common()),
    }


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after so much processor time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def draw_and_validate(case: dict[str, Any], dfa: DFA, options: Any) -> Counter[str]:
    validator, rng = validator_of(case["schema"]), Random(case["name"])
    counts: Counter[str] = Counter(draws_invalid=0)
    strings = Draws(dfa)
    for _ in range(options.draws):
        text = strings.text(rng)
        counts["draws"] += 1
        if not validator.is_valid(json.loads(text)):
            counts["draws_invalid"] += 1
            print(f"DRAWN, NOT VALID: {case['name']}: {text[:300]!r}")
    return counts


def spellings(case: dict[str, Any], as_given: bool) -> Iterator[tuple[bool, str]]:
    for test in case["tests"]:
        data = test["data"]
        if not test["valid"]:
            yield False, json.dumps(data, ensure_ascii=False)
            yield False, json.dumps(ordered(data, case["schema"]), ensure_ascii=False)
            continue
        if not as_given:
            data = ordered(data, case["schema"])
        yield True, json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        yield True, json.dumps(data, ensure_ascii=False)
        yield True, json.dumps(data, ensure_ascii=False, indent=2)
        yield True, json.dumps(data)


def ordered(data: Any, schema: Any) -> Any:
    """Return an instance with its keys in the order in which the schema names them."""
    validator = validator_of(schema)

    def fits(value: Any, part: Any) -> bool:
        return bool(validator.evolve(schema=part).is_valid(value))

    def flat(value: Any, part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
        """The schemas that speak of a value, in the order of their keywords."""
        if not isinstance(part, dict) or depth > 20:
            return
        yield part
        for keyword in (keyword for keyword in READING_ORDER if keyword in part):
            inner = part[keyword]
            if keyword == "$ref" and isinstance(inner, str) and "#" in inner:
                yield from flat(value, resolved(inner, schema), depth + 1)
            elif keyword == "allOf":
                for branch in inner:
                    yield from flat(value, branch, depth + 1)
            elif keyword in ("anyOf", "oneOf"):
                for branch in (b for b in inner if fits(value, b)):
                    yield from flat(value, branch, depth + 1)
            elif keyword == "if":
                if fits(value, inner):
                    yield from flat(value, inner, depth + 1)
                branch = "then" if fits(value, inner) else "else"
                yield from flat(value, part.get(branch), depth + 1)
            elif keyword in ("dependencies", "dependentSchemas") and isinstance(value, dict):
                for key in (key for key in inner if key in value):
                    yield from flat(value, inner[key], depth + 1)

    def sort(value: Any, parts: list[Any]) -> Any:
        parts = [one for part in parts for one in flat(value, part)]
        if isinstance(value, dict):
            order = [key for part in parts for key in (part.get("properties") or {})]
            order += [
                key
                for part in parts
                if isinstance(part.get("required"), list)
                for key in part["required"]
            ]
            keys = dict.fromkeys([key for key in order if key in value] + list(value))
            return {
                key: sort(value[key], [s for p in parts for s in of_key(p, key)]) for key in keys
            }
        if isinstance(value, list):
            return [
                sort(item, [s for p in parts for s in of_item(p, i)])
                for i, item in enumerate(value)
            ]
        return value

    return sort(data, [schema])


def of_key(part: dict[str, Any], key: str) -> list[Any]:
    found = [part["properties"][key]] if key in (part.get("properties") or {}) else []
    patterns = (part.get("patternProperties") or {}).items()
    found += [inner for pattern, inner in patterns if re.search(pattern, key)]
    return found or [part.get("additionalProperties")]


def of_item(part: dict[str, Any], index: int) -> list[Any]:
    first = part.get("prefixItems", part.get("items"))
    if isinstance(first, list):
        rest = part.get("items") if "prefixItems" in part else part.get("additionalItems")
        return [first[index] if index < len(first) else rest]
    return [part.get("items")]


def resolved(reference: str, schema: Any) -> Any:
    part = schema
    for step in reference.partition("#")[2].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        try:
            part = part[int(step)] if isinstance(part, list) else part[step]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return part


def llguidance() -> Compile:
    """Return a compiler to llguidance's matcher, over one token a byte."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer("byte")

    def build(schema: Any) -> tuple[Accepts, int, DFA | None]:
        grammar = LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": r"[ \t\n\r]*"}
        )
        first = LLMatcher(tokenizer, grammar)
        if first.is_error():
            raise ValueError(first.get_error())

        def accepts(text: str) -> bool:
            matcher = LLMatcher(tokenizer, grammar)
            tokens = tokenizer.tokenize_str(text)
            return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

        return accepts, 0, None

    return build


def outlines() -> Compile:
    """Return a compiler to outlines-core's expression, matched by Python."""
    from outlines_core import json_schema as schemas

    def build(schema: Any) -> tuple[Accepts, int, DFA | None]:
        pattern = schemas.build_regex_from_schema(json.dumps(schema), r"[ \t\n\r]*")
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from error
        return lambda text: compiled.fullmatch(text) is not None, 0, None

    return build


OTHERS: dict[str, Callable[[], Compile]] = {"llguidance": llguidance, "outlines-core": outlines}


if __name__ == "__main__":
    main()
