"""Do checkpoints made by `mlx_vlm.convert` load, and give mlx-vlm's own logits?

Bound: largest difference of 1e-3 between softcapped logits (which lie within -30 .. 30), both sides
in float32, for each of four packings of the bundled model: 4-bit affine, mxfp4, nvfp4, 8-bit
affine. Floor: both sides run the same MLX kernels, so 0 is possible; summing the experts in another
order costs about 1e-6 per layer.

Compared: the first step, a self-conditioned step, and the first step after a commit; over prompts
shorter and longer than the sliding window, and over random canvases and ones that the model is sure
of. Two experts whose router logits nearly tie could swap between the two sides; were that to
happen, it would show here as a large difference.

    python bench/mlx_vlm_logits.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, record
from mlx_vlm.convert import convert
from mlx_vlm.utils import load_model as load_theirs

from mlx_diffgemma import (
    GenerationSettings,
    bundled_model,
    denoise_tokens,
    encode_prompt,
    load_model,
    load_tokenizer,
)
from mlx_diffgemma.denoise.schedule import temperature
from mlx_diffgemma.events import StepDone
from mlx_diffgemma.model import DiffusionGemma

BOUND = 1e-3
MODES: dict[str, dict[str, Any]] = {
    "affine 4-bit": {"q_mode": "affine", "q_bits": 4, "q_group_size": 64},
    "mxfp4": {"q_mode": "mxfp4", "q_bits": None, "q_group_size": None},
    "nvfp4": {"q_mode": "nvfp4", "q_bits": None, "q_group_size": None},
    "affine 8-bit": {"q_mode": "affine", "q_bits": 8, "q_group_size": 64},
}
STEPS = ("first", "self_conditioned", "second_canvas")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bound: largest difference of logits {BOUND:g} in float32")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for mode, arguments in MODES.items():
            folder = Path(scratch) / mode.replace(" ", "-")
            with contextlib.redirect_stdout(io.StringIO()):
                convert(str(bundled_model()), str(folder), quantize=True, **arguments)
            results[mode] = compare(folder, options.prompts)
            row = ", ".join(f"{step} {results[mode]['largest'][step]:.2e}" for step in STEPS)
            print(
                f"{mode} ({results[mode]['packing']}): "
                f"{results[mode]['pairs']} pairs of logits, largest difference: {row}; "
                f"argmax equal at {results[mode]['same_argmax']:.4%} of places"
            )
    passed = all(max(result["largest"].values()) <= BOUND for result in results.values())
    line = record(
        "mlx_vlm_logits",
        what="largest absolute difference between mlx-vlm's softcapped logits and ours",
        shape={"prompts": options.prompts, "batch": 1, "vocabulary": 384, "canvas": 64},
        dtype="float32 outside the packed weights",
        units="logits within -30 .. 30",
        bound=BOUND,
        modes=results,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def compare(folder: Path, prompts: int) -> dict[str, Any]:
    """Largest difference per step over prompts and canvases."""
    ours, theirs = load_model(folder), load_theirs(folder)
    for model in (ours, theirs):  # floating arrays only: packed weights and U8 scales stay
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    heat = temperature(0, GenerationSettings().resolve(ours.config))
    largest = dict.fromkeys(STEPS, 0.0)
    same = places = pairs = 0
    confident, moved, lengths = 0.0, float("inf"), []
    for ids in prompt_ids(folder, prompts):
        lengths.append(len(ids))
        for kind, canvas in canvases(ours, ids):
            mine = our_logits(ours, ids, canvas, heat)
            reference = their_logits(theirs, ids, canvas, heat)
            for step, a, b in zip(STEPS, mine, reference, strict=True):
                a, b = np.array(a), np.array(b)
                if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
                    raise SystemExit(f"{folder.name}, {step}: shapes {a.shape} and {b.shape}")
                largest[step] = max(largest[step], float(np.abs(a - b).max()))
                same += int((a.argmax(-1) == b.argmax(-1)).sum())
                places += a.shape[1]
                pairs += 1
            # Self-conditioning that reached neither side would agree as well.
            moved = min(moved, float(mx.abs(mine[1] - mine[0]).max().item()))
            if kind == "confident":
                top = mx.softmax(mine[0], axis=-1).max(axis=-1)
                confident = max(confident, float(top.mean().item()))
    if moved <= BOUND or max(lengths) <= ours.config.text.sliding_window:
        raise SystemExit(f"{folder.name}: the cases say nothing: {moved=}, {lengths=}")
    packing = Counter(
        f"{module.mode} {module.bits}-bit in groups of {module.group_size}"
        for _, module in ours.named_modules()
        if "scales" in module
    )
    return {
        "largest": largest,
        "pairs": pairs,
        "same_argmax": same / places,
        "packing": dict(packing),
        "prompt_tokens": lengths,
        "self_conditioning_moves_logits_by_at_least": moved,
        "surest_canvas_mean_probability": round(confident, 4),
    }


def prompt_ids(folder: Path, count: int) -> Iterator[list[int]]:
    """Prompts of all tasks, the last one repeated until it is longer than the sliding window."""
    tokenizer = load_tokenizer(folder)
    tasks: dict[str, list[str]] = {}
    for entry in json.loads((bundled_model() / "prompts.json").read_text(encoding="utf-8")):
        tasks.setdefault(entry["task"], []).append(entry["prompt"])
    texts = [prompts[i] for i in range(count) for prompts in tasks.values()][: count - 1]
    for text in [*texts, "\n".join(tasks["sudoku4"][:8])]:
        yield encode_prompt(tokenizer, text)


def canvases(model: DiffusionGemma, ids: list[int]) -> Iterator[tuple[str, mx.array]]:
    """Random tokens, and the draft that the model itself ends with."""
    rng = np.random.default_rng(len(ids))
    shape = (1, model.config.canvas_length)
    yield "random", mx.array(rng.integers(0, model.config.text.vocab_size, shape).astype(np.int32))
    settings = GenerationSettings(seed=0, max_new_tokens=model.config.canvas_length)
    draft = None
    for event in denoise_tokens(model, mx.array([ids], dtype=mx.int32), settings):
        if isinstance(event, StepDone):
            draft = event.draft
    assert draft is not None
    yield "confident", draft


def our_logits(
    model: DiffusionGemma, ids: list[int], canvas: mx.array, heat: float
) -> list[mx.array]:
    context = model.prefill(mx.array([ids], dtype=mx.int32))
    first = model.denoise(canvas, context)
    soft = model.soft_embedding(first / heat)
    second = model.denoise(canvas, context, self_conditioning=soft)
    after = model.denoise(canvas, model.commit(canvas, context))
    mx.eval(first, second, after)
    return [first, second, after]


def their_logits(model: Any, ids: list[int], canvas: mx.array, heat: float) -> list[mx.array]:
    """The calls of mlx-vlm's own loop, `mlx_vlm/generate/diffusion.py`."""
    tokens = mx.array([ids], dtype=mx.int32)
    cache = model.diffusion_prefill_cache(tokens, cache=model.make_cache())

    def logits(signal: mx.array | None) -> mx.array:
        masks = model.diffusion_decoder_masks(canvas, cache, None)
        return model.diffusion_decoder_logits(
            canvas, cache=cache, self_conditioning=signal, decoder_attention_mask=masks
        )

    first = logits(None)
    table = model.diffusion_prepare_self_conditioning()
    second = logits(model.diffusion_self_conditioning(first / heat, table))
    mx.eval(first, second)  # before the cache changes under them
    cache = model.diffusion_update_cache(canvas, cache=cache)
    after = logits(None)
    mx.eval(after)
    return [first, second, after]


if __name__ == "__main__":
    main()
