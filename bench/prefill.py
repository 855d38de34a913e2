"""What does reading a prompt cost, ours and mlx-vlm's?

Made-up dense weights at the scaled and at the real width (two layers of it), the same arrays for
both, float32 on the CPU backend. The runtimes take turns, forwards and backwards; a reading goes
from token ids to a context whose keys and values are computed. mlx-vlm's own loop reads a prompt
by the call that is timed here.

Bound, at every shape and length, on medians of wall time: ours takes at most as long as mlx-vlm.
Floor: the multiplications at the rate of a large product measured here.

Checked before anything is timed: both compute the same logits of a canvas behind what they read.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/prefill.py
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from common import finish, record
from runtimes import (
    PREFILL_STEP,
    MlxVlm,
    Ours,
    checkpoint,
    compute_dtype,
    read_arrays,
    text_tokens,
)
from step import dtype_name, peak_rates, same_logits

from mlx_diffgemma.doctor.floors import parameters

SHAPES = {"scaled": (64, 512), "real": (64, 256)}  # and the lengths of prompts, in tokens
CANVAS = 64  # of the check alone
BOUND = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable; both")
    parser.add_argument("--tokens", type=int, action="append", help="repeatable; by shape")
    parser.add_argument("--rounds", type=int, default=6, help="of each runtime, at every length")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written, up to 5 GB")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bound: ours takes at most {BOUND:g} of mlx-vlm's time")
    rates, points = peak_rates(), []
    print(f"ceiling: {rates['flops'] / 1e9:,.0f} GFLOP/s ({rates['source']})", flush=True)
    for shape in options.shape or SHAPES:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            folder = checkpoint(Path(scratch) / "model", shape, "dense", canvas=CANVAS)
            points += measure(folder, shape, options.tokens or SHAPES[shape], options, rates)
        gc.collect()  # modules refer to themselves; the next model needs the room
        mx.clear_cache()
    passed = all(point["ratio"] <= BOUND for point in points)
    line = record(
        "prefill",
        what="time to read a prompt, ours and mlx-vlm's",
        units={
            "ms": "milliseconds, wall time of each reading",
            "ms_per_token": "median / tokens",
            "ratio": "median of ours / median of mlx-vlm",
            "floor_ms": "milliseconds",
        },
        ceiling=rates,
        bound=BOUND,
        points=points,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(not passed)


def measure(
    folder: Path,
    shape: str,
    lengths: tuple[int, ...],
    options: argparse.Namespace,
    rates: dict[str, Any],
) -> list[dict[str, Any]]:
    """All lengths at one shape."""
    ours = Ours.load(folder)
    theirs = MlxVlm.load(folder, read_arrays(folder, ours.model))
    points = []
    for count in lengths:
        logits = same_logits([ours, theirs], folder, count, CANVAS)
        tokens = mx.array([text_tokens(folder, count)])

        def read_ours(tokens: mx.array = tokens) -> list[mx.array]:
            return ours.model.prefill(tokens, step_size=PREFILL_STEP).arrays

        def read_theirs(tokens: mx.array = tokens) -> list[mx.array]:
            state = theirs.model.diffusion_prefill_cache(tokens, cache=theirs.model.make_cache())
            return [layer.state for layer in state]

        ways = [("ours", read_ours), ("mlx-vlm", read_theirs)]
        ms: dict[str, list[float]] = {name: [] for name, _ in ways}
        for turn in range(options.rounds + 1):  # the first one is not counted
            for name, read in ways if turn % 2 else reversed(ways):
                mx.clear_cache()
                started = time.perf_counter()
                mx.eval(read())
                ms[name].append(round(1e3 * (time.perf_counter() - started), 2))
        ms = {name: rounds[1:] for name, rounds in ms.items()}
        middle = {name: median(rounds) for name, rounds in ms.items()}
        ratio = middle["ours"] / middle["mlx-vlm"]
        points.append(
            {
                "shape": shape,
                "tokens": count,
                "dtype": dtype_name(compute_dtype(folder)),
                "ms": ms,
                "ms_per_token": {name: round(value / count, 3) for name, value in middle.items()},
                "ratio": round(ratio, 3),
                "floor_ms": round(floor_ms(ours, count, rates), 1),
                "logits": logits,
            }
        )
        print(
            f"{shape}, {count} tokens: ours {middle['ours']:,.1f} ms, mlx-vlm "
            f"{middle['mlx-vlm']:,.1f} ms, ratio {ratio:.3f}, floor {points[-1]['floor_ms']:,.1f} "
            f"ms: {'within' if ratio <= BOUND else 'NOT within'} the bound",
            flush=True,
        )
    return points


def floor_ms(ours: Ours, count: int, rates: dict[str, Any]) -> float:
    """Return the time of the products of the chosen experts and of all else but the head."""
    text = ours.model.config.text
    weights = parameters(text)
    dense = sum(weights[name] for name in ("self_attn", "mlp", "router"))
    chosen = weights["experts"] * text.top_k_experts / text.num_experts
    return float(2e3 * count * (dense + chosen) / rates["flops"])


if __name__ == "__main__":
    main()
