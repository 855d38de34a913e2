"""The folder of an unfinished conversion, and the journal of its finished moves.

`NAME.partial`, beside the result, exists during the work: the shards at their full length, and a
journal with a line for every finished move. A line is written only after its bytes are on the disk.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mlx_diffgemma.errors import SourceError

from .origin import fingerprint
from .plan import Move, Plan


@dataclass
class Done:
    """A finished move, as the journal records it."""

    sha256: dict[str, str]
    error: tuple[float, float] = (0.0, 0.0)  # sums of squares: difference, value


@dataclass
class Journal:
    """Finished moves on disk, and the lock that prevents a second run."""

    folder: Path
    plan: Plan
    force: bool
    done: dict[str, Done] = field(default_factory=dict)
    source: list[list[Any]] = field(default_factory=list)
    _file: BinaryIO | None = None

    def __enter__(self) -> Journal:
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
        self.source = fingerprint(self.plan.checkpoint)
        head = {"plan": self.plan.digest(), "source": self.source}
        whole = 0
        if lines and self._matches(lines[0], head):
            for line in lines:
                if line is not lines[0]:
                    try:
                        self._recall(json.loads(line))
                    except (ValueError, TypeError, KeyError, RecursionError):
                        break  # lines after a damaged one are not trusted
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
            self.done[entry["move"]] = Done(dict(entry["sha256"]), (difference, value))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        with self._file:
            if kind is not None and not self.done:  # there is nothing to resume
                with suppress(OSError):
                    shutil.rmtree(self.folder / "out", ignore_errors=True)
                    clear(self.folder)

    def add(self, finished: list[tuple[Move, Done]]) -> None:
        """Record moves whose bytes are on the disk."""
        self._append(
            *({"move": m.target, "sha256": d.sha256, "error": d.error} for m, d in finished)
        )
        self.done.update((move.target, done) for move, done in finished)

    def forget(self, moves: tuple[Move, ...]) -> None:
        """Record that the shard of these moves is missing, for the next run too."""
        lost = [move.target for move in moves if self.done.pop(move.target, None)]
        if lost:
            self._append({"forget": lost})

    def errors(self) -> dict[str, float]:
        """Return the relative error of each packed part, on a sample of its rows."""
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
            why = "whose journal is damaged"
        elif found.get("source") != head["source"]:
            why = "but the source is another one or has changed since"
        else:
            why = "made with other settings or versions"
        raise SourceError(
            f"{self.folder} holds an unfinished conversion, {why}; delete the folder, or start "
            "over with --force"
        )


def is_journal_of_ours(partial: Path) -> bool:
    """Return whether a folder holds only files of an unfinished conversion."""
    return {path.name for path in partial.iterdir()} <= {"journal", "out"} and (
        partial / "journal"
    ).is_file()


def has_work(partial: Path) -> bool:
    """Return whether a folder holds finished moves for the next run to resume."""
    try:
        lines = (partial / "journal").read_bytes().count(b"\n")
    except OSError:
        return False
    return lines > 1 and (partial / "out").is_dir()  # the first line is the head


def clear(partial: Path) -> None:
    """Remove the files of a finished conversion; keep a folder that holds anything else."""
    if partial.is_dir() and is_journal_of_ours(partial):
        (partial / "journal").unlink()
        with suppress(OSError):
            partial.rmdir()
