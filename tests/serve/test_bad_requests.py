"""Bad requests never crash, hang or confuse the server."""

from __future__ import annotations

import asyncio
import time

import pytest

from mlx_diffgemma.serve import edits
from mlx_diffgemma.serve.body import checked
from mlx_diffgemma.serve.errors import ApiError
from mlx_diffgemma.serve.openai_chat import ChatRequest
from mlx_diffgemma.serve.state import State
from tests.serve import bad_requests
from tests.serve.cases import ask, chat, connected, post, read

PATH = "/v1/chat/completions"


def test_a_sample_of_drawn_bad_requests_is_refused():
    found = bad_requests.run(60, number=1)
    assert sum(found.values()) >= 50
    assert sum(n for status, n in found.items() if 400 <= status < 500) > 30


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"messages": "\xff\xfe"}', "not JSON"),
        (b'{"messages": "\\ud800"}', "not JSON"),
        (b'{"seed": NaN}', "not JSON"),
        (b'{"seed": 1e999}', "seed"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 10_000, "not JSON"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", ""),
        (b"[]", "a list"),
        (b"null", "null"),
        (b"3", "a number"),
        (b'"x"', "text"),
        (b"\xef\xbb\xbf{}", ""),
    ],
)
def test_a_broken_body_is_refused(server, content, said):
    answer = ask(server, post(PATH, content))
    assert answer.status == 400 and said in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        (PATH, "GET", 405),
        (PATH, "DELETE", 405),
        ("/v1/models", "POST", 405),
        ("/v1/nothing", "POST", 404),
        ("/", "POST", 405),
        ("/v1/chat/completions/", "POST", 404),
        ("//v1/models", "GET", 404),
        ("/v1/../health", "GET", 404),
    ],
)
def test_wrong_routes_and_methods_have_the_form_of_errors(server, path, method, status):
    answer = ask(server, post(path, b"{}").replace(b"POST", method.encode(), 1))
    assert answer.status == status and set(answer.error) == {"message", "type", "param", "code"}
    assert (status == 405) == ("allow" in answer.headers)


def test_errors_before_a_route_have_the_form_of_its_dialect(server):
    answer = ask(server, post("/v1/messages/nothing", b"{}"))
    assert answer.status == 404 and answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "not_found_error"


def test_a_length_that_is_too_small_makes_no_second_request(server):
    content = post(PATH, chat()).partition(b"\r\n\r\n")[2]
    request = post(PATH, content + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", Content_Length="5")
    with connected(server) as connection:
        connection.sendall(request)
        assert read(connection).status == 400


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/apply/completions", "<|original_code|>" * 9000 + "<|/original_code|>" * 9000),
        ("/v1/edit/completions", "<|code_to_edit|>" * 20_000),
    ],
)
def test_marks_without_ends_cost_no_more_than_their_length(path, content):
    asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": content}]})
    started = time.process_time()
    with pytest.raises(ApiError):
        asyncio.run((edits.edited if "edit" in path else edits.applied)(State(), asked))
    assert time.process_time() - started < 1


def test_a_list_of_wrong_entries_ends_at_the_first():
    started = time.process_time()
    with pytest.raises(ApiError, match=r"messages\[0\]"):
        checked(ChatRequest, {"messages": [0] * 500_000})
    assert time.process_time() - started < 1
