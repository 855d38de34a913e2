"""Choices, free text, templates, and schemas of Python types."""

import dataclasses
import datetime
import enum
import json
import re
from typing import Annotated, Literal

import pytest

from mlx_diffgemma.constraint.parts import choices, free_text, in_a_row
from mlx_diffgemma.constraint.python_types import plain_schema_of, schema_of
from mlx_diffgemma.constraint.regex import regex
from mlx_diffgemma.constraint.schema import json_schema
from mlx_diffgemma.errors import ConstraintError, LimitError


def test_choices_are_these_texts_and_no_other():
    automaton = choices(["yes", "no", "not yet", "😀"])
    assert all(automaton.accepts(text) for text in ("yes", "no", "not yet", "😀"))
    assert not any(automaton.accepts(text) for text in ("", "ye", "not", "nono", "Yes"))


@pytest.mark.parametrize("texts", [[], "yes", ["a", ""], ["a", 1], ["\ud83d"]])
def test_choices_that_are_none_are_refused(texts):
    with pytest.raises(ConstraintError):
        choices(texts)


def test_free_text_counts_characters():
    assert free_text().accepts("") and free_text().accepts("a\n😀" * 50)
    text = free_text(1, 3)
    assert [text.accepts("é" * n) for n in range(5)] == [False, True, True, True, False]
    with pytest.raises(LimitError):
        free_text(0, 100_000)
    with pytest.raises(ConstraintError, match="not possible"):
        free_text(3, 2)


def test_a_template_is_one_automaton():
    value = json_schema({"type": "string", "maxLength": 5}).dfa
    whole = in_a_row(
        [
            '{"vip": ',
            choices(["true", "false"]),
            ', "price": ',
            regex(r"\d+(\.\d+)?"),
            ', "note": ',
            value,
            ', "text": "',
            free_text(0, 4),
            '"}',
        ]
    )
    assert whole.accepts('{"vip": true, "price": 1.5, "note": "a\\n", "text": "x"}')
    assert not whole.accepts('{"vip": true, "price": 1., "note": "a", "text": "x"}')
    assert not whole.accepts('{"vip": maybe, "price": 1, "note": "a", "text": "x"}')
    pair = in_a_row([free_text(), ",", free_text()])
    assert pair.accepts("a,b,c") and not pair.accepts("abc")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Address:
    street: str
    number: int | None = None


@dataclasses.dataclass
class Person:
    name: str
    born: datetime.date
    colour: Colour
    address: Address
    size: Literal["S", "L"] = "S"
    tags: list[str] = dataclasses.field(default_factory=list)
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    point: tuple[int, int] = (0, 0)
    note: Annotated[str, "any"] = ""


PERSON = {
    "name": "A",
    "born": "2000-01-31",
    "colour": "red",
    "address": {"street": "x", "number": None},
    "size": "L",
    "tags": ["a"],
    "scores": {"x": 1.5},
    "point": [1, 2],
    "note": "n",
}


def test_a_pydantic_model_is_a_schema():
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Model", name=(str, ...), age=(int, pydantic.Field(ge=0)))
    automaton = json_schema(schema_of(model)).dfa
    assert automaton.accepts('{"name": "x", "age": 3}')
    assert not automaton.accepts('{"name": "x", "age": -3}')


@pytest.mark.parametrize("read", [schema_of, plain_schema_of])
def test_a_dataclass_is_a_schema(read):
    if read is schema_of:
        pytest.importorskip("pydantic")
    automaton = json_schema(read(Person), states=10_000).dfa
    assert automaton.accepts(json.dumps(PERSON))
    assert automaton.accepts(
        json.dumps({k: PERSON[k] for k in ("name", "born", "colour", "address")})
    )
    for wrong in ({"born": "x"}, {"colour": "green"}, {"size": "M"}, {"point": [1]}, {"tags": [1]}):
        assert not automaton.accepts(json.dumps({**PERSON, **wrong}))
    assert not automaton.accepts(json.dumps({"name": "A"}))


def test_types_without_a_schema_are_refused():
    with pytest.raises(ConstraintError, match="complex has no JSON Schema"):
        plain_schema_of(list[complex])
    with pytest.raises(ConstraintError, match="keys must be str"):
        plain_schema_of(dict[int, str])
    pytest.importorskip("pydantic")
    with pytest.raises(ConstraintError, match="has no JSON Schema"):
        schema_of(re.Match)


def test_a_dataclass_may_refer_to_itself():
    automaton = json_schema(plain_schema_of(Node)).dfa
    assert automaton.accepts('{"value": 1, "children": [{"value": 2}]}')
    assert not automaton.accepts('{"value": 1, "children": [{}]}')


@dataclasses.dataclass
class Node:
    value: int
    children: "list[Node]" = dataclasses.field(default_factory=list)
