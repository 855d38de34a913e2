"""JSON Schemas of Python types: pydantic's models, dataclasses, and what they are made of."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import sys
import types
import typing
import uuid
from typing import Any

from ..errors import ConstraintError

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
    Any: {},
    datetime.date: {"type": "string", "format": "date"},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.time: {"type": "string", "format": "time"},
    uuid.UUID: {"type": "string", "format": "uuid"},
}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a Python type. Where the program uses pydantic, that reads it, else
    dataclasses and the plain types of the standard library are read here.

    Raises:
      ConstraintError: if a type in it has no JSON Schema.
    """
    pydantic: Any = sys.modules.get("pydantic")  # who has a model has imported it
    if pydantic is None:
        return plain_schema_of(kind)
    wrong = (pydantic.PydanticUserError, pydantic.errors.PydanticInvalidForJsonSchema)
    try:
        return pydantic.TypeAdapter(kind).json_schema()
    except wrong as error:
        raise ConstraintError(f"{_name(kind)} has no JSON Schema: {error}") from error


def plain_schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type without pydantic."""
    definitions: dict[str, Any] = {}
    found = _schema(kind, definitions)
    return {**found, "$defs": definitions} if definitions else found


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(each, definitions) for each in arguments]}
    if origin is typing.Annotated:
        return _schema(arguments[0], definitions)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if kind in (list, dict) or origin in (list, dict):
        if (origin or kind) is list:
            items = {"items": _schema(arguments[0], definitions)} if arguments else {}
            return {"type": "array", **items}
        if arguments and arguments[0] is not str:
            raise ConstraintError(f"{kind} has no JSON Schema: keys must be str")
        values = {"additionalProperties": _schema(arguments[1], definitions)} if arguments else {}
        return {"type": "object", **values}
    if origin is tuple and Ellipsis not in arguments:
        first = [_schema(each, definitions) for each in arguments]
        return {"type": "array", "prefixItems": first, "minItems": len(first), "items": False}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, definitions)
    raise ConstraintError(
        f"{_name(kind)} has no JSON Schema; use a dataclass, an Enum, Literal, list, dict, str, "
        "int, float, bool or None, or install pydantic"
    )


def _dataclass(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # it may refer to itself
        hints = typing.get_type_hints(kind, include_extras=True)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        nothing = dataclasses.MISSING
        definitions[name] = {
            "type": "object",
            "properties": {f.name: _schema(hints[f.name], definitions) for f in fields},
            "required": [
                f.name for f in fields if f.default is nothing and f.default_factory is nothing
            ],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or repr(kind)
