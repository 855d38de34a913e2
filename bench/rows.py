"""Do requests that run together take less time than one after the other?

1, 2, 4 and 8 requests of mixed lengths, together as rows of the same steps, against the same ones
alone, one after the other; mlx-vlm, which has no rows, one after the other beside it. The bundled
model answers real prompts until it is done (policy reference: its full canvas; fast: narrow ones).
The scaled shapes, with made-up weights that settle nowhere, take a fixed number of steps over
canvases of 64 and 256: "scaled" with 6 layers, where head and soft embedding, which cost the same
per row whatever runs beside, have most of the work, and "deep" with 24, where the layers have the
published model's share. Each runtime is a process of its own; they take turns, round by round, and
a ratio is the median of the rounds' ratios. Processor time of all threads, so that other work on
the machine counts less; one BLAS thread.

Bounds: 4 rows of canvas 64 of the scaled shape at most 0.7 of one after the other, 8 rows of the
bundled model at most 0.65. With --before FOLDER, a checkout of an earlier commit (before rows were
independent: 3e0f7fa~1): a row alone at most 1.03 of its time, 16 mixed prompts in `batch_generate`
at most 0.8. Floor: a step that costs the same whatever its rows, 1 / rows.

    git worktree add /tmp/before 3e0f7fa~1
    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 OPENBLAS_NUM_THREADS=1 \\
        python bench/rows.py --before /tmp/before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import finish, record

HERE = Path(__file__).parent
PROMPTS = 16  # of the bundled model, tasks in turn
LENGTHS = (20, 200, 60, 400, 30, 120, 250, 90)  # tokens of the scaled shape's prompts


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that run in one of two ways."""

    shape: str  # "bundled", "scaled" or "deep"
    rows: int
    policy: str = "reference"  # of the bundled model
    canvas: int = 64  # of the scaled shapes
    steps: int = 6  # of the scaled shapes

    @property
    def name(self) -> str:
        kind = f"{self.policy}" if self.shape == "bundled" else f"canvas {self.canvas}"
        return f"{self.shape}, {kind}, {self.rows} rows"


CASES = [
    *(Case("bundled", rows, policy) for policy in ("reference", "fast") for rows in (1, 2, 4, 8)),
    Case("bundled", 16),
    *(Case("scaled", rows) for rows in (1, 2, 4, 8)),
    *(Case("scaled", rows, canvas=256, steps=3) for rows in (1, 2, 4)),
    *(Case("deep", rows) for rows in (1, 4)),
]
MADE_UP = ("scaled", "deep")
TOGETHER_BOUNDS = {"scaled, canvas 64, 4 rows": 0.7, "bundled, reference, 8 rows": 0.65}
ALONE_BOUND, BATCH_BOUND = 1.03, 0.8  # of the time before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.folder)
    cases = [case for case in CASES if options.only is None or options.only in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for shape in MADE_UP:
            if any(case.shape == shape for case in cases):
                write_made_up(folder / shape, shape)
        workers = {
            "ours": Worker("ours", folder, HERE.parent),
            "mlx-vlm": Worker("mlx-vlm", folder),
        }
        if options.before:
            workers["before"] = Worker("before", folder, options.before.resolve())
        try:
            table = {case.name: measure(case, workers, options.rounds) for case in cases}
        finally:
            for worker in workers.values():
                worker.close()
    bounds = check_bounds(table)
    for bound in bounds:
        print(f"{bound['what']}: {bound['value']:.3f}; bound {bound['bound']}: {bound['passed']}")
    passed = all(bound["passed"] for bound in bounds)
    line = record(
        "rows",
        what="requests together against one after the other",
        dtype="float32",
        units={
            "seconds": "processor time of all threads, median of rounds, prefill included",
            "of_in_turn": "together / in turn, median of the rounds' ratios",
            "steps_of_in_turn": "the same without prefill",
            "of_before": "ours now / the earlier commit",
            "positions": "rows x steps denoised",
        },
        rounds=options.rounds,
        cases=table,
        bounds=bounds,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def write_made_up(folder: Path, shape: str) -> None:
    """Write a checkpoint of made-up weights, in another process, since this one needs no model."""
    code = (
        "import sys; from pathlib import Path; from runtimes import checkpoint; "
        "checkpoint(Path(sys.argv[1]), sys.argv[2], 'dense')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), shape],
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"},
        capture_output=True,
        check=True,
    )


class Worker:
    """A runtime in a process of its own, which measures what it is asked for."""

    def __init__(self, name: str, folder: Path, package: Path = HERE.parent) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--folder", str(folder)],
            env=os.environ | {"PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, case: Case, way: str) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([asdict(case), way]) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args} has ended")
        return json.loads(line)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def measure(case: Case, workers: dict[str, Worker], rounds: int) -> dict[str, Any]:
    """Seconds and ratios of a case. The first round warms up and does not count."""
    ways = [("ours", "together"), ("ours", "in turn"), ("mlx-vlm", "in turn")]
    if "before" in workers:
        ways += [("before", "together"), ("before", "in turn")]
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    stepping: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    positions = {}
    for number in range(rounds + 1):
        for way in reversed(ways) if number % 2 else ways:
            found = workers[way[0]].ask(case, way[1])
            seconds[way].append(found["seconds"])
            stepping[way].append(found["stepping"])
            positions[way] = found["positions"]

    def ratio(over: tuple[str, str], under: tuple[str, str], of: Any = seconds) -> float:
        pairs = zip(of[over][1:], of[under][1:], strict=True)
        return round(median(a / b for a, b in pairs), 4)

    together, in_turn = ways[:2]
    row: dict[str, Any] = {
        "seconds": {" ".join(way): round(median(seconds[way][1:]), 4) for way in ways},
        "positions": {" ".join(way): positions[way] for way in ways[:3]},
        "of_in_turn": ratio(together, in_turn),
        "of_mlx_vlm_in_turn": ratio(together, ("mlx-vlm", "in turn")),
    }
    if case.shape in MADE_UP:
        row["steps_of_in_turn"] = ratio(together, in_turn, stepping)
        if "before" in workers:
            row["before_steps_of_in_turn"] = ratio(*ways[3:], stepping)
    if "before" in workers:
        row["of_before"] = {
            "together": ratio(together, ("before", "together")),
            "in turn": ratio(in_turn, ("before", "in turn")),
        }
        row["before_of_in_turn"] = ratio(("before", "together"), ("before", "in turn"))
    print(case.name, json.dumps(row), flush=True)
    return row


def check_bounds(table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = [
        (f"together of in turn, {name}", table[name]["of_in_turn"], bound)
        for name, bound in TOGETHER_BOUNDS.items()
        if name in table
    ]
    for name, row in table.items():
        if "of_before" not in row:
            continue
        if name.endswith(" 1 rows"):
            found.append((f"alone of before, {name}", row["of_before"]["in turn"], ALONE_BOUND))
        if name.endswith(" 16 rows"):
            found.append((f"batch of before, {name}", row["of_before"]["together"], BATCH_BOUND))
    return [
        {"what": what, "value": value, "bound": bound, "passed": value <= bound}
        for what, value, bound in found
    ]


# --- in a worker ---


def work(name: str, folder: Path) -> None:
    """Answer the questions on stdin, a line each. What anybody else prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    runtime = _MlxVlm(folder) if name == "mlx-vlm" else _Ours(folder)
    for line in sys.stdin:
        values, way = json.loads(line)
        case = Case(**values)
        run = runtime.bundled if case.shape == "bundled" else runtime.made_up
        repeats = max(1, 8 // case.rows)  # so that a few rows are no shorter to measure
        stepping, started = 0.0, time.process_time()
        for _ in range(repeats):
            positions, spent = run(case, way)
            stepping += spent
        seconds = (time.process_time() - started) / repeats
        found = {"seconds": seconds, "stepping": stepping / repeats, "positions": positions}
        print(json.dumps(found), file=answers, flush=True)


def _bundled_prompts(count: int) -> list[str]:
    from mlx_diffgemma import bundled_model

    tasks: dict[str, list[str]] = {}
    for entry in json.loads((bundled_model() / "prompts.json").read_text(encoding="utf-8")):
        tasks.setdefault(entry["task"], []).append(entry["prompt"])
    mixed = [prompts[i] for i in range(PROMPTS) for prompts in tasks.values()]
    return mixed[:count]


def _made_up_prompts(folder: Path, count: int) -> list[list[int]]:
    import numpy as np

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config["text_config"]["vocab_size"]
    return [np.random.default_rng(i).integers(20, size, LENGTHS[i]).tolist() for i in range(count)]


class _Ours:
    """This package, or an earlier state of it: public names only, which both have."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx

        from mlx_diffgemma import bundled_model, load, load_model

        self.folder = folder
        self.small, self.tokenizer = load(bundled_model())
        self.models = {
            shape: load_model(folder / shape) for shape in MADE_UP if (folder / shape).exists()
        }
        for model in (self.small, *self.models.values()):
            model.set_dtype(mx.float32)
            mx.eval(model.parameters())

    def bundled(self, case: Case, way: str) -> tuple[int | None, float]:
        from mlx_diffgemma import GenerationSettings, batch_generate, stream_generate
        from mlx_diffgemma.events import StepDone

        prompts = _bundled_prompts(case.rows)
        settings = GenerationSettings(seed=7, policy=case.policy)
        if way == "together":
            batch_generate(self.small, self.tokenizer, prompts, settings=settings)
            return None, 0.0
        positions = 0
        for i, prompt in enumerate(prompts):
            own = GenerationSettings(seed=7 + i, policy=case.policy)
            for event in stream_generate(self.small, self.tokenizer, prompt, settings=own):
                if isinstance(event, StepDone):
                    positions += event.draft.shape[-1]
        return positions, 0.0

    def made_up(self, case: Case, way: str) -> tuple[int, float]:
        import mlx.core as mx

        from mlx_diffgemma import GenerationSettings, denoise_tokens
        from mlx_diffgemma.events import CanvasCommitted, PrefillDone

        prompts = _made_up_prompts(self.folder / case.shape, case.rows)
        runs = [prompts] if way == "together" else [[prompt] for prompt in prompts]
        positions, stepping = 0, 0.0
        for number, run in enumerate(runs):
            longest = max(map(len, run))
            tokens = mx.array([[0] * (longest - len(ids)) + ids for ids in run], dtype=mx.int32)
            settings = GenerationSettings(
                canvas_length=case.canvas,
                max_new_tokens=case.canvas,
                max_denoising_steps=case.steps,
                confidence_threshold=0,  # settles nowhere
                seed=number,
            )
            lengths = mx.array([len(ids) for ids in run], dtype=mx.int32)
            model, read = self.models[case.shape], 0.0
            for event in denoise_tokens(model, tokens, settings, lengths=lengths):
                if isinstance(event, PrefillDone):  # all rows are read before the first step
                    read = time.process_time()
                elif isinstance(event, CanvasCommitted):
                    positions += case.canvas * case.steps
            stepping += time.process_time() - read
        return positions, stepping


class _MlxVlm:
    """mlx-vlm under its own loop, one request after the other."""

    def __init__(self, folder: Path) -> None:
        import answer
        from runtimes import MlxVlm, Ours, read_arrays

        from mlx_diffgemma import bundled_model, load

        self.folder = folder
        model, self.tokenizer = load(bundled_model())
        self.ways = {
            "reference": answer.MLX_VLM["mlx-vlm-entropy"],
            "fast": answer.MLX_VLM["mlx-vlm"],
        }
        self.runs = {
            policy: answer.mlx_vlm(bundled_model(), self.tokenizer, model.config.eos_token_ids, how)
            for policy, how in self.ways.items()
        }
        self.models = {
            shape: MlxVlm.load(path, read_arrays(path, Ours.load(path).model))
            for shape in MADE_UP
            if (path := folder / shape).exists()
        }

    def bundled(self, case: Case, way: str) -> tuple[int, float]:
        from mlx_diffgemma import encode_prompt

        assert way == "in turn"
        prompts = _bundled_prompts(case.rows)
        positions = sum(
            self.runs[case.policy](encode_prompt(self.tokenizer, prompt), 7 + i).positions
            for i, prompt in enumerate(prompts)
        )
        return positions, 0.0

    def made_up(self, case: Case, way: str) -> tuple[int, float]:
        assert way == "in turn"
        prompts = _made_up_prompts(self.folder / case.shape, case.rows)
        model = self.models[case.shape]
        runs = [model.run(ids, case.steps, case.canvas) for ids in prompts]
        return case.canvas * sum(run.steps for run in runs), 0.0


if __name__ == "__main__":
    main()
