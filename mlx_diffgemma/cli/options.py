"""Code that commands share: options made from settings' entries, blocks of options, and the
handling of errors."""

from __future__ import annotations

import math
import os
import re
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.completion import completion_init
from typer.main import get_command

from ..checkpoint.choice import MODEL_VARIABLE
from ..config.entry import Entry, entries, kinds
from ..config.generation import GenerationSettings, decider_of
from ..errors import ConfigError, DiffGemmaError, PromptError, TemplateError, backend_error
from .interrupt import ended_in_order, leave
from .program import Shell, among, install, model_names, scripts, variable, version
from .usage import Command, as_given, in_lines

MODEL_HELP = (
    "Local folder, Hub repo id, or short name of a published one (4bit, 5bit, 6bit, 8bit, mxfp4, "
    "mxfp8, nvfp4, bf16), unless a folder here has that name; by default the small model that "
    "comes with the package."
)
REVISION_HELP = "Branch, tag or commit of a Hub repository."


def unescape(prompt: str) -> str:
    """Return text as mlx-lm reads --prompt: a backslash and an n are a line break, and likewise for
    tabs."""
    return prompt.replace("\\n", "\n").replace("\\t", "\t")


def boolean(text: str) -> bool:
    """Return the value of --verbose, read as mlx-lm does."""
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
    """Return a file's bytes."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise PromptError(f"{file} cannot be read: {error.strerror}") from error


def decoded(file: Path, content: bytes) -> str:
    """Return its text, with line ends unchanged."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8: {error}") from error


def seeded(settings: GenerationSettings) -> GenerationSettings:
    """Return settings with the given seed, or with a fresh one that can be printed."""
    return settings if settings.seed is not None else replace(settings, seed=secrets.randbits(32))


def refuse_idle_limit(settings: GenerationSettings) -> None:
    """Refuse a limit on thoughts, where there are none."""
    if settings.max_thinking_tokens is not None:
        raise ConfigError("--max-thinking-tokens has no effect without --thinking")


def gap_bounds(text: str | None) -> tuple[int, int] | None:
    """Return the value of --gap-tokens: "8..40", or "8" for exactly 8."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise TemplateError(f"--gap-tokens must be M..N with 1 <= M <= N, got {text!r}")
    return low, high


ModelOption = Annotated[
    str | None,
    typer.Option(help=MODEL_HELP, envvar=MODEL_VARIABLE, autocompletion=model_names),
]
SystemPromptOption = Annotated[
    str | None, typer.Option("--system-prompt", help="System prompt for the chat template.")
]
VerboseOption = Annotated[
    str,
    typer.Option(
        metavar="BOOLEAN",
        help="False prints nothing but the result and errors.",
        autocompletion=among("True", "False"),
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The options for the model that a command runs."""

    model: ModelOption = None
    adapter_path: Annotated[
        str | None,
        typer.Option(help="Folder of adapters, as mlx_diffgemma.train makes them."),
    ] = None
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None

    @property
    def is_bundled(self) -> bool:
        """Whether no model was chosen."""
        return self.model is None

    def notes(self) -> list[str]:
        """Return what to say of the model before a run."""
        note = "no --model given: this is the bundled model, trained on small puzzles only"
        return [note] if self.is_bundled else []

    @property
    def source(self) -> str | Path:
        """The given model, or the bundled model's folder."""
        from ..checkpoint.files import bundled_model

        return bundled_model() if self.model is None else self.model

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer."""
        from ..checkpoint.load import load

        return load(self.source, revision=self.revision, adapter_path=self.adapter_path)


@dataclass(frozen=True)
class SeeingModelOptions(ModelOptions):
    """The options for the model of a command that takes images."""

    no_vision: Annotated[
        bool,
        typer.Option(
            "--no-vision",
            help="Never load what reads images; without it, the first image loads it.",
        ),
    ] = False

    @property
    def vision(self) -> bool | None:
        """What `load` is told of it."""
        return False if self.no_vision else None

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer."""
        from ..checkpoint.load import load

        return load(
            self.source,
            revision=self.revision,
            adapter_path=self.adapter_path,
            vision=self.vision,
        )


@dataclass(frozen=True)
class ContextOptions:
    """The options for contexts that are kept on disk."""

    context_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep what the model has read in this folder too, for later runs; several "
            "programs may share it.",
        ),
    ] = None
    context_cache_gb: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="GB that the files in that folder may take; what was not used for longest goes "
            "first.",
            show_default="10",
        ),
    ] = None

    def store(self) -> Any:
        """Return a store that keeps contexts in the folder; None if no folder was chosen.

        Raises:
          ConfigError: if the folder or the number cannot be used.
        """
        gb = self.context_cache_gb
        if gb is not None and not 0 < gb < math.inf:
            raise ConfigError(f"--context-cache-gb must be a number above 0, got {gb:g}")
        if self.context_cache is None:
            if gb is not None:
                raise ConfigError("--context-cache-gb has no effect without --context-cache FOLDER")
            return None
        from ..write.chat import chat_store

        return chat_store(self.context_cache, None if gb is None else math.ceil(gb * 1e9))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function.

    A parameter whose type is a dataclass becomes one option for each of its fields, and the
    function gets the dataclass. Fields with a settings entry become options if the entry names this
    command; other fields define their option by `Annotated`. A parameter of type `Annotated[dict,
    SomeSettings]` gets the given settings, by name. `friendly_errors` handles a user's mistakes.
    """
    parameters: list[Parameter] = []
    blocks: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    flags: dict[str, str] = {}  # setting -> its option
    for parameter in signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        base, *extra = get_args(kind) if get_origin(kind) is Annotated else (kind,)
        settings = extra[0] if base is dict else kind
        if not is_dataclass(settings):
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(settings, type)
        options = _options_of(settings, function.__name__)
        blocks[parameter.name] = base, [option.name for option in options]
        for name, entry in entries(settings).items():
            flags[name] = entry.flags[0] if entry.flags else f"--{name.replace('_', '-')}"
        parameters.extend(options)

    @wraps(function)
    def run_with_blocks(**given: Any) -> None:  # typer calls it with every option by name
        with friendly_errors(), ended_in_order():
            made: dict[str, Any] = {}
            named: dict[str, str] = {}
            for name, (make, options) in blocks.items():
                values = {option: given.pop(option) for option in options}
                values = {k: v for k, v in values.items() if v is not None}
                named |= {k: flags[k] for k in values if k in flags}
                with _named(named):
                    made[name] = make(**values)
            with _named(named):
                function(**given, **made)

    run_with_blocks.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run_with_blocks.__annotations__ = {p.name: p.annotation for p in parameters}
    return run_with_blocks


@contextmanager
def _named(given: Mapping[str, str]) -> Iterator[None]:
    """Let errors of settings name the options that were given."""
    try:
        yield
    except ConfigError as error:
        if (message := as_given(str(error), given)) == str(error):
            raise
        raise ConfigError(message) from error


def _options_of(block: type, command_name: str) -> list[Parameter]:
    """Return an option for each field of a dataclass that the command takes."""
    hints, options = get_type_hints(block, include_extras=True), []
    for f in fields(block):
        kind, default = hints[f.name], f.default
        if (entry := f.metadata.get("entry")) is not None:
            if command_name not in entry.commands:
                continue
            default = entry.command_default
            option = typer.Option(
                *entry.flags,
                help=entry.help,
                show_default=_shown(f.name, entry) or False,
                autocompletion=model_names if f.name == "model" else None,
            )
            kind = Annotated[kinds(block)[f.name] | None, option]
        elif get_origin(kind) is not Annotated:
            continue
        options.append(Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return options


def _shown(name: str, entry: Entry) -> str:
    """Return the default in words: the policy's or the checkpoint's value, else the entry's."""
    if entry.command_default is not None:
        return str(entry.command_default)
    if entry.shown_default is not None:
        return entry.shown_default
    decider = decider_of(name, entry)
    return f"the {decider}'s, else {entry.default}" if decider else str(entry.default)


def prompt_text(argument: str | None, option: str | None) -> str:
    """Return the prompt: the argument unchanged, --prompt unescaped, or stdin."""
    if argument is not None and option is not None:
        raise PromptError(
            f"the prompt is given twice: {argument!r} as an argument, and {option!r} with "
            "--prompt; give one of the two"
        )
    given = argument if option is None else option
    if given == "-" or (given is None and not _is_terminal(sys.stdin)):
        return read_stdin().removeprefix("\ufeff")  # a byte order mark is not part of the prompt
    if given is None:
        raise PromptError("a prompt is missing: give it in quotes, or - to read it from stdin")
    return given if option is None else unescape(option)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _at_once(flag: str, act: Callable[[Any], None], help: str) -> Any:
    """Return an option that does one thing and ends the program."""

    def callback(context: typer.Context, value: Any) -> None:
        if value and not context.resilient_parsing:  # a shell that asks for proposals
            with friendly_errors():
                act(value)
            raise typer.Exit

    return typer.Option(
        flag,
        help=help,
        callback=callback,
        is_eager=True,
        expose_value=False,
        rich_help_panel="Program",
    )


def _show_version(_: bool) -> None:
    typer.echo(f"mlx-diffgemma {version()}")


def _show_completion(shell: Shell) -> None:
    typer.echo(scripts(shell))


def _install_completion(shell: Shell) -> None:
    for file in install(shell):
        typer.echo(f"wrote {file}", err=True)
    typer.echo("completion works in shells that are started from now on", err=True)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code
    130."""
    # transformers logs advice that does not hold here, such as that a prompt is longer than the
    # tokenizer's `model_max_length`.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except DiffGemmaError as error:
        _say_error(error)
        raise typer.Exit(2) from error
    except ImportError as error:
        if (explained := backend_error(error)) is None:
            raise
        _say_error(explained)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def _say_error(error: Exception) -> None:
    """Print an error in one line on stderr."""
    typer.echo(in_lines(f"error: {error}"), err=True)


def run(command: Callable[..., None] | typer.Typer, name: str | None = None) -> None:
    """Run a command as a program, with the options that every program has."""
    # No command needs torch. Where it is installed, transformers would import it, for seconds.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    program = program_of(command)
    completion_init()  # Typer calls it for its own options of completion
    program(prog_name=name, complete_var=variable(Path(sys.argv[0]).name))


def program_of(command: Callable[..., None] | typer.Typer) -> Any:
    """Return a command as a program, with the options that every program has."""
    program = get_command(command if isinstance(command, typer.Typer) else app_of(command))
    program.params += get_command(app_of(_every_program)).params
    return program


def app_of(command: Callable[..., None]) -> typer.Typer:
    """Return an app of one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=Command)(command)
    return app


def _every_program(
    version: Annotated[bool, _at_once("--version", _show_version, "Print the version.")] = False,
    install_completion: Annotated[
        Shell | None,
        _at_once(
            "--install-completion",
            _install_completion,
            "Let this shell complete all mlx_diffgemma commands from now on.",
        ),
    ] = None,
    show_completion: Annotated[
        Shell | None,
        _at_once("--show-completion", _show_completion, "Print what --install-completion writes."),
    ] = None,
) -> None: ...


def _show_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
