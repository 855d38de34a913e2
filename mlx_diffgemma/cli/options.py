"""What commands share: options whose help and defaults come from the settings, and one way to
fail."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import DiffGemmaError
from ..settings import default_of, help_of, source_of
from .interrupt import leave

MODEL_HELP = "Local folder or Hub repo id; by default the small model that comes with the package."
REVISION_HELP = "Branch, tag or commit of a Hub repository."


def setting(name: str, *flags: str, default: str | None = None) -> Any:
    """An option for a field of GenerationSettings: its help, and what holds where it is not
    given."""
    source = f"the {decider}'s, else " if (decider := source_of(name)) else ""
    value = default or f"{source}{default_of(name)}"
    return typer.Option(*flags, help=help_of(name), show_default=value)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    # transformers says on import that it found no torch; it is not needed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except DiffGemmaError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def run(command: Callable[..., None]) -> None:
    """A command as a program of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def _show_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
