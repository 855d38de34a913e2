"""OpenAI's decisions: `POST /v1/decisions`. The specification is the `openai` package:
`openai/types/decision.py` and `openai/types/decision_create_params.py`."""

from __future__ import annotations

import json
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..config.serving import Limits
from ..errors import DiffGemmaError, QuestionError
from ..events import PrefillDone
from ..language.given import Message
from ..language.prompt import PromptOptions
from ..write.decide import Decisions, DecisionTask
from ..write.questions import MOST_QUESTIONS, Question, text_of
from .body import Fields, Many, read
from .errors import ApiError, busy, from_error
from .fetch import fetch_images
from .images import Piece, check_images, image_part, joined
from .limits import check_length
from .runs import Usage, beside
from .sse import attended
from .state import State

_ROLES = {"user": "user", "developer": "system", "system": "system", "assistant": "assistant"}


class DecisionRequest(Fields):
    """The body of a request."""

    input: str | Many[dict[str, Any]]
    questions: Many[dict[str, Any]]
    model: str | None = None


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""

    async def create(request: Request) -> Response:
        body = await read(request, state.limits, DecisionRequest)
        return JSONResponse(await attended(request.receive, decided(state, request, body)))

    paths = ("/v1/decisions", "/decisions")
    return [Route(path, create, methods=["POST"]) for path in paths]


async def decided(state: State, request: Request, body: DecisionRequest) -> dict[str, Any]:
    """Return the object of a request's answers.

    Raises:
      ApiError: names what is wrong with it.
    """
    served = state.model(body.model)
    prompt = _prompt(state, body)
    if not isinstance(prompt, str):
        await fetch_images(prompt, state.limits, "input")
    task = DecisionTask(
        prompt=prompt,
        questions=_questions(body),
        prompt_options=PromptOptions(images=state.images),
    )
    run = await beside(state, lambda: served.engine.submit(task), "input")
    stay = state.when_ending(run.cancel)
    usage, found = Usage(), None
    request.state.tally.usage = usage
    try:
        async for event in run:
            if isinstance(event, PrefillDone):
                usage.prefill_seconds += event.seconds
            elif isinstance(event, Decisions):
                found = event
    except DiffGemmaError as error:
        raise from_error(error) from error
    finally:
        stay()
        run.cancel()
    if found is None:
        raise busy("the server ends")
    usage.prompt_tokens, usage.cached_tokens = found.prompt_tokens, found.cached_tokens
    usage.completion_tokens = usage.steps = usage.canvases = found.steps
    usage.seconds = time.perf_counter() - usage.started
    state.metrics.add("prompt_tokens_total", found.prompt_tokens)
    state.metrics.add("cached_tokens_total", found.cached_tokens)
    state.metrics.add("steps_total", found.steps)
    return {
        "answers": [answer.as_object() for answer in found.answers],
        "model": served.name,
        "usage": {
            "input_tokens": found.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": found.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": found.steps,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found.prompt_tokens + found.steps,
            "diffusion": usage.diffusion()
            | {
                "answers": [
                    {"confidence": answer.confidence, "share": answer.share}
                    for answer in found.answers
                ]
            },
        },
    }


def _questions(body: DecisionRequest) -> tuple[Question, ...]:
    if not 1 <= (count := len(body.questions)) <= MOST_QUESTIONS:
        raise ApiError(
            400, f"there must be 1 to {MOST_QUESTIONS} questions, got {count}", param="questions"
        )
    questions = []
    for number, raw in enumerate(body.questions):
        param = f"questions[{number}]"
        try:
            questions.append(Question.from_object(raw))
        except QuestionError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from None
    return tuple(questions)


def _prompt(state: State, body: DecisionRequest) -> str | list[Message]:
    """Return the input as text, or as the chat template's messages."""
    if isinstance(body.input, str):
        return body.input
    check_length(body.input, state.limits.max_messages, "input")
    if not body.input:
        raise ApiError(400, "input is empty", param="input")
    calls: dict[str, str] = {}
    messages: list[Message] = [
        _item(item, f"input[{i}]", calls, state.limits) for i, item in enumerate(body.input)
    ]
    check_images(messages, state.limits, "input")
    return messages


def _item(item: dict[str, Any], param: str, calls: dict[str, str], limits: Limits) -> Message:
    """Return an item of the input as a message. `calls` has the names of the functions that were
    called, by the id of the call."""
    kind = item.get("type") or "message"
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise ApiError(400, f"{param}.role must be one of {', '.join(_ROLES)}", param=param)
        return {"role": _ROLES[role], "content": _content(item, f"{param}.content", limits)}
    if kind in ("function_call", "custom_tool_call"):
        name, call_id = _named(item, "name", param), _named(item, "call_id", param)
        calls[call_id] = name
        if kind == "function_call":
            arguments = _arguments(item.get("arguments"), f"{param}.arguments")
        else:
            arguments = {"input": _named(item, "input", param)}
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind in ("function_call_output", "custom_tool_call_output"):
        call_id = _named(item, "call_id", param)
        if call_id not in calls:
            raise ApiError(
                400, f"{param}.call_id names no call before it", param=f"{param}.call_id"
            )
        output = _text(item.get("output"), f"{param}.output")
        return {
            "role": "tool",
            "name": calls[call_id],
            "tool_call_id": call_id,
            "content": output,
        }
    raise ApiError(400, f"{param}.type: {str(kind)[:60]!r} is not supported", param=param)


def _content(item: dict[str, Any], param: str, limits: Limits) -> str | list[dict[str, Any]]:
    """Return the content of a message: text, and images in the user's."""
    given = item.get("content")
    if item["role"] != "user" or not isinstance(given, list):
        return _text(given, param)
    pieces: list[Piece] = []
    for number, part in enumerate(given):
        if isinstance(part, dict) and part.get("type") == "input_image":
            where = f"{param}[{number}].image_url"
            pieces.append(image_part(part.get("image_url"), where, limits))
        else:
            pieces.append(_text([part], param))
    return joined(pieces, "\n")


def _text(given: Any, param: str) -> str:
    try:
        return text_of(given, param)
    except QuestionError as error:
        raise ApiError(400, str(error), param=param) from None


def _named(item: dict[str, Any], field: str, param: str) -> str:
    value = item.get(field)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{param}.{field} must be text", param=f"{param}.{field}")
    return value


def _arguments(given: Any, param: str) -> dict[str, Any]:
    try:
        found = json.loads(given) if isinstance(given, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, f"{param} is not the text of a JSON object", param=param)
    return found
