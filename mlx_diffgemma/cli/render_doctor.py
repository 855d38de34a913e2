"""The display of an examination: progress on stderr, then the result on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.text import Text as Styled

from ..doctor.answers import Answer, ModelFacts
from ..doctor.block import by_policy, found, gigabytes, markdown, number, policy_line, shape_line
from ..doctor.machine import Machine
from ..doctor.outcome import Outcome
from ..doctor.report import Answers, CheckResult, Event, Note, Report, Speed, Started
from ..doctor.speed import Shape, Timing
from .render import wrapped
from .render_convert import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

_TITLES = {
    "machine": "looking at the machine",
    "checks": "checking results",
    "speed": "timing layers of the published shape",
    "answers": "loading the model, then answering prompts",
}
_WRONG, _RIGHT, _HEAD = "bold red", "green", "bold"


class DoctorView:
    """Shows what happens, and the result."""

    def __init__(self, *, stdout_is_taken: bool) -> None:
        """Show the result on stderr if stdout is taken."""
        file = sys.stderr if stdout_is_taken else sys.stdout
        self._console = Console(file=file, highlight=False)
        stderr = Console(stderr=True)
        self._is_live = stderr.is_terminal and not stderr.is_dumb_terminal
        self._progress = Progress()
        self._done = 0
        self._lines: int | None = None

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()

    def show(self, event: Event) -> None:
        """Show the progress: one changing line in a terminal, else a line of text for each
        event."""
        if isinstance(event, Started):
            self._done, self._lines = 0, event.lines
            self._say(_TITLES[event.part])
            return
        if (line := progress_line(event)) is None:
            return
        self._done += 1
        self._say(f"{self._done} of {self._lines}: {line}" if self._lines else line)

    def result(self, report: Report, *, every_check: bool) -> None:
        """Print all that is known."""
        self._progress.__exit__()
        if report.machine is None:
            return
        if not report.is_complete:
            self._print("interrupted; this is what is known so far", _HEAD)
        self._machine(report.machine)
        if report.checks:
            self._checks(report.checks, every_check=every_check)
        if report.speed is not None and report.speed.timings:
            self._speed(report.speed)
        if report.answers is not None:
            self._answers(report.answers)
        for note in report.notes:
            self._print(f"\n{note.part}: {note.text}", _WRONG if note.has_failed else "")
        self._title("To paste into a public report")
        print(markdown(report), file=self._console.file, end="")

    def verdict(self, report: Report) -> None:
        """Print one line on stderr that says what not to use."""
        lines = []
        if report.avoid:
            lines.append(f"wrong results on this machine; do not use: {'; '.join(report.avoid)}")
        lines += [f"{note.part} {note.text}" for note in report.notes if note.has_failed]
        print("; ".join(lines), file=sys.stderr, flush=True)

    def _machine(self, machine: Machine) -> None:
        self._title("Machine")
        recommended = f"{gigabytes(machine.recommended_bytes)} recommended"
        wired = machine.wired_limit_bytes
        limit = "" if wired is None else f", wired limit {gigabytes(wired)}"
        facts = {
            "system": machine.system,
            "chip": f"{machine.chip}, cores: {machine.cores}",
            "device": f"{machine.device} ({machine.backend}, {machine.architecture})",
            "memory": f"{gigabytes(machine.memory_bytes)}, {recommended}{limit}",
            "Python": machine.python,
            **machine.packages,
            **{f"{name} wheel": tag for name, tag in machine.wheels.items()},
            **machine.variables,
        }
        width = max(map(len, facts)) + 2
        for name, value in facts.items():
            self._print(f"{name:<{width}}{value}")
        for note in machine.notes:
            self._print(f"note: {note}")

    def _checks(self, checks: Sequence[CheckResult], *, every_check: bool) -> None:
        self._title("Checks")
        width = max(len(check.part) for check in checks) + 2
        for part in dict.fromkeys(check.part for check in checks):
            own = [check for check in checks if check.part == part]
            wrong = [check for check in own if not check.passed]
            seconds = sum(check.seconds for check in own)
            state = f"{len(own) - len(wrong)} of {len(own)} passed"
            style = _WRONG if wrong else _RIGHT
            self._print(f"{part:<{width}}{state:<18}{seconds:7.1f} s", style)
            for check in own:
                if not check.passed:
                    self._failure(check)
                elif every_check:
                    self._print(f"  {check.name}: {found(check)}")

    def _failure(self, check: CheckResult) -> None:
        self._print(f"  WRONG: {check.name}: {found(check)}", _WRONG)
        self._print(f"    looked for: {check.looks_for}")
        self._print(f"    do not use: {check.avoid}")

    def _speed(self, speed: Speed) -> None:
        self._title("Speed")
        self._print(shape_line(speed.shape))
        for of, title in (("step", "a denoise step"), ("token", "a token of the twin")):
            timings = [timing for timing in speed.timings if timing.of == of]
            if timings:
                self._print("")
                self._timings(title, timings, all_are_known=speed.extrapolation is not None)
        sums = speed.extrapolation
        if sums is None:
            return
        self._print("")
        floors = sums.floor_tokens_per_second
        self._print(f"{'steps per canvas':<22}{'tokens/s':>10}" + f"{'floor':>10}" * bool(floors))
        for steps, rate in sums.tokens_per_second.items():
            floor = f"{number(floors[steps]):>10}" if floors else ""
            self._print(f"{steps:<22}{number(rate):>10}{floor}")
        self._print(f"{'autoregressive twin':<22}{number(sums.twin_tokens_per_second):>10}")
        where = " at this narrow width" if speed.shape.is_narrow else ""
        self._print(
            f"Calculated from single layers{where}. The twin, Gemma 4 of the same shape, would be "
            f"faster above {number(sums.break_even_steps)} steps per canvas."
        )

    def _timings(self, title: str, timings: Sequence[Timing], *, all_are_known: bool) -> None:
        has_floor = all(timing.floor_ms is not None for timing in timings)
        heads = f"{title:<30}{'times':>6}{'ms':>9}"
        self._print(heads + (f"{'floor':>9}" if has_floor else ""), _HEAD)
        for timing in timings:
            floor = f"{number(timing.floor_ms or 0.0):>9}" if has_floor else ""
            self._print(f"{timing.name:<30}{timing.count:>6}{number(timing.ms):>9}{floor}")
        if not all_are_known:
            return
        total = number(sum(timing.total_ms for timing in timings))
        least = number(sum(timing.count * (timing.floor_ms or 0.0) for timing in timings))
        self._print(f"{'all':<30}{'':>6}{total:>9}" + (f"{least:>9}" if has_floor else ""))

    def _answers(self, found: Answers) -> None:
        self._title("Answers")
        model = found.model
        adapters = ", with adapters" if model.has_adapters else ""
        self._print(
            f"{model.name}{adapters}: {model.layers} layers, width {model.hidden_size}, "
            f"{model.packing}, canvas {model.canvas}"
        )
        policies = list(dict.fromkeys(answer.policy for answer in found.answers))
        table = {(answer.kind, answer.policy): answer for answer in found.answers}
        self._print(
            f"{'steps, tokens/s':<16}" + "".join(f"{policy:>20}" for policy in policies), _HEAD
        )
        for kind in dict.fromkeys(answer.kind for answer in found.answers):
            cells = [self._cell(table.get((kind, policy))) for policy in policies]
            self._print(f"{kind:<16}" + "".join(f"{cell:>20}" for cell in cells))
        for row in by_policy(found.answers):
            self._print(policy_line(row))

    def _cell(self, answer: Answer | None) -> str:
        if answer is None:
            return ""
        mark = {True: " ok", False: " ??", None: "   "}[answer.as_expected]
        return f"{answer.steps}, {number(answer.tokens_per_second)}{mark}"

    def _title(self, text: str) -> None:
        self._print(f"\n{text}", _HEAD)

    def _print(self, line: str, style: str = "") -> None:
        for row in wrapped(self._console, Styled(line), self._console.width):
            row.rstrip()
            self._console.print(row, style=style, soft_wrap=True)

    def _say(self, line: str) -> None:
        if self._is_live:
            self._progress.stage(line)
        else:
            print(line, file=sys.stderr, flush=True)


def progress_line(event: Event) -> str | None:
    """Return what an event says while the examination runs, or None."""
    match event:
        case Machine():
            return f"{event.chip}, {event.backend}"
        case Outcome():
            state = "right" if event.passed else "WRONG"
            return f"{event.check.part}, {event.check.name}: {state}"
        case Shape():
            return shape_line(event)
        case Timing():
            return f"{event.name} of a {event.of}: {number(event.ms)} ms"
        case ModelFacts():
            return None
        case Answer():
            return f"{event.policy}, {event.kind}: {event.steps} steps, {event.seconds:.1f} s"
        case Note():
            return f"{event.part} {event.text}"
    return None
