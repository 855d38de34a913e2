"""The HTTP server: connections with bounds, models that load while it listens, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import h11
import mlx.core as mx
import uvicorn
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..config.serving import Limits
from ..errors import ConfigError, DiffGemmaError
from .errors import ApiError, openai_form
from .state import Served, State

_END_SECONDS = 0.7  # in which connections must take their last words
_CLOSE_SECONDS = 0.7  # in which the engines' last step must end
_IDLE_SECONDS = 60  # for which a connection may wait for its next request
_BACKLOG = 128
_HEAD_BYTES = 65_536  # of a request's line and headers


def protocol(limits: Limits) -> type[H11Protocol]:
    """Return the protocol of a connection: uvicorn's, with bounds on the number of connections, on
    the time in which a request's head must arrive, and on that for which a client may read
    nothing."""

    class Connection(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None  # while a head is waited for
        _reader_timer: asyncio.TimerHandle | None = None  # while the client does not read

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # or an unread end would be no pause
            if len(self.connections) > limits.max_connections:
                transport.close()
            self._time_head()

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._head_timer)
            _stop(self._reader_timer)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.trailing_data[0]:  # a part of the next head; without it, the client idles
                self._time_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._time_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._reader_timer)

        def send_400_response(self, msg: str) -> None:
            error = ApiError(400, f"this is no HTTP request: {msg}", code="invalid_http")
            body = bytes(JSONResponse(openai_form(error)).body)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            with contextlib.suppress(h11.LocalProtocolError):  # an answer is under way already
                response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _time_head(self) -> None:
            """Close the connection unless a head arrives in time."""
            if self.cycle is not None and not self.cycle.response_complete:
                _stop(self._head_timer)
                self._head_timer = None
            elif self._head_timer is None and not self.transport.is_closing():
                wait = limits.header_seconds
                self._head_timer = self.loop.call_later(wait, self.transport.close)

        def _time_reader(self) -> None:
            """Drop the connection unless the client reads something in time. Closed, it would wait
            until all is read."""
            unread = self.transport.get_write_buffer_size()

            def check() -> None:
                if self.transport.get_write_buffer_size() < unread:
                    self._time_reader()
                else:
                    self.transport.abort()

            self._reader_timer = self.loop.call_later(limits.send_seconds, check)

    return Connection


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """A server that ends in order: the first Ctrl-C lets rows finish their step and answers
    requests with 503, the second one does not wait."""

    def __init__(self, config: uvicorn.Config, state: State, end_now: Callable[[], None]) -> None:
        super().__init__(config)
        self._state, self._end_now = state, end_now
        self.loop: asyncio.AbstractEventLoop | None = None  # once it runs

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        self.loop = loop = asyncio.get_running_loop()
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        for number in numbers:
            loop.add_signal_handler(number, self._asked_to_end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _asked_to_end(self) -> None:
        if self.should_exit:
            self._end_now()
        self.stop()

    def stop(self) -> None:
        """End in order. Only from the event loop's thread."""
        self._state.end()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
      host: an address, or a name of this machine.
      port: 0 for any free one.

    Raises:
      ConfigError: if that is not possible.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason: object = error
        if isinstance(error, OSError) and error.strerror:
            number = error.errno or 0  # below 0 it is the resolver's
            reason = os.strerror(number) if number > 0 else error.strerror
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}") from None


def serve(
    app: Any,
    state: State,
    listening: socket.socket,
    load: Callable[[], Mapping[str, Served]],
    *,
    on_ready: Callable[[Server], None],
    end_now: Callable[[], None],
) -> bool:
    """Serve until somebody asks to end. Models are loaded while the server listens already.

    Args:
      app: of `app.application`.
      state: of the application; gets the models.
      listening: of `listen`.
      load: returns the models by name; called in a thread of its own.
      on_ready: called in the event loop once they are there.
      end_now: ends the program at once, at the second Ctrl-C.

    Returns:
      Whether all threads have ended; otherwise the program should leave without waiting for them.

    Raises:
      DiffGemmaError: if loading fails.
    """
    config = uvicorn.Config(
        app,
        http=protocol(state.limits),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_END_SECONDS,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=_HEAD_BYTES,
        backlog=_BACKLOG,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server, failures = Server(config, state, end_now), []

    def loading(loop: asyncio.AbstractEventLoop) -> None:
        try:
            state.models = load()
        except DiffGemmaError as error:
            failures.append(error)
        finally:
            mx.clear_streams()  # of this thread, or the process aborts when it ends
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(ready)

    def ready() -> None:
        if failures or not state.models:
            server.stop()
        elif not state.is_ending:
            on_ready(server)

    async def main() -> None:
        loader.start()
        await server.serve(sockets=[listening])

    runner = asyncio.Runner()
    loader = threading.Thread(
        target=lambda: loading(runner.get_loop()), name="mlx_diffgemma loader", daemon=True
    )
    with runner:
        runner.run(main())
    loader.join(0.01)
    if failures:
        raise failures[0]
    return _close(state) and not loader.is_alive()


def _close(state: State) -> bool:
    """Close the engines; return whether they have ended in time."""
    end = time.monotonic() + _CLOSE_SECONDS
    closing = [
        threading.Thread(target=lambda e=served.engine: e.close(cancel=True), daemon=True)
        for served in state.models.values()
    ]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in closing)
