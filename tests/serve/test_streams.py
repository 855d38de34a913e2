"""Answers byte by byte: the order of a stream's events, clients that go, and slow ones."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from mlx_diffgemma import GenerationSettings
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.events import Finished, Text
from mlx_diffgemma.serve import server as server_module
from mlx_diffgemma.serve import sse
from mlx_diffgemma.serve.pieces import Draft, Expired, Outbox
from tests.engine.cases import eventually, held, is_idle
from tests.sampled import first
from tests.serve.cases import (
    COUNT,
    COUNTED,
    LONG,
    SORTED,
    ask_chat,
    chat,
    connected,
    get,
    post,
    read,
    scripted,
    serving,
)

PATH = "/v1/chat/completions"
WHOLE = {"include_usage": True}


def deltas(events) -> list[dict]:
    chunks = [event for event in events if event != "[DONE]" and event["choices"]]
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def text_of(events) -> str:
    return "".join(delta.get("content", "") for delta in deltas(events))


def test_the_order_of_a_stream(server):
    answer = ask_chat(server, stream=True, stream_options=WHOLE)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    begin, *middle, end, usage, done = answer.events
    assert begin["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(middle) == SORTED
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] > 0
    assert done == "[DONE]"
    standard = {"id", "object", "created", "model", "choices"}
    for event in (begin, *middle, end):
        assert set(event) == standard and event["object"] == "chat.completion.chunk"
    assert set(usage) == {*standard, "usage"}
    assert answer.body.isascii()  # clients split lines at U+2028


def test_text_other_than_ascii_is_escaped():
    with serving(model=scripted("é\u2028🙂")) as running:
        answer = ask_chat(running, stream=True)
    assert answer.body.isascii() and text_of(answer.events) == "é\u2028🙂"


def test_without_the_option_there_is_no_usage_chunk(server):
    events = ask_chat(server, stream=True).events
    assert all(event == "[DONE]" or event["choices"] for event in events)


def test_keep_alive_is_a_chunk_with_an_empty_delta(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(sse, "_FIRST_SECONDS", 0.02)
    settings = GenerationSettings(max_denoising_steps=30, stability_threshold=30)
    with serving(settings=settings) as running:
        answer = ask_chat(running, stream=True, max_tokens=64)
    begin, *middle, _, _ = answer.events
    empty = [event for event in middle if event["choices"][0]["delta"] == {}]
    assert begin["choices"][0]["delta"]["role"] == "assistant" and len(empty) > 2
    assert all(event["choices"][0]["finish_reason"] is None for event in empty)
    assert text_of(answer.events) == SORTED


def test_an_error_before_the_first_piece_has_its_own_status(server):
    answer = ask_chat(server, [{"role": "user", "content": "x" * 3000}], stream=True)
    assert answer.status == 400 and answer.error["param"] == "messages"


def test_an_error_in_a_stream_is_its_last_event(monkeypatch):
    with serving(model=scripted("a" * 40)) as running:
        encode = type(running.engine.model).encode
        calls = []

        def failing(self, pieces, contexts, images, **more):
            calls.append(1)
            if len(calls) == 3:
                raise ConfigError("no more")
            return encode(self, pieces, contexts, images, **more)

        monkeypatch.setattr(type(running.engine.model), "encode", failing)
        answer = ask_chat(running, stream=True)
        assert answer.status == 200
        *_, last = answer.events
        assert set(last) == {"error"} and last["error"]["type"] == "server_error"
        assert "no more" not in str(last)
        assert eventually(lambda: any("failed" in line for line in running.lines))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("number", first(2, range(100)))
def test_a_client_that_goes_ends_its_row_within_a_step(gone, number, stream):
    gone.lines.clear()
    before = gone.steps
    with connected(gone) as connection:
        connection.sendall(post(PATH, chat(COUNT, stream=stream, seed=number)))
        assert eventually(lambda: gone.steps > before)
        assert gone.engine.counts["rows"] == 1 and not gone.lines
    # Its line is written once the row is told to end.
    assert eventually(lambda: bool(gone.lines))
    told = gone.steps
    assert eventually(lambda: is_idle(gone.engine))
    assert gone.steps - told <= 1
    assert "went away" in gone.lines[0]
    assert gone.steps - before < 150  # of two hundred


@pytest.fixture(scope="module")
def gone():
    with serving(settings=LONG) as running:
        yield running


def test_a_client_that_goes_while_it_waits_is_dropped():
    with serving(settings=LONG, max_rows=1) as running:
        with connected(running) as held:
            held.sendall(post(PATH, chat(COUNT)))
            assert eventually(lambda: running.engine.counts["rows"] == 1)
            with connected(running) as waiting:
                waiting.sendall(post(PATH, chat(COUNT)))
                assert eventually(lambda: running.engine.counts["waiting"] == 1)
            assert eventually(lambda: running.engine.counts["waiting"] == 0)
            assert running.engine.counts["rows"] == 1  # the other one goes on
        assert eventually(lambda: is_idle(running.engine))


def test_a_slow_client_gets_all_settled_text(server):
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post(PATH, chat(COUNT, stream=True, diffusing=True)))
        assert eventually(lambda: server.engine.counts["running"] == 1)
        assert eventually(lambda: is_idle(server.engine))  # it has read nothing yet
        events = read(connection).events
    assert deltas(events)[-2]["content"] == COUNTED
    assert events[-1] == "[DONE]"


def test_a_client_that_reads_nothing_is_closed_in_the_end(monkeypatch):
    big = 300 * "0123456789"
    limits = Limits(send_seconds=0.3, max_connections=1)
    with serving(limits=limits, model=scripted(big)) as running, connected(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        monkeypatch.setattr(sse, "frame", _large)
        monkeypatch.setattr("mlx_diffgemma.serve.openai_types.frame", _large)
        connection.sendall(post(PATH, chat(stream=True, diffusing=True)))
        assert eventually(lambda: bool(running.lines))
        assert eventually(lambda: is_idle(running.engine))
        assert "went away" in running.lines[-1]
        # Nor does it count any more, though it is still there.
        assert eventually(lambda: _is_open(running))


def test_a_client_that_does_not_read_a_whole_answer_is_closed_in_the_end():
    limits = Limits(send_seconds=0.3, max_connections=1)
    with serving(limits=limits, model=scripted("x")) as running, connected(running) as connection:
        running.state.metrics.text = lambda gauges: "x" * 20_000_000
        connection.sendall(post("/metrics", b"").replace(b"POST", b"GET", 1))
        assert eventually(lambda: bool(running.lines)) and " 200 " in running.lines[0]
        assert not _is_open(running)
        assert eventually(lambda: _is_open(running))


def test_a_client_that_reads_slowly_is_not_closed():
    size = 20_000_000
    with serving(limits=Limits(send_seconds=0.5), model=scripted("x")) as running:
        running.state.metrics.text = lambda gauges: "x" * size
        with connected(running) as connection:
            connection.sendall(post("/metrics", b"").replace(b"POST", b"GET", 1))
            content, start = 0, time.monotonic()
            while piece := connection.recv(1_000_000):
                content += len(piece)
                if time.monotonic() - start < 1.5:
                    time.sleep(0.1)
    assert content > size


def _is_open(running) -> bool:
    """Whether another connection is served."""
    with connected(running) as connection:
        connection.sendall(post("/health", b"").replace(b"POST", b"GET", 1))
        try:
            return connection.recv(12) == b"HTTP/1.1 200"
        except ConnectionResetError:
            return False


def _large(data, event=None) -> bytes:
    return b"data: " + b"x" * 2_000_000 + b"\n\n"


def test_one_connection_serves_many_requests(server):
    request = post(PATH, chat(), Connection="keep-alive")
    with connected(server) as connection:
        connection.sendall(request + request)  # pipelined
        connection.sendall(post(PATH, chat()))
        content = b""
        while piece := connection.recv(65536):
            content += piece
    assert content.count(b"HTTP/1.1 200 OK") == 3


def test_a_second_answer_may_take_longer_than_a_head():
    with serving(limits=Limits(header_seconds=0.2), model=scripted("ok")) as running:
        first = post("/health", b"", Connection="keep-alive").replace(b"POST", b"GET", 1)
        with connected(running) as connection:
            with held(running.engine):
                connection.sendall(first + post(PATH, chat()))  # pipelined
                assert eventually(lambda: running.engine.counts["waiting"] == 1)
                time.sleep(0.5)
            answers = _rest(connection)
        assert answers.count(b"HTTP/1.1 200 OK") == 2 and b'"content":"ok"' in answers


def test_a_connection_may_idle_longer_than_a_head_takes(monkeypatch):
    monkeypatch.setattr(server_module, "_IDLE_SECONDS", 1)
    request = post("/health", b"", Connection="keep-alive").replace(b"POST", b"GET", 1)
    limits = Limits(header_seconds=0.2)
    with serving(limits=limits, model=scripted("x")) as running, connected(running) as connection:
        for _ in range(2):
            connection.sendall(request)
            assert connection.recv(12) == b"HTTP/1.1 200"
            time.sleep(0.5)
            connection.recv(65536)
        assert b"HTTP" not in _rest(connection)  # it is closed in the end


@pytest.mark.parametrize("half", [b"GET /hea", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
@pytest.mark.parametrize("pipelined", [True, False])
def test_a_slow_second_head_is_given_up(half, pipelined):
    request = post("/health", b"", Connection="keep-alive").replace(b"POST", b"GET", 1)
    limits = Limits(header_seconds=0.3)
    with serving(limits=limits, model=scripted("x")) as running, connected(running) as connection:
        connection.sendall(request + half if pipelined else request)
        assert connection.recv(12) == b"HTTP/1.1 200"
        start = time.monotonic()
        if not pipelined:
            connection.sendall(half)
        _rest(connection)
        assert 0.2 < time.monotonic() - start < 5


def _rest(connection: socket.socket) -> bytes:
    content = b""
    while piece := connection.recv(65536):
        content += piece
    return content


def test_the_log_has_a_line_for_each_request():
    with serving(model=scripted("ok", "ok")) as running:
        for number, act in enumerate(
            (
                lambda: ask_chat(running),
                lambda: ask_chat(running, stream=True),
                lambda: get(running, "/health"),
                lambda: get(running, "/%1b%5b31m%0d%0aforged"),
            )
        ):
            act()
            assert eventually(lambda n=number: len(running.lines) > n)
        lines = running.lines
    for line in lines[:2]:
        words = line.split()
        assert words[:3] == ["POST", PATH, "200"] and words[-1] == "ms"
        assert (words[4], words[6]) == ("tokens", "steps")
    assert lines[2].startswith("GET /health 200")
    assert lines[3].isprintable() and " 404 " in lines[3]


def test_metrics_count_what_was_done():
    with serving(model=scripted("ok", "ok")) as running:
        usage = [ask_chat(running).json["usage"] for _ in range(2)]
        text = get(running, "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    name = "mlx_diffgemma_{}".format
    steps = sum(each["diffusion"]["steps"] for each in usage)
    assert int(values[name("steps_total")]) == steps
    tokens = sum(each["completion_tokens"] for each in usage)
    assert int(values[name("completion_tokens_total")]) == tokens
    assert int(values[name("prompt_tokens_total")]) == 2 * usage[0]["prompt_tokens"]
    assert values[name(f'requests_total{{route="{PATH}",status="200"}}')] == "2"
    assert values[name("queue")] == values[name("rows")] == "0"


# The box between engine and connection


def finished() -> Finished:
    return Finished("stop", 1, 1, 1, 1)


async def taken(box: Outbox):
    return await box.take(1)


def box_of(*pieces):
    async def fill():
        box = Outbox()
        for index, piece in pieces:
            box.put(index, piece)
        return await taken(box)

    return asyncio.run(fill())


def test_the_box_keeps_the_last_draft_alone():
    one, two, other = Draft("a", ""), Draft("b", ""), Draft("c", "")
    assert box_of((0, one), (0, two)) == [(0, two)]
    assert box_of((0, one), (1, other), (0, two)) == [(1, other), (0, two)]
    assert box_of((0, one), (0, Text("x", "answer"))) == [(0, Text("x", "answer"))]


def test_the_end_of_a_time_limit_leaves_the_last_draft():
    draft, over = Draft("a", ""), Expired()
    assert box_of((0, draft), (0, over)) == [(0, draft), (0, over)]


def test_the_box_joins_settled_text_and_drops_none():
    a, b, thought = Text("a", "answer"), Text("b", "answer"), Text("t", "thought")
    assert box_of((0, a), (0, b)) == [(0, Text("ab", "answer"))]
    assert box_of((0, a), (0, thought), (0, b)) == [(0, a), (0, thought), (0, b)]
    end = finished()
    found = box_of((0, a), (1, a), (0, Draft("x", "")), (1, b), (0, b), (0, end))
    texts = {0: "", 1: ""}
    for index, piece in found:
        texts[index] += piece.piece if isinstance(piece, Text) else ""
    assert texts == {0: "ab", 1: "ab"} and found[-1] == (0, end)


def test_the_box_says_when_nothing_came():
    async def wait():
        return await Outbox().take(0.01)

    assert asyncio.run(wait()) == []
