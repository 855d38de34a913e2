"""mlx_diffgemma.models, on a cache in a folder of its own."""

from __future__ import annotations

import importlib
import json

import huggingface_hub
import huggingface_hub.utils._cache_manager as manager
import pytest
from typer.testing import CliRunner

from mlx_diffgemma import bundled_model
from mlx_diffgemma.checkpoint.choice import full_name
from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.cli.edit import edit
from mlx_diffgemma.cli.fill import fill
from mlx_diffgemma.cli.fuse import fuse
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.info import info
from mlx_diffgemma.cli.models import app
from mlx_diffgemma.cli.train import train
from mlx_diffgemma.errors import SourceError
from tests.checkpoint.test_cache import OURS, WHOLE, put
from tests.cli.test_cli import invoke


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def models(*words: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(words), input=stdin)


@pytest.mark.parametrize("words", [[], ["list"]])
def test_the_list_is_on_stdout_with_names_and_sizes(hub, words):
    put(hub, OURS, "a" * 40, WHOLE)
    put(hub, "somebody/tuned", "b" * 40, {"config.json": WHOLE["config.json"]})
    done = models(*words)
    assert (done.exit_code, done.stderr) == (0, "")
    head, first, second, total = done.stdout.splitlines()
    assert head.split() == ["name", "repository", "GB", "last", "used"]
    assert first.split()[:3] == ["4bit", OURS, "0.00"] and "not whole" not in first
    assert second.split()[:2] == ["-", "somebody/tuned"] and "not whole" in second
    assert total.split() == ["0.00", "in", "all"]


@pytest.mark.parametrize("words", [["--json"], ["list", "--json"]])
def test_json_is_one_list(hub, words):
    assert json.loads(models(*words).stdout) == []
    folder = put(hub, OURS, "a" * 40, WHOLE)
    assert json.loads(models(*words).stdout) == [
        {
            "repo": OURS,
            "short_name": "4bit",
            "bytes": sum(map(len, WHOLE.values())),
            "whole": True,
            "folder": str(folder),
        }
    ]


def test_an_empty_cache_says_how_to_fill_it(hub):
    done = models()
    assert (done.exit_code, done.stdout) == (0, "")
    assert "mlx_diffgemma.models pull 4bit" in done.stderr


def test_pull_fetches_the_repository_of_a_short_name(hub, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        assert "model*.safetensors" in allow_patterns
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    done = models("pull", "4bit")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}\n")
    assert models("pull", "somebody/tuned", "--revision", "v1").exit_code == 0
    assert asked == [(OURS, None), ("somebody/tuned", "v1")]


def test_pull_of_a_folder_or_a_misspelt_name_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = models("pull", "4bits")
    assert done.exit_code == 2 and "did you mean 4bit?" in done.stderr
    (tmp_path / "8bit").mkdir()
    done = models("pull", "8bit")
    assert done.exit_code == 2 and "8bit is a folder or a file here" in done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_rm_asks_first_and_yes_answers(hub, monkeypatch):
    put(hub, OURS, "a" * 40, WHOLE)
    done = models("rm", "4bit")
    assert done.exit_code == 2 and "give --yes" in done.stderr
    assert list(hub.glob("models--*"))
    monkeypatch.setattr("mlx_diffgemma.cli.models.is_terminal", lambda: True)
    done = models("rm", "4bit", stdin="n\n")
    assert done.exit_code == 1 and OURS in done.stderr
    assert list(hub.glob("models--*"))
    done = models("rm", OURS, stdin="y\n")
    assert done.exit_code == 0 and f"removed {OURS}: 0.00 GB" in done.stderr
    assert not list(hub.glob("models--*"))
    put(hub, OURS, "a" * 40, WHOLE)
    assert models("rm", "4bit", "--yes").exit_code == 0
    assert not list(hub.glob("models--*"))


def test_rm_touches_neither_other_models_nor_folders(hub, tmp_path, monkeypatch):
    put(hub, "owner/llama", "b" * 40, WHOLE | {"config.json": b'{"model_type": "llama"}'})
    put(hub, OURS, "a" * 40, WHOLE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8bit").mkdir()
    for name in ("owner/llama", "8bit", "./8bit", "nonsense"):
        done = models("rm", name, "--yes")
        assert done.exit_code == 2 and f"it has {OURS}" in done.stderr, name
    assert len(list(hub.glob("models--*"))) == 2 and (tmp_path / "8bit").is_dir()


# --- the model of every command ---

BUNDLED = str(bundled_model())


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What commands ask `resolve` for: a repository would be downloaded."""
    names: list[str] = []
    for module in ("train.session", "train.fuse", "convert.write", "checkpoint.load"):
        importlib.import_module(f"mlx_diffgemma.{module}")  # with the function that is put back

    def resolve(source, revision=None, **_):
        names.append(full_name(str(source)))
        raise SourceError("asked")

    for module in ("load", "files"):
        monkeypatch.setattr(f"mlx_diffgemma.checkpoint.{module}.resolve", resolve)
    for module in ("train.session", "train.fuse", "convert.write"):
        monkeypatch.setattr(f"mlx_diffgemma.{module}.resolve", resolve)
    return names


COMMANDS = {
    "generate": (generate, ["Sort: 2 1"], "--model"),
    "fill": (fill, ["a {{gap}}"], "--model"),
    "edit": (edit, ["notes.txt", "--select", "1:1-1:2", "--prompt", "b"], "--model"),
    "info": (info, [], "--model"),
    "train": (train, ["--train", "--data", "data"], "--model"),
    "fuse": (fuse, [], "--model"),
    "convert": (convert, [], "--hf-path"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_short_names_and_the_default(name, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a b\n")
    monkeypatch.delenv("MLX_DIFFGEMMA_MODEL", raising=False)
    command, words, flag = COMMANDS[name]
    assert invoke(command, *words, flag, "4bit").stderr == "error: asked\n"
    assert asked.pop() == OURS
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", "8bit")
    done = invoke(command, *words)
    if name == "convert":  # the default is a model to run; what is converted is always named
        assert "--hf-path is missing" in done.stderr
        return
    assert asked.pop() == OURS.replace("4bit", "8bit")
    invoke(command, *words, flag, "./other")
    assert asked.pop() == "./other"


def test_the_bundled_model_is_announced_only_where_nobody_chose_it(monkeypatch):
    words = ("Sort: 2 1", "--seed", "1")
    monkeypatch.delenv("MLX_DIFFGEMMA_MODEL", raising=False)
    assert "no --model given" in invoke(generate, *words).stderr
    monkeypatch.setenv("MLX_DIFFGEMMA_MODEL", BUNDLED)
    assert "no --model given" not in invoke(generate, *words).stderr
