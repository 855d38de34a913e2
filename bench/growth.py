"""How do a step's time and memory grow with the context and with the canvas, ours and mlx-vlm's?

Contexts of 1 to 32,768 random tokens under a canvas of 256, and canvases of 32 to 256 over 1,024
tokens, at the scaled shape in float32. Both runtimes hold the same weights and run their own loops,
in turns. A step is the time between two marks, each at the same point of its step; memory is MLX's
peak behind the prefill, less the weights: context, logits, scores and whatever else is held at
once.

Bounds, at every point: ours takes at most as long as mlx-vlm (median of steps) and at most as much
memory. Floors: the step's multiplications at the rate of a large product measured here; keys and
values of the context and one array of logits.

With --peak instead: what one step takes above the weights at two layers of the real width, canvas
256, vocabulary 262,144, float32, as a multiple of its logits (268,435,456 bytes), with the graph
that GPUs get and with the CPU backend's own. Bound: 3.5 for ours. Floor: 1.

Checked: both give the same logits behind contexts shorter and longer than the sliding window, and
every run has exactly its steps.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/growth.py
    python bench/growth.py --context 1 --context 1024 --canvas 64 --layers 2
    python bench/growth.py --peak
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from common import finish, peak_rss_bytes, record
from runtimes import (
    SETTLING_STEPS,
    MlxVlm,
    Ours,
    Run,
    checkpoint,
    compute_dtype,
    read_arrays,
    read_config,
    text_tokens,
)
from step import dtype_name, floor_ms, peak_rates, same_logits, step_work, verdict

CONTEXTS = (1, 1024, 4096, 16384, 32768)
WIDTHS = (32, 64, 128, 256)
CANVAS, CONTEXT = 256, 1024  # what is held while the other grows
PEAK_BOUND = 3.5  # float32 logits
LONG = 4096  # tokens of context; behind more, reading them takes minutes
RUNTIMES = ("ours", "mlx-vlm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, action="append", help=f"repeatable; {CONTEXTS}")
    parser.add_argument("--canvas", type=int, action="append", help=f"repeatable; {WIDTHS}")
    parser.add_argument("--layers", type=int, default=6, help="the last one is full attention")
    parser.add_argument("--steps", type=int, default=3, help="timed in a run, behind 3 others")
    parser.add_argument("--rounds", type=int, default=3, help=f"1 behind more than {LONG} tokens")
    parser.add_argument("--only", choices=RUNTIMES, action="append", help="repeatable; both")
    parser.add_argument("--peak", action="store_true", help="only memory, at the real width")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is written")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        line, passed = (peaks if options.peak else growth)(Path(scratch) / "model", options)
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def growth(folder: Path, options: argparse.Namespace) -> tuple[str, bool]:
    """The points one by one, on one pair of models."""
    print("bounds: at every point, time and memory of ours at most those of mlx-vlm")
    rates = peak_rates()
    print(f"ceiling: {rates['flops'] / 1e9:,.0f} GFLOP/s ({rates['source']})", flush=True)
    kinds = ["sliding_attention"] * (options.layers - 1) + ["full_attention"]
    checkpoint(folder, "scaled", "dense", num_hidden_layers=len(kinds), layer_types=kinds)
    models, dtype = load(folder, options.only or RUNTIMES), compute_dtype(folder)
    logits = {str(count): same_logits(models, folder, count, CANVAS) for count in (64, CONTEXT)}
    print(f"logits against {models[0].name}, by context: {logits}", flush=True)
    points = [(context, CANVAS) for context in options.context or CONTEXTS]
    points += [
        (CONTEXT, width) for width in options.canvas or WIDTHS if (CONTEXT, width) not in points
    ]
    rows = [measure(folder, models, context, canvas, options, rates) for context, canvas in points]
    print_table(rows)
    compared = [row for row in rows if row["ratio"] is not None]
    passed = bool(compared) and all(max(row["ratio"].values()) <= 1 for row in compared)
    return record(
        "growth",
        what="time and memory of a denoise step against context and canvas, ours and mlx-vlm",
        shape={"layers": len(kinds), "full_layers": 1, "hidden": 512, "vocabulary": 32768},
        dtype=dtype_name(dtype),
        units={
            "step_ms": "milliseconds, median of steps",
            "peak_bytes": "bytes above the weights, largest of steps",
            "floor_ms": "milliseconds",
            "floor_bytes": "keys and values of the context, and float32 logits",
            "ratio": "ours / mlx-vlm",
        },
        bound=1,
        ceiling=rates,
        steps=options.steps,
        logits=logits,
        points=rows,
        passed=passed,
    ), passed


def load(folder: Path, names: Sequence[str]) -> list[Any]:
    """The runtimes, on the same arrays."""
    ours = Ours.load(folder)
    if "mlx-vlm" not in names:
        return [ours]
    theirs = MlxVlm.load(folder, read_arrays(folder, ours.model))
    return [ours, theirs] if "ours" in names else [theirs]


def measure(
    folder: Path,
    models: list[Any],
    context: int,
    canvas: int,
    options: argparse.Namespace,
    rates: dict[str, Any],
) -> dict[str, Any]:
    """One point."""
    rounds = options.rounds if context <= LONG else 1
    found = runs(models, text_tokens(folder, context), canvas, options.steps, rounds)
    config = read_config(folder) | {"canvas_length": canvas}
    element_bytes = 4 if compute_dtype(folder) == mx.float32 else 2
    parts = step_work(config, "dense", context, element_bytes)
    kept = next(part.nbytes for part in parts if part.name == "attention")
    ratio = None
    if {"ours", "mlx-vlm"} <= found.keys():
        ours, theirs = found["ours"], found["mlx-vlm"]
        ratio = {
            "time": round(ours["step_ms"] / theirs["step_ms"], 4),
            "memory": round(ours["peak_bytes"] / theirs["peak_bytes"], 4),
        }
    row = {
        "context": context,
        "canvas": canvas,
        "rounds": rounds,
        "floor_ms": round(floor_ms(parts, rates), 2),
        "floor_bytes": int(kept + 4 * canvas * config["text_config"]["vocab_size"]),
        "runtimes": found,
        "ratio": ratio,
    }
    print(f"context {context:,}, canvas {canvas}: {found}, ratio {ratio}", flush=True)
    return row


def runs(
    models: list[Any], ids: list[int], canvas: int, steps: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Each model's steps, run by run in turns: medians of time, the highest peak of memory."""
    found: dict[str, list[Run]] = {model.name: [] for model in models}
    weights: dict[str, int] = {}
    asked = SETTLING_STEPS + 1 + steps
    for _ in range(rounds):
        for model in models:
            mx.clear_cache()
            weights[model.name] = mx.get_active_memory()
            run = model.run(ids, asked, canvas)
            if run.steps != asked or len(run.step_seconds) != steps:
                raise SystemExit(f"{model.name} ran {run.steps} steps, asked for {asked}")
            found[model.name].append(run)
    rows = {}
    for name, given in found.items():
        seconds = [second for run in given for second in run.step_seconds]
        rows[name] = {
            "step_ms": round(1e3 * median(seconds), 2),
            "step_ms_min": round(1e3 * min(seconds), 2),
            "peak_bytes": max(run.peak_bytes for run in given) - weights[name],
            "prefill_seconds": round(median(run.prefill_seconds for run in given), 3),
        }
    return rows


def peaks(folder: Path, options: argparse.Namespace) -> tuple[str, bool]:
    """What a step takes above the weights, at the real width."""
    checkpoint(folder, "real", "dense", canvas=CANVAS)
    config, dtype = read_config(folder), compute_dtype(folder)
    logits_bytes = 4 * CANVAS * config["text_config"]["vocab_size"]
    print(
        f"bound: {PEAK_BOUND:g} times the float32 logits of {logits_bytes:,} bytes, for ours; "
        "floor: 1",
        flush=True,
    )
    from mlx_diffgemma.model.backend import as_on_gpu

    models, ids = load(folder, options.only or RUNTIMES), text_tokens(folder, 64)
    logits = {"backend's own": same_logits(models, folder, len(ids), CANVAS)}
    with as_on_gpu():
        logits["GPUs'"] = same_logits(models, folder, len(ids), CANVAS)
    found = {}
    for model in models:
        for graph in ("backend's own", "GPUs'") if model.name == "ours" else ("backend's own",):
            with as_on_gpu() if graph == "GPUs'" else nullcontext():
                row = runs([model], ids, CANVAS, 1, 1)[model.name]
            row["logits"] = round(row["peak_bytes"] / logits_bytes, 3)
            found[f"{model.name}, {graph} graph"] = row
            print(
                f"{model.name}, {graph} graph: {row['peak_bytes']:,} bytes above the weights, "
                f"{row['logits']:.2f} times the logits",
                flush=True,
            )
    ours = [row["logits"] for name, row in found.items() if name.startswith("ours")]
    passed = bool(ours) and max(ours) <= PEAK_BOUND
    print(f"ours: {verdict(passed)} the bound")
    return record(
        "growth_peak",
        what="peak memory of a denoise step above the weights, as a multiple of its logits",
        shape={
            "layers": 2,
            "hidden": config["text_config"]["hidden_size"],
            "vocabulary": config["text_config"]["vocab_size"],
            "canvas": CANVAS,
            "prompt_tokens": len(ids),
        },
        dtype=dtype_name(dtype),
        units={"peak_bytes": "bytes, the context included", "logits": "peak_bytes / logits_bytes"},
        logits_bytes=logits_bytes,
        bound=PEAK_BOUND,
        logits=logits,
        runs=found,
        peak_rss_bytes=peak_rss_bytes(),
        passed=passed,
    ), passed


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'context':>8}{'canvas':>8}{'floor ms':>10}{'ours ms':>11}{'mlx-vlm ms':>12}"
        f"{'ratio':>8}{'floor MB':>10}{'ours MB':>9}{'mlx-vlm MB':>12}{'ratio':>8}"
    )
    for row in rows:
        ours, theirs = (row["runtimes"].get(name) for name in RUNTIMES)
        ratio = row["ratio"] or {}

        def show(value: float | None, digits: int = 1) -> str:
            return "-" if value is None else f"{value:,.{digits}f}"

        def pick(found: dict[str, Any] | None, key: str, unit: float = 1) -> float | None:
            return None if found is None else found[key] / unit

        print(
            f"{row['context']:>8,}{row['canvas']:>8}{row['floor_ms']:>10,.1f}"
            f"{show(pick(ours, 'step_ms')):>11}{show(pick(theirs, 'step_ms')):>12}"
            f"{show(ratio.get('time'), 3):>8}{row['floor_bytes'] / 1e6:>10,.1f}"
            f"{show(pick(ours, 'peak_bytes', 1e6)):>9}{show(pick(theirs, 'peak_bytes', 1e6)):>12}"
            f"{show(ratio.get('memory'), 3):>8}"
        )


if __name__ == "__main__":
    main()
