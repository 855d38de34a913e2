"""Schemas and instances for the tests of JSON Schema, and strings drawn from automata."""

from __future__ import annotations

from random import Random

import numpy as np

from mlx_diffgemma.constraint.dfa import DFA, NOWHERE, SPECIAL

INSTANCES = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 10, 15, 100, 1.5, -0.5, 99.99, 1e30),
    *("", "a", "b", "ab", "abc", "A", "aé", "😀", 'q"\\/\n', "x-1", "1", "12", "2024-02-29"),
    *("2023-02-29", "2024-02-29T10:00:00Z", "10:00:00Z", "a@b.co", "1.2.3.4", "::1", "no format"),
    *("c56a4180-65aa-42ec-a945-5fd21dec0538", "https://a.b/c?d#e", "0000-01-01"),
    *([], [1], [1, 2], [1, 1], [1, 2, 3], ["a"], ["a", "b"], ["b", "a"], ["a", "a"], [1, "a"]),
    *([True], [[]], [{}], ["a", 1], ["a", 1, None], [None], [5, 1], [{"a": 1}]),
    *({}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": "x"}, {"c": 1}),
    *({"a": 1, "c": 1}, {"a": 1, "b": 2, "c": 3}, {"x1": 1}, {"x1": "a"}, {"a": {"a": 1}}),
    *({"a": {"a": {"a": {}}}}, {"a": None}, {"b": "x", "c": True}, {"a": [1]}, {"é": 1}),
    *({"kind": "p", "v": 1}, {"kind": "q", "v": "x"}, {"kind": "p", "v": "x"}, {"kind": "q"}),
)

SCHEMAS = (
    True,
    {},
    *({"type": name} for name in ("null", "boolean", "integer", "number", "string", "array")),
    {"type": "object"},
    {"type": ["integer", "null"]},
    {"enum": [1, "a", None, [1], {"a": 1}, True]},
    {"enum": [1, "a", "abc"], "type": "string", "minLength": 2},
    {"const": {"a": [1]}},
    {"type": "number", "minimum": 1, "exclusiveMaximum": 10},
    {"type": "integer", "exclusiveMinimum": -1, "maximum": 15, "multipleOf": 5},
    {"minimum": 2.5},
    {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 5, "exclusiveMaximum": True},
    {"minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": "b"},
    {"type": "string", "pattern": "^a.?$"},
    {"type": "string", "pattern": r"^[^\d]+$", "maxLength": 3},
    *({"type": "string", "format": f} for f in ("date", "date-time", "time", "email", "ipv4")),
    *({"type": "string", "format": f} for f in ("ipv6", "uuid")),
    {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
    {"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"patternProperties": {"^x": {"type": "integer"}, "1$": {"minimum": 1}}},
    {"type": "object", "propertyNames": {"pattern": "^[ab]$"}},
    {"type": "object", "maxProperties": 1},
    {"type": "object", "minProperties": 1, "required": ["a"], "maxProperties": 2},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    {"prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    {"type": "array", "prefixItems": [{"type": "string"}], "minItems": 2},
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "items": [{"type": "string"}],
        "additionalItems": {"type": "integer"},
    },
    {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    {"type": "array", "contains": {"type": "string"}},
    {"type": "array", "contains": {"const": 1}, "maxItems": 2, "items": {"type": "integer"}},
    {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["b"]}], "type": "object"},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
    {"oneOf": [{"type": "integer", "minimum": 2}, {"type": "integer", "maximum": 5}]},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
    {
        "oneOf": [
            {"properties": {"kind": {"const": "p"}, "v": {"type": "integer"}}},
            {"properties": {"kind": {"const": "q"}, "v": {"type": "string"}}},
        ],
        "required": ["kind"],
        "type": "object",
    },
    {"oneOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"},
    {
        "type": "object",
        "oneOf": [
            {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
            {
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        ],
    },
    {"not": {"type": "integer"}},
    {"not": {"type": ["object", "array", "number"]}, "enum": ["a", 1, None]},
    {"type": "string", "not": {"enum": ["a", "abc"]}},
    {"type": "string", "not": {"pattern": "b"}},
    {"type": "object", "not": {"required": ["a", "b"]}},
    {"type": "object", "not": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"type": "array", "not": {"items": {"type": "integer"}}},
    {"type": "array", "not": {"contains": {"type": "integer"}}},
    {
        "not": {
            "anyOf": [
                {"type": "string", "maxLength": 1},
                {"type": "number", "minimum": 3},
                {"type": "array", "minItems": 1},
                {"type": "object", "minProperties": 1},
            ]
        }
    },
    {"not": {"allOf": [{"type": "string"}, {"minLength": 2}]}, "type": ["string", "null"]},
    {"not": {"oneOf": [{"minimum": 2}, {"maximum": 5}]}, "type": "integer"},
    {"not": {"not": {"type": "string"}}},
    {"oneOf": [{"type": "boolean"}, {"not": {"enum": [1, 0, [1]]}, "type": "boolean"}, {}]},
    {
        "type": "object",
        "properties": {"": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    },
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}},
    {"oneOf": [{"const": 1}, {"enum": [1, 2]}]},
    {"anyOf": [{"required": ["a"]}, {"properties": {"a": False}}], "type": "object"},
    {"if": {"type": "integer"}, "then": {"minimum": 5}, "else": {"type": "string"}},
    {
        "type": "object",
        "properties": {"kind": {"enum": ["p", "q"]}, "v": {}},
        "if": {"properties": {"kind": {"const": "p"}}, "required": ["kind"]},
        "then": {"properties": {"v": {"type": "integer"}}},
        "else": {"properties": {"v": {"type": "string"}}},
    },
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "dependencies": {"a": ["b"], "b": {"required": ["c"]}},
    },
    {"properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False, "type": "object"},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"a": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "integer"}]}},
                "additionalProperties": False,
            }
        },
    },
    {"properties": {"é": {"type": "integer"}, 'q"': {}}, "type": "object"},
    {"type": "string", "title": "any", "format": "made-up", "x-unknown": 1},
    {"$schema": "http://json-schema.org/draft-04/schema#", "const": 1, "type": "integer"},
)

# Some valid instances are not accepted: keys or items in another order, undeclared keys that may be
# one key twice, and what only two branches together allow.
PARTLY_HELD = (
    {"type": "array", "items": {"enum": [1, 1.0, True]}, "uniqueItems": True},
    {
        "type": "array",
        "prefixItems": [{}],
        "contains": {"type": "string"},
        "unevaluatedItems": False,
    },
    {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2},
    {"type": "array", "items": {"enum": list("abcdefgh")}, "uniqueItems": True, "maxItems": 2},
    {"type": "object", "dependentSchemas": {"a": {"properties": {"b": {"type": "string"}}}}},
    {
        "type": "object",
        "anyOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ],
        "unevaluatedProperties": False,
    },
    {"type": "string", "format": "hostname"},
    {"type": "string", "format": "duration"},
)

REFUSED = (
    ({"type": "string", "pattern": "a(?=b)"}, "pattern", ""),
    ({"properties": {"a/b": {"pattern": r"\bx"}}}, "pattern", "/properties/a~1b"),
    ({"$ref": "https://example.com/x.json"}, "$ref", ""),
    ({"items": {"$ref": "#anchor"}}, "$ref", "/items"),
    ({"items": {"$ref": "#/nowhere"}}, "$ref", "/items"),
    ({"$dynamicRef": "#x"}, "$dynamicRef", ""),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems", ""),
    ({"type": "number", "multipleOf": 0.01}, "multipleOf", ""),
    ({"type": "string", "format": "regex"}, "format", ""),
    ({"type": "object", "minProperties": 2}, "minProperties", ""),
    ({"type": "array", "contains": {}, "maxContains": 2}, "maxContains", ""),
    ({"not": {"patternProperties": {"a": {"type": "null"}}}}, "patternProperties", "/not"),
    ({"not": {"const": 1}, "type": "integer"}, "const", "/not"),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"}, "oneOf", ""),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "$schema", ""),
    ({"type": "text"}, "type", ""),
    ({"properties": {"a": 5}, "required": ["a"], "type": "object"}, "", "/properties/a"),
    ({"required": True}, "required", ""),
    ({"type": "string", "minLength": -1}, "minLength", ""),
    ({"type": "integer", "minimum": 5, "maximum": 2}, "", ""),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "", ""),
    (False, "", ""),
    ({"$ref": "#"}, "", ""),
    ({"anyOf": [{"anyOf": [{}] * 20}] * 20}, "anyOf", ""),
)


class Draws:
    """Draws strings of an automaton: at random at first, then the shortest way to an end."""

    def __init__(self, dfa: DFA) -> None:
        self._dfa = dfa
        far = np.where(dfa.accepting, 0, len(dfa) + 1)
        while True:
            ahead = np.where(dfa.table == NOWHERE, len(dfa) + 1, far[dfa.table]).min(axis=1) + 1
            nearer = np.minimum(far, ahead)
            if (nearer == far).all():
                break
            far = nearer
        self._far = far

    def symbols(self, rng: Random) -> list[int]:
        dfa, state, drawn = self._dfa, 0, []
        steps = rng.choice((5, 30, 150))
        while True:
            columns = np.flatnonzero(dfa.table[state] != NOWHERE)
            is_over = len(drawn) >= steps or rng.random() < 0.2 or not columns.size
            if dfa.accepting[state] and is_over:
                return drawn
            targets = dfa.table[state][columns]
            if len(drawn) >= steps:
                columns = columns[self._far[targets] < self._far[state]]
                targets = dfa.table[state][columns]
            # Each next state is as likely as another, or strings would never end.
            target = rng.choice(np.unique(targets).tolist())
            column = rng.choice(columns[targets == target].tolist())
            low = int(dfa.bounds[column])
            is_last = column + 1 == len(dfa.bounds)
            high = low if is_last else int(dfa.bounds[column + 1]) - 1
            drawn.append(rng.randint(low, high if low >= SPECIAL else min(high, SPECIAL - 1)))
            state = target

    def text(self, rng: Random) -> str:
        return "".join(map(chr, self.symbols(rng)))
