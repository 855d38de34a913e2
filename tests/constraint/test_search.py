"""Expressions of a schema are searched for in a time that grows with the text alone."""

from __future__ import annotations

import json
import re
import time

import pytest

from mlx_diffgemma import Constraint
from mlx_diffgemma.constraint.dialect import validator_of
from mlx_diffgemma.constraint.search import is_found
from mlx_diffgemma.errors import ConstraintError

LONG = 40  # Python's re would take 2^40 steps
SLOW = "^(a+)+$"


@pytest.mark.parametrize("pattern", ["a", "^a", "a$", "^a*b?$", "[0-9]{2}", r"\d", "(ab|ba)+", ""])
@pytest.mark.parametrize("text", ["", "a", "ab", "ba", "x7", "42", "aab\nb", "ü", "٣"])
def test_it_finds_what_re_finds(pattern, text):
    assert is_found(pattern, text) == bool(re.search(pattern, text))


def quickly(act):
    start = time.thread_time()
    result = act()
    assert time.thread_time() - start < 5
    return result


def test_a_key_or_value_that_re_would_never_finish_is_checked_at_once():
    wrong = "a" * LONG + "!"
    keys = {"properties": {wrong: {"type": "integer"}}, "additionalProperties": False}
    named = {"type": "object", **keys, "patternProperties": {SLOW: {"type": "string"}}}
    constraint = quickly(lambda: Constraint.json_schema(named))
    assert constraint.accepts(json.dumps({wrong: 1})) and constraint.accepts('{"aa": "x"}')
    assert not constraint.accepts('{"aa": 1}')
    listed = quickly(lambda: Constraint.json_schema({"enum": [wrong, "aa"], "pattern": SLOW}))
    assert listed.accepts('"aa"') and not listed.accepts(json.dumps(wrong))


def test_an_answer_that_re_would_never_finish_is_checked_at_once():
    schema = {
        "type": "string",
        "oneOf": [{"pattern": "^(a+)+b$"}, {"pattern": f"^a{{{LONG}}}$"}],
    }
    constraint = Constraint.json_schema(schema)
    assert quickly(lambda: constraint.parse(f'"{"a" * LONG}"')) == "a" * LONG


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"pattern": "^a+$"}, ["a", 3], ["b", ""]),
        ({"patternProperties": {"^a": {"type": "integer"}}}, [{"a": 1, "b": "x"}], [{"ab": "x"}]),
        (
            {
                "properties": {"b": {}},
                "patternProperties": {"^a": {}},
                "additionalProperties": False,
            },
            [{"a": 1, "b": 2}, {}],
            [{"c": 1}],
        ),
        ({"additionalProperties": {"type": "integer"}}, [{"a": 1}, 3], [{"a": "x"}]),
    ],
)
def test_the_validator_decides_as_before(schema, right, wrong):
    import jsonschema

    plain, ours = jsonschema.Draft202012Validator(schema), validator_of(schema)
    for value in right:
        assert plain.is_valid(value) and ours.is_valid(value)
    for value in wrong:
        assert not plain.is_valid(value) and not ours.is_valid(value)


def test_an_expression_that_is_not_supported_is_an_error():
    with pytest.raises(ConstraintError):
        is_found("(?=a)b", "ab")
