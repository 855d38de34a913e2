"""The files beside the weights, and the record of a result's source."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import SIDE_PATTERNS
from mlx_diffgemma.checkpoint.headers import INDEX

from .card import model_card
from .journal import Journal
from .origin import without_paths
from .plan import Plan, versions
from .shards import layout

PROVENANCE = "conversion.json"


def write_side_files(plan: Plan, out: Path, journal: Journal, source: dict[str, Any]) -> str:
    """Write everything beside the weights; return the digest of the record.

    All of it may be shared: it names the source, and holds no path of this machine.
    """
    if len(plan.shards) > 1:
        weight_map = {
            output.name: name
            for name, moves in zip(plan.shard_names, plan.shards, strict=True)
            for move in moves
            for output in move.outputs
        }
        index = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": weight_map}
        _write(out / INDEX, _json(index))
    _write(out / "config.json", _json(dict(plan.config)))
    for pattern in SIDE_PATTERNS:
        for path in sorted(plan.checkpoint.folder.glob(pattern)):
            _write(out / path.name, _shareable(path))
    _write(out / "README.md", model_card(plan).encode())
    record = _record(plan, out, journal, source)
    _write(out / PROVENANCE, _json(record))
    sync_folder(out)
    return str(record["digest"])


def _record(plan: Plan, out: Path, journal: Journal, source: dict[str, Any]) -> dict[str, Any]:
    files = sorted(p for p in out.iterdir() if p.name != PROVENANCE and p.suffix != ".safetensors")
    names = {id(info): name for name, info in plan.checkpoint.stored.items()}
    record: dict[str, Any] = {
        "plan": plan.digest(),
        "source": source,
        "recipe": plan.recipe.as_object() if plan.recipe else None,
        "dtype": plan.dtype,
        "versions": versions(),
        "shards": {  # name -> checksum of its header
            name: hashlib.sha256(layout(moves)[0]).hexdigest()
            for name, moves in zip(plan.shard_names, plan.shards, strict=True)
        },
        "tensors": {
            output.name: {
                "shard": name,
                "dtype": output.dtype,
                "shape": list(output.shape),
                "sha256": journal.done[move.target].sha256[output.name],
                "from": [names[id(info)] for info in move.source.infos],
            }
            for name, moves in zip(plan.shard_names, plan.shards, strict=True)
            for move in moves
            for output in move.outputs
        },
        "ignored": dict(plan.checkpoint.ignored),
        "source_tensors": len(plan.checkpoint.stored),
        "files": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    record["digest"] = digest_of(record)
    return record


def _shareable(path: Path) -> bytes:
    """Return a file byte for byte, but a config without its local paths."""
    content = path.read_bytes()
    if not path.name.endswith("_config.json"):
        return content
    try:
        value = json.loads(content)
        shared = without_paths(value)
    except (ValueError, RecursionError):
        return content
    return content if shared == value else _json(shared)


def digest_of(record: dict[str, Any]) -> str:
    """Return the digest of a record, without its own digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_finished(target: Path) -> bool:
    """Return whether a folder is the result of a conversion."""
    return (target / PROVENANCE).is_file()


def difference(target: Path, plan: Plan, source: dict[str, Any]) -> str | None:
    """Return why a finished result differs from a plan's, or None if it does not."""
    try:
        record = json.loads((target / PROVENANCE).read_bytes())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return f"its {PROVENANCE} is damaged"
    if record.get("source") != source:
        return "its source is another one or has changed since"
    return None if record.get("plan") == plan.digest() else "it has other settings or versions"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
