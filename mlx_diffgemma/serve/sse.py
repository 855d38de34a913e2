"""Responses that end with their client: one JSON answer, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, form_of
from .pieces import Piece
from .runs import Answers, Usage, Written

T = TypeVar("T")
KEEP_ALIVE_SECONDS = 10.0
_FIRST_SECONDS = 1.0  # in which an error has its own status; then the stream begins
# Headers of a stream.
EVENTS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would collect the events
}


class ClientGoneError(Exception):
    """The client has closed its connection."""


class Wire(Protocol):
    """A dialect's stream of one request. Each method returns frames: see `frame`."""

    def begin(self) -> Iterable[bytes]:
        """What comes first."""

    def piece(self, index: int, piece: Piece) -> Iterable[bytes]:
        """What a piece of answer `index` becomes; PrefillDone and Finished are pieces too."""

    def keep_alive(self) -> Iterable[bytes]:
        """What is sent where nothing else was for a while."""

    def end(self, usage: Usage) -> Iterable[bytes]:
        """What comes last, once all answers are finished."""

    def error(self, error: ApiError) -> Iterable[bytes]:
        """What ends a stream that fails."""


def frame(data: Any, event: str | None = None) -> bytes:
    """Return an event of a stream.

    Args:
      data: a JSON value, or text that is sent as it is. Other than ASCII is escaped: clients split
        lines at what Unicode calls a line break.
      event: its name, where the dialect has names.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


async def attended(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of some work, which ends when the client goes.

    Raises:
      ClientGoneError: if it went first.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(
    request: Request,
    starting: Awaitable[Answers],
    made: Callable[[list[Written], Answers], Any],
    *,
    read_seconds: float | None = None,
    write_seconds: float | None = None,
) -> Response:
    """Return the whole answers as one JSON response.

    Args:
      request: the one that is answered.
      starting: of `runs.start`.
      made: makes the object of the written answers.
      read_seconds: as in `Answers.whole`.
      write_seconds: as in `Answers.whole`.

    Raises:
      ApiError: if the request or an answer fails.
      ClientGoneError: if the client goes first; its rows end.
    """

    async def work() -> Any:
        answers = await starting
        request.state.tally.usage = answers.usage
        try:
            seconds = {"read_seconds": read_seconds, "write_seconds": write_seconds}
            return made(await answers.whole(**seconds), answers)
        finally:
            answers.cancel()

    return JSONResponse(await attended(request.receive, work()))


class Stream(Response):
    """The answers as events. A failure before the first piece has its own status; a later one is
    told in the stream."""

    def __init__(
        self,
        request: Request,
        starting: Awaitable[Answers],
        wire: Callable[[Answers], Wire],
    ) -> None:
        """Make a response.

        Args:
          request: the one that is answered.
          starting: of `runs.start`.
          wire: makes the dialect's frames.
        """
        super().__init__()
        self._request, self._starting, self._wire = request, starting, wire
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await attended(receive, self._run(scope, send))

    async def _run(self, scope: Scope, send: Send) -> None:
        answers = await self._starting
        self._request.state.tally.usage = answers.usage
        wire, loop = self._wire(answers), asyncio.get_running_loop()
        due = loop.time() + _FIRST_SECONDS  # when something must be sent

        async def write(frames: Iterable[bytes]) -> None:
            nonlocal due
            if not (content := b"".join(frames)):
                return
            message = {"type": "http.response.body", "body": content, "more_body": True}
            await send(message)
            due = loop.time() + KEEP_ALIVE_SECONDS

        async def begin() -> None:
            nonlocal due
            self._has_begun, due = True, loop.time() + KEEP_ALIVE_SECONDS
            headers = [(k.lower().encode(), v.encode()) for k, v in EVENTS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await write(wire.begin())

        try:
            # Pieces may make no frame, such as those of a thought that is not shown.
            async for some in answers.pieces(lambda: max(0.0, due - loop.time())):
                if not self._has_begun:
                    await begin()
                await write(_frames(wire, some))
                if loop.time() >= due:
                    await write(wire.keep_alive())
            await write(wire.end(answers.usage))
        except ApiError as error:
            if not self._has_begun:
                raise
            self._request.state.tally.note = f"failed: {error.message}"
            await write(wire.error(error))
        finally:
            answers.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _frames(wire: Wire, pieces: list[tuple[int, Piece]]) -> Iterator[bytes]:
    for index, piece in pieces:
        yield from wire.piece(index, piece)


def error_response(path: str, error: ApiError) -> Response:
    """Return the response of an error in the form of a path's dialect."""
    return JSONResponse(form_of(path)(error), error.status, error.headers)
