"""Variants of one model: each says what it says alone, and shares what its adapter leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import bundled_model, generate, load, load_model
from mlx_diffgemma.checkpoint.variants import load_variants, variants_of
from mlx_diffgemma.convert.write import convert
from mlx_diffgemma.errors import SourceError
from mlx_diffgemma.train.checkpoint import State, save, trained_weights
from tests.checkpoint.adapter_cases import logits_of, plain_model
from tests.checkpoint.test_adapters import TrainSettings, with_adapters


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module", params=["float32", "packed"])
def source(request, plain) -> Path:
    if request.param == "float32":
        return plain
    return convert(plain, plain.parent / "packed", quantize=True, q_group_size=32).folder


def trained_in_full(source: Path, folder: Path) -> Path:
    model = load_model(source, fused=False)
    model.freeze()
    model.layers[1].unfreeze()
    weights = {name: array + 0.01 for name, array in trained_weights(model).items()}
    settings = TrainSettings(fine_tune_type="full", num_layers=1)
    save(folder, State(1, weights, {}, {}), settings, {}, numbered=False)
    return folder


def distinct_bytes(*models) -> int:
    arrays = {id(a): a for model in models for _, a in tree_flatten(model.parameters())}
    return sum(array.nbytes for array in arrays.values())


def test_each_says_what_it_says_alone_and_shares_the_rest(source, tmp_path):
    folders = {
        "queries": with_adapters(source, tmp_path / "q", keys=("self_attn.q_proj",)),
        "last": with_adapters(source, tmp_path / "last", num_layers=1),
        "all": with_adapters(source, tmp_path / "all"),
    }
    model = load_model(source, fused=False)
    before = distinct_bytes(model)
    variants = variants_of(model, folders)
    factors = sum(
        array.nbytes
        for variant in variants.values()
        for name, array in tree_flatten(variant.parameters())
        if "lora" in name
    )
    # Scales of norms become float32 once, and those of queries and keys one array.
    assert before + factors <= distinct_bytes(model, *variants.values()) < before + factors + 20000
    assert factors < before
    np.testing.assert_allclose(logits_of(model), logits_of(load_model(source)), atol=2e-4)
    for name, folder in folders.items():
        alone = logits_of(load_model(source, adapter_path=folder))
        assert np.abs(alone - logits_of(model)).max() > 0.1, "the adapter does something"
        np.testing.assert_allclose(logits_of(variants[name]), alone, atol=2e-4)


def test_weights_trained_in_full_are_the_variants_own(plain, tmp_path):
    folders = {
        "full": trained_in_full(plain, tmp_path / "full"),
        "last": with_adapters(plain, tmp_path / "last", num_layers=1),
    }
    model = load_model(plain, fused=False)
    variants = variants_of(model, folders)
    np.testing.assert_allclose(logits_of(model), logits_of(load_model(plain)), atol=2e-4)
    for name, folder in folders.items():
        alone = logits_of(load_model(plain, adapter_path=folder))
        np.testing.assert_allclose(logits_of(variants[name]), alone, atol=2e-4)
    assert variants["full"].layers[0].mlp is model.layers[0].mlp
    assert variants["full"].layers[1].mlp is not model.layers[1].mlp


def test_an_adapter_is_loaded_with_a_checkpoint_by_name(tmp_path):
    folder = with_adapters(bundled_model(), tmp_path / "drawn")
    model, variants, tokenizer = load_variants(bundled_model(), {"drawn": folder})
    for adapter, each in ((None, model), (folder, variants["drawn"])):
        alone, _ = load(bundled_model(), adapter_path=adapter)
        said = [generate(m, tokenizer, "Sort: 3 1 2", max_tokens=16) for m in (alone, each)]
        assert said[0] == said[1]
    plain, none, _ = load_variants(bundled_model(), {})
    assert none == {}
    np.testing.assert_array_equal(logits_of(plain), logits_of(load_model(bundled_model())))


def test_one_that_does_not_fit_is_named(source, tmp_path):
    folder = with_adapters(bundled_model(), tmp_path / "other")
    with pytest.raises(SourceError, match="other"):
        variants_of(load_model(source, fused=False), {"mine": folder})
    with pytest.raises(SourceError, match="is not a folder of adapters"):
        variants_of(load_model(source, fused=False), {"mine": tmp_path / "none"})
