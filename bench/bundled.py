"""How long did the bundled model train, does its recipe give the same again, and does it solve what
it has never seen?

Reads what `recipes/bundled/make.py` leaves in a folder: of each phase its batches, their minutes
(by the rates that the trainer reports; validation is left out), its last loss, and the SHA-256 of
its weights. With `--against`, a second folder of the same recipe, complete or not: of the losses
that both report, every 50 batches, how many are the same numbers; where both are complete, whether
their weights are; and where both were exported, whether every file of the model is.

Where the model was exported it is asked, for each task that the recipe holds out, new prompts that
are in no phase's examples: float32, the checkpoint's own settings. The prompts of bench/accuracy.py
were seen by whoever chose the phases; these were not.

Bound, with `--against`: all of them, to the last bit. On one kind of machine the recipe is exact.
Elsewhere sums round otherwise and the runs part ways; bench/accuracy.py then says how far apart
their models are.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/bundled.py
    python bench/bundled.py --folder build/bundled --against build/again
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import finish, record

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "bundled"))

import tasks
from make import HELD_OUT, PHASES, Phase, stands_at

from mlx_diffgemma import GenerationSettings, batch_generate, load
from mlx_diffgemma.checkpoint.adapters import WEIGHTS
from mlx_diffgemma.train.curves import METRICS, read

UNSEEN_SEED, BATCH = 99, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bundled"))
    parser.add_argument("--against", type=Path, help="of a second run")
    parser.add_argument("--unseen", type=int, default=400, help="new prompts per held-out task")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    for folder in (options.folder, options.against):
        if folder and not any(read(folder / p.name / "run" / METRICS) for p in PHASES):
            parser.error(f"{folder} has no run of the recipe")
    phases: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        run = options.folder / phase.name / "run"
        if not read(run / METRICS):
            continue  # a model given by --language stands for it
        phases[phase.name] = row = summary(run)
        if options.against:
            row["again"] = compare(phase, run, options.against / phase.name / "run")
        print(f"{phase.name}: {row}", flush=True)
    again = [row["again"] for row in phases.values() if "again" in row]
    passed = not options.against or (
        any(found["batches"] for found in again)
        and not any(found["differ"] or found["weights_equal"] is False for found in again)
    )
    if options.against:
        files = compare_models(options.folder / "model", options.against / "model")
        equal, differ = (sum(found[key] for found in again) for key in ("equal", "differ"))
        print(f"{equal} losses equal, {differ} not; of the exported model's files: {files}")
        passed = passed and not files["differ"]
    batches = sum(row["batches"] for row in phases.values())
    minutes = round(sum(row["minutes"] for row in phases.values()), 1)
    print(f"{batches:,} batches, {minutes} minutes")
    unseen = {}
    if options.unseen and (options.folder / "model").exists():
        unseen = ask(options.folder, options.unseen)
        print(unseen)
    finish(
        record(
            "bundled",
            what="training of the bundled model by its recipe, and again; prompts it never saw",
            units={
                "minutes": "of batches and saving, by the trainer's reports",
                "again": "losses that both runs report; up to which batch",
                "model_files": "by name, of both exported models; none where one was not exported",
                "unseen": "prompts, and of these exact answers",
            },
            phases=phases,
            batches=batches,
            minutes=minutes,
            unseen=unseen,
            **({"model_files": files, "passed": passed} if options.against else {}),
        ),
        save=options.save,
    )
    sys.exit(not passed)


def summary(run: Path) -> dict[str, Any]:
    batches, seconds, loss = 0, 0.0, None
    for row in read(run / METRICS):
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


def ask(folder: Path, count: int) -> dict[str, dict[str, int]]:
    """Exact answers to prompts of held-out tasks that no phase trained on."""
    trained = {
        one.prompt
        for phase in PHASES
        for task in HELD_OUT
        for one in tasks.make(task, phase.counts[task], phase.seed)
    }
    model, tokenizer = load(folder / "model")
    model.set_dtype(mx.float32)
    found = {}
    for task in HELD_OUT:
        drawn = tasks.make(task, 4 * count, UNSEEN_SEED)
        made = [one for one in drawn if one.prompt not in trained][:count]
        exact = 0
        for i in range(0, len(made), BATCH):
            batch = made[i : i + BATCH]
            result = batch_generate(
                model,
                tokenizer,
                [one.prompt for one in batch],
                settings=GenerationSettings(seed=i),
            )
            exact += sum(a == one.answer for a, one in zip(result.texts, batch, strict=True))
        found[task] = {"prompts": len(made), "exact": exact}
    return found


def compare(phase: Phase, run: Path, other: Path) -> dict[str, Any]:
    """The losses that both report, in training and validation, and the weights of complete runs."""

    def losses(of: Path) -> dict[tuple[str, int], float]:
        return {(row["kind"], row["iteration"]): row["loss"] for row in read(of / METRICS)}

    ours, theirs = losses(run), losses(other)
    both = sorted(ours.keys() & theirs.keys(), key=lambda key: key[1])
    differ = [key[1] for key in both if ours[key] != theirs[key]]
    complete = stands_at(run) == stands_at(other) == phase.iters
    return {
        "batches": max((iteration for _, iteration in both), default=0),
        "equal": len(both) - len(differ),
        "differ": len(differ),
        **({"first_differs_at": differ[0]} if differ else {}),
        "weights_equal": sha256(run) == sha256(other) if complete else None,
    }


def compare_models(ours: Path, theirs: Path) -> dict[str, list[str]]:
    """Names of files that both have, byte for byte, and of the others."""
    if not (ours.exists() and theirs.exists()):
        return {"equal": [], "differ": []}
    names = sorted({path.name for folder in (ours, theirs) for path in folder.iterdir()})
    equal, differ, missing = filecmp.cmpfiles(ours, theirs, names, shallow=False)
    return {"equal": equal, "differ": [*differ, *missing]}


if __name__ == "__main__":
    main()
