"""The check of a result: names, shapes, checksums, sources, errors against the source, one denoise
step."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.files import cached, resolve
from mlx_diffgemma.checkpoint.headers import HEADER_LIMIT, TensorInfo, read_headers
from mlx_diffgemma.checkpoint.load import build_model
from mlx_diffgemma.checkpoint.memory import needed_bytes, recommended_bytes
from mlx_diffgemma.checkpoint.names import part_of
from mlx_diffgemma.checkpoint.weights import fit_weights
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.errors import ConfigError, DiffGemmaError, SourceError, WeightsError
from mlx_diffgemma.language.tokenizer import load_tokenizer
from mlx_diffgemma.model import DiffusionGemma

from .origin import recall
from .record import PROVENANCE, digest_of
from .shards import squared_error
from .sources import Checkpoint, open_checkpoint
from .write import unfinished

_CHUNK = 8 << 20
_ROWS = 64  # of a tensor, compared with the source
_CANVAS = 16
# Largest allowed relative error of a tensor against its source, by bits: several times the error of
# packing normal weights, and far below that of a wrong tensor. nvfp4 has no scale for a whole
# tensor here, so very small weights may become zero.
_BOUNDS: dict[int | str, float] = {
    8: 0.08, 6: 0.15, 5: 0.3, 4: 0.6, 3: 0.9, 2: 1.0, "nvfp4": 1.0
}  # fmt: skip
_ROUNDING = 2.0**-7  # of what is not packed, to bfloat16
_FITS = 0.8  # of the memory that the device recommends


@dataclass(frozen=True)
class Verified:
    """The result of `verify`, with notes on what it could not check."""

    folder: Path
    tensors: int
    nbytes: int
    errors: dict[str, float]  # part -> relative error against the source, on a sample of rows
    notes: tuple[str, ...]


def verify(
    mlx_path: str | os.PathLike[str],
    hf_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    stage: Callable[[str], None] | None = None,
) -> Verified:
    """Check a finished conversion against its own record, the config, and the source.

    Args:
      mlx_path: folder of the result.
      hf_path: folder or Hub repo id of the source; by default the folder that this machine
        converted, or the Hub's cache. A missing source is an error if it is named here, else a
        note.
      revision: branch, tag or commit of a Hub repository.
      progress: called with (bytes checked, bytes in all, tensor).
      stage: called with the name of the next check.

    Raises:
      DiffGemmaError: one line that names the first mistake found.
    """
    if revision is not None and hf_path is None:
        raise ConfigError("a revision belongs to the Hub repository that --hf-path names")
    try:
        folder = Path(mlx_path).expanduser()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise SourceError(f"{mlx_path}: {error}") from error
    say = stage or (lambda text: None)
    try:
        say("checking files and headers")
        record = _record(folder)
        _check_files(folder, record)
        tensors = read_headers(folder)
        _check_headers(folder, record, tensors)
        config = ModelConfig.from_folder(folder)
        fit_weights(DiffusionGemma(config), config, folder)  # raises the errors of loading
        _check_sums(record, tensors, progress)
        _check_sources(record)
        if hf_path is None:
            source = _source_folder(record)
        else:
            source = resolve(hf_path, revision, for_conversion=True)
        say(f"comparing with the source, {_name(record)}")
        errors, notes = _compared(folder, record, source, must=hf_path is not None)
        say("computing one denoise step")
        notes += [_one_step(folder, config, tensors), *_tokenizer(folder, record)]
    except OSError as error:
        raise SourceError(f"{error.filename or folder}: {error.strerror}") from error
    nbytes = sum(info.nbytes for info in tensors.values())
    return Verified(folder, len(tensors), nbytes, errors, tuple(notes))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    if not path.is_file():
        if unfinished(folder):
            raise WeightsError(f"the conversion to {folder} is not finished; run it again first")
        if not folder.exists():
            raise SourceError(f"no folder {folder}; name the result to check with --mlx-path")
        raise WeightsError(
            f"{folder} has no {PROVENANCE}: it is not a result of mlx_diffgemma.convert"
        )
    try:
        record = json.loads(path.read_bytes())
        intact = isinstance(record, dict) and record.get("digest") == digest_of(record)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise WeightsError(f"{path} is damaged: its contents do not match its own digest")
    return record


def _name(record: dict[str, Any]) -> str:
    return str(record["source"].get("name", "whose name was not recorded"))


def _source_folder(record: dict[str, Any]) -> Path | None:
    """Return the folder that was converted on this machine, or the Hub cache's copy of a
    repository."""
    if revision := record["source"].get("revision"):
        return cached(_name(record), revision)
    return recall(record["digest"])


def _tokenizer(folder: Path, record: dict[str, Any]) -> list[str]:
    if {"tokenizer.json", "tokenizer.model"} & set(record["files"]):
        load_tokenizer(folder)
        return []
    return ["it has no tokenizer, as its source had none; only the model can be loaded"]


def _check_files(folder: Path, record: dict[str, Any]) -> None:
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise WeightsError(f"{path} is not what was written: its checksum differs")
    for name, expected in record["shards"].items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is missing")
        if _header_sum(path) != expected:
            raise WeightsError(f"{path} is not what was written: its header differs")
    known = {*record["files"], *record["shards"], PROVENANCE}
    if extra := sorted(
        path.name for path in folder.glob("*.safetensors") if path.name not in known
    ):
        raise WeightsError(f"{folder / extra[0]} was not written by the conversion")


def _header_sum(path: Path) -> str:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        size = path.stat().st_size
        return hashlib.sha256(prefix + file.read(min(length, size, HEADER_LIMIT))).hexdigest()


def _check_headers(folder: Path, record: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    if set(tensors) != set(record["tensors"]):
        odd = sorted(set(tensors) ^ set(record["tensors"]))[0]
        state = "there, but not recorded" if odd in tensors else "recorded, but not there"
        raise WeightsError(f"{folder}: {odd} is {state}")
    for name, info in tensors.items():
        entry = record["tensors"][name]
        found = (info.file.name, info.dtype, list(info.shape))
        expected = (entry["shard"], entry["dtype"], entry["shape"])
        if found != expected:
            raise WeightsError(f"{info.file}: {name} is {found}, recorded as {expected}")


def _check_sums(
    record: dict[str, Any],
    tensors: dict[str, TensorInfo],
    progress: Callable[[int, int, str], None] | None,
) -> None:
    total, done = sum(info.nbytes for info in tensors.values()), 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        digest = hashlib.sha256()
        with info.file.open("rb") as file:
            file.seek(info.start)
            left = info.nbytes
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
        if digest.hexdigest() != record["tensors"][name]["sha256"]:
            raise WeightsError(f"{info.file}: the bytes of {name} are not those that were written")
        done += info.nbytes
        if progress is not None:
            progress(done, total, name)


def _check_sources(record: dict[str, Any]) -> None:
    used = {name for entry in record["tensors"].values() for name in entry["from"]}
    accounted = len(used) + len(record["ignored"])
    if accounted != record["source_tensors"] or used & set(record["ignored"]):
        raise WeightsError(
            f"of {record['source_tensors']} source tensors, {accounted} are accounted for"
        )


def _compared(
    folder: Path, record: dict[str, Any], source: Path | None, *, must: bool
) -> tuple[dict[str, float], list[str]]:
    """Return the errors against the source, and a note if there are none.

    Raises:
      SourceError: if `must` is set and they cannot be measured.
    """
    if source is None:
        lost = f"the source, {_name(record)}, was not found; name it with --hf-path"
        return {}, [f"errors were not measured: {lost}"]
    try:
        before = open_checkpoint(source)
    except DiffGemmaError as error:
        why: str | None = str(error)
    else:
        errors, why = _against_source(folder, record, source, before)
        if why is None:
            return errors, []
    if must:
        raise SourceError(f"the result cannot be compared with its source: {why}")
    return {}, [f"errors were not measured: {why}"]


def _against_source(
    folder: Path, record: dict[str, Any], source: Path, before: Checkpoint
) -> tuple[dict[str, float], str | None]:
    """Return the relative error by part on some rows of every tensor, or why there is none."""
    accounted = {name for entry in record["tensors"].values() for name in entry["from"]}
    if odd := sorted(set(before.stored) ^ (accounted | set(record["ignored"]))):
        raise WeightsError(f"{odd[0]} is in {source} or in {PROVENANCE}, but not in both")
    after = open_checkpoint(folder)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, tensor in after.tensors.items():
        if name not in before.tensors or before.tensors[name].shape != tensor.shape:
            return {}, f"{source} has changed at {name}"
        rows = tensor.shape[0] if tensor.shape else 1
        take = min(rows, max(1, _ROWS // max(1, math.prod(tensor.shape[1:-1]))))
        difference = value = 0.0
        for start in sorted({0, (rows - take) // 2, rows - take}):
            d, v = squared_error(
                before.tensors[name].read(start, start + take), tensor.read(start, start + take)
            )
            difference, value = difference + d, value + v
        setting = getattr(tensor, "setting", None)
        bound = _ROUNDING if setting is None else _BOUNDS.get(setting.mode, _BOUNDS[setting.bits])
        if not math.sqrt(difference) <= bound * math.sqrt(value):  # also if one is NaN
            raise WeightsError(
                f"{name} differs from {source} by {math.sqrt(difference):.3g}, more than {bound} "
                f"of its size, {math.sqrt(value):.3g}: the source has changed, or the result is "
                "wrong"
            )
        sums[part_of(name)][0] += difference
        sums[part_of(name)][1] += value
    return {part: math.sqrt(d / v) if v else 0.0 for part, (d, v) in sums.items()}, None


def _one_step(folder: Path, config: ModelConfig, tensors: dict[str, TensorInfo]) -> str:
    canvas_length = min(_CANVAS, config.canvas_length)
    loaded = sum(info.nbytes for info in tensors.values())
    if mx.default_device() == mx.cpu:  # there, weights that are not packed become float32
        loaded += sum(
            i.nbytes for n, i in tensors.items() if i.dtype == "BF16" and ".scales" not in n
        )
    needed = needed_bytes(config.text, loaded, 1, canvas_length)
    if needed > _FITS * recommended_bytes():
        return f"no denoise step was tried: it needs about {needed / 1e9:.1f} GB of memory"
    model = build_model(folder, config)
    context = model.prefill(mx.array([[0]]))
    canvas = mx.arange(canvas_length)[None] % config.text.vocab_size
    logits = np.array(model.denoise(canvas.astype(mx.int32), context))
    if not np.isfinite(logits).all():
        raise WeightsError(f"{folder}: one denoise step gave logits that are not finite")
    return f"one denoise step of a canvas of {canvas_length} gave finite logits"
