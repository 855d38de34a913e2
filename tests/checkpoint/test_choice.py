"""What a user calls a model -> a folder or a repo id."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_diffgemma import bundled_model, load
from mlx_diffgemma.checkpoint.choice import SHORT_NAMES, full_name, short_name
from mlx_diffgemma.cli.fuse import fuse
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.info import info
from mlx_diffgemma.cli.train import train
from mlx_diffgemma.errors import SourceError
from tests.cli.test_cli import invoke


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_DIFFGEMMA_MODEL", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_short_name_is_a_repository_unless_a_folder_has_it(name, elsewhere):
    repo = f"mlx-community/diffusiongemma-26B-A4B-it-{name}"
    assert full_name(name) == repo
    assert short_name(repo) == name
    (elsewhere / name).mkdir()
    assert full_name(name) == name
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


def test_commands_take_what_is_given_then_the_environment_then_the_bundled_model(monkeypatch):
    bundled = "no --model given: this is the bundled model"
    asked = ("Squares from 2 to 3.", "--seed", "1")
    assert bundled in invoke(generate, *asked).stderr
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", "")
    assert bundled in invoke(generate, *asked).stderr
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", str(bundled_model()))
    answered = invoke(generate, *asked)
    assert answered.exit_code == 0 and bundled not in answered.stderr
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", "/nowhere/at/all")
    for command in (generate, info, fuse):
        refused = invoke(command, *(asked if command is generate else ()))
        assert refused.exit_code == 2 and "/nowhere/at/all" in refused.stderr
    data = ("--train", "--data", str(bundled_model()))
    assert "/nowhere/at/all" in invoke(train, *data).stderr
    assert invoke(generate, *asked, "--model", str(bundled_model())).exit_code == 0
    refused = invoke(generate, *asked, "--model", "")
    assert "the name of the model is empty" in refused.stderr
