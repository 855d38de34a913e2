"""Options on what an answer must be."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConstraintError, DiffGemmaError
from .options import decoded, read_file, read_stdin

if TYPE_CHECKING:
    from ..constraint.constraint import Constraint

PANEL = "Constraint"


@dataclass(frozen=True)
class ConstraintOptions:
    """At most one of them makes a constraint; the last two say how its JSON is laid out."""

    json_schema: Annotated[
        str | None,
        typer.Option(
            help="The answer is JSON that fits this schema: a file, '-' for stdin, or the schema "
            "itself.",
            rich_help_panel=PANEL,
        ),
    ] = None
    json_object: Annotated[
        bool,
        typer.Option("--json-object", help="The answer is a JSON object.", rich_help_panel=PANEL),
    ] = False
    regex: Annotated[
        str | None,
        typer.Option(
            help="The answer matches this regular expression as a whole.", rich_help_panel=PANEL
        ),
    ] = None
    choices: Annotated[
        str | None,
        typer.Option(
            help="The answer is one of these texts, as in yes,no,maybe; \\, is a comma in one.",
            rich_help_panel=PANEL,
        ),
    ] = None
    json_compact: Annotated[
        bool,
        typer.Option("--json-compact", help="JSON without white space.", rich_help_panel=PANEL),
    ] = False
    json_indent: Annotated[
        int | None,
        typer.Option(help="JSON indented by so many spaces.", min=0, rich_help_panel=PANEL),
    ] = None

    @property
    def reads_stdin(self) -> bool:
        """Whether the schema is read from stdin."""
        return self.json_schema == "-"

    def given(self) -> dict[str, str]:
        """Return the options that make a constraint, by name; at most one of them counts."""
        values = {
            "--json-schema": self.json_schema,
            "--json-object": "" if self.json_object else None,
            "--regex": self.regex,
            "--choices": self.choices,
        }
        return {name: value for name, value in values.items() if value is not None}

    def instead(self, kind: str, value: str) -> ConstraintOptions:
        """Return these options with another constraint; the layout of JSON stays.

        Args:
          kind: the name of an option, without its dashes.
          value: of the option; empty where it takes none.

        Raises:
          ConstraintError: if there is no such constraint, or a value is missing or too much.
        """
        kinds: dict[str, dict[str, Any]] = {
            "json-schema": {"json_schema": value},
            "json-object": {"json_object": True},
            "regex": {"regex": value},
            "choices": {"choices": value},
        }
        if kind not in kinds:
            raise ConstraintError(f"there is no constraint {kind!r}; there are {', '.join(kinds)}")
        if kind == "json-object" and value:
            raise ConstraintError(f"{kind} takes nothing behind it, got {value[:60]!r}")
        if kind != "json-object" and not value:
            raise ConstraintError(f"{kind} needs something behind it")
        cleared = replace(self, json_schema=None, json_object=False, regex=None, choices=None)
        return replace(cleared, **kinds[kind])

    def constraint(self, dashes: str = "--") -> Constraint | None:
        """Return the constraint, if one is given.

        Args:
          dashes: in front of an option's name in errors; the chat has none.

        Raises:
          ConstraintError: if it cannot be held, or several are given.
          PromptError: if a file cannot be read.
        """
        names = list(self.given())
        if len(names) > 1:
            raise ConstraintError(f"{' and '.join(names)} exclude each other; give one of them")
        laid_out = self.json_compact or self.json_indent is not None
        if laid_out and not (self.json_schema is not None or self.json_object):
            raise ConstraintError(
                "--json-compact and --json-indent need --json-schema or --json-object"
            )
        if not names:
            return None
        from ..constraint.constraint import Constraint

        try:
            if self.regex is not None:
                return Constraint.regex(self.regex)
            if self.choices is not None:
                return Constraint.choices(listed(self.choices))
            schema = {"type": "object"} if self.json_schema is None else _schema(self.json_schema)
            return Constraint.json_schema(
                schema, compact=self.json_compact, indent=self.json_indent
            )
        except ConstraintError as error:
            raise ConstraintError(f"{dashes}{names[0].removeprefix('--')}: {error}") from None


def _schema(given: str) -> str:
    """Return the text of a schema that is a file, '-', or the schema itself."""
    if given == "-":
        return read_stdin()
    if given.lstrip()[:1] in ("{", "[", '"') or given.strip() in ("true", "false"):
        return given
    file = Path(given)
    if not file.exists():
        raise DiffGemmaError(f"--json-schema: there is no file {given}, and it is no JSON object")
    return decoded(file, read_file(file)).removeprefix("\ufeff")


def listed(given: str) -> list[str]:
    """Return texts that commas separate."""
    pieces = re.findall(r"((?:\\.|[^,\\])*)(?:,|\Z)", given + ",")[:-1]
    return [re.sub(r"\\([,\\])", r"\1", piece).strip() for piece in pieces]
