r"""The template language: literal text, and slots that the model writes.

    {{gap}}  {{gap:8}}  {{gap:4..12}}       free text: any length, 8 tokens, 4 to 12 tokens
    {{one of: yes | no}}                    one of these texts; spaces around them do not count
    {{match: [0-9]{1,3}}}                   a text that a regular expression matches as a whole
    {{json: {"type": "integer"}}}           a JSON text that a JSON Schema allows
    {{name = gap:8}}                        any of them, under a name in the result
    \{{                                     a literal {{; before a slot, \\ is a literal \

A slot ends at the first `}}` outside of its own braces; a backslash makes the next character in it
plain, so options and expressions may contain `\|`, `\{` and `\}`. A schema ends where its JSON
does. Everything else is literal text. A byte order mark at the beginning is kept; the model does
not see it. Knows text, not tokens; whether an expression or a schema can be held is found later.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal as OneOf

from ..errors import TemplateError

_NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)\s*")
_GAP = re.compile(r"gap(?:\s*:\s*(\d{1,99})(?:\s*\.\.\s*(\d{1,99}))?)?")
_JSON = re.compile(r"\s*(?:[A-Za-z_]\w*\s*=\s*)?json\s*:\s*")
_OPENING = re.compile(r"(\\*)(\{{2,})")
SHOWN_BLANK = "____"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, slots=True)
class Slot:
    """A part that the model writes."""

    name: str
    kind: OneOf["gap", "one of", "match", "json"]
    low: int | None = None  # tokens of a gap; None leaves it to the caller
    high: int | None = None
    options: tuple[str, ...] = ()
    pattern: str = ""
    schema: str = ""  # JSON
    place: str = field(default="", compare=False)  # in the template, for messages
    body: tuple[int, int] = field(default=(0, 0), compare=False)  # line and column of the pattern

    @property
    def label(self) -> str:
        """The place and name, to begin a message with."""
        return f"{self.place}: slot {self.name}" if self.place else f"slot {self.name}"

    def label_at(self, position: int) -> str:
        """The place of a character of the pattern, and the name, to begin a message with."""
        line, column = self.body
        if not line or "\n" in self.pattern:
            return self.label
        return f"{_said(line, column + position)}: slot {self.name}"


@dataclass(frozen=True, slots=True)
class Template:
    """Literal texts and slots, in order, without two literals in a row."""

    parts: tuple[str | Slot, ...]
    mark: str = ""  # a byte order mark before them, which the model does not see

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template. The names of unnamed slots are their numbers, from 1.

        Raises:
          TemplateError: if something cannot be read, with line and column, or if there is no slot.
        """
        mark, text = split_mark(text)
        parts: list[str | Slot] = []
        literal, at, number = "", 0, 0
        while opening := _OPENING.search(text, at):
            slashes, braces = opening.groups()
            literal += text[at : opening.start()] + "\\" * (len(slashes) // 2)
            if len(slashes) % 2:
                literal, at = literal + "{{", opening.start(2) + 2
                continue
            literal += braces[2:]  # of several, the last two open the slot
            end = _end_of_json(text, opening.end())
            if end is None:
                end = _end_of_slot(text, opening.end())
            number += 1
            slot = _slot(text, opening.end(), end, number)
            parts += [literal, slot] if literal else [slot]
            literal, at = "", end + 2
        if literal := literal + text[at:]:
            parts.append(literal)
        template = cls(tuple(parts), mark)
        if not template.slots:
            raise TemplateError("the template has no slot; one is written {{gap}}")
        names = [slot.name for slot in template.slots]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise TemplateError(f"two slots of the template are called {twice[0]!r}")
        return template

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(part for part in self.parts if isinstance(part, Slot))

    def shown(self) -> str:
        """Return the template with blanks for slots."""
        return "".join(part if isinstance(part, str) else SHOWN_BLANK for part in self.parts)

    def filled(self, texts: dict[str, str]) -> str:
        """Return the literals joined with the texts of the slots, by name."""
        parts = (part if isinstance(part, str) else texts[part.name] for part in self.parts)
        return self.mark + "".join(parts)


def split_mark(text: str) -> tuple[str, str]:
    """Return the byte order mark of a text, or nothing, and the rest."""
    rest = text.removeprefix(BYTE_ORDER_MARK)
    return text[: len(text) - len(rest)], rest


def _end_of_slot(text: str, start: int) -> int:
    """Return the index of the `}}` that ends the slot with content from `start` on."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            if depth == 0 and text.startswith("}}", at):
                return at
            depth = max(0, depth - 1)
        at += 1
    raise TemplateError(f"{_place(text, start - 2)}: this slot has no }}}} at its end")


def _end_of_json(text: str, start: int) -> int | None:
    """Return the index of the `}}` behind a JSON text, whose strings may have any braces; None if
    the slot holds none."""
    opening = _JSON.match(text, start)
    if opening is None:
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(text, opening.end())
    except json.JSONDecodeError as error:
        raise TemplateError(f"{_place(text, error.pos)}: json: {error.msg}") from None
    end += len(text[end:]) - len(text[end:].lstrip())
    if not text.startswith("}}", end):
        raise TemplateError(f"{_place(text, end)}: there is more than one JSON text in this slot")
    return end


def _slot(text: str, start: int, end: int, number: int) -> Slot:
    content = text[start:end]
    named = _NAME.match(content)
    name, at = (named[1], named.end()) if named else (str(number), 0)
    at += len(content[at:]) - len(content[at:].lstrip())
    body = content[at:].strip()
    place = _place(text, start + at)
    if gap := _GAP.fullmatch(body):
        low, high = (None if group is None else int(group) for group in gap.groups())
        high = low if high is None else high
        if low is not None and high is not None and not 1 <= low <= high:
            raise TemplateError(f"{place}: a gap of {low} to {high} tokens is not possible")
        return Slot(name, "gap", low, high, place=place)
    kind, colon, value = body.partition(":")
    if colon and kind.strip() == "one of":
        pieces = re.findall(r"((?:\\.|[^|\\])*)(?:\||\Z)", value + "|")[:-1]
        options = [_plain(option.strip()) for option in pieces]
        if "" in options:
            raise TemplateError(f"{place}: option {options.index('') + 1} is empty")
        return Slot(name, "one of", options=tuple(dict.fromkeys(options)), place=place)
    if colon and kind.strip() == "match":
        pattern = value.strip()
        if not pattern:
            raise TemplateError(f"{place}: there is nothing to match")
        begin = start + at + len(body) - len(value.lstrip())
        return Slot(name, "match", pattern=pattern, place=place, body=_line_column(text, begin))
    if colon and kind.strip() == "json":
        return Slot(name, "json", schema=value.strip(), place=place)
    raise TemplateError(
        f"{place}: {body!r} is not a slot; there are gap, gap:8, gap:4..12, one of: a | b, "
        'match: [0-9]+ and json: {"type": "integer"}'
    )


def _plain(option: str) -> str:
    return re.sub(r"\\([\\|{}])", r"\1", option)


def _place(text: str, at: int) -> str:
    return _said(*_line_column(text, at))


def _line_column(text: str, at: int) -> tuple[int, int]:
    return text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1


def _said(line: int, column: int) -> str:
    return f"template, line {line}, column {column}"
