"""The help of every command, and what is said of a wrong command line. Help is plain text, in which
every option keeps its whole name at any width."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

_ENTROPY = "a step accepts tokens by their entropy"
_CONTEXT = "the context is kept whole and unpacked"
_PARALLEL = "a canvas is written in parallel anyway"
_REPORTS = "training reports to no service"
# mlx-lm's options that no command here has, and why.
OF_MLX_LM = {
    **dict.fromkeys(("--top-p", "--top-k", "--min-p", "--min-tokens-to-keep"), _ENTROPY),
    **dict.fromkeys(("--xtc-probability", "--xtc-threshold"), _ENTROPY),
    **dict.fromkeys(("--max-kv-size", "--kv-bits"), _CONTEXT),
    **dict.fromkeys(("--kv-group-size", "--quantized-kv-start"), _CONTEXT),
    "--prompt-cache-file": "chat keeps contexts with --context-cache",
    **dict.fromkeys(("--draft-model", "--num-draft-tokens"), _PARALLEL),
    "--trust-remote-code": "code from a repository is never run",
    "--use-default-chat-template": "the model's own template is used",
    "--image": "generate takes it, and chat has /image",
    "--quantize-activations": "activations are not quantized",
    "--pipeline": "a model runs on one device",
    "--quant-predicate": "--recipe takes its place",
    **dict.fromkeys(("--report-to", "--project-name"), _REPORTS),
    "--clear-cache-threshold": "the cache of freed memory is bounded anyway",
    **dict.fromkeys(("--export-gguf", "--gguf-path"), "GGUF is not written"),
    "--upload-repo": "mlx_diffgemma.convert has it",
}
# Values that mlx-lm takes, and why they are refused here.
_VALUES_OF_MLX_LM = {"dora": "DoRA is not supported; see docs/not-supported.md"}
# What a value must be, by the type of the error that pydantic reports.
_MUST_BE = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
}
_HARD_HYPHEN = "\u2011"  # at which no line ends
# The beginnings of errors that the entries and contradictions of settings make.
_OF_A_SETTING = re.compile(r"(\w+) (?:must be|has no effect|\S+ (?:is|times|drops))\b")
_WITH = re.compile(r"(has no effect with(?:out)?) (\w+)")
_UsageError: Any = typer.BadParameter.__base__


class Command(TyperCommand):
    """A command with plain help, and with our words for a wrong command line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, by panel; those without a panel come first."""
        panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None)
            name = panel or ("Arguments" if is_argument else "Options")
            flags, text = record
            panels.setdefault(name, []).append((flags, text.replace("-", _HARD_HYPHEN)))
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
        formatter.buffer = [text.replace(_HARD_HYPHEN, "-") for text in formatter.buffer]

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the first sentence of the help as a whole; lists of commands wrap it."""
        return str(super().get_short_help_str(limit=1000))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            _explain(error, ctx)
            shown = in_lines(f"Error: {error.format_message()}").removeprefix("Error: ")
            error.format_message = lambda: shown
            raise


def in_lines(line: str) -> str:
    """Return a line for stderr: on a terminal it is broken between words."""
    if sys.stderr is None or not sys.stderr.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def as_given(message: str, given: Mapping[str, str]) -> str:
    """Return an error's message, in which the setting that it begins with, and one that this goes
    with, have the names that were given.

    Args:
      message: such as "max_new_tokens must be ...".
      given: setting -> its name as given, such as "--max-tokens".
    """
    found = _OF_A_SETTING.match(message)
    if found is None or found[1] not in given:
        return message
    rest = _WITH.sub(lambda m: f"{m[1]} {given.get(m[2], m[2])}", message[found.end(1) :], 1)
    return given[found[1]] + rest


def _explain(error: Any, context: Any) -> None:
    """Put our words into an error of a command line."""
    if (why := OF_MLX_LM.get(getattr(error, "option_name", None) or "")) is not None:
        if type(error).__name__ == "NoSuchOption":
            error.possibilities = None
            error.message = (
                f"mlx-lm's {error.option_name} does not exist here: {why}; see "
                "docs/not-supported.md"
            )
    elif more := re.match(r"Got unexpected extra argument\S* \((.*)\)$", error.message, re.DOTALL):
        error.message = _of_more_words(more[1], context)
    elif callable(details := getattr(error.__cause__, "errors", None)):
        error.message = _of_a_value(details()[0], error.message)


def _of_more_words(words: str, context: Any) -> str:
    """Return what to say of words that belong to no argument."""
    names = [p.name for p in context.command.params]
    taken = next((name for name in ("text", "template") if name in names), None)
    if taken is not None:
        whole = f"{context.params.get(taken) or ''} {words}".strip()
        return (
            f"these words belong to nothing: {words}; if they are part of the "
            f"{'prompt' if taken == 'text' else taken}, give it in quotes: {shlex.quote(whole)}"
        )
    if "prompt" in names:
        what = "the first message" if context.command.name == "chat" else "the prompt"
        return f"{what} is given with an option: --prompt {shlex.quote(words)}"
    return f"these words belong to nothing: {words}"


def _of_a_value(detail: Any, message: str) -> str:
    """Return what to say of a value that pydantic refused."""
    given, bounds = detail["input"], detail.get("ctx", {})
    if (must := _MUST_BE.get(detail["type"])) is not None:
        return f"{given!r} is not {must}"
    if "ge" in bounds:
        return f"{given!r} is less than {bounds['ge']}"
    if "le" in bounds:
        return f"{given!r} is more than {bounds['le']}"
    message = message.removeprefix("Value error, ")
    why = _VALUES_OF_MLX_LM.get(given) if isinstance(given, str) else None
    return message if why is None else f"{message.removesuffix('.')}; {why}"
