"""Who may ask, and how much: each guard of the server is seen from outside."""

from __future__ import annotations

import asyncio
import hmac
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

from mlx_diffgemma import Constraint
from mlx_diffgemma.cli.options import app_of
from mlx_diffgemma.cli.serve import AddressOptions, ServedOptions
from mlx_diffgemma.cli.serve import serve as command
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.serve.security import Access
from tests.engine.cases import eventually
from tests.serve.cases import (
    SORTED,
    ask,
    ask_chat,
    chat,
    connected,
    get,
    post,
    read,
    scripted,
    serving,
)

KEY = "a key of this test"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def locked():
    access = Access(KEY, ("box.example",), ("https://chat.example",))
    with serving(access=access) as running:
        yield running
        assert not running.bugs


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# The address


def test_the_default_address_is_of_this_machine_alone():
    assert AddressOptions().host == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "box.example", "::"])
def test_another_address_needs_a_key_or_the_word_insecure(host):
    with pytest.raises(ConfigError, match="--insecure"):
        AddressOptions(host=host).access()
    assert AddressOptions(host=host, api_key=KEY).access().key == KEY
    assert AddressOptions(host=host, insecure=True).access().key is None
    with pytest.raises(ConfigError, match="empty"):
        AddressOptions(host=host, api_key=" ").access()


def test_the_command_refuses_the_network_without_a_key_before_it_loads():
    ran = CliRunner().invoke(app_of(command), ["--host", "0.0.0.0"])
    assert ran.exit_code == 2 and "--api-key" in ran.output


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("a key of this tesT"),
        bearer(""),
        bearer(f"{KEY}x"),
        {"Authorization": f"Basic {KEY}"},
        {"x-api-key": "wrong"},
        bearer("k\xfcche"),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/metrics", "/nothing"])
def test_without_the_key_every_route_but_health_is_closed(locked, path, headers):
    answer = get(locked, path, **headers)
    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.error["type"] == "authentication_error"


@pytest.mark.parametrize(
    "headers", [bearer(KEY), {"x-api-key": KEY}, {"Authorization": f"bearer {KEY}"}]
)
def test_the_key_opens_the_server_in_both_spellings(locked, headers):
    assert get(locked, "/v1/models", **headers).status == 200


def test_health_needs_no_key(locked):
    assert get(locked, "/health").json == {"status": "ok"}


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    compared, original = [], hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    get(locked, "/v1/models", **bearer("x"))
    assert compared == [(32, 32)]  # whatever the key's length


def test_keys_are_never_logged(locked):
    get(locked, f"/v1/models?key={KEY.replace(' ', '+')}", **bearer(KEY))
    get(locked, "/v1/models", **bearer("a wrong key"))
    assert KEY not in repr(Access(KEY))
    assert not [line for line in locked.lines if "key of" in line or "key+of" in line]
    assert not [line for line in locked.lines if "a wrong key" in line]


# Hosts and origins


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "a b",
        "x@localhost",
        "localhost/x",
    ],
)
def test_the_name_of_another_host_is_refused(locked, host):
    answer = get(locked, "/v1/models", Host=host, **bearer(KEY))
    assert answer.status in (400, 403) and answer.error["code"] == "invalid_host"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "[::1]:8080", "box.example", "10.0.0.7"]
)
def test_addresses_and_allowed_names_are_taken(locked, host):
    assert get(locked, "/v1/models", Host=host, **bearer(KEY)).status == 200


def test_a_request_without_a_host_is_refused(locked):
    """Of HTTP/1.0, which may leave it out."""
    request = post(PATH, b"", Host=None, **bearer(KEY)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    answer = ask(locked, request)
    assert answer.status == 400 and answer.error["code"] == "invalid_host"


def test_two_hosts_are_refused(locked):
    request = post(PATH, b"", **bearer(KEY)).replace(b"\r\n", b"\r\nHost: localhost\r\n", 1)
    assert ask(locked, request).status == 400


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "x"]
)
def test_pages_of_other_sites_are_refused(locked, origin):
    answer = get(locked, "/v1/models", Origin=origin, **bearer(KEY))
    assert answer.status == 403 and answer.error["code"] == "invalid_origin"
    assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_page_and_allowed_pages_may_ask(locked):
    own = f"127.0.0.1:{locked.port}"
    assert get(locked, "/v1/models", Host=own, Origin=f"http://{own}", **bearer(KEY)).status == 200
    allowed = get(locked, "/v1/models", Origin="https://chat.example", **bearer(KEY))
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"


def test_a_page_may_not_ask_whether_it_may(server):
    request = post(PATH, b"", Origin="https://evil.example", Access_Control_Request_Method="POST")
    answer = ask(server, request.replace(b"POST", b"OPTIONS", 1))
    assert answer.status == 403 and "access-control-allow-origin" not in answer.headers


# Sizes and times


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read():
    with serving(limits=Limits(max_body_mb=0.01), model=scripted("x")) as running:
        request = post(PATH, b"{", Content_Length="10001")
        answer = ask(running, request)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert ask(running, post(PATH, b"{", Content_Length="9" * 30)).status in (400, 413)


def test_a_body_that_is_too_large_in_pieces_is_refused():
    piece = b"400\r\n" + b" " * 1024 + b"\r\n"
    with serving(limits=Limits(max_body_mb=0.01), model=scripted("x")) as running:
        head = post(PATH, b"", Content_Length=None, Transfer_Encoding="chunked")
        answer = ask(running, head + piece * 10)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")


def test_a_body_of_the_most_bytes_is_read():
    with serving(limits=Limits(max_body_mb=0.01), model=scripted("x")) as running:
        content = post(PATH, chat()).partition(b"\r\n\r\n")[2]
        assert ask(running, post(PATH, content.ljust(10_000))).status == 200


def test_a_slow_body_is_given_up():
    with serving(limits=Limits(body_seconds=0.3), model=scripted("x")) as running:
        with connected(running) as connection:
            content, start = post(PATH, chat()), time.monotonic()
            for byte in content[:-4]:
                connection.sendall(bytes([byte]))
            answer = read(connection)
        assert (answer.status, answer.error["code"]) == (408, "slow_body")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("beginning", [b"", b"POST", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_slow_head_is_given_up(beginning):
    limits = Limits(header_seconds=0.3)
    with serving(limits=limits, model=scripted("x")) as running, connected(running) as connection:
        start, is_closed = time.monotonic(), False
        connection.sendall(beginning)
        connection.settimeout(0.1)
        while not is_closed and time.monotonic() - start < 10:
            try:
                connection.sendall(b"x" * bool(beginning))  # bytes do not buy time
                is_closed = connection.recv(100) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                is_closed = True
        assert is_closed and time.monotonic() - start > 0.2


def test_bytes_of_a_head_buy_no_time(monkeypatch):
    """The clock of a head is started once, however many pieces it comes in."""
    limits, clocks, original = Limits(header_seconds=77.7), [], asyncio.BaseEventLoop.call_later

    def call_later(self, delay, *given, **more):
        clocks.extend([delay] * (delay == limits.header_seconds))
        return original(self, delay, *given, **more)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_later", call_later)
    with serving(limits=limits, model=scripted("x")) as running, connected(running) as connection:
        for byte in post(PATH, b"x"):
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
        assert read(connection).status == 400
    assert clocks == [77.7]


def test_a_head_without_end_is_refused(server):
    with connected(server) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"X: " + b"y" * 200_000)
            assert read(connection).status == 400
        except ConnectionError:
            pass  # it was closed before everything was sent
    assert get(server, "/health").status == 200


def test_connections_are_bounded():
    with serving(limits=Limits(max_connections=2), model=scripted("x")) as running:
        with connected(running), connected(running):
            assert eventually(lambda: _is_closed(running))
        assert eventually(lambda: get(running, "/health").status == 200)


def _is_closed(running) -> bool:
    with connected(running) as connection:
        connection.settimeout(0.5)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True


SMALL = Limits(
    max_messages=2,
    max_parts=2,
    max_tools=1,
    max_choices=1,
    max_stops=1,
    max_stop_characters=3,
    max_schema_kb=0.2,
    max_schema_depth=4,
    max_schema_states=50,
)
TOOL = {"type": "function", "function": {"name": "f"}}
DEEP = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
USER = {"role": "user", "content": "x"}


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


PART = {"type": "text", "text": "x"}
LENGTHY = {"type": "string", "minLength": 60, "maxLength": 60}
SCHEMA = "response_format.json_schema.schema"
TOO_MUCH = [
    ({"messages": [USER] * 3}, "messages"),
    ({"messages": [{"role": "user", "content": [PART] * 3}]}, "messages[0].content"),
    ({"tools": [TOOL, {"type": "function", "function": {"name": "g"}}]}, "tools"),
    ({"n": 2}, "n"),
    ({"stop": ["a", "b"]}, "stop"),
    ({"stop": "abcd"}, "stop"),
    ({"response_format": schema({"enum": ["x" * 300]})}, SCHEMA),
    ({"response_format": schema({"type": "boolean", "title": "x" * 300})}, SCHEMA),
    ({"response_format": schema(DEEP)}, SCHEMA),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools[0]"),
    ({"constraint": {"regex": "x" * 300}}, "constraint.regex"),
    ({"constraint": {"choices": ["x" * 300]}}, "constraint.choices"),
    ({"constraint": {"regex": "[ab]{60}"}}, "constraint.regex"),
    ({"response_format": schema(LENGTHY)}, SCHEMA),
]


@pytest.mark.parametrize(("fields", "param"), TOO_MUCH)
def test_what_is_too_much_is_refused_by_name(small, fields, param):
    answer = ask_chat(small, **fields)
    assert answer.status == 400 and answer.error["param"] == param


@pytest.fixture(scope="module")
def small():
    with serving(limits=SMALL, model=scripted(*["ok"] * 8)) as running:
        yield running
        assert not running.bugs


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER] * 2},
        {"messages": [{"role": "user", "content": [PART] * 2}]},
        {"tools": [TOOL]},
        {"n": 1},
        {"stop": ["abc"]},
    ],
)
def test_what_is_just_within_the_bounds_is_answered(small, fields):
    assert ask_chat(small, **fields).status == 200


def test_constraints_compile_within_their_time():
    hard = {"constraint": {"regex": "(a|b)*a(a|b){12}"}}  # 8,192 states
    limits = Limits(schema_seconds=0.01, max_schema_states=10_000)
    with serving(limits=limits, model=scripted("x")) as running:
        start = time.monotonic()
        answer = ask_chat(running, **hard)
        assert answer.status == 400 and time.monotonic() - start < 5
        assert "longer" in answer.error["message"]


def test_expressions_that_re_would_never_finish_hold_nothing_up(server):
    """Python's re takes 2^40 steps for these, and stops all threads meanwhile."""
    key, slow = "a" * 40 + "!", "^(a+)+$"
    named = {"properties": {key: {}}, "patternProperties": {slow: {}}}
    for value in (
        {"type": "object", **named, "additionalProperties": False},
        {"enum": [key, "x"], "pattern": f"{slow}|x"},
        {"type": "string", "oneOf": [{"pattern": "^(a+)+b$"}, {"pattern": "^a{40}$"}]},
        {"type": "object", **named, "unevaluatedProperties": False},
    ):
        start = time.monotonic()
        answer = ask_chat(server, response_format=schema(value), max_tokens=60)
        assert answer.status in (200, 400), answer
        assert time.monotonic() - start < 40
    assert answer.status == 400 and "unevaluatedProperties" in answer.error["message"]


def test_constraints_compile_beside_the_engine_and_the_event_loop(server, monkeypatch):
    threads, go_on, original = [], threading.Event(), Constraint.regex.__func__

    def slow(cls, pattern: str, **bounds) -> Constraint:
        threads.append(threading.current_thread().name)
        assert go_on.wait(60)
        return original(cls, pattern, **bounds)

    monkeypatch.setattr(Constraint, "regex", classmethod(slow))
    with connected(server) as connection:
        connection.sendall(post(PATH, chat(constraint={"regex": "[ab]"})))
        assert eventually(lambda: bool(threads))
        # Meanwhile others are answered, by the loop and by the engine.
        assert get(server, "/health").status == 200
        assert ask_chat(server).json["choices"][0]["message"]["content"] == SORTED
        go_on.set()
        assert read(connection).json["choices"][0]["message"]["content"] in ("a", "b")
    assert "engine" not in threads[0] and "AnyIO" in threads[0]


def test_adapters_come_from_the_command_line_alone(tmp_path):
    given = ServedOptions(adapter=["a=x/y", "b=z"])
    assert {name: str(folder) for name, folder in given.adapters().items()} == {
        "a": "x/y",
        "b": "z",
    }
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="--adapter"):
            ServedOptions(adapter=wrong).adapters()


def test_an_error_of_the_program_tells_nothing_of_itself(monkeypatch):
    with serving(model=scripted("x")) as running:
        monkeypatch.setattr(running.state, "model", lambda name: 1 / 0)
        answer = ask_chat(running)
        assert answer.status == 500 and answer.error["code"] == "internal_error"
        assert b"Zero" not in answer.body and b"Traceback" not in answer.body
        assert [type(bug) for bug in running.bugs] == [ZeroDivisionError]


def test_the_bounds_are_options_of_the_command():
    names = {option.name for option in typer.main.get_command(app_of(command)).params}
    assert set(Limits.__dataclass_fields__) <= names
    with pytest.raises(ConfigError, match="max_stops"):
        Limits(max_stops=0)
