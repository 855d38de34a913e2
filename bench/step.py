"""What does a denoise step cost, and a token of prefill: ours, mlx-vlm and transformers?

A step is the self-conditioned one of the steady state with all its sampler work: statistics, a draw
at temperature 1, acceptance, renoise and the stop check. It is the time of a whole canvas of k
steps less that of one step, over k - 1, each by the runtime's own loop, with stopping made
impossible; the rounds go ours, mlx-vlm, transformers, ours, ... in one process, on the same arrays.
mlx-vlm runs in entropy-bound mode on the full canvas, which is the reference's policy and not its
default; transformers has no packed weights.

Bounds, on medians: ours takes at most as long as mlx-vlm at every shape; on the CPU backend at most
0.75 of it at the scaled dense one, and 0.2 at the scaled packed one. Floor: the step's
multiplications at the rate of a large float32 product measured here, or on a known card the sum of
each part's multiplications or bytes at the card's peak, whichever takes longer.

Checked before anything is timed: all runtimes give the same logits on one canvas, and afterwards
that every run had exactly its steps. Two experts whose router logits nearly tie may swap between
runtimes and move the logits of that place, and through attention of all; so one place in twenty is
let off, and where more differ, another canvas is drawn, up to the third.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/step.py
    python bench/step.py --shape scaled --weights dense --only ours --only mlx-vlm
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, peak_rss_bytes, record
from runtimes import (
    SHAPES,
    MlxVlm,
    Ours,
    Run,
    Runtime,
    Transformers,
    Weights,
    checkpoint,
    compute_dtype,
    read_arrays,
    read_config,
    text_tokens,
)

RUNTIMES = ("ours", "mlx-vlm", "transformers")
BOUND = 1.0  # ours over mlx-vlm
CPU_BOUNDS = {("scaled", "dense"): 0.75, ("scaled", "mixed"): 0.2}
TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 0.5}  # of logits within the softcap of 30
ALIKE = 0.95  # of places within the tolerance
# Of so many tokens of random text some will have had their experts swapped by the last bit of a
# router's logit. Every place of the canvas sees a little of that, and some places more.
SWAPS_FROM = 512
ALIKE_BEHIND_SWAPS = 0.8
CANVASES = 3  # drawn until one is free of swaps
CARDS = {"H100": (989e12, 3350e9), "H200": (989e12, 4800e9)}  # bfloat16 FLOP/s, bytes/s
LOGITS_PASSES = 6.5  # over float32 logits, in the leanest sampler of MLX's operations


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of a case is run where nothing else is asked for."""

    canvas: int
    steps: int
    rounds: int


# On the CPU backend a step of mlx-vlm's with packed weights takes from seconds to a minute.
PLANS = {
    ("bundled", "dense"): Plan(64, 17, 9),
    ("bundled", "mixed"): Plan(64, 9, 7),
    ("scaled", "dense"): Plan(256, 5, 5),
    ("scaled", "mixed"): Plan(256, 3, 3),
    ("real", "dense"): Plan(256, 3, 3),
    ("real", "mixed"): Plan(32, 2, 3),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step: what it must multiply, and what it must move."""

    name: str
    flops: float
    nbytes: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable; all")
    parser.add_argument("--weights", choices=("dense", "mixed"), action="append", help="both")
    parser.add_argument("--only", choices=RUNTIMES, action="append", help="repeatable; all")
    parser.add_argument("--rounds", type=int, help="by default from 3 to 9, by case")
    parser.add_argument("--steps", type=int, help="k, at least 2; by default from 2 to 17, by case")
    parser.add_argument("--canvas", type=int, help="64 for bundled, 32 for real mixed, else 256")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written, up to 5 GB")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    on_cpu = mx.default_device() == mx.cpu
    print(f"bound: ours takes at most {BOUND:g} of mlx-vlm's time per step at every shape", end="")
    print(
        "".join(f", {b:g} at {shape} {weights}" for (shape, weights), b in CPU_BOUNDS.items())
        if on_cpu
        else ""
    )
    rates = peak_rates()
    print(f"ceiling: {rates['flops'] / 1e9:,.0f} GFLOP/s ({rates['source']})", flush=True)
    cases = []
    for shape in options.shape or SHAPES:
        for weights in options.weights or ("dense", "mixed"):
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                cases.append(measure(Path(scratch), shape, weights, options, rates))
            gc.collect()  # modules refer to themselves; the next model needs the room
            mx.clear_cache()
    print_table(cases)
    compared = [case for case in cases if "mlx-vlm" in case["ratio"]]
    passed = bool(compared) and all(case["passed"] for case in compared)
    line = record(
        "step",
        what="time of a self-conditioned denoise step with its sampler, and of prefill, in three "
        "runtimes by their own loops",
        units={
            "step_ms": "milliseconds, (canvas of k steps - canvas of 1 step) / (k - 1)",
            "prefill_ms_per_token": "milliseconds per prompt token, from runs of both lengths",
            "ratio": "median step of ours / median step of the other",
            "floor_ms": "milliseconds that the step cannot beat at the ceiling's rates",
            "logits": "largest difference from ours per place, within -30 .. 30",
        },
        ceiling=rates,
        prompt_tokens=options.prompt_tokens,
        batch=1,
        cases=cases,
        peak_rss_bytes=peak_rss_bytes(),
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def measure(
    scratch: Path, shape: str, weights: Weights, options: argparse.Namespace, rates: dict[str, Any]
) -> dict[str, Any]:
    """One shape and packing: builds it, checks it, times it."""
    plan = PLANS[shape, weights]
    on_cpu = mx.default_device() == mx.cpu
    canvas = options.canvas or (plan.canvas if on_cpu or shape == "bundled" else 256)
    steps, rounds = options.steps or plan.steps, options.rounds or plan.rounds
    folder = checkpoint(scratch / "model", shape, weights, canvas=canvas)
    config, dtype = read_config(folder), compute_dtype(folder)
    text, count = config["text_config"], options.prompt_tokens
    parts = step_work(config, weights, count, 4 if dtype == mx.float32 else 2)
    floor = floor_ms(parts, rates)
    print(
        f"\n{shape} {weights}, canvas {canvas}, vocabulary {text['vocab_size']:,}, "
        f"{dtype_name(dtype)}: {sum(part.flops for part in parts) / 1e9:,.2f} GFLOP a step, "
        f"floor {floor:,.2f} ms; {rounds} rounds of 1 and {steps} steps",
        flush=True,
    )
    chosen = [
        name
        for name in options.only or RUNTIMES
        if not (name == "transformers" and weights == "mixed")
    ]
    models, shared = build(folder, chosen)
    ids = text_tokens(folder, count)
    logits = same_logits(models, folder, count, canvas)
    print(f"logits against {models[0].name}: {logits or 'nothing to compare'}", flush=True)

    runs: dict[str, list[tuple[Run, Run]]] = {model.name: [] for model in models}
    threads = None
    for model in models:  # warm, and torch with as many threads as suit it
        if isinstance(model, Transformers):
            threads = model.choose_threads(ids)
        else:
            model.run(ids, 2)
    for i in range(rounds):
        for model in models:
            short, long = model.run(ids, 1), model.run(ids, steps)
            if (short.steps, long.steps) != (1, steps):
                raise SystemExit(f"{model.name} ran {short.steps} and {long.steps} steps")
            runs[model.name].append((short, long))
        print(
            f"round {i + 1}: "
            + ", ".join(f"{name} {step_ms(pairs[-1]):,.1f} ms" for name, pairs in runs.items()),
            flush=True,
        )
    found = {name: summarise(pairs, count, canvas, floor) for name, pairs in runs.items()}
    ours = found.get("ours")
    ratio = {
        name: round(ours["step_ms"] / row["step_ms"], 4)
        for name, row in found.items()
        if ours is not None and name != "ours"
    }
    bound = CPU_BOUNDS.get((shape, weights), BOUND) if on_cpu else BOUND
    passed = ratio["mlx-vlm"] <= bound if "mlx-vlm" in ratio else None
    print(f"ratio of ours to {ratio}, bound to mlx-vlm {bound:g}: {verdict(passed)}", flush=True)
    return {
        "shape": shape,
        "weights": weights,
        "canvas": canvas,
        "layers": text["num_hidden_layers"],
        "hidden": text["hidden_size"],
        "experts": text["num_experts"],
        "vocabulary": text["vocab_size"],
        "dtype": dtype_name(dtype) + (" outside the packed weights" if weights == "mixed" else ""),
        "steps": steps,
        "rounds": rounds,
        "torch_threads": threads,
        "shared_bytes": shared,
        "logits": logits,
        "gflop": round(sum(part.flops for part in parts) / 1e9, 3),
        "floor_ms": round(floor, 3),
        "runtimes": found,
        "ratio": ratio,
        "bound": bound,
        "passed": passed,
    }


def build(folder: Path, names: list[str]) -> tuple[list[Runtime], int]:
    """The runtimes in the order of `RUNTIMES`, and the bytes of weights that they share."""
    models: list[Runtime] = []
    ours = Ours.load(folder) if "ours" in names else None
    if ours is not None:
        models.append(ours)
    if set(names) == {"ours"}:
        return models, 0
    arrays = read_arrays(folder, None if ours is None else ours.model)
    if "mlx-vlm" in names:
        models.append(MlxVlm.load(folder, arrays))
    if "transformers" in names:
        models.append(Transformers.load(folder, arrays))
    return models, arrays.shared_bytes


def same_logits(
    models: list[Runtime], folder: Path, prompt_tokens: int, canvas: int
) -> dict[str, dict[str, float]]:
    """Differences from the first model's logits on the first canvas on which they are the same;
    ends the run where they are not on any."""
    ids, tolerance = text_tokens(folder, prompt_tokens), TOLERANCE[compute_dtype(folder)]
    alike = ALIKE
    if prompt_tokens >= SWAPS_FROM:
        tolerance, alike = 10 * tolerance, ALIKE_BEHIND_SWAPS
    reference, *others = models
    for seed in range(1, 1 + CANVASES if others else 1):
        tokens = np.array(text_tokens(folder, canvas, seed))
        expected = reference.first_logits(ids, tokens)
        found = {}
        for model in others:
            apart = np.abs(model.first_logits(ids, tokens) - expected).max(axis=-1)  # [L]
            found[model.name] = {
                "canvas": seed,
                "largest": float(apart.max()),
                "median": float(np.median(apart)),
                "places_alike": round(float((apart <= tolerance).mean()), 4),
            }
        if all(row["places_alike"] >= alike for row in found.values()):
            return found
    if others:
        raise SystemExit(f"not what {reference.name} computes: {found}")
    return {}


def summarise(
    pairs: list[tuple[Run, Run]], prompt_tokens: int, canvas: int, floor: float
) -> dict[str, Any]:
    """Medians and minima over rounds."""
    each = [step_ms(pair) for pair in pairs]
    prefills = [1e3 * run.prefill_seconds / prompt_tokens for pair in pairs for run in pair]
    middle = median(each)
    return {
        "step_ms": round(middle, 3),
        "step_ms_min": round(min(each), 3),
        "step_ms_rounds": [round(ms, 3) for ms in each],
        "canvas_tokens_per_second_and_step": round(1e3 * canvas / middle, 1),
        "prefill_ms_per_token": round(median(prefills), 4),
        "prefill_ms_per_token_min": round(min(prefills), 4),
        "share_of_floor": round(floor / middle, 4),
    }


def step_ms(pair: tuple[Run, Run]) -> float:
    short, long = pair
    return 1e3 * (long.seconds - short.seconds) / (long.steps - short.steps)


def step_work(
    config: dict[str, Any], weights: Weights, context: int, element_bytes: int
) -> list[Part]:
    """What a self-conditioned step over a canvas must do behind `context` tokens.

    Weights are read once each, packed ones at 8 or 4 bits and 32 bits of scales for 64; an expert
    where one of the canvas's pairs is likely to fall on it.
    """
    text, L = config["text_config"], config["canvas_length"]
    M, V, F = text["hidden_size"], text["vocab_size"], text["intermediate_size"]
    E, X, k = text["num_experts"], text["moe_intermediate_size"], text["top_k_experts"]
    N, layers = text["num_attention_heads"], text["layer_types"]
    wide, narrow = (element_bytes, element_bytes) if weights == "dense" else (8.5 / 8, 4.5 / 8)

    def product(name: str, count: float, bytes_each: float) -> Part:
        return Part(name, 2 * L * count, count * bytes_each)

    projections, scores, kept = 0, 0.0, 0.0
    for kind in layers:
        sliding = kind == "sliding_attention"
        H = text["head_dim"] if sliding else text["global_head_dim"]
        K = text["num_key_value_heads"] if sliding else text["num_global_key_value_heads"]
        keys = min(context, text["sliding_window"] - 1) if sliding else context
        projections += M * H * (2 * N + (2 if sliding else 1) * K)
        scores += 4 * L * (keys + L) * N * H
        kept += 2 * keys * K * H * element_bytes
    hit = E * (1 - (1 - k / E) ** L)
    expert = 3 * M * X
    return [
        product("attention projections", projections, wide),
        Part("attention", scores, kept),
        product("dense blocks", len(layers) * 3 * M * F, wide),
        product("routers", len(layers) * M * E, wide),
        Part("experts", len(layers) * 2 * L * k * expert, len(layers) * hit * expert * narrow),
        product("self-conditioning", 3 * M * F, narrow),
        product("head", M * V, wide),
        product("soft embedding", M * V, wide),
        Part("sampler", 0, LOGITS_PASSES * 4 * L * V),
    ]


def floor_ms(parts: list[Part], rates: dict[str, Any]) -> float:
    """The sum over parts of what each is bound by; bytes count where a bandwidth is known."""
    bandwidth = rates["bytes_per_second"] or float("inf")
    return 1e3 * sum(max(part.flops / rates["flops"], part.nbytes / bandwidth) for part in parts)


def peak_rates() -> dict[str, Any]:
    """Multiplications and bytes per second: of a known card, or of a product measured here."""
    device = str(mx.device_info().get("device_name", ""))
    for card, (flops, bandwidth) in CARDS.items():
        if mx.default_device() != mx.cpu and card in device:
            return {"flops": flops, "bytes_per_second": bandwidth, "source": f"{card}, published"}
    a = mx.random.normal((1024, 2048))
    mx.eval(a)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        mx.eval(a @ a.T)
        seconds.append(time.perf_counter() - started)
    return {
        "flops": round(2 * 1024 * 1024 * 2048 / min(seconds[2:])),
        "bytes_per_second": None,
        "source": "a float32 product of 1024 x 2048 x 1024 here",
    }


def print_table(cases: list[dict[str, Any]]) -> None:
    print(
        f"\n{'case':18}{'canvas':>7}{'runtime':>14}{'ms/step':>11}{'min':>11}{'of floor':>10}"
        f"{'prefill ms/token':>18}{'ours / it':>11}"
    )
    for case in cases:
        for name, row in case["runtimes"].items():
            ratio = case["ratio"].get(name)
            print(
                f"{case['shape'] + ' ' + case['weights']:18}{case['canvas']:>7}{name:>14}"
                f"{row['step_ms']:>11,.2f}{row['step_ms_min']:>11,.2f}{row['share_of_floor']:>10.1%}"
                f"{row['prefill_ms_per_token']:>18.3f}{'' if ratio is None else f'{ratio:.3f}':>11}"
            )


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def verdict(passed: bool | None) -> str:
    return {True: "within", False: "NOT within", None: "not compared"}[passed]


if __name__ == "__main__":
    main()
