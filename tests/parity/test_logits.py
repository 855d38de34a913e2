"""Logits against transformers on random weights, both loaded from the same files, float32, CPU."""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed")

from transformers import DynamicCache  # noqa: E402
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (  # noqa: E402
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextRouter,
)

from mlx_diffgemma import GenerationSettings, load_model  # noqa: E402
from mlx_diffgemma.denoise.schedule import temperature  # noqa: E402
from tests.checkpoints import draw_config, write_checkpoint  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("error::FutureWarning")]
torch.set_num_threads(1)  # models this small only wait for one another's threads

SEEDS = range(48)
LENGTHS = ("1", "window-1", "window", "window+1", "3*window+5")
STAGES = ("first step", "self-conditioned", "second canvas")
# Logits lie within the softcap of 30; float32 rounding reaches 2e-4 in one config, 4e-5 in 99%.
TOLERANCE = 5e-4
# Router probabilities closer than this may be ordered differently by another order of summation,
# and another expert then gives other logits: no comparison of arithmetic any more.
SAFE_MARGIN = 3e-5


@dataclass(frozen=True)
class Comparison:
    length: str
    stage: str
    difference: float  # largest |logit difference|
    margin: float  # smallest routing margin in the reference, over all passes that led here

    @property
    def is_safe(self) -> bool:
        return self.margin >= SAFE_MARGIN


def named(function, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache as an argument: transformers 5.24 renames `past_key_values` to `cache`."""
    names = inspect.signature(function).parameters
    assert {"cache", "past_key_values"} & set(names), names
    return {"cache" if "cache" in names else "past_key_values": cache}


class Reference:
    """transformers' model, called as its own `generate` calls it, and its routing margins."""

    def __init__(self, folder: Path):
        self.model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        self.margins: list[float] = []
        for module in self.model.modules():
            if isinstance(module, DiffusionGemmaTextRouter):
                module.register_forward_hook(self._record)

    def _record(self, router, inputs, outputs) -> None:
        probabilities, k = (
            outputs[0].detach().sort(dim=-1, descending=True).values,
            outputs[1].shape[-1],
        )
        if k < probabilities.shape[-1]:
            self.margins.append(float((probabilities[:, k - 1] - probabilities[:, k]).min()))

    def take_margin(self) -> float:
        """The smallest margin since the last call."""
        margin = min(self.margins, default=np.inf)
        self.margins.clear()
        return margin

    def encode(self, tokens: np.ndarray, cache: DynamicCache) -> None:
        past = cache.get_seq_length()
        ids = torch.tensor(tokens, dtype=torch.long)
        positions = torch.arange(past, past + ids.shape[1])[None]
        masks = self.model.model.encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((*ids.shape, 0)),
            attention_mask=torch.ones((1, past + ids.shape[1]), dtype=torch.bool),
            position_ids=positions,
            **named(self.model.model.encoder.create_masks_for_generate, cache),
        )
        self.model.model.encoder(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions,
            **named(self.model.model.encoder.forward, cache),
        )

    def denoise(self, canvas: np.ndarray, cache: DynamicCache, previous=None):
        past = cache.get_seq_length()
        return self.model(
            decoder_input_ids=torch.tensor(canvas, dtype=torch.long),
            self_conditioning_logits=previous,
            decoder_position_ids=torch.arange(past, past + canvas.shape[1])[None],
            **named(self.model.forward, cache),
        ).logits


@functools.cache
def compare(seed: int) -> tuple[Comparison, ...]:
    """All comparisons of one drawn config."""
    config = draw_config(seed)
    text = config["text_config"]
    window, canvas_length = text["sliding_window"], config["canvas_length"]
    with tempfile.TemporaryDirectory() as parent:
        folder = write_checkpoint(Path(parent) / "checkpoint", config, seed)
        reference, model = Reference(folder), load_model(folder)
    settings = GenerationSettings().resolve(model.config)
    rng = np.random.default_rng(seed)
    out = []
    for name, length in zip(
        LENGTHS, (1, window - 1, window, window + 1, 3 * window + 5), strict=True
    ):

        def draw(count: int) -> np.ndarray:
            return rng.integers(0, text["vocab_size"], (1, count), dtype=np.int32)

        prompt, first, second, committed, third = (
            draw(length),
            *(draw(canvas_length) for _ in range(4)),
        )

        def add(stage, theirs, ours, margin, name=name):
            difference = float(np.abs(theirs.numpy() - np.array(ours)).max())
            out.append(Comparison(name, stage, difference, margin))

        with torch.no_grad():
            cache = DynamicCache(config=reference.model.config.get_text_config(decoder=True))
            reference.encode(prompt, cache)
            context = model.prefill(mx.array(prompt))
            prefilled = reference.take_margin()

            theirs = reference.denoise(first, cache)
            ours = model.denoise(mx.array(first), context)
            add("first step", theirs, ours, min(prefilled, reference.take_margin()))

            # The reference's own logits for both, so that this step alone is compared.
            processed = theirs / temperature(0, settings)
            theirs = reference.denoise(second, cache, processed)
            soft = model.soft_embedding(mx.array(processed.numpy()))
            ours = model.denoise(mx.array(second), context, self_conditioning=soft)
            add("self-conditioned", theirs, ours, min(prefilled, reference.take_margin()))

            reference.encode(committed, cache)
            context = model.commit(mx.array(committed), context)
            theirs = reference.denoise(third, cache)
            ours = model.denoise(mx.array(third), context)
            add("second canvas", theirs, ours, min(prefilled, reference.take_margin()))
    return tuple(out)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_a_drawn_model_equal_those_of_transformers(seed):
    wrong = [c for c in compare(seed) if c.is_safe and not c.difference <= TOLERANCE]
    assert not wrong, f"{draw_config(seed)}: {wrong}"


def test_enough_comparisons_count_for_every_length_and_stage(capsys):
    everything = [(seed, c) for seed in SEEDS for c in compare(seed)]
    texts = {seed: draw_config(seed)["text_config"] for seed in SEEDS}
    routed = {s for s, text in texts.items() if text["top_k_experts"] < text["num_experts"]}
    safe = [(seed, c) for seed, c in everything if c.is_safe]
    largest = max(c.difference for _, c in safe)
    left = {
        (length, stage): sum(
            c.length == length and c.stage == stage and seed in routed for seed, c in safe
        )
        for length in LENGTHS
        for stage in STAGES
    }
    with capsys.disabled():
        print(
            f"\nlogits: {len(SEEDS)} configs ({len(routed)} that choose among experts), "
            f"{len(everything)} comparisons, {len(everything) - len(safe)} set aside, "
            f"largest difference {largest:.2e}, "
            f"choosing comparisons left per length and stage: {min(left.values())} at least"
        )
    assert len(everything) == len(SEEDS) * len(LENGTHS) * len(STAGES)
    assert len(SEEDS) >= 40 and len(routed) >= 25
    assert len(safe) * 2 >= len(everything)
    assert min(left.values()) >= 10, left


def test_the_drawn_configs_span_what_checkpoints_may_say():
    configs = [draw_config(seed) for seed in SEEDS]
    texts = [config["text_config"] for config in configs]
    assert {"per_layer_config" in text for text in texts} == {True, False}
    for key, low, high in (("sliding_window", 4, 64), ("num_experts", 1, 16)):
        assert {low, high} <= {text[key] for text in texts}, key
    assert {1, 64} <= {config["canvas_length"] for config in configs}
    assert {1, 4} <= {text["top_k_experts"] for text in texts}
    assert len({tuple(text["layer_types"]) for text in texts}) >= 8
    assert any(text["layer_types"][-1] == "sliding_attention" for text in texts)
    assert any(text["num_key_value_heads"] < text["num_attention_heads"] for text in texts)
    assert any({} in text.get("per_layer_config", {}).values() for text in texts)
