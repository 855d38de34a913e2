"""Does converting the published 26B checkpoint stay within 4 GiB, and put every value in place?

Bounds: `--dry-run` in 10 s; peak resident memory (`ru_maxrss`) of the conversion at most 4 GiB; the
size equal to the arithmetic, 16,556,429,016 bytes of tensors for the default recipe: experts 4-bit,
everything else 8-bit, norms, scalars and vision bf16.

The source has the published shapes and lengths as sparse files, with random rows written into every
kind of tensor at three places or more. Needs 17 GB of disk.

    python bench/convert_full_size.py [--folder /tmp/somewhere]
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import finish, record
from make_checkpoint import write_checkpoint

from mlx_diffgemma.checkpoint.headers import TensorInfo, read_headers
from mlx_diffgemma.convert.sources import open_checkpoint

EXPECTED_BYTES = 16_556_429_016
PEAK_BOUND = 4 * 2**30
DRY_RUN_BOUND = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary one")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        facts = measure(Path(scratch))
    finish(record("convert_full_size", **facts), save=arguments.save)
    if not facts["ok"]:
        raise SystemExit("a bound was missed")


def measure(scratch: Path) -> dict[str, object]:
    """Converts once, in a process of its own, and looks at every written row."""
    source, result = scratch / "source", scratch / "result"
    write_checkpoint(source, layout="official", sparse=True)
    spots = write_rows(read_headers(source))
    dry_seconds = timed("--hf-path", str(source), "-q", "--dry-run")
    seconds = timed("--hf-path", str(source), "--mlx-path", str(result), "-q")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    nbytes = sum(info.nbytes for info in read_headers(result).values())
    wrong = check_rows(spots, source, result)
    verify_seconds = timed("--mlx-path", str(result), "--verify")
    shutil.rmtree(result)
    ok = (
        dry_seconds <= DRY_RUN_BOUND
        and peak <= PEAK_BOUND
        and nbytes == EXPECTED_BYTES
        and not wrong
    )
    return {
        "dry_run_s": round(dry_seconds, 2),
        "dry_run_bound_s": DRY_RUN_BOUND,
        "convert_s": round(seconds, 1),
        "verify_s": round(verify_seconds, 1),
        "peak_bytes": peak,
        "peak_bound_bytes": PEAK_BOUND,
        "tensor_bytes": nbytes,
        "expected_bytes": EXPECTED_BYTES,
        "rows_checked": len(spots),
        "rows_wrong": wrong,
        "ok": ok,
    }


def write_rows(tensors: dict[str, TensorInfo]) -> dict[tuple[str, int], np.ndarray]:
    """Random bf16 values in the first, middle and last row, in three tensors of each kind."""
    rng = np.random.default_rng(0)
    kinds: dict[str, list[str]] = {}
    for name in tensors:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    spots = {}
    for names in kinds.values():
        for name in {names[0], names[len(names) // 2], names[-1]}:
            info = tensors[name]
            width = info.shape[-1]
            rows = info.elements // width
            for row in {0, rows // 2, rows - 1}:
                values = rng.standard_normal(width, dtype=np.float32).view(np.uint32)
                half = ((values + 0x8000) >> 16).astype(np.uint16)
                with info.file.open("r+b") as file:
                    file.seek(info.start + row * width * 2)
                    file.write(half.tobytes())
                spots[name, row] = (half.astype(np.uint32) << 16).view(np.float32)
    return spots


def check_rows(spots: dict[tuple[str, int], np.ndarray], source: Path, result: Path) -> list[str]:
    """Rows that are not, after unpacking, what packing them alone gives; and exact where bf16."""
    before, after = open_checkpoint(source), open_checkpoint(result)
    place = {(i.file, i.start): n for n, t in before.tensors.items() for i in t.infos}
    wrong = []
    for (name, row), values in spots.items():
        info = before.stored[name]
        target = after.tensors[place[info.file, info.start]]
        inner = int(np.prod(target.shape[1:-1], dtype=int))
        if len(target.shape) == 1:
            found = target.read(0, target.shape[0])
        else:
            found = target.read(row // inner, row // inner + 1).reshape(-1, target.shape[-1])
            found = found[row % inner]
        expected = mx.array(values).astype(mx.bfloat16)
        if (setting := getattr(target, "setting", None)) is not None:
            how = {"group_size": setting.group_size, "bits": setting.bits, "mode": setting.mode}
            weight, scales, biases = mx.quantize(expected[None], **how)
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            expected = mx.dequantize(weight, scales, biases, **how)[0]
        if not mx.array_equal(found, expected).item():
            wrong.append(f"{name} row {row}")
    return wrong


def timed(*arguments: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "mlx_diffgemma", "convert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    print(json.dumps(arguments), *done.stdout.splitlines()[-12:], sep="\n")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
