"""A run: its iteration in threads and event loops, its end, its errors."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time

import pytest

from mlx_diffgemma import Engine, stream_generate
from mlx_diffgemma.engine.run import END, Channel, Failure, Run
from mlx_diffgemma.errors import ThreadError
from tests.engine.cases import (
    LONG,
    PATIENCE,
    REQUESTS,
    alone,
    eventually,
    in_thread,
    is_idle,
    loaded,
    plain,
)
from tests.test_architecture import ROOT


@pytest.fixture(scope="module")
def engine():
    with Engine(*loaded()) as engine:
        yield engine


def made(*words, cancel=lambda channel: None) -> tuple[Channel, Run]:
    channel = Channel()
    for word in words:
        channel.put(word)
    return channel, Run(channel, cancel)


def test_events_come_in_order_and_the_end_stays():
    _, run = made(1, 2, END)
    assert [*run, *run] == [1, 2]


def test_an_error_is_raised_once_after_the_events_before_it():
    _, run = made(1, Failure(ValueError("no")), END)
    assert next(run) == 1
    with pytest.raises(ValueError, match=r"no"):
        next(run)
    assert list(run) == []


def test_a_reader_waits_for_what_comes_later():
    channel, run = made()
    threading.Timer(0.02, channel.put, ["late"]).start()
    assert next(run) == "late"
    with pytest.raises(TimeoutError, match=r"no event within 0.01 s"):
        channel.take(0.01)


def test_a_dropped_run_is_cancelled():
    cancelled = []
    channel, run = made(cancel=cancelled.append)
    assert not cancelled
    del run
    gc.collect()
    assert cancelled == [channel]


def test_event_loops_of_several_threads_wait_at_once():
    """Each event goes to one of them, and the end to all."""
    channel, run = made()
    heard: list[int] = []

    async def read() -> None:
        async for said in run:
            heard.append(said)

    async def read_twice() -> None:
        await asyncio.gather(read(), read())

    threads = [threading.Thread(target=asyncio.run, args=(read_twice(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(50):
        channel.put(number)
        if number % 10 == 0:
            time.sleep(0.005)  # so that all of them wait
    channel.put(END)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(heard) == list(range(50))


def test_a_wait_that_is_given_up_loses_nothing_and_its_closed_loop_harms_nobody():
    channel, run = made()

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run.__anext__(), 0.01)

    asyncio.run(give_up())
    channel.put("kept")  # wakes a future of a closed loop
    assert next(run) == "kept"


def test_a_run_is_read_with_async_for_beside_others(engine):
    async def events(request) -> list:
        return [plain(event) async for event in engine.submit(request)]

    async def together() -> list:
        return await asyncio.gather(*map(events, REQUESTS))

    assert in_thread(lambda: asyncio.run(together())) == [alone(r) for r in REQUESTS]


def test_a_run_of_one_thread_is_read_in_others(engine):
    """Also its arrays, which `plain` reads."""
    run = engine.submit(REQUESTS[2])
    events = [plain(next(run))]
    while (
        event := in_thread(lambda: plain(said) if (said := next(run, None)) else None)
    ) is not None:
        events.append(event)
    assert events == alone(REQUESTS[2])


@pytest.mark.parametrize("close", [Run.cancel, None])
def test_a_run_that_is_cancelled_or_dropped_ends_and_the_engine_is_free(engine, close):
    run = engine.submit(LONG)
    next(run)
    next(run)
    if close:
        close(run)
        assert len(list(run)) < 150  # what had been said already
    else:
        del run
    assert eventually(lambda: is_idle(engine))


def test_a_stream_without_an_engine_is_read_in_one_thread_and_says_so():
    stream = stream_generate(*loaded(), "Count from 12 to 40.")
    next(stream)
    error = in_thread(lambda: next(stream))
    assert isinstance(error, ThreadError)
    assert str(error) == (
        "a stream is read in the thread that began it, since MLX's streams belong to a thread; "
        "Engine runs requests of any thread"
    )
    assert list(stream) == []  # it has ended
    # Another thread may begin its own, and a stream may be closed anywhere.
    assert len(in_thread(lambda: list(stream_generate(*loaded(), "Sort: 9 8 7")))) > 3
    another = stream_generate(*loaded(), "Sort: 9 8 7")
    next(another)
    assert in_thread(another.close) is None


LEFT_OPEN = """
import threading
from mlx_diffgemma import Engine, GenerationSettings, Request, bundled_model, load
engine = Engine(*load(bundled_model()))
request = Request("Sort: 9 8 7", GenerationSettings(seed=1))
thread = threading.Thread(target=lambda: print(len(list(engine.submit(request))) > 3))
thread.start()
thread.join()
runs = [engine.submit(request) for _ in range(9)]
next(runs[0])
"""


def test_a_process_that_leaves_an_engine_open_and_busy_ends_well():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
