"""Answering many lines at once, and writing the answers in the order of the lines."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .lines import Line


@dataclass(frozen=True, slots=True)
class Answered:
    """What is written for a line."""

    answer: dict[str, Any]
    is_error: bool = False


def run_lines(
    lines: Iterator[Line],
    work: Callable[[Line], Awaitable[Answered]],
    write: Callable[[Answered], None],
    *,
    at_once: int,
) -> None:
    """Answer lines and write the answers in their order.

    Args:
      lines: what to answer; read as they are needed.
      work: answers one; its own mistakes are answers too.
      write: takes each answer, in order.
      at_once: lines that are under way, or wait for an earlier one to be written.
    """
    asyncio.run(_run(lines, work, write, at_once))


async def _run(
    lines: Iterator[Line],
    work: Callable[[Line], Awaitable[Answered]],
    write: Callable[[Answered], None],
    at_once: int,
) -> None:
    under_way: deque[asyncio.Future[Answered]] = deque()
    try:
        while True:
            while len(under_way) < at_once and (line := next(lines, None)) is not None:
                under_way.append(asyncio.ensure_future(work(line)))
            if not under_way:
                return
            write(await under_way[0])
            under_way.popleft()
    finally:
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
