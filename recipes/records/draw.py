"""Records in words and in JSON, drawn by seed: what an adapter learns, and what it is asked.

Writes schema.json, train.jsonl, valid.jsonl and test.jsonl. No name is in two of them.

    python recipes/records/draw.py /tmp/records
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES = ("S", "M", "L")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{3,6}$"},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "vip": {"type": "boolean"},
        "size": {"enum": list(SIZES)},
        "marks": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "maxItems": 3,
        },
        "home": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "pattern": "^[a-z]{3,5}$"},
                "no": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["city", "no"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "vip", "size", "marks", "home"],
    "additionalProperties": False,
}
TRAIN, VALID, TEST = 6000, 100, 200
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def draw(count: int, seed: int) -> list[dict[str, str]]:
    """Return prompts and completions, each of another name."""
    rng, seen = np.random.default_rng(seed), set()
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        record = _record(rng)
        if record["name"] not in seen:
            seen.add(record["name"])
            rows.append({"prompt": _told(record, rng), "completion": json.dumps(record)})
    return rows


def write(folder: Path) -> None:
    """Write the schema and the three sets."""
    rows = draw(TRAIN + VALID + TEST, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.json").write_text(json.dumps(SCHEMA, indent=2) + "\n", encoding="utf-8")
    sets = {
        "test": rows[:TEST],
        "valid": rows[TEST : TEST + VALID],
        "train": rows[TEST + VALID :],
    }
    for name, part in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _record(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "name": _word(rng, int(rng.integers(3, 7))),
        "age": int(rng.integers(10, 100)),
        "vip": bool(rng.integers(2)),
        "size": SIZES[rng.integers(3)],
        "marks": [int(mark) for mark in rng.integers(0, 10, rng.integers(0, 4))],
        "home": {"city": _word(rng, int(rng.integers(3, 6))), "no": int(rng.integers(1, 100))},
    }


def _word(rng: np.random.Generator, length: int) -> str:
    """Return a word that can be said: consonants and vowels by turns."""
    first = int(rng.integers(2))
    letters = (_VOWELS if (first + i) % 2 else _CONSONANTS for i in range(length))
    return "".join(few[rng.integers(len(few))] for few in letters)


def _told(record: dict[str, Any], rng: np.random.Generator) -> str:
    """Return the record in words, its facts in any order."""
    home, marks = record["home"], " ".join(map(str, record["marks"]))
    facts = [
        _one_of(rng, f"called {record['name']}", f"name {record['name']}"),
        _one_of(rng, f"{record['age']} years old", f"age {record['age']}"),
        _one_of(rng, "vip", "a vip") if record["vip"] else _one_of(rng, "no vip", "not vip"),
        _one_of(rng, f"wears {record['size']}", f"size {record['size']}"),
        _one_of(rng, f"marks {marks}", f"got {marks}") if marks else "no marks",
        _one_of(rng, f"lives in {home['city']} {home['no']}", f"from {home['no']} {home['city']}"),
    ]
    return "Record: " + ", ".join(facts[i] for i in rng.permutation(len(facts))) + "."


def _one_of(rng: np.random.Generator, *texts: str) -> str:
    return texts[rng.integers(len(texts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
