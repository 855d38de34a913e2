"""Do our conversions load in mlx-vlm and give our logits, and do mlx-vlm's load here?

Bound: largest difference of 1e-3 between softcapped logits (which lie within -30 .. 30), both sides
in float32, for six packings of the bundled model written by our converter, and for six written by
`mlx_vlm.convert`. Floor: both sides run the same MLX kernels, so 0 is possible; summing the experts
in another order costs about 1e-6 per layer. Compared as in mlx_vlm_logits.py: the first step, a
self-conditioned step, and the first step after a commit.

Where a module is packed alike by both converters, its arrays must be bit-equal.

    python bench/convert_interop.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import finish, record
from mlx_vlm.convert import convert as convert_there
from mlx_vlm_logits import BOUND, STEPS, compare

from mlx_diffgemma import bundled_model
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.convert import convert as convert_here

OURS: dict[str, dict[str, Any]] = {
    "mixed 4-bit": {"quantize": True},
    "uniform 4-bit": {"quantize": True, "recipe": "uniform"},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "8-bit": {"quantize": True, "q_bits": 8},
    "bf16": {},
}
THEIRS: dict[str, dict[str, Any]] = {
    "4-bit": {"quantize": True, "q_mode": "affine", "q_bits": 4, "q_group_size": 64},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4", "q_bits": None, "q_group_size": None},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8", "q_bits": None, "q_group_size": None},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4", "q_bits": None, "q_group_size": None},
    "8-bit": {"quantize": True, "q_mode": "affine", "q_bits": 8, "q_group_size": 64},
    "bf16": {},
}
ALIKE = (("mixed 4-bit", "4-bit"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("8-bit", "8-bit"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bound: largest difference of logits {BOUND:g} in float32")
    results: dict[str, dict[str, Any]] = {"ours": {}, "theirs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for maker, packings in (("ours", OURS), ("theirs", THEIRS)):
            for name, arguments in packings.items():
                folder = place(scratch, maker, name)
                if maker == "ours":
                    convert_here(bundled_model(), folder, **arguments)
                else:
                    with contextlib.redirect_stdout(io.StringIO()):
                        convert_there(str(bundled_model()), str(folder), **arguments)
                results[maker][name] = found = compare(folder, options.prompts)
                row = ", ".join(f"{step} {found['largest'][step]:.2e}" for step in STEPS)
                print(f"{maker}, {name} ({found['packing']}): largest difference {row}", flush=True)
        equal = {
            ours: equal_modules(place(scratch, "ours", ours), place(scratch, "theirs", theirs))
            for ours, theirs in ALIKE
        }
    print("modules packed alike by both, and of these bit-equal:", equal)
    passed = all(
        max(found["largest"].values()) <= BOUND
        for packings in results.values()
        for found in packings.values()
    ) and all(alike == same > 0 for alike, same in equal.values())
    line = record(
        "convert_interop",
        what="largest absolute difference between mlx-vlm's softcapped logits and ours, on "
        "checkpoints by either converter",
        shape={"prompts": options.prompts, "batch": 1, "vocabulary": 384, "canvas": 64},
        dtype="float32 outside the packed weights",
        units="logits within -30 .. 30",
        bound=BOUND,
        made_by=results,
        modules_alike_and_bit_equal=equal,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def place(scratch: str, maker: str, name: str) -> Path:
    return Path(scratch) / f"{maker}-{name.replace(' ', '-')}"


def equal_modules(ours: Path, theirs: Path) -> tuple[int, int]:
    """Modules with the same setting on both sides; and those whose arrays are all bit-equal."""
    arrays = [load_arrays(folder) for folder in (ours, theirs)]
    configs = [ModelConfig.from_folder(folder).quantization for folder in (ours, theirs)]
    alike = same = 0
    for name in arrays[0]:
        module, _, leaf = name.rpartition(".")
        settings = [config.for_module(module) for config in configs if config is not None]
        if leaf != "scales" or name not in arrays[1] or settings[0] != settings[1]:
            continue
        alike += 1
        same += all(
            bool(mx.array_equal(arrays[0][key], arrays[1][key]).item())
            for key in (f"{module}.weight", name, f"{module}.biases")
            if key in arrays[0] or key in arrays[1]
        )
    return alike, same


def load_arrays(folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    return arrays


if __name__ == "__main__":
    main()
