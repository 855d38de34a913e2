"""The result of an examination, and its form as an object for JSON. Nothing private is in it: no
path, no name of a user or of the machine."""

from __future__ import annotations

import math
import os
import platform
import re
import tempfile
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from ..errors import SourceError
from .answers import Answer, ModelFacts
from .machine import Machine
from .outcome import Outcome
from .speed import Extrapolation, Shape, Timing

FORMAT = "mlx_diffgemma.doctor/1"
Part = Literal["machine", "checks", "speed", "answers"]
PARTS: tuple[Part, ...] = get_args(Part)

_PATH = re.compile(r"(?<![\w)])(?:~|/|[A-Za-z]:\\)[\w.@+%~\-/\\]+")
_LONGEST_TEXT = 300
_LEAST_NAME = 3  # letters of a name that is looked for


@dataclass(frozen=True, slots=True)
class Started:
    """A part has begun."""

    part: Part
    lines: int | None = None  # that will follow, where that is known


@dataclass(frozen=True, slots=True)
class Note:
    """A part that was left out, or that failed."""

    part: Part
    text: str
    has_failed: bool


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found."""

    name: str
    part: str
    tolerance: float
    looks_for: str
    avoid: str
    difference: float | None  # None if it is not a finite number
    seconds: float
    error: str | None
    passed: bool

    @classmethod
    def of(cls, outcome: Outcome) -> CheckResult:
        check, difference = outcome.check, outcome.difference
        return cls(
            name=check.name,
            part=check.part,
            tolerance=check.tolerance,
            looks_for=check.looks_for,
            avoid=check.avoid,
            difference=difference if math.isfinite(difference) else None,
            seconds=outcome.seconds,
            error=None if outcome.error is None else public(outcome.error),
            passed=outcome.passed,
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """The times of the parts of a step, and what they add up to."""

    shape: Shape
    timings: tuple[Timing, ...] = ()
    extrapolation: Extrapolation | None = None  # None if a part is missing


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a real model."""

    model: ModelFacts
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All that an examination has found so far."""

    format: str = FORMAT
    is_complete: bool = False  # False: it was interrupted
    seconds: float = 0.0
    machine: Machine | None = None
    checks: tuple[CheckResult, ...] = ()
    speed: Speed | None = None
    answers: Answers | None = None
    notes: tuple[Note, ...] = ()

    @property
    def failures(self) -> list[CheckResult]:
        return [check for check in self.checks if not check.passed]

    @property
    def is_all_right(self) -> bool:
        return not self.failures and not any(note.has_failed for note in self.notes)

    @property
    def avoid(self) -> list[str]:
        """Return what not to use on this machine."""
        return list(dict.fromkeys(check.avoid for check in self.failures))


Event = Started | Machine | Outcome | Shape | Timing | Extrapolation | ModelFacts | Answer | Note


def added(report: Report, event: Event) -> Report:
    """Return the report with an event's facts."""
    match event:
        case Machine():
            return replace(report, machine=event)
        case Outcome():
            return replace(report, checks=(*report.checks, CheckResult.of(event)))
        case Shape():
            return replace(report, speed=Speed(event))
        case Timing():
            assert report.speed is not None
            timings = (*report.speed.timings, event)
            return replace(report, speed=replace(report.speed, timings=timings))
        case Extrapolation():
            assert report.speed is not None
            return replace(report, speed=replace(report.speed, extrapolation=event))
        case ModelFacts():
            return replace(report, answers=Answers(event))
        case Answer():
            assert report.answers is not None
            answers = (*report.answers.answers, event)
            return replace(report, answers=replace(report.answers, answers=answers))
        case Note():
            note = replace(event, text=public(event.text))
            return replace(report, notes=(*report.notes, note))
    return report


# JSON


def as_object(report: Report) -> dict[str, Any]:
    """Return a report as an object for JSON."""
    return asdict(report)


def from_object(value: Any) -> Report:
    """Return the report of an object that `as_object` made.

    Raises:
      SourceError: if the object is none, or of another version.
    """
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise SourceError(f"the report's format is {found!r}, expected {FORMAT!r}")
    try:
        return cast(Report, _read(Report, value))
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"the report is damaged: {error}") from error


def _read(kind: Any, value: Any) -> Any:
    """Return a plain value as the type that an annotation names."""
    arguments = get_args(kind)
    if NoneType in arguments:
        return None if value is None else _read(arguments[0], value)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        hints = get_type_hints(kind)
        return kind(**{f.name: _read(hints[f.name], value[f.name]) for f in fields(kind)})
    if get_origin(kind) is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    return value


def check_target(file: Path) -> None:
    """Refuse a file that a report cannot be written to, or that is something else.

    Raises:
      SourceError: if there is no such folder, no file can be made in it, or there is a file that is
        neither empty nor a report.
    """
    if file.is_dir():
        raise SourceError(f"--json {file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise SourceError(f"--json {file}: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK):
        raise SourceError(f"--json {file}: no file can be made in the folder {file.parent}")
    if not os.path.lexists(file):
        return
    try:
        is_report = file.is_file() and (
            not file.stat().st_size or FORMAT.partition("/")[0] in _head(file)
        )
    except OSError as error:
        raise SourceError(f"--json {file} cannot be read: {error.strerror}") from error
    if not is_report:
        raise SourceError(f"--json {file}: this exists and is not a report; choose another name")


def _head(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(200)


def public(text: str) -> str:
    """Return a message without paths and names of this machine and its user, in one short line."""
    private = [os.getcwd(), str(Path.home()), tempfile.gettempdir()]
    for path in sorted(private, key=len, reverse=True):
        if len(path) > 1:
            text = text.replace(path, "~")
    text = _PATH.sub("(path)", text)
    for name in (Path.home().name, platform.node(), platform.node().partition(".")[0]):
        if len(name) >= _LEAST_NAME:
            text = re.sub(rf"\b{re.escape(name)}\b", "(name)", text)
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_TEXT else f"{line[:_LONGEST_TEXT]}…"
