"""What a user calls a model -> a folder or a repo id."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_diffgemma import bundled_model, load
from mlx_diffgemma.checkpoint.choice import SHORT_NAMES, chosen_model, full_name, short_name
from mlx_diffgemma.errors import SourceError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_DIFFGEMMA_MODEL", raising=False)
    return tmp_path


def test_what_is_given_comes_first_then_the_environment_then_the_bundled_model(monkeypatch):
    assert chosen_model(None) == bundled_model()
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", "owner/name")
    assert chosen_model(None) == "owner/name"
    assert chosen_model("other/name") == "other/name"
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", "8bit")
    assert chosen_model(None) == "mlx-community/diffusiongemma-26B-A4B-it-8bit"


def test_an_empty_variable_is_none_and_an_empty_option_is_a_mistake(monkeypatch):
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", "")
    assert chosen_model(None) == bundled_model()
    with pytest.raises(SourceError, match="the name of the model is empty"):
        load(chosen_model(""))


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_short_name_is_a_repository_unless_a_folder_has_it(name, elsewhere):
    repo = f"mlx-community/diffusiongemma-26B-A4B-it-{name}"
    assert chosen_model(name) == repo
    assert short_name(repo) == name
    (elsewhere / name).mkdir()
    assert chosen_model(name) == name
    assert short_name(f"somebody/diffusiongemma-26B-A4B-it-{name}") is None


@pytest.mark.parametrize("name", ["a/4bit", "./4bit", "model", "google/x", "/tmp/4bit", "~/4bit"])
def test_other_names_stay(name):
    assert full_name(name) == name


@pytest.mark.parametrize(
    ("name", "meant"), [("4-bit", "4bit"), ("BF16", "bf16"), ("nvpf4", "nvfp4"), ("6bits", "6bit")]
)
def test_a_misspelt_short_name_is_one_line_with_all_of_them(name, meant):
    with pytest.raises(SourceError) as raised:
        load(name)
    message = str(raised.value)
    assert f"no folder and no short name {name}; did you mean {meant}?" in message
    assert all(other in message for other in SHORT_NAMES)


def test_load_takes_short_names_and_folders_of_that_name(elsewhere):
    (elsewhere / "4bit").symlink_to(bundled_model())
    model, _ = load("4bit")
    assert model.config.canvas_length == 64
