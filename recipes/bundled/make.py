"""Makes the bundled model from nothing: data, random weights, training in stages, the checkpoint.

Training takes about two and a half hours on two CPU cores, in stages of at most an hour. Run again,
it goes on where it stopped. On Linux OpenBLAS is put in front of MLX's own BLAS where Debian's
libopenblas0-pthread is installed, and each core has a process of its own. A folder is of one
recipe: what lies there already is not made anew.

    python recipes/bundled/make.py --folder build/bundled
    python recipes/bundled/make.py --folder build/bundled --minutes 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import start
import tasks
import yaml
from safetensors import safe_open

from mlx_diffgemma.train.checkpoint import STATE
from mlx_diffgemma.train.fuse import fuse_checkpoint

HERE = Path(__file__).parent
STAGE_MINUTES = 60


@dataclass(frozen=True)
class Phase:
    """A run of the trainer: how, and with how many examples of each task."""

    name: str
    seed: int  # of its examples
    counts: dict[str, int]
    short_gaps: bool = False  # one underscore for a missing word, not one for each of its letters

    def shown(self, prompt: str) -> str:
        return re.sub("_+", "_", prompt) if self.short_gaps else prompt

    @property
    def recipe(self) -> Path:
        return HERE / f"{self.name}.yaml"

    @property
    def iters(self) -> int:
        return int(yaml.safe_load(self.recipe.read_text())["iters"])


# Each goes on with the weights of the one before: with more of what is not known by then, and from
# the second on with less of a canvas given, since generation begins with nothing. How many letters
# a missing word has is told from the second on.
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
        short_gaps=True,
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
    Phase(
        "third",
        3,
        {
            "sudoku4": 6500,
            "sudoku6": 18000,
            "count": 2000,
            "sort": 3000,
            "reverse": 1000,
            "table": 1000,
            "words": 1000,
            "code": 1000,
        },
    ),
    Phase(
        "fourth",
        4,
        {
            "sudoku4": 4500,
            "sudoku6": 26000,
            "count": 2500,
            "sort": 3000,
            "reverse": 1000,
            "table": 1000,
            "words": 1000,
            "code": 1000,
        },
    ),
    Phase(
        "fifth",
        5,
        {
            "sudoku4": 4000,
            "sudoku6": 16000,
            "count": 1200,
            "sort": 1200,
            "reverse": 700,
            "table": 700,
            "words": 1200,
            "code": 700,
        },
    ),
)
# A test asks what was not in training. Of the other tasks there are fewer prompts, and most of
# them, of three tasks all, are in both.
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
        lines = (
            json.dumps({"prompt": phase.shown(m.prompt), "completion": m.answer}) + "\n"
            for m in made
        )
        (partial / f"{split}.jsonl").write_text("".join(lines))
    partial.rename(folder)


def stands_at(run: Path) -> int:
    """How many batches a run has trained on."""
    state = run / STATE
    if not state.exists():
        return 0
    with safe_open(state, "numpy") as file:
        return int(file.metadata()["iteration"])


def train(folder: Path, phase: Phase, deadline: float) -> None:
    """A stage of a phase, one process per core: to its end, or to a time."""
    run, processes = folder / phase.name / "run", max(1, min(os.cpu_count() or 1, 2))
    before = PHASES[: PHASES.index(phase)]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{PORT + i}"] for i in range(processes)]))
    command = [sys.executable, "-m", "mlx_diffgemma", "train", "--train", "-c", str(phase.recipe)]
    command += ["--model", str(folder / "start"), "--data", str(folder / phase.name / "data")]
    command += ["--adapter-path", str(run)]
    if stands_at(run):
        command.append("--resume")
    elif before:
        weights = folder / before[-1].name / "run" / "adapters.safetensors"
        command += ["--resume-adapter-file", str(weights)]
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


def export(folder: Path) -> Path:
    """The last run's weights as a checkpoint in the official layout, bfloat16, with what it is
    asked in tests beside it."""
    for name in ("float32", "model", "model.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run = folder / PHASES[-1].name / "run"
    whole = fuse_checkpoint(folder / "start", run, folder / "float32").folder
    model = folder / "model.partial"
    shutil.copytree(whole, model)
    arrays = mx.load(str(whole / "model.safetensors"))
    rounded = {name: array.astype(mx.bfloat16) for name, array in arrays.items()}
    mx.save_safetensors(str(model / "model.safetensors"), rounded, {"format": "pt"})
    config = json.loads((folder / "start" / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "bfloat16"
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    asked = [
        {"task": made.task, "prompt": made.prompt, "answer": made.answer}
        for name in tasks.TASKS
        for made in tasks.make(name, TEST_COUNT, TEST_SEED)
    ]
    random.Random(1).shuffle(asked)
    (model / "prompts.json").write_text(json.dumps(asked, indent=0) + "\n")
    return model.rename(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/bundled"))
    parser.add_argument("--minutes", type=float, default=300, help="of training, at most")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start").exists():
        shutil.rmtree(folder / "start.partial", ignore_errors=True)
        start.write(folder / "start.partial", seed=0)
        (folder / "start.partial").rename(folder / "start")
    end = time.monotonic() + 60 * options.minutes
    for phase in PHASES:
        if not (folder / phase.name / "data").exists():
            write_data(phase, folder / phase.name / "data")
        while stands_at(folder / phase.name / "run") < phase.iters:
            if time.monotonic() >= end:
                raise SystemExit(f"phase {phase.name} is not complete; run this again to go on")
            train(folder, phase, min(end, time.monotonic() + 60 * STAGE_MINUTES))
    print(f"{export(folder)}: bench/accuracy.py --model asks it, and transformers with it")


if __name__ == "__main__":
    main()
