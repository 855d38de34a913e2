"""Options on what an answer must be."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConstraintError, DiffGemmaError
from .options import decoded, read_file, read_stdin

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

    def constraint(self) -> Any:
        """Return the `Constraint`, or None.

        Raises:
          ConstraintError: if it cannot be held, or several are given.
          PromptError: if a file cannot be read.
        """
        given = {
            "--json-schema": self.json_schema,
            "--json-object": self.json_object or None,
            "--regex": self.regex,
            "--choices": self.choices,
        }
        names = [name for name, value in given.items() if value is not None]
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
            raise ConstraintError(f"{names[0]}: {error}") from None


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
