"""JSON Schemas as automata of the JSON texts that are valid.

Whatever is accepted is valid. Not everything that is valid is accepted: keys come in the order of
the schema, then undeclared ones, and values nest as deep as the notes of the result say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConstraintError, LimitError
from .alternatives import Alternatives
from .build import is_empty
from .dfa import DFA
from .dialect import Document
from .json_text import Layout
from .net import DEFAULT_SECONDS, DEFAULT_STATES, MOST_STATES, Limits, Net, determinise
from .values import Cuts, Writer

_LAST_RUNG = 0.4  # part of the time after which only the last of the cuts is tried
# What is tried, one behind another, until it needs few enough states.
_LADDER = (
    Cuts(depth=3, recursion=2),
    Cuts(depth=2, recursion=1),
    Cuts(depth=1, recursion=1),
    Cuts(depth=0, recursion=1),
    Cuts(depth=0, recursion=1, closed=True),
    Cuts(depth=1, recursion=1, length=200, items=20),
    Cuts(depth=0, recursion=1, length=100, items=10, closed=True),
    Cuts(depth=0, recursion=0, length=30, items=4, closed=True),
)


@dataclass(frozen=True, slots=True)
class Compiled:
    """An automaton, and what of the language it does not hold."""

    dfa: DFA
    notes: tuple[str, ...] = ()


def json_schema(
    schema: Mapping[str, Any] | bool,
    *,
    closed: bool = False,
    compact: bool = False,
    indent: int | None = None,
    states: int = DEFAULT_STATES,
    seconds: float = DEFAULT_SECONDS,
) -> Compiled:
    """Return the automaton of the JSON texts that a schema allows.

    Args:
      schema: of draft 4, 6, 7, 2019-09 or 2020-12.
      closed: leave out keys that the schema does not name, as if it had said so.
      compact: no white space between the parts of a text.
      indent: each item and key on a line of its own, indented by so many spaces; otherwise any
        white space is accepted.
      states: the most states; at most 10,000.
      seconds: the most processor time.

    Raises:
      ConstraintError: with `keyword` and `pointer`, if a keyword cannot be held, or nothing is
        valid.
      LimitError: if too many states are needed even with the deepest values left out.
    """
    if compact and indent is not None:
        raise ConstraintError("compact and indent exclude each other; leave one out")
    limits = Limits(min(states, MOST_STATES), seconds)
    layout = Layout(indent, is_any=not compact and indent is None)
    return compiled(schema, layout, limits, closed=closed)


def compiled(schema: Any, layout: Layout, limits: Limits, *, closed: bool) -> Compiled:
    """Return the automaton of the values that a schema allows, in some notation.

    Raises:
      ConstraintError, LimitError: as `json_schema`.
    """
    document = Document(schema)
    strings: dict[Any, DFA] = {}
    ladder = list(_LADDER if limits.states > DEFAULT_STATES else _LADDER[1:])
    while True:
        cuts = ladder.pop(0)
        try:
            reader = Alternatives(document, cuts.recursion, limits)
            writer = Writer(reader, layout, cuts, closed, limits, strings)
            found = _compiled(reader, writer, cuts, limits)
            break
        except LimitError as error:
            if not ladder or limits.used() > 1:
                reason = f"JSON Schema, at the root: {error}"
                raise LimitError(reason, keyword="", pointer="") from None
            if limits.used() > _LAST_RUNG:
                ladder = ladder[-1:]
    if is_empty(found.dfa):
        raise document.root.refuse("", "no value is valid, or none that is not nested too deep")
    return found


def _compiled(reader: Alternatives, writer: Writer, cuts: Cuts, limits: Limits) -> Compiled:
    net = Net(limits)
    start = net.state()
    end = writer.value(net, start, [reader.document.root])
    dfa = determinise(net, start, end)
    return Compiled(dfa, tuple(_notes(reader, writer, cuts)))


def _notes(reader: Alternatives, writer: Writer, cuts: Cuts) -> list[str]:
    notes = []
    if writer.notes.pop("values of any type", 0) is None:
        notes.append(
            f"values of any type hold {cuts.depth} levels of objects and lists at most; "
            '"additionalProperties": false in a schema leaves out keys with such values'
        )
    if reader.cuts:
        named = ", ".join(sorted(pointer or "#" for pointer in reader.cuts))
        notes.append(f"{named} is followed {cuts.recursion} times within itself at most")
    for name, pointer in reader.ignored.items():
        notes.append(f"{name} at {pointer or 'the root'} is not checked")
    return notes + list(writer.notes)
