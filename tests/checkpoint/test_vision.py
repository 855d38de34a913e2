"""Vision from files: when it is loaded, in which layouts, and what is said where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import DiffGemmaError, load_model
from mlx_diffgemma.checkpoint.info import describe
from mlx_diffgemma.checkpoint.names import VISION, part_of
from mlx_diffgemma.checkpoint.variants import variants_of
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert.verify import verify
from mlx_diffgemma.errors import PromptError, WeightsError
from mlx_diffgemma.model import DiffusionGemma
from tests.checkpoints import draw_config, draw_vision_config, write_checkpoint
from tests.denoise.pictures import draw_picture

PREFIX = "model.encoder."
PATCHES = "model.encoder.vision_tower.patch_embedder.input_proj"
UP = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear"
WIDE = {  # groups of 64 divide every width
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": 8,
    "num_hidden_layers": 2,
}
PACKINGS = {
    "4-bit": {"group_size": 64, "bits": 4},
    "8-bit": {"group_size": 64, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def config(**vision: Any) -> dict[str, Any]:
    drawn = draw_vision_config(3)
    drawn["vision_config"] |= WIDE | {"use_clipped_linears": False} | vision
    return drawn


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "plain", config(), 3)


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array] | None]):
    """Change the arrays of a folder."""
    path = folder / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    mx.eval(arrays)
    arrays = change(arrays) or arrays
    mx.save_safetensors(str(path), arrays)


def set_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def features(model: DiffusionGemma) -> mx.array:
    picture = draw_picture(model, np.random.default_rng(4))
    return model.see(mx.array(picture.patches), mx.array(picture.positions))


def parameters(model: DiffusionGemma) -> set[str]:
    return {name for name, _ in tree_flatten(model.parameters())}


def is_matrix(name: str, array: mx.array) -> bool:
    return part_of(name) == VISION and name.endswith(".weight") and array.ndim == 2


def packed(arrays: dict[str, mx.array], how: dict[str, Any], only: str = "") -> dict[str, mx.array]:
    """Arrays with vision's matrices packed, those with `only` in their names."""
    out = {}
    for name, array in arrays.items():
        if not is_matrix(name, array) or only not in name:
            out[name] = array
            continue
        module = name.removesuffix(".weight")
        leaves = ("weight", "scales", "biases")
        parts = mx.quantize(array, **how)
        out |= {f"{module}.{leaf}": part for leaf, part in zip(leaves, parts, strict=False)}
    return out


# --- when it is loaded


def test_the_first_image_loads_vision(folder):
    model = load_model(folder)
    before = parameters(model)
    assert not model.has_vision and not any(part_of(name) == VISION for name in before)
    seen = features(model)
    assert model.has_vision and before < parameters(model)
    assert not tree_flatten(model.model.encoder.vision_tower.trainable_parameters())
    eager = load_model(folder, vision=True)
    assert parameters(eager) == parameters(model)
    assert mx.array_equal(features(eager), seen).item()
    assert tree_flatten(eager.model.encoder.vision_tower.trainable_parameters())


def test_vision_that_is_switched_off_is_never_loaded(folder):
    model = load_model(folder, vision=False)
    with pytest.raises(PromptError, match=r"plain was loaded without its vision tower .*--no-vis"):
        features(model)
    assert not model.has_vision and model.vision_source.nbytes == 0


def test_memory_and_info_say_what_vision_takes(folder):
    model = load_model(folder)
    size = model.vision_source.nbytes
    info = describe(folder)
    assert info.vision == f"{size:,} bytes, loaded with the first image"
    features(model)
    encoder = model.model.encoder
    arrays = [a for m in (encoder.vision_tower, encoder.embed_vision)
              for _, a in tree_flatten(m.parameters())]  # fmt: skip
    assert sum(array.nbytes for array in arrays) == size == info.vision_bytes


def test_variants_share_what_reads_images(folder):
    model = load_model(folder, fused=False)
    one, two = (variants_of(model, {name: write_full(folder, name)})[name] for name in ("a", "b"))
    assert mx.array_equal(features(one), features(two)).item()
    assert one.model.encoder.vision_tower is two.model.encoder.vision_tower


def write_full(folder: Path, name: str) -> Path:
    """Weights trained in full, of a norm."""
    adapter = folder.parent / name
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    norm = mx.load(str(folder / "model.safetensors"))["model.decoder.norm.weight"]
    arrays = {"model.decoder.norm.weight": norm * 2}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)
    return adapter


# --- layouts


@pytest.mark.parametrize("mode", PACKINGS)
def test_packed_vision_computes_with_the_weights_that_it_unpacks_to(folder, mode):
    """The patch embedder too, where mlx-vlm's own code would round pixels to whole numbers."""
    how = PACKINGS[mode]

    def unpacked(arrays):
        return {
            name: mx.dequantize(*mx.quantize(array, **how), **how, dtype=mx.float32)
            if is_matrix(name, array)
            else array
            for name, array in arrays.items()
        }

    in_place = write_checkpoint(folder.parent / "packed", config(), 3)
    rewrite(in_place, lambda arrays: packed(arrays, how))
    set_config(in_place, quantization=how)
    rewrite(folder, unpacked)
    ours, theirs = features(load_model(in_place)), features(load_model(folder))
    assert float(mx.abs(ours - theirs).max()) < 2e-3
    model = load_model(in_place, vision=True)
    assert f"{PATCHES}.scales" in parameters(model)


def test_the_projection_alone_may_be_packed_as_in_the_published_files(folder):
    rewrite(folder, lambda arrays: packed(arrays, PACKINGS["4-bit"], "embed_vision"))
    set_config(folder, quantization=PACKINGS["8-bit"] | {
        "model.encoder.embed_vision.embedding_projection": PACKINGS["4-bit"]
    })  # fmt: skip
    model = load_model(folder)
    features(model)
    assert model.model.encoder.embed_vision.embedding_projection.bits == 4
    assert "scales" not in model.model.encoder.vision_tower.patch_embedder.input_proj


@pytest.mark.parametrize("prefix", ["model.encoder.", "model.", ""])
def test_vision_may_be_in_a_file_of_its_own(folder, prefix):
    expected = features(load_model(folder))
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(arrays)
    aside = {n: a for n, a in arrays.items() if part_of(n) == VISION}
    renamed = {prefix + name.removeprefix(PREFIX): array for name, array in aside.items()}
    mx.save_safetensors(str(folder / "optiq_vision.safetensors"), renamed)
    rewrite(folder, lambda arrays: {n: a for n, a in arrays.items() if n not in aside})
    assert mx.array_equal(features(load_model(folder)), expected).item()
    assert describe(folder).vision_bytes == sum(array.nbytes for array in aside.values())
    convert(folder, folder.parent / "out", dtype="float32")
    assert mx.array_equal(features(load_model(folder.parent / "out")), expected).item()


def test_a_file_of_its_own_holds_vision_alone(folder):
    text = {"model.decoder.norm.weight": mx.zeros((4,))}
    rewrite(folder, lambda arrays: {n: a for n, a in arrays.items() if part_of(n) != VISION})
    mx.save_safetensors(str(folder / "my_vision.safetensors"), text)
    with pytest.raises(WeightsError, match=r"my_vision.safetensors holds model.decoder.norm"):
        load_model(folder)


def test_bounds_are_read_where_the_config_uses_them_and_else_left(tmp_path):
    bounded = write_checkpoint(tmp_path / "a", config(use_clipped_linears=True), 3)
    free = write_checkpoint(tmp_path / "b", config(use_clipped_linears=True), 3)
    vision = json.loads((free / "config.json").read_text())["vision_config"]
    set_config(free, vision_config=vision | {"use_clipped_linears": False})
    one, two = features(load_model(bounded)), features(load_model(free))
    assert float(mx.abs(one - two).max()) > 0.01
    rewrite(bounded, lambda arrays: {n: a for n, a in arrays.items() if not n.endswith("_min")})
    with pytest.raises(WeightsError, match=r"input_min and .* more is missing"):
        features(load_model(bounded))


# --- what cannot be loaded


def no_config(folder: Path) -> None:
    set_config(folder, vision_config=None)


def no_tensors(folder: Path) -> None:
    rewrite(folder, lambda arrays: {n: a for n, a in arrays.items() if part_of(n) != VISION})


def one_missing(folder: Path) -> None:
    rewrite(folder, lambda arrays: {n: a for n, a in arrays.items() if n != f"{UP}.weight"})


def other_shape(folder: Path) -> None:
    rewrite(folder, lambda arrays: arrays | {f"{UP}.weight": mx.zeros((8, 8))})


def foreign(folder: Path) -> None:
    def change(arrays):
        text = {n: a for n, a in arrays.items() if part_of(n) != VISION}
        return text | {f"{UP}.qweight": mx.zeros((8, 8), mx.int32)}

    rewrite(folder, change)


REFUSED = {
    no_config: "has no vision tower: its config.json has no vision_config, so that it reads no",
    no_tensors: "has no vision tower in its files, so that it reads no images",
    one_missing: f"tensor {UP}.weight is missing",
    other_shape: f"{UP}.weight has shape",
    foreign: f"has no vision tower: {UP}.qweight is vision in a form that does not load",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_text_loads_and_the_first_image_says_why_there_is_no_vision(folder, damage):
    damage(folder)
    model = load_model(folder)
    assert model.prefill(mx.array([[7, 8]])).length == 2
    picture = draw_picture(load_model_of(folder), np.random.default_rng(0))
    with pytest.raises(DiffGemmaError, match=REFUSED[damage]) as raised:
        model.see(mx.array(picture.patches), mx.array(picture.positions))
    assert "\n" not in str(raised.value)
    with pytest.raises(DiffGemmaError, match=REFUSED[damage]):
        load_model(folder, vision=True)


def load_model_of(folder: Path) -> DiffusionGemma:
    """A whole model of the same shapes."""
    return load_model(write_checkpoint(folder.parent / "whole", config(), 3))


def test_a_published_config_of_text_alone_reads_no_images(tmp_path):
    drawn = draw_config(1)
    del drawn["vision_config"]
    folder = tmp_path / "text"
    written = write_checkpoint(folder, drawn | {"vision_config": config()["vision_config"]}, 1)
    set_config(written, vision_config={})
    with pytest.raises(PromptError, match="has no vision_config"):
        load_model(folder).check_vision()


# --- converting


RECIPE = """
[[rule]]
pattern = "model.encoder.vision_tower.*"
bits = 8
group_size = 64

[[rule]]
pattern = "*.experts.*"
quantize = false

[[rule]]
pattern = "*"
quantize = false
"""


def test_a_recipe_that_names_vision_packs_it(folder, tmp_path):
    recipe = tmp_path / "vision.toml"
    recipe.write_text(RECIPE)
    convert(folder, tmp_path / "out", quantize=True, recipe=str(recipe), dtype="float32")
    exact, rough = features(load_model(folder)), features(load_model(tmp_path / "out"))
    assert 0 < float(mx.abs(exact - rough).mean() / mx.abs(exact).mean()) < 0.1
    model = load_model(tmp_path / "out", vision=True)
    encoder = model.model.encoder
    assert encoder.vision_tower.patch_embedder.input_proj.bits == 8
    assert "scales" not in encoder.embed_vision.embedding_projection
    verify(tmp_path / "out", folder)


def test_packed_vision_stays_as_it_is_whatever_the_text_becomes(folder, tmp_path):
    rewrite(folder, lambda arrays: packed(arrays, PACKINGS["8-bit"]))
    set_config(folder, quantization=PACKINGS["8-bit"])
    convert(folder, tmp_path / "out", quantize=True, recipe="uniform", q_mode="nvfp4",
            dtype="float32")  # fmt: skip
    ours, theirs = features(load_model(folder)), features(load_model(tmp_path / "out"))
    assert mx.array_equal(ours, theirs).item()
