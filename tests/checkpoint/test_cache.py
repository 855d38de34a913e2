"""The models in the Hub's local cache, made by hand here as huggingface_hub lays it out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub.utils._cache_manager as manager
import pytest

from mlx_diffgemma import bundled_model
from mlx_diffgemma.checkpoint.cache import cached_models, remove
from mlx_diffgemma.errors import SourceError

OURS = "mlx-community/diffusiongemma-26B-A4B-it-4bit"
CONFIG = (bundled_model() / "config.json").read_bytes()
WEIGHTS = b"w" * 5000


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(manager, "HF_HUB_CACHE", str(folder))
    return folder


def put(hub: Path, repo: str, commit: str, files: dict[str, bytes], kind: str = "models") -> Path:
    """A revision of a repository: blobs, links to them, and the branch that names it."""
    folder = hub / f"{kind}--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name in ("blobs", "refs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = folder / "blobs" / f"{abs(hash(content)):x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


WHOLE = {"config.json": CONFIG, "model.safetensors": WEIGHTS}


def test_only_checkpoints_of_this_kind_are_listed_with_what_they_take(hub):
    folder = put(hub, "somebody/tuned", "a" * 40, WHOLE)
    put(hub, "owner/llama", "b" * 40, WHOLE | {"config.json": b'{"model_type": "llama"}'})
    put(hub, "owner/broken", "c" * 40, WHOLE | {"config.json": b"{"})
    put(hub, "owner/data", "d" * 40, WHOLE, kind="datasets")
    (hub / "models--owner--empty").mkdir()
    (found,) = cached_models()
    assert (found.repo, found.folder, found.is_whole) == ("somebody/tuned", folder, True)
    assert found.nbytes == len(CONFIG) + len(WEIGHTS)


def test_a_download_that_stopped_is_not_whole(hub):
    first = {"config.json": CONFIG, "model-00001-of-00002.safetensors": WEIGHTS}
    first["model.safetensors.index.json"] = index(*first, "model-00002-of-00002.safetensors")
    put(hub, "a/sharded", "a" * 40, first)
    put(hub, "b/headers", "b" * 40, {"config.json": CONFIG})
    put(hub, OURS, "c" * 40, {"README.md": b"x"})
    second = first | {"model-00002-of-00002.safetensors": b"more"}
    put(hub, "z/sharded", "d" * 40, second)
    assert [(model.repo, model.is_whole) for model in cached_models()] == [
        ("a/sharded", False),
        ("b/headers", False),
        (OURS, False),
        ("z/sharded", True),
    ]


def test_remove_takes_every_revision_of_one_repository_and_nothing_else(hub):
    put(hub, OURS, "a" * 40, WHOLE)
    put(hub, OURS, "b" * 40, WHOLE | {"model.safetensors": b"newer"})
    put(hub, "somebody/tuned", "c" * 40, WHOLE)
    assert remove(OURS) == len(CONFIG) + len(WEIGHTS) + len(b"newer")
    assert [model.repo for model in cached_models()] == ["somebody/tuned"]
    assert [path.name for path in hub.glob("models--*")] == ["models--somebody--tuned"]


def test_what_is_not_cached_cannot_be_removed(hub):
    for _ in range(2):  # without a cache, and with one
        with pytest.raises(SourceError, match="the cache does not hold owner/name"):
            remove("owner/name")
        hub.mkdir(exist_ok=True)
    assert cached_models() == []


def test_a_cache_that_is_a_file_is_one_line(hub):
    hub.write_text("x")
    with pytest.raises(SourceError, match="cache cannot be read"):
        cached_models()


def test_what_could_not_be_deleted_is_said(hub, monkeypatch):
    put(hub, OURS, "a" * 40, WHOLE)
    monkeypatch.setattr(manager.DeleteCacheStrategy, "execute", lambda self: None)
    with pytest.raises(SourceError, match="could not be removed"):
        remove(OURS)
