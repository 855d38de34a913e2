"""Do images give mlx-vlm's logits, and what does the vision tower cost of a request?

Parity: models of drawn towers, both sides in float32 and given the same pixels. Bound: largest
difference of 1e-3 between softcapped logits, which lie within -30 .. 30, over first steps,
self-conditioned steps and second canvases behind one to three images, before, between and behind
text, longer than the sliding window too. Set aside are towers whose `rms_norm_eps` is not 1e-6,
since mlx-vlm has that number in its code, and near ties of routing, which no other runtime's order
of summation must decide alike. Two differences of meaning are shown beside it, in which
transformers agrees with us (tests/parity/test_images.py): mlx-vlm lets images of a second turn be
causal, and reads a committed image token as padding.

Cost: one layer of the tower at the published width and the rest of it are timed, the 27 layers are
calculated. The text's work is counted, and taken at the rate of the tower's products here: prefill
of the prompt, then `--steps` denoise steps.

    python bench/vision.py
    python bench/vision.py --configs 10 --no-time
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, record

from mlx_diffgemma import GenerationSettings, load_model
from mlx_diffgemma.denoise.schedule import temperature
from mlx_diffgemma.doctor.published import published_model
from mlx_diffgemma.model.vision import Vision, by_soft_token

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.checkpoints import draw_vision_config, write_checkpoint
from tests.parity.test_images import SOFT, LookingReference, Turn, draw_turns, read
from tests.parity.test_logits import SAFE_MARGIN

BOUND = 1e-3
STEPS = ("first", "self_conditioned", "second_canvas")
GRIDS = {280: (60, 42), 70: (30, 21)}  # patches of 4:3 pictures at two budgets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=16, help="denoise steps of a request")
    parser.add_argument("--no-time", action="store_true", help="parity alone")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    parity = compare(options.configs)
    largest = parity["largest"]
    print(
        f"{parity['pairs']} pairs of logits, {parity['set_aside']} near ties of routing set aside; "
        + ", ".join(f"{step} {largest[step]:.1e}" for step in STEPS)
        + f" (bound {BOUND:g})"
    )
    for what, difference in parity["other_meaning"].items():
        print(f"{what}: {difference:.2f}")
    cost = {} if options.no_time else {str(n): timed(n, options.steps) for n in GRIDS}
    for budget, each in cost.items():
        print(
            f"{budget} soft tokens: {each['patches']} patches, layer {each['layer_ms']:.0f} ms, "
            f"tower {each['tower_ms'] / 1e3:.1f} s (27 layers calculated), "
            f"{each['share']:.1%} of a request of {options.steps} steps"
        )
    passed = max(largest.values()) <= BOUND
    line = record(
        "vision",
        what="largest difference between mlx-vlm's logits behind images and ours; the tower's cost",
        shape={"configs": options.configs, "steps": options.steps},
        dtype="float32",
        units="logits within -30 .. 30; milliseconds; share of the request's time",
        bound=BOUND,
        parity=parity,
        cost=cost,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


# --- parity


def compare(configs: int) -> dict[str, Any]:
    largest = dict.fromkeys(STEPS, 0.0)
    other = {"second turn, where it drops the images' overlay": 0.0,
             "committed image token, which it reads as padding": 0.0}  # fmt: skip
    pairs = aside = 0
    for seed in range(configs):
        config = draw_vision_config(seed, per_layer=False)  # mlx-vlm reads the other spelling
        config["vision_config"] |= {"rms_norm_eps": 1e-6}
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_checkpoint(Path(scratch) / "checkpoint", config, seed)
            ours, theirs = load_model(folder, vision=True), load_theirs(folder)
            reference = LookingReference(folder)  # for the margins of its routing alone
        rng = np.random.default_rng(seed)
        shape, vocab_size = (1, ours.config.canvas_length), ours.config.text.vocab_size
        heat = temperature(0, GenerationSettings().resolve(ours.config))
        for place, turns in draw_turns(rng, config):
            canvas = mx.array(rng.integers(0, vocab_size, shape).astype(np.int32))
            canvas = mx.where(canvas == SOFT, 3, canvas)
            context = read(ours, turns)
            margin = routing_margin(reference, turns, np.array(canvas))
            mine = steps_of_ours(ours, context, canvas, heat)
            if place == "second turn":
                found = steps_of_theirs(theirs, turns, canvas, heat)
                other["second turn, where it drops the images' overlay"] = max(
                    other["second turn, where it drops the images' overlay"],
                    float(mx.abs(mine[0] - found[0]).max()),
                )
                continue
            if margin < SAFE_MARGIN:
                aside += len(STEPS)
                continue
            found = steps_of_theirs(theirs, turns, canvas, heat)
            for step, a, b in zip(STEPS, mine, found, strict=True):
                largest[step] = max(largest[step], float(mx.abs(a - b).max()))
                pairs += 1
            soft = mx.where(mx.arange(shape[1]) == 0, SOFT, canvas)
            after = ours.denoise(canvas, ours.commit(soft, context))
            cache = cache_of(theirs, turns)
            cache = theirs.diffusion_update_cache(soft, cache=cache)
            what = "committed image token, which it reads as padding"
            difference = float(mx.abs(after - their_step(theirs, canvas, cache, None)).max())
            other[what] = max(other[what], difference)
    return {"largest": largest, "pairs": pairs, "set_aside": aside, "other_meaning": other}


def load_theirs(folder: Path) -> Any:
    from mlx_vlm.utils import load_model as load

    model = load(folder)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def routing_margin(reference: LookingReference, turns: list[Turn], canvas: np.ndarray) -> float:
    import torch

    with torch.no_grad():
        cache = reference.read(turns)
        logits = reference.denoise(canvas, cache)
        reference.denoise(canvas, cache, logits)
        reference.encode(canvas, cache)
        reference.denoise(canvas, cache)
    return reference.take_margin()


def steps_of_ours(model: Any, context: Any, canvas: mx.array, heat: float) -> list[mx.array]:
    first = model.denoise(canvas, context)
    second = model.denoise(canvas, context, self_conditioning=model.soft_embedding(first / heat))
    after = model.denoise(canvas, model.commit(canvas, context))
    mx.eval(first, second, after)
    return [first, second, after]


def cache_of(model: Any, turns: list[Turn]) -> Any:
    """mlx-vlm's cache of turns, with whole images as its processor gives them."""
    cache = model.make_cache()
    for ids, pictures in turns:
        cache = model.diffusion_prefill_cache(
            mx.array(ids),
            cache=cache,
            pixel_values=[pixels_of(picture, model) for picture in pictures],
            mm_token_type_ids=mx.array((ids == SOFT).astype(np.int32)),
        )
    return cache


def pixels_of(picture: Any, model: Any) -> mx.array:
    """[3, H, W], from patches in any order."""
    side = model.config.vision_config.patch_size
    columns, rows = picture.positions.max(axis=0) + 1
    image = np.zeros((rows, side, columns, side, 3), np.float32)
    for patch, (x, y) in zip(picture.patches, picture.positions, strict=True):
        image[y, :, x] = patch.reshape(side, side, 3)
    whole = image.reshape(rows * side, columns * side, 3)
    return mx.array(whole.transpose(2, 0, 1))


def their_step(model: Any, canvas: mx.array, cache: Any, signal: mx.array | None) -> mx.array:
    masks = model.diffusion_decoder_masks(canvas, cache, None)
    return model.diffusion_decoder_logits(
        canvas, cache=cache, self_conditioning=signal, decoder_attention_mask=masks
    )


def steps_of_theirs(model: Any, turns: list[Turn], canvas: mx.array, heat: float) -> list[mx.array]:
    cache = cache_of(model, turns)
    first = their_step(model, canvas, cache, None)
    table = model.diffusion_prepare_self_conditioning()
    signal = model.diffusion_self_conditioning(first / heat, table)
    second = their_step(model, canvas, cache, signal)
    mx.eval(first, second)  # before the cache changes under them
    after = their_step(model, canvas, model.diffusion_update_cache(canvas, cache=cache), None)
    mx.eval(after)
    return [first, second, after]


# --- cost


def timed(budget: int, steps: int) -> dict[str, Any]:
    """The tower's time for an image of a budget, and its share of a request."""
    published = published_model()
    config, text = published.vision, published.text
    assert config is not None
    layers = config.num_hidden_layers
    across, down = GRIDS[budget]
    columns, rows = np.meshgrid(np.arange(across), np.arange(down))
    places = np.stack([columns.ravel(), rows.ravel()], axis=-1)
    positions = mx.array(places[by_soft_token(places, config)].astype(np.int32))[None]
    patches = mx.random.uniform(shape=(1, len(places), config.patch_width))
    times = {}
    for count in (1, 2):
        vision = Vision(replace(config, num_hidden_layers=count), text.hidden_size)
        vision.set_dtype(mx.float32)
        mx.eval(vision.parameters())
        times[count] = best_of(lambda v=vision: v.embed_vision(v.vision_tower(patches, positions)))
        del vision
        mx.clear_cache()
    layer = times[2] - times[1]
    tower = times[1] + (layers - 1) * layer
    W, inner, P = config.hidden_size, config.intermediate_size, len(places)
    width = config.num_attention_heads * config.head_dim
    layer_flops = 2 * P * (4 * W * width + 3 * W * inner) + 4 * P * P * width
    rate = layer_flops / layer
    tokens = len(places) // config.pooling_kernel_size**2 + 26
    whole = text_flops(tokens, head=False) + steps * text_flops(256, head=True)
    return {
        "patches": P,
        "layer_ms": 1e3 * layer,
        "tower_ms": 1e3 * tower,
        "layer_gflop": layer_flops / 1e9,
        "gflop_per_second": rate / 1e9,
        "share": tower / (tower + whole / rate),
    }


def best_of(function: Any, repeats: int = 5) -> float:
    mx.eval(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(function())
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def text_flops(tokens: int, *, head: bool) -> float:
    """Products of a pass over tokens, without attention scores; with the head and the soft
    embedding for a denoise step."""
    text = published_model().text
    M = text.hidden_size
    total = 0
    for layer in text.layers:
        queries = text.num_attention_heads * layer.head_dim
        keys = layer.num_key_value_heads * layer.head_dim
        attention = M * (2 * queries + keys * (2 if layer.is_sliding else 1))
        experts = 3 * M * text.moe_intermediate_size * text.top_k_experts
        dense = 3 * M * text.intermediate_size
        total += attention + experts + dense + M * text.num_experts
    if head:
        total += 2 * text.vocab_size * M + 3 * M * text.intermediate_size
    return 2.0 * tokens * total


if __name__ == "__main__":
    main()
