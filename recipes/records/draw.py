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
        "name": {"type": "string", "minLength": 4, "maxLength": 4},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "size": {"enum": list(SIZES)},
        "vip": {"type": "boolean"},
        "marks": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "maxItems": 2,
        },
    },
    "required": ["name", "age", "size", "vip", "marks"],
    "additionalProperties": False,
}
TRAIN, VALID, TEST = 6000, 100, 200


def draw(count: int, seed: int) -> list[dict[str, str]]:
    """Return prompts and completions, each of another name."""
    rng, seen = np.random.default_rng(seed), set()
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        record = _record(rng)
        if record["name"] not in seen:
            seen.add(record["name"])
            text = json.dumps(record, separators=(",", ":"))  # with its end, one canvas of 64
            rows.append({"prompt": _told(record), "completion": text})
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
        "name": "".join(chr(97 + letter) for letter in rng.integers(0, 26, 4)),
        "age": int(rng.integers(10, 100)),
        "size": SIZES[rng.integers(3)],
        "vip": bool(rng.integers(2)),
        "marks": [int(mark) for mark in rng.integers(0, 10, rng.integers(0, 3))],
    }


def _told(record: dict[str, Any]) -> str:
    """Return the record in words."""
    words = [record["name"], record["age"], record["size"], "vip" if record["vip"] else "not"]
    return " ".join(map(str, ["Record:", *words, *record["marks"]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
