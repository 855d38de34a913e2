"""Does a LoRA teach the bundled model a task that it does not know, from unpacked weights and from
4-bit ones?

The task is new to it: "Double: kfw" -> "kkffww". Adapters on attention, the dense MLPs and
self-conditioning are trained as `mlx_diffgemma.train` does, from 4,000 words, on the bf16
checkpoint and on its mixed 4-bit conversion; then 200 words that are new are asked, with and
without them.

Bounds: under 5% exact without adapters and at least 50% with them, in under 30 minutes of training,
for both. Fused in float32, the answers' ids are the same as with the adapters, all of them. Fused
again to 4 bits, what packing lost is printed, and what it costs.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/lora.py
    python bench/lora.py --only bf16 --iters 100
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, record

from mlx_diffgemma import (
    GenerationSettings,
    bundled_model,
    denoise_tokens,
    encode_prompt,
    load,
    load_tokenizer,
)
from mlx_diffgemma.config.training import LoraParameters, TrainSettings
from mlx_diffgemma.convert import convert
from mlx_diffgemma.events import CanvasCommitted
from mlx_diffgemma.train.fuse import fuse_checkpoint
from mlx_diffgemma.train.session import Session
from mlx_diffgemma.train.trainer import Validated

TRAIN, TEST, KNOWN, LEARNED, MINUTES = 4000, 200, 0.05, 0.5, 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("bf16", "mixed"), help="one checkpoint; both")
    parser.add_argument("--iters", type=int, default=1200)
    parser.add_argument("--scratch", type=Path, help="where runs are kept")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(
        f"bounds: below {KNOWN:.0%} exact without adapters, at least {LEARNED:.0%} with them, "
        f"under {MINUTES} minutes; fused in float32, the same ids",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        line, passed = measure(options.scratch or Path(scratch), options)
    finish(line, save=options.save)
    sys.exit(not passed)


def measure(folder: Path, options: argparse.Namespace) -> tuple[str, bool]:
    asked = write_data(folder / "data")
    settings = TrainSettings(
        iters=options.iters,
        batch_size=16,
        optimizer="adamw",
        optimizer_config={"adamw": {"bias_correction": True, "weight_decay": 0.0}},
        lr_schedule={
            "name": "cosine_decay",
            "arguments": [4e-3, options.iters, 1e-4],
            "warmup": 20,
        },
        causal_weight=0.0,
        lora_parameters=LoraParameters(rank=16, scale=4.0),
        steps_per_report=100,
        steps_per_eval=10_000,
        save_every=10_000,
    )
    found, passed = {}, True
    for name in ("bf16", "mixed"):
        if options.only not in (None, name):
            continue
        source = bundled_model()
        if name == "mixed":
            source = convert(bundled_model(), folder / "4bit", quantize=True).folder
        row = one(source, folder / name, folder / "data", settings, asked)
        holds = row["without"] < KNOWN and row["with"] >= LEARNED and row["minutes"] < MINUTES
        holds = holds and row["fused_float32_same"] == len(asked)
        print(f"{name}: {row}", "within the bounds" if holds else "OUTSIDE the bounds", flush=True)
        found[name], passed = row, passed and holds
    return record(
        "lora",
        what="exact answers to a new task, without adapters, with them, and fused",
        task='"Double: kfw" -> "kkffww"',
        train=TRAIN,
        test=len(asked),
        settings=settings.as_dict(),
        units={"without": "share exact", "with": "share exact", "minutes": "of training"},
        runs=found,
        passed=passed,
    ), passed


def one(
    source: Path, run: Path, data: Path, settings: TrainSettings, asked: list[dict[str, str]]
) -> dict[str, Any]:
    """Trains on one checkpoint and asks."""
    session = Session.open(str(source), str(data), run, settings)
    started, losses = time.monotonic(), []
    for event in session.train():
        if isinstance(event, Validated):
            losses.append(round(event.loss, 4))
        print(event, flush=True)
    minutes = (time.monotonic() - started) / 60
    row: dict[str, Any] = {
        "minutes": round(minutes, 1),
        "validation_losses": losses,
        "without": exact(source, answers(source, asked), asked),
        "with": exact(source, adapted := answers(source, asked, run), asked),
    }
    # float32 both ways: what the checkpoint stores in bfloat16 or packs would round the sum.
    plain = convert(source, run / "float32", dtype="float32", dequantize=_is_packed(source)).folder
    fused = fuse_checkpoint(plain, run, run / "fused32").folder
    row["fused_float32_same"] = sum(
        a == b for a, b in zip(answers(plain, asked, run), answers(fused, asked), strict=True)
    )
    kept = fuse_checkpoint(source, run, run / "fused")
    again = answers(kept.folder, asked)
    row["fused"] = exact(source, again, asked)
    if kept.errors:
        row["packing_error_mean"] = round(sum(kept.errors.values()) / len(kept.errors), 4)
        row["packing_error_largest"] = round(max(kept.errors.values()), 4)
    row["same_as_fused"] = sum(a == b for a, b in zip(adapted, again, strict=True))
    return row


def answers(
    folder: Path, asked: list[dict[str, str]], adapters: Path | None = None
) -> list[tuple[int, ...]]:
    """The ids of every answer, up to its end, under the default policy; the same seed for all."""
    model, tokenizer = load(folder, adapter_path=adapters)
    out: list[tuple[int, ...]] = []
    for start in range(0, len(asked), 20):
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in asked[start : start + 20]]
        places = max(map(len, prompts))
        tokens = mx.array([[0] * (places - len(p)) + p for p in prompts])
        lengths = mx.array([len(p) for p in prompts])
        settings = GenerationSettings(seed=1000 + start).resolve(model.config)
        events = denoise_tokens(model, tokens, settings, lengths=lengths)
        written: list[list[int]] = [[] for _ in prompts]
        for event in events:
            if isinstance(event, CanvasCommitted):
                written[event.row] += np.array(event.tokens)[0].tolist()
        ends = set(settings.eos_token_ids)
        for row in written:
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            out.append(tuple(row[: end + 1]))
    return out


def exact(folder: Path, given: list[tuple[int, ...]], asked: list[dict[str, str]]) -> float:
    """The share of answers that are right."""
    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in given]
    return sum(t == row["completion"] for t, row in zip(texts, asked, strict=True)) / len(asked)


def write_data(folder: Path) -> list[dict[str, str]]:
    """train.jsonl and valid.jsonl of words that differ; the test's rows."""
    rng, seen = np.random.default_rng(0), set()
    rows: list[dict[str, str]] = []
    while len(rows) < TRAIN + TEST:
        word = "".join(chr(97 + i) for i in rng.integers(0, 26, rng.integers(2, 9)))
        if word not in seen:
            seen.add(word)
            doubled = "".join(c * 2 for c in word)
            rows.append({"prompt": f"Double: {word}", "completion": doubled})
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[TEST:]), ("valid", rows[:TEST])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return rows[:TEST]


def _is_packed(folder: Path) -> bool:
    return "quantization" in json.loads((folder / "config.json").read_text())


if __name__ == "__main__":
    main()
