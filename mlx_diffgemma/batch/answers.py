"""The file of answers: one line each, in order, only whole lines. Beside it lies a note while it is
unfinished, so that a run that was ended goes on where it stopped, and only with the same input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

from ..errors import DataError
from .lines import Extent

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NOTE = ".unfinished"
_PIECE = 1 << 20


class AnswerFile:
    """A file of answers that is being written. Another process that opens it is refused."""

    def __init__(self, path: Path, opened: IO[bytes], done: int, failed: int) -> None:
        self.path, self.done, self.failed = path, done, failed  # answers that it holds
        self._file = opened

    @classmethod
    def open(cls, path: Path, source: Path, extent: Extent, made_with: Mapping[str, Any]) -> Self:
        """Begin a file, or go on with an unfinished one.

        Args:
          path: of the answers.
          source: of the input.
          extent: of the input; an unfinished file's input may have grown since.
          made_with: what answers depend on besides, such as model and seed; JSON's types.

        Raises:
          DataError: if the file is finished, belongs to another input or other settings, is being
            written, or cannot be written.
        """
        if path.resolve() == source.resolve():
            raise DataError(f"{path} is both input and output; give another --output")
        note = path.with_name(path.name + _NOTE)
        try:
            if not note.exists() and path.exists() and path.stat().st_size:
                raise DataError(
                    f"{path} is there already, and no run of it is unfinished; give another "
                    "--output, or remove it"
                )
            opened = path.open("a+b")
            try:
                _lock(opened, path)
                if note.exists():
                    _check_note(note, source, made_with)
                _write_note(note, extent, made_with)
                done = _cut(opened)
                failed = sum(_is_error(line) for line in _lines(opened))
                if done > extent.lines:
                    raise DataError(f"{path} has {done} answers to {extent.lines} lines")
            except BaseException:
                opened.close()
                raise
            return cls(path, opened, done, failed)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error

    def write(self, answer: Mapping[str, Any]) -> None:
        """Add an answer.

        Raises:
          DataError: if it cannot be written.
        """
        try:
            self._file.write(as_line(answer))
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from error
        self.done += 1

    def finish(self) -> None:
        """Say that it is whole: its note is removed once all answers are on the disk."""
        os.fsync(self._file.fileno())
        self.path.with_name(self.path.name + _NOTE).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def as_line(answer: Mapping[str, Any]) -> bytes:
    """Return an answer as a line of JSON."""
    text = json.dumps(answer, ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"  # lone surrogates alone are replaced


def _lock(opened: IO[bytes], path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another run is writing {path}") from None


def _cut(opened: IO[bytes]) -> int:
    """Remove what follows the last whole line; return the number of lines."""
    opened.seek(0)
    lines = end = read = 0
    while piece := opened.read(_PIECE):
        if breaks := piece.count(b"\n"):
            lines += breaks
            end = read + piece.rindex(b"\n") + 1
        read += len(piece)
    opened.truncate(end)
    opened.seek(0, os.SEEK_END)
    return lines


def _lines(opened: IO[bytes]) -> Iterator[bytes]:
    opened.seek(0)
    yield from opened
    opened.seek(0, os.SEEK_END)


def _is_error(line: bytes) -> bool:
    """Return whether an answer, in any form, tells of an error."""
    try:
        answer = json.loads(line)
        response = answer.get("response") or {}
        return answer.get("error") is not None or response.get("status_code", 200) >= 400
    except (ValueError, AttributeError, TypeError):
        return False


def _check_note(note: Path, source: Path, made_with: Mapping[str, Any]) -> None:
    try:
        found = json.loads(note.read_bytes())
        before, others = Extent(**found["input"]), dict(found["made_with"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{note} is damaged; remove it and its answers to begin again") from error
    again = f"remove {note} and its answers to begin again"
    if not before.begins(source):
        raise DataError(f"{source} is not the input that {note} was made for; {again}")
    now = json.loads(json.dumps(made_with))
    for name in {**others, **now}:
        if others.get(name) != now.get(name):
            raise DataError(
                f"{note} was made with {name} {others.get(name)!r}, now it is {now.get(name)!r}; "
                f"give the same, or {again}"
            )


def _write_note(note: Path, extent: Extent, made_with: Mapping[str, Any]) -> None:
    scratch = note.with_name(note.name + ".new")
    scratch.write_text(json.dumps({"input": asdict(extent), "made_with": made_with}))
    os.replace(scratch, note)
