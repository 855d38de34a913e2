"""Rewritten code for editors, in Inception's dialect: `POST /v1/edit/completions` for a marked part
of a file, and `POST /v1/apply/completions` for a change that is put into a whole text. Answers
have the form of chats."""

from __future__ import annotations

import re
from typing import NamedTuple

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

_PATH = re.compile(r"\Acurrent_file_path:[^\n]*\n")
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
    )


class _Marked(NamedTuple):
    """A part between two marks."""

    start: int  # of the first mark
    stop: int  # behind the second one
    text: str  # without the line breaks beside the marks


def _marked(text: str, name: str, start: int = 0) -> _Marked | None:
    """Return the first part that is marked with a name, from a place on. Every character is looked
    at once; an expression would go back for each mark without its end."""
    opening, closing = f"<|{name}|>", f"<|/{name}|>"
    at = text.find(opening, start)
    end = text.find(closing, at + len(opening)) if at >= 0 else -1
    if end < 0:
        return None
    inside = text[at + len(opening) : end].removeprefix("\n").removesuffix("\n")
    return _Marked(at, end + len(closing), inside)


def edited(state: State, body: ChatRequest) -> Asking:
    """Return the request for the marked part of a file; the answer stands in a fence.

    Raises:
      ApiError: names what is wrong with it.
    """
    told = _text(state, body)
    file = _marked(told, "current_file_content")
    content = _PATH.sub("", file.text) if file is not None else told
    part = _marked(content, "code_to_edit")
    if part is None:
        raise ApiError(
            400, "messages: there is no <|code_to_edit|> part to rewrite", param="messages"
        )
    before, after = content[: part.start], content[part.stop :]
    old = part.text.replace(_CURSOR, "")
    return AskedFill(
        before=before.replace(_CURSOR, ""),
        after=after.replace(_CURSOR, ""),
        prompt=EDIT_PROMPT,
        request=told,
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
    text = _text(state, body)
    original = _marked(text, "original_code")
    update = None if original is None else _marked(text, "update_snippet", original.stop)
    if original is None or update is None:
        raise ApiError(
            400, "messages: there are no <|original_code|> and <|update_snippet|>", param="messages"
        )
    shown = {"{original}": original.text, "{update}": update.text}
    prompt = re.sub("|".join(map(re.escape, shown)), lambda found: shown[found[0]], APPLY_PROMPT)
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
