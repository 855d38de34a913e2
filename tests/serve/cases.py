"""A real server in this process, and raw connections to it. Not a test."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma import Engine, GenerationSettings, Store
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve.app import application
from mlx_diffgemma.serve.security import Access
from mlx_diffgemma.serve.server import Server, listen, serve
from mlx_diffgemma.serve.state import Served, State
from tests.engine.cases import PATIENCE, loaded
from tests.write.test_tool_calls import TOKENIZER, Script

SORT = [{"role": "user", "content": "Sort: 6 3 1 7"}]
SORTED = "1 3 6 7"
COUNT = [{"role": "user", "content": "Count from 38 to 63."}]  # two canvases
COUNTED = " ".join(map(str, range(38, 64)))
# Two hundred steps on one canvas, unless it is stopped.
LONG = GenerationSettings(max_denoising_steps=200, stability_threshold=200)


@dataclass
class Running:
    """A server under way."""

    port: int
    state: State
    lines: list[str] = field(default_factory=list)  # of its log
    bugs: list[Exception] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def engine(self) -> Engine:
        return next(iter(self.state.models.values())).engine

    @property
    def steps(self) -> int:
        """Denoise steps of rows so far."""
        return int(self.state.metrics.count("steps_total"))


@contextmanager
def serving(
    *,
    model: tuple[Any, Any] | None = None,
    more: Mapping[str, tuple[Any, Any]] | None = None,
    limits: Limits = Limits(),
    access: Access = Access(),
    settings: GenerationSettings = GenerationSettings(),
    gate: threading.Event | None = None,
    **engine: Any,
) -> Iterator[Running]:
    """Run a server, by default with the bundled model as `bundled`. With a gate its models are
    loaded once that is open; otherwise they are there."""
    listening, ready, ended = listen("127.0.0.1", 0), threading.Event(), threading.Event()
    state = State(limits=limits, settings=settings)
    running = Running(listening.getsockname()[1], state)
    servers: list[Server] = []
    kept = {"store": Store(64 << 20), **engine} if model is None else engine

    def load() -> dict[str, Served]:
        assert gate is None or gate.wait(PATIENCE)
        models = {"bundled": model or loaded(), **(more or {})}
        return {
            name: Served(name, Engine(*each, memory_bytes=1 << 30, **kept))
            for name, each in models.items()
        }

    def on_ready(server: Server) -> None:
        servers.append(server)
        ready.set()

    def run() -> None:
        app = application(state, access, log=running.lines.append, on_bug=running.bugs.append)
        serve(app, state, listening, load, on_ready=on_ready, end_now=lambda: None)
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        if gate is None:
            assert ready.wait(PATIENCE)
        yield running
    finally:
        if gate is not None:
            gate.set()
        assert ready.wait(PATIENCE)
        loop = servers[0].loop
        loop.call_soon_threadsafe(servers[0].stop)
        assert ended.wait(PATIENCE), "the server does not end"
        thread.join(PATIENCE)


def scripted(*texts: str) -> tuple[Any, Any]:
    """A model that answers with these texts, one request after the other, and its tokenizer."""
    return Script(*texts), TOKENIZER


@contextmanager
def connected(running: Running, patience: float = PATIENCE) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), patience) as connection:
        yield connection


def post(path: str, body: Any, **headers: str) -> bytes:
    """A request as bytes. A header of None is left out."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def chat(messages: Any = SORT, **fields: Any) -> dict[str, Any]:
    return {"model": "bundled", "messages": messages, **fields}


@dataclass(frozen=True)
class Answered:
    """An answer, read to the end of its connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The values of a stream's events; "[DONE]" stays text."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        texts = [block.removeprefix("data: ") for block in blocks]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]


def read(connection: socket.socket) -> Answered:
    """Read an answer to the end of its connection."""
    content = b""
    while piece := connection.recv(65536):
        content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in rest}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Answered(int(first.split()[1]), headers, body)


def unchunked(content: bytes) -> bytes:
    body = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        body += content[: int(size, 16)]
        content = content[int(size, 16) + 2 :]
    return body


def ask(running: Running, request: bytes, patience: float = PATIENCE) -> Answered:
    """Send a request as it is, and read the answer."""
    with connected(running, patience) as connection:
        connection.sendall(request)
        return read(connection)


def ask_chat(running: Running, messages: Any = SORT, **fields: Any) -> Answered:
    return ask(running, post("/v1/chat/completions", chat(messages, **fields)))


def get(running: Running, path: str, **headers: str) -> Answered:
    request = post(path, b"", **headers).replace(b"POST", b"GET", 1)
    return ask(running, request)
