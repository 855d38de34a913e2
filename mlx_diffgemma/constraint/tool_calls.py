"""Tool calls in Gemma's own form as automata: `<|tool_call>call:NAME{key:value,...}<tool_call|>`.

Strings stand between two `<|"|>` and have no escapes. Markers and quotes are special tokens, so no
text can end a string. Keys come in alphabetical order, as the published chat templates write them,
and are not quoted. A call has no white space and no key that its tool does not declare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConstraintError
from ..language.tools import declared
from .build import intersection
from .dfa import DFA, SPECIAL
from .json_text import Bounds, Layout, numbers
from .net import DEFAULT_SECONDS, DEFAULT_STATES, MOST_STATES, Limits, Net, determinise
from .ranges import SCALARS, single
from .regex import regex
from .schema import Compiled, compiled

_PLAIN_KEY = re.compile(r"[^\W\d][\w.$/-]*")
_NAME = re.compile(r"[^\s{}\0]+")
# Digits before a number's point: enough for 64 bits, or one more than its bounds have, but never so
# many that it is read as infinite, or that Python refuses to read it.
_WHOLE_DIGITS, _MOST_DIGITS = 20, 300


@dataclass(frozen=True, slots=True)
class CallTokens:
    """The ids of the control tokens of a call."""

    begin: int
    end: int
    quote: int


@dataclass(frozen=True, slots=True)
class _CallLayout(Layout):
    """The notation of the arguments."""

    quote: int = 0

    def in_order(self, keys: Iterable[str]) -> list[str]:
        return sorted(keys, key=lambda key: (key.lower(), key))

    def key(self, net: Net, at: int, text: str) -> int:
        return net.spell(at, text) if _PLAIN_KEY.fullmatch(text) else self.string(net, at, text)

    def string(self, net: Net, at: int, text: str) -> int:
        return net.spell(at, [SPECIAL + self.quote, *map(ord, text), SPECIAL + self.quote])

    def put_key(self, net: Net, at: int, body: DFA) -> int:
        net.put(at, body, behind := net.state())
        return behind

    def put_string(self, net: Net, at: int, body: DFA) -> int:
        net.put(net.spell(at, [SPECIAL + self.quote]), body, behind := net.state())
        return net.spell(behind, [SPECIAL + self.quote])

    def keys(self, texts: DFA, limits: Limits) -> DFA:
        return intersection(texts, regex("[A-Za-z_][A-Za-z0-9_]*"), limits)

    def strings(self, texts: DFA | None, limits: Limits, *, counted: bool) -> DFA:
        return regex("(?s).*") if texts is None else texts

    def numbers(self, bounds: Bounds) -> DFA:
        given = [abs(bound) for bound in (bounds.low, bounds.high) if bound is not None]
        digits = max([_WHOLE_DIGITS, *(len(f"{bound:.0f}") + 1 for bound in given)])
        short = regex(rf"-?[0-9]{{1,{min(digits, _MOST_DIGITS)}}}(\.[0-9]+)?")
        return intersection(numbers(bounds), short)


def tool_calls(
    tools: Sequence[Any],
    tokens: CallTokens,
    *,
    required: bool = True,
    most: int | None = 1,
    answer: DFA | None = None,
    states: int = DEFAULT_STATES,
    seconds: float = DEFAULT_SECONDS,
) -> Compiled:
    """Return the automaton of calls of some tools.

    Args:
      tools: declarations in OpenAI's form; `parameters` is a JSON Schema.
      tokens: the ids of the control tokens.
      required: there must be a call, and nothing else; otherwise there may be a text, and calls
        behind it.
      most: calls at most; None for any number.
      answer: the texts that may stand instead of calls, and not before them; None for any.
      states: the most states.
      seconds: the most processor time.

    Raises:
      PromptError: if a declaration has no name.
      ConstraintError: if parameters cannot be held; the message names the tool.
    """
    if not tools or (most is not None and most < 1):
        raise ConstraintError("tool calls need one tool at least, and may be 1 or more")
    limits = Limits(min(states, MOST_STATES), seconds)
    calls = [_call(declared(tool)["function"], tokens, limits) for tool in tools]
    names = [name for name, _, _ in calls]
    if len(set(names)) < len(names):
        raise ConstraintError(f"two tools have one name: {', '.join(names)}")
    net = Net(limits)
    start, end = net.state(), net.state()
    at = net.state()
    net.skip(start, at)
    if answer is not None:
        net.put(start, answer, end)
    elif not required:
        net.move(at, SCALARS, at)
        net.skip(at, end)
    for _ in range(most or 1):
        behind = net.state()
        for _, call, _ in calls:
            net.put(at, call, behind)
        net.skip(behind, end)
        if most is None:
            net.skip(behind, further := net.state())
            for _, call, _ in calls:
                net.put(further, call, behind)
        at = behind
    notes = [f"{name}: {note}" for name, _, found in calls for note in found]
    return Compiled(determinise(net, start, end), tuple(notes))


def _call(
    function: Mapping[str, Any], tokens: CallTokens, limits: Limits
) -> tuple[str, DFA, tuple[str, ...]]:
    """Return a tool's name, the automaton of its calls, and what is cut in it."""
    name, parameters = function["name"], function.get("parameters") or {"properties": {}}
    if not _NAME.fullmatch(name):
        raise ConstraintError(f"a tool's name has no spaces and braces, got {name!r}")
    if not isinstance(parameters, Mapping):
        raise ConstraintError(f"tool {name}: parameters must be a JSON Schema, got {parameters!r}")
    schema = {"type": "object", **parameters}
    if not schema.get("properties"):
        schema.setdefault("additionalProperties", False)
    layout = _CallLayout(is_any=False, quote=tokens.quote)
    try:
        arguments = compiled(schema, layout, limits, closed=True)
    except ConstraintError as error:
        refusal = type(error)(
            f"tool {name}: {error}",
            keyword=error.keyword,
            pointer=error.pointer,
            position=error.position,
        )
        raise refusal from None
    net = Net(replace(limits))
    start, end = net.state(), net.state()
    at = net.spell(start, [SPECIAL + tokens.begin, *map(ord, f"call:{name}")])
    net.put(at, arguments.dfa, behind := net.state())
    net.move(behind, single(SPECIAL + tokens.end), end)
    return name, determinise(net, start, end), arguments.notes
