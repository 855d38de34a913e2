"""What should a step of the 26B model cost on which chip, and where would that leave tokens/s?

A model, no clock (`mlx_diffgemma/doctor/floors.py`): work counted from the published config part by
part, rates of chips as published or assumed. Every line it prints is marked as a prediction, or as
published by others; nothing here was measured by us, and nothing was run on Apple hardware.

Per part and chip: the greater of FLOPs / rate and bytes / bandwidth, summed. Two sums: "floor" at
peak rates with fused attention, 6.5 passes over the logits and no copies; "MLX" at sustained rates
with what MLX and mlx-vlm issue today (tile waste, unfused attention, 18.5 passes, copies,
launches). A narrower canvas saves FLOPs in proportion, but hardly any expert weights: rows x k
uniform picks still hit E (1 - (1 - 1/E)^(rows k)) of E experts.

Bound: tables that were worked out by hand before this script, copied into it, come out within 3%.
That shows this is the same model, not that the model is right: of published measurements it meets
some within 10%, and is three times below another.

    python bench/floors.py
    python bench/floors.py --width 64 --context 8192 --steps 8 --steps 16
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from common import RESULTS, finish, record
from table import read

from mlx_diffgemma.config.policies import POLICIES
from mlx_diffgemma.doctor.floors import (
    CHIPS,
    LAUNCHES_PER_LAYER,
    M1_ULTRA,
    M3_MAX,
    Chip,
    Kind,
    Model,
)
from mlx_diffgemma.doctor.published import published_model

BOUND = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=float, action="append", help="per canvas; 8, 12, 16, 20")
    parser.add_argument("--width", type=int, help="rows of the canvas; the checkpoint's 256")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the canvas")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    model = Model(published_model())
    width = model.canvas if options.width is None else options.width
    if not 1 <= width <= model.canvas or options.context < 0:
        parser.error(f"--width must lie within 1 .. {model.canvas}, --context be at least 0")
    context = options.context
    steps = options.steps or [8, 12, 16, 20]
    deviations = check(model)
    largest = max(deviations, key=lambda what: abs(deviations[what]))
    passed = abs(deviations[largest]) <= BOUND
    print(
        f"[self-check] {len(deviations)} cells worked out by hand: largest deviation "
        f"{deviations[largest]:+.1%} ({largest}), bound {BOUND:.0%}"
    )
    print_parts(model, width, context)
    predicted = print_chips(model, width, context, steps)
    transfer = print_policies(model, context, steps)
    published = print_published(model)
    line = record(
        "floors",
        what="predictions of a cost model; nothing in this record was measured by us",
        shape={"width": width, "context": context, "batch": 1},
        dtype="weights 4.5 bits (fp8: 8), activations bf16, logits float32 in the sampler",
        units={
            "ms": "per denoise step, at peak rates (floor) and as MLX runs (MLX)",
            "tokens_per_second": "by steps per canvas, commit pass included",
            "transfer": "a small model's steps and widths, by model, put into the large one's cost",
            "published": "by others; not reproduced",
        },
        bound=BOUND,
        self_check={"cells": len(deviations), "largest": largest, "by": deviations[largest]},
        predicted=predicted,
        transfer=transfer,
        published=published,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


# Worked out by hand. ms per step: floor / MLX at contexts of 1k and 32k; tokens/s at 8 and 20
# steps, the same two ways.
STEP_CELLS = {
    "M2 Ultra": (96, 172, 145, 237),
    "M3 Ultra": (91, 176, 138, 242),
    "M4 Max": (151, 247, 229, 342),
    "M5": (205, 282, 283, 377),
    "M5 Pro": (102, 158, 141, 211),
    "M5 Max": (50, 86, 69, 115),
    "RTX 5090 bf16": (17.0, 24.8, 23.4, 32.9),
    "RTX 5090 nvfp4": (9.7, 17.5, 10.5, 22.2),
    "H100 bf16": (6.3, 11.6, 7.7, 14.1),
    "H200 bf16": (5.0, 9.2, 6.3, 11.2),
}
RATE_CELLS = {
    "M3 Ultra": (323, 167, 136, 70),
    "M4 Max": (195, 118, 82, 50),
    "M5": (143, 104, 60, 44),
    "M5 Max": (583, 342, 245, 144),
    "H100 fp8": (3345, 2150, 1423, 910),
    "H200 fp8": (4696, 2819, 1997, 1192),
}


def check(model: Model) -> dict[str, float]:
    """Relative deviation from the cells worked out by hand."""
    chips, rows = {chip.name: chip for chip in CHIPS}, model.canvas
    plain = Chip("any", 1, 1, 1)
    cells: dict[str, tuple[float, float]] = {}
    for context, gflop, gigabytes in ((1024, 2532, 26.5), (8192, 2832, 28.4), (32768, 3863, 35.0)):
        parts = model.step(rows, context, plain, "MLX")
        cells[f"1.1 GFLOP at {context}"] = (sum(part.flops for part in parts) / 1e9, gflop)
        cells[f"1.1 GB at {context}"] = (sum(part.bytes for part in parts) / 1e9, gigabytes)
    by_name = {part.name: part for part in model.step(rows, 1024, plain, "MLX")}
    for name, gflop in (("attention projections", 568), ("dense MLP", 274), ("experts", 731)):
        cells[f"1.1 GFLOP of {name}"] = (by_name[name].flops / 1e9, gflop)
    cells["1.1 GB of experts"] = (by_name["experts"].bytes / 1e9, 12.85)
    columns = [(context, kind) for context in (1024, 32768) for kind in ("floor", "MLX")]
    for name, row in STEP_CELLS.items():
        for (context, kind), cell in zip(columns, row, strict=True):
            value = model.step_ms(rows, context, chips[name], kind)
            cells[f"1.4 {kind} ms of {name} at {context}"] = (value, cell)
    columns = [(steps, kind) for steps in (8, 20) for kind in ("floor", "MLX")]
    for name, row in RATE_CELLS.items():
        for (steps, kind), cell in zip(columns, row, strict=True):
            value = model.tokens_per_second(steps, rows, 1024, chips[name], kind)
            cells[f"1.5 {kind} tokens/s of {name} at {steps} steps"] = (value, cell)
    return {what: round(value / cell - 1, 4) for what, (value, cell) in cells.items()}


def print_parts(model: Model, width: int, context: int) -> None:
    chip = CHIPS[1]
    print(
        f"[prediction] a step of {width} rows behind {context} tokens; ms on {chip.name}; "
        f"{model.hit(width):.1f} of {model.experts} experts hit, "
        f"{LAUNCHES_PER_LAYER * model.layers:,} launches"
    )
    print(
        f"[prediction] {'part':33} {'GFLOP':>7} {'GB floor':>9} {'GB MLX':>7} "
        f"{'ms floor':>9} {'ms MLX':>7}"
    )
    floor, mlx = (model.step(width, context, chip, kind) for kind in ("floor", "MLX"))
    for low, high in zip(floor, mlx, strict=True):
        print(
            f"[prediction] {low.name:33} {low.flops / 1e9:7.0f} {low.bytes / 1e9:9.2f} "
            f"{high.bytes / 1e9:7.2f} {low.ms(chip, 'floor'):9.1f} {high.ms(chip, 'MLX'):7.1f}"
        )
    print(
        f"[prediction] {'all, with launches':33} {sum(p.flops for p in floor) / 1e9:7.0f} "
        f"{sum(p.bytes for p in floor) / 1e9:9.2f} {sum(p.bytes for p in mlx) / 1e9:7.2f} "
        f"{model.step_ms(width, context, chip, 'floor'):9.1f} "
        f"{model.step_ms(width, context, chip, 'MLX'):7.1f}"
    )


def print_chips(
    model: Model, width: int, context: int, steps: list[float]
) -> dict[str, dict[str, Any]]:
    heads = " ".join(f"{f'{count:g} steps':>13}" for count in steps)
    print(f"[prediction] {'floor / MLX':15} {'ms per step':>14}  tokens/s at {heads}")
    predicted = {}
    for chip in CHIPS:
        ms = {kind: model.step_ms(width, context, chip, kind) for kind in ("floor", "MLX")}
        rates = {
            f"{count:g}": {
                kind: round(model.tokens_per_second(count, width, context, chip, kind), 1)
                for kind in ms
            }
            for count in steps
        }
        row = " ".join(f"{rate['floor']:6.0f} /{rate['MLX']:5.0f}" for rate in rates.values())
        print(f"[prediction] {chip.name:15} {ms['floor']:6.1f} /{ms['MLX']:6.1f}{'':14} {row}")
        predicted[chip.name] = {
            "ms": {kind: round(value, 2) for kind, value in ms.items()},
            "tokens_per_second": rates,
        }
    return predicted


def print_policies(model: Model, context: int, steps: list[float]) -> dict[str, Any]:
    """What each policy of the last bench/answer.py would save here, were its steps and widths the
    same, by small model. Those are asked toy tasks."""
    answers = read(RESULTS).get("answer", {}).get("models", {})
    known = {n: a for n, a in answers.items() if "reference" in a["groups"]["pooled"]}
    if not known:
        print("[prediction] no bench/answer.py with reference: nothing to say about policies")
    return {name: print_transfer(model, name, known[name], context, steps) for name in known}


def print_transfer(
    model: Model, small: str, answer: dict[str, Any], context: int, steps: list[float]
) -> dict[str, Any]:
    """What the policies of one record would save."""
    pooled, canvas = answer["groups"]["pooled"], answer["shape"]["canvas"]
    reference = pooled["reference"]
    print(
        f"[prediction] transfer from the small model {small}, which takes "
        f"{reference['steps_per_canvas']:.1f} steps a canvas of {canvas} on toy tasks: in place of "
        f"one full-width canvas of {steps[0]:g} steps"
    )
    transfer = {}
    for name, row in pooled.items():
        if name not in answer["settings"]:
            continue
        share = row["positions"] / row["steps"] / canvas
        rows = round(model.canvas * share)
        count = steps[0] * row["steps"] / reference["steps"]
        commits = row["canvases"] / reference["canvases"]
        part = round(model.canvas / commits)
        is_joint = (
            POLICIES[answer["settings"][name].get("policy", "reference")].get("commit_pass")
            == "joint"
        )
        gains = {}
        for chip in CHIPS:
            for kind in ("floor", "MLX"):
                before = model.canvas_ms(steps[0], model.canvas, context, chip, kind)
                after = count * model.step_ms(rows, context, chip, kind)
                if is_joint:
                    after += commits * joined_ms(model, rows, part, context, chip, kind)
                else:
                    after += commits * model.commit_ms(part, context, chip, kind)
                gains.setdefault(chip.name, {})[kind] = round(before / after, 2)
        work = row["positions"] / reference["positions"]
        speed = ", ".join(
            f"{chip} {gain['floor']:.2f}x / {gain['MLX']:.2f}x"
            for chip, gain in gains.items()
            if chip in ("M3 Ultra", "M4 Max", "M5 Max", "H100 bf16")
        )
        print(
            f"[prediction] {name}: {work:.2f} of reference's rows x steps as {count:.1f} steps of "
            f"{rows} rows and {commits:.2f} commits of {part} rows"
            f"{' in passes of steps' * is_joint}; faster, floor / MLX: {speed}"
        )
        transfer[name] = {
            "positions_of_reference": round(work, 4),
            "steps": round(count, 2),
            "mean_width": rows,
            "commits": round(commits, 3),
            "faster": gains,
        }
    return transfer


def joined_ms(model: Model, rows: int, part: int, context: int, chip: Chip, kind: Kind) -> float:
    """What a step takes longer if its pass also reads committed text."""
    both, alone = (model.step(count, context, chip, kind) for count in (rows + part, rows))
    return sum(
        more.ms(chip, kind) - less.ms(chip, kind)
        for more, less in zip(both, alone, strict=True)
        if more.in_commit
    )


def print_published(model: Model) -> list[dict[str, Any]]:
    """What others measured, beside what this model says of it; good and bad."""
    chips = {chip.name: chip for chip in CHIPS}
    rows, h100 = model.canvas, chips["H100 fp8"]
    # Until 2026-08-11 tiles had 64 rows on M5.
    june = Chip("M5 Pro", 34.0, 27.0, 307, tile_rows=64)
    wide, narrow = (model.step_ms(width, 1024, M3_MAX, "MLX") for width in (256, 64))
    floor = [model.tokens_per_second(steps, rows, 1024, h100, "floor") for steps in (20, 12)]
    lines = [
        (
            "share of dense speed, M3 Ultra, 43 rows per expert (mlx 4246)",
            f"{1 / (1 + 16 / 43):.0%}",
            "69%",
        ),
        (
            "tokens/s, M5 Pro, turbo, 10 steps, tiles of 64 (mlx-vlm PR 1384)",
            f"{model.tokens_per_second(10, rows, 1024, june, 'MLX'):.0f}",
            "89-138, 107 on average",
        ),
        ("256 rows against 64, M3 Max (gmlx)", f"{wide / narrow:.1f}x the time", "2.2x"),
        (
            "ms per step, M1 Ultra (mlxcel PR 218), at MLX rates",
            f"{model.step_ms(rows, 1024, M1_ULTRA, 'MLX'):.0f}",
            "641",
        ),
        (
            "tokens/s, H100 fp8, 12-20 steps (vLLM), floor",
            f"{floor[0]:.0f}-{floor[1]:.0f}",
            "1,008",
        ),
    ]
    for what, predicted, measured in lines:
        print(f"[prediction] {what}: {predicted}; [published by others] {measured}")
    return [{"what": w, "predicted": p, "published_by_others": m} for w, p, m in lines]


if __name__ == "__main__":
    main()
