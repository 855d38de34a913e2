"""Do constraints make JSON valid, and what do they change in exactness and steps?

The task is that of `recipes/records`: five facts in words to a JSON record of a fixed schema with a
string, a number, an enum, a boolean and a list. Two models answer prompts that were in no training,
each under a seed of its own, the same with and without the constraint: the bundled model with the
recipe's adapters 200, and the bundled model itself 50; it has never seen JSON, so that only its
validity counts.

The adapters are in recipes/records/adapters; --make trains them anew by the recipe first.

Valid: `json.loads` and the `jsonschema` library, as a program would read it. Exact: the value is
that of the record.

Bound, per policy and for the trained model: under the constraint all valid, at most 2 points fewer
exact than without, and not more steps. For the bundled one: all valid.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/structured.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import finish, record
from jsonschema import Draft202012Validator

from mlx_diffgemma import Constraint, GenerationSettings, batch_generate, bundled_model, load
from mlx_diffgemma.config.training import TrainSettings, read_recipe
from mlx_diffgemma.train.session import Session

RECIPE = Path(__file__).parent.parent / "recipes" / "records"
sys.path.insert(0, str(RECIPE))
from draw import SCHEMA, TEST, draw, write  # noqa: E402

MOST_LOST = 0.02  # of exactness
TOKENS, BATCH, SEED = 64, 20, 4000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", action="store_true", help="train the adapters first")
    parser.add_argument("--adapters", type=Path, default=RECIPE / "adapters")
    parser.add_argument("--prompts", type=int, default=TEST)
    parser.add_argument("--untrained", type=int, default=50, help="prompts of the bundled model")
    parser.add_argument("--policies", nargs="+", default=["reference", "fast"])
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(
        f"bound: all valid, at most {MOST_LOST:.0%} fewer exact than without, not more steps",
        flush=True,
    )
    minutes = None
    with tempfile.TemporaryDirectory() as scratch:
        if options.make:
            options.adapters, minutes = make(Path(scratch))
        rows, passed = measure(options)
    line = record(
        "structured",
        what="records in JSON, with and without a constraint",
        shape={
            "prompts": options.prompts,
            "untrained_prompts": options.untrained,
            "tokens": TOKENS,
            "batch": BATCH,
        },
        units={
            "valid": "answers that jsonschema finds valid",
            "exact": "answers whose value is right",
            "steps": "denoise steps, over all answers",
            "seconds": "of processor time, over all answers",
        },
        made_in_minutes=minutes,
        rows=rows,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(not passed)


def make(folder: Path) -> tuple[Path, float]:
    """Train by the recipe; return the adapters' folder and the minutes of processor time."""
    write(folder / "data")
    settings = TrainSettings.from_dict(read_recipe(str(RECIPE / "lora.yaml")))
    started = time.process_time()
    session = Session.open(str(bundled_model()), str(folder / "data"), folder / "run", settings)
    for event in session.train():
        print(event, flush=True)
    return folder / "run", round((time.process_time() - started) / 60, 1)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    rows: dict[str, Any] = {}
    passed = True
    for name, adapters in (("trained", options.adapters), ("bundled", None)):
        count = options.prompts if adapters else options.untrained
        if not count:
            continue
        tasks = draw(TEST, seed=0)[:count]
        loaded = load(bundled_model(), adapter_path=adapters)
        for policy in options.policies if adapters else options.policies[:1]:
            free = rows[f"{name}, {policy}, free"] = run(loaded, tasks, policy, None)
            print(f"{name}, {policy}, free: {free}", flush=True)
            constraint = Constraint.json_schema(SCHEMA)
            row = rows[f"{name}, {policy}, held"] = run(loaded, tasks, policy, constraint)
            holds = row["valid"] == len(tasks)
            if adapters is not None:
                holds &= row["exact"] >= free["exact"] - MOST_LOST * len(tasks)
                holds &= row["steps"] <= free["steps"]
            print(f"{name}, {policy}, held: {row} {'within' if holds else 'OUTSIDE'}")
            passed &= holds
    return rows, passed


def run(
    loaded: tuple[Any, Any],
    tasks: Sequence[dict[str, str]],
    policy: str,
    constraint: Constraint | None,
) -> dict[str, Any]:
    """Ask all prompts under one policy, without a constraint or with one."""
    validator = Draft202012Validator(SCHEMA)
    found = {"valid": 0, "exact": 0, "steps": 0, "canvases": 0}
    started = time.process_time()
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        response = batch_generate(
            *loaded,
            [task["prompt"] for task in part],
            constraints=[constraint] * len(part),
            settings=GenerationSettings(seed=SEED + start, policy=policy, max_new_tokens=TOKENS),
        )
        for task, text in zip(part, response.texts, strict=True):
            value = read(text)
            found["valid"] += validator.is_valid(value)
            found["exact"] += value == json.loads(task["completion"])
        found["steps"] += sum(one.steps for one in response.finished)
        found["canvases"] += sum(one.canvases for one in response.finished)
    return {**found, "seconds": round(time.process_time() - started, 1)}


def read(text: str) -> Any:
    """The value of a JSON text, or a text that is none as it is: it fits no schema of an object."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


if __name__ == "__main__":
    main()
