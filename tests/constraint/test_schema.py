"""JSON Schemas as automata, both directions, against the `jsonschema` library."""

import json
import tracemalloc
from random import Random

import pytest
import rfc3339_validator  # where it is installed, the library checks date-time

from mlx_diffgemma.constraint.dialect import validator_of
from mlx_diffgemma.constraint.schema import json_schema
from mlx_diffgemma.errors import ConstraintError, LimitError
from tests.constraint.schemas import INSTANCES, PARTLY_HELD, REFUSED, SCHEMAS, Draws

SPELLINGS = ({"separators": (",", ":")}, {"indent": 2})


def shown(schema):
    return json.dumps(schema)[:60]


# What is valid and need not be accepted: deeper than what is held, or another spelling.
NOT_HELD = {
    '{"a": {"a": {"a": {}}}}',
    "1e+30",
}


@pytest.mark.parametrize("schema", SCHEMAS, ids=shown)
def test_accepted_is_what_is_valid(schema):
    automaton, validator = json_schema(schema).dfa, validator_of(schema)
    for value in INSTANCES:
        is_valid = validator.is_valid(value)
        for options in SPELLINGS:
            text = json.dumps(value, ensure_ascii=False, **options)
            accepted = automaton.accepts(text)
            if json.dumps(value) in NOT_HELD:
                assert is_valid or not accepted, text
            else:
                assert accepted == is_valid, (text, is_valid)
        assert not automaton.accepts(json.dumps(value) + " 1")


@pytest.mark.parametrize("schema", PARTLY_HELD, ids=shown)
def test_accepted_is_valid_where_not_all_is_held(schema):
    automaton, validator = json_schema(schema).dfa, validator_of(schema)
    accepted = [value for value in INSTANCES if automaton.accepts(json.dumps(value))]
    assert all(validator.is_valid(value) for value in accepted)
    assert accepted or "format" in schema


@pytest.mark.parametrize("schema", (*SCHEMAS, *PARTLY_HELD), ids=shown)
def test_drawn_strings_are_valid(schema):
    draws, validator = Draws(json_schema(schema).dfa), validator_of(schema)
    rng = Random(shown(schema))
    for _ in range(20):
        text = draws.text(rng)
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize(("schema", "keyword", "pointer"), REFUSED, ids=lambda v: shown(v))
def test_refusals_name_keyword_and_pointer(schema, keyword, pointer):
    with pytest.raises(ConstraintError) as caught:
        json_schema(schema)
    assert (caught.value.keyword, caught.value.pointer) == (keyword, pointer)
    assert (pointer or "the root") in str(caught.value) or isinstance(schema, bool)
    assert "\n" not in str(caught.value)


def test_a_refused_pattern_has_its_position():
    with pytest.raises(ConstraintError, match="character 2") as caught:
        json_schema({"type": "string", "pattern": "a(?=b)"})
    assert caught.value.position == 1


def test_escapes_are_accepted_where_they_cannot_repeat_a_key():
    automaton = json_schema({"type": "object", "properties": {"é": {"type": "string"}}}).dfa
    assert automaton.accepts('{"\\u00e9": "\\u00e9\\ud83d\\ude00\\n"}')
    assert not automaton.accepts('{"\\u00e9": "\\ud83d"}')  # half a character
    assert automaton.accepts('{"a\\/b": 1}')
    assert not automaton.accepts('{"\\u0061": 1}')
    counted = json_schema({"type": "string", "maxLength": 2}).dfa
    assert counted.accepts('"\\n\\""') and not counted.accepts('"\\n\\"a"')
    assert not counted.accepts('"\\u00e9"')


def test_keys_come_in_the_order_of_the_schema_and_once():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["c"]}
    automaton = json_schema(schema).dfa
    assert automaton.accepts('{"b": 1, "a": 1, "c": 1, "z": 1}')
    assert not automaton.accepts('{"a": 1, "b": 1, "c": 1}')
    assert not automaton.accepts('{"b": 1, "b": 1, "c": 1}')
    assert not automaton.accepts('{"b": 1, "c": 1, "a": 1}')


def test_undeclared_keys_that_may_be_one_key_count_once():
    schema = {"type": "object", "properties": {"a": {}}, "minProperties": 2}
    automaton = json_schema(schema).dfa
    assert automaton.accepts('{"a": 1, "z": 1}') and automaton.accepts('{"a": 1, "z": 1, "y": 2}')
    assert not automaton.accepts('{"z": 1, "z": 1}') and not automaton.accepts('{"a": 1}')


@pytest.mark.parametrize(
    ("name", "texts", "others"),
    [
        ("uri", ("https://a.b/c?d#e", "urn:x:y", "mailto:a@b"), ("a", "//a.b", "a b:c", "h:[")),
        ("uri-reference", ("a/b", "//a.b", "#x", "https://a.b"), ("a b", "%4")),
        ("hostname", ("a.b", "a-1.example.com"), ("-a.b", "a..b", "xn--x", "a_b")),
        ("duration", ("P1Y2M", "PT5M", "P3W"), ("P", "P1YT", "1Y", "P1W2D")),
        ("json-pointer", ("", "/a/b~0~1"), ("a", "/~2")),
    ],
)
def test_formats_that_the_library_does_not_know_alone(name, texts, others):
    automaton = json_schema({"type": "string", "format": name}).dfa
    assert all(automaton.accepts(json.dumps(text)) for text in texts)
    assert not any(automaton.accepts(json.dumps(text)) for text in others)


def test_a_closed_object_has_no_key_that_is_not_named():
    schema = {"type": "object", "properties": {"a": {"type": "object"}}}
    automaton = json_schema(schema, closed=True).dfa
    assert automaton.accepts('{"a": {"z": 1}}') and not automaton.accepts('{"a": {}, "z": 1}')
    given = {**schema, "additionalProperties": {"type": "integer"}}
    assert json_schema(given, closed=True).dfa.accepts('{"a": {}, "z": 1}')


def test_layouts_accept_one_spelling():
    value = {"a": [1, {"b": []}], "c": {}}
    schema = {"type": "object", "properties": {"a": {"type": "array"}, "c": {}}}
    compact = json_schema(schema, compact=True).dfa
    assert compact.accepts(json.dumps(value, separators=(",", ":")))
    assert not compact.accepts(json.dumps(value))
    for indent in (2, 4):
        lines = json_schema(schema, indent=indent).dfa
        assert lines.accepts(json.dumps(value, indent=indent))
        assert not lines.accepts(json.dumps(value))
        assert not lines.accepts(json.dumps(value, indent=3))
    with pytest.raises(ConstraintError, match="exclude each other"):
        json_schema(schema, compact=True, indent=2)


def test_what_is_cut_is_noted():
    assert json_schema({"type": "integer"}).notes == ()
    assert "2 levels" in json_schema({}).notes[0]
    small = json_schema({}, states=120)
    assert len(small.dfa) <= 120 and "1 levels" in small.notes[0]
    assert not small.dfa.accepts("[[1]]") and small.dfa.accepts("[1]")
    tree = {"type": "array", "items": {"$ref": "#"}}
    compiled = json_schema(tree)
    assert "followed 1 times" in compiled.notes[0] and compiled.dfa.accepts("[[]]")
    made_up = json_schema({"type": "string", "format": "made-up"})
    assert made_up.notes == ("format 'made-up' at the root is not checked",)
    long = json_schema({"type": "string", "maxLength": 100_000})
    assert "100000 characters have 200" in long.notes[0]
    assert long.dfa.accepts(json.dumps("a" * 200)) and not long.dfa.accepts(json.dumps("a" * 201))


def test_large_schemas_are_refused():
    fixed = {"type": "string", "minLength": 2500, "maxLength": 2500}
    with pytest.raises(LimitError, match="more than 2000 states"):
        json_schema(fixed)
    assert len(json_schema(fixed, states=10_000).dfa) > 2500
    with pytest.raises(LimitError, match="takes longer"):
        json_schema({"properties": {str(i): {} for i in range(300)}}, seconds=0.01)


def test_a_reference_within_a_resource_starts_there():
    schema = {
        "properties": {
            "a": {
                "$id": "https://example.com/inner",
                "$ref": "#/$defs/n",
                "$defs": {"n": {"type": "integer"}},
            },
            "id": {"type": "string"},
        },
        "$defs": {"n": {"type": "string"}},
        "type": "object",
    }
    automaton = json_schema(schema).dfa
    assert automaton.accepts('{"a": 1}') and not automaton.accepts('{"a": "x"}')


def test_numbers_near_an_open_bound_stay_on_their_side_as_floats():
    automaton = json_schema({"type": "number", "exclusiveMaximum": 10}).dfa
    assert automaton.accepts("9.9999999999999")
    assert not automaton.accepts("9." + "9" * 30)  # the float of which is 10
    assert not automaton.accepts("10") and not automaton.accepts("1e5")


def test_the_library_checks_the_formats_that_are_drawn():
    assert rfc3339_validator.validate_rfc3339("2024-02-29T10:00:00Z")
    for name in ("date", "date-time", "time", "email", "ipv4", "ipv6", "uuid"):
        assert not validator_of({"type": "string", "format": name}).is_valid("no format")


def test_memory_stays_small():
    tracemalloc.start()
    json_schema({"properties": {f"key {i}": {"type": "string"} for i in range(60)}})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
