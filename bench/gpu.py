"""What does a denoise step of the 26B shape cost on a CUDA card: ours, mlx-vlm and transformers?

All 30 layers with made-up weights, drawn on the card, so that no checkpoint is needed: the
published mix of 4 and 8 bits, the same with nvfp4 for the 4 bits, and bfloat16; transformers in
bfloat16 on torch. Behind 1,024 and 8,192 tokens: prefill, and a self-conditioned step over a canvas
of 256 with its sampler, as in `step.py`; ours with four rows too, and part by part. Peak memory is
MLX's or torch's own count. Beside it the doctor's whole examination of the card.

First the kernels of packed products are compiled (gpu_kernels.py). Every case is a process of its
own with a limit of time, the most telling ones first; what does not fit into --minutes is left out
and named. Checked: ours and mlx-vlm choose the same tokens on the first step of one canvas, from
the same weights. No bound. Floor: each part's multiplications or bytes at the card's published
peaks.

--shape small runs the same cases on any machine in a minute or two, the CPU backend too.

    python bench/gpu.py --save
    python bench/gpu.py --shape small
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import finish, record
from gpu_kernels import compile_ahead
from make_checkpoint import Tensor, official_tensors, packed_tensors
from mlx.utils import tree_flatten
from runtimes import (
    PREFILL_STEP,
    SHAPES,
    TINY_TOWER,
    Arrays,
    MlxVlm,
    Ours,
    Runtime,
    Transformers,
    compute_dtype,
    read_config,
    text_tokens,
)
from step import floor_ms, peak_rates, step_work

from mlx_diffgemma import GenerationSettings, denoise_tokens
from mlx_diffgemma.checkpoint.memory import generation_limits
from mlx_diffgemma.checkpoint.names import translate
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.doctor.published import config_26b
from mlx_diffgemma.doctor.speed import step_parts
from mlx_diffgemma.events import CanvasCommitted, PrefillDone
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.model.fused import fuse

HERE = Path(__file__).parent
LAYOUTS = ("mixed", "bf16", "nvfp4")
ROWS = 4
SMALL = {
    "vocab_size": 4096,
    "num_experts": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
CASE_SECONDS = 100  # at most, of one case
KERNEL_SECONDS = 150
DOCTOR_SECONDS = 120
NVFP4_GROUP = 16
NVFP4_SCALES = (1, 4)  # codes of E4M3 below its normal range: 1/512 to 3/512


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of every case is run."""

    contexts: tuple[int, int]  # tokens before the canvas
    canvas: int
    steps: int
    rounds: int


PLANS = {"real": Plan((1024, 8192), 256, 9, 3), "small": Plan((64, 160), 32, 2, 1)}


@dataclass(frozen=True, slots=True)
class Case:
    """A runtime on one form of the weights."""

    weights: str
    runtime: str

    @property
    def name(self) -> str:
        return f"{self.weights} {self.runtime}"


CASES = (
    Case("mixed", "ours"),
    Case("mixed", "mlx-vlm"),
    Case("bf16", "ours"),
    Case("bf16", "transformers"),
    Case("bf16", "mlx-vlm"),
    Case("nvfp4", "ours"),
    Case("nvfp4", "mlx-vlm"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("real", "small"), default="real")
    parser.add_argument("--minutes", type=float, default=8, help="of everything, at most")
    parser.add_argument("--only", action="append", help="cases whose name has this in it")
    parser.add_argument("--no-doctor", action="store_true", help="without the doctor")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        weights, runtime, into, seconds = options.case
        faulthandler.dump_traceback_later(float(seconds))  # tells where it stood when it is stopped
        return run_case(Case(weights, runtime), Path(into), options.shape)
    started = time.monotonic()
    rates = peak_rates()
    print(
        f"{mx.device_info().get('device_name')}: {rates['flops'] / 1e12:,.2f} TFLOP/s", flush=True
    )

    def left() -> float:
        return 60 * options.minutes - (time.monotonic() - started)

    wanted = [c for c in CASES if not options.only or any(o in c.name for o in options.only)]
    is_cuda = bool(mx.cuda.is_available())
    kernels = compile_ahead(min(KERNEL_SECONDS, left() / 2)) if is_cuda else {}
    if kernels:
        slowest = max(kernels, key=kernels.__getitem__)
        print(f"compiled in {len(kernels)} forms, {slowest} in {kernels[slowest]} s", flush=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in wanted:
            found[case.name] = ask(case, Path(scratch), options.shape, left())
            print(f"{case.name}: {summary(found[case.name])}", flush=True)
        doctor = None if options.no_doctor else ask_doctor(Path(scratch), left())
        alike = agreement(found)
    print_table(found)
    failed = [name for name, row in found.items() if "error" in row]
    passed = not failed and all(row["alike"] >= 0.95 for row in alike)
    line = record(
        "gpu",
        what="a denoise step and prefill of the 26B shape with made-up weights, by runtime",
        shape=options.shape,
        units={
            "step_ms": "milliseconds, (canvas of k steps - canvas of 1 step) / (k - 1), median",
            "prefill_ms": "milliseconds of the whole context, median",
            "peak_bytes": "the allocator's, weights included",
            "parts": "ms each, of a step behind 1,024 tokens",
        },
        plan=asdict(PLANS[options.shape]),
        ceiling=rates,
        kernels=kernels,
        cases=found,
        alike=alike,
        doctor=doctor,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def ask(case: Case, scratch: Path, shape: str, seconds: float) -> dict[str, Any]:
    """What a case finds in a process of its own; "error" where it found nothing."""
    limit = min(CASE_SECONDS, seconds)
    if limit < 15:
        return {"error": "left out: no time"}
    into = scratch / f"{case.name.replace(' ', '_')}.jsonl"
    command = [sys.executable, __file__, "--shape", shape, "--case", case.weights, case.runtime]
    command += [str(into), f"{limit - 10:.0f}"]
    error = ""
    try:
        done = subprocess.run(
            command, stderr=subprocess.PIPE, text=True, timeout=limit, check=False
        )
        if done.returncode:
            error = f"ended with {done.returncode}: {done.stderr[-600:]}"
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode()
        stood = said[said.rfind("(most recent call first)") :]  # of the main thread, the last
        error = f"stopped after {limit:.0f} s: {stood[:1500]}"
    row: dict[str, Any] = {}
    if into.exists():  # what was measured before it ended counts
        for line in into.read_text().splitlines():
            row |= json.loads(line)
    return row | ({"error": error} if error else {})


def ask_doctor(scratch: Path, seconds: float) -> Any:
    """The doctor's examination of this machine; None where there is no time for it."""
    if (limit := min(DOCTOR_SECONDS, seconds)) < 15:
        return None
    into = scratch / "doctor.json"
    command = [sys.executable, "-m", "mlx_diffgemma", "doctor", "--json", str(into)]
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        print(f"doctor: stopped after {limit:.0f} s", flush=True)
    return json.loads(into.read_text()) if into.exists() else None


def run_case(case: Case, into: Path, shape: str) -> None:
    """Measure one case, and write each result as soon as it is known."""

    def tell(**facts: Any) -> None:
        with into.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    plan, config = PLANS[shape], shape_config(shape, case.weights)
    folder = Path(tempfile.mkdtemp(dir=into.parent))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    started = time.perf_counter()
    runtime = build(case, config, folder)
    tell(build_seconds=round(time.perf_counter() - started, 1), weight_bytes=weight_bytes(runtime))
    if not isinstance(runtime, Transformers):
        tokens = np.array(text_tokens(folder, plan.canvas, 1))
        logits = runtime.first_logits(text_tokens(folder, plan.contexts[0]), tokens)
        tell(first_tokens=logits.argmax(axis=-1).tolist())
    weights, rates = "dense" if case.weights == "bf16" else "mixed", peak_rates()
    for context in plan.contexts:
        ids = text_tokens(folder, context)
        started = time.perf_counter()
        runtime.run(ids, 2)  # kernels are compiled
        warm = time.perf_counter() - started
        pairs = [(runtime.run(ids, 1), runtime.run(ids, plan.steps)) for _ in range(plan.rounds)]
        each = [1e3 * (b.seconds - a.seconds) / (b.steps - a.steps) for a, b in pairs]
        element = 4 if compute_dtype(folder) == mx.float32 else 2
        floor = floor_ms(step_work(config, weights, context, element), rates)
        row = {
            "step_ms": round(median(each), 3),
            "step_ms_rounds": [round(ms, 3) for ms in each],
            "floor_ms": round(floor, 3),
            "prefill_ms": round(1e3 * median(r.prefill_seconds for p in pairs for r in p), 2),
            "peak_bytes": peak_bytes(runtime, pairs[-1][1].peak_bytes),
            "warm_seconds": round(warm, 1),
        }
        tell(**{f"context {context}": row})
    if isinstance(runtime, Ours):
        tell(**{f"rows {ROWS}": four_rows(runtime.model, folder, plan)})
        published = ModelConfig.from_folder(folder)
        parts = [asdict(part) for part in step_parts(runtime.model, published, None)]
        tell(parts={p["name"]: [p["count"], round(p["ms"], 4)] for p in parts})


def shape_config(shape: str, weights: str) -> dict[str, Any]:
    """config.json of a text-only model."""
    config = config_26b()
    for key in ("vision_config", "boi_token_id", "image_token_id", "eoi_token_id"):
        del config[key]
    if shape == "small":
        config["text_config"] |= SHAPES["scaled"] | SMALL
    config["canvas_length"] = PLANS[shape].canvas
    if weights != "bf16":
        _, packing = packed_tensors(config)
        if weights == "nvfp4":
            packing = {
                k: v | {"mode": "affine"} if isinstance(v, dict) else v for k, v in packing.items()
            }
            packing |= {"group_size": NVFP4_GROUP, "mode": "nvfp4"}
        config["quantization"] = config["quantization_config"] = packing
    return config


def build(case: Case, config: dict[str, Any], folder: Path) -> Runtime:
    """A runtime with the made-up weights of its form; the same ones for ours and for mlx-vlm."""
    if case.runtime == "transformers":
        return made_up_transformers(folder)
    arrays = dict(made_up(config, compute_dtype(folder)))
    if case.runtime == "mlx-vlm":
        return MlxVlm.load(folder, Arrays(arrays, 0, sum(a.nbytes for a in arrays.values())))
    published = ModelConfig.from_folder(folder)
    model = DiffusionGemma(published)
    if published.quantization is not None:
        packing = published.quantization

        def packed(path: str, module: nn.Module) -> dict[str, Any] | bool:
            setting = packing.for_module(path) if f"{path}.scales" in arrays else None
            return False if setting is None else asdict(setting)

        nn.quantize(model, class_predicate=packed)
    model.load_weights(list(arrays.items()))
    arrays.clear()
    mx.eval(model.parameters())
    fuse(model)
    model.eval()
    mx.clear_cache()
    return Ours(model)


def made_up(config: dict[str, Any], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Tensors under our names, drawn on the device; values as in `make_checkpoint.py`."""
    nvfp4 = config.get("quantization", {}).get("mode") == "nvfp4"
    tensors = packed_tensors(config)[0] if "quantization" in config else official_tensors(config)
    for i, tensor in enumerate(tensors):
        array = drawn(tensor, mx.random.key(i), nvfp4=nvfp4 and tensor.bits == 4)
        if array is None:
            continue
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        mx.eval(array)
        name = translate(tensor.name)
        assert isinstance(name, str)
        yield name, array


def drawn(tensor: Tensor, key: mx.array, *, nvfp4: bool) -> mx.array | None:
    """One tensor; None for what its packing does not have."""
    shape, levels = tensor.shape, 2**tensor.bits - 1
    match tensor.fill:
        case "packed":  # MLX draws integers by way of floats, of 24 bits
            high, low = (
                mx.random.randint(0, 1 << 16, shape, dtype=mx.uint32, key=k)
                for k in mx.random.split(key)
            )
            return (high << 16) | low
        case "scales" if nvfp4:
            groups = (*shape[:-1], shape[-1] * 64 // NVFP4_GROUP)
            return mx.random.randint(*NVFP4_SCALES, groups, dtype=mx.uint32, key=key).astype(
                mx.uint8
            )
        case "scales":
            return mx.random.uniform(0.9, 1.1, shape, mx.bfloat16, key) * (
                2 * tensor.bound / levels
            )
        case "biases":
            return None if nvfp4 else mx.full(shape, -tensor.bound, mx.bfloat16)
        case "weight":
            return mx.random.uniform(-tensor.bound, tensor.bound, shape, mx.bfloat16, key)
        case "zero":
            return mx.zeros(shape, mx.bfloat16)
    return mx.ones(shape, mx.bfloat16)


def made_up_transformers(folder: Path) -> Transformers:
    """transformers' model with values drawn by torch on its own device."""
    import torch
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
        DiffusionGemmaConfig,
    )
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
    )
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
        DiffusionGemmaForBlockDiffusion,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DiffusionGemmaConfig.from_dict(read_config(folder) | {"vision_config": TINY_TOWER})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = DiffusionGemmaForBlockDiffusion._from_config(config, dtype=dtype)
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() > 1:
                bound = 1 / math.sqrt(values.shape[-1])
                values.uniform_(-bound, bound)
            else:
                values.fill_(1)
    model.generation_config = DiffusionGemmaGenerationConfig.from_pretrained(folder)
    return Transformers(model.eval())


def four_rows(model: DiffusionGemma, folder: Path, plan: Plan) -> dict[str, Any]:
    """Four requests as rows of the same steps; milliseconds of a step for all of them."""
    prompts = [text_tokens(folder, plan.contexts[0], seed) for seed in range(ROWS)]
    each, peak = [], 0
    for round_ in range(1 + plan.rounds):
        seconds = {}
        for steps in (1, plan.steps):
            settings = GenerationSettings(
                max_new_tokens=plan.canvas,
                max_denoising_steps=steps,
                confidence_threshold=0,  # settles nowhere
                prefill_step_size=PREFILL_STEP,
                seed=0,
            )
            started, ran = time.perf_counter(), 0
            with generation_limits():
                for event in denoise_tokens(model, mx.array(prompts, mx.int32), settings):
                    if isinstance(event, PrefillDone):
                        mx.reset_peak_memory()
                    elif isinstance(event, CanvasCommitted):
                        ran += event.steps
            seconds[steps] = time.perf_counter() - started
            assert ran == ROWS * steps, (ran, steps)
        if round_:  # the first one compiles
            each.append(1e3 * (seconds[plan.steps] - seconds[1]) / (plan.steps - 1))
        peak = mx.get_peak_memory()
    return {"step_ms": round(median(each), 3), "peak_bytes": peak}


def weight_bytes(runtime: Runtime) -> int:
    if isinstance(runtime, Transformers):
        return sum(p.numel() * p.element_size() for p in runtime.model.parameters())
    return sum(array.nbytes for _, array in tree_flatten(runtime.model.parameters()))


def peak_bytes(runtime: Runtime, of_mlx: int) -> int | None:
    """The most memory that the allocator of the runtime has given out; None where torch does not
    count, on the CPU."""
    if not isinstance(runtime, Transformers):
        return of_mlx
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def agreement(found: dict[str, Any]) -> list[dict[str, Any]]:
    """How many of the first step's likeliest tokens ours and mlx-vlm have in common."""
    rows = []
    for weights in LAYOUTS:
        pair = [
            found.get(f"{weights} {name}", {}).pop("first_tokens", None)
            for name in ("ours", "mlx-vlm")
        ]
        if None not in pair:
            same = np.mean(np.array(pair[0]) == np.array(pair[1]))
            rows.append({"weights": weights, "alike": round(float(same), 4)})
    return rows


def summary(row: dict[str, Any]) -> str:
    """A case in a line."""
    said = [
        f"{at} {v['step_ms']} ms" for at, v in row.items() if isinstance(v, dict) and "step_ms" in v
    ]
    return ", ".join([*said, *([row["error"]] if "error" in row else [])])


def print_table(found: dict[str, Any]) -> None:
    print(
        f"\n{'weights':9}{'runtime':14}{'behind':>8}{'ms/step':>10}{'floor':>9}"
        f"{'prefill ms':>12}{'peak GB':>9}{'weights GB':>12}"
    )
    for name, row in found.items():
        for at, value in row.items():
            if not (isinstance(value, dict) and "step_ms" in value):
                continue
            peak, weights = value["peak_bytes"], row["weight_bytes"] / 1e9
            print(
                f"{name.split()[0]:9}{name.split()[1]:14}{at.removeprefix('context '):>8}"
                f"{value['step_ms']:>10,.2f}{value.get('floor_ms', float('nan')):>9,.2f}"
                f"{value.get('prefill_ms', float('nan')):>12,.1f}"
                f"{'' if peak is None else f'{peak / 1e9:.2f}':>9}{weights:>12.2f}"
            )


if __name__ == "__main__":
    main()
