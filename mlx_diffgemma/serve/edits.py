"""Rewritten code for editors, in Inception's dialect: `POST /v1/edit/completions` for a marked part
of a file, and `POST /v1/apply/completions` for a change that is put into a whole text. Answers
have the form of chats."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..language.prompt import PromptOptions
from .body import read
from .errors import ApiError
from .fills import AskedFill
from .limits import check_stops
from .openai_chat import ChatRequest, ChatWire, completion
from .openai_types import messages_of
from .runs import Asked, Asking, settings_of, start
from .sse import Stream, answer
from .state import State

_FILE = re.compile(r"<\|current_file_content\|>\n?(.*?)\n?<\|/current_file_content\|>", re.DOTALL)
_PART = re.compile(r"<\|code_to_edit\|>\n?(.*?)\n?<\|/code_to_edit\|>", re.DOTALL)
_PATH = re.compile(r"\Acurrent_file_path:[^\n]*\n")
_APPLY = re.compile(
    r"<\|original_code\|>\n?(.*?)\n?<\|/original_code\|>.*?"
    r"<\|update_snippet\|>\n?(.*?)\n?<\|/update_snippet\|>",
    re.DOTALL,
)
_CURSOR = "<|cursor|>"
_FENCE = "```"
# What the model is told. Braces that are no name stay as they are.
EDIT_PROMPT = (
    "{request}\n\nWrite the whole file again, with only the part between <|code_to_edit|> and "
    "<|/code_to_edit|> changed, and without these marks."
)
APPLY_PROMPT = (
    "Put this update into the code. Comments such as `... existing code ...` stand for code that "
    "stays as it is. Answer with the whole new code and nothing else.\n\nThe code:\n\n{original}"
    "\n\nThe update:\n\n{update}"
)


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""

    async def edit(request: Request) -> Response:
        body = await read(request, state.limits, ChatRequest)
        return await _respond(state, request, body, edited(state, body))

    async def apply(request: Request) -> Response:
        body = await read(request, state.limits, ChatRequest)
        return await _respond(state, request, body, applied(state, body))

    return [
        Route("/v1/edit/completions", edit, methods=["POST"]),
        Route("/v1/apply/completions", apply, methods=["POST"]),
    ]


async def _respond(state: State, request: Request, body: ChatRequest, asked: Asking) -> Response:
    if not body.stream:
        return await answer(request, start(state, asked), completion)
    return Stream(
        request,
        start(state, asked),
        lambda answers: ChatWire(answers, with_usage=False),
        send_seconds=state.limits.send_seconds,
    )


def edited(state: State, body: ChatRequest) -> Asking:
    """Return the request for the marked part of a file; the answer stands in a fence.

    Raises:
      ApiError: names what is wrong with it.
    """
    told = _text(state, body)
    file = _FILE.search(told)
    content = _PATH.sub("", file[1]) if file is not None else told
    part = _PART.search(content)
    if part is None:
        raise ApiError(
            400, "messages: there is no <|code_to_edit|> part to rewrite", param="messages"
        )
    before, after = content[: part.start()], content[part.end() :]
    old = part[1].replace(_CURSOR, "")
    return AskedFill(
        before=before.replace(_CURSOR, ""),
        after=after.replace(_CURSOR, ""),
        prompt=EDIT_PROMPT.replace("{request}", told),
        settings=settings_of(
            state, max_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed
        ),
        window=state.limits.max_fill_tokens,
        old=old,
        most=body.max_tokens,
        stop=check_stops(state.limits, body.stops),
        fence=_FENCE,
        model=body.model,
        param="messages",
    )


def applied(state: State, body: ChatRequest) -> Asking:
    """Return the request for a text with a change put into it.

    Raises:
      ApiError: names what is wrong with it.
    """
    found = _APPLY.search(_text(state, body))
    if found is None:
        raise ApiError(
            400, "messages: there are no <|original_code|> and <|update_snippet|>", param="messages"
        )
    original, update = found.groups()
    prompt = APPLY_PROMPT.replace("{original}", original).replace("{update}", update)
    return Asked(
        prompt=prompt,
        model=body.model,
        options=PromptOptions(response_prefix=f"{_FENCE}\n"),
        settings=settings_of(
            state, max_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed
        ),
        stop=(f"\n{_FENCE}", *check_stops(state.limits, body.stops)),
    )


def _text(state: State, body: ChatRequest) -> str:
    """Return the last user's message."""
    state.model(body.model)
    messages = messages_of(body.messages, state.limits)
    texts = [message["content"] for message in messages if message["role"] == "user"]
    if not texts:
        raise ApiError(400, "messages: there is no user's message", param="messages")
    return str(texts[-1])
