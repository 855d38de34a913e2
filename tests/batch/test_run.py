"""Many lines at once: answers come in order, and no more is under way than was asked for."""

from __future__ import annotations

import asyncio
import random

import pytest

from mlx_diffgemma.batch.lines import Line
from mlx_diffgemma.batch.run import Answered, run_lines


def numbered(count: int):
    return (Line(n, b"{}") for n in range(1, count + 1))


@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_answers_are_written_in_order_whenever_they_are_ready(at_once):
    rng, under_way, most, written, finished = random.Random(1), 0, 0, [], []

    async def work(line: Line) -> Answered:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(rng.random() / 200)
        under_way -= 1
        finished.append(line.number)
        return Answered({"n": line.number})

    run_lines(numbered(40), work, lambda a: written.append(a.answer["n"]), at_once=at_once)
    assert written == [*range(1, 41)]
    assert most == min(at_once, 40)
    assert (finished == written) == (at_once == 1)


def test_lines_are_read_only_as_they_are_needed():
    read, written = [], []

    def lines():
        for line in numbered(10):
            read.append(line.number)
            yield line

    async def work(line: Line) -> Answered:
        await asyncio.sleep(0)
        return Answered({})

    def write(_: Answered) -> None:
        written.append(len(read))

    run_lines(lines(), work, write, at_once=2)
    assert all(count <= at + 3 for at, count in enumerate(written))


@pytest.mark.parametrize("error", [RuntimeError("of work"), KeyboardInterrupt()])
def test_an_error_ends_the_others_and_keeps_what_is_written(error):
    written, cancelled = [], []

    async def work(line: Line) -> Answered:
        if line.number == 3:
            raise error
        try:
            await asyncio.sleep(0.001 if line.number < 3 else 60)
        except asyncio.CancelledError:
            cancelled.append(line.number)
            raise
        return Answered({"n": line.number})

    with pytest.raises(type(error)):
        run_lines(numbered(9), work, lambda a: written.append(a.answer["n"]), at_once=4)
    assert written in ([1, 2], []) and not {1, 2} & {*written} & {*cancelled}
