"""How long did the bundled model train, and does its recipe give the same again?

Reads what `recipes/bundled/make.py` leaves in a folder: of each phase its batches, their minutes
(by the rates that the trainer reports; validation and saving are left out), its last loss, and the
SHA-256 of its weights. With `--against`, a second folder of the same recipe, complete or not: of
the losses that both report, every 50 batches, how many are the same numbers.

Bound, with `--against`: all of them, to the last bit. On one kind of machine the recipe is exact.
Elsewhere sums round otherwise and the runs part ways; bench/accuracy.py then says how far apart
their models are.

    python bench/bundled.py --folder build/bundled
    python bench/bundled.py --folder build/bundled --against build/again
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from common import finish, record

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "bundled"))

from make import PHASES

from mlx_diffgemma.adapters import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bundled"))
    parser.add_argument("--against", type=Path, help="of a second run")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    phases: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        run = options.folder / phase.name / "run"
        phases[phase.name] = row = summary(run)
        if options.against:
            row["again"] = compare(run, options.against / phase.name / "run")
        print(f"{phase.name}: {row}", flush=True)
    again = [row["again"] for row in phases.values() if "again" in row]
    passed = not options.against or (
        any(found["equal"] for found in again) and not any(found["differ"] for found in again)
    )
    batches = sum(row["batches"] for row in phases.values())
    minutes = round(sum(row["minutes"] for row in phases.values()), 1)
    print(f"{batches:,} batches, {minutes} minutes")
    finish(
        record(
            "bundled",
            what="training of the bundled model by its recipe, and again",
            units={
                "minutes": "of batches, by the trainer's reports",
                "again": "reports of both runs whose losses are equal or differ",
            },
            phases=phases,
            batches=batches,
            minutes=minutes,
            **({"passed": passed} if options.against else {}),
        ),
        save=options.save,
    )
    sys.exit(not passed)


def reports(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    batches, seconds, loss = 0, 0.0, None
    for row in reports(run):
        if row["kind"] == "train":
            seconds += (row["iteration"] - batches) / row["iterations_per_second"]
            batches, loss = row["iteration"], row["loss"]
    return {
        "batches": batches,
        "minutes": round(seconds / 60, 1),
        "loss": loss,
        "weights_sha256": sha256(run),
    }


def sha256(run: Path) -> str | None:
    path = run / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def compare(run: Path, other: Path) -> dict[str, Any]:
    """Reports that both have, of losses in training and validation."""

    def losses(of: Path) -> dict[tuple[str, int], float]:
        return {(row["kind"], row["iteration"]): row["loss"] for row in reports(of)}

    ours, theirs = losses(run), losses(other)
    both = sorted(ours.keys() & theirs.keys(), key=lambda key: key[1])
    differ = [
        iteration for kind, iteration in both if ours[kind, iteration] != theirs[kind, iteration]
    ]
    return {
        "batches": max((iteration for _, iteration in both), default=0),
        "equal": len(both) - len(differ),
        "differ": len(differ),
        **({"first_differs_at": differ[0]} if differ else {}),
        "weights_equal": sha256(run) == sha256(other),
    }


if __name__ == "__main__":
    main()
