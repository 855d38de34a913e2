"""A request's run as its asker sees it: an iterator of events, sync or async, that can be
cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

END = object()


class Channel:
    """What a job says, on its way from the engine's thread to any other."""

    def __init__(self) -> None:
        self._words: deque[Any] = deque()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []  # wake those who wait in event loops
        self.is_cancelled = False

    def put(self, said: Any) -> None:
        """Add an event, a failure, or END, which comes last."""
        with self._changed:
            self._words.append(said)
            self._changed.notify_all()
            listeners, self._listeners = self._listeners, []
        for wake in listeners:
            wake()

    def take(self, timeout: float | None = None) -> Any:
        """Wait for the next word and return it; END stays.

        Raises:
          TimeoutError: if nothing came.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._words, timeout):
                raise TimeoutError(f"no event within {timeout} s")
            return self._next()

    async def take_later(self) -> Any:
        """As `take`, in an event loop."""
        while True:
            with self._changed:
                if self._words:
                    return self._next()
                loop = asyncio.get_running_loop()
                woken = loop.create_future()
                self._listeners.append(partial(_wake, loop, woken))
            await woken

    def _next(self) -> Any:
        return self._words[0] if self._words[0] is END else self._words.popleft()


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    def wake() -> None:
        if not woken.done():
            woken.set_result(None)

    with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
        loop.call_soon_threadsafe(wake)


class Run:
    """A request under way: iterate over its events, in any thread or with `async for`.

    An error of the request is raised where it is iterated. A run that is dropped is cancelled. The
    arrays of its events are computed; they may be read in any thread.
    """

    def __init__(self, channel: Channel, cancel: Callable[[Channel], None]) -> None:
        self._channel, self._cancel = channel, cancel

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> Any:
        if (said := self._heard(self._channel.take())) is END:
            raise StopIteration
        return said

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> Any:
        if (said := self._heard(await self._channel.take_later())) is END:
            raise StopAsyncIteration
        return said

    def cancel(self) -> None:
        """End the run within one step and free its memory; its iteration ends."""
        self._cancel(self._channel)

    def __del__(self) -> None:
        self._cancel(self._channel)

    def _heard(self, said: Any) -> Any:
        if isinstance(said, Failure):
            raise said.error
        return said


class Failure:
    """An error on its way to the asker."""

    def __init__(self, error: Exception) -> None:
        self.error = error
