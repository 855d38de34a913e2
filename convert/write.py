"""Moves within a memory limit: crash-safe, resumable to the same bytes, and renamed once at the
end.

Beside the result lies `NAME.partial` while work goes on: the shards at their full length, and a
journal with a line for every finished move. A line is written only after its bytes are on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.files import SIDE_PATTERNS, resolve
from mlx_diffgemma.checkpoint.headers import INDEX
from mlx_diffgemma.errors import ConfigError, SourceError, WeightsError

from .card import model_card
from .plan import Move, Output, Plan, make_plan, versions
from .recipe import MIXED, choose
from .sources import open_checkpoint

PROVENANCE = "conversion.json"
_ERROR_SAMPLE = 16  # one row in so many is unpacked again, to measure the error
_MLX_CACHE_BYTES = 256 << 20
_FINITE_PIECE = 1 << 20  # values looked at together: they stay in the cache
_PENDING = 6  # arrays that wait to be written; two slices of a packed tensor
# How often finished tensors are recorded; an interruption costs these and the one at hand.
_SYNC_BYTES = 256 << 20
_SYNC_SECONDS = 2.0


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    folder: Path
    plan: Plan
    seconds: float
    resumed_moves: int
    errors: dict[str, float]  # part -> relative error of its packed weights, on a sample of rows
    was_there: bool = False


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str],
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    recipe: str = MIXED,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Converts a checkpoint; run again after any interruption, it goes on where it stopped.

    Args:
      hf_path: folder or Hub repo id of the source.
      mlx_path: folder of the result; it appears only when it is whole.
      quantize: pack the weights.
      q_bits: bits of the experts (`mixed`) or of everything (`uniform`).
      q_group_size: weights that share a scale, likewise.
      q_mode: affine, mxfp4, mxfp8 or nvfp4, likewise.
      recipe: `mixed`, `uniform`, or a TOML file.
      dtype: type of what is not packed, and of affine scales; bfloat16 by default.
      dequantize: unpack an MLX checkpoint.
      revision: branch, tag or commit of a Hub repository.
      force: move a finished result aside, and start over where partial work does not fit.
      progress: called with (source bytes done, source bytes in all, tensor).

    Raises:
      DiffGemmaError: one line; partial work is kept for the next run.
    """
    plan = prepare(
        hf_path,
        quantize=quantize,
        q_bits=q_bits,
        q_group_size=q_group_size,
        q_mode=q_mode,
        recipe=recipe,
        dtype=dtype,
        dequantize=dequantize,
        revision=revision,
    )
    source = origin(plan, hf_path, revision)
    return carry_out(plan, Path(mlx_path), source=source, force=force, progress=progress)


def origin(plan: Plan, hf_path: str | os.PathLike[str], revision: str | None) -> dict[str, Any]:
    """Where a plan's source is, for the record: a full path, or a repository at a commit."""
    folder = plan.checkpoint.folder
    is_cached = folder.parent.name == "snapshots"  # of the Hub: the folder is named by its commit
    return {
        "path": os.fspath(hf_path) if is_cached else str(folder.absolute()),
        "revision": folder.name if is_cached else revision,
        "layout": plan.checkpoint.layout,
    }


def prepare(
    hf_path: str | os.PathLike[str],
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    recipe: str = MIXED,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Plan:
    """The plan of `convert`, from headers alone; arguments and errors are the same.

    A plan made for a dry run downloads no weights, and cannot be carried out.
    """
    given = (q_bits, q_group_size, q_mode)
    if not quantize and (any(value is not None for value in given) or recipe != MIXED):
        raise ConfigError("bits, group size, mode and recipe only have a meaning with -q")
    chosen = choose(recipe, bits=q_bits, group_size=q_group_size, mode=q_mode) if quantize else None
    checkpoint = open_checkpoint(
        resolve(hf_path, revision, for_conversion=True, headers_only=dry_run),
        compare=not dry_run,
    )
    return make_plan(checkpoint, recipe=chosen, dtype=dtype, dequantize=dequantize)


def carry_out(
    plan: Plan,
    target: Path,
    *,
    source: dict[str, Any],
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Does what the plan says, once."""
    started = time.perf_counter()
    try:
        target = target.expanduser().absolute()
        if not target.name:
            raise SourceError(f"{target} cannot be the folder of a result")
        partial = target.with_name(target.name + ".partial")
        is_source = plan.checkpoint.folder.resolve() in (target.resolve(), partial.resolve())
    except RuntimeError as error:  # nobody's home, or links in a circle
        raise SourceError(f"{target}: {error}") from error
    if is_source:
        raise ConfigError(f"{target} is the source itself; choose another folder for the result")
    try:
        if _is_finished(target):
            if not force and _is_result_of(target, plan, source):
                if not (partial / "out").exists():  # renamed, and then interrupted
                    _clear(partial)
                return Summary(target, plan, 0.0, len(plan.moves), {}, was_there=True)
            if not force:
                raise SourceError(
                    f"{target} is there already, from another source or by other settings; "
                    "--force moves it aside"
                )
        elif target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SourceError(
                f"{target} is there and is no result of a conversion; it is not touched"
            )
        if partial.is_dir() and not _is_journal_of_ours(partial) and any(partial.iterdir()):
            raise SourceError(
                f"{partial} is there and is no unfinished conversion; move it out of the way"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        with _Journal(partial, plan, force=force) as journal:
            resumed = len(journal.done)
            _write_shards(plan, partial, journal, progress)
            _write_side_files(plan, partial / "out", journal, source)
            if _fingerprint(plan) != journal.source:
                raise SourceError(
                    f"{plan.checkpoint.folder} has changed while it was converted; "
                    f"delete {partial} or give --force to start over"
                )
            if _is_finished(target):
                target.rename(_free_name(target))
            elif target.exists():
                target.rmdir()
            (partial / "out").rename(target)
            _sync_folder(target.parent)
            errors = journal.errors()
            _clear(partial)  # while nobody else can take it up
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SourceError(
                f"the disk of {target.parent} is full; free some space and run the same again, "
                f"it goes on from {partial.name}"
            ) from error
        place = error.filename or partial
        raise SourceError(f"{place}: {error.strerror}; {partial.name} is kept") from error
    return Summary(target, plan, time.perf_counter() - started, resumed, errors)


@dataclass
class _Done:
    """A finished move, as the journal remembers it."""

    sha256: dict[str, str]
    error: tuple[float, float] = (0.0, 0.0)  # sums of squares: difference, value


@dataclass
class _Journal:
    """Finished moves on disk, and the lock that keeps a second run away."""

    folder: Path
    plan: Plan
    force: bool
    done: dict[str, _Done] = field(default_factory=dict)
    source: list[list[Any]] = field(default_factory=list)
    _file: BinaryIO | None = None

    def __enter__(self) -> _Journal:
        path = self.folder / "journal"
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise SourceError(f"another conversion is writing {self.folder}") from error
        try:
            self._take_up()
        except BaseException:
            self._file.close()
            raise
        return self

    def _take_up(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]  # the last may be torn
        self.source = _fingerprint(self.plan)
        head = {"plan": self.plan.digest(), "source": self.source}
        whole = 0
        if lines and self._matches(lines[0], head):
            for line in lines:
                if line is not lines[0]:
                    try:
                        self._recall(json.loads(line))
                    except (
                        ValueError,
                        TypeError,
                        KeyError,
                        RecursionError,
                    ):  # what follows damage is not believed
                        break
                whole += len(line) + 1
            self._file.truncate(whole)
        else:
            if (self.folder / "out").exists():
                shutil.rmtree(self.folder / "out")
            self._file.truncate(0)
            self._append(head)
        (self.folder / "out").mkdir(exist_ok=True)

    def _recall(self, entry: dict[str, Any]) -> None:
        if "forget" in entry:
            for target in entry["forget"]:
                self.done.pop(target, None)
        else:
            difference, value = entry["error"]
            self.done[entry["move"]] = _Done(dict(entry["sha256"]), (difference, value))

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, finished: list[tuple[Move, _Done]]) -> None:
        """The bytes of these moves are on the disk."""
        self._append(
            *({"move": m.target, "sha256": d.sha256, "error": d.error} for m, d in finished)
        )
        self.done.update((move.target, done) for move, done in finished)

    def forget(self, moves: tuple[Move, ...]) -> None:
        """Their shard is gone, which the next run must know as well."""
        lost = [move.target for move in moves if self.done.pop(move.target, None)]
        if lost:
            self._append({"forget": lost})

    def errors(self) -> dict[str, float]:
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for move in self.plan.moves:
            difference, value = self.done[move.target].error
            sums[move.part][0] += difference
            sums[move.part][1] += value
        return {part: math.sqrt(d / v) for part, (d, v) in sums.items() if v}

    def _append(self, *entries: dict[str, Any]) -> None:
        assert self._file is not None
        for entry in entries:
            self._file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _matches(self, line: bytes, head: dict[str, Any]) -> bool:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if found == head:
            return True
        if self.force:
            return False
        if not isinstance(found, dict):
            why = "its journal is damaged"
        elif found.get("source") != head["source"]:
            why = "the source has changed since"
        else:
            why = "it was begun with other settings or versions"
        raise SourceError(
            f"{self.folder} holds an unfinished conversion, and {why}; delete it, or give --force "
            "to start over"
        )


@dataclass
class _Writer:
    """Hashes, writes and records in a thread, while the next rows are read and packed.

    Moves are recorded in groups, since a sync for each would take longer than the work.
    """

    file: BinaryIO
    journal: _Journal
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _pending: deque[Future[None]] = field(default_factory=deque)
    _written: list[tuple[Move, _Done]] = field(default_factory=list)  # and not yet recorded
    _unsynced_bytes: int = 0
    _synced_at: float = field(default_factory=time.monotonic)
    _failed: bool = False

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            for work in self._pending:
                work.result()
            self._sync()
        elif not self._failed:  # what is finished counts, whatever happened since
            with suppress(OSError):
                self._sync()

    def write(self, place: int, raw: bytes, digest: hashlib._Hash) -> None:
        """Bytes for a place in the file."""
        self._do(self._write, place, raw, digest)

    def finish(
        self, move: Move, digests: dict[str, hashlib._Hash], sums: tuple[float, float]
    ) -> None:
        """All of a move has been given to `write`."""
        self._do(self._finish, move, digests, sums)

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) >= _PENDING):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._unless_failed, work, *arguments))

    def _unless_failed(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._failed:  # after a failed sync, a later one proves nothing about earlier bytes
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _write(self, place: int, raw: bytes, digest: hashlib._Hash) -> None:
        digest.update(raw)
        self.file.seek(place)
        self.file.write(raw)
        self._unsynced_bytes += len(raw)

    def _finish(
        self, move: Move, digests: dict[str, hashlib._Hash], sums: tuple[float, float]
    ) -> None:
        sha256 = {name: digest.hexdigest() for name, digest in digests.items()}
        self._written.append((move, _Done(sha256, sums)))
        if (
            self._unsynced_bytes >= _SYNC_BYTES
            or time.monotonic() - self._synced_at >= _SYNC_SECONDS
        ):
            self._sync()

    def _sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.journal.add(self._written)
        self._written, self._unsynced_bytes, self._synced_at = [], 0, time.monotonic()


def _write_shards(
    plan: Plan,
    partial: Path,
    journal: _Journal,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    total = sum(move.source_bytes for move in plan.moves)
    finished = sum(m.source_bytes for m in plan.moves if m.target in journal.done)
    missing = sum(
        output.nbytes
        for move in plan.moves
        if move.target not in journal.done
        for output in move.outputs
    )
    free = shutil.disk_usage(partial).free
    if missing > free:
        raise SourceError(
            f"{missing:,} bytes are still to be written, "
            f"and the disk of {partial} has {free:,} free"
        )
    cache_limit = mx.set_cache_limit(_MLX_CACHE_BYTES)
    try:
        for name, moves in zip(plan.shard_names, plan.shards, strict=True):
            header, places = _layout(moves)
            path = partial / "out" / name
            with _shard(path, header, places, journal, moves) as file, _Writer(file, journal) as w:
                for move in moves:
                    if move.target in journal.done:
                        continue
                    _carry(move, w, places, plan.dtype)
                    finished += move.source_bytes
                    if progress is not None:
                        progress(finished, total, move.target)
    finally:
        mx.set_cache_limit(cache_limit)


@contextmanager
def _shard(
    path: Path,
    header: bytes,
    places: dict[str, int],
    journal: _Journal,
    moves: tuple[Move, ...],
) -> Iterator[BinaryIO]:
    """The shard at its full length with its header, made now or by an earlier run."""
    last = max((places[o.name] + o.nbytes for m in moves for o in m.outputs), default=len(header))
    if not path.is_file() or path.stat().st_size != last:
        journal.forget(moves)
        path.unlink(missing_ok=True)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(last)
        file.seek(0)
        file.write(header)
        file.flush()
        yield file


def _layout(moves: tuple[Move, ...]) -> tuple[bytes, dict[str, int]]:
    """The header of a shard, and where each tensor begins. Wide elements first: none lies askew."""
    outputs = [output for move in moves for output in move.outputs]
    outputs.sort(key=lambda output: -_element_bytes(output))
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    header = struct.pack("<Q", len(raw)) + raw
    return header, {o.name: len(header) + entries[o.name]["data_offsets"][0] for o in outputs}


def _element_bytes(output: Output) -> int:
    return output.nbytes // max(1, math.prod(output.shape))


def _carry(move: Move, writer: _Writer, places: dict[str, int], dtype: str) -> None:
    """Reads, packs and writes one tensor, some rows at a time; rows do not depend on each other."""
    hashes = {output.name: hashlib.sha256() for output in move.outputs}
    at = {output.name: places[output.name] for output in move.outputs}
    difference = value = 0.0
    rows, step = move.rows, move.rows_at_a_time
    for start in range(0, rows, step):
        plain = move.source.read(start, min(start + step, rows)).astype(getattr(mx, dtype))
        arrays = [plain] if move.setting is None else _pack(plain, move)
        mx.eval(plain, arrays)
        if not _is_finite(plain):
            raise WeightsError(f"{move.target} holds values that are not finite in {dtype}")
        for output, array in zip(move.outputs, arrays, strict=True):
            raw = _raw(array)
            writer.write(at[output.name], raw, hashes[output.name])
            at[output.name] += len(raw)
        if move.setting is not None:
            d, v = _sampled_error(plain, arrays, move)
            difference, value = difference + d, value + v
    writer.finish(move, hashes, (difference, value))


def _is_finite(plain: mx.array) -> bool:
    """By the bits of the exponent in bfloat16: MLX's own test takes as long as packing."""
    if plain.dtype != mx.bfloat16:
        return bool(np.isfinite(np.array(plain)).all())
    bits = np.array(plain.view(mx.uint16), copy=False).reshape(-1)
    pieces = range(0, bits.size, _FINITE_PIECE)
    return all(int((bits[i : i + _FINITE_PIECE] & 0x7FFF).max()) < 0x7F80 for i in pieces)


def _pack(plain: mx.array, move: Move) -> list[mx.array]:
    assert move.setting is not None
    s = move.setting
    return list(mx.quantize(plain, group_size=s.group_size, bits=s.bits, mode=s.mode))


def _sampled_error(plain: mx.array, packed: list[mx.array], move: Move) -> tuple[float, float]:
    """Sums of squares of what packing changed and of what there was, over some of the rows."""
    assert move.setting is not None
    s = move.setting
    real, weight, scales, *biases = (
        a.reshape(-1, a.shape[-1])[::_ERROR_SAMPLE] for a in (plain, *packed)
    )
    unpacked = mx.dequantize(
        weight,
        scales,
        biases[0] if biases else None,
        group_size=s.group_size,
        bits=s.bits,
        mode=s.mode,
    )
    return squared_error(real, unpacked)


def squared_error(before: mx.array, after: mx.array) -> tuple[float, float]:
    """Sums of squares of the difference, and of what there was before; in float32."""
    before, after = before.astype(mx.float32), after.astype(mx.float32)
    sums = np.array(mx.stack([((after - before) ** 2).sum(), (before**2).sum()]))
    return float(sums[0]), float(sums[1])


def _raw(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array)).tobytes()


def _write_side_files(plan: Plan, out: Path, journal: _Journal, source: dict[str, Any]) -> None:
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
            name: hashlib.sha256(_layout(moves)[0]).hexdigest()
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
    _sync_folder(out)


def digest_of(record: dict[str, Any]) -> str:
    """Of a provenance record, over everything in it but the digest itself."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _fingerprint(plan: Plan) -> list[list[Any]]:
    """Of the source files: a file that was written to is another source."""
    files = sorted({info.file for info in plan.checkpoint.stored.values()})
    files += sorted(
        path for pattern in SIDE_PATTERNS for path in plan.checkpoint.folder.glob(pattern)
    )
    files.append(plan.checkpoint.folder / "config.json")
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _is_finished(target: Path) -> bool:
    return (target / PROVENANCE).is_file()


def _is_result_of(target: Path, plan: Plan, source: dict[str, Any]) -> bool:
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
    return all(changed <= written for _, _, changed in _fingerprint(plan))


def _is_journal_of_ours(partial: Path) -> bool:
    """Whether a folder holds what an unfinished conversion leaves, and nothing else."""
    return {path.name for path in partial.iterdir()} <= {"journal", "out"} and (
        partial / "journal"
    ).is_file()


def _clear(partial: Path) -> None:
    """Takes away what is left of a finished conversion; nothing that is not ours."""
    if partial.is_dir() and _is_journal_of_ours(partial):
        (partial / "journal").unlink()
        with suppress(OSError):
            partial.rmdir()


def _free_name(target: Path) -> Path:
    number = 1
    while (name := target.with_name(f"{target.name}.old-{number}")).exists():
        number += 1
    return name


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
