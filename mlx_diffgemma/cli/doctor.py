"""mlx_diffgemma.doctor: examine this machine, and say what to expect of it."""

import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.choice import MODEL_VARIABLE
from ..errors import ConfigError, SourceError
from .options import ModelOptions, command, run
from .program import model_names

_MODEL_HELP = (
    "Local folder, Hub repo id or short name of a model that is to answer too; without it, no "
    "model is loaded."
)
_PARTS = ("machine", "checks", "speed", "answers")


@dataclass(frozen=True)
class PatientOptions(ModelOptions):
    """The options for the model whose answers are examined."""

    model: Annotated[
        str | None,
        typer.Option(help=_MODEL_HELP, envvar=MODEL_VARIABLE, autocompletion=model_names),
    ] = None


@command
def doctor(
    *,
    model: PatientOptions,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this part: {', '.join(_PARTS[:-1])} or {_PARTS[-1]}; may be given several "
            "times. The machine's facts always come."
        ),
    ] = None,
    every_check: Annotated[
        bool, typer.Option("--all", help="List every check, not only those that failed.")
    ] = False,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the result into a file, as one JSON object; - for stdout.",
        ),
    ] = None,
) -> None:
    """Examine this machine: does MLX compute right on it, and how fast is the published model's
    shape? With --model, also real answers. Nothing private is in the result."""
    target = None if json_file in (None, "-") else Path(json_file)
    parts = _chosen(only, model)
    from ..doctor.answers import find
    from ..doctor.report import Report, added, check_target
    from ..doctor.run import examine
    from .render_doctor import DoctorView

    if target is not None:
        check_target(target)
    patient = None
    if "answers" in parts and model.model is not None:
        patient = find(model.model, model.revision, model.adapter_path)
    report, started = Report(), time.perf_counter()
    with DoctorView(stdout_is_taken=json_file == "-") as view:
        try:
            with closing(examine(parts, patient)) as events:
                for event in events:
                    report = added(report, event)
                    view.show(event)
            report = replace(report, is_complete=True)
        finally:  # after Ctrl-C or an error too, what is known is shown
            report = replace(report, seconds=time.perf_counter() - started)
            try:
                view.result(report, every_check=every_check)
            finally:  # also if stdout is gone
                _write(report, target, to_stdout=json_file == "-")
    if not report.is_all_right:
        view.verdict(report)
        raise typer.Exit(1)


def _chosen(only: list[str] | None, model: ModelOptions) -> list[Any]:
    """Return the parts to run."""
    for part in only or []:
        if part not in _PARTS:
            raise ConfigError(f"--only takes {', '.join(_PARTS)}, got {part!r}")
    if model.model is None:
        if only and "answers" in only:
            raise ConfigError("--only answers needs --model, whose answers they are")
        for flag, value in (("--adapter-path", model.adapter_path), ("--revision", model.revision)):
            if value is not None:
                raise ConfigError(f"{flag} is of no use without --model")
    return only or list(_PARTS)


def _write(report: Any, target: Path | None, *, to_stdout: bool) -> None:
    """Write the result, if anything is known."""
    from ..checkpoint.files import write_whole
    from ..doctor.report import as_object

    if report.machine is None or not (target or to_stdout):
        return
    text = json.dumps(as_object(report), ensure_ascii=False) + "\n"
    if target is not None:
        write_whole(target, text.encode())
    elif sys.stdout is None:
        raise SourceError("stdout is closed; the result cannot be printed")
    else:
        typer.echo(text, nl=False)


def main() -> None:
    run(doctor)


if __name__ == "__main__":
    main()
