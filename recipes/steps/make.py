"""Makes the bench model from nothing: a small model of which automata must be computed row by row.

Its canvas is 128 tokens; its tasks are in stepwise.py. Benchmarks of policies ask it; it is not in
the package. Trained like the bundled model (recipes/bundled), in phases by the .yaml files here;
stopped and run again, it goes on from the last checkpoint. `bench-model` beside this
file came from a run whose first phase was trained on a CUDA card.

    python recipes/steps/make.py --folder build/steps
    python bench/policies.py --model recipes/steps/bench-model
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import stepwise
import yaml

from mlx_diffgemma.checkpoint.adapters import WEIGHTS
from mlx_diffgemma.train.fuse import fuse_checkpoint

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "bundled")]
import start  # noqa: E402
from stages import run_stage, stands_at, trainer, write_rounded  # noqa: E402

SHAPE = start.Shape(
    canvas=128, layers=(start.SLIDING, start.FULL) * 2, window=256, sees=False
)  # few layers, so that a step computes little of an answer
TEST_SEED, TEST_COUNT, VALID_COUNT = 1, 400, 40
STAGE_MINUTES = 60
# What suits this model under `fast`, in its config.json: its canvases start anywhere, so
# parts are committed sooner, and a row is right only if the one above it is, so less is accepted.
SUITS = {"acceptance_confidence": 0.97, "prefix_steps": 1, "prefix_entropy": 0.05}


@dataclass(frozen=True)
class Phase:
    """A run of the trainer, with the weights of the one before, and its examples per task."""

    name: str
    counts: dict[str, int]

    @property
    def recipe(self) -> Path:
        return HERE / f"{self.name}.yaml"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(yaml.safe_load(self.recipe.read_text()))


PHASES = (
    Phase(
        "first",
        dict.fromkeys(("walk", "automaton", "sums", "records", "progression", "fibonacci"), 8000),
    ),
    Phase(
        "second",
        {"automaton": 8000, "rules": 11000, "series": 8000, "records": 11000},
    ),
    Phase("third", {"automaton": 8000, "rules": 11000, "records": 16000}),
)


def write_data(phase: Phase, folder: Path) -> None:
    """Write train.jsonl and valid.jsonl. No prompt of the test is in train.jsonl."""
    tests = {name: stepwise.make(name, TEST_COUNT, TEST_SEED) for name in phase.counts}
    seed = 2 + PHASES.index(phase)
    rows = []
    for name, count in phase.counts.items():
        asked = {made.prompt for made in tests[name]}
        rows += [made for made in stepwise.make(name, count, seed) if made.prompt not in asked]
    valid = [made for some in tests.values() for made in some[:VALID_COUNT]]
    partial = folder.with_name("data.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, some in (("train", rows), ("valid", valid)):
        random.Random(0).shuffle(some)
        lines = [json.dumps({"prompt": m.prompt, "completion": m.answer}) + "\n" for m in some]
        (partial / f"{split}.jsonl").write_text("".join(lines))
    partial.rename(folder)


def command(folder: Path, phase: Phase) -> list[str]:
    """Return the trainer's command. A phase goes on from the one before, if that was trained here,
    and else from `start`."""
    run, before = folder / phase.name, PHASES[: PHASES.index(phase)]
    before = tuple(p for p in before if (folder / p.name).exists())
    weights = folder / before[-1].name / "run" / WEIGHTS if before else None
    return trainer(phase.recipe, folder / "start", run / "data", run / "run", weights)


def export(folder: Path) -> Path:
    """Write the last run's weights as a checkpoint in bfloat16, with what it is asked beside it."""
    for name in ("float32", "model", "model.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)
    trained = [p for p in PHASES if (folder / p.name / "run" / WEIGHTS).exists()]
    if not trained:
        raise SystemExit("nothing is trained yet; run this again to go on")
    last = trained[-1]
    whole = fuse_checkpoint(folder / "start", folder / last.name / "run", folder / "float32").folder
    model = folder / "model.partial"
    shutil.copytree(whole, model)
    arrays = mx.load(str(whole / "model.safetensors"))
    asked = [made for name in stepwise.ASKED for made in stepwise.make(name, TEST_COUNT, TEST_SEED)]
    write_rounded(model, arrays, folder / "start", asked)
    if last is not PHASES[-1]:
        return model.rename(folder / "model")
    config = model / "config.json"
    written = json.loads(config.read_text()) | {"mlx_diffgemma": SUITS}
    config.write_text(json.dumps(written, indent=1) + "\n")
    return model.rename(folder / "model")


def write_start(folder: Path, model: Path | None) -> None:
    """Write the checkpoint that training begins with: a model in float32, or random weights.

    Raises:
      SystemExit: it was written from something else.
    """
    of = str(model.resolve()) if model else "random weights"
    if folder.exists():
        if (made_of := (folder / "made_of").read_text()) != of:
            raise SystemExit(f"{folder.parent} began with {made_of}; take another --folder")
        return
    partial = folder.with_name("start.partial")
    shutil.rmtree(partial, ignore_errors=True)
    start.write(partial, seed=0, shape=SHAPE)
    if model is not None:
        arrays = mx.load(str(model / "model.safetensors"))
        arrays = {name: array.astype(mx.float32) for name, array in arrays.items()}
        mx.save_safetensors(str(partial / "model.safetensors"), arrays, {"format": "pt"})
    (partial / "made_of").write_text(of)
    partial.rename(folder)


def make(folder: Path, minutes: float, model: Path | None = None) -> Path:
    """Return the folder of the exported model, as far as it was trained in these minutes: all
    phases, or the last one alone, behind a model that had the others."""
    write_start(folder / "start", model)
    end = time.monotonic() + 60 * minutes
    for phase in PHASES[-1:] if model else PHASES:
        run, data = folder / phase.name / "run", folder / phase.name / "data"
        if not data.exists():
            print(f"phase {phase.name}: {sum(phase.counts.values()):,} examples", flush=True)
            write_data(phase, data)
        while (stands := stands_at(run)) < phase.settings["iters"]:
            if time.monotonic() >= end:
                print(f"phase {phase.name} stands at {stands:,}; run this again to go on")
                return export(folder)
            until = min(end, time.monotonic() + 60 * STAGE_MINUTES)
            run_stage(command(folder, phase), phase.name, folder / "hosts.json", until)
    return export(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/steps"))
    parser.add_argument(
        "--model",
        type=Path,
        help="a model that had all phases but the last, to train that one alone",
    )
    parser.add_argument("--minutes", type=float, default=400, help="at most")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(make(options.folder, options.minutes, options.model))
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
