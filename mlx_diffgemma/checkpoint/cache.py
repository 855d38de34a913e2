"""The models in the Hub's local cache: which there are, and how to remove one. Reaches no
network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SourceError
from .choice import SHORT_NAMES
from .files import has_all_weights

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

_MODEL_TYPE = "diffusion_gemma"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A repository in the cache that this program can use, with all its revisions."""

    repo: str
    nbytes: int
    last_used: float  # seconds since 1970
    is_whole: bool  # no weight file of the newest revision is missing
    folder: Path  # of the newest revision


def cached_models() -> list[CachedModel]:
    """Return the DiffusionGemma checkpoints in the cache, by name.

    Raises:
      SourceError: if the cache cannot be read.
    """
    scan = _scan()
    found = [_described(repo) for repo in scan.repos] if scan else []
    return sorted((model for model in found if model), key=lambda model: model.repo)


def remove(repo: str) -> int:
    """Remove every revision of a repository from the cache; return the bytes that this freed.

    Raises:
      SourceError: if the cache does not hold it, or something of it cannot be removed.
    """
    scan = _scan()
    held = {r.repo_id: r for r in scan.repos if r.repo_type == "model"} if scan else {}
    if scan is None or repo not in held:
        raise SourceError(f"the cache does not hold {repo}; mlx_diffgemma.models lists what it has")
    strategy = scan.delete_revisions(*(revision.commit_hash for revision in held[repo].revisions))
    strategy.execute()
    if held[repo].repo_path.exists():  # huggingface_hub only logs what it could not delete
        raise SourceError(f"{held[repo].repo_path} could not be removed; is it yours to write?")
    return strategy.expected_freed_size


def _scan() -> HFCacheInfo | None:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None
    except (OSError, ValueError) as error:  # ValueError: it is a file
        raise SourceError(f"the Hub's local cache cannot be read: {error}") from error


def _described(repo: CachedRepoInfo) -> CachedModel | None:
    if repo.repo_type != "model" or not repo.revisions:
        return None
    newest = max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
    if (
        repo.repo_id not in SHORT_NAMES.values()
        and _object(newest / "config.json").get("model_type") != _MODEL_TYPE
    ):
        return None
    return CachedModel(
        repo.repo_id, repo.size_on_disk, repo.last_accessed, _is_whole(newest), newest
    )


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and has_all_weights(folder)


def _object(file: Path) -> dict[str, object]:
    """A file's JSON object; empty where it has none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
