"""Errors as clients see them: a status, and an object in the form of the request's dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import (
    ConstraintError,
    DiffGemmaError,
    EngineClosedError,
    EngineFailedError,
    PromptLengthError,
    QueueFullError,
)

_RETRY_SECONDS = 2
_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
FAILED = "the server failed; its log says how"
TOO_LONG = "context_length_exceeded"  # the code of a prompt that is too long; clients know it


class ApiError(Exception):
    """A request that is refused, or an answer that fails.

    Attributes:
      status: of HTTP.
      message: one line for the client.
      param: the field that is wrong, such as `messages[0].content`.
      code: a word for programs, such as `model_not_found`.
      headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


def refused(param: str, why: str) -> ApiError:
    """Return the error of a known field that cannot be honoured."""
    return ApiError(400, f"{param} is not supported: {why}", param=param, code="unsupported")


def busy(message: str) -> ApiError:
    """Return the error of a server that loads its model, or ends."""
    return ApiError(503, message, code="unavailable", headers=_retry())


def from_error(error: Exception, param: str | None = None) -> ApiError:
    """Return what a client is told of an error; a bug says nothing of itself.

    Args:
      error: any.
      param: the field that it comes from, if that is known.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers=_retry())
    if isinstance(error, EngineClosedError):
        return busy("the server ends")
    if isinstance(error, EngineFailedError) or not isinstance(error, DiffGemmaError):
        return ApiError(500, FAILED, code="internal_error")
    codes = {ConstraintError: "constraint", PromptLengthError: TOO_LONG}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), None)
    message = str(error) if param is None else f"{param}: {error}"
    return ApiError(400, message, param=param, code=code)


def openai_form(error: ApiError) -> dict[str, Any]:
    """Return the object of an error in OpenAI's dialect."""
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error")
    return {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    }


def anthropic_form(error: ApiError) -> dict[str, Any]:
    """Return the object of an error in Anthropic's dialect."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    message = error.message
    if error.code == TOO_LONG:  # clients know these words, and shorten the conversation
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


# Beginning of a path -> the form of its errors; all others have OpenAI's.
FORMS: dict[str, Callable[[ApiError], dict[str, Any]]] = {"/v1/messages": anthropic_form}


def form_of(path: str) -> Callable[[ApiError], dict[str, Any]]:
    """Return the form of a path's errors."""
    return next((form for start, form in FORMS.items() if path.startswith(start)), openai_form)


def _retry() -> dict[str, str]:
    return {"Retry-After": str(_RETRY_SECONDS)}
