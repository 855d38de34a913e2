"""The files beside the weights, and the record of where a result came from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import SIDE_PATTERNS
from mlx_diffgemma.checkpoint.headers import INDEX

from .card import model_card
from .journal import Journal, fingerprint
from .plan import Plan, versions
from .shards import layout

PROVENANCE = "conversion.json"


def write_side_files(plan: Plan, out: Path, journal: Journal, source: dict[str, Any]) -> None:
    """Everything beside the weights, and the record of where it all came from."""
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
            _write(out / path.name, path.read_bytes())
    _write(out / "README.md", model_card(plan, source).encode())
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
    _write(out / PROVENANCE, _json(record))
    sync_folder(out)


def digest_of(record: dict[str, Any]) -> str:
    """Of a provenance record, over everything in it but the digest itself."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_finished(target: Path) -> bool:
    return (target / PROVENANCE).is_file()


def is_result_of(target: Path, plan: Plan, source: dict[str, Any]) -> bool:
    """By its record; and no file of the source was written to since."""
    try:
        record = json.loads((target / PROVENANCE).read_bytes())
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    if (record.get("plan"), record.get("source")) != (plan.digest(), source):
        return False
    written = (target / PROVENANCE).stat().st_mtime_ns
    return all(changed <= written for _, _, changed in fingerprint(plan))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
