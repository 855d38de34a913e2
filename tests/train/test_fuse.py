"""Fusing into checkpoints that store a weight under several names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import bundled_model, load_model
from mlx_diffgemma.errors import WeightsError
from mlx_diffgemma.train.fuse import fuse_checkpoint

QUERY = "model.decoder.layers.0.self_attn.q_proj.weight"


def encoders(name: str) -> str:
    return name.replace("decoder", "encoder.language_model", 1)


@pytest.fixture
def adapters(tmp_path) -> Path:
    """One weight, trained in full."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {QUERY: mx.ones((128, 128))})
    return folder


def checkpoint(folder: Path, change) -> Path:
    shutil.copytree(bundled_model(), folder)
    tensors = mx.load(str(folder / "model.safetensors"))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def rename(tensors):
    tensors[encoders(QUERY)] = tensors.pop(QUERY)


def copy(tensors):
    tensors[encoders(QUERY)] = tensors[QUERY]
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]


def contradict(tensors):
    tensors[encoders(QUERY)] = tensors[QUERY] + 1


@pytest.mark.parametrize("change", [rename, copy])
def test_the_trained_weight_is_in_the_result_under_one_name(tmp_path, adapters, change):
    fuse_checkpoint(checkpoint(tmp_path / "source", change), adapters, tmp_path / "fused")
    found = dict(tree_flatten(load_model(tmp_path / "fused", fused=False).parameters()))
    expected = dict(tree_flatten(load_model(bundled_model(), fused=False).parameters()))
    assert found.keys() == expected.keys()
    assert mx.array_equal(found.pop(QUERY), mx.ones((128, 128))).item()
    assert all(mx.array_equal(array, expected[name]).item() for name, array in found.items())


def test_names_that_contradict_each_other_are_refused(tmp_path, adapters):
    with pytest.raises(WeightsError, match="hold different values"):
        fuse_checkpoint(checkpoint(tmp_path / "source", contradict), adapters, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
