"""Makes the bundled model from nothing: data, random weights, training in stages, the checkpoint.

It takes about four and a half hours on two CPU cores, in stages of at most an hour; a Mac was not
tried. On Linux OpenBLAS is put in front of MLX's own BLAS where Debian's libopenblas0-pthread is
installed, without which it takes many times as long. Of two cores or more, two have a process each;
with one process sums are rounded otherwise. Stopped and run again, it goes on from the last
checkpoint, at most 50 batches back.

    python recipes/bundled/make.py --folder build/bundled
    python recipes/bundled/make.py --folder build/bundled --minutes 60
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pictures
import start
import tasks
from phases import PHASES, Phase

from mlx_diffgemma.checkpoint.adapters import WEIGHTS
from mlx_diffgemma.train.fuse import fuse_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from stages import openblas, run_stage, stands_at, trainer, write_rounded

STAGE_MINUTES = 60


# A test asks what was not in training. Of the other tasks there are fewer prompts, and most of
# them, of three tasks all, are in both.
HELD_OUT = ("sudoku4", "sudoku6", "sort", "reverse")
TEST_SEED, TEST_COUNT = 1, 200


def claim(folder: Path) -> None:
    """Marks a new folder as this recipe's; stops where it is another's.

    Raises:
        SystemExit: another recipe, or another version of this one, began it.
    """
    recipe: dict[str, Any] = {
        name: hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()
        for name in ("tasks.py", "pictures.py", "start.py")
    }
    recipe |= {f"phase {p.name}": asdict(p) | {"settings": p.settings} for p in PHASES}
    path = folder / "recipe.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        path.write_text(json.dumps(recipe, indent=1) + "\n")
    found = json.loads(path.read_text()) if path.exists() else {}
    differ = [name for name in recipe | found if recipe.get(name) != found.get(name)]
    if differ:
        raise SystemExit(
            f"{folder} was not made by this recipe ({', '.join(differ)}); give another --folder"
        )


def write_data(phase: Phase, folder: Path) -> None:
    """train.jsonl and, of the test's prompts, valid.jsonl."""
    tests = {name: tasks.make(name, TEST_COUNT, TEST_SEED) for name in tasks.TASKS}
    rows = []
    for name, count in phase.counts.items():
        asked = {made.prompt for made in tests[name]} if name in HELD_OUT else set()
        rows += [made for made in tasks.make(name, count, phase.seed) if made.prompt not in asked]
    valid = [made for some in tests.values() for made in some]
    partial = folder.with_name("data.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, made, seed, counts in (
        ("train", rows, phase.seed, phase.pictures),
        (
            "valid",
            valid,
            TEST_SEED,
            dict.fromkeys(pictures.ASKED, TEST_COUNT) if phase.pictures else {},
        ),
    ):
        lines = [
            json.dumps({"prompt": phase.shown(m.prompt), "completion": m.answer}) + "\n"
            for m in made
        ]
        if counts:
            (partial / split).mkdir()
        for task, count in counts.items():
            lines += [_with_picture(task, i, seed, partial / split) for i in range(count)]
        if split == "valid":
            random.Random(0).shuffle(lines)
        (partial / f"{split}.jsonl").write_text("".join(lines))
    partial.rename(folder)


def _with_picture(task: str, place: int, seed: int, folder: Path) -> str:
    """Write one picture into the folder, and return its line of the data."""
    seen = pictures.make(task, place, seed)
    path = folder / f"{task}_{place}.png"
    seen.image.save(path, compress_level=1)
    asked = [
        {"type": "image", "image": f"{folder.name}/{path.name}"},
        {"type": "text", "text": seen.prompt},
    ]
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": seen.answer},
    ]
    return json.dumps({"messages": messages}) + "\n"


def begins_again(phase: Phase) -> bool:
    """Return whether a phase begins with the weights before it rounded to bfloat16, in a checkpoint
    that has a tower: the first one with pictures, since the model was published before."""
    earlier = PHASES[: PHASES.index(phase)]
    return bool(phase.pictures) and not any(one.pictures for one in earlier)


def command(folder: Path, phase: Phase) -> list[str]:
    """The trainer's, which goes on where the phase stands."""
    run, before = folder / phase.name, PHASES[: PHASES.index(phase)]
    goes_on = before and not begins_again(phase)
    weights = folder / before[-1].name / "run" / WEIGHTS if goes_on else None
    return trainer(phase.recipe, folder / phase.model, run / "data", run / "run", weights)


def train(folder: Path, phase: Phase, deadline: float) -> None:
    """A stage of a phase: to its end, or to a time.

    Raises:
        SystemExit: a process failed.
    """
    run_stage(command(folder, phase), phase.name, folder / "hosts.json", deadline)


def export(folder: Path) -> Path:
    """The last run's weights, or their mean with those of the run before, as a checkpoint in the
    official layout, bfloat16, with what it is asked in tests beside it."""
    for name in ("float32", "before", "model", "model.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)
    last = PHASES[-1]
    whole = fuse_checkpoint(
        folder / last.model, folder / last.name / "run", folder / "float32"
    ).folder
    model = folder / "model.partial"
    shutil.copytree(whole, model)
    arrays = mx.load(str(whole / "model.safetensors"))
    if last.is_mean:
        run = folder / PHASES[-2].name / "run"
        other = fuse_checkpoint(folder / last.model, run, folder / "before").folder
        before = mx.load(str(other / "model.safetensors"))
        arrays = {name: (array + before[name]) / 2 for name, array in arrays.items()}
    asked = [made for name in tasks.TASKS for made in tasks.make(name, TEST_COUNT, TEST_SEED)]
    write_rounded(model, arrays, folder / "start", asked)
    return model.rename(folder / "model")


def write_blind(folder: Path, language: Path | None) -> None:
    """Writes the checkpoint that the phases with pictures begin with: the language part as the
    phases before leave it, or that of a model, rounded to bfloat16, and a new tower."""
    if language is None:
        run = next(phase for phase in reversed(PHASES) if not phase.pictures).name
        shutil.rmtree(folder / "language", ignore_errors=True)
        language = fuse_checkpoint(
            folder / "start", folder / run / "run", folder / "language"
        ).folder
    partial = folder / "blind.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / "start", partial)
    arrays = mx.load(str(folder / "start" / "model.safetensors"))
    for name, array in mx.load(str(language / "model.safetensors")).items():
        if "vision" not in name:
            arrays[name] = array.astype(mx.bfloat16).astype(mx.float32)
    mx.save_safetensors(str(partial / "model.safetensors"), arrays, {"format": "pt"})
    partial.rename(folder / "blind")


def make(folder: Path, minutes: float, language: Path | None = None) -> Path:
    """The exported model's folder.

    Args:
        folder: of everything.
        minutes: at most.
        language: a model whose language part stands for the phases before pictures.

    Raises:
        SystemExit: it is not complete after these minutes, or cannot be.
    """
    claim(folder)
    if not (folder / "start").exists():
        shutil.rmtree(folder / "start.partial", ignore_errors=True)
        start.write(folder / "start.partial", seed=0)
        (folder / "start.partial").rename(folder / "start")
    end = time.monotonic() + 60 * minutes
    for phase in PHASES:
        if language and not phase.pictures:
            continue
        if begins_again(phase) and not (folder / "blind").exists():
            write_blind(folder, language)
        run, data = folder / phase.name / "run", folder / phase.name / "data"
        if not data.exists():
            count = sum(phase.counts.values()) + sum(phase.pictures.values())
            print(f"phase {phase.name}: {count:,} examples", flush=True)
            write_data(phase, data)
        while (stands := stands_at(run)) < phase.iters:
            if time.monotonic() >= end:
                raise SystemExit(
                    f"phase {phase.name} stands at {stands:,} of {phase.iters:,} batches; "
                    "run this again to go on"
                )
            train(folder, phase, min(end, time.monotonic() + 60 * STAGE_MINUTES))
            if stands_at(run) == stands and time.monotonic() < end:
                raise SystemExit(
                    f"phase {phase.name} came to no checkpoint in {STAGE_MINUTES} minutes; "
                    "this machine is too slow for it"
                )
    return export(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bundled"))
    parser.add_argument("--minutes", type=float, default=400, help="at most")
    parser.add_argument(
        "--language",
        type=Path,
        help="a model whose language part stands for the phases before pictures, to train these "
        "alone",
    )
    options = parser.parse_args()
    if sys.platform == "linux" and openblas() is None:
        print(
            "libopenblas0-pthread is not installed: this takes many times as long", file=sys.stderr
        )
    # So that nothing goes on training behind a make.py that was ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        model = make(options.folder, options.minutes, options.language)
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr)
        sys.exit(130)
    print(f"{model}\nasked, by transformers too: python bench/accuracy.py --model {model}")


if __name__ == "__main__":
    main()
