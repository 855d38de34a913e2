"""Work beside the event loop, in a few threads with a bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from ..errors import QueueFullError

T = TypeVar("T")


class Threads:
    """Runs functions in a few threads at a time.

    A thread cannot be ended. One whose client has left keeps its place until it is done, so that
    clients that come and go make no more of them; a function that still waits is dropped.
    """

    def __init__(self, most: int, most_waiting: int, what: str) -> None:
        """Make it; nothing runs yet.

        Args:
          most: threads at a time.
          most_waiting: functions that may wait for one.
          what: they do, for errors.
        """
        self._limiter, self._free = CapacityLimiter(most), asyncio.Semaphore(most)
        self._most_waiting, self._what = most_waiting, what
        self._waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Return what a function returns. Only from the event loop.

        Raises:
          QueueFullError: if too many wait.
        """
        if self._free.locked() and self._waiting >= self._most_waiting:
            raise QueueFullError(
                f"{self._waiting} requests wait for {self._what} already; try again later"
            )
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        # The end of the event loop alone leaves a thread behind.
        doing = asyncio.ensure_future(
            to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
        )
        doing.add_done_callback(self._done)
        await asyncio.wait({doing})  # which leaves it alone when it is cancelled itself
        return doing.result()

    def _done(self, doing: asyncio.Future[T]) -> None:
        self._free.release()
        if not doing.cancelled():
            doing.exception()  # or asyncio logs an error that nobody waited for any more
