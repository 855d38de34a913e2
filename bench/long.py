"""What does a long context cost at the real widths, in time and in memory?

Two layers of the published widths, one sliding and one full, the published vocabulary, made-up
weights. Contexts of 1,024 to 131,072 tokens are filled with made-up keys and values, so that none
is read; a step does not depend on what they are. Per context: the memory of its arrays against the
formula that commands and server reckon with (`context_bytes`), MLX's peak in a step above weights
and context, and the processor time of a self-conditioned step with its sampler, against that behind
1,024 tokens. Reading a prompt is measured up to 8,192 tokens, in pieces of 2,048 as by default.

Bound: the memory of the arrays is the formula's, byte for byte. Predicted: a full layer's attention
grows with the context, a sliding one's does not, all else stays.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/long.py
    python bench/long.py --context 1024 --context 4096 --prefill 256 --canvas 32
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from common import finish, record
from runtimes import PREFILL_STEP, Ours, checkpoint, text_tokens

from mlx_diffgemma import GenerationSettings
from mlx_diffgemma.checkpoint.memory import context_bytes, generation_limits
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.events import StepDone
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.model.context import Context, LayerContext

CONTEXTS = (1024, 8192, 32768, 131072)
PREFILLS = (1024, 8192)
SETTLING = 2  # first steps, not counted
ELEMENT_BYTES = 4  # float32 on the CPU backend


@dataclass(frozen=True, slots=True)
class Point:
    """Behind one context."""

    context: int
    context_bytes: int
    formula_bytes: int
    step_peak_bytes: int  # above weights and context
    step_seconds: float  # of all threads
    step_wall_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, action="append", help=f"repeatable; {CONTEXTS}")
    parser.add_argument("--prefill", type=int, action="append", help=f"repeatable; {PREFILLS}")
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help=f"timed, behind {SETTLING} others")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is written, 5 GB")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, generation_limits():
        folder = checkpoint(Path(scratch) / "model", "real", "dense", canvas=options.canvas)
        model = Ours.load(folder).model
        mx.eval(model.parameters())
        points = []
        for length in options.context or CONTEXTS:
            points.append(steps_behind(model, length, options.steps))
            print(points[-1], flush=True)
        prefills = {}
        for length in options.prefill or PREFILLS:
            prefills[length] = prefill(model, text_tokens(folder, length))
            print(f"prefill of {length:,} tokens: {prefills[length]}", flush=True)
    passed = all(point.context_bytes == point.formula_bytes for point in points)
    first = points[0]
    for point in points:
        print(
            f"{point.context:>8,} tokens: {point.context_bytes / 1e6:8,.1f} MB, formula "
            f"{point.formula_bytes / 1e6:8,.1f}; step {point.step_seconds:6.2f} s of processor "
            f"time, {point.step_seconds / first.step_seconds:.2f} of that behind "
            f"{first.context:,}; peak {point.step_peak_bytes / 1e9:.2f} GB"
        )
    line = record(
        "long",
        what="time and memory of a step behind long contexts at the real widths, and prefill",
        shape={"layers": 2, "full_layers": 1, "canvas": options.canvas},
        dtype="float32",
        units={
            "step_seconds": "processor time of all threads, median of steps",
            "step_wall_seconds": "by the clock",
            "prefill": "seconds of processor time per token, and MLX's peak above the weights",
        },
        points=[asdict(point) for point in points],
        against_first={p.context: round(p.step_seconds / first.step_seconds, 3) for p in points},
        prefill=prefills,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def made_up(model: DiffusionGemma, length: int) -> Context:
    """A context of so many tokens that nobody has read."""
    text, layers = model.config.text, []
    for spec in text.layers:
        kept = min(length, text.sliding_window - 1) if spec.is_sliding else length
        shape = (1, spec.num_key_value_heads, kept, spec.head_dim)
        layers.append(LayerContext(mx.random.normal(shape), mx.random.normal(shape)))
    context = Context(tuple(layers), length, 1)
    mx.eval(context.arrays)
    return context


def steps_behind(model: DiffusionGemma, length: int, steps: int) -> Point:
    """A canvas of exactly so many timed steps behind a made-up context and one token."""
    settings = GenerationSettings(
        max_new_tokens=model.config.canvas_length,
        max_denoising_steps=SETTLING + 1 + steps,
        confidence_threshold=0,
        seed=0,
    ).resolve(model.config)
    mx.clear_cache()
    weights = mx.get_active_memory()
    context = made_up(model, length - 1)
    rows = Rows(model)
    rows.add(Row(model, settings, np.array([20], np.int32), context=context))
    grown = sum(array.nbytes for array in context.arrays)
    del context
    busy, clock, held = [], [], 0
    while rows.rows:
        for _, event in rows.advance():
            if isinstance(event, StepDone):
                mx.eval(event.draft)
                if event.step == SETTLING:
                    mx.reset_peak_memory()
                held = max(held, mx.get_peak_memory()) if event.step > SETTLING else 0
                busy.append(time.process_time())
                clock.append(time.perf_counter())
    assert len(busy) == SETTLING + 1 + steps
    return Point(
        length,
        grown,
        context_bytes(model.config.text, length - 1, ELEMENT_BYTES),
        held - weights - grown,
        round(median(np.diff(busy)[SETTLING:]), 3),
        round(median(np.diff(clock)[SETTLING:]), 3),
    )


def prefill(model: DiffusionGemma, ids: list[int]) -> dict[str, float]:
    """Read a prompt as a run does."""
    mx.clear_cache()
    mx.reset_peak_memory()
    weights, begun = mx.get_active_memory(), time.process_time()
    context = model.prefill(mx.array([ids]), step_size=PREFILL_STEP)
    mx.eval(context.arrays)
    seconds = time.process_time() - begun
    return {
        "seconds_per_token": round(seconds / len(ids), 5),
        "peak_bytes": mx.get_peak_memory() - weights,
    }


if __name__ == "__main__":
    main()
