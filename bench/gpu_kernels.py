"""Compiles MLX's packed products for a CUDA card ahead of a benchmark, many at a time.

MLX compiles such a kernel when it is first used, for each form of the weights and range of rows,
and keeps it on disk (MLX_PTX_CACHE_DIR) for later processes. On an H200 one took about 40 s
(LEDGER.md, "A CUDA card"), longer than all that is measured, so each is compiled here
by a process of its own. On other devices the same products run, and nothing is kept.

    python bench/gpu_kernels.py
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time

import mlx.core as mx
from make_checkpoint import packed_tensors

from mlx_diffgemma.doctor.published import config_26b

FORMS = ((4, "affine", 64), (8, "affine", 64), (4, "nvfp4", 16))  # bits, mode, group size
ROWS = (1, 32, 256, 1024, 2048)  # the last tokens, few rows, a canvas, prefill


def compile_ahead(seconds: float) -> dict[str, float]:
    """Multiply once in every form, each in a process of its own, as many at a time as there are
    cores. Return the seconds of each that ended; the others are stopped after `seconds`."""
    waiting = [(form, rows) for form, rows in itertools.product(FORMS, ROWS)]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    done: dict[str, float] = {}
    end = time.monotonic() + seconds
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < (os.cpu_count() or 1):
                (bits, mode, group), rows = waiting.pop(0)
                command = [sys.executable, __file__, "--one", *map(str, (bits, mode, group, rows))]
                started = time.monotonic()
                running[f"{mode} {bits} bits, {rows} rows"] = (
                    subprocess.Popen(command, stdout=subprocess.DEVNULL),
                    started,
                )
            for name, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        print(f"{name}: ended with {process.returncode}", flush=True)
                    else:
                        done[name] = round(time.monotonic() - started, 1)
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
    return done


def shapes(bits: int, limit: int = 1 << 25) -> list[tuple[int, int]]:
    """Return outputs and inputs of the published model's packed matrices of so many bits, but of
    the largest ones only their form."""
    tensors, _ = packed_tensors(config_26b())
    packed = [t for t in tensors if t.fill == "packed" and t.bits == bits and len(t.shape) == 2]
    found = {(rows, words * 32 // bits) for rows, words in (t.shape for t in packed)}
    return sorted({(min(rows, limit // inputs), inputs) for rows, inputs in found})


def multiply(bits: int, mode: str, group: int, rows: int) -> None:
    """One product of each shape, with `rows` rows."""
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    for outputs, inputs in shapes(bits):
        weight = mx.random.normal((outputs, inputs)).astype(dtype)
        packed = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
        x = mx.random.normal((rows, inputs)).astype(dtype)
        mx.eval(
            mx.quantized_matmul(x, *packed, transpose=True, group_size=group, bits=bits, mode=mode)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=150, help="at most")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        bits, mode, group, rows = options.one
        return multiply(int(bits), mode, int(group), int(rows))
    done = compile_ahead(options.seconds)
    for name, seconds in done.items():
        print(f"{name:32}{seconds:8.1f} s")
    if len(done) < len(FORMS) * len(ROWS):
        sys.exit(f"{len(FORMS) * len(ROWS) - len(done)} were not done in {options.seconds:.0f} s")


if __name__ == "__main__":
    main()
