"""The origin of a source: a name that may be shared, and a path that stays on this machine.

`conversion.json` and the model card are part of a result, so they name the source and hold no path.
The path of a local source is in a cache of this machine, under the digest of the result's record:
it is found again wherever the result is moved to, and no upload can contain it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import SIDE_PATTERNS

from .sources import Checkpoint

# Keys under which other tools save the name that a checkpoint was loaded by, which may be a local
# path.
_NAME_KEYS = frozenset({"_name_or_path", "name_or_path"})


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the source's entry in a record: a repository at a commit, or a folder's name.

    A folder's `fingerprint` changes with any of its files, so that it identifies the source. A
    commit needs none.
    """
    if (found := repository(checkpoint.folder)) is not None:
        name, revision = found
        return {"name": name, "revision": revision, "layout": checkpoint.layout}
    files = json.dumps(fingerprint(checkpoint)).encode()
    return {
        "name": folder_name(checkpoint.folder),
        "layout": checkpoint.layout,
        "fingerprint": hashlib.sha256(files).hexdigest(),
    }


def repository(folder: Path) -> tuple[str, str] | None:
    """Return repo id and commit of a folder in the Hub's cache, `models--OWNER--NAME/snapshots/
    COMMIT`; None for other folders."""
    *_, repo, snapshots, commit = ("", "", *Path(os.path.abspath(folder)).parts)
    if snapshots != "snapshots" or not repo.startswith("models--"):
        return None
    return repo.removeprefix("models--").replace("--", "/"), commit


def folder_name(folder: Path) -> str:
    """Return the last part of a folder's full path, also for `.` and `..`."""
    return os.path.basename(os.path.abspath(folder))


def fingerprint(checkpoint: Checkpoint) -> list[list[Any]]:
    """Return name, size and time of change of every source file: a changed file makes another
    source."""
    files = sorted({info.file for info in checkpoint.stored.values()})
    files += sorted(path for pattern in SIDE_PATTERNS for path in checkpoint.folder.glob(pattern))
    files.append(checkpoint.folder / "config.json")
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def remember(digest: str, checkpoint: Checkpoint) -> None:
    """Save the path of a local source for `recall`; a cache that cannot be written is not an
    error."""
    if repository(checkpoint.folder) is None:
        file = _cache() / digest
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.fsencode(os.path.abspath(checkpoint.folder)))


def recall(digest: str) -> Path | None:
    """Return the folder that `remember` saved for a record, if it still exists."""
    try:
        folder = Path(os.fsdecode((_cache() / digest).read_bytes()))
        return folder if folder.is_dir() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "mlx_diffgemma" / "conversions"


def without_paths(value: Any) -> Any:
    """Return a JSON value without the local paths that other tools write into configs."""
    if isinstance(value, dict):
        return {
            key: without_paths(entry)
            for key, entry in value.items()
            if key not in _NAME_KEYS or not _is_path(entry)
        }
    return [without_paths(entry) for entry in value] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    """Return whether a name is a path: not empty, not a plain name, not a repo id."""
    return isinstance(value, str) and not re.fullmatch(r"(?!\.)[\w.-]*(/[\w.-]+)?", value)
