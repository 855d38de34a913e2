"""The run of a command over the lines of a file: what is answered already, progress, the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DataError

if TYPE_CHECKING:
    from ..batch.lines import Line


def answer_file(
    source: Path,
    output: Path | None,
    begin: Callable[[Iterator[Line]], tuple[Any, Any]],
    *,
    made_with: Mapping[str, Any],
    at_once: int,
    verbose: bool,
) -> None:
    """Answer the lines of a file, in their order. Ends the program with exit code 1 if some could
    not be answered.

    Args:
      source: a file of lines.
      output: where the answers go; None for stdout.
      begin: takes the lines that are answered already; returns an engine, which is closed at the
        end, and the function that answers a line.
      made_with: what answers depend on besides the lines.
      at_once: lines that are under way at a time.
      verbose: whether progress is shown.

    Raises:
      DataError: if a file cannot be used.
    """
    from ..batch.answers import AnswerFile, as_line
    from ..batch.lines import extent_of, lines_of
    from ..batch.run import Answered, run_lines
    from .render_batch import BatchProgress

    extent = extent_of(source)
    if not extent.lines:
        raise DataError(f"{source} has no lines")
    file = None if output is None else AnswerFile.open(output, source, extent, made_with)
    done, failed = (file.done, file.failed) if file is not None else (0, 0)
    progress = BatchProgress(extent.lines, done, failed, verbose=verbose)

    def write(answered: Answered) -> None:
        if file is not None:
            file.write(answered.answer)
        else:
            typer.echo(as_line(answered.answer), nl=False)
        progress.add(is_error=answered.is_error)

    try:
        if done < extent.lines:
            lines = lines_of(source)
            engine, work = begin(passed := islice(lines, done))
            for _ in passed:
                pass
            with engine, progress:
                run_lines(lines, work, write, at_once=at_once)
        if file is not None:
            file.finish()
    except (KeyboardInterrupt, SystemExit):
        if file is not None:
            _say(
                f"interrupted: {progress.done:,} of {extent.lines:,} answers are in {output}; the "
                "same command goes on"
            )
        raise
    finally:
        if file is not None:
            file.close()
    if verbose:
        _say(progress.summary())
    if progress.failed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
