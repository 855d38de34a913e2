"""A short block of Markdown to paste into a public report, and the words for what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .answers import Answer
from .machine import Machine
from .report import Answers, CheckResult, Report, Speed
from .speed import Shape


def markdown(report: Report) -> str:
    """Return a short block to paste into a public report."""
    lines = ["### mlx_diffgemma.doctor" + ("" if report.is_complete else " (interrupted)"), ""]
    if report.machine is not None:
        lines += _machine_lines(report.machine)
    if report.checks:
        lines += _check_lines(report)
    if report.speed is not None and report.speed.timings:
        lines += _speed_lines(report.speed)
    if report.answers is not None:
        lines += _answer_lines(report.answers)
    lines += [f"- {note.part}: {note.text}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _machine_lines(machine: Machine) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    tags = ", ".join(f"{name} {tag}" for name, tag in machine.wheels.items())
    device = f"{machine.device} ({machine.backend}, {machine.architecture})"
    lines = [
        f"- machine: {machine.chip}, cores: {machine.cores}; {machine.system}; {machine.python}",
        f"- device: {device}; memory {gigabytes(machine.memory_bytes)}, "
        f"recommended {gigabytes(machine.recommended_bytes)}",
        f"- packages: {packages}; wheels: {tags}",
    ]
    if machine.variables:
        values = ", ".join(f"{name}={value}" for name, value in machine.variables.items())
        lines.append(f"- variables: {values}")
    return lines + [f"- note: {note}" for note in machine.notes]


def _check_lines(report: Report) -> list[str]:
    passed = len(report.checks) - len(report.failures)
    return [f"- checks: {passed} of {len(report.checks)} passed"] + [
        f"- **WRONG** {check.part}, {check.name}: {found(check)}" for check in report.failures
    ]


def found(check: CheckResult) -> str:
    """Return what a check found, in words."""
    if check.error is not None:
        return check.error
    difference = "not a number" if check.difference is None else f"{check.difference:.2g}"
    return f"difference {difference}, tolerance {check.tolerance:.2g}"


def _speed_lines(speed: Speed) -> list[str]:
    parts = {of: [t for t in speed.timings if t.of == of] for of in ("step", "token")}
    lines = [f"- speed: {shape_line(speed.shape)}"]
    lines += [
        f"- ms of each part of a {of}: "
        + ", ".join(
            (f"{t.count} x " if t.count > 1 else "")
            + f"{t.name} {number(t.ms)}"
            + ("" if t.floor_ms is None else f" (floor {number(t.floor_ms)})")
            for t in timings
        )
        for of, timings in parts.items()
        if timings
    ]
    if (sums := speed.extrapolation) is not None:
        floor = "" if sums.floor_step_ms is None else f" (floor {number(sums.floor_step_ms)})"
        rates = ", ".join(f"{number(rate)} at {n}" for n, rate in sums.tokens_per_second.items())
        lines.append(
            f"- calculated: {number(sums.step_ms)} ms per step{floor}; tokens/s by steps per "
            f"canvas: {rates}; autoregressive twin {number(sums.twin_tokens_per_second)} tokens/s, "
            f"faster above {number(sums.break_even_steps)} steps"
        )
    return lines


def shape_line(shape: Shape) -> str:
    """Return in words what was timed."""
    width, note = "the published width", ""
    if shape.is_narrow:
        width = f"1/{shape.width_divisor} of the published width"
        note = "; this is not the speed of the real model"
    return (
        f"made-up 4-bit layers at {width}, {shape.dtype}, canvas {shape.canvas} after "
        f"{shape.context} tokens, {shape.weight_bytes / 1e9:.2f} GB of weights; "
        + (f"floors of {shape.chip}" if shape.chip else "no floors are known for this chip")
        + note
    )


def _answer_lines(found: Answers) -> list[str]:
    model = found.model
    adapters = ", with adapters" if model.has_adapters else ""
    return [f"- answers of {model.name}{adapters}: {model.packing}"] + [
        f"- {policy_line(row)}" for row in by_policy(found.answers)
    ]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """All answers under one policy together."""

    policy: str
    answers: int
    steps_per_canvas: float
    ms_per_step: float  # median over answers
    tokens_per_second: float  # of all answers together
    peak_bytes: int
    as_expected: int
    checkable: int


def by_policy(answers: Sequence[Answer]) -> list[PolicyRow]:
    """Return a row for each policy."""
    rows = []
    for policy in dict.fromkeys(answer.policy for answer in answers):
        own = [answer for answer in answers if answer.policy == policy]
        canvases, seconds = sum(a.canvases for a in own), sum(a.seconds for a in own)
        rows.append(
            PolicyRow(
                policy=policy,
                answers=len(own),
                steps_per_canvas=sum(a.steps for a in own) / canvases,
                ms_per_step=median(a.ms_per_step for a in own),
                tokens_per_second=sum(a.new_tokens for a in own) / seconds,
                peak_bytes=max(a.peak_bytes for a in own),
                as_expected=sum(a.as_expected is True for a in own),
                checkable=sum(a.as_expected is not None for a in own),
            )
        )
    return rows


def policy_line(row: PolicyRow) -> str:
    """Return in words how fast the answers under one policy were."""
    return (
        f"{row.policy}: {row.steps_per_canvas:.1f} steps per canvas, {number(row.ms_per_step)} ms "
        f"per step, {number(row.tokens_per_second)} tokens/s, peak {gigabytes(row.peak_bytes)}, "
        f"{row.as_expected} of {row.checkable} as expected"
    )


def number(value: float) -> str:
    """Return a measured number with about three digits, never with an exponent."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
