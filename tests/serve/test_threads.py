"""Work beside the event loop: few threads, a bounded queue, and clients that leave meanwhile."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from mlx_diffgemma import Constraint, GenerationSettings
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve.state import _COMPILERS
from mlx_diffgemma.serve.threads import Threads
from tests.engine.cases import PATIENCE, eventually
from tests.serve.cases import ask, chat, connected, get, post, read, scripted, serving

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1]}}, "additionalProperties": False}
FORM = {"type": "json_schema", "schema": SCHEMA}
MESSAGES = {"model": "bundled", "messages": [{"role": "user", "content": "x"}]}
TOOL = {"name": "f", "input_schema": {"type": "object"}, "strict": True}
CHAT = ("/v1/chat/completions", chat(constraint={"regex": "[ab]"}))
REQUESTS = [
    CHAT,
    ("/v1/completions", {"prompt": "x", "constraint": {"regex": "[ab]"}}),
    ("/v1/responses", {"input": "x", "text": {"format": {"name": "n", **FORM}}}),
    ("/v1/messages", {**MESSAGES, "max_tokens": 9, "output_config": {"format": FORM}}),
    ("/v1/messages/count_tokens", {**MESSAGES, "tools": [TOOL]}),
]


@dataclass
class Compiling:
    """Constraints that compile until they are let go."""

    begun: list[str] = field(default_factory=list)  # threads
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def compiling() -> Iterator[Compiling]:
    seen, originals = Compiling(), {}

    def held(original):
        def make(*args, **bounds):
            seen.begun.append(threading.current_thread().name)
            assert seen.go_on.wait(PATIENCE)
            return original(*args, **bounds)

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in ("regex", "json_schema", "tool_call"):
            originals[name] = getattr(Constraint, name)
            patch.setattr(Constraint, name, staticmethod(held(originals[name])))
        try:
            yield seen
        finally:
            seen.go_on.set()


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_client_that_leaves_while_its_constraint_compiles_is_noticed(path, body):
    with serving(model=scripted("a")) as running, compiling() as seen:
        with connected(running) as connection:
            connection.sendall(post(path, body))
            assert eventually(lambda: seen.begun or running.lines) and seen.begun, running.lines
        assert eventually(lambda: bool(running.lines)), running.lines
        assert "went away" in running.lines[0] and not seen.go_on.is_set()


def served(*texts, **more):
    return serving(
        model=scripted(*texts), settings=GenerationSettings(max_denoising_steps=2), **more
    )


def test_clients_that_come_and_go_make_no_more_threads():
    with served("a") as running, compiling() as seen:
        before = threading.active_count()
        for number in range(3 * _COMPILERS):
            with connected(running) as connection:
                begun = len(seen.begun)
                connection.sendall(post(*CHAT))
                assert eventually(lambda n=begun: _taken(running, seen) > n)  # begun, or it waits
            assert len(seen.begun) == min(number + 1, _COMPILERS)
            assert eventually(lambda n=number: len(running.lines) == n + 1)
        with connected(running) as connection:
            connection.sendall(post(*CHAT))
            assert get(running, "/health").status == 200
            assert len(seen.begun) == _COMPILERS  # of clients that have left
            assert threading.active_count() <= before + _COMPILERS
            seen.go_on.set()
            assert read(connection).json["choices"][0]["message"]["content"] == "a"
        # What waited for a client that has left was not begun.
        assert len(seen.begun) == _COMPILERS + 1


def test_a_full_queue_is_told():
    with ExitStack() as stack:
        limits = Limits(max_waiting=2)
        running = stack.enter_context(served(*"aaaa", limits=limits, max_rows=1))
        with compiling() as seen:
            waiting = [stack.enter_context(connected(running)) for _ in range(_COMPILERS + 2)]
            for number, connection in enumerate(waiting):
                connection.sendall(post(*CHAT))
                assert eventually(lambda n=number: _taken(running, seen) == n + 1)
            answer = ask(running, post(*CHAT))
            assert (answer.status, answer.error["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) > 0
            seen.go_on.set()
            assert [read(connection).status for connection in waiting] == [200] * 4


def _taken(running, seen: Compiling) -> int:
    return len(seen.begun) + running.state.compilers._waiting


def test_an_error_that_nobody_waits_for_any_more_is_not_logged():
    """asyncio reports an exception that was never looked at when its task is freed."""
    reported, go_on = [], threading.Event()

    def fail():
        assert go_on.wait(PATIENCE)
        raise ValueError("for nobody")

    async def leave():
        asyncio.get_running_loop().set_exception_handler(lambda _, told: reported.append(told))
        threads = Threads(1, 1, "nothing")
        waiting = asyncio.ensure_future(threads.run(fail))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        assert await threads.run(lambda: 7) == 7, "the place is free again"
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert not reported
