from __future__ import annotations

from pathlib import Path

import pytest

from mlx_diffgemma.config.entry import entries
from mlx_diffgemma.config.training import (
    LoraParameters,
    TrainJob,
    TrainSettings,
    job_and_settings,
    read_recipe,
)
from mlx_diffgemma.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number at least 1, got 0"),
        ({"batch_size": True}, "batch_size must be a whole number at least 1, got True"),
        ({"num_layers": -2}, "num_layers must be a whole number at least 1, or -1 for all, got -2"),
        ({"seed": 2**31}, "seed must be a whole number at least 0 and at most 2147483647"),
        ({"iters": 2.0}, "iters must be a whole number at least 1, got 2.0"),
        ({"optimizer_config": [1]}, "optimizer_config must be an object"),
        ({"lr_schedule": "cosine"}, "lr_schedule must be an object"),
        ({"num_layers": 0}, "num_layers must be a whole number at least 1, or -1 for all, got 0"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
        ({"noise_min": 0.5, "noise_max": 0.2}, "noise_min of 0.5 is above noise_max of 0.2"),
        ({"noise_max": 1.5}, "noise_max must be a number at least 0 and at most 1"),
        ({"self_conditioning_probability": -0.1}, "self_conditioning_probability must be"),
        ({"fine_tune_type": "dora"}, "fine_tune_type must be 'lora' or 'full', got 'dora'"),
        ({"optimizer": "lion"}, "optimizer must be 'adam' or"),
        ({"mask_prompt": True, "causal_weight": 0.0}, "mask_prompt has no effect"),
        ({"mask_prompt": 1}, "mask_prompt must be true or false"),
        ({"lr_schedule": {"name": "sawtooth", "arguments": [1]}}, "name must be one of"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1]}}, "takes 2 to 3 arguments"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": "x"}}, "must be a list of numbers"),
        ({"lora_parameters": {"alpha": 16}}, "scale is alpha / rank"),
        (
            {"lora_parameters": {"rank": 0}},
            "lora_parameters: rank must be a whole number at least 1, got 0",
        ),
        ({"lora_parameters": {"dropout": 1.0}}, "dropout must be a number at least 0 and below 1"),
        ({"lora_parameters": {"ranks": 8}}, "unknown keys ranks"),
        ({"lora_parameters": {"keys": "q_proj"}}, "keys must be a list"),
    ],
)
def test_an_impossible_setting_is_named(values, says):
    with pytest.raises(ConfigError, match=says):
        TrainSettings.from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": -1},
        {"num_layers": 1},
        {"val_batches": -1},
        {"seed": 2**31 - 1},
        {"canvas_length": None},
        {"max_grad_norm": 0},
        {"noise_min": 0, "noise_max": 1},
        {"learning_rate": 1},
        {"lora_parameters": {"dropout": 0.999, "rank": 1}},
    ],
)
def test_values_at_their_bounds_are_taken(values):
    TrainSettings.from_dict(values)


JOB = {"model": "m", "data": "d", "train": True}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train": None}, "nothing to do: give --train, --test, or both"),
        ({"model": None}, "--model is missing"),
        ({"data": None}, "--data is missing"),
        ({"train": "yes"}, "train must be true or false, got 'yes'"),
        ({"model": 3}, "model must be text, got 3"),
        ({"resume": True, "resume_adapter_file": "x"}, "drop --resume-adapter-file"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_a_job_that_cannot_be_done_is_one_line(given, says):
    with pytest.raises(ConfigError, match=says):
        job_and_settings(JOB | given)


def test_keys_are_sorted_into_job_and_settings():
    job, settings = job_and_settings(JOB | {"iters": 3, "revision": None})
    assert (job.model, job.adapter_path, job.train, job.test) == ("m", "adapters", True, False)
    assert settings == TrainSettings(iters=3)


def test_every_setting_has_an_entry_with_help():
    for cls in (TrainSettings, TrainJob, LoraParameters):
        assert set(entries(cls)) == set(cls.__dataclass_fields__)
        assert all(entry.help for entry in entries(cls).values())


def test_defaults_are_those_of_the_objective():
    settings = TrainSettings()
    assert (settings.noise_min, settings.noise_max) == (1e-4, 1 - 1e-4)
    assert settings.causal_weight == 1.0 and settings.self_conditioning_probability == 0.5
    assert not any("router" in k or "experts" in k for k in settings.lora_parameters.keys)


def test_settings_survive_adapter_config_json():
    settings = TrainSettings(lora_parameters=LoraParameters(rank=3, keys=("mlp.up_proj",)))
    assert TrainSettings.from_dict(settings.as_dict()) == settings


def test_a_recipe_of_mlx_lm_reads_as_it_is(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: somewhere\ntrain: true\nreport_to: null\nlearning_rate: 1e-5\n"
        "lora_parameters:\n  keys: ['self_attn.q_proj']\n  rank: 8\n  scale: 20.0\n  dropout: 0.0\n"
        "lr_schedule:\n  name: cosine_decay\n  warmup: 100\n  arguments: [1e-5, 1000, 1e-7]\n"
    )
    raw = read_recipe(str(path))
    assert raw["learning_rate"] == 1e-5 and raw["lr_schedule"]["arguments"] == [1e-5, 1000, 1e-7]
    names = {k: v for k, v in raw.items() if k not in ("model", "train")}
    assert TrainSettings.from_dict(names).lora_parameters.keys == ("self_attn.q_proj",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; known keys are"),
        ("- 1", "must hold keys and values, got list"),
        ("a: [", "is not YAML"),
        ("report_to: wandb", "report_to is not supported, got 'wandb'"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_recipe(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_the_recipes_of_this_repository_are_good(path):
    raw = read_recipe(str(path))
    TrainSettings.from_dict({k: v for k, v in raw.items() if k in TrainSettings().as_dict()})
