"""Is our converter at least as fast as mlx-vlm's, in a third of its memory?

Bound: median wall time not above that of `mlx_vlm.convert`, and peak resident memory (`ru_maxrss`)
at most a third of its. Floor: the source must be read and the result written once.

A 4-layer slice of the 26B model at its real widths and vocabulary, with random values, packed to 4
bits by each in turn, in processes of their own, imports included: ours, theirs, theirs, ours. Both
leave vision alone; they differ in the self-conditioning block, 8-bit here and 4-bit there (18
million weights of 4,000). OpenBLAS is preloaded for both where it is installed. Modules that both
pack alike must be bit-equal.

Needs 13 GB of disk, and for mlx-vlm the memory that it takes.

    python bench/convert_speed.py [--layers 4] [--vocabulary 262144]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import finish, record
from convert_interop import equal_modules
from make_checkpoint import write_checkpoint

from mlx_diffgemma import bundled_model
from mlx_diffgemma.doctor.published import config_26b

OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0")
SHARE = 1 / 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary one")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = write_source(Path(scratch) / "source", options.layers, options.vocabulary)
        for maker in ("ours", "theirs", "theirs", "ours"):
            out = Path(scratch) / maker
            shutil.rmtree(out, ignore_errors=True)
            read_through(source)
            runs[maker].append(convert(maker, source, out))
            print(maker, runs[maker][-1], file=sys.stderr, flush=True)
        alike, same = equal_modules(Path(scratch) / "ours", Path(scratch) / "theirs")
        source_bytes = sum(path.stat().st_size for path in source.iterdir())
    seconds = {maker: median(run["seconds"] for run in found) for maker, found in runs.items()}
    peaks = {maker: max(run["peak_bytes"] for run in found) for maker, found in runs.items()}
    passed = (
        seconds["ours"] <= seconds["theirs"]
        and peaks["ours"] <= SHARE * peaks["theirs"]
        and alike == same > 0
    )
    print(
        f"ours {seconds['ours']:.1f} s and {peaks['ours'] / 1e9:.2f} GB, theirs "
        f"{seconds['theirs']:.1f} s and {peaks['theirs'] / 1e9:.2f} GB: "
        f"{seconds['ours'] / seconds['theirs']:.2f} of the time, "
        f"{peaks['ours'] / peaks['theirs']:.2f} of the memory; "
        f"{same} of {alike} modules packed alike are bit-equal"
    )
    line = record(
        "convert_speed",
        what="time and peak resident memory of a 4-bit conversion, by mlx_vlm.convert and by ours",
        shape={"layers": options.layers, "vocabulary": options.vocabulary, "bytes": source_bytes},
        dtype="bfloat16 to 4-bit affine in groups of 64, 8-bit outside the experts",
        units={"seconds": "wall time, imports included", "peak_bytes": "ru_maxrss"},
        preloaded_for_both=OPENBLAS.name if OPENBLAS.exists() else None,
        bound={"time": 1, "memory": SHARE},
        runs=runs,
        time_ratio=round(seconds["ours"] / seconds["theirs"], 3),
        memory_ratio=round(peaks["ours"] / peaks["theirs"], 3),
        modules_alike_and_bit_equal=[alike, same],
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def write_source(folder: Path, layers: int, vocabulary: int) -> Path:
    """The official layout; a small tower, and the bundled tokenizer, which mlx-vlm wants to see."""
    config: dict[str, Any] = config_26b()
    text = config["text_config"]
    text["num_hidden_layers"], text["vocab_size"] = layers, vocabulary
    text["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    config["vision_config"]["num_hidden_layers"] = 1
    for key in ("boi_token_id", "image_token_id", "eoi_token_id"):
        config[key] = min(config[key], vocabulary - 1)
    write_checkpoint(folder, layout="official", config=config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled_model() / name, folder)
    return folder


def read_through(folder: Path) -> None:
    """Into the page cache, as far as it fits, for both alike; and what is still to be written
    goes to the disk."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def convert(maker: str, source: Path, out: Path) -> dict[str, float]:
    package = "mlx_diffgemma" if maker == "ours" else "mlx_vlm"
    command = [sys.executable, "-m", package, "convert"]
    command += ["--hf-path", str(source), "--mlx-path", str(out), "-q"]
    if maker == "theirs":
        command += ["--q-bits", "4", "--q-group-size", "64"]
    environment = dict(os.environ)
    if OPENBLAS.exists():
        environment["LD_PRELOAD"] = str(OPENBLAS)
    start = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    main()
