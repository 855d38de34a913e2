"""Makes the bundled model from nothing: data, random weights, training in stages, the checkpoint.

Training takes up to five hours on two CPU cores, in stages of at most an hour. Run again, it goes
on where it stopped. On Linux OpenBLAS is put in front of MLX's own BLAS where Debian's
libopenblas0-pthread is installed, and each core has a process of its own.

    python recipes/bundled/make.py --folder build/bundled
    python recipes/bundled/make.py --folder build/bundled --until 2500
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import start
import tasks

HERE = Path(__file__).parent
STAGE_MINUTES = 60


@dataclass(frozen=True)
class Phase:
    """A run of the trainer: how, and with how many examples of each task."""

    name: str
    seed: int  # of its examples
    counts: dict[str, int]

    @property
    def recipe(self) -> Path:
        return HERE / f"{self.name}.yaml"


# The second goes on with the weights of the first: with more of what is not known by then, and
# hardly any of a canvas given, as generation begins.
PHASES = (
    Phase(
        "first",
        0,
        {
            "sudoku4": 20000,
            "sudoku6": 22000,
            "count": 30000,
            "sort": 14000,
            "reverse": 9000,
            "table": 12000,
            "words": 9000,
            "code": 11000,
        },
    ),
    Phase(
        "second",
        2,
        {
            "sudoku4": 11000,
            "sudoku6": 16000,
            "count": 26000,
            "sort": 9000,
            "reverse": 3000,
            "table": 10000,
            "words": 12000,
            "code": 3000,
        },
    ),
)
# Their prompts are so many that a test has others than training; of the rest there are few.
HELD_OUT = ("sudoku4", "sudoku6", "sort", "reverse")
TEST_SEED, TEST_COUNT = 1, 200
PORT = 52100


def write_data(phase: Phase, folder: Path) -> None:
    """train.jsonl and, of the test's prompts, valid.jsonl."""
    tests = {name: tasks.make(name, TEST_COUNT, TEST_SEED) for name in tasks.TASKS}
    rows = []
    for name, count in phase.counts.items():
        asked = {made.prompt for made in tests[name]} if name in HELD_OUT else set()
        rows += [made for made in tasks.make(name, count, phase.seed) if made.prompt not in asked]
    valid = [made for some in tests.values() for made in some]
    random.Random(0).shuffle(valid)
    partial = folder.with_name("data.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, made in (("train", rows), ("valid", valid)):
        lines = (json.dumps({"prompt": m.prompt, "completion": m.answer}) + "\n" for m in made)
        (partial / f"{split}.jsonl").write_text("".join(lines))
    partial.rename(folder)


def train(folder: Path, phase: Phase, until: int | None, deadline: float) -> bool:
    """A stage of a phase, one process per core; whether the phase is complete."""
    run, processes = folder / phase.name / "run", max(1, min(os.cpu_count() or 1, 2))
    before = PHASES[: PHASES.index(phase)]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{PORT + i}"] for i in range(processes)]))
    command = [sys.executable, "-m", "mlx_diffgemma", "train", "--train", "-c", str(phase.recipe)]
    command += ["--model", str(folder / "start"), "--data", str(folder / phase.name / "data")]
    command += ["--adapter-path", str(run)]
    if (run / "training_state.safetensors").exists():
        command.append("--resume")
    elif before:
        weights = folder / before[-1].name / "run" / "adapters.safetensors"
        command += ["--resume-adapter-file", str(weights)]
    if until is not None:
        command += ["--iters", str(until)]
    environment = dict(os.environ)
    blas = next(Path("/usr/lib").glob("*/libopenblas.so.0"), None)
    if blas is not None:
        environment |= {"LD_PRELOAD": str(blas), "OPENBLAS_NUM_THREADS": "1"}
    if processes > 1:
        environment["MLX_HOSTFILE"] = str(hosts)
    running = [
        subprocess.Popen(command, env=environment | {"MLX_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        while any(process.poll() is None for process in running):
            failed = [p.returncode for p in running if p.poll()]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(1)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        codes = [process.wait() for process in running]
    if any(code > 0 for code in codes):
        raise SystemExit(max(codes))
    return codes == [0] * processes


def export(folder: Path) -> Path:
    """The last run's weights as a checkpoint in the official layout, bfloat16, with what it is
    asked in tests beside it."""
    import mlx.core as mx

    from mlx_diffgemma.train.fuse import fuse_checkpoint

    for name in ("float32", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run = folder / PHASES[-1].name / "run"
    whole = fuse_checkpoint(folder / "start", run, folder / "float32").folder
    model = folder / "model"
    shutil.copytree(whole, model)
    arrays = mx.load(str(whole / "model.safetensors"))
    rounded = {name: array.astype(mx.bfloat16) for name, array in arrays.items()}
    mx.save_safetensors(str(model / "model.safetensors"), rounded, {"format": "pt"})
    (model / "config.json").write_text(json.dumps(start.config("bfloat16"), indent=1) + "\n")
    asked = [
        {"task": made.task, "prompt": made.prompt, "answer": made.answer}
        for name in tasks.TASKS
        for made in tasks.make(name, TEST_COUNT, TEST_SEED)
    ]
    random.Random(1).shuffle(asked)
    (model / "prompts.json").write_text(json.dumps(asked, indent=0) + "\n")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/bundled"))
    parser.add_argument("--until", type=int, help="train only so many batches of each phase")
    parser.add_argument("--stages", type=int, default=5, help="of an hour each, at most")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start").exists():
        shutil.rmtree(folder / "start.partial", ignore_errors=True)
        start.write(folder / "start.partial", seed=0)
        (folder / "start.partial").rename(folder / "start")
    stages = options.stages
    for phase in PHASES:
        if not (folder / phase.name / "data").exists():
            write_data(phase, folder / phase.name / "data")
        complete = folder / phase.name / "complete"
        while not complete.exists():
            if not stages:
                raise SystemExit(f"phase {phase.name} is not complete; run this again to go on")
            if train(folder, phase, options.until, time.monotonic() + 60 * STAGE_MINUTES):
                complete.touch()
            stages -= 1
    print(f"{export(folder)}: bench/accuracy.py --model asks it, and transformers with it")


if __name__ == "__main__":
    main()
