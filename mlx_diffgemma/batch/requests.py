"""A line of a batch: a request of OpenAI's batch files, which the server's own routes answer in
this process, or a prompt with settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from ..config.generation import GenerationSettings
from ..errors import DataError, DiffGemmaError
from ..serve.app import application
from ..serve.body import checked
from ..serve.errors import ApiError
from ..serve.openai_chat import ChatRequest, asked_of
from ..serve.runs import Answers, Written, start
from ..serve.security import Access
from ..serve.state import State
from .lines import Line, lines_of
from .run import Answered

_LOOK = 100  # lines in which a file shows its form
_OPENAI = ("custom_id", "method", "url", "body")
_STREAMS = "/x/events"  # the route whose answers are always streams
# Fields of a plain line that have names of their own.
_PLAIN = ("id", "prompt", "system_prompt", "thinking", "settings")


def is_openai(file: Path) -> bool:
    """Return whether a file has OpenAI's form, by its first line that is a JSON object."""
    for line in islice(lines_of(file), _LOOK):
        try:
            return any(name in line.object() for name in _OPENAI)
        except DataError:
            continue
    return False


@dataclass
class RequestLines:
    """Answers lines of OpenAI's form: `custom_id`, `method`, `url`, `body`.

    Attributes:
      state: of the server whose routes answer.
      names: custom ids so far.
    """

    state: State
    on_bug: Any = None
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._app = application(self.state, Access(), on_bug=self.on_bug)

    def pass_by(self, lines: Iterable[Line]) -> None:
        """Know the custom ids of lines that an earlier run has answered."""
        for line in lines:
            with suppress(DataError):
                self._checked(line.object(), line)

    async def answer(self, line: Line) -> Answered:
        """Return a line of OpenAI's answers: with a `response`, or with an `error` where the line
        holds no request."""
        head: dict[str, Any] = {"id": f"batch_req_{line.number}", "custom_id": None}
        try:
            raw = line.object()
            if isinstance(name := raw.get("custom_id"), str):
                head["custom_id"] = name
            url, body = self._checked(raw, line)
        except DataError as error:
            told = {"code": "invalid_line", "message": str(error)}
            return Answered(head | {"response": None, "error": told}, is_error=True)
        if body.get("seed") is None and self.state.settings.seed is not None:
            body = {**body, "seed": self.state.settings.seed + line.number - 1}
        status, answer = await call(self._app, "POST", url, json.dumps(body).encode())
        response = {
            "status_code": status,
            "request_id": f"req_{line.number}",
            "body": json.loads(answer),
        }
        return Answered(head | {"response": response, "error": None}, is_error=status >= 400)

    def _checked(self, raw: Mapping[str, Any], line: Line) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a line's request."""
        name, where = raw.get("custom_id"), f"line {line.number}"
        if not isinstance(name, str) or not name:
            raise DataError(f"{where} needs a custom_id, a text")
        if name in self.names:
            raise DataError(f"{where} has the custom_id {name[:60]!r} of an earlier line")
        self.names.add(name)
        if raw.get("method") != "POST":
            raise DataError(
                f"{where}: the method must be POST, got {str(raw.get('method'))[:20]!r}"
            )
        url, body = raw.get("url"), raw.get("body")
        if not isinstance(url, str) or not url.startswith("/") or not url.isascii():
            raise DataError(f"{where}: the url must be a path such as /v1/chat/completions")
        if not isinstance(body, dict):
            raise DataError(f"{where}: the body must be an object")
        if body.get("stream") or url.startswith(_STREAMS):
            raise DataError(
                f"{where}: a batch does not stream; leave `stream` out, and {_STREAMS} to the page"
            )
        return url, body


@dataclass
class PromptLines:
    """Answers plain lines: `prompt` or `messages`, with `id`, `system_prompt`, `thinking`,
    `settings`, and fields of chat requests such as `response_format`, `stop` and `tools`."""

    state: State

    async def answer(self, line: Line) -> Answered:
        """Return {"id", "text", ...}, or {"id", "error"} for a line that cannot be answered."""
        name: Any = line.number
        try:
            raw = line.object()
            name = raw.get("id", line.number)
            asked = await asked_of(self.state, checked(ChatRequest, self._body(raw, line)))
            asked = replace(
                asked,
                options=replace(asked.options, thinking=self._thinks(raw)),
                settings=self._settings(raw, asked.settings, line),
            )
            answers = await start(self.state, asked)
            try:
                (written,) = await answers.whole()
            finally:
                answers.cancel()
        except (ApiError, DiffGemmaError) as error:
            told = error.message if isinstance(error, ApiError) else str(error)
            return Answered({"id": name, "error": told}, is_error=True)
        return Answered({"id": name} | _plain(written, answers, asked.settings.seed))

    def _body(self, raw: Mapping[str, Any], line: Line) -> dict[str, Any]:
        """Return a plain line as the body of a chat request."""
        where = f"line {line.number}"
        body = {key: value for key, value in raw.items() if key not in _PLAIN}
        if ("prompt" in raw) == ("messages" in raw):
            raise DataError(f"{where} needs a prompt or messages, one of the two")
        if "prompt" in raw:
            if not isinstance(raw["prompt"], str):
                raise DataError(f"{where}: the prompt must be text")
            body["messages"] = [{"role": "user", "content": raw["prompt"]}]
        for name in ("n", "stream"):
            if body.get(name) not in (None, 1, False):
                raise DataError(f"{where}: {name} has no meaning in a plain line")
        if (system := raw.get("system_prompt")) is not None:
            if not isinstance(system, str) or not isinstance(body["messages"], list):
                raise DataError(f"{where}: the system_prompt must be text")
            body["messages"] = [{"role": "system", "content": system}, *body["messages"]]
        return body

    def _thinks(self, raw: Mapping[str, Any]) -> bool:
        thinks = raw.get("thinking", self.state.thinking)
        if not isinstance(thinks, bool):
            raise DataError(f"thinking must be true or false, got {thinks!r}")
        return thinks

    def _settings(
        self, raw: Mapping[str, Any], settings: GenerationSettings, line: Line
    ) -> GenerationSettings:
        """Return the settings of a line. Without its own seed, it has that of the run plus its
        place."""
        own = raw.get("settings", {})
        if not isinstance(own, dict):
            raise DataError(f"line {line.number}: settings must be an object")
        known = GenerationSettings.__dataclass_fields__
        if unknown := [key for key in own if key not in known or key == "extra_eos_token_ids"]:
            raise DataError(f"line {line.number}: there is no setting {unknown[0]!r}")
        if raw.get("seed") is None and self.state.settings.seed is not None:
            own = {"seed": self.state.settings.seed + line.number - 1, **own}
        return replace(settings, **own)


def _plain(written: Written, answers: Answers, seed: int | None) -> dict[str, Any]:
    """Return a written answer as a plain object."""
    made: dict[str, Any] = {"text": written.text}
    if written.thought:
        made["thought"] = written.thought
    if written.calls:
        made["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in written.calls
        ]
    usage = answers.usage
    return made | {
        "finish_reason": written.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "new_tokens": usage.completion_tokens,
        "steps": usage.steps,
        "seed": seed,
    }


async def call(app: ASGIApp, method: str, url: str, body: bytes) -> tuple[int, bytes]:
    """Return status and body of an application's answer to a request, without a network."""
    path, _, query = url.partition("?")
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": None,
        "server": None,
    }
    status, content = 500, bytearray()
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    stays = asyncio.Event()  # never set

    async def receive() -> Message:
        if not asked:
            await stays.wait()  # the client waits for its answer
        return asked.pop()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            content.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, bytes(content)
