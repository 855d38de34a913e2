"""From the bytes of a request to a checked object."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from ..config.serving import Limits
from .errors import ApiError, refused
from .sse import ClientGoneError

_PARAM_LENGTH = 200
M = TypeVar("M", bound="Fields")
T = TypeVar("T")
# A list whose first wrong entry is the last that is looked at: a million errors take minutes.
Many = Annotated[list[T], Field(fail_fast=True)]


def _texts(value: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(each, str) for each in value.values()):
        raise ValueError("all values must be texts")
    return value


# An object of texts, with one error for all of its values.
Texts = Annotated[dict[str, Any], AfterValidator(_texts)]


class Fields(BaseModel):
    """An object of a dialect. Unknown fields are ignored, and values keep their types: a number is
    no text."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


async def read(request: Request, limits: Limits, kind: type[M]) -> M:
    """Return the checked body of a request.

    Args:
      request: with a JSON object as its body.
      limits: of its size, and of the time it may take.
      kind: the dialect's object.

    Raises:
      ApiError: 400 names the field, 408 if it takes too long, 413 if it is too large.
      ClientGoneError: if the client goes.
    """
    return checked(kind, parsed(await read_bytes(request, limits)))


async def read_bytes(request: Request, limits: Limits) -> bytes:
    """Return a request's body; see `read`."""
    most, end = limits.max_body_bytes, time.monotonic() + limits.body_seconds
    told = request.headers.get("content-length", "0")
    too_large = ApiError(
        413, f"the body is larger than {limits.max_body_mb:g} MB", code="request_too_large"
    )
    if len(told) > 15 or (told.isdecimal() and int(told) > most):
        raise too_large
    content = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), end - time.monotonic())
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {limits.body_seconds:g} s", code="slow_body"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        content += message.get("body", b"")
        if len(content) > most:
            raise too_large
        if not message.get("more_body"):
            return bytes(content)


def parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
      ApiError: if it is none: not UTF-8, not JSON, nested too deep, a number without end.
    """
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(
            400, f"the body must be a JSON object, got {_kind(value)}", code="invalid_json"
        )
    return value


def checked(kind: type[M], value: Any) -> M:
    """Return a dialect's object.

    Raises:
      ApiError: 400 names the first field that is wrong.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _field(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        raise ApiError(400, f"{param or 'the body'}: {message}", param=param) from None


def refuse(value: Any, harmless: tuple[Any, ...], param: str, why: str) -> None:
    """Refuse a known field that cannot be honoured, unless its value asks for nothing.

    Raises:
      ApiError: names the field.
    """
    if value is not None and not any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless
    ):
        raise refused(param, why)


def _field(place: tuple[int | str, ...]) -> str | None:
    """Return the name of a place, such as `messages[0].content`."""
    name = ""
    for step in place:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float", "bool", "none", "dict"):
            name += f".{step}" if name else step
        else:  # a name of pydantic's for one of several types
            break
    return name[:_PARAM_LENGTH] or None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return {str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
