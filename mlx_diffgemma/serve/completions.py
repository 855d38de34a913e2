"""OpenAI's completions: `POST /v1/completions`. A prompt is raw text; with a suffix, or with the
markers of a fill-in-the-middle model, the gap is filled and all around it pinned."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..events import Finished, Text
from ..language.prompt import PromptOptions
from .body import Many, read, refuse
from .errors import ApiError, refused
from .fills import AskedFill
from .fim import Gap, gap_of
from .limits import check_choices, check_stops
from .openai_types import Common, OpenAiWire, new_id, usage_of
from .pieces import Draft, Piece
from .runs import Answers, Asked, Asking, Written, settings_of, start
from .sse import Stream, answer, attended
from .state import State
from .structured import extension

# What Continue sends for an empty suffix.
_NO_SUFFIX = "<|endoftext|>"


class CompletionRequest(Common):
    """The body of a request."""

    prompt: str | Many[str] | Many[int]
    suffix: str | None = None
    # Known fields that cannot be honoured.
    echo: Any = None
    best_of: Any = None


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""

    async def create(request: Request) -> Response:
        body = await read(request, state.limits, CompletionRequest)
        asked = await attended(request.receive, asked_of(state, body))
        if not body.stream:
            return await answer(request, start(state, asked), completion)
        options = body.stream_options
        with_usage = bool(options and options.include_usage)
        return Stream(
            request,
            start(state, asked),
            lambda answers: CompletionWire(answers, with_usage=with_usage),
        )

    paths = ("/v1/completions", "/completions", "/v1/fim/completions")
    return [Route(path, create, methods=["POST"]) for path in paths]


async def asked_of(state: State, body: CompletionRequest) -> Asking:
    """Return a checked request: for text behind the prompt, or in its gap.

    Raises:
      ApiError: names what is wrong with it.
    """
    state.model(body.model)
    refuse(body.echo, (False,), "echo", "the answer does not hold the prompt")
    refuse(body.best_of, (1,), "best_of", "use n")
    check_choices(state.limits, body.n or 1)
    stop = check_stops(state.limits, body.stops)
    settings = settings_of(
        state, max_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed
    )
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise refused("prompt", f"it has {len(prompt)} texts; send one request for each")
        prompt = str(prompt[0])
    if (gap := _gap(prompt, body.suffix)) is not None:
        # Penalties have nothing to do with a gap between pinned texts, and Continue sends some.
        body.frequency_penalty = body.presence_penalty = None
        body.refuse_unsupported()
        refuse(body.constraint, (), "constraint", "not together with suffix")
        return AskedFill(
            before=gap.before,
            after=gap.after,
            files=gap.files,
            prompt=state.fill_prompt,
            settings=settings,
            window=state.limits.max_fill_tokens,
            most=body.max_tokens,
            stop=stop,
            model=body.model,
            count=body.n or 1,
            drafts=bool(body.diffusing),
        )
    body.refuse_unsupported()
    constraint = None if body.constraint is None else await extension(state, body.constraint)
    if constraint is not None and stop:
        raise refused("stop", "not together with constraint")
    return Asked(
        prompt=prompt,
        model=body.model,
        options=PromptOptions(use_chat_template=False),
        settings=settings,
        stop=stop,
        constraint=constraint,
        count=body.n or 1,
        drafts=bool(body.diffusing),
        param="prompt",
    )


def _gap(prompt: str | list[str] | list[int], suffix: str | None) -> Gap | None:
    if isinstance(prompt, list):
        if suffix:
            raise ApiError(400, "suffix needs a prompt that is text", param="suffix")
        return None
    if suffix is not None and suffix != _NO_SUFFIX and suffix.strip():
        return Gap(prompt, suffix)
    if suffix is not None and prompt.strip():  # what Continue sends at the end of a file
        return Gap(prompt, "")
    return gap_of(prompt)


def completion(written: list[Written], answers: Answers) -> dict[str, Any]:
    """Return the object of whole answers."""
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": answers.served.name,
        "choices": [_choice(index, each.text, _reason(each)) for index, each in enumerate(written)],
        "usage": usage_of(answers.usage),
    }


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _reason(written: Written) -> str:
    return "length" if written.finish_reason == "length" else "stop"


class CompletionWire(OpenAiWire):
    """A stream of texts, then why it ended."""

    def __init__(self, answers: Answers, *, with_usage: bool) -> None:
        super().__init__(answers, "cmpl-", "text_completion", with_usage=with_usage)
        self._shown = [""] * answers.asked.count  # with drafts, each text replaces the one before

    def begin(self) -> Iterable[bytes]:
        return ()

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        written = self._written[index]
        written.observe(piece)
        if isinstance(piece, Draft):
            self._shown[index] = piece.answer
            yield self._chunk(index, piece.answer)
        elif isinstance(piece, Text) and piece.channel == "answer":
            if self._drafts:
                self._shown[index] = written.text
            yield self._chunk(index, written.text if self._drafts else piece.piece)
        elif isinstance(piece, Finished):
            yield self._chunk(index, self._shown[index], _reason(written))

    def keep_alive(self) -> Iterator[bytes]:
        yield self._chunk(0, self._shown[0])

    def _chunk(self, index: int, text: str, reason: str | None = None) -> bytes:
        return self._choices(_choice(index, text, reason))
