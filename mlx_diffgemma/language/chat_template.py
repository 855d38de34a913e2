"""Rendering of chat templates, as transformers renders them.

A template is a program of a stranger, so it runs in jinja2's sandbox and gets plain data only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Never

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_SCALARS = (str, int, float, bool, type(None))
# Names of a message's thought. Templates read the first one, or the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def is_plain(value: Any) -> bool:
    """Return whether a value is as JSON gives it. Of other values transformers knows what a
    template may see."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is dict:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    return kind in (list, tuple) and all(map(is_plain, value))


def render(template: str, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
    """Return the text that a template makes of messages, all of it plain data.

    Raises:
      jinja2.TemplateError: if the template is wrong or refuses the messages; it may raise other
        errors too.
    """
    shown = [_completed(message) for message in messages]
    return _compiled(template).render(messages=shown, **variables)


def _completed(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without keys that say nothing, and its thought under the known names."""
    given = {key: value for key, value in message.items() if value is not None}
    thought = next((given[name] for name in _THOUGHTS if name in given), None)
    if thought is None:
        return given
    return {"thinking": thought, **given, "reasoning_content": thought}


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _json_text
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Variables,
    }
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`: what the model wrote in a chat. It is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], content).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the methods of a class."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Variables(Namespace):
    """`namespace` without names of Python's own."""

    def __init__(*given: Any, **named: Any) -> None:  # `self` may be a name too
        own, *items = given
        values = dict(*items, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            "Chat templates cannot store underscore-prefixed attributes on a namespace, but got "
            f"{name!r}. Please rename the attribute."
        )


def _json_text(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON in which no character of HTML is escaped, as jinja2's own filter would."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: Any) -> Never:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
