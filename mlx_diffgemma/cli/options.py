"""What commands share: options whose help and defaults come from the settings, and one way to
fail."""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings, Policy, default_of, help_of, source_of
from ..errors import (
    ConfigError,
    DiffGemmaError,
    PromptError,
    SourceError,
    TemplateError,
    backend_error,
)
from .interrupt import leave

MODEL_HELP = "Local folder or Hub repo id; by default the small model that comes with the package."
REVISION_HELP = "Branch, tag or commit of a Hub repository."


def setting(name: str, *flags: str, default: str | None = None) -> Any:
    """An option for a field of GenerationSettings: its help, and what holds where it is not
    given."""
    source = f"the {decider}'s, else " if (decider := source_of(name)) else ""
    value = default or f"{source}{default_of(name)}"
    return typer.Option(*flags, help=help_of(name), show_default=value)


def unescape(prompt: str) -> str:
    """As mlx-lm reads --prompt: a backslash and an n are a line break, and likewise for tabs."""
    return prompt.replace("\\n", "\n").replace("\\t", "\t")


def boolean(text: str) -> bool:
    """As mlx-lm reads the value of --verbose."""
    values = {"true": True, "t": True, "yes": True, "1": True}
    values |= {"false": False, "f": False, "no": False, "0": False}
    if text.lower() not in values:
        raise typer.BadParameter(f"{text!r} is neither True nor False", param_hint="--verbose")
    return values[text.lower()]


def read_stdin() -> str:
    if sys.stdin is None:
        raise PromptError("stdin is closed; there is no prompt to read from it")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not UTF-8: {error}") from error


def read_file(file: Path) -> bytes:
    """A file as it is."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise PromptError(f"{file} cannot be read: {error.strerror}") from error


def decoded(file: Path, content: bytes) -> str:
    """Its text, line ends and all."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8: {error}") from error


def fresh_seed(seed: int | None) -> int:
    """The seed that was given, or one that can be printed."""
    return secrets.randbits(32) if seed is None else seed


def gap_bounds(text: str | None) -> tuple[int, int] | None:
    """The value of --gap-tokens: "8..40", or "8" for exactly 8."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise TemplateError(f"--gap-tokens must be M..N with 1 <= M <= N, got {text!r}")
    return low, high


def trace_page(name: str | None) -> Path | None:
    """The value of --trace, if files can be made there: the page, and run.json beside it."""
    if name is None:
        return None
    page = Path(name)
    if os.path.isdir(page):
        raise SourceError(f"--trace {name} is a folder; name a file in it that ends in .html")
    if page.suffix != ".html":
        raise ConfigError(f"--trace must name a file that ends in .html, got {name!r}")
    if os.path.isdir(beside := page.with_suffix(".json")):
        raise SourceError(f"--trace {name} also writes {beside}, which is a folder")
    if not os.path.isdir(page.parent):
        raise SourceError(f"--trace {name}: there is no folder {page.parent}; make it first")
    if not os.access(page.parent, os.W_OK):
        raise SourceError(f"--trace {name}: no file can be made in the folder {page.parent}")
    return page


# What every command that runs the model takes.
ModelOption = Annotated[str | None, typer.Option("--model", help=MODEL_HELP)]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter-path", help="Folder of adapters, as mlx_diffgemma.train makes them."),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help=REVISION_HELP)]
SystemPromptOption = Annotated[
    str | None, typer.Option("--system-prompt", help="System prompt for the chat template.")
]
TempOption = Annotated[float | None, setting("temperature", "--temp")]
SeedOption = Annotated[int | None, setting("seed", "--seed", default="fresh, and printed")]
MaxDenoisingStepsOption = Annotated[
    int | None, setting("max_denoising_steps", "--max-denoising-steps")
]
CanvasLengthOption = Annotated[
    int | None, setting("canvas_length", "--canvas-length", default="the checkpoint's")
]
PolicyOption = Annotated[Policy | None, setting("policy", "--policy")]


def few_settings(
    *,
    temp: float | None,
    seed: int | None,
    max_denoising_steps: int | None,
    canvas_length: int | None,
    policy: Policy | None,
) -> GenerationSettings:
    """The settings of commands that take only these; a missing seed is drawn, so that it can be
    printed."""
    return GenerationSettings(
        temperature=temp,
        seed=fresh_seed(seed),
        max_denoising_steps=max_denoising_steps,
        canvas_length=canvas_length,
        policy=policy,
    )


@contextmanager
def friendly_errors() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    # transformers logs advice that does not hold here, such as that a prompt is longer than the
    # tokenizer's `model_max_length`.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except DiffGemmaError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except ImportError as error:
        if (explained := backend_error(error)) is None:
            raise
        typer.echo(f"error: {explained}", err=True)
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
