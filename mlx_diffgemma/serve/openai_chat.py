"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..constraint.constraint import Constraint
from ..events import Finished, Text, ToolCall
from ..language.prompt import PromptOptions
from .body import Fields, Many, read, refuse
from .errors import ApiError, refused
from .fetch import fetch_images
from .limits import check_choices, check_stops
from .openai_types import (
    Common,
    Count,
    Message,
    OpenAiWire,
    ResponseFormat,
    ToolChoice,
    ToolField,
    messages_of,
    new_id,
    tools_of,
    usage_of,
)
from .pieces import Draft, Piece
from .runs import Answers, Asked, Asking, Written, settings_of, start
from .sse import EVENTS, Stream, answer, attended, frame
from .state import State
from .structured import ToolPlan, extension, json_object, json_schema, tool_plan


class TemplateOptions(Fields):
    """Variables of the chat template that a request may set."""

    enable_thinking: bool | None = None


class ChatRequest(Common):
    """The body of a request."""

    messages: Many[Message]
    max_completion_tokens: Count | None = None
    n_predict: Annotated[int, Field(ge=-1, le=2**31)] | None = None  # llama.cpp's; 0 warms up
    tools: Many[ToolField] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None
    # Known fields that cannot be honoured.
    top_logprobs: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most, under any of their names; None leaves it to the server."""
        told = self.n_predict if self.n_predict is not None and self.n_predict > 0 else None
        return self.max_completion_tokens or self.max_tokens or told

    @property
    def thinking(self) -> bool | None:
        """Whether the model thinks; None leaves it to the server."""
        if self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        if self.reasoning_effort is not None:
            return self.reasoning_effort not in ("none", "minimal")
        return None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        refuse(self.top_logprobs, (0,), "top_logprobs", "a canvas has no true log-probabilities")
        refuse(self.functions, ([],), "functions", "use tools")
        refuse(self.function_call, ("none", "auto"), "function_call", "use tool_choice")
        refuse(self.modalities, (["text"],), "modalities", "answers are text")
        refuse(self.audio, (), "audio", "answers are text")
        refuse(self.web_search_options, (), "web_search_options", "the server searches nothing")


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""

    async def create(request: Request) -> Response:
        body = await read(request, state.limits, ChatRequest)
        return await respond(state, request, body, asked_of(state, body))

    paths = ("/v1/chat/completions", "/chat/completions")
    return [Route(path, create, methods=["POST"]) for path in paths]


async def respond(
    state: State, request: Request, body: ChatRequest, asking: Awaitable[Asking]
) -> Response:
    """Answer a chat request.

    Args:
      state: of the server.
      request: the one that is answered.
      body: of it.
      asking: checks it.

    Raises:
      ApiError: names what is wrong with it.
    """
    asked = await attended(request.receive, asking)
    options = body.stream_options
    with_usage = bool(options and options.include_usage)
    if body.n_predict == 0:  # the prompt that follows will go on differently
        made = _nothing(state.model(body.model).name)
        if not body.stream:
            return JSONResponse(made)
        return Response(b"".join(_chunks(made, with_usage)), headers=EVENTS)
    if not body.stream:
        return await answer(request, start(state, asked), completion)
    return Stream(
        request,
        start(state, asked),
        lambda answers: ChatWire(answers, with_usage=with_usage),
    )


async def asked_of(state: State, body: ChatRequest) -> Asked:
    """Return a checked request; its constraint is compiled.

    Raises:
      ApiError: names what is wrong with it.
    """
    state.model(body.model)
    body.refuse_unsupported()
    limits = state.limits
    check_choices(limits, body.n or 1)
    stop = check_stops(limits, body.stops)
    messages = messages_of(body.messages, limits)
    plan = await _tools(state, body, await _form(state, body))
    await fetch_images(messages, limits, "messages")
    if plan.constraint is not None and stop:
        raise refused("stop", "not together with response_format, constraint or required tools")
    return Asked(
        prompt=messages,
        model=body.model,
        options=PromptOptions(
            thinking=state.thinking if body.thinking is None else body.thinking,
            tools=plan.shown,
            images=state.images,
        ),
        settings=settings_of(
            state,
            max_tokens=body.most_tokens,
            temperature=body.temperature,
            seed=body.seed,
        ),
        stop=stop,
        constraint=plan.constraint,
        count=body.n or 1,
        drafts=bool(body.diffusing),
        one_call=plan.one_call,
    )


async def _tools(state: State, body: ChatRequest, form: Constraint | None) -> ToolPlan:
    tools, choice, only = tools_of(body.tools), body.tool_choice or "auto", None
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, ToolChoice):
        if choice.type != "function" or choice.function is None:
            raise refused("tool_choice", "it is none, auto, required, or a function")
        only = choice.function.name
    mode = "required" if isinstance(choice, ToolChoice) else choice
    return await tool_plan(state, tools, mode, only=only, parallel=parallel, answer=form)


async def _form(state: State, body: ChatRequest) -> Constraint | None:
    """Return what the answer must be where it is no call."""
    form = body.response_format
    if body.constraint is not None:
        if form is not None and form.type != "text":
            raise refused("constraint", "not together with response_format")
        return await extension(state, body.constraint)
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return await json_object(state, "response_format")
    if form.json_schema is None:
        raise ApiError(
            400, "response_format.json_schema is missing", param="response_format.json_schema"
        )
    schema = form.json_schema.schema_
    param = "response_format.json_schema.schema"
    return await json_schema(state, {"type": "object"} if schema is None else schema, param)


def completion(written: list[Written], answers: Answers) -> dict[str, Any]:
    """Return the object of whole answers."""
    choices = [
        _choice(index, _message(each), each.finish_reason) for index, each in enumerate(written)
    ]
    return _object(answers.served.name, choices, usage_of(answers.usage))


def _nothing(model: str) -> dict[str, Any]:
    """Return the object of an answer of no tokens."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return _object(model, [_choice(0, _message(Written()), "length")], usage)


def _chunks(made: dict[str, Any], with_usage: bool) -> Iterator[bytes]:
    """Yield the object of an answer of no tokens as a stream."""
    head = {**made, "object": "chat.completion.chunk"}
    usage = head.pop("usage")
    deltas: tuple[dict[str, str], ...] = ({"role": "assistant", "content": ""}, {})
    for delta, reason in zip(deltas, (None, "length"), strict=True):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        yield frame({**head, "choices": [choice]})
    if with_usage:
        yield frame({**head, "choices": [], "usage": usage})
    yield frame("[DONE]")


def _object(model: str, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def _choice(index: int, message: dict[str, Any], reason: str) -> dict[str, Any]:
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def _message(written: Written) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": written.text, "refusal": None}
    if written.thought:
        made["reasoning_content"] = made["reasoning"] = written.thought
    if written.calls:
        made["content"] = written.text if written.text.strip() else None
        made["tool_calls"] = [
            {
                "id": new_id("call_"),
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call in written.calls
        ]
    return made


def _arguments(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)


class ChatWire(OpenAiWire):
    """A stream of chunks: a role, then content, thoughts and calls, then why it ended."""

    def __init__(self, answers: Answers, *, with_usage: bool) -> None:
        super().__init__(answers, "chatcmpl-", "chat.completion.chunk", with_usage=with_usage)
        self._shown: list[tuple[str, str]] = [("", "") for _ in self._written]

    def begin(self) -> Iterator[bytes]:
        for index in range(len(self._written)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        written = self._written[index]
        written.observe(piece)
        if isinstance(piece, Draft):
            yield from self._whole(index, piece.answer, piece.thought)
        elif isinstance(piece, Text) and self._drafts:
            yield from self._whole(index, written.text, written.thought)
        elif isinstance(piece, Text):
            yield self._chunk(index, _delta(piece))
        elif isinstance(piece, ToolCall):
            number = len(written.calls) - 1
            head = {"id": new_id("call_"), "type": "function"}
            for more, function in (
                (head, {"name": piece.name, "arguments": ""}),
                ({}, {"arguments": _arguments(piece)}),
            ):
                call = {"index": number, **more, "function": function}
                yield self._chunk(index, {"tool_calls": [call]})
        elif isinstance(piece, Finished):
            if self._drafts:
                yield from self._whole(index, written.text, written.thought)
            yield self._chunk(index, {}, written.finish_reason)

    def keep_alive(self) -> Iterator[bytes]:
        yield self._chunk(0, {})

    def _whole(self, index: int, answer: str, thought: str) -> Iterator[bytes]:
        """Tell the whole text so far, where it has changed."""
        before, self._shown[index] = self._shown[index], (answer, thought)
        if thought != before[1]:
            yield self._chunk(index, {"reasoning_content": thought, "reasoning": thought})
        if answer != before[0]:
            yield self._chunk(index, {"content": answer})

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._choices(choice)


def _delta(piece: Text) -> dict[str, str]:
    if piece.channel == "answer":
        return {"content": piece.piece}
    return {"reasoning_content": piece.piece, "reasoning": piece.piece}
