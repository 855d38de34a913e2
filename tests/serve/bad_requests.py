"""Bad requests made by hypothesis: every one is answered 4xx in the dialect's form, at once, and
the server goes on. Run as a script for the full count:

    python -m tests.serve.bad_requests [--count 5000]
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve import anthropic_types, responses_types
from mlx_diffgemma.serve.anthropic_types import MessagesRequest
from mlx_diffgemma.serve.completions import CompletionRequest
from mlx_diffgemma.serve.infill import InfillRequest
from mlx_diffgemma.serve.openai_chat import ChatRequest
from mlx_diffgemma.serve.responses_types import ResponsesRequest
from tests.serve.cases import Answered, Running, ask, chat, connected, get, post, read, serving

# Bounds so small that a good request among the bad ones costs little.
LIMITS = Limits(
    max_body_mb=0.05, body_seconds=2.0, header_seconds=2.0, max_answer_tokens=8, schema_seconds=0.3
)
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SLOWEST = 20.0  # seconds

numbers = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 1e308]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
EDIT = "x\n<|code_to_edit|>\ny\n<|/code_to_edit|>"
APPLY = "<|original_code|>\nx\n<|/original_code|><|update_snippet|>\ny\n<|/update_snippet|>"
ASKED = {"model": "bundled", "input": "Sort: 6 3 1 7", "max_output_tokens": 1}
# Route -> a good body, and the fields of one. A new dialect gets a line here.
ROUTES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    CHAT: (chat(), tuple(ChatRequest.model_fields)),
    "/v1/completions": (
        {"prompt": "a ", "suffix": " b", "max_tokens": 1},
        tuple(CompletionRequest.model_fields),
    ),
    "/infill": (
        {"input_prefix": "a ", "input_suffix": " b", "n_predict": 1},
        tuple(InfillRequest.model_fields),
    ),
    "/v1/edit/completions": (
        chat([{"role": "user", "content": EDIT}]),
        ("messages", "max_tokens", "temperature", "seed", "stop", "stream"),
    ),
    MESSAGES: (chat(max_tokens=1), tuple(MessagesRequest.model_fields)),
    f"{MESSAGES}/count_tokens": (chat(), tuple(anthropic_types.Counted.model_fields)),
    RESPONSES: (ASKED, tuple(ResponsesRequest.model_fields)),
    f"{RESPONSES}/input_tokens": (ASKED, tuple(responses_types.Counted.model_fields)),
    "/v1/apply/completions": (
        chat([{"role": "user", "content": APPLY}]),
        ("messages", "max_tokens", "temperature", "seed", "stop", "stream"),
    ),
}


def said(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def called(call: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


def function(value: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": value}], "tool_choice": "required"}


NESTED: dict[str, Callable[[Any], Any]] = {
    "role": lambda v: {"messages": [{"role": v, "content": "x"}]},
    "content": said,
    "part": lambda v: said([v]),
    "part type": lambda v: said([{"type": v, "text": "x"}]),
    "part text": lambda v: said([{"type": "text", "text": v}]),
    "call": called,
    "arguments": lambda v: called({"id": "a", "function": {"name": "f", "arguments": v}}),
    "tool call id": lambda v: {"messages": [{"role": "tool", "content": "x", "tool_call_id": v}]},
    "tool": lambda v: {"tools": [v]},
    "function": function,
    "tool name": lambda v: function({"name": v}),
    "parameters": lambda v: function({"name": "f", "parameters": v}),
    "property": lambda v: function(
        {"name": "f", "parameters": {"type": "object", "properties": {"a": v}}}
    ),
    "format": lambda v: {"response_format": {"type": v}},
    "schema": lambda v: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": v}}
    },
    "regex": lambda v: {"constraint": {"regex": v}},
    "choices": lambda v: {"constraint": {"choices": v}},
    "stop": lambda v: {"stop": [v]},
}


def block(value: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [value]}]}


IN_MESSAGES: dict[str, Callable[[Any], Any]] = {
    "role": lambda v: {"messages": [{"role": v, "content": "x"}]},
    "content": said,
    "block": block,
    "block type": lambda v: block({"type": v, "text": "x"}),
    "block text": lambda v: block({"type": "text", "text": v}),
    "system": lambda v: {"system": [v]},
    "use": lambda v: block({"type": "tool_use", "id": "a", "name": "f", "input": v}, "assistant"),
    "use id": lambda v: block({"type": "tool_use", "id": v, "name": "f"}, "assistant"),
    "result": lambda v: block({"type": "tool_result", "tool_use_id": "a", "content": v}),
    "result id": lambda v: block({"type": "tool_result", "tool_use_id": v}),
    "thought": lambda v: block({"type": "thinking", "thinking": v}, "assistant"),
    "begun": lambda v: block({"type": "text", "text": v}, "assistant"),
    "tool": lambda v: {"tools": [v], "tool_choice": {"type": "any"}},
    "input schema": lambda v: {
        "tools": [{"name": "f", "input_schema": v}], "tool_choice": {"type": "any"}
    },
    "choice": lambda v: {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": v},
    "budget": lambda v: {"thinking": {"type": "enabled", "budget_tokens": v}},
    "thinking": lambda v: {"thinking": {"type": v}},
    "format": lambda v: {"output_config": {"format": {"type": "json_schema", "schema": v}}},
    "stop": lambda v: {"stop_sequences": [v]},
}  # fmt: skip


def declared(value: Any) -> dict[str, Any]:
    tool = {"type": "function", "name": "f", "parameters": value}
    return {"tools": [tool], "tool_choice": "required"}


IN_RESPONSES: dict[str, Callable[[Any], Any]] = {
    "item": lambda v: {"input": [v]},
    "item type": lambda v: {"input": [{"type": v, "role": "user", "content": "x"}]},
    "content": lambda v: {"input": [{"role": "user", "content": v}]},
    "part": lambda v: {"input": [{"role": "user", "content": [v]}]},
    "part text": lambda v: {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": v}]}]
    },
    "arguments": lambda v: {
        "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": v}]
    },
    "call id": lambda v: {"input": [{"type": "function_call_output", "call_id": v, "output": "x"}]},
    "reasoning": lambda v: {"input": [{"type": "reasoning", "content": v, "summary": v}]},
    "tool": lambda v: {"tools": [v], "tool_choice": "required"},
    "tool type": lambda v: {"tools": [{"type": v, "name": "f"}], "tool_choice": "required"},
    "parameters": declared,
    "inner tools": lambda v: {"tools": [{"type": "namespace", "name": "n", "tools": v}]},
    "grammar": lambda v: {"tools": [{"type": "custom", "name": "c", "format": v}]},
    "choice": lambda v: {"tools": [{"type": "function", "name": "f"}], "tool_choice": v},
    "allowed": lambda v: {"tool_choice": {"type": "allowed_tools", "tools": v}},
    "format": lambda v: {"text": {"format": {"type": v}}},
    "schema": lambda v: {"text": {"format": {"type": "json_schema", "schema": v}}},
    "effort": lambda v: {"reasoning": {"effort": v}},
}


def encoded(value: Any) -> bytes:
    """JSON as careless programs write it, with NaN and half characters."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


# Each makes the bytes of a request.
fields = st.sampled_from(
    [(path, good, name) for path, (good, names) in ROUTES.items() for name in names]
).flatmap(lambda drawn: values.map(lambda v: post(drawn[0], encoded({**drawn[1], drawn[2]: v}))))
nested = st.tuples(st.sampled_from(sorted(NESTED)), values).map(
    lambda drawn: post(CHAT, encoded({**chat(), **NESTED[drawn[0]](drawn[1])}))
)
of_messages = st.tuples(
    st.sampled_from(["", "/count_tokens"]), st.sampled_from(sorted(IN_MESSAGES)), values
).map(
    lambda drawn: post(
        f"{MESSAGES}{drawn[0]}", encoded({**chat(max_tokens=1), **IN_MESSAGES[drawn[1]](drawn[2])})
    )
)
of_responses = st.tuples(
    st.sampled_from(["", "/input_tokens"]), st.sampled_from(sorted(IN_RESPONSES)), values
).map(
    lambda drawn: post(
        f"{RESPONSES}{drawn[0]}", encoded({**ASKED, **IN_RESPONSES[drawn[1]](drawn[2])})
    )
)
whole = st.tuples(st.sampled_from(list(ROUTES)), values).map(
    lambda drawn: post(drawn[0], encoded(drawn[1]))
)
random_bytes = st.tuples(st.sampled_from(list(ROUTES)), st.binary(max_size=60)).map(
    lambda drawn: post(*drawn)
)
cut = st.integers(0, 200).map(lambda at: post(CHAT, encoded(chat())[:at]))
spoiled = st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=4)).map(
    lambda drawn: post(CHAT, encoded(chat())[: drawn[0]] + drawn[1] + encoded(chat())[drawn[0] :])
)
deep = st.tuples(st.integers(50, 20_000), st.sampled_from(["[", '{"a":'])).map(
    lambda drawn: post(CHAT, (drawn[1] * drawn[0]).encode()[:40_000])
)
long_numbers = st.integers(1, 20_000).map(
    lambda digits: post(CHAT, b'{"messages": [], "seed": ' + b"9" * digits + b"}")
)
methods = st.tuples(
    st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "X"]),
    st.sampled_from([CHAT, "/v1/models", "/health", "/metrics", "/v1/models/bundled"]),
).map(lambda drawn: post(drawn[1], b"{}").replace(b"POST", drawn[0].encode(), 1))
paths = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(
    lambda path: post(f"/{path}".replace("?", ""), b"{}")
)
lying = st.sampled_from(["0", "5", "99999", "-1", "x", "1e3", "0x10", "9" * 400, "5, 6"]).map(
    lambda length: post(CHAT, encoded(chat()), Content_Length=length)
)
heads = st.binary(min_size=1, max_size=80).map(lambda content: content + b"\r\n\r\n")
requests = st.one_of(
    fields, fields, nested, nested, whole, random_bytes, cut, spoiled, deep, long_numbers, methods,
    paths, lying, heads, of_messages, of_responses,
)  # fmt: skip


def tried(running: Running, request: bytes) -> Answered | None:
    """Send a request, and say that no more comes; return the answer, None if there is none."""
    with connected(running) as connection:
        try:
            connection.sendall(request)
            return read(connection)
        except (ConnectionError, TimeoutError, IndexError):
            return None


def check(running: Running, request: bytes) -> int:
    """Check the answer to a request; return its status, 0 for a closed connection."""
    start = time.monotonic()
    answer = tried(running, request)
    assert time.monotonic() - start < SLOWEST, request
    assert not running.bugs, (request, running.bugs)
    if answer is None:
        return 0
    assert 200 <= answer.status < 500, (request, answer)
    assert b"Traceback" not in answer.body, (request, answer)
    is_head = request.startswith(b"HEAD")
    if answer.status >= 400 and not is_head:
        error, names = answer.json["error"], {"message", "type", "param", "code"}
        if b" /v1/messages" in request.partition(b"\r\n")[0]:
            names = {"message", "type"}
            assert set(answer.json) == {"type", "error"} and answer.json["type"] == "error"
        assert set(error) == names, (request, answer)
        assert error["message"] and error["type"], (request, answer)
        assert "\n" not in error["message"], (request, answer)
    return answer.status


def run(count: int, number: int = 0) -> Counter[int]:
    """Make so many bad requests; return how often each status came."""
    found: Counter[int] = Counter()
    with serving(limits=LIMITS, max_rows=8) as running:

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(requests)
        def one(request: bytes) -> None:
            found[check(running, request)] += 1

        one()
        assert get(running, "/health").status == 200
        good = ask(running, post(CHAT, chat(max_tokens=20)))
        assert good.json["choices"][0]["message"]["content"] == "1 3 6 7"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    socket.setdefaulttimeout(60)
    found = run(options.count, options.seed)
    told = ", ".join(f"{status or 'closed'}: {n}" for status, n in sorted(found.items()))
    print(f"{sum(found.values())} requests; {told}")
    refused = sum(n for status, n in found.items() if status >= 400 or not status)
    sys.exit(refused < options.count // 2)


if __name__ == "__main__":
    main()
