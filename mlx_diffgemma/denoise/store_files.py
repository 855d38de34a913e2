"""Contexts in a folder, for a later process or one beside. Knows files, not when to keep what.

A text has up to two kinds of files: an *end* has the keys and values of sliding layers at its end,
a *part* those of full layers from an earlier place on, so that texts with the same beginning share
its parts. Files never change, and a file's name holds a hash of its content: a file that is damaged
or half written is noticed, and processes may share the folder without locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import secrets
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.names import VISION, part_of
from ..errors import ConfigError
from ..model import Context, DiffusionGemma
from ..model.context import LayerContext
from .store_format import (
    TYPES,
    Arrays,
    RefusedError,
    are_finite,
    bits_of,
    content_hash,
    header_of,
    parsed,
)

VERSION = 2  # of the files and of what keys and values mean
_MOST_WAITING = 1 << 30  # bytes that may wait to be written; what comes then is not written
_HASHED_WHOLE = 1 << 16  # values of a weight; of larger ones a sample is hashed
_SAMPLE = 1 << 10
_LEFT_SECONDS = 10, 3600  # age of a temporary file that nobody writes, with and without locks
_NAME = re.compile(
    # model, start, length, text, content
    r"(part|end)-([0-9a-f]{16})-(\d{1,9})-(\d{1,9})-([0-9a-f]{32})-([0-9a-f]{32})\.safetensors"
)
# A temporary file's name says how large it will be, so that writers beside can count it.
_TEMPORARY = re.compile(r"\.context-(\d{1,15})-[0-9a-f]{16}\.tmp")


@dataclass(frozen=True, slots=True)
class _Key:
    """What a file holds."""

    kind: str
    start: int  # where a part begins; 0 for an end
    length: int  # of the text
    text: str  # hash of its tokens


@dataclass(frozen=True, slots=True)
class _File:
    """A file in the folder, or one that waits to be written and has no name yet."""

    key: _Key
    name: str = ""
    model: str = ""
    content: str = ""  # hash
    size: int = 0
    used: int = 0  # nanoseconds


class ContextFiles:
    """The contexts of one model in a folder, which holds up to a number of bytes of all models.

    The thread that runs the model copies the arrays, which MLX wants, and another one hashes and
    writes the copies, so that no step waits for the disk.
    """

    def __init__(self, folder: Path, max_bytes: int, model: DiffusionGemma) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._model, self._dtype = fingerprint(model), model.dtype
        self._layers = model.config.text.layers
        self._window = model.config.text.sliding_window
        self._lock = threading.Lock()
        self._waiting: dict[_Key, int] = {}  # bytes that are not written yet
        self._refused: set[str] = set()  # names of damaged and foreign files
        self._has_warned = False
        # The interpreter waits for its thread at exit, so that a last turn is not lost.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlx_diffgemma contexts")
        self._writes: list[Future[None]] = []

    def find(self, tokens: np.ndarray, known: int) -> Context | None:
        """Return the context of the longest text in the folder that `tokens`, int32 [S], begin
        with; None if it is no longer than `known`. Files that cannot be used are left out."""
        unusable: set[str] = set()
        while True:
            files = [file for file in self._mine() if file.name not in unusable]
            texts = _beginnings(tokens, files)
            chains = _chains(files, texts)
            ends = {f.key.length: f for f in files if f.key == _end(f.key.length, texts)}
            lengths = [length for length in chains if length in ends and length > known]
            if not lengths:
                return None
            wanted = [ends[max(lengths)], *chains[max(lengths)]]
            read: list[Arrays] = []
            for file in wanted:
                if (arrays := self._read(file, tokens)) is None:
                    unusable.add(file.name)
                    break
                read.append(arrays)
            else:
                self._touch(wanted)
                return self._context(max(lengths), read)

    def save(self, tokens: np.ndarray, context: Context) -> None:
        """Have written what the folder lacks of the context of `tokens`, int32 [S]."""
        while self._writes and self._writes[0].done():
            self._writes.pop(0).result()
        with self._lock:
            waiting = dict(self._waiting)
        files = [*self._mine(), *(_File(key, size=size) for key, size in waiting.items())]
        texts = _beginnings(tokens, files, len(tokens))
        chains = _chains(files, texts)
        end, known = _end(len(tokens), texts), max(chains)
        there = [file for file in files if file.key == end]
        keys = [] if there else [end]
        if known < len(tokens):  # a part comes first: without it, the end is of no use
            keys.insert(0, _Key("part", known, len(tokens), end.text))
        used, nbytes = [*there, *chains[known]], sum(map(self._nbytes, keys))
        self._touch(used)
        is_busy = sum(waiting.values()) + nbytes > _MOST_WAITING
        if not keys or is_busy or nbytes > self._max_bytes:
            return
        copies = {key: self._copies(key, tokens, context) for key in keys}
        with self._lock:
            self._waiting |= {key: self._nbytes(key) for key in keys}
        self._writes.append(self._writer.submit(self._write_all, copies, used))

    @property
    def nbytes(self) -> int:
        """The bytes of the folder's context files, of all models."""
        return sum(file.size for file in self._listed())

    def flush(self) -> None:
        """Wait until everything is written."""
        while self._writes:
            self._writes.pop(0).result()

    # --- Arrays and contexts

    def _shapes(self, key: _Key) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the number and the shape of each layer that a file holds."""
        for number, layer in enumerate(self._layers):
            if layer.is_sliding == (key.kind == "end"):
                places = key.length - key.start
                if layer.is_sliding:
                    places = min(key.length, self._window - 1)
                yield number, (1, layer.num_key_value_heads, places, layer.head_dim)

    def _nbytes(self, key: _Key) -> int:
        """Return the bytes of a file, but for its header."""
        arrays = 2 * sum(math.prod(shape) for _, shape in self._shapes(key))
        return arrays * self._dtype.size + 4 * key.length

    def _copies(self, key: _Key, tokens: np.ndarray, context: Context) -> Arrays:
        arrays: Arrays = {"tokens": ("I32", np.array(tokens, np.int32))}
        for number, shape in self._shapes(key):
            layer = context.layers[number]
            for name, array in (("keys", layer.keys), ("values", layer.values)):
                own = array[:, :, key.start :]
                assert own.shape == shape and own.dtype == self._dtype
                arrays[f"{number}.{name}"] = TYPES[own.dtype].name, bits_of(own)
        return arrays

    def _context(self, length: int, read: Sequence[Arrays]) -> Context:
        """Return the context of an end and its parts."""
        end, *parts = read
        layers = []
        for number, layer in enumerate(self._layers):
            sources = [end] if layer.is_sliding else parts
            both = []
            for name in (f"{number}.keys", f"{number}.values"):
                bits = [arrays[name][1] for arrays in sources]
                joined = bits[0] if len(bits) == 1 else np.concatenate(bits, axis=2)
                both.append(mx.array(joined).view(self._dtype))
            layers.append(LayerContext(*both))
        context = Context(tuple(layers), length, 1)
        mx.eval(context.arrays)
        return context

    # --- Files

    def _listed(self) -> list[_File]:
        """Return the context files in the folder, of any model."""
        files = []
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                found = _NAME.fullmatch(entry.name)
                if not found or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(FileNotFoundError):  # removed by another process
                    status = entry.stat(follow_symlinks=False)
                    key = _Key(found[1], int(found[3]), int(found[4]), found[5])
                    size, used = status.st_size, status.st_mtime_ns
                    files.append(_File(key, entry.name, found[2], found[6], size, used))
        return files

    def _mine(self) -> list[_File]:
        """Return the files of this model, without those that were refused."""
        files = self._listed()
        return [f for f in files if f.model == self._model and f.name not in self._refused]

    def _touch(self, files: Iterable[_File]) -> None:
        """Let files count as used just now."""
        now = time.time_ns()
        for file in files:
            if file.name:
                with suppress(OSError):
                    os.utime(self._folder / file.name, ns=(now, now))

    def _read(self, file: _File, tokens: np.ndarray) -> Arrays | None:
        """Return the checked arrays of a file; None, with a warning, if it cannot be used."""
        try:
            raw = (self._folder / file.name).read_bytes()
            return self._checked(file, raw, tokens)
        except FileNotFoundError:  # another process made room meanwhile
            return None
        except (OSError, RefusedError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self._refused.add(file.name)
            warnings.warn(f"{self._folder / file.name} is not used: {why}", stacklevel=2)
            return None

    def _checked(self, file: _File, raw: bytes, tokens: np.ndarray) -> Arrays:
        if content_hash(raw) != file.content:
            raise RefusedError("it is damaged")
        metadata, arrays = parsed(raw)
        if metadata != self._metadata:
            raise RefusedError("it is of another model or version")
        text = arrays.pop("tokens", ("", np.zeros(0)))[1]
        if not np.array_equal(text, tokens[: file.key.length]):
            raise RefusedError("it is of another text")
        kind = TYPES[self._dtype]
        expected = {
            f"{number}.{name}": (kind.name, shape)
            for number, shape in self._shapes(file.key)
            for name in ("keys", "values")
        }
        if {name: (type_, bits.shape) for name, (type_, bits) in arrays.items()} != expected:
            raise RefusedError("its arrays have other names, types or shapes than the model's")
        if not are_finite(arrays):
            raise RefusedError("it holds numbers that are not finite")
        return arrays

    @property
    def _metadata(self) -> dict[str, str]:
        return {"format": "mlx_diffgemma context", "version": str(VERSION), "model": self._model}

    def _write_all(self, copies: Mapping[_Key, Arrays], used: Sequence[_File]) -> None:
        """Write a text's files, in the writer's thread."""
        written = list(used)
        try:
            sizes = [file.size for file in used]
            sizes += [_size(self._metadata, arrays) for arrays in copies.values()]
            if sum(sizes) > self._max_bytes or not all(map(are_finite, copies.values())):
                return
            for key, arrays in copies.items():
                if (file := self._write(key, arrays, written)) is None:
                    return
                written.append(file)
            self._touch(written)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"contexts cannot be written to {self._folder}: {error.strerror}", stacklevel=2
                )
        finally:
            with self._lock:
                for key in copies:
                    self._waiting.pop(key, None)

    def _write(self, key: _Key, arrays: Arrays, used: Sequence[_File]) -> _File | None:
        """Write a file; return None if there is no room for it."""
        header, size = header_of(self._metadata, arrays), _size(self._metadata, arrays)
        temporary = self._folder / f".context-{size}-{secrets.token_hex(8)}.tmp"
        with temporary.open("xb") as stream:
            try:
                with suppress(OSError):  # not every file system has locks
                    fcntl.flock(stream, fcntl.LOCK_EX)  # it is free once this process is gone
                if not self._make_room({file.name for file in used}):
                    return None
                digest = hashlib.sha256(header)
                stream.write(header)
                for _, bits in arrays.values():
                    digest.update(bits.data)
                    stream.write(bits.data)
                stream.flush()
                os.fsync(stream.fileno())
                content = digest.hexdigest()[:32]
                name = (
                    f"{key.kind}-{self._model}-{key.start}-{key.length}-{key.text}-{content}"
                    ".safetensors"
                )
                os.replace(temporary, self._folder / name)
            except FileNotFoundError:  # somebody has tidied up
                return None
            finally:
                temporary.unlink(missing_ok=True)
        self._refused.discard(name)  # it may have been damaged, and is whole again
        return _File(key, name, self._model, content, size)

    def _make_room(self, kept: set[str]) -> bool:
        """Remove files that were not used for longest, until what is there and what is about to be
        written fits. Temporary files count with the size that they will have, so that processes
        that write at the same time stay within the budget together."""
        total = self._temporary_bytes()  # first: those that become files meanwhile count as both
        files = self._listed()
        total += sum(file.size for file in files)
        # Of a text, the end goes first, then parts from the last one on, which need the others.
        files.sort(key=lambda f: (f.used, f.key.kind == "part", -f.key.length))
        for file in files:
            if total <= self._max_bytes:
                break
            if file.name not in kept:
                (self._folder / file.name).unlink(missing_ok=True)
                total -= file.size
        return total <= self._max_bytes

    def _temporary_bytes(self) -> int:
        """Return how large the files will be that processes are writing. Remove those whose writer
        is gone."""
        total = 0
        for path in self._folder.iterdir():
            if not (found := _TEMPORARY.fullmatch(path.name)):
                continue
            with suppress(FileNotFoundError), path.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    least_seconds = _LEFT_SECONDS[0]  # a writer locks it just after making it
                except OSError:  # its writer has it, or the folder knows no locks
                    least_seconds = _LEFT_SECONDS[1]
                if time.time() - path.stat().st_mtime > least_seconds:
                    path.unlink()
                else:
                    total += int(found[1])
        return total


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """Return a folder that files can be written to; it is made if it is missing.

    Raises:
      ConfigError: if it is a file or cannot be written to.
    """
    path = Path(folder).expanduser()
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; contexts are kept in a folder")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # contexts tell what was read
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written to: {error.strerror}") from error
    return path


def fingerprint(model: DiffusionGemma) -> str:
    """Return a hash of a model: its config, and the names, types and shapes of its weights and
    adapters, small ones with all values, and others with a sample of them."""
    digest = hashlib.sha256(f"{VERSION} {model.config!r}".encode())
    leaves: Any = tree_flatten(model.parameters())
    # Vision may be loaded later, and stands for itself.
    _hash_weights(digest, [leaf for leaf in leaves if part_of(leaf[0]) != VISION])
    return digest.hexdigest()[:16]


def vision_fingerprint(model: DiffusionGemma) -> bytes:
    """Return a hash of what reads images, as `fingerprint` makes it; of its file, if it is loaded
    only when the first image comes; empty if there is none."""
    if model.has_vision and model.vision_is_own:
        digest = hashlib.sha256()
        leaves: Any = tree_flatten(model.model.encoder.parameters())
        _hash_weights(digest, [leaf for leaf in leaves if part_of(leaf[0]) == VISION])
        return digest.digest()
    return model.vision_source.fingerprint() if model.vision_source.nbytes else b""


def _hash_weights(digest: Any, leaves: Sequence[tuple[str, mx.array]]) -> None:
    for name, array in sorted(leaves, key=lambda leaf: leaf[0]):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.size > _HASHED_WHOLE:
            places = np.linspace(0, array.size - 1, _SAMPLE).astype(np.int64)
            where = np.unravel_index(places, array.shape)
            array = array[tuple(mx.array(each.astype(np.int32)) for each in where)]
        digest.update(bits_of(array).tobytes())


def _size(metadata: Mapping[str, str], arrays: Arrays) -> int:
    return len(header_of(metadata, arrays)) + sum(bits.nbytes for _, bits in arrays.values())


def _beginnings(tokens: np.ndarray, files: Iterable[_File], *more: int) -> dict[int, str]:
    """Return the hashes of the beginnings of a text, for all lengths that files have, and more."""
    texts, digest, done = {}, hashlib.sha256(), 0
    for length in sorted({*(file.key.length for file in files), *more}):
        if length <= len(tokens):
            digest.update(np.ascontiguousarray(tokens[done:length], "<i4").tobytes())
            texts[length], done = digest.hexdigest()[:32], length
    return texts


def _end(length: int, texts: Mapping[int, str]) -> _Key:
    return _Key("end", 0, length, texts.get(length, ""))


def _chains(files: Iterable[_File], texts: Mapping[int, str]) -> dict[int, list[_File]]:
    """Return the parts, from the first token on, of each length of a text that has all of them."""
    chains: dict[int, list[_File]] = {0: []}
    for file in sorted(files, key=lambda f: f.key.length):
        key = file.key
        is_next = key.kind == "part" and key.start < key.length and key.start in chains
        if is_next and key.text == texts.get(key.length):
            chains.setdefault(key.length, [*chains[key.start], file])
    return chains
