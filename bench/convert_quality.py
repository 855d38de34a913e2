"""Which packing of the bundled model answers best, and in how few denoise steps?

Six packings of the bundled model: bf16, 8-bit, mixed 4-bit (experts 4-bit, the rest 8-bit), uniform
4-bit, and mxfp4 and nvfp4 experts with the rest at 8-bit. For each, over the 1,600 prompts and by
task: answers that are exactly right, denoise steps per canvas, and the relative error of the
weights by part. All in float32 outside the packed weights, batched alike, with the same seeds,
which fix the first canvas and every draw, so that a difference comes from the weights.

The winner has the least steps per canvas x relative error of all weights (root of summed squares
over root of summed squares); bf16, whose error is 0 by definition, stands outside, and so does
8-bit, which is a fifth larger than mixed 4-bit here, and two thirds in the 26B model.

Packed weights are unpacked to float32 before the run: the same numbers, which MLX's CPU backend
multiplies far faster, with LD_PRELOAD of an OpenBLAS faster still.

The standard error of a rate of 0.9 over 1,600 prompts is 0.75 percentage points; packings closer
than twice sqrt(2) of it cannot be told apart by their answers.

    python bench/convert_quality.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from accuracy import Answer, summarise
from common import finish, record

from mlx_diffgemma import GenerationSettings, batch_generate, bundled_model, load, load_model
from mlx_diffgemma.checkpoint.names import part_of
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert.shards import squared_error
from mlx_diffgemma.convert.sources import open_checkpoint
from mlx_diffgemma.model import DiffusionGemma

PACKINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "8-bit": {"quantize": True, "q_bits": 8},
    "mixed 4-bit": {"quantize": True},
    "uniform 4-bit": {"quantize": True, "recipe": "uniform"},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
}
RIVALS = ("mixed 4-bit", "uniform 4-bit", "mxfp4", "nvfp4")  # all but bf16 and 8-bit
PARTS = ("experts", "attention", "dense MLP", "embedding", "router", "self-conditioning")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first prompts; says little then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    entries = json.loads((bundled_model() / "prompts.json").read_text(encoding="utf-8"))
    entries = entries[: options.limit]
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, arguments in PACKINGS.items():
            folder = Path(scratch) / name.replace(" ", "-")
            summary = convert(bundled_model(), folder, **arguments)
            started = time.perf_counter()
            answers = answer(folder, entries, options.batch, options.seed)
            errors = weight_errors(folder)
            row = summarise(entries, answers)
            rows[name] = {
                **row,
                "tasks": by_task(entries, answers),
                "exact_standard_error": round(
                    math.sqrt(row["exact_rate"] * (1 - row["exact_rate"]) / len(entries)), 4
                ),
                "tensor_bytes": summary.plan.tensor_bytes,
                "error": errors,
                "steps_x_error": round(row["steps_per_canvas"] * errors["all"], 4),
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(name, row, file=sys.stderr, flush=True)
    winner = min(RIVALS, key=lambda name: rows[name]["steps_x_error"])
    print_table(rows)
    print_tasks(rows)
    print(f"least steps x error: {winner}")
    line = record(
        "convert_quality",
        what="answers and denoise steps of the bundled model in six packings, and weight errors",
        shape={"prompts": len(entries), "batch": options.batch},
        dtype="float32 outside the packed weights",
        units={
            "exact_rate": "answers equal to the expected text / prompts",
            "steps_per_canvas": "denoise steps / canvases, over all rows",
            "error": "norm of the change / norm of the weights, by part",
            "seconds": "wall time on a shared machine; not a benchmark of speed",
        },
        packings=rows,
        winner=winner,
        seed=options.seed,
    )
    finish(line, save=options.save)


def answer(folder: Path, entries: list[dict[str, str]], batch: int, seed: int) -> list[Answer]:
    """In the order of the entries; batched by task and length, since a batch takes as long as its
    slowest row."""
    packed, tokenizer = load(folder)
    packed.set_dtype(mx.float32)
    model = unpacked(packed)
    answers: dict[int, Answer] = {}
    order = sorted(
        range(len(entries)), key=lambda i: (entries[i]["task"], len(entries[i]["answer"]))
    )
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        response = batch_generate(
            model,
            tokenizer,
            [entries[i]["prompt"] for i in part],
            settings=GenerationSettings(seed=seed + start),
        )
        for i, text, done in zip(part, response.texts, response.finished, strict=True):
            answers[i] = Answer(text, done.new_tokens, done.steps, done.canvases)
    return [answers[i] for i in range(len(entries))]


def by_task(entries: list[dict[str, str]], answers: list[Answer]) -> dict[str, dict[str, Any]]:
    parts: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        parts.setdefault(entry["task"], []).append(i)
    return {
        task: summarise([entries[i] for i in part], [answers[i] for i in part])
        for task, part in sorted(parts.items())
    }


def unpacked(packed: DiffusionGemma) -> DiffusionGemma:
    """The same model with plain float32 weights."""
    model = load_model(bundled_model())
    model.set_dtype(mx.float32)
    modules = dict(model.named_modules())
    for path, module in packed.named_modules():
        if "scales" in module:
            how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            modules[path].weight = mx.dequantize(
                module.weight, module.scales, module.get("biases"), dtype=mx.float32, **how
            )
        elif "weight" in module:
            modules[path].weight = module.weight
    mx.eval(model.parameters())
    return model


def weight_errors(folder: Path) -> dict[str, float]:
    """Against the bundled model, over all of every matrix; "all" is over all parts together."""
    before, after = open_checkpoint(bundled_model()), open_checkpoint(folder)
    sums: dict[str, np.ndarray] = {}
    for name, tensor in after.tensors.items():
        if len(tensor.shape) < 2 or (part := part_of(name)) == "vision":
            continue
        rows = tensor.shape[0]
        found = squared_error(before.tensors[name].read(0, rows), tensor.read(0, rows))
        for key in (part, "all"):
            sums[key] = sums.get(key, np.zeros(2)) + found
    return {part: round(math.sqrt(d / v), 5) for part, (d, v) in sums.items()}


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    head = f"{'packing':14}{'bytes':>11}{'exact':>12}{'steps/canvas':>14}{'error':>9}{'x steps':>9}"
    print(head + "".join(f"{part[:11]:>12}" for part in PARTS))
    for name, row in rows.items():
        exact = f"{row['exact']}/{row['prompts']}"
        errors = "".join(f"{row['error'][part]:>12.5f}" for part in PARTS)
        print(
            f"{name:14}{row['tensor_bytes']:>11,}{exact:>12}{row['steps_per_canvas']:>14.2f}"
            f"{row['error']['all']:>9.5f}{row['steps_x_error']:>9.4f}{errors}"
        )


def print_tasks(rows: dict[str, dict[str, Any]]) -> None:
    """Exact answers and steps per canvas, by task and packing."""
    print(f"\n{'task':10}" + "".join(f"{name:>16}" for name in rows))
    for task in next(iter(rows.values()))["tasks"]:
        found = [row["tasks"][task] for row in rows.values()]
        cells = (f"{f['exact_rate']:.1%} / {f['steps_per_canvas']:.1f}" for f in found)
        print(f"{task:10}" + "".join(f"{cell:>16}" for cell in cells))
    print()


if __name__ == "__main__":
    main()
