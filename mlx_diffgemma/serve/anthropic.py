"""Anthropic's messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..constraint.constraint import Constraint
from ..events import Finished, PrefillDone, Text, ToolCall
from ..language.prompt import PromptOptions
from .anthropic_types import (
    Conversation,
    Counted,
    MessagesRequest,
    ToolChoice,
    conversation_of,
    tools_of,
)
from .body import read
from .errors import ApiError, anthropic_form, refused
from .fetch import fetch_images
from .limits import check_stops
from .openai_types import new_id
from .pieces import Piece
from .runs import Answers, Asked, Usage, Written, beside, settings_of, start
from .sse import Stream, answer, attended, frame
from .state import State
from .structured import ToolPlan, json_schema, tool_plan

_MODES: dict[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "any": "required",
    "tool": "required",
}


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""

    async def create(request: Request) -> Response:
        body = await read(request, state.limits, MessagesRequest)
        asked = await attended(request.receive, asked_of(state, body))
        is_hidden = body.thinking is not None and body.thinking.display == "omitted"
        if not body.stream:
            return await answer(
                request,
                start(state, asked),
                lambda written, answers: whole(written[0], answers, is_hidden),
            )
        return Stream(
            request,
            start(state, asked),
            lambda answers: MessagesWire(answers, hides_thoughts=is_hidden),
        )

    async def count(request: Request) -> Response:
        body = await read(request, state.limits, Counted)
        tokens = await attended(request.receive, count_tokens(state, body))
        return JSONResponse({"input_tokens": tokens})

    return [
        Route("/v1/messages", create, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


async def asked_of(state: State, body: MessagesRequest) -> Asked:
    """Return a checked request; its constraint is compiled.

    Raises:
      ApiError: names what is wrong with it.
    """
    state.model(body.model)
    body.refuse_unsupported()
    stop = check_stops(state.limits, body.stop_sequences or (), "stop_sequences")
    conversation = conversation_of(body, state.limits)
    plan = await _tools(state, body, await _form(state, body))
    if plan.constraint is not None and stop:
        raise refused("stop_sequences", "not together with a format, strict tools or required ones")
    if plan.constraint is not None and conversation.prefix:
        raise refused(
            f"messages[{len(body.messages) - 1}]",
            "an answer that must fit a format or a tool cannot be begun by the client",
        )
    await fetch_images(conversation.messages, state.limits, "messages")
    budget = body.thinking.budget_tokens if body.thinking else None
    return Asked(
        prompt=conversation.messages,
        model=body.model,
        options=_options(state, body, conversation, plan),
        settings=settings_of(
            state,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            seed=body.seed,
            more={} if budget is None else {"max_thinking_tokens": budget},
        ),
        stop=stop,
        constraint=plan.constraint,
        one_call=plan.one_call,
    )


async def count_tokens(state: State, body: Counted) -> int:
    """Return how many tokens a request's prompt has.

    Raises:
      ApiError: names what is wrong with the request.
    """
    served = state.model(body.model)
    body.refuse_unsupported()
    conversation = conversation_of(body, state.limits)
    plan = await _tools(state, body)
    options = _options(state, body, conversation, plan)
    await fetch_images(conversation.messages, state.limits, "messages")
    ids = await beside(
        state, lambda: served.engine.encode(conversation.messages, options), "messages"
    )
    return len(ids)


def _options(
    state: State, body: Counted, conversation: Conversation, plan: ToolPlan
) -> PromptOptions:
    thinking = state.thinking if body.thinking is None else body.thinking.type != "disabled"
    if thinking and body.thinking is None and conversation.prefix:
        thinking = False  # only the server's default; the client has begun the answer
    if thinking and conversation.prefix:
        raise refused(
            f"messages[{len(body.messages) - 1}]",
            "an answer that the client has begun has no thought before it; disable thinking",
        )
    return PromptOptions(
        thinking=thinking,
        response_prefix=conversation.prefix,
        tools=plan.shown,
        images=state.images,
    )


async def _tools(state: State, body: Counted, form: Constraint | None = None) -> ToolPlan:
    tools, choice = tools_of(body.tools), body.tool_choice or ToolChoice(type="auto")
    if choice.type == "tool" and choice.name is None:
        raise ApiError(400, "tool_choice.name is missing", param="tool_choice.name")
    return await tool_plan(
        state,
        tools,
        _MODES[choice.type],
        only=choice.name if choice.type == "tool" else None,
        parallel=not choice.disable_parallel_tool_use,
        answer=form,
    )


async def _form(state: State, body: Counted) -> Constraint | None:
    """Return what the answer must be where it is no call."""
    param, form = "output_config.format", body.output_config and body.output_config.format
    if not form:
        param, form = "output_format", body.output_format
    if not form:
        return None
    return await json_schema(state, form.schema_, f"{param}.schema")


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the usage object. What a kept context held is not in `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.thought_tokens},
    }


def stop_of(written: Written) -> dict[str, Any]:
    """Return why an answer ended."""
    assert written.finished is not None
    if written.finished.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": written.finished.stop_string}
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
    return {"stop_reason": reasons[written.finish_reason], "stop_sequence": None}


def whole(written: Written, answers: Answers, hides_thoughts: bool) -> dict[str, Any]:
    """Return the object of a whole message."""
    content = Blocks(hides_thoughts=hides_thoughts)
    texts = [Text(written.thought, "thought"), Text(written.text, "answer")]
    pieces: list[Text | ToolCall] = [*texts, *written.calls]
    for piece in pieces:
        for _ in content.add(piece):
            pass
    for _ in content.end():
        pass
    return {
        **_head(answers),
        "content": content.blocks,
        **stop_of(written),
        "usage": usage_of(answers.usage),
    }


def _head(answers: Answers) -> dict[str, Any]:
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": answers.served.name,
    }


class Blocks:
    """The blocks of a message, and the events that tell of them. White space alone makes no block,
    since no client may send it back."""

    def __init__(self, *, hides_thoughts: bool) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._hides_thoughts = hides_thoughts
        self._open: str | None = None  # type of the last block, until it ends
        self._held: tuple[str, str] = ("", "")  # type and white space that may begin a block

    def add(self, piece: Text | ToolCall) -> Iterator[dict[str, Any]]:
        """Add a piece; yield its events."""
        if isinstance(piece, ToolCall):
            yield from self._call(piece)
        elif piece.channel == "answer":
            yield from self._write("text", piece.piece)
        else:
            yield from self._write("thinking", piece.piece)

    def end(self) -> Iterator[dict[str, Any]]:
        """End the open block."""
        if self._open == "thinking":
            signature = _signature(self.blocks[-1]["thinking"])
            yield self._delta("signature", signature, "signature_delta")
            if self._hides_thoughts:
                self.blocks[-1]["thinking"] = ""
        if self._open is not None:
            yield {"type": "content_block_stop", "index": len(self.blocks) - 1}
        self._open = None

    def _write(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if self._open != kind:
            text = (self._held[1] if self._held[0] == kind else "") + text
            self._held = (kind, text)
            if not text.strip():
                return
            self._held = ("", "")
            more = {"signature": ""} if kind == "thinking" else {}
            yield from self._begin({"type": kind, kind: "", **more})
        if kind == "thinking" and self._hides_thoughts:
            self.blocks[-1][kind] += text
        elif text:
            yield self._delta(kind, text, f"{kind}_delta")

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        made = {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": {}}
        yield from self._begin(made)
        written = json.dumps(call.arguments, ensure_ascii=False)
        yield {
            "type": "content_block_delta",
            "index": len(self.blocks) - 1,
            "delta": {"type": "input_json_delta", "partial_json": written},
        }
        self.blocks[-1]["input"] = call.arguments
        yield from self.end()

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.end()
        self._open = block["type"]
        self.blocks.append(dict(block))
        yield {
            "type": "content_block_start",
            "index": len(self.blocks) - 1,
            "content_block": block,
        }

    def _delta(self, key: str, text: str, kind: str) -> dict[str, Any]:
        self.blocks[-1][key] += text
        delta = {"type": kind, key: text}
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def _signature(thought: str) -> str:
    """Return what stands for Anthropic's signature; nobody checks it."""
    return hashlib.sha256(thought.encode()).hexdigest()


class MessagesWire:
    """A stream of named events. It begins once the prompt is read, since it tells the tokens."""

    def __init__(self, answers: Answers, *, hides_thoughts: bool) -> None:
        self._answers, self._written = answers, Written()
        self._content = Blocks(hides_thoughts=hides_thoughts)

    def begin(self) -> Iterable[bytes]:
        return ()

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        self._written.observe(piece)
        if isinstance(piece, PrefillDone):
            ending = {"stop_reason": None, "stop_sequence": None}
            usage = usage_of(self._answers.usage)
            message = {**_head(self._answers), "content": [], **ending, "usage": usage}
            yield _event({"type": "message_start", "message": message})
        elif isinstance(piece, (Text, ToolCall)):
            yield from map(_event, self._content.add(piece))
        elif isinstance(piece, Finished):
            yield from map(_event, self._content.end())

    def keep_alive(self) -> Iterator[bytes]:
        yield _event({"type": "ping"})

    def end(self, usage: Usage) -> Iterator[bytes]:
        delta = stop_of(self._written)
        yield _event({"type": "message_delta", "delta": delta, "usage": usage_of(usage)})
        yield _event({"type": "message_stop"})

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield frame(anthropic_form(error), "error")


def _event(data: dict[str, Any]) -> bytes:
    return frame(data, data["type"])
