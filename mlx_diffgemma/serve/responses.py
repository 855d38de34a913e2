"""OpenAI's responses: `POST /v1/responses`, and what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..constraint.constraint import Constraint
from ..events import Finished, Text, ToolCall
from ..language.prompt import PromptOptions
from .body import read
from .errors import ApiError, refused
from .fetch import fetch_images
from .openai_types import new_id
from .pieces import Piece
from .responses_items import Output
from .responses_store import Kept, ResponseStore
from .responses_types import (
    Counted,
    ResponsesRequest,
    ToolChoice,
    Tools,
    messages_after,
    messages_of,
    tools_of,
    with_instructions,
)
from .runs import Answers, Asked, Usage, Written, beside, settings_of, start
from .sse import Stream, answer, attended, frame
from .state import State
from .structured import ToolPlan, json_object, json_schema, tool_plan

_FAILURES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""
    store = ResponseStore(state.limits)

    async def create(request: Request) -> Response:
        body = await read(request, state.limits, ResponsesRequest)
        reply = Reply(state, store, body)
        asked = await attended(request.receive, reply.asked())
        if not body.stream:
            return await answer(request, start(state, asked), reply.whole)
        return Stream(
            request,
            start(state, asked),
            lambda answers: ResponsesWire(reply, answers),
        )

    async def count(request: Request) -> Response:
        body = await read(request, state.limits, Counted)
        tokens = await attended(request.receive, count_tokens(state, store, body))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})

    async def one(request: Request) -> Response:
        name = request.path_params["id"]
        if request.method == "DELETE":
            store.drop(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise refused("stream", "a kept response is whole")
        return JSONResponse(store.get(name).response)

    async def items(request: Request) -> Response:
        data = store.get(request.path_params["id"]).items
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": False})

    async def cancel(request: Request) -> Response:
        store.get(request.path_params["id"])
        raise ApiError(400, "the response is complete; one under way ends with its connection")

    return [
        route
        for path in ("/v1/responses", "/responses")
        for route in (
            Route(path, create, methods=["POST"]),
            Route(f"{path}/input_tokens", count, methods=["POST"]),
            Route(f"{path}/{{id}}", one, methods=["GET", "DELETE"]),
            Route(f"{path}/{{id}}/input_items", items, methods=["GET"]),
            Route(f"{path}/{{id}}/cancel", cancel, methods=["POST"]),
        )
    ]


async def count_tokens(state: State, store: ResponseStore, body: Counted) -> int:
    """Return how many tokens a request's prompt has.

    Raises:
      ApiError: names what is wrong with the request.
    """
    served = state.model(body.model)
    body.refuse_unsupported()
    messages = with_instructions(_messages(state, store, body), body.instructions)
    plan = await _plan(state, body, tools_of(body.tools))
    await fetch_images(messages, state.limits, "input")
    options = PromptOptions(thinking=_thinking(state, body), tools=plan.shown, images=state.images)
    return len(await beside(state, lambda: served.engine.encode(messages, options), "input"))


def _messages(state: State, store: ResponseStore, body: Counted) -> list[dict[str, Any]]:
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        before = store.get(body.previous_response_id, previous=True).messages
    return messages_of(body, before, state.limits)


def _thinking(state: State, body: Counted) -> bool:
    if body.reasoning is None or body.reasoning.effort is None:
        return state.thinking
    return body.reasoning.effort not in ("none", "minimal")


async def _plan(
    state: State, body: Counted, tools: Tools, form: Constraint | None = None
) -> ToolPlan:
    choice, told, only = body.tool_choice or "auto", tools.told, None
    mode = choice if isinstance(choice, str) else "required"
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        param, mode = "tool_choice.tools", choice.mode or "auto"
        allowed = {tools.name_of(each, param) for each in choice.tools or ()}
        told = [tool for tool in told if tool.name in allowed]
    elif isinstance(choice, ToolChoice):
        only = tools.name_of(choice, "tool_choice")
    callable_ = {only} if only else {tool.name for tool in told}
    if mode == "required" and (held := sorted(callable_ & tools.grammars)):
        raise refused("tool_choice", f"the grammar of the custom tool {held[0]!r} cannot be held")
    parallel = body.parallel_tool_calls is not False
    return await tool_plan(state, told, mode, only=only, parallel=parallel, answer=form)


async def _form(state: State, body: Counted) -> Constraint | None:
    """Return what the answer must be where it is no call."""
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return await json_object(state, "text.format")
    if form.schema_ is None:
        raise ApiError(400, "text.format.schema is missing", param="text.format.schema")
    return await json_schema(state, form.schema_, "text.format.schema")


class Reply:
    """A response, from its request to its object."""

    def __init__(self, state: State, store: ResponseStore, body: ResponsesRequest) -> None:
        self._state, self._store, self._body = state, store, body
        self.id, self._created = new_id("resp_"), int(time.time())
        self._tools = tools_of(body.tools)
        self._input: list[dict[str, Any]] = []  # messages, without instructions
        self.output = Output(self._tools.called)
        self.written = Written()

    async def asked(self) -> Asked:
        """Return the checked request; its constraint is compiled.

        Raises:
          ApiError: names what is wrong with it.
        """
        state, body = self._state, self._body
        state.model(body.model)
        body.refuse_unsupported()
        self._input = _messages(state, self._store, body)
        plan = await _plan(state, body, self._tools, await _form(state, body))
        await fetch_images(self._input, state.limits, "input")
        return Asked(
            prompt=with_instructions(self._input, body.instructions),
            model=body.model,
            options=PromptOptions(
                thinking=_thinking(state, body), tools=plan.shown, images=state.images
            ),
            settings=settings_of(
                state,
                max_tokens=body.max_output_tokens,
                temperature=body.temperature,
                seed=body.seed,
            ),
            constraint=plan.constraint,
            one_call=plan.one_call,
            param="input",
        )

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Add a piece; yield its events."""
        self.written.observe(piece)
        if isinstance(piece, (Text, ToolCall)):
            yield from self.output.add(piece)
        elif isinstance(piece, Finished):
            yield from self.output.end("incomplete" if piece.reason == "length" else "completed")

    def whole(self, written: list[Written], answers: Answers) -> dict[str, Any]:
        """Return the object of a whole answer, and keep it."""
        (one,) = written
        assert one.finished is not None
        texts = [Text(one.thought, "thought"), Text(one.text, "answer")]
        pieces: list[Piece] = [*texts, *one.calls, one.finished]
        for piece in pieces:
            for _ in self.add(piece):
                pass
        return self.complete(answers)

    def complete(self, answers: Answers) -> dict[str, Any]:
        """Return the object of an answer that has ended, and keep it."""
        made = self.object(answers, self.status)
        if self._body.store is not False:
            output = made["output"]
            messages = messages_after(self._input, output, self._state.limits)
            self._store.put(Kept(made, messages, _input_items(self._body)))
        return made

    @property
    def status(self) -> str:
        """Why the answer ended."""
        finished = self.written.finished
        return "incomplete" if finished and finished.reason == "length" else "completed"

    def object(
        self, answers: Answers, status: str, error: ApiError | None = None
    ) -> dict[str, Any]:
        """Return the response as it is now."""
        body, has_ended = self._body, status != "in_progress"
        failure = None
        if error is not None:
            code = _FAILURES.get(error.status, "server_error")
            failure = {"code": code, "message": error.message}
        choice = body.tool_choice or "auto"
        reasoning = {"effort": body.reasoning.effort if body.reasoning else None, "summary": None}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": failure,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": answers.served.name,
            "output": list(self.output.items) if has_ended else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": reasoning,
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": choice if isinstance(choice, str) else _dumped(choice),
            "tools": [_tool(each) for each in body.tools or ()],
            "top_p": None,
            "truncation": "disabled",
            "usage": usage_of(answers.usage) if status in ("completed", "incomplete") else None,
            "metadata": body.metadata or {},
        }


def _dumped(fields: Any) -> dict[str, Any]:
    made = fields.model_dump(by_alias=True, exclude_none=True)
    assert isinstance(made, dict)
    return made


def _format(body: Counted) -> dict[str, Any]:
    form = body.text.format if body.text else None
    return {"type": "text"} if form is None else _dumped(form)


def _tool(tool: Any) -> dict[str, Any]:
    if tool.type != "function":
        return _dumped(tool)
    return {"parameters": None, "strict": bool(tool.strict), **_dumped(tool)}


def _input_items(body: Counted) -> list[dict[str, Any]]:
    """Return the items of a request, each with an id."""
    if isinstance(body.input, str):
        content = [{"type": "input_text", "text": body.input}]
        return [{"id": new_id("msg_"), "type": "message", "role": "user", "content": content}]
    made = []
    for item in body.input or ():
        dumped = {"id": new_id("item_"), "type": "message", **_dumped(item)}
        if dumped["type"] == "message" and isinstance(dumped["content"], str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            dumped["content"] = [{"type": kind, "text": dumped["content"]}]
        made.append(dumped)
    return made


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the usage object."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "diffusion": usage.diffusion(),
    }


class ResponsesWire:
    """A stream of numbered events. To keep a connection alive it says again that the response is in
    progress."""

    def __init__(self, reply: Reply, answers: Answers) -> None:
        self._reply, self._answers, self._number = reply, answers, 0

    def begin(self) -> Iterator[bytes]:
        yield self._state("response.created", "in_progress")
        yield self._state("response.in_progress", "in_progress")

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        yield from map(self._event, self._reply.add(piece))

    def keep_alive(self) -> Iterator[bytes]:
        yield self._state("response.in_progress", "in_progress")

    def end(self, usage: Usage) -> Iterator[bytes]:
        response = self._reply.complete(self._answers)
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def error(self, error: ApiError) -> Iterator[bytes]:
        response = self._reply.object(self._answers, "failed", error)
        yield self._event({"type": "response.failed", "response": response})

    def _state(self, kind: str, status: str) -> bytes:
        return self._event({"type": kind, "response": self._reply.object(self._answers, status)})

    def _event(self, data: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return frame({**data, "sequence_number": number}, data["type"])
