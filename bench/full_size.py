"""Does a 26B-shaped checkpoint in the published 4-bit layout load and denoise within 17.0e9 bytes?

Bound: peak resident set (`ru_maxrss`) of at most 17.0e9 bytes, finite logits, a canvas of 16 or
more. Ceiling below which no run can stay: the text tensors themselves, 15.40e9 bytes on disk.

    python bench/full_size.py --scratch /path/with/17/GB     # random packed weights
    python bench/full_size.py --sparse                       # packed weights as holes, 1.5 GB
    python bench/full_size.py --folder /tmp/26b-4bit         # a checkpoint that is already there
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import finish, peak_rss_bytes, record
from make_checkpoint import write_checkpoint

from mlx_diffgemma import GenerationSettings, load_model
from mlx_diffgemma.checkpoint.headers import read_headers
from mlx_diffgemma.checkpoint.memory import generation_limits
from mlx_diffgemma.checkpoint.names import Ignored, translate
from mlx_diffgemma.denoise.schedule import temperature

PEAK_BYTES = 17.0e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="checkpoint to load; written where left out")
    parser.add_argument(
        "--scratch", type=Path, help="where the checkpoint is written, then deleted"
    )
    parser.add_argument("--sparse", action="store_true", help="packed weights as holes")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--canvas", type=int, default=16)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bound: peak resident set at most {PEAK_BYTES:,.0f} bytes, finite logits")
    if options.folder is not None:
        sys.exit(0 if measure(options.folder, options) else 1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        started = time.perf_counter()
        written = write_checkpoint(Path(folder), layout="4bit", sparse=options.sparse)
        print(
            f"wrote {written.tensors:,} tensors of {written.tensor_bytes:,} bytes, "
            f"{written.packed_modules} packed modules, in {time.perf_counter() - started:.0f} s; "
            f"peak so far {peak_rss_bytes():,} bytes"
        )
        passed = measure(Path(folder), options)
    sys.exit(0 if passed else 1)


def measure(folder: Path, options: argparse.Namespace) -> bool:
    """Loads, prefills, denoises once without and once with self-conditioning."""
    text_bytes = sum(
        info.nbytes
        for name, info in read_headers(folder).items()
        if not isinstance(translate(name), Ignored)
    )
    print(f"text tensors on disk: {text_bytes:,} bytes")
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {"before": peak_rss_bytes()}

    def lap(what: str, started: float) -> None:
        seconds[what] = round(time.perf_counter() - started, 2)
        peaks[what] = peak_rss_bytes()
        print(f"{what}: {seconds[what]:.1f} s, peak resident {peaks[what]:,} bytes")

    started = time.perf_counter()
    model = load_model(folder)
    lap("load", started)
    rng = np.random.default_rng(0)
    vocab_size = model.config.text.vocab_size
    prompt, canvas = (
        mx.array(rng.integers(0, vocab_size, (1, count)).astype(np.int32))
        for count in (options.prompt_tokens, options.canvas)
    )
    settings = GenerationSettings().resolve(model.config)
    with generation_limits():
        started = time.perf_counter()
        context = model.prefill(prompt)
        mx.eval(context.arrays)
        lap("prefill", started)
        started = time.perf_counter()
        first = model.denoise(canvas, context) / temperature(0, settings)
        mx.eval(first)
        lap("denoise", started)
        started = time.perf_counter()
        soft = model.soft_embedding(first)
        second = model.denoise(canvas, context, self_conditioning=soft)
        mx.eval(second)
        lap("self_conditioned_denoise", started)
    finite, spread = [], []
    for logits in (first, second):
        if logits.shape != (1, options.canvas, vocab_size):
            raise SystemExit(f"logits have shape {logits.shape}")
        finite.append(bool(mx.isfinite(logits).all().item()))
        spread.append(round(float(mx.sqrt(mx.var(logits)).item()), 3))
    peak = peak_rss_bytes()
    passed = all(finite) and peak <= PEAK_BYTES and options.canvas >= 16
    print(
        f"finite: {finite}, standard deviation of logits: {spread}; "
        f"peak resident {peak:,} bytes: {'within' if passed else 'NOT within'} the bound"
    )
    line = record(
        "full_size",
        what="one denoise step of a 26B-shaped checkpoint, published 4-bit layout",
        shape={"prompt_tokens": options.prompt_tokens, "canvas": options.canvas},
        dtype="4-bit and 8-bit affine, groups of 64; the rest "
        + str(model.dtype).removeprefix("mlx.core."),
        packed_weights="holes" if options.sparse else "random",
        units={"peak": "bytes", "seconds": "s, one run, file partly in the page cache"},
        text_tensor_bytes=text_bytes,
        peak_rss_bytes=peak,
        bound_bytes=int(PEAK_BYTES),
        peak_after=peaks,
        seconds=seconds,
        finite=finite,
        logits_std=spread,
        passed=passed,
    )
    finish(line, save=options.save)
    return passed


if __name__ == "__main__":
    main()
