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
from .body import read, refuse
from .errors import ApiError, refused
from .fills import AskedFill
from .limits import check_choices, check_stops
from .openai_chat import ChatRequest, respond
from .openai_types import messages_of
from .runs import Asked, Asking, settings_of
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
        return await respond(state, request, body, edited(state, body))

    async def apply(request: Request) -> Response:
        body = await read(request, state.limits, ChatRequest)
        return await respond(state, request, body, applied(state, body))

    return [
        Route("/v1/edit/completions", edit, methods=["POST"]),
        Route("/v1/apply/completions", apply, methods=["POST"]),
    ]


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


async def edited(state: State, body: ChatRequest) -> Asking:
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
            state, max_tokens=body.most_tokens, temperature=body.temperature, seed=body.seed
        ),
        window=state.limits.max_fill_tokens,
        old=old,
        most=body.most_tokens,
        stop=check_stops(state.limits, body.stops),
        fence=_FENCE,
        model=body.model,
        count=body.n or 1,
        drafts=bool(body.diffusing),
        param="messages",
    )


async def applied(state: State, body: ChatRequest) -> Asking:
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
            state, max_tokens=body.most_tokens, temperature=body.temperature, seed=body.seed
        ),
        stop=(f"\n{_FENCE}", *check_stops(state.limits, body.stops)),
        standing=f"{original.text}\n{_FENCE}",
        count=body.n or 1,
        drafts=bool(body.diffusing),
    )


def _text(state: State, body: ChatRequest) -> str:
    """Check a request but for its marks; return the last user's message.

    Raises:
      ApiError: names what is wrong with it.
    """
    state.model(body.model)
    # Penalties have nothing to do with code that is written anew, and Continue sends some.
    body.frequency_penalty = body.presence_penalty = None
    body.refuse_unsupported()
    check_choices(state.limits, body.n or 1)
    code = "the answer is code"
    refuse(body.tools, ([],), "tools", code)
    refuse(body.tool_choice, ("none", "auto"), "tool_choice", code)
    refuse(body.constraint, (), "constraint", code)
    form = body.response_format and body.response_format.type
    refuse(form, ("text",), "response_format", code)
    if body.thinking:
        param = "reasoning_effort" if body.reasoning_effort else "chat_template_kwargs"
        raise refused(param, "code is written without a thought")
    messages = messages_of(body.messages, state.limits)
    texts = [message["content"] for message in messages if message["role"] == "user"]
    if not all(isinstance(text, str) for text in texts):
        raise refused("messages", "an edit reads no images")
    if not texts:
        raise ApiError(400, "messages: there is no user's message", param="messages")
    return str(texts[-1])
