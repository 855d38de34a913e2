"""What `info` tells, from headers alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_diffgemma import bundled_model
from mlx_diffgemma.checkpoint.info import as_object, contexts_of, describe
from mlx_diffgemma.checkpoint.memory import context_bytes, needed_bytes
from mlx_diffgemma.config.model import ModelConfig


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The published shapes and lengths as sparse files: headers and holes."""
    from bench.make_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("published")
    written = write_checkpoint(folder / "26b", layout="official", sparse=True)
    assert (written.shards, written.tensors, written.tensor_bytes) == (11, 1047, 51_647_562_456)
    return written.folder


def test_the_published_checkpoint_has_25_823_781_228_parameters_and_is_read_in_seconds(published):
    start = time.perf_counter()
    info = describe(published)
    assert time.perf_counter() - start < 10
    assert info.parameters == 25_823_781_228
    assert (info.files, info.tensors) == (11, 1047)
    by_part = {part.name: part.parameters for part in info.parts}
    assert by_part["experts"] == 22_837_985_280
    assert by_part["attention"] == 1_110_179_840
    assert by_part["embedding"] == 738_197_504
    assert all(part.bits_per_weight == 16 for part in info.parts)


def test_active_parameters_are_all_of_the_text_path_but_the_experts_not_chosen(published):
    # 25,823,781,228 - 572,791,148 (vision) - 22,837,985,280 * 120 / 128
    info = describe(published)
    vision = next(part.parameters for part in info.parts if part.name == "vision")
    assert info.active_parameters == 25_823_781_228 - vision - 21_410_611_200
    assert 3.7e9 < info.active_parameters < 3.9e9  # the model card says 3.8 B


def test_no_tensor_is_read(published, monkeypatch):
    seen = 0
    real_open = Path.open

    def counting_open(self, *args, **kwargs):
        file = real_open(self, *args, **kwargs)
        if self.suffix == ".safetensors":
            real_read = file.read

            def read(size=-1):
                nonlocal seen
                data = real_read(size)
                seen += len(data)
                return data

            file.read = read
        return file

    monkeypatch.setattr(Path, "open", counting_open)
    describe(published)
    assert 0 < seen < 400 * 1047  # bytes of headers, of 51.6 GB


def test_vision_is_counted_apart_since_the_first_image_loads_it():
    info = describe(bundled_model())
    vision = next(part for part in info.parts if part.name == "vision")
    assert info.vision == f"{vision.nbytes:,} bytes, loaded with the first image"
    assert info.vision_bytes == vision.nbytes
    assert info.loaded_bytes == sum(part.nbytes for part in info.parts) - vision.nbytes


def test_memory_grows_with_the_context_by_its_keys_and_values():
    info = describe(bundled_model())
    text = info.config.text
    extra = context_bytes(text, 32768) - context_bytes(text, 4096)
    # and by the scores of one full layer and their softmax: 4 heads, 2,048 queries at a time
    extra += 2 * 4 * 2048 * (32768 - 4096) * 2
    needed = [needed_bytes(text, info.loaded_bytes, n, 64) for n in (4096, 32768)]
    assert needed[1] - needed[0] == extra > 0


def test_memory_is_told_for_contexts_that_the_model_has_positions_for():
    info = describe(bundled_model())
    assert info.config.text.max_position_embeddings == 2048
    assert list(info.needed_bytes) == [2048]
    text = info.config.text
    for positions, contexts in ((4096, (4096,)), (5000, (4096,)), (32768, (4096, 32768))):
        assert contexts_of(replace(text, max_position_embeddings=positions)) == contexts


def test_context_memory_is_that_of_the_published_model(published):
    # MODEL facts: full layers 4,096 bytes per token each, sliding ones 8,192, at most 1,023 tokens
    text = ModelConfig.from_folder(published).text
    assert context_bytes(text, 1) == 5 * 4096 + 25 * 8192
    assert context_bytes(text, 100_000) == 5 * 4096 * 100_000 + 25 * 8192 * 1023


@pytest.mark.long  # it writes 1.5 GB
def test_a_packed_checkpoint_has_the_parameters_it_unpacks_to(tmp_path):
    from bench.make_checkpoint import write_checkpoint

    written = write_checkpoint(tmp_path / "packed", layout="4bit", sparse=True)
    info = describe(written.folder)
    assert info.parameters == 25_823_781_228
    experts = next(part for part in info.parts if part.name == "experts")
    assert experts.bits_per_weight == 4.5  # 4 bits, and 16 + 16 for every 64


def test_the_json_form_holds_the_same_numbers():
    info = describe(bundled_model())
    plain = as_object(info)
    assert plain["parameters"] == info.parameters == 1_952_292
    assert plain["needed_bytes"]["2048"] == info.needed_bytes[2048]
    assert sum(part["parameters"] for part in plain["parts"]) == info.parameters
