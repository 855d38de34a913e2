"""Tools: calls read from the model's ids, and the forms of calls and declarations in a prompt.

A call is `<|tool_call>call:NAME{key:value,...}<tool_call|>`. Its markers, and `<|"|>` around each
string, are control tokens, so a string may contain any text: what spells a control token in
ordinary tokens is only text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Never

from ..errors import PromptError
from ..events import BrokenToolCall, Text, ToolCall
from .controls import THOUGHT_BEGIN, THOUGHT_END, special_tokens

if TYPE_CHECKING:
    from .tokenizer import AnyTokenizer

CALL_BEGIN, CALL_END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'

_STRING = "\0"  # takes the place of each string while a call is read
_HEAD = re.compile(r"\s*call:\s*([^\s{}\0]+)\s*(?={)")
_KEY = re.compile(r"[^:\0]*")
_SPACE = re.compile(r"\s*")
# Two of the three published templates write null as Python does.
_WORD = re.compile(
    r"(-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null|None)(?=[\s,}\]])"
)
_CONSTANTS = {"true": True, "false": False, "null": None, "None": None}
_DEEPEST = 100  # objects and lists within each other

CallEvent = ToolCall | BrokenToolCall | Text


class CallReader:
    """Collects the ids of tool calls, and reads each call when it ends."""

    def __init__(self, tokenizer: AnyTokenizer, ends: Iterable[int], prompt: Sequence[int] = ()):
        """Begin after `prompt`, which may leave a call open. Calls are numbered on from those in
        it, so that no two calls of a conversation share an id."""
        self._tokenizer = tokenizer
        specials = special_tokens(tokenizer)
        self.begin = specials.get(CALL_BEGIN)
        self._end, self._quote = specials.get(CALL_END), specials.get(QUOTE)
        self._ends = frozenset(ends)
        markers = (self.begin, specials.get(THOUGHT_BEGIN), specials.get(THOUGHT_END))
        self._markers = frozenset(token for token in markers if token is not None)
        self._ids: list[int] | None = None  # of the open call, without its first marker
        self._given = 0  # ids of it that the prompt holds, its marker included
        borders = [i for i, token in enumerate(prompt) if token in (self.begin, self._end)]
        if borders and prompt[borders[-1]] == self.begin:
            inside = list(prompt[borders[-1] + 1 :])
            if not self._ends.union(self._markers).intersection(inside):
                self._ids, self._given = inside, 1 + len(inside)
        self._number = sum(prompt[i] == self.begin for i in borders) - self.is_open

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._ids is not None

    def open(self) -> None:
        """Begin a call, behind its first marker."""
        self._ids, self._given = [], 0

    def branch(self) -> CallReader:
        """Return a copy that goes on by itself."""
        other = copy(self)
        other._ids = None if self._ids is None else [*self._ids]
        return other

    def forget(self) -> None:
        """Drop the open call."""
        self._ids = None

    def push(self, token: int) -> list[CallEvent] | None:
        """Take a token of the open call; return the events of a call that it ends, or None if the
        token is not part of a call: none is open, or the token breaks it off."""
        if self._ids is None or token in self._ends:
            return None
        if token in self._markers and self._ids.count(self._quote or -1) % 2 == 0:
            return None  # inside of a string it is text
        if token == self._end:
            return self._close()
        if self._tokenizer.convert_ids_to_tokens(token) is not None:
            self._ids.append(token)
        return []

    def break_off(self) -> list[CallEvent]:
        """End the open call where it is; return its text and its event."""
        return [] if self._ids is None else self._broken("incomplete", [])

    def _close(self) -> list[CallEvent]:
        assert self._ids is not None and self._end is not None
        try:
            name, arguments = _read(self._parts())
        except _MalformedError:
            return self._broken("malformed", [self._end])
        call = ToolCall(self._next_id(), name, arguments)
        self._ids = None
        return [call]

    def _broken(self, problem: Any, behind: list[int]) -> list[CallEvent]:
        assert self._ids is not None and self.begin is not None
        whole = [self.begin, *self._ids, *behind]
        written = self._decode(whole[self._given :])
        event = BrokenToolCall(self._next_id(), self._decode(whole), problem)
        self._ids = None
        return [Text(written, "answer"), event] if written else [event]

    def _next_id(self) -> str:
        self._number += 1
        return f"call_{self._number - 1}"

    def _parts(self) -> list[str]:
        """Return the call's text split at the quotes: every second part is a string."""
        parts: list[list[int]] = [[]]
        for token in self._ids or ():
            if token == self._quote:
                parts.append([])
            else:
                parts[-1].append(token)
        return [self._decode(part) for part in parts]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def calls_as_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose tool calls have the form that chat templates read: OpenAI's, with
    arguments as an object. `ToolCall` events and JSON texts are replaced.

    Raises:
      PromptError: if a call has no name, or its arguments are no object.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, (list, tuple)):
        raise PromptError(f"tool_calls must be a list of calls, got {calls!r}")
    return {**message, "tool_calls": [_call_object(call) for call in calls]}


def declared(tool: Any) -> Any:
    """Return a tool's declaration in OpenAI's form: the function alone gets its frame.

    Raises:
      PromptError: if it is not an object with a name.
    """
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            'a tool is a Python function or an object such as {"type": "function", "function": '
            f'{{"name": ..., "description": ..., "parameters": ...}}}}, got {tool!r}'
        )
    return tool


def _call_object(call: Any) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "name": call.name, "arguments": call.arguments}
    if isinstance(call, Mapping) and "function" not in call:
        frame = {"id": call["id"]} if "id" in call else {}
        call = {**frame, "type": "function", "function": call}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            'a tool call is an object such as {"type": "function", "function": {"name": ..., '
            f'"arguments": {{...}}}}}}, got {call!r}'
        )
    given = function.get("arguments")
    arguments = _decoded(given) if isinstance(given, str) else {} if given is None else given
    if not isinstance(arguments, Mapping):
        raise PromptError(
            f"the arguments of a call of {function['name']} must be an object, or the text of a "
            f"JSON object, got {given!r}"
        )
    return {**call, "function": {"name": function["name"], "arguments": arguments}}


def _decoded(text: str) -> Any:
    """Return the value of a JSON text, `{}` for an empty one; None if it is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse) if text.strip() else {}
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant} is no JSON")


class _MalformedError(Exception):
    """A call that cannot be read."""


def _read(parts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call, from its text split at the quotes."""
    outside, strings = parts[::2], parts[1::2]
    if len(outside) == len(strings) or any(_STRING in part for part in outside):
        raise _MalformedError
    scanner = _Scanner(_STRING.join(outside), strings)
    return scanner.call()


class _Scanner:
    """Reads a call from left to right."""

    def __init__(self, text: str, strings: Sequence[str]):
        self._text, self._at, self._strings = text, 0, iter(strings)

    def call(self) -> tuple[str, dict[str, Any]]:
        name = self._match(_HEAD)[1]
        self._at += 1
        arguments = self._object(0)
        self._match(_SPACE)
        if self._at != len(self._text):
            raise _MalformedError
        return name, arguments

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise _MalformedError
        if self._takes(_STRING):
            return next(self._strings)
        if self._takes("{"):
            return self._object(depth)
        if self._takes("["):
            return self._list(depth)
        if self._text.startswith('"', self._at):
            return self._json_string()
        word, fraction, exponent = self._match(_WORD).groups()
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        try:
            number = float(word) if fraction or exponent else int(word)
        except ValueError as error:  # Python refuses whole numbers of thousands of digits
            raise _MalformedError from error
        if not math.isfinite(number):
            raise _MalformedError
        return number

    def _object(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self._takes("}"):
            return values
        while True:
            key = self._key()
            if not self._takes(":"):
                raise _MalformedError
            values[key] = self._value(depth + 1)
            if self._takes("}"):
                return values
            if not self._takes(","):
                raise _MalformedError

    def _list(self, depth: int) -> list[Any]:
        values: list[Any] = []
        if self._takes("]"):
            return values
        while True:
            values.append(self._value(depth + 1))
            if self._takes("]"):
                return values
            if not self._takes(","):
                raise _MalformedError

    def _key(self) -> str:
        if self._takes(_STRING):
            return next(self._strings)
        if self._text.startswith('"', self._at):
            return self._json_string()
        return self._match(_KEY)[0].strip()

    def _json_string(self) -> str:
        """Read a string in ordinary quotes, as some models write it."""
        try:
            value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
        except ValueError as error:
            raise _MalformedError from error
        return str(value)

    def _takes(self, character: str) -> bool:
        """Skip white space; take the character if it comes next, and white space behind it."""
        self._match(_SPACE)
        if not self._text.startswith(character, self._at):
            return False
        self._at += 1
        self._match(_SPACE)
        return True

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise _MalformedError
        self._at = found.end()
        return found
