"""Logits behind images against transformers on random weights, both loaded from the same files,
float32, CPU. Both get the same patches."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed")

from transformers import DynamicCache  # noqa: E402

from mlx_diffgemma import GenerationSettings, load_model  # noqa: E402
from mlx_diffgemma.denoise.schedule import temperature  # noqa: E402
from mlx_diffgemma.language.images import read_image  # noqa: E402
from mlx_diffgemma.model import Context, DiffusionGemma  # noqa: E402
from tests.checkpoints import draw_vision_config, write_checkpoint  # noqa: E402
from tests.parity.test_logits import (  # noqa: E402
    SAFE_MARGIN,
    STAGES,
    TOLERANCE,
    Comparison,
    Reference,
    named,
)
from tests.sampled import first  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SEEDS = range(40)
PLACES = ("before", "between", "behind", "longer than the window", "second turn")
BEGIN, SOFT, END = 60, 61, 62  # of every drawn config


@dataclass(frozen=True)
class Picture:
    """A picture of random pixels."""

    patches: np.ndarray  # float32 [P, 3 p p]
    positions: np.ndarray  # int32 [P, 2]
    tokens: int

    @property
    def ids(self) -> list[int]:
        return [BEGIN, *[SOFT] * self.tokens, END]


Turn = tuple[np.ndarray, list[Picture]]  # ids [1, S], and the pictures in them


def draw_picture(rng: np.random.Generator, vision: dict[str, Any], least: int = 1) -> Picture:
    """A picture of at least so many tokens, with a grid of its own, patches in any order."""
    k, most = vision["pooling_kernel_size"], vision["position_embedding_size"]
    across = int(rng.integers(1, 6))
    down = max(int(rng.integers(1, 4)), -(-least // across))
    assert max(across, down) * k <= most
    columns, rows = np.meshgrid(np.arange(across * k), np.arange(down * k))
    positions = rng.permutation(np.stack([columns.ravel(), rows.ravel()], axis=-1))
    patches = rng.random((len(positions), 3 * vision["patch_size"] ** 2), dtype=np.float32)
    return Picture(patches, positions.astype(np.int32), across * down)


def draw_turns(
    rng: np.random.Generator, config: dict[str, Any]
) -> Iterator[tuple[str, list[Turn]]]:
    """The text before the canvas for each of `PLACES`: turns that are read one after another."""
    text, vision = config["text_config"], config["vision_config"]

    def words(most: int = 9) -> list[int]:
        ids = rng.integers(2, text["vocab_size"], int(rng.integers(1, most + 1)))
        return [3 if i in (BEGIN, SOFT, END) else int(i) for i in ids]

    def turn(*parts: list[int] | Picture) -> Turn:
        pictures = [part for part in parts if isinstance(part, Picture)]
        ids = [i for p in parts for i in (p.ids if isinstance(p, Picture) else p)]
        return np.array([ids], np.int32), pictures

    def picture(least: int = 1) -> Picture:
        return draw_picture(rng, vision, least)

    window = text["sliding_window"]
    yield "before", [turn(picture(), words())]
    yield "between", [turn(words(), picture(), words(), picture(), words())]
    yield "behind", [turn(words(), picture(), picture(), picture())]
    yield "longer than the window", [turn(words(), picture(window + 1), words(), picture())]
    yield (
        "second turn",
        [
            turn(words(2 * window), picture(), words()),
            turn(words(), picture(window), words(), picture(), words()),
        ],
    )


class LookingReference(Reference):
    """transformers' model with images, called as its `generate` calls it."""

    def read(self, turns: list[Turn]) -> DynamicCache:
        """Read turns one after another. transformers indexes the types of tokens by their absolute
        positions, so that it gets those of the whole text each time."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        text = np.zeros((1, 0), np.int32)
        for ids, pictures in turns:
            text = np.concatenate([text, ids], axis=1)
            self.look(ids, pictures, text, cache)
        return cache

    def look(self, ids, pictures: list[Picture], text: np.ndarray, cache: DynamicCache) -> None:
        past, encoder = cache.get_seq_length(), self.model.model.encoder
        positions = torch.arange(past, text.shape[1])[None]
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((*ids.shape, 0)),
            attention_mask=torch.ones(text.shape, dtype=torch.bool),
            position_ids=positions,
            mm_token_type_ids=torch.tensor(text == SOFT).long(),
            **named(encoder.create_masks_for_generate, cache),
        )
        most = max(len(p.patches) for p in pictures)
        pixels = np.zeros((len(pictures), most, pictures[0].patches.shape[1]), np.float32)
        places = np.full((len(pictures), most, 2), -1, np.int64)
        for i, p in enumerate(pictures):
            pixels[i, : len(p.patches)], places[i, : len(p.patches)] = p.patches, p.positions
        encoder(
            input_ids=torch.tensor(ids, dtype=torch.long),
            pixel_values=torch.tensor(pixels),
            image_position_ids=torch.tensor(places),
            attention_mask=masks,
            position_ids=positions,
            **named(encoder.forward, cache),
        )


def read(model: DiffusionGemma, turns: list[Turn], step_size: int = 2048) -> Context:
    """Our context of turns, each read onto the one before."""
    context = None
    for ids, pictures in turns:
        seen = [model.see(mx.array(p.patches), mx.array(p.positions)) for p in pictures]
        context = model.prefill(mx.array(ids), context, images=seen, step_size=step_size)
    assert context is not None
    return context


@functools.cache
def compare(seed: int) -> tuple[Comparison, ...]:
    """All comparisons of one drawn config."""
    config = draw_vision_config(seed)
    vocab_size, canvas_length = config["text_config"]["vocab_size"], config["canvas_length"]
    with tempfile.TemporaryDirectory() as parent:
        folder = write_checkpoint(Path(parent) / "checkpoint", config, seed)
        reference, model = LookingReference(folder), load_model(folder, vision=True)
    settings = GenerationSettings().resolve(model.config)
    rng, out = np.random.default_rng(seed), []

    def canvas() -> np.ndarray:  # soft tokens among them are tokens like others
        return rng.integers(0, vocab_size, (1, canvas_length), dtype=np.int32)

    for place, turns in draw_turns(rng, config):
        first_canvas, second, committed, third = (canvas() for _ in range(4))
        committed[0, rng.integers(canvas_length)] = SOFT

        def add(stage, theirs, ours, margin, place=place):
            difference = float(np.abs(theirs.numpy() - np.array(ours)).max())
            out.append(Comparison(place, stage, difference, margin))

        with torch.no_grad():
            cache, context = reference.read(turns), read(model, turns)
            prefilled = reference.take_margin()
            theirs = reference.denoise(first_canvas, cache)
            ours = model.denoise(mx.array(first_canvas), context)
            add("first step", theirs, ours, min(prefilled, reference.take_margin()))

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


@pytest.mark.parametrize("seed", first(6, SEEDS))
def test_logits_behind_images_equal_those_of_transformers(seed):
    wrong = [c for c in compare(seed) if c.is_safe and not c.difference <= TOLERANCE]
    assert not wrong, f"{draw_vision_config(seed)}: {wrong}"


@pytest.mark.long
def test_enough_comparisons_count_for_every_place_and_stage(capsys):
    everything = [c for seed in SEEDS for c in compare(seed)]
    safe = [c for c in everything if c.is_safe]
    left = {
        (place, stage): sum(c.length == place and c.stage == stage for c in safe)
        for place in PLACES
        for stage in STAGES
    }
    with capsys.disabled():
        print(
            f"\nimages: {len(SEEDS)} configs, {len(everything)} comparisons, "
            f"{len(everything) - len(safe)} set aside (routing margin below {SAFE_MARGIN}), "
            f"largest difference {max(c.difference for c in safe):.2e}, "
            f"left per place and stage: {min(left.values())} at least"
        )
    assert len(everything) == len(SEEDS) * len(PLACES) * len(STAGES)
    assert len(SEEDS) >= 30 and min(left.values()) >= 10, left


def test_the_drawn_towers_span_what_checkpoints_may_say():
    visions = [draw_vision_config(seed)["vision_config"] for seed in SEEDS]
    for key in ("standardize", "use_clipped_linears"):
        assert {vision[key] for vision in visions} == {True, False}, key
    assert {v["rope_parameters"].get("rope_type") for v in visions} == {"default", "axial", None}
    assert any(v["num_key_value_heads"] < v["num_attention_heads"] for v in visions)
    assert {v["head_dim"] for v in visions} >= {4, 12}


def draw_photo(rng: np.random.Generator, number: int) -> np.ndarray:
    """Waves of colour with sharp edges, or noise, of any size: uint8 [H, W, 3]."""
    height, width = (int(n) for n in rng.integers(20, 400, 2))
    if number % 3 == 2:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = (each[..., None] for each in np.mgrid[:height, :width])
    waves = np.sin(x * rng.random(3) / 3) + np.cos(y * rng.random(3) / 3)
    return ((waves > rng.random(3)) * 255 if number % 3 else waves * 60 + 120).astype(np.uint8)


@functools.cache
def compare_own_pixels(seed: int) -> Comparison:
    """The first step behind photographs that each side has made into patches itself."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    config = draw_vision_config(seed)
    config["vision_config"] |= {"pooling_kernel_size": 3, "position_embedding_size": 512}
    config["vision_config"] |= {"patch_size": 16}
    with tempfile.TemporaryDirectory() as parent:
        folder = write_checkpoint(Path(parent) / "checkpoint", config, seed)
        reference, model = LookingReference(folder), load_model(folder, vision=True)
    rng = np.random.default_rng([9, seed])
    photos = [draw_photo(rng, seed + i) for i in range(1 + seed % 3)]
    processor = Gemma4ImageProcessorPil(max_soft_tokens=70)
    theirs, ours = [], []
    for photo in photos:
        made = processor(PIL.Image.fromarray(photo), return_tensors="np")
        there = made["image_position_ids"][0, :, 0] >= 0
        pixels, places = made["pixel_values"][0][there], made["image_position_ids"][0][there]
        tokens = int(made["num_soft_tokens_per_image"][0])
        theirs.append(Picture(pixels, places.astype(np.int32), tokens))
        own = read_image(photo, soft_tokens=70)
        ours.append(Picture(own.patches, own.positions, own.soft_tokens))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.tokens == expected.tokens
        assert np.array_equal(mine.positions, expected.positions)
        assert np.abs(mine.patches - expected.patches).max() <= 2 / 255
    ids = [i for picture in ours for i in (7, 8, *picture.ids)] + [9, 10]
    tokens = np.array([ids], np.int32)
    canvas = rng.integers(0, 60, (1, config["canvas_length"]), dtype=np.int32)
    with torch.no_grad():
        expected = reference.denoise(canvas, reference.read([(tokens, theirs)])).numpy()
    found = np.array(model.denoise(mx.array(canvas), read(model, [(tokens, ours)])))
    difference = float(np.abs(found - expected).max())
    return Comparison("own pixels", "first step", difference, reference.take_margin())


@pytest.mark.parametrize("seed", first(2, range(30)))
def test_transformers_with_its_own_pixels_gives_the_logits_of_ours(seed):
    """Pixels are within 2/255; the published processor's variant for Pillow gives the same ones."""
    compared = compare_own_pixels(seed)
    assert compared.difference <= TOLERANCE or not compared.is_safe, compared


@pytest.mark.long
def test_the_difference_of_logits_with_own_pixels(capsys):
    compared = [compare_own_pixels(seed) for seed in range(30)]
    largest = max(c.difference for c in compared)
    with capsys.disabled():
        print(f"\nown pixels: {len(compared)} prompts, largest difference of logits {largest:.2e}")
    assert sum(c.difference <= TOLERANCE for c in compared) >= 25


@pytest.mark.parametrize("seed", first(2, range(8)))
def test_a_border_between_pieces_never_splits_an_image(seed):
    """With pieces of any size the context is that of one piece; rounding alone differs."""
    config = draw_vision_config(seed)
    with tempfile.TemporaryDirectory() as parent:
        model = load_model(write_checkpoint(Path(parent) / "checkpoint", config, seed))
        rng = np.random.default_rng(seed)
        for place, turns in draw_turns(rng, config):
            whole = read(model, turns)
            for size in (1, 3, 7):
                pieces = read(model, turns, size)
                for one, two in zip(whole.layers, pieces.layers, strict=True):
                    assert mx.allclose(one.keys, two.keys, atol=1e-3).item(), (place, size)
                    assert mx.allclose(one.values, two.values, atol=1e-3).item(), (place, size)
