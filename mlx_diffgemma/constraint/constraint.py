"""What an answer must be: a JSON text, a match of an expression, one of some texts, a filled
template, or tool calls. Compiled once, when it is made; a checkpoint's tokens come in later."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NoReturn

from ..errors import ConstraintError, TemplateError
from ..language.template import Slot, Template
from . import parts, regex
from .dfa import DFA, NOWHERE
from .dialect import validator_of
from .net import DEFAULT_SECONDS, DEFAULT_STATES, Limits
from .python_types import schema_of
from .schema import Compiled, json_schema
from .tool_calls import CallTokens, tool_calls

Kind = Literal["json_schema", "regex", "choices", "template", "tool_call"]
_KEPT = 64  # compiled schemas
_DIGITS = 500  # of a whole number, that Python reads at once whatever its limit is set to


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """What an answer must be, as a whole. Make one with the functions of the class.

    Attributes:
      kind: of these functions.
      notes: what of the language is left out, for example deeper nesting.
    """

    kind: Kind
    notes: tuple[str, ...] = ()
    _dfa: DFA | None = None  # None for tool calls, which are made of a checkpoint's tokens
    _schema: Any = None
    _type: Any = None
    _tools: tuple[Any, ...] = ()
    _bounds: Mapping[str, Any] = field(default_factory=dict)  # of tool calls
    _answer: Constraint | None = None  # what may stand instead of them

    @classmethod
    def json_schema(
        cls,
        schema: Any,
        *,
        closed: bool = False,
        compact: bool = False,
        indent: int | None = None,
        states: int = DEFAULT_STATES,
        seconds: float = DEFAULT_SECONDS,
    ) -> Constraint:
        """Return the constraint to JSON texts that a schema allows.

        Keys come in the order of the schema, and undeclared ones behind them.

        Args:
          schema: a JSON Schema as an object or as JSON text, of draft 4 to 2020-12; or a pydantic
            model, a dataclass or another type, of which `parse` then makes the value.
          closed: leave out keys that the schema does not name, as if it had said so.
          compact: no white space between the parts of a text.
          indent: spaces by which each level is indented; by default any white space is accepted.
          states: most states of the automaton, at most 10,000.
          seconds: most processor time to make it.

        Raises:
          ConstraintError: if the schema cannot be held; `keyword` and `pointer` say what and where.
        """
        kind = None
        if isinstance(schema, str | bytes):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ConstraintError(f"the JSON Schema is not JSON: {error}") from None
        elif not isinstance(schema, Mapping | bool):
            schema, kind = schema_of(schema), schema
        if not isinstance(schema, Mapping | bool):
            raise ConstraintError(
                f"a JSON Schema is an object, true or false, got {json.dumps(schema)[:40]}"
            )
        found = _compiled(json.dumps(schema), closed, compact, indent, states, seconds)
        return cls("json_schema", found.notes, found.dfa, schema, kind)

    @classmethod
    def json_object(cls) -> Constraint:
        """Return the constraint to any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(
        cls, pattern: str, *, states: int = DEFAULT_STATES, seconds: float = DEFAULT_SECONDS
    ) -> Constraint:
        """Return the constraint to texts that a regular expression matches as a whole.

        The syntax is what Rust's and Python's expressions have in common; see
        `mlx_diffgemma.constraint.regex`. `states` and `seconds` are as in `json_schema`.

        Raises:
          ConstraintError: with `position`, if the expression cannot be held; also if it matches
            nothing but the empty text.
        """
        if not isinstance(pattern, str):
            raise ConstraintError(f"an expression is a text, got {type(pattern).__name__}")
        return cls("regex", (), _some(regex.regex(pattern, Limits(states, seconds)), "expression"))

    @classmethod
    def choices(
        cls,
        texts: Sequence[str],
        *,
        states: int = DEFAULT_STATES,
        seconds: float = DEFAULT_SECONDS,
    ) -> Constraint:
        """Return the constraint to one of some texts; `states` and `seconds` are as in
        `json_schema`."""
        return cls("choices", (), parts.choices(texts, Limits(states, seconds)))

    @classmethod
    def template(cls, template: str | Template) -> Constraint:
        """Return the constraint to a template whose slots are filled. A `gap` is any text, of any
        length.

        Raises:
          TemplateError: if it cannot be read, or a gap has a number of tokens.
          ConstraintError: if a slot's expression cannot be held.
        """
        if isinstance(template, str):
            template = Template.parse(template)
        if not isinstance(template, Template):
            raise TemplateError(
                "a template is a string or comes from Template.parse, got "
                f"{type(template).__name__}"
            )
        pieces = [part if isinstance(part, str) else slot_dfa(part) for part in template.parts]
        return cls("template", (), parts.in_a_row(pieces))

    @classmethod
    def tool_call(
        cls,
        tools: Sequence[Any],
        *,
        required: bool = True,
        most: int | None = 1,
        answer: Constraint | None = None,
        states: int = DEFAULT_STATES,
        seconds: float = DEFAULT_SECONDS,
    ) -> Constraint:
        """Return the constraint to calls of some tools, whose arguments fit their declarations.

        Args:
          tools: declarations in OpenAI's form, as `PromptOptions.tools`.
          required: there must be a call and nothing else; otherwise text, and perhaps calls
            behind it.
          most: calls at most; None for any number.
          answer: what a text must be that stands instead of calls, where none is required; there
            is no text before calls then.
          states: as in `json_schema`.
          seconds: as in `json_schema`.

        Raises:
          ConstraintError: if a tool's parameters cannot be held.
        """
        if answer is not None and (required or answer.kind == "tool_call"):
            raise ConstraintError("an answer stands instead of calls that are not required")
        # The ids do not matter for what can be held.
        bounds: dict[str, Any] = {
            "required": required,
            "most": most,
            "states": states,
            "seconds": seconds,
            "answer": None if answer is None else answer.dfa(),
        }
        found = tool_calls(tools, CallTokens(0, 1, 2), **bounds)
        notes = found.notes if answer is None else (*answer.notes, *found.notes)
        return cls("tool_call", notes, _tools=tuple(tools), _bounds=bounds, _answer=answer)

    @property
    def is_required(self) -> bool:
        """Whether a constraint to tool calls asks for one; False: they may be left out."""
        return bool(self._bounds.get("required", True))

    def dfa(self, tokens: CallTokens | None = None) -> DFA:
        """Return the automaton.

        Args:
          tokens: the control tokens of a call; None where a checkpoint has none.

        Raises:
          ConstraintError: if they are needed and there are none.
        """
        if self._dfa is not None:
            return self._dfa
        if tokens is None:
            raise ConstraintError("this checkpoint's tokens have no form for tool calls")
        return tool_calls(self._tools, tokens, **self._bounds).dfa

    def accepts(self, text: str) -> bool:
        """Return whether a whole text fits. A tool call is no text, so that only what stands beside
        one can fit."""
        if self._answer is not None:
            return self._answer.accepts(text)
        if self._dfa is None:
            return not self.is_required
        return self._dfa.accepts(text)

    def parse(self, text: str) -> Any:
        """Return an answer's value: of JSON, an instance of the schema's type if it was made of
        one; else the text. Whole numbers may have any number of digits.

        Raises:
          ConstraintError: if the text does not fit, or an independent validator refuses it.
        """
        if self._answer is not None:
            return self._answer.parse(text)
        if not self.accepts(text):
            _refuse(text, "it is not in the language of the constraint")
        if self.kind != "json_schema":
            return text
        value = json.loads(text, parse_int=_whole_number)
        error = next(iter(validator_of(self._schema).iter_errors(value)), None)
        if error is not None:
            _refuse(text, f"{error.json_path}: {error.message}")
        return value if self._type is None else _instance(self._type, value)

    def check_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]], text: str = "") -> None:
        """Check names and arguments of the calls of an answer under a constraint to calls with an
        independent validator; `text` stands beside them.

        Raises:
          ConstraintError: if they do not fit.
        """
        if self.is_required and not calls:
            _refuse("", "there is no tool call")
        if self._answer is not None and calls and text:
            _refuse(text, "it stands beside a call")
        schemas = {}
        for tool in self._tools:
            function = tool.get("function", tool)
            schemas[function["name"]] = {"type": "object", **(function.get("parameters") or {})}
        for name, arguments in calls:
            if name not in schemas:
                _refuse(name, "there is no such tool")
            error = next(iter(validator_of(schemas[name]).iter_errors(dict(arguments))), None)
            if error is not None:
                _refuse(json.dumps(arguments), f"{name}: {error.json_path}: {error.message}")


@lru_cache(maxsize=_KEPT)
def _compiled(
    schema: str, closed: bool, compact: bool, indent: int | None, states: int, seconds: float
) -> Compiled:
    loaded = json.loads(schema)
    return json_schema(
        loaded, closed=closed, compact=compact, indent=indent, states=states, seconds=seconds
    )


def slot_dfa(slot: Slot) -> DFA:
    """Return the automaton of a slot's texts; a gap holds any text.

    Raises:
      TemplateError: if it is a gap with a number of tokens.
      ConstraintError: if its expression or schema cannot be held; it begins with the place in the
        template.
    """
    if slot.kind == "one of":
        return parts.choices(slot.options)
    if slot.kind == "gap":
        if slot.low is not None:
            raise TemplateError(
                f"{slot.label}: a constraint counts no tokens; write {{{{gap}}}}, or "
                "{{match: .{1,40}}} for a number of characters"
            )
        return parts.free_text()
    try:
        if slot.kind == "json":
            return Constraint.json_schema(slot.schema).dfa()
        return _some(regex.regex(slot.pattern), "expression")
    except ConstraintError as error:
        label = slot.label if error.position is None else slot.label_at(error.position)
        raise ConstraintError(
            f"{label}: {slot.kind}: {error}",
            keyword=error.keyword,
            pointer=error.pointer,
            position=error.position,
        ) from None


def _some(dfa: DFA, what: str) -> DFA:
    if not dfa.accepting.any():
        raise ConstraintError(f"no text fits this {what}")
    if (dfa.table == NOWHERE).all():
        raise ConstraintError(f"only the empty text fits this {what}, so there is nothing to write")
    return dfa


def _whole_number(text: str) -> int:
    """Return a whole number of any number of digits; Python's `int` reads 4,300 at most."""
    if len(text) <= _DIGITS:
        return int(text)
    digits, value = text.removeprefix("-"), 0
    for at in range(0, len(digits), _DIGITS):
        part = digits[at : at + _DIGITS]
        value = value * 10 ** len(part) + int(part)
    return -value if text.startswith("-") else value


def _instance(kind: Any, value: Any) -> Any:
    """Return an instance of a type that a schema was made of."""
    if (pydantic := sys.modules.get("pydantic")) is None:  # see `schema_of`
        return kind(**value) if isinstance(value, dict) and callable(kind) else value
    return pydantic.TypeAdapter(kind).validate_python(value)


def _refuse(text: str, reason: str) -> NoReturn:
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    raise ConstraintError(f"the answer {shown!r} does not fit its constraint: {reason}")
