"""A cost model: what a step should take on a known chip. It measures nothing, and imports no mlx.

Work is counted from the shapes, part by part; rates of chips are published or assumed. Per part the
greater of FLOPs / rate and bytes / bandwidth counts. There are two sums: "floor" at peak rates with
fused attention, 6.5 passes over the logits and no copies; "MLX" at sustained rates with what MLX
issues today (tile waste, unfused attention, 18.5 passes, copies, launches).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..config.model import LayerConfig, ModelConfig, TextConfig

Kind = Literal["floor", "MLX"]

LAUNCHES_PER_LAYER = 54  # counted by hand over mlx-vlm's code; bench/counts.py counts 53
SCORE_PASSES = 5  # over the scores of unfused attention
SAMPLER_PASSES = {"floor": 6.5, "MLX": 18.5}  # over float32 logits
# Over bf16 activations per layer: norms, adds, gathers.
SMALL_PASSES = {"floor": 12, "MLX": 97}
VECTOR_KERNEL_BELOW = 4  # pairs per expert; below, sorted gather_qmm is not chosen


@dataclass(frozen=True, slots=True)
class Chip:
    """The rates of a chip, published or assumed."""

    name: str
    peak: float  # TFLOPS
    sustained: float
    bandwidth: float  # GB/s
    tile_rows: int | None = None  # rows of a tile of MLX's sorted gather_qmm; None: no waste
    weight_bits: float = 4.5  # affine 4-bit in groups of 64, 16-bit scale and bias

    @property
    def launch_ms(self) -> float:
        """Return the launches of a whole step."""
        return 2.0 if self.tile_rows is None else 5.0


# Sustained fp8 is published nowhere, and is taken as twice that of bf16 on an H100.
CHIPS = (
    Chip("M2 Ultra", 27.2, 21.0, 800, 16),
    Chip("M3 Ultra", 28.6, 20.5, 819, 16),
    Chip("M4 Max", 17.2, 14.5, 546, 16),
    Chip("M5", 17.0, 15.4, 153, 16),
    Chip("M5 Pro", 34.0, 27.0, 307, 16),
    Chip("M5 Max", 70.0, 50.0, 614, 16),
    Chip("RTX 5090 bf16", 209.5, 180, 1792),
    Chip("RTX 5090 nvfp4", 1676, 900, 1792),
    Chip("H100 bf16", 989, 700, 3350),
    Chip("H100 fp8", 1979, 1400, 3350, weight_bits=8),
    Chip("H200 bf16", 989, 780, 4800),
    Chip("H200 fp8", 1979, 1400, 4800, weight_bits=8),
)
M1_ULTRA = Chip("M1 Ultra", 21.2, 16.4, 800, 16)  # rates scaled from M2 Ultra's
M3_MAX = Chip("M3 Max", 14.3, 10.25, 409.5, 16)  # half an M3 Ultra

_MAKERS = re.compile(r"^(Apple|NVIDIA|GeForce)\s+", re.IGNORECASE)
# What may follow a chip's name without making it another chip: "H100 80GB HBM3", but not "H100
# PCIe", "RTX 5090 Laptop GPU" or "M4 Max" after "M4".
_SAME_CHIP = re.compile(r"(\s+(\d+\s?GB|HBM\d\w*|SXM\d?))*", re.IGNORECASE)


def known_chip(device_name: str) -> Chip | None:
    """Return the chip of a device's name as MLX gives it, at bfloat16 rates; None if there are no
    rates for it. A relative of a known chip is another chip: an M4 Pro has no rates here."""
    name = device_name.strip()
    while (shorter := _MAKERS.sub("", name)) != name:
        name = shorter
    for chip in (*CHIPS, M1_ULTRA, M3_MAX):
        own = chip.name.removesuffix(" bf16")
        if name.lower().startswith(own.lower()) and _SAME_CHIP.fullmatch(name[len(own) :]):
            return chip
    return None


@dataclass(frozen=True, slots=True)
class Part:
    """The work of one part of a step."""

    name: str
    flops: float
    bytes: float
    in_commit: bool = True

    def ms(self, chip: Chip, kind: Kind) -> float:
        """Return the greater of the times to compute and to move."""
        rate = chip.peak if kind == "floor" else chip.sustained
        return max(self.flops / rate / 1e9, self.bytes / chip.bandwidth / 1e6)


class Model:
    """The work of a step of one shape."""

    def __init__(self, config: ModelConfig):
        text = config.text
        self.canvas, self.window = config.canvas_length, text.sliding_window
        self.experts, self.picks = text.num_experts, text.top_k_experts
        self.hidden, self.vocab = text.hidden_size, text.vocab_size
        self.layers, self.heads = text.num_hidden_layers, text.num_attention_heads
        self.attention: dict[str, tuple[int, LayerConfig]] = {}  # name: layers, one of them
        for layer in text.layers:
            name = "sliding" if layer.is_sliding else "full"
            self.attention[name] = self.attention.get(name, (0, layer))[0] + 1, layer
        self.parameters = parameters(text)

    def hit(self, rows: int) -> float:
        """Return the expected number of experts that rows x k uniform picks touch."""
        return self.experts * (1 - (1 - 1 / self.experts) ** (rows * self.picks))

    def tile_waste(self, rows: int, tile_rows: int) -> float:
        """Return the factor of work: tiles are run once per expert present in them; sorted rows
        change expert hit - 1 times, almost never between two tiles."""
        tiles = rows * self.picks / tile_rows
        return 1 + (self.hit(rows) - 1) / tiles

    def step(self, rows: int, context: int, chip: Chip, kind: Kind) -> list[Part]:
        """Return a denoise step of `rows` canvas positions, part by part."""
        P, weight, mlx = self.parameters, chip.weight_bits / 8, kind == "MLX"
        logits = rows * self.vocab

        def dense(name: str, key: str, *, in_commit: bool = True) -> Part:
            return Part(name, 2 * rows * P[key], P[key] * weight, in_commit)

        pairs = rows * self.picks
        expert_flops = 2 * pairs * P["experts"] / self.experts
        expert_bytes = P["experts"] * weight * self.hit(rows) / self.experts
        if mlx and chip.tile_rows:
            if pairs // self.experts >= VECTOR_KERNEL_BELOW:
                expert_flops *= self.tile_waste(rows, chip.tile_rows)
            else:  # one pair at a time: each streams its expert
                expert_bytes = P["experts"] * weight * pairs / self.experts
        head = Part(
            "lm_head",
            2 * rows * P["embed_tokens"],
            P["embed_tokens"] * weight + 2 * logits,
            in_commit=False,
        )
        parts = [
            dense("attention projections", "self_attn"),
            dense("dense MLP", "mlp"),
            dense("router", "router"),
            dense("self-conditioning MLP", "self_conditioning", in_commit=False),
            Part("experts", expert_flops, expert_bytes),
            head,
            Part("soft embedding", head.flops, head.bytes, in_commit=False),
        ]
        concatenated = 0.0
        for name, (layers, layer) in self.attention.items():
            keys = rows + (min(context, self.window) if layer.is_sliding else context)
            flops = layers * 4 * rows * keys * self.heads * layer.head_dim
            kv = layers * keys * 2 * layer.num_key_value_heads * layer.head_dim * 2
            scores = layers * SCORE_PASSES * self.heads * rows * keys * 2
            parts.append(Part(f"attention, {name}", flops, kv + scores * mlx))
            concatenated += 2 * kv * mlx
        small = SMALL_PASSES[kind] * self.layers * rows * self.hidden * 2
        return [
            *parts,
            Part("concatenation of keys and values", 0, concatenated),
            Part("sampler", 0, SAMPLER_PASSES[kind] * 4 * logits, in_commit=False),
            Part("norms, adds, gathers", 0, small),
        ]

    def step_ms(self, rows: int, context: int, chip: Chip, kind: Kind) -> float:
        """Return the time of a denoise step."""
        parts = self.step(rows, context, chip, kind)
        return sum(part.ms(chip, kind) for part in parts) + chip.launch_ms * (kind == "MLX")

    def commit_ms(self, rows: int, context: int, chip: Chip, kind: Kind) -> float:
        """Return the time of the encoder over the finished canvas: a step without head and
        sampler."""
        parts = [part for part in self.step(rows, context, chip, kind) if part.in_commit]
        return sum(part.ms(chip, kind) for part in parts) + chip.launch_ms * (kind == "MLX")

    def canvas_ms(self, steps: float, rows: int, context: int, chip: Chip, kind: Kind) -> float:
        """Return the time of a canvas of `steps` steps and its commit."""
        step = self.step_ms(rows, context, chip, kind)
        return steps * step + self.commit_ms(rows, context, chip, kind)

    def tokens_per_second(
        self, steps: float, rows: int, context: int, chip: Chip, kind: Kind
    ) -> float:
        return 1e3 * rows / self.canvas_ms(steps, rows, context, chip, kind)


def parameters(text: TextConfig) -> dict[str, int]:
    """Return the number of weights in the products of each part, of all layers together."""
    M, N, L = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
    attention = 0
    for layer in text.layers:
        keys_and_values = (2 if layer.is_sliding else 1) * layer.num_key_value_heads
        attention += (2 * N + keys_and_values) * layer.head_dim * M
    return {
        "self_attn": attention,
        "mlp": L * 3 * M * text.intermediate_size,
        "router": L * M * text.num_experts,
        "experts": L * text.num_experts * 3 * M * text.moe_intermediate_size,
        "self_conditioning": 3 * M * text.intermediate_size,
        "embed_tokens": M * text.vocab_size,
    }
