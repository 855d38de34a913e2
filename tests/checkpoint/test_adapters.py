from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters as load_as_mlx_lm

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint.adapters import CONFIG, WEIGHTS, adapted_modules, add_adapters
from mlx_diffgemma.config.training import DEFAULT_KEYS, EXPERTS, LoraParameters, TrainSettings
from mlx_diffgemma.convert.write import convert
from mlx_diffgemma.errors import SourceError
from mlx_diffgemma.train.checkpoint import State, save, trained_weights
from mlx_diffgemma.train.fuse import fuse_checkpoint
from tests.checkpoint.adapter_cases import logits_of, plain_model
from tests.train.train_cases import small_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def packed(plain) -> Path:
    return convert(plain, plain.parent / "packed", quantize=True, q_group_size=32).folder


def with_adapters(source: Path, folder: Path, *, num_layers: int = -1, keys=None) -> Path:
    """Drawn adapters in a folder of their own."""
    settings = TrainSettings(
        num_layers=num_layers,
        lora_parameters=LoraParameters(rank=3, scale=2.0, keys=keys or (*DEFAULT_KEYS, *EXPERTS)),
    )
    model = load_model(source, fused=False)
    add_adapters(model, num_layers=num_layers, lora=settings.lora_parameters)
    rng = np.random.default_rng(4)
    weights = {
        name: mx.array(rng.normal(0, 0.1, array.shape).astype(np.float32))
        for name, array in trained_weights(model).items()
    }
    save(folder, State(1, weights, {}, {}), settings, {}, numbered=False)
    return folder


@pytest.mark.parametrize("is_packed", [False, True], ids=["float32", "packed"])
def test_loaded_adapters_say_what_fused_weights_say(plain, packed, tmp_path, is_packed):
    source = packed if is_packed else plain
    adapters = with_adapters(source, tmp_path / "adapters")
    base = logits_of(load_model(source))
    adapted = logits_of(load_model(source, adapter_path=adapters))
    unfused = logits_of(load_model(source, adapter_path=adapters, fused=False))
    assert np.abs(adapted - base).max() > 0.5
    np.testing.assert_allclose(adapted, unfused, atol=2e-4)
    if not is_packed:
        fused = fuse_checkpoint(source, adapters, tmp_path / "fused")
        assert fused.changed == len(adapted_modules(load_model(source, adapter_path=adapters)))
        np.testing.assert_allclose(logits_of(load_model(fused.folder)), adapted, atol=2e-4)


def test_each_module_may_have_a_rank_of_its_own(plain, tmp_path):
    """As OptiQ writes them: one rank in the config, others in the file."""
    adapters = with_adapters(plain, tmp_path / "adapters")
    arrays, rng = mx.load(str(adapters / WEIGHTS)), np.random.default_rng(5)
    modules = sorted({name.rpartition(".")[0] for name in arrays})
    merged = mx.load(str(plain / "model.safetensors"))
    for number, module in enumerate(modules):
        a, b = (np.array(arrays[f"{module}.{leaf}"]) for leaf in ("lora_a", "lora_b"))
        rank, is_expert = number % 4 + 1, a.ndim == 3
        shapes = (list(a.shape), list(b.shape))
        shapes[0][1], shapes[1][2 if is_expert else 0] = rank, rank
        a, b = (rng.normal(0, 0.1, shape).astype(np.float32) for shape in shapes)
        arrays[f"{module}.lora_a"], arrays[f"{module}.lora_b"] = mx.array(a), mx.array(b)
        name = module if is_expert else f"{module}.weight"
        delta = 2.0 * (b @ a if is_expert else (a @ b).T)
        merged[name] = mx.array(np.array(merged[name].astype(mx.float32)) + delta)
    mx.save_safetensors(str(adapters / WEIGHTS), arrays)
    expected = shutil.copytree(plain, tmp_path / "merged")
    mx.save_safetensors(str(expected / "model.safetensors"), merged)
    adapted = logits_of(load_model(plain, adapter_path=adapters))
    np.testing.assert_allclose(adapted, logits_of(load_model(expected)), atol=2e-4)
    fused = fuse_checkpoint(plain, adapters, tmp_path / "fused")
    np.testing.assert_allclose(logits_of(load_model(fused.folder)), adapted, atol=2e-4)


@pytest.mark.parametrize("part", ["v_proj", "k_proj", "q_proj"])
def test_an_adapter_on_one_of_the_modules_that_become_one_product(plain, tmp_path, part):
    keys = (f"self_attn.{part}", "mlp.up_proj")
    adapters = with_adapters(plain, tmp_path / "adapters", keys=keys)
    adapted = logits_of(load_model(plain, adapter_path=adapters))
    unfused = logits_of(load_model(plain, adapter_path=adapters, fused=False))
    np.testing.assert_allclose(adapted, unfused, atol=2e-4)


def test_adapters_of_other_float_types_load(plain, tmp_path):
    adapters = with_adapters(plain, tmp_path / "adapters")
    expected = logits_of(load_model(plain, adapter_path=adapters))
    arrays = mx.load(str(adapters / WEIGHTS))
    halves = {name: array.astype(mx.float16) for name, array in arrays.items()}
    mx.save_safetensors(str(adapters / WEIGHTS), halves)
    found = logits_of(load_model(plain, adapter_path=adapters))
    np.testing.assert_allclose(found, expected, atol=0.02)
    mx.save_safetensors(str(adapters / WEIGHTS), {n: a.astype(mx.int32) for n, a in arrays.items()})
    with pytest.raises(SourceError, match="has type I32, expected BF16 or F16 or F32"):
        load_model(plain, adapter_path=adapters)


def test_mlx_lm_loads_our_adapters(plain, tmp_path):
    adapters = with_adapters(plain, tmp_path / "adapters")
    model = load_model(plain, fused=False)
    load_as_mlx_lm(model, str(adapters))
    ours = logits_of(load_model(plain, adapter_path=adapters, fused=False))
    np.testing.assert_array_equal(logits_of(model), ours)


def test_last_layers_alone_are_adapted_where_asked(plain, tmp_path):
    adapters = with_adapters(plain, tmp_path / "adapters", num_layers=1)
    modules = adapted_modules(load_model(plain, adapter_path=adapters))
    assert modules and all(name.startswith("model.decoder.layers.1.") for name in modules)


def test_packed_weights_are_fused_unpacked_or_packed_again(packed, tmp_path):
    adapters = with_adapters(packed, tmp_path / "adapters")
    adapted = logits_of(load_model(packed, adapter_path=adapters))
    again = fuse_checkpoint(packed, adapters, tmp_path / "again")
    assert again.errors and all(0 < error < 0.2 for error in again.errors.values())
    assert json.loads((again.folder / "config.json").read_text())["quantization"]
    off = np.abs(logits_of(load_model(again.folder)) - adapted)
    plain = fuse_checkpoint(packed, adapters, tmp_path / "plain", dequantize=True)
    assert not plain.errors
    assert "quantization" not in json.loads((plain.folder / "config.json").read_text())
    names = mx.load(str(plain.folder / "model.safetensors"))
    assert "model.decoder.layers.0.experts.down_proj" in names  # the official name
    assert not any(name.endswith((".scales", ".biases")) for name in names)
    close = np.abs(logits_of(load_model(plain.folder)) - adapted)
    assert close.mean() < 0.2 * off.mean(), "bfloat16 rounds far less than 4 bits"


def test_weights_trained_in_full_load_and_fuse(plain, tmp_path):
    model = load_model(plain, fused=False)
    model.freeze()
    model.layers[1].unfreeze()
    weights = {name: array + 0.01 for name, array in trained_weights(model).items()}
    settings = TrainSettings(fine_tune_type="full", num_layers=1)
    save(tmp_path / "run", State(1, weights, {}, {}), settings, {}, numbered=False)
    loaded = logits_of(load_model(plain, adapter_path=tmp_path / "run"))
    assert np.abs(loaded - logits_of(load_model(plain))).max() > 1e-3
    fused = fuse_checkpoint(plain, tmp_path / "run", tmp_path / "fused")
    assert fused.changed > 10 and fused.nbytes > 0
    np.testing.assert_array_equal(logits_of(load_model(fused.folder)), loaded)


def test_big_results_are_written_in_shards(plain, tmp_path, monkeypatch):
    adapters = with_adapters(plain, tmp_path / "adapters")
    whole = fuse_checkpoint(plain, adapters, tmp_path / "whole")
    monkeypatch.setattr("mlx_diffgemma.train.fuse._SHARD_BYTES", 100_000)
    shards = fuse_checkpoint(plain, adapters, tmp_path / "shards")
    assert len(list(shards.folder.glob("model-*-of-*.safetensors"))) > 2
    one, many = (dict(tree_flatten(load_model(f.folder).parameters())) for f in (whole, shards))
    assert all(mx.array_equal(one[name], many[name]) for name in one) and one.keys() == many.keys()


def test_fusing_holds_a_shard_at_a_time(tmp_path, monkeypatch):
    source = small_model(tmp_path / "source", hidden_size=256, intermediate_size=1024)
    adapters = with_adapters(source, tmp_path / "adapters", keys=("mlp.up_proj",))
    shard = 1 << 20
    monkeypatch.setattr("mlx_diffgemma.train.fuse._SHARD_BYTES", shard)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fused = fuse_checkpoint(source, adapters, tmp_path / "fused")
    assert fused.nbytes > 6 * shard
    assert mx.get_peak_memory() - before < 5 * shard


def test_a_result_that_is_there_is_left_alone(plain, tmp_path):
    adapters = with_adapters(plain, tmp_path / "adapters")
    (tmp_path / "there").mkdir()
    with pytest.raises(SourceError, match="is there already; name another folder"):
        fuse_checkpoint(plain, adapters, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_fuse_that_fails_leaves_nothing_and_takes_nothing_away(plain, tmp_path):
    source = shutil.copytree(plain, tmp_path / "source")
    adapters = with_adapters(source, tmp_path / "adapters")
    partial = tmp_path / "fused.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    with pytest.raises(SourceError, match=r"fused\.partial is there already"):
        fuse_checkpoint(source, adapters, tmp_path / "fused")
    assert (partial / "mine.txt").read_text() == "mine"
    shutil.rmtree(partial)
    template = source / "chat_template.jinja"
    template.unlink()
    template.mkdir()
    with pytest.raises(SourceError, match="fused cannot be written"):
        fuse_checkpoint(source, adapters, tmp_path / "fused")
    assert not partial.exists() and not (tmp_path / "fused").exists()


def test_a_fused_config_says_no_place_on_a_disk(plain, tmp_path):
    source = shutil.copytree(plain, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["_name_or_path"] = "/home/somebody/model"
    config["text_config"]["_name_or_path"] = "somebody/model"  # a repository
    (source / "config.json").write_text(json.dumps(config))
    adapters = with_adapters(source, tmp_path / "adapters")
    fused = fuse_checkpoint(source, adapters, tmp_path / "fused")
    written = json.loads((fused.folder / "config.json").read_text())
    assert config.pop("_name_or_path") and written == config


def edit_config(folder: Path, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path, *names: str) -> None:
    arrays = mx.load(str(folder / WEIGHTS))
    mx.save_safetensors(str(folder / WEIGHTS), {n: a for n, a in arrays.items() if n not in names})


def add(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    arrays = mx.load(str(folder / WEIGHTS)) | {n: mx.ones(s) for n, s in shapes.items()}
    mx.save_safetensors(str(folder / WEIGHTS), arrays)


QUERY = "model.decoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder of adapters"),
        (lambda f: (f / CONFIG).unlink(), "adapter_config.json cannot be read"),
        (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json is not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "must hold an object"),
        (lambda f: (f / WEIGHTS).unlink(), "adapters.safetensors is missing"),
        (lambda f: edit_config(f, fine_tune_type="dora"), "'dora' is not supported"),
        (lambda f: edit_config(f, num_layers=9), "num_layers of 9 does not fit"),
        (
            lambda f: edit_config(f, lora_parameters={"rank": 0}),
            "rank must be a whole number at least 1",
        ),
        (
            lambda f: edit_config(f, lora_parameters={"rank": 3, "keys": ["mlp.side_proj"]}),
            "no module of this model is called 'mlp.side_proj'",
        ),
        (
            lambda f: edit_config(f, lora_parameters={"rank": 3, "keys": ["input_layernorm"]}),
            "'input_layernorm' is not a module that takes an adapter",
        ),
        (
            lambda f: edit_config(f, lora_parameters={"rank": 4, "keys": list(DEFAULT_KEYS)}),
            "has an adapter, but adapter_config.json's num_layers and keys leave it out",
        ),
        (lambda f: cut(f, f"{QUERY}.lora_b"), f"{QUERY}.lora_b is missing"),
        (lambda f: cut(f, f"{QUERY}.lora_a", f"{QUERY}.lora_b"), f"{QUERY}.lora_a is missing"),
        (lambda f: add(f, {f"{QUERY}.lora_b": (2, 64)}), "which do not belong together"),
        (lambda f: add(f, {f"{QUERY}.lora_b": (3, 63)}), r"do not fit its weights of \[64, 64\]"),
        (lambda f: add(f, {f"{QUERY}.m": (3, 64)}), f"{QUERY}.m is not a factor of an adapter"),
        (
            lambda f: add(f, {"lm_head.lora_a": (64, 3), "lm_head.lora_b": (3, 384)}),
            "lm_head is not a module here that takes an adapter",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_one_line(plain, tmp_path, damage, says):
    adapters = with_adapters(plain, tmp_path / "adapters")
    damage(adapters)
    with pytest.raises(SourceError, match=says):
        load_model(plain, adapter_path=adapters)


def test_adapters_of_another_model_are_not_fused(plain, tmp_path):
    adapters = with_adapters(plain, tmp_path / "adapters")
    other = small_model(tmp_path / "other")
    with pytest.raises(SourceError, match="was it made for another model"):
        fuse_checkpoint(other, adapters, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    cut(adapters, f"{QUERY}.lora_b")
    with pytest.raises(SourceError, match="is missing, the other half"):
        fuse_checkpoint(plain, adapters, tmp_path / "fused")


def test_layers_of_experts_take_adapters_in_every_way_of_computing_them(plain, tmp_path):
    """On the CPU backend big experts are multiplied one by one."""
    import mlx_diffgemma.model.experts as experts

    adapters = with_adapters(plain, tmp_path / "adapters", keys=EXPERTS)
    grouped = logits_of(load_model(plain, adapter_path=adapters))
    before = experts._PRODUCT_PER_EXPERT_FROM
    experts._PRODUCT_PER_EXPERT_FROM = 1
    try:
        np.testing.assert_allclose(
            logits_of(load_model(plain, adapter_path=adapters)), grouped, atol=2e-4
        )
    finally:
        experts._PRODUCT_PER_EXPERT_FROM = before


@pytest.mark.parametrize("key", ["q_proj", "self_attn.side_proj", "layers.0.mlp.up_proj"])
def test_a_key_that_names_no_module_is_refused(plain, key):
    with pytest.raises(SourceError, match=f"no module of this model is called '{key}'; names are"):
        add_adapters(
            load_model(plain, fused=False),
            num_layers=-1,
            lora=LoraParameters(keys=("mlp.up_proj", key)),
        )


def test_keys_outside_of_the_chosen_layers_leave_something_or_are_refused(plain):
    model = load_model(plain, fused=False)
    with pytest.raises(SourceError, match="none of the keys names a module of these layers"):
        add_adapters(model, num_layers=1, lora=LoraParameters(keys=("self_attn.v_proj",)))
    add_adapters(model, num_layers=1, lora=LoraParameters())
    assert adapted_modules(model)


def test_new_adapters_change_nothing(plain):
    model = load_model(plain, fused=False)
    before = logits_of(model)
    add_adapters(model, num_layers=-1, lora=LoraParameters(rank=2))
    np.testing.assert_array_equal(logits_of(model), before)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert names and all("lora" in name for name in names)
    assert tree_unflatten([(n, 0) for n in names])
