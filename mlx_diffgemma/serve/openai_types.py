"""Objects of OpenAI's dialect that its routes share. The specification is the `openai` package:
`openai/types/chat`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from ..config.serving import Limits
from .body import Fields, Many, refuse
from .errors import ApiError, openai_form, refused
from .images import Piece, check_images, image_part, joined
from .limits import check_length
from .runs import Answers, Usage, Written
from .sse import frame
from .structured import ConstraintField, Tool

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")]
# A function that was called: a model may write a name that no tool has, and clients send it back.
CalledName = Annotated[str, Field(pattern=r"^[^\s{}\x00]+$")]
Count = Annotated[int, Field(ge=1, le=2**31)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
# Parts of a message that cannot be read -> why.
_MEDIA = {
    "input_audio": "this model reads no audio",
    "file": "files are not read; put their text into the message",
}


class ImageUrl(Fields):
    """Where an image is; `detail` is ignored."""

    url: str


class Part(Fields):
    """A part of a message."""

    type: str
    image_url: ImageUrl | str | None = None
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Fields):
    """The function of a call."""

    name: CalledName
    arguments: str | dict[str, Any] = "{}"


class Call(Fields):
    """A call in an assistant's message."""

    id: str = ""
    type: str = "function"
    function: CalledFunction | None = None


class Message(Fields):
    """A message of any role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[Part] | None = None
    tool_calls: Many[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None
    audio: Any = None


class Function(Fields):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(Fields):
    """A tool."""

    type: str = "function"
    function: Function | None = None


class FunctionName(Fields):
    """The function that must be called."""

    name: Name


class ToolChoice(Fields):
    """A tool that must be called."""

    type: str
    function: FunctionName | None = None


class JsonSchema(Fields):
    """A schema with its name."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Fields):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class Common(Fields):
    """Fields of all requests for text."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    stop: str | Many[str] | None = None
    temperature: Temperature | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusing: bool | None = None  # stream drafts, each in place of the one before
    constraint: ConstraintField | None = None
    # Known fields that cannot be honoured.
    logprobs: Any = None
    top_p: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None

    def refuse_unsupported(self) -> None:
        """Refuse fields that cannot be honoured, unless they ask for nothing.

        Raises:
          ApiError: names the field.
        """
        draws = "tokens are not drawn one by one"
        refuse(self.logprobs, (False, 0), "logprobs", "a canvas has no true log-probabilities")
        refuse(self.top_p, (1, 1.0), "top_p", f"{draws}; use temperature")
        refuse(self.logit_bias, ({},), "logit_bias", draws)
        refuse(self.frequency_penalty, (0, 0.0), "frequency_penalty", draws)
        refuse(self.presence_penalty, (0, 0.0), "presence_penalty", draws)
        if self.diffusing and not self.stream:
            raise refused("diffusing", "drafts need stream")

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def messages_of(given: list[Message], limits: Limits) -> list[dict[str, Any]]:
    """Return messages as the chat template reads them.

    Raises:
      ApiError: names the message and the field that cannot be used.
    """
    check_length(given, limits.max_messages, "messages")
    if not given:
        raise ApiError(400, "messages is empty", param="messages")
    messages = [_message(message, f"messages[{i}]", limits) for i, message in enumerate(given)]
    check_images(messages, limits, "messages")
    return messages


def _message(given: Message, param: str, limits: Limits) -> dict[str, Any]:
    refuse(given.function_call, (), f"{param}.function_call", "use tool_calls")
    refuse(given.audio, (), f"{param}.audio", _MEDIA["input_audio"])
    role = "system" if given.role == "developer" else given.role
    made: dict[str, Any] = {"role": role, "content": _content(given, param, limits)}
    if given.tool_calls:
        check_length(given.tool_calls, limits.max_parts, f"{param}.tool_calls")
        if role != "assistant":
            raise ApiError(
                400,
                f"{param}.tool_calls: only an assistant calls tools",
                param=f"{param}.tool_calls",
            )
        made["tool_calls"] = [
            _call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(given.tool_calls)
        ]
        if thought := given.reasoning_content or given.reasoning:
            made["reasoning"] = thought
    if role == "tool":
        if given.tool_call_id is None:
            raise ApiError(400, f"{param}.tool_call_id is missing", param=f"{param}.tool_call_id")
        made["tool_call_id"] = given.tool_call_id
    return made


def _content(given: Message, param: str, limits: Limits) -> str | list[dict[str, Any]]:
    content = given.content
    if content is None or isinstance(content, str):
        return content or ""
    check_length(content, limits.max_parts, f"{param}.content")
    pieces: list[Piece] = []
    for number, part in enumerate(content):
        where = f"{param}.content[{number}]"
        if part.type in _MEDIA:
            raise refused(where, f"{part.type}: {_MEDIA[part.type]}")
        if part.type == "image_url" and given.role == "user":
            url = part.image_url
            found = url.url if isinstance(url, ImageUrl) else url
            pieces.append(image_part(found, f"{where}.image_url", limits))
            continue
        if part.type == "image_url":
            raise refused(where, "image_url: images are read in the user's messages")
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal") or text is None:
            raise ApiError(
                400,
                f"{where}: a part has type text and a text, or image_url, got {part.type[:50]!r}",
                param=where,
            )
        pieces.append(text)
    return joined(pieces, "")


def _call(call: Call, param: str) -> dict[str, Any]:
    if call.type != "function" or call.function is None:
        raise refused(param, "a call must be of type function")
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            where = f"{param}.function.arguments"
            raise ApiError(400, f"{where} is not the text of a JSON object", param=where)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def tools_of(given: list[ToolField] | None, param: str = "tools") -> list[Tool]:
    """Return a request's tools.

    Raises:
      ApiError: for a tool that is no function.
    """
    tools = []
    for number, each in enumerate(given or []):
        if each.type != "function" or each.function is None:
            raise refused(f"{param}[{number}]", "a tool must be of type function")
        function = each.function
        tools.append(
            Tool(
                name=function.name,
                description=function.description or "",
                parameters=function.parameters,
                strict=bool(function.strict),
            )
        )
    return tools


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "diffusion": usage.diffusion(),
    }


class OpenAiWire:
    """What the streams of OpenAI's dialects share: the fields of every chunk, and the end."""

    def __init__(self, answers: Answers, prefix: str, kind: str, *, with_usage: bool) -> None:
        """Begin a stream.

        Args:
          answers: that are streamed.
          prefix: of the stream's id.
          kind: the `object` of its chunks.
          with_usage: whether a chunk tells the usage.
        """
        self._with_usage, self._drafts = with_usage, answers.asked.drafts
        self._head = {
            "id": new_id(prefix),
            "object": kind,
            "created": int(time.time()),
            "model": answers.served.name,
        }
        self._written = [Written() for _ in range(answers.asked.count)]

    def end(self, usage: Usage) -> Iterator[bytes]:
        if self._with_usage:
            yield frame({**self._head, "choices": [], "usage": usage_of(usage)})
        yield frame("[DONE]")

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield frame(openai_form(error))

    def _choices(self, choice: dict[str, Any]) -> bytes:
        return frame({**self._head, "choices": [choice]})


def new_id(prefix: str) -> str:
    """Return an id that no other object has."""
    return f"{prefix}{secrets.token_hex(12)}"
