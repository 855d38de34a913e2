"""Constraints of requests: JSON Schemas, tool calls, choices and expressions, compiled within the
server's bounds, in a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..constraint.constraint import Constraint
from .body import Fields, Many
from .errors import ApiError
from .limits import check_length, check_schema
from .runs import beside
from .state import State


class ConstraintField(Fields):
    """The extension field `constraint`; one of its fields is given."""

    choices: Many[str] | None = None
    regex: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool of any dialect."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def declaration(self) -> dict[str, Any]:
        """Return it in the form of `PromptOptions.tools`."""
        parameters = {"type": "object", "properties": {}, **(self.parameters or {})}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """What a request's tools and format mean: what the prompt shows, and what the answer must
    be."""

    shown: tuple[dict[str, Any], ...] = ()
    constraint: Constraint | None = None
    one_call: bool = False


async def json_schema(state: State, schema: Any, param: str) -> Constraint:
    """Return the constraint to a JSON Schema.

    Raises:
      ApiError: 400 if it is too large, or cannot be held: the message names the keyword.
    """
    check_schema(state.limits, schema, param)
    return await _compiled(state, lambda: Constraint.json_schema(schema, **_bounds(state)), param)


async def json_object(state: State, param: str) -> Constraint:
    """Return the constraint to any JSON object."""
    return await json_schema(state, {"type": "object"}, param)


async def extension(state: State, field: ConstraintField, param: str = "constraint") -> Constraint:
    """Return the constraint of the extension field.

    Raises:
      ApiError: 400 as `json_schema`.
    """
    if (field.choices is None) == (field.regex is None):
        raise ApiError(400, f"{param} needs either choices or regex", param=param)
    bounds = _bounds(state)
    if field.regex is not None:
        pattern = field.regex
        check_schema(state.limits, pattern, f"{param}.regex")
        return await _compiled(state, lambda: Constraint.regex(pattern, **bounds), f"{param}.regex")
    choices = field.choices
    assert choices is not None
    check_schema(state.limits, choices, f"{param}.choices")
    return await _compiled(state, lambda: Constraint.choices(choices, **bounds), f"{param}.choices")


async def tool_plan(
    state: State,
    tools: Sequence[Tool],
    mode: Literal["none", "auto", "required"],
    *,
    only: str | None = None,
    parallel: bool = True,
    answer: Constraint | None = None,
    param: str = "tools",
) -> ToolPlan:
    """Return what a request's tools mean.

    Args:
      state: of the server.
      tools: all of them.
      mode: whether the model may call, or must.
      only: the name of the tool that it must call; the mode is then "required".
      parallel: whether there may be several calls.
      answer: what the answer must be where it is no call.
      param: the field of the tools, for errors.

    Raises:
      ApiError: 400 if there are too many, two share a name, or parameters cannot be held.
    """
    check_length(tools, state.limits.max_tools, param)
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ApiError(400, f"two tools have one name: {', '.join(twice)}", param=param)
    if only is not None and only not in names:
        raise ApiError(400, f"tool_choice names {only!r}, which is not in {param}", param=param)
    if mode == "required" and not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param=param)
    if mode == "none" or not tools:
        return ToolPlan(constraint=answer)
    for number, tool in enumerate(tools):
        check_schema(state.limits, tool.parameters or {}, f"{param}[{number}]")
    shown = tuple(tool.declaration() for tool in tools)
    if mode == "auto" and answer is None and not any(tool.strict for tool in tools):
        return ToolPlan(shown=shown, one_call=not parallel)
    callable_ = [d for d in shown if only in (None, d["function"]["name"])]
    most = None if parallel and only is None else 1

    def compile_() -> Constraint:
        required = mode == "required"
        text = None if required else answer
        return Constraint.tool_call(
            callable_, required=required, most=most, answer=text, **_bounds(state)
        )

    return ToolPlan(shown=shown, constraint=await _compiled(state, compile_, param))


async def _compiled(state: State, work: Callable[[], Constraint], param: str) -> Constraint:
    return await beside(state, work, param, compiles=True)


def _bounds(state: State) -> dict[str, Any]:
    limits = state.limits
    return {"states": limits.max_schema_states, "seconds": limits.schema_seconds}
