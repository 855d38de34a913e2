"""An examination, part by part, as a generator of events: what is known so far is never lost."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from ..checkpoint.memory import generation_limits
from . import checks
from .answers import POLICIES, PROMPTS, Patient, answers
from .machine import Machine, this_machine
from .outcome import run_check
from .report import PARTS, Event, Note, Part, Started
from .speed import Shape as SpeedShape
from .speed import Timing, extrapolated, time_parts, width_divisor


def examine(
    parts: Collection[Part] = PARTS, patient: Patient | None = None
) -> Generator[Event, None, None]:
    """Yield the facts about this machine, and then what each part finds. Closing the generator ends
    the examination.

    Args:
      parts: which ones; the machine's facts always come.
      patient: the model that answers prompts, from `find`; None for no answers.

    Raises:
      DiffGemmaError: if the model cannot be loaded.
    """
    yield Started("machine")
    machine = this_machine()
    yield machine
    if "checks" in parts:
        yield from _checks()
    if "speed" in parts:
        yield from _speed(machine)
    if "answers" in parts and patient is not None:
        yield from _answers(patient)


def _checks() -> Iterator[Event]:
    every = checks.all_checks()
    yield Started("checks", len(every))
    for check in every:
        yield run_check(check)


def _speed(machine: Machine) -> Iterator[Event]:
    yield Started("speed")
    divisor = width_divisor(machine.backend, machine.recommended_bytes)
    timings, canvas = [], 0
    try:
        with generation_limits():
            for event in time_parts(machine.device, divisor):
                if isinstance(event, Timing):
                    timings.append(event)
                elif isinstance(event, SpeedShape):
                    canvas = event.canvas
                yield event
        yield extrapolated(timings, canvas)
    except RuntimeError as error:  # of MLX, such as no memory or no kernel
        yield Note("speed", f"could not be measured: {error}", has_failed=True)


def _answers(patient: Patient) -> Iterator[Event]:
    yield Started("answers", len(POLICIES) * len(PROMPTS))
    if (reason := patient.too_large) is not None:
        yield Note("answers", reason, has_failed=False)
        return
    yield patient.facts
    try:
        yield from answers(patient)
    except RuntimeError as error:
        yield Note("answers", f"ended early: {error}", has_failed=True)
