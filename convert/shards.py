"""Functions that read, pack and write tensors within a memory limit, and record finished ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.names import VISION
from mlx_diffgemma.errors import SourceError, WeightsError

from .journal import Done, Journal
from .plan import Move, Output, Plan
from .sources import Packed

_ERROR_SAMPLE = 16  # one row in this many is unpacked again, to measure the error
_MLX_CACHE_BYTES = 256 << 20
_FINITE_PIECE = 1 << 20  # values processed together: they fit in the cache
_PENDING = 6  # arrays waiting to be written; two slices of a packed tensor
# How often finished tensors are recorded; an interruption loses these and the current one.
_SYNC_BYTES = 256 << 20
_SYNC_SECONDS = 2.0


def write_shards(
    plan: Plan,
    partial: Path,
    journal: Journal,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Carry out every move that the journal does not have yet.

    Raises:
      SourceError: if the disk has too little room; nothing is written then.
      WeightsError: if a tensor cannot be read, or holds values that are not finite.
    """
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
            f"{missing:,} bytes are still to be written, and the disk of {partial.parent} has "
            f"{free:,} free; free some space, or name a folder on another disk"
        )
    cache_limit = mx.set_cache_limit(_MLX_CACHE_BYTES)
    try:
        for name, moves in zip(plan.shard_names, plan.shards, strict=True):
            header, places = layout(moves)
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


@dataclass
class _Writer:
    """Hashes, writes and records in a thread, while the next rows are read and packed.

    Moves are recorded in groups, since a sync for each would take longer than the work.
    """

    file: BinaryIO
    journal: Journal
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _pending: deque[Future[None]] = field(default_factory=deque)
    _written: list[tuple[Move, Done]] = field(default_factory=list)  # and not yet recorded
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
        elif not self._failed:  # finished moves count, also after an error
            with suppress(OSError):
                self._sync()

    def write(self, place: int, raw: bytes, digest: hashlib._Hash) -> None:
        """Write bytes at a place in the file."""
        self._do(self._write, place, raw, digest)

    def finish(
        self, move: Move, digests: dict[str, hashlib._Hash], sums: tuple[float, float]
    ) -> None:
        """Record a move whose bytes were all given to `write`."""
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
        self._written.append((move, Done(sha256, sums)))
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


@contextmanager
def _shard(
    path: Path,
    header: bytes,
    places: dict[str, int],
    journal: Journal,
    moves: tuple[Move, ...],
) -> Iterator[BinaryIO]:
    """Open a shard at its full length with its header; create it if no earlier run did."""
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


def layout(moves: tuple[Move, ...]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a shard, and each tensor's offset: wide elements first, aligned."""
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
    """Read, pack and write one tensor, some rows at a time; rows do not depend on each other."""
    hashes = {output.name: hashlib.sha256() for output in move.outputs}
    at = {output.name: places[output.name] for output in move.outputs}
    difference = value = 0.0
    rows, step = move.rows, move.rows_at_a_time
    for start in range(0, rows, step):
        plain = move.source.read(start, min(start + step, rows)).astype(getattr(mx, dtype))
        arrays = [plain] if move.setting is None else _pack(plain, move, start)
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
    """Return whether all values are finite, by the exponent's bits in bfloat16: MLX's own test
    takes as long as packing."""
    if plain.dtype != mx.bfloat16:
        return bool(np.isfinite(np.array(plain)).all())
    bits = np.array(plain.view(mx.uint16), copy=False).reshape(-1)
    pieces = range(0, bits.size, _FINITE_PIECE)
    return all(int((bits[i : i + _FINITE_PIECE] & 0x7FFF).max()) < 0x7F80 for i in pieces)


def _pack(plain: mx.array, move: Move, start: int) -> list[mx.array]:
    """Return some rows packed; those that are packed so in the source stay as they are."""
    assert move.setting is not None
    s = move.setting
    if isinstance(move.source, Packed) and move.source.setting == s and move.part == VISION:
        return move.source.packed(start, start + plain.shape[0], plain.dtype)
    return list(mx.quantize(plain, group_size=s.group_size, bits=s.bits, mode=s.mode))


def _sampled_error(plain: mx.array, packed: list[mx.array], move: Move) -> tuple[float, float]:
    """Return the sums of squares of the packing error and of the values, over some of the rows."""
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
    """Return the sums of squares of the difference and of `before`, in float32."""
    before, after = before.astype(mx.float32), after.astype(mx.float32)
    sums = np.array(mx.stack([((after - before) ** 2).sum(), (before**2).sum()]))
    return float(sums[0]), float(sums[1])


def _raw(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array)).tobytes()
