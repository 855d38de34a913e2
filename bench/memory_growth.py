"""Does memory stay where it is over 500 generations in one process?

Bound: the highest resident memory after any of generations 51 to 500 is less than 2% above that
after generation 50. Every second prompt is random tokens of a random length, the others are the
bundled model's own, whose answers take up to four canvases; `max_new_tokens` is random. So hardly
two runs need the same buffers.

    python bench/memory_growth.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque

import mlx.core as mx
import numpy as np
from common import current_rss_bytes, finish, record

from mlx_diffgemma import GenerationSettings, bundled_model, load, stream_generate
from mlx_diffgemma.events import Finished

BOUND = 0.02
WARMUP = 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--longest-prompt", type=int, default=256, help="tokens")
    parser.add_argument("--most-new-tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=8, help="most denoise steps per canvas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    if options.generations <= WARMUP:
        parser.error(f"--generations must be more than {WARMUP}, got {options.generations}")
    print(f"bound: resident memory grows less than {BOUND:.0%} after generation {WARMUP}")
    model, tokenizer = load(bundled_model())
    rng = np.random.default_rng(options.seed)
    text_tokens = np.setdiff1d(
        np.arange(model.config.text.vocab_size), [*model.config.image_token_ids]
    )
    entries = json.loads((bundled_model() / "prompts.json").read_text(encoding="utf-8"))
    prompts = [entry["prompt"] for entry in entries]
    resident, new_tokens, canvases = [], 0, 0
    started = time.perf_counter()
    for i in range(options.generations):
        if i % 2:
            prompt = str(rng.choice(prompts))
        else:
            length = int(rng.integers(1, options.longest_prompt + 1))
            prompt = rng.choice(text_tokens, length).tolist()
        settings = GenerationSettings(
            max_new_tokens=int(rng.integers(1, options.most_new_tokens + 1)),
            max_denoising_steps=options.steps,
            seed=options.seed + i,
        )
        events = stream_generate(model, tokenizer, prompt, settings=settings)
        last = deque(events, maxlen=1).pop()  # keeps no event but the last
        if not isinstance(last, Finished):
            raise SystemExit(f"generation {i + 1} ended with {last}")
        new_tokens += last.new_tokens
        canvases += last.canvases
        resident.append(current_rss_bytes())
        if (i + 1) % WARMUP == 0:
            print(
                f"after {i + 1}: {resident[-1]:,} bytes resident, "
                f"{mx.get_active_memory():,} in MLX arrays, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    base, rest = resident[WARMUP - 1], resident[WARMUP:]
    growth = max(rest) / base - 1
    passed = growth < BOUND and options.generations >= 500
    print(f"growth: highest {growth:+.2%}, last {resident[-1] / base - 1:+.2%}")
    line = record(
        "memory_growth",
        what="resident memory of one process over generations of random lengths",
        shape={
            "generations": options.generations,
            "prompt_tokens": [1, options.longest_prompt],
            "max_new_tokens": [1, options.most_new_tokens],
            "max_denoising_steps": options.steps,
        },
        dtype=str(model.dtype).removeprefix("mlx.core."),
        units={"resident": "bytes", "growth": "share of what was resident after generation 50"},
        bound=BOUND,
        growth_highest=round(growth, 5),
        growth_last=round(resident[-1] / base - 1, 5),
        resident_every_50=resident[WARMUP - 1 :: WARMUP],
        resident_first=resident[0],
        mlx_active_bytes=mx.get_active_memory(),
        new_tokens=new_tokens,
        canvases=canvases,
        seconds=round(time.perf_counter() - started, 1),
        seed=options.seed,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
