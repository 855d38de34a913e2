"""How much memory does one LoRA step of the 26B model take?

Computed from the config: weights, adapters with their gradients and two moments, what every layer
keeps for the way back (all of it, or with gradient checkpointing only what goes in), one layer's
arrays and their gradients while it is gone through, and the slices of logits. Then held against the
measured peak of a step of two layers of the real width and the real vocabulary, float32, on the CPU
backend, with and without checkpointing.

Bound: the computed peak above the weights is within 30% of the measured one. Floor: the weights.

- Tokens of a step: the causal pass reads the prompt and the answer's canvases, the canvas pass one
  canvas; the first look of self-conditioning keeps nothing.
- On a GPU 16-bit elements halve what is kept, but for what is float32 there too: attention's heads
  before their rounding, and the inputs that adapters read. None of this was measured in 16 bits.
- Attention's scores are counted as kept, which MLX's fused kernel, where it exists, does not need.
- Packed weights stay packed on a GPU. The CPU backend unpacks them for training, to 103 GB here.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/train_memory.py
    python bench/train_memory.py --predict-only --prompt-tokens 1024 --batch 4
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, peak_rss_bytes, record
from make_checkpoint import official_tensors, packed_tensors
from runtimes import checkpoint, read_config

from mlx_diffgemma import load_model
from mlx_diffgemma.config.model import LayerConfig, ModelConfig, TextConfig
from mlx_diffgemma.config.training import LoraParameters, TrainSettings
from mlx_diffgemma.doctor.published import config_26b
from mlx_diffgemma.train.checkpoint import trained_weights
from mlx_diffgemma.train.data import Example
from mlx_diffgemma.train.objective import _LOGITS_BYTES
from mlx_diffgemma.train.trainer import Trainer, prepare

CANVAS, BOUND = 256, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict-only", action="store_true", help="measure nothing")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bound: computed and measured peaks above the weights within {BOUND:.0%}", flush=True)
    predicted = predict_26b(options)
    checks: dict[str, Any] = {}
    if not options.predict_only:
        with tempfile.TemporaryDirectory() as scratch:
            checks = check(Path(scratch) / "model", options)
    passed = all(abs(row["computed_over_measured"] - 1) <= BOUND for row in checks.values())
    line = record(
        "train_memory",
        what="peak memory of one LoRA step, computed from the config, and measured on two layers",
        units={"bytes": "bytes", "gb": "1e9 bytes"},
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        canvas=CANVAS,
        rank=options.rank,
        predicted_26b=predicted,
        measured_two_layers=checks,
        peak_rss_bytes=peak_rss_bytes(),
        bound=BOUND,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(not passed)


def predict_26b(options: argparse.Namespace) -> dict[str, Any]:
    raw = config_26b()
    config = ModelConfig.from_dict(raw)
    tensors = {"bf16": official_tensors(raw), "mixed 4-bit": packed_tensors(raw)[0]}
    weights = {
        name: sum(t.nbytes for t in each if "vision" not in t.name)
        for name, each in tensors.items()
    }
    found = {}
    for name, nbytes in weights.items():
        for twice in (False, True):
            parts = above_weights(config.text, options, element_bytes=2, twice=twice)
            total = nbytes + sum(parts.values())
            key = f"{name}{', checkpointed' if twice else ''}"
            found[key] = {"weights": nbytes, **parts, "gb": round(total / 1e9, 2)}
            listed = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
            print(f"26B, {key}: {total / 1e9:.2f} GB (weights {nbytes / 1e9:.2f}, {listed})")
    return found


def above_weights(
    text: TextConfig, options: argparse.Namespace, *, element_bytes: int, twice: bool
) -> dict[str, int]:
    """What a step takes above the weights, part by part."""
    B, S = options.batch, options.prompt_tokens
    causal, canvas = B * (S + CANVAS), B * CANVAS
    adapters = sum(adapter_weights(text, layer, options.rank) for layer in text.layers)
    adapters += options.rank * 3 * (text.hidden_size + text.intermediate_size)
    kept = alive = 0
    for layer in text.layers:
        # Keys that each query meets: its own past on average, or text and canvas.
        wide = elements_always_wide(text, layer) if element_bytes == 2 else 0
        whole = causal * (elements(text, layer, (S + CANVAS) / 2) + wide)
        whole += canvas * (elements(text, layer, S + CANVAS) + wide)
        state = text.hidden_size + 2 * layer.num_key_value_heads * layer.head_dim
        kept += (causal + canvas) * state if twice else whole
        # One pass of one layer is gone through at a time: its arrays and as many gradients.
        through = max(causal, canvas) * (elements(text, layer, S + CANVAS) + wide)
        alive = max(alive, (2 if twice else 1) * through)
    # Outputs, capped, exponents, and gradients of two of them.
    logits = 5 * min(_LOGITS_BYTES, 4 * causal * text.vocab_size)
    return {
        "adapters": 4 * 4 * adapters,  # float32: weights, gradients, two moments
        "kept": int(element_bytes * kept),
        "one layer": int(element_bytes * alive),
        "logits": logits,
    }


def adapter_weights(text: TextConfig, layer: LayerConfig, rank: int) -> int:
    M, D = text.hidden_size, text.intermediate_size
    N, K, H = text.num_attention_heads, layer.num_key_value_heads, layer.head_dim
    keys_and_values = (2 if layer.is_sliding else 1) * (M + K * H)
    return rank * (2 * (M + N * H) + keys_and_values + 3 * (M + D))


def elements(text: TextConfig, layer: LayerConfig, keys: float) -> int:
    """Numbers that one token leaves behind in a layer for the way back."""
    M, D, F, k = (
        text.hidden_size,
        text.intermediate_size,
        text.moe_intermediate_size,
        text.top_k_experts,
    )
    N, K, H = text.num_attention_heads, layer.num_key_value_heads, layer.head_dim
    attention = {
        "input and its norm": 2 * M,
        "projections, as parts and as one": 2 * (N + 2 * K) * H,
        "norm of heads, scaled, swapped halves, rotated": (4 * N + 5 * K) * H,
        "scores, masked, exponents, weights": 4 * N * keys,
        "weighted values, over their total": 2 * N * H,
        "output, its norm, the sum": 3 * M,
    }
    dense = {"norm": M, "gate, up, product": 3 * D, "output and norm": 2 * M}
    experts = {
        "norm": M,
        "rows": k * M,
        "gate and up": 2 * k * F,
        "product": k * F,
        "outputs, sorted back": 2 * k * M,
        "weighted": k * M,
        "sum, norms, sums": 4 * M,
    }
    return int(sum(sum(part.values()) for part in (attention, dense, experts)))


def elements_always_wide(text: TextConfig, layer: LayerConfig) -> int:
    """What one token leaves behind in float32 where all else has 16 bits, beyond its 16: counted
    once more."""
    M, D = text.hidden_size, text.intermediate_size
    N, K, H = text.num_attention_heads, layer.num_key_value_heads, layer.head_dim
    heads, read_by_adapters = 2 * (N + 2 * K) * H, 2 * (5 * M + N * H + D)
    return heads + read_by_adapters


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two layers of the real width: what a step takes, and what was computed."""
    checkpoint(folder, "real", "dense", canvas=CANVAS)
    config = ModelConfig.from_dict(read_config(folder))
    rng = np.random.default_rng(0)
    found = {}
    for twice in (False, True):
        model = load_model(folder, fused=False)
        settings = TrainSettings(
            batch_size=options.batch,
            iters=1,
            lora_parameters=LoraParameters(rank=options.rank),
            grad_checkpoint=twice,
            self_conditioning_probability=0.0,
        )
        prepare(model, settings)
        examples = [
            Example(
                rng.integers(0, config.text.vocab_size, options.prompt_tokens, dtype=np.int32),
                rng.integers(0, config.text.vocab_size, CANVAS, dtype=np.int32),
            )
            for _ in range(options.batch)
        ]
        trainer = Trainer(model, examples, [], settings, folder / "run", eos_token_id=1)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        list(trainer.run())
        measured = mx.get_peak_memory() - before
        parts = above_weights(config.text, options, element_bytes=4, twice=twice)
        expected = sum(array.nbytes for array in trained_weights(model).values())
        assert abs(parts["adapters"] - 4 * expected) < 1e-6 * expected, "adapters are counted"
        computed = sum(parts.values()) - 2 * expected  # weights and moments were there before
        row = {
            "weights_bytes": before,
            "measured_bytes": measured,
            "computed_bytes": computed,
            **parts,
            "computed_over_measured": round(computed / measured, 3),
        }
        found["checkpointed" if twice else "plain"] = row
        print(row, flush=True)
        del model, trainer
    return found


if __name__ == "__main__":
    main()
