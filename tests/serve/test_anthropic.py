"""Anthropic's own client against the server: messages, streams, tools, thoughts, counts, errors;
and Claude Code's requests."""

from __future__ import annotations

import json
import threading
import time
from typing import Literal

import anthropic
import pytest
from pydantic import BaseModel

from mlx_diffgemma import GenerationSettings, PromptOptions, generate
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve import sse
from mlx_diffgemma.serve.anthropic_types import Counted, conversation_of
from mlx_diffgemma.serve.body import checked
from mlx_diffgemma.serve.errors import ApiError
from mlx_diffgemma.serve.security import Access
from tests.engine.cases import eventually, is_idle, loaded
from tests.serve.cases import (
    COUNT,
    COUNTED,
    LONG,
    SORT,
    SORTED,
    ask,
    post,
    scripted,
    serving,
)
from tests.write.test_tool_calls import TOKENIZER, Script

WEATHER = {
    "name": "weather",
    "description": "Tell the weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME = {"name": "time", "input_schema": {"type": "object"}}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2, 3]}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT = {"format": {"type": "json_schema", "schema": SCHEMA}}
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
THOUGHT = "<|channel>thought\nLet me see.<channel|>"
BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def quick():
    """A client of a server that gives each canvas one step, where the text does not matter."""
    with serving(settings=GenerationSettings(max_denoising_steps=1)) as running:
        yield client_of(running)
        assert not running.bugs


def client_of(running, **more) -> anthropic.Anthropic:
    url = f"http://127.0.0.1:{running.port}"
    return anthropic.Anthropic(**{"base_url": url, "api_key": "none", "max_retries": 0, **more})


def create(client, messages=SORT, *, model="bundled", max_tokens=100, **fields):
    return client.messages.create(model=model, messages=messages, max_tokens=max_tokens, **fields)


def events_of(running, **fields) -> list[dict]:
    """The events of a stream, each with its name checked."""
    body = {"model": "bundled", "max_tokens": 100, "messages": SORT, "stream": True, **fields}
    answer = ask(running, post("/v1/messages", body))
    assert answer.status == 200
    blocks = answer.body.decode().split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_a_message_is_answered_with_its_usage(client):
    message = create(client)
    (block,) = message.content
    assert (block.type, block.text) == ("text", SORTED)
    assert (message.role, message.type, message.model) == ("assistant", "message", "bundled")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == 29
    assert usage.output_tokens == 8 and usage.cache_creation_input_tokens == 0
    assert not message.model_extra and not usage.model_extra and not block.model_extra


def test_what_a_kept_context_held_is_counted_apart(client):
    messages = [{"role": "user", "content": "Sort: 9 8 7 6 5 3"}]
    first, second = (create(client, messages).usage for _ in range(2))
    total = first.input_tokens + first.cache_read_input_tokens
    assert second.cache_read_input_tokens > 0 < second.input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == total


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be short."},
        {"system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "short."}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tools": [WEATHER]},
    ],
)
def test_counted_tokens_are_those_that_the_same_request_reads(quick, fields):
    counted = quick.messages.count_tokens(model="bundled", messages=COUNT, **fields)
    usage = create(quick, COUNT, max_tokens=1, **fields).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens > 0


def test_a_stream_has_all_events_in_order(server):
    events = events_of(server, messages=COUNT)
    kinds = [event["type"] for event in events]
    start, end = ["message_start", "content_block_start"], ["content_block_stop", "message_delta"]
    assert kinds == [*start, *["content_block_delta"] * 2, *end, "message_stop"]  # two canvases
    message = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    assert message["usage"]["output_tokens"] == 0
    read = message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]
    assert read == events[-2]["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]
    assert "".join(event["delta"]["text"] for event in events[2:4]) == COUNTED
    assert all(event["delta"]["text"] for event in events[2:4])  # no empty ones
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3 * 26
    assert [set(event) for event in events[-2:]] == [{"type", "delta", "usage"}, {"type"}]


def test_the_clients_stream_ends_with_the_message_of_a_whole_answer(client):
    seed = {"seed": 4}
    with client.messages.stream(
        model="bundled", max_tokens=99, messages=SORT, extra_body=seed
    ) as told:
        streamed = told.get_final_message()
    whole = create(client, max_tokens=99, extra_body=seed)
    assert [block.text for block in streamed.content] == [whole.content[0].text]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_a_limit_and_a_stop_string_end_the_answer(client):
    cut = create(client, max_tokens=3)
    assert (cut.content[0].text, cut.stop_reason) == ("1 3", "max_tokens")
    assert cut.usage.output_tokens == 3
    stopped = create(client, stop_sequences=["zz", "6"])
    assert (stopped.content[0].text, stopped.stop_reason) == ("1 3 ", "stop_sequence")
    assert stopped.stop_sequence == "6"
    with client.messages.stream(
        model="bundled", max_tokens=99, messages=SORT, stop_sequences=["3 6", "zz"]
    ) as told:
        message = told.get_final_message()
    assert (message.content[0].text, message.stop_reason) == ("1 ", "stop_sequence")
    assert message.stop_sequence == "3 6"


def test_the_answer_goes_on_from_a_last_message_of_the_assistant(client):
    begun = [*SORT, {"role": "assistant", "content": "1 3"}]
    message = create(client, begun, max_tokens=64, extra_body={"seed": 4})
    alone = generate(
        *loaded(),
        SORT,
        settings=GenerationSettings(seed=4, max_new_tokens=64),
        prompt_options=PromptOptions(response_prefix="1 3"),
    )
    assert message.content[0].text == alone != SORTED
    counted = [client.messages.count_tokens(model="bundled", messages=m) for m in (begun, SORT)]
    assert counted[0].input_tokens == counted[1].input_tokens + len("1 3")


def test_any_tool_is_called_as_declared(quick):
    message = create(quick, tools=[WEATHER], tool_choice={"type": "any"})
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert (call.type, call.name) == ("tool_use", "weather") and call.id.startswith("toolu_")
    assert call.input["city"] in ("Oslo", "Rome") and set(call.input) <= {"city", "days"}


def test_a_named_tool_is_called_and_no_other(quick):
    choice = {"type": "tool", "name": "time", "disable_parallel_tool_use": True}
    with quick.messages.stream(
        model="bundled", max_tokens=99, messages=SORT, tools=[WEATHER, TIME], tool_choice=choice
    ) as told:
        message = told.get_final_message()
    (call,) = message.content
    assert (call.name, call.input, message.stop_reason) == ("time", {}, "tool_use")


def test_thoughts_text_and_calls_are_blocks():
    answer = f"{THOUGHT}\n\nI look.{CALL}\n{CALL}"
    with serving(model=scripted(*[answer] * 5)) as running:
        client, thinking = client_of(running), {"type": "adaptive"}
        whole = create(client, tools=[WEATHER], thinking=thinking)
        events = events_of(running, tools=[WEATHER])
        one = {"type": "auto", "disable_parallel_tool_use": True}
        single = create(client, tools=[WEATHER], tool_choice=one)
        omitted = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
        hidden = create(client, tools=[WEATHER], thinking=omitted)
        hidden_events = events_of(running, tools=[WEATHER], thinking=omitted)
    kinds = ["thinking", "text", "tool_use", "tool_use"]
    assert [block.type for block in whole.content] == kinds
    thought, text, *calls = whole.content
    assert (thought.thinking, text.text) == ("Let me see.", "\n\nI look.\n")
    assert thought.signature and whole.stop_reason == "tool_use"
    assert [call.input for call in calls] == [{"city": "Rome", "days": 2}] * 2
    assert calls[0].id != calls[1].id
    assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens

    starts = [e for e in events if e["type"] == "content_block_start"]
    assert [e["content_block"]["type"] for e in starts] == kinds
    assert [e["index"] for e in starts] == [0, 1, 2, 3]
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(d["thinking"] for d in deltas if d["type"] == "thinking_delta") == "Let me see."
    signatures = [d["signature"] for d in deltas if d["type"] == "signature_delta"]
    assert signatures == [thought.signature]
    assert "".join(d["text"] for d in deltas if d["type"] == "text_delta") == "\n\nI look."
    written = [d["partial_json"] for d in deltas if d["type"] == "input_json_delta"]
    assert [json.loads(text) for text in written] == [{"city": "Rome", "days": 2}] * 2
    assert starts[2]["content_block"]["input"] == {}

    assert [block.type for block in single.content] == kinds[:3]
    assert (hidden.content[0].thinking, hidden.content[0].signature) == ("", thought.signature)
    told = [e["delta"]["type"] for e in hidden_events if e["type"] == "content_block_delta"]
    assert "thinking_delta" not in told and told[0] == "signature_delta"


def test_a_budget_ends_the_thought():
    thought = "<|channel>thought\n" + "on and on " * 20
    with serving(model=scripted(thought + "<channel|>done", thought)) as running:
        client = client_of(running)
        thinking = {"type": "enabled", "budget_tokens": 12}
        free = create(client, max_tokens=400, thinking={"type": "adaptive"})
        held = create(client, max_tokens=80, thinking=thinking)
    spent = [each.usage.output_tokens_details.thinking_tokens for each in (free, held)]
    assert spent[0] > 2 * spent[1] and 12 <= spent[1] <= 12 + 16  # a canvas has 16


def test_a_call_that_the_limit_cuts_is_left_out():
    with serving(model=scripted(*[f"I look.{CALL}"] * 2)) as running:
        whole = create(client_of(running), tools=[WEATHER], max_tokens=14)
        events = events_of(running, tools=[WEATHER], max_tokens=14)
    assert whole.stop_reason == "max_tokens"
    assert [(block.type, block.text) for block in whole.content] == [("text", "I look.")]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert "tool_call" not in json.dumps(events)


def test_a_format_is_kept(quick):
    message = create(quick, output_config=FORMAT)
    assert json.loads(message.content[0].text)["n"] in (1, 2, 3)
    strict = create(quick, tools=[{**WEATHER, "strict": True}])
    assert strict.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_with_a_format_an_answer_fits_it_or_is_a_call():
    with serving(model=scripted('{"n": 2}', CALL, '{"n": 7}')) as running:
        fields = {"tools": [WEATHER], "output_config": FORMAT}
        written, called, mended = (create(client_of(running), **fields) for _ in range(3))
    assert json.loads(written.content[0].text) == {"n": 2}
    assert json.loads(mended.content[0].text)["n"] in (1, 2, 3)
    assert [block.type for block in called.content] == ["tool_use"]


class Number(BaseModel):
    n: Literal[1, 2, 3]


def test_the_clients_own_types_are_kept(quick):
    message = quick.messages.parse(
        model="bundled", max_tokens=99, messages=SORT, output_format=Number
    )
    assert message.parsed_output.n in (1, 2, 3)


def test_models_are_told_in_the_form_of_the_client(client, server):
    (listed,) = client.models.list().data
    assert listed == client.models.retrieve("bundled")
    assert (listed.id, listed.type, listed.display_name) == ("bundled", "model", "bundled")
    assert listed.created_at.timestamp() == server.state.models["bundled"].created
    assert listed.max_input_tokens == 2048 - 64 and not listed.model_extra


def conversation(*messages, **fields):
    body = checked(Counted, {"model": "x", "messages": list(messages), **fields})
    return conversation_of(body, Limits())


def test_blocks_become_messages_of_the_template():
    use = {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "a"}
    cached = {"cache_control": {"type": "ephemeral"}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    made = conversation(
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "one", **cached}]},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": [thought, redacted, {"type": "text", "text": "I"}, use]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "after"},
                {**result, "is_error": True, "content": [{"type": "text", "text": "none"}]},
            ],
        },
        {"role": "assistant", "content": [thought, {"type": "text", "text": "so"}]},
        {"role": "user", "content": [{**result, "content": "sun"}, {**result}]},
        system=[{"type": "text", "text": BILLING}, {"type": "text", "text": "Be short.", **cached}],
    )
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Rome"}},
    }
    assert made.prefix is None
    assert made.messages == [
        {"role": "system", "content": "Be short.\n\nBe kind."},
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": "I", "tool_calls": [call], "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "a", "content": "Error: none"},
        {"role": "user", "content": "after"},
        {"role": "assistant", "content": "so"},
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ]


def test_the_line_that_differs_in_every_request_of_claude_code_is_left_out():
    user = {"role": "user", "content": "x"}
    for system in (f"{BILLING}\nBe short.", [{"type": "text", "text": BILLING}]):
        made = conversation(user, system=system).messages
        assert BILLING not in json.dumps(made) and made[-1] == user
    said = {"role": "user", "content": BILLING}  # only the system prompt is changed
    assert conversation(said).messages == [said]


USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], "[0].content[0].source"),
        ([{"role": "user", "content": [{"type": "document", "source": {}}]}], "[0].content[0]"),
        ([{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}], "[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "[0].content[0].text"),
        ([{"role": "assistant", "content": [USE | {"input": None}]}], "[0].content[0].input"),
        ([{"role": "assistant", "content": [USE]}], "messages"),
        (
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "b"}]}],
            "[0].content[0].tool_use_id",
        ),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_name(messages, param):
    with pytest.raises(ApiError) as error:
        conversation(*messages)
    assert error.value.status == 400 and error.value.param.endswith(param)


REFUSED = [
    ({"top_k": 5}, "top_k"),
    ({"top_p": 0.5}, "top_p"),
    ({"temperature": 1.5}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"tool_choice": {"type": "any"}}, "tool"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, "weather"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"output_config": FORMAT, "stop_sequences": ["x"]}, "stop_sequences"),
    ({"messages": [{"role": "cook", "content": "x"}]}, "messages[0].role"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server, fields, said):
    body = {"model": "bundled", "max_tokens": 9, "messages": SORT, **fields}
    answer = ask(server, post("/v1/messages", body))
    assert answer.status == 400 and set(answer.json) == {"type", "error"}
    assert answer.json["type"] == "error" and answer.error["type"] == "invalid_request_error"
    assert said in answer.error["message"]


def test_an_answer_that_the_client_begins_has_no_thought_and_no_format(client):
    begun = [*SORT, {"role": "assistant", "content": "1"}]
    for fields in ({"thinking": {"type": "adaptive"}}, {"output_config": FORMAT}):
        with pytest.raises(anthropic.BadRequestError) as error:
            create(client, begun, **fields)
        assert "messages[1]" in str(error.value)


def test_a_schema_that_cannot_be_kept_is_refused_by_its_keyword(client, server):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    before = server.state.metrics.count("steps_total")
    tool = {"name": "f", "input_schema": schema}
    for fields in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"tools": [tool], "tool_choice": {"type": "any"}},
        {"tools": [{**tool, "strict": True}]},
    ):
        with pytest.raises(anthropic.BadRequestError) as error:
            create(client, **fields)
        assert "uniqueItems" in error.value.body["error"]["message"]
    assert server.state.metrics.count("steps_total") == before


def test_errors_have_the_status_and_the_type_that_clients_know(client):
    with pytest.raises(anthropic.NotFoundError) as missing:
        create(client, model="claude-sonnet-5")
    assert missing.value.type == "not_found_error"
    with serving(limits=Limits(max_body_mb=0.001), access=Access("k")) as running:
        with pytest.raises(anthropic.AuthenticationError) as error:
            create(client_of(running))
        assert error.value.type == "authentication_error"
        for given in ({"api_key": "k"}, {"api_key": None, "auth_token": "k"}):  # both headers
            assert create(client_of(running, **given)).content[0].text == SORTED
        with pytest.raises(anthropic.APIStatusError) as error:
            create(client_of(running, api_key="k"), [{"role": "user", "content": "x" * 2000}])
        assert (error.value.status_code, error.value.type) == (413, "request_too_large")
    with serving(settings=LONG, max_rows=1, max_queue=1) as running:
        streams = [create(client_of(running), COUNT, stream=True) for _ in range(2)]
        with pytest.raises(anthropic.RateLimitError) as limited:
            create(client_of(running))
        assert limited.value.type == "rate_limit_error"
        assert int(limited.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
    gate = threading.Event()
    with serving(gate=gate) as running:
        with pytest.raises(anthropic.APIStatusError) as busy:
            create(client_of(running))
        assert (busy.value.status_code, busy.value.type) == (503, "overloaded_error")


def test_a_prompt_that_is_too_long_is_told_in_words_that_clients_know(client):
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .* 1984 of"):
        create(client, [{"role": "user", "content": "x" * 2000}])


def test_an_error_in_a_stream_is_an_event(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(sse, "_FIRST_SECONDS", 0.05, raising=False)
    with serving(settings=LONG) as running:
        stream = iter(create(client_of(running), COUNT, stream=True))
        assert next(stream).type == "message_start"
        running.engine.close(cancel=True)
        with pytest.raises(anthropic.APIStatusError) as error:
            list(stream)
    assert error.value.body["error"]["type"] in ("overloaded_error", "api_error")


def test_a_quiet_stream_is_kept_alive_with_pings(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    slow = GenerationSettings(max_denoising_steps=60, stability_threshold=60)
    with serving(settings=slow) as running:
        kinds = [event["type"] for event in events_of(running)]
        stream = create(client_of(running), stream=True)
        told = [event.type for event in stream]  # the client passes pings by
    assert "ping" in kinds and "ping" not in told
    assert [kind for kind in kinds if kind != "ping"] == told


class Slow(Script):
    def canvas_states(self, *given, **more):
        time.sleep(0.02)
        return super().canvas_states(*given, **more)


def test_a_thought_that_is_not_shown_keeps_its_stream_alive(monkeypatch):
    """Its pieces come all the time, and none of them is told."""
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.1)
    thought = "<|channel>thought\n" + "on and on " * 60 + "<channel|>done"
    with serving(model=(Slow(thought), TOKENIZER)) as running:
        thinking = {"type": "adaptive", "display": "omitted"}
        events = events_of(running, thinking=thinking, max_tokens=900)
    kinds = [event["type"] for event in events]
    before = kinds[: kinds.index("message_delta")]
    assert before.count("ping") >= 5 and "thinking_delta" not in json.dumps(events)


def test_many_turns_of_one_role_are_joined_in_time_that_grows_with_their_length():
    turns = [{"role": "user", "content": "x" * 4000}] * 4000
    start = time.process_time()
    found = conversation(*turns).messages
    assert time.process_time() - start < 1
    assert [len(each["content"]) for each in found] == [4000 * 4002 - 2]


def test_a_call_of_a_name_that_no_tool_may_have_can_be_sent_back():
    odd = f"<|tool_call>call:don't!{'x' * 150}{{}}<tool_call|>"
    with serving(model=scripted(odd, "ok")) as running:
        client = client_of(running)
        made = create(client, tools=[WEATHER], max_tokens=400)
        (call,) = made.content
        done = {"type": "tool_result", "tool_use_id": call.id, "content": "unknown"}
        turns = [
            *SORT,
            {"role": "assistant", "content": made.content},
            {"role": "user", "content": [done]},
        ]
        assert call.name.startswith("don't!")
        assert create(client, turns, tools=[WEATHER]).content[0].text == "ok"


def test_a_client_that_closes_its_stream_ends_its_row():
    with serving(settings=LONG) as running:
        stream = create(client_of(running), COUNT, stream=True)
        next(iter(stream))
        assert running.engine.counts["running"] == 1
        stream.close()
        assert eventually(lambda: is_idle(running.engine))
        assert running.state.metrics.count("cancelled_total") == 1


CODE = {
    "model": "claude-opus-4-8",
    "max_tokens": 64000,
    "stream": True,
    "metadata": {"user_id": '{"device_id": "d", "account_uuid": "", "session_id": "s"}'},
    "system": [
        {"type": "text", "text": BILLING},
        {
            "type": "text",
            "text": "You are an agent that writes code.",
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
        },
    ],
    "tools": [
        {
            "name": "Read",
            "description": "Reads a file.",
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"file_path": {"type": "string"}, "limit": {"type": "number"}},
                "required": ["file_path"],
                "additionalProperties": False,
            },
            "eager_input_streaming": True,
            "cache_control": {"type": "ephemeral"},
        },
    ],
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday.\n</system-reminder>"},
                {"type": "text", "text": "Read a.", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "system", "content": "Available agent types: none."},
    ],
}
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "x-app": "cli",
    "X-Stainless-Retry-Count": "0",
}


def test_a_turn_of_claude_code_is_answered():
    """The shape that Claude Code 2.1.197 sent to `tests.serve.agents`: a call, its result, and the
    answer."""
    read = '<|tool_call>call:Read{file_path:<|"|>a<|"|>}<tool_call|>'
    with serving(model=scripted(THOUGHT + read, "It says b.")) as running:
        running.state.aliases = ("claude-*",)
        answers = []
        body = CODE
        for _ in range(2):
            answer = ask(running, post("/v1/messages?beta=true", body, **HEADERS))
            assert answer.status == 200
            lines = [line for line in answer.body.decode().split("\n") if line[:5] == "data:"]
            answers.append([json.loads(line[5:]) for line in lines])
            counted = {k: v for k, v in body.items() if k not in ("max_tokens", "stream")}
            answer = ask(running, post("/v1/messages/count_tokens?beta=true", counted, **HEADERS))
            usage = answers[-1][0]["message"]["usage"]
            total = usage["input_tokens"] + usage["cache_read_input_tokens"]
            assert answer.json == {"input_tokens": total}
            starts = [e for e in answers[-1] if e["type"] == "content_block_start"]
            use = starts[-1]["content_block"] | {"input": {"file_path": "a"}}
            result = {"type": "tool_result", "tool_use_id": use.get("id"), "content": "b"}
            body = {
                **CODE,
                "messages": [
                    *CODE["messages"],
                    {"role": "assistant", "content": [use]},
                    {"role": "user", "content": [result]},
                ],
            }
        assert not running.bugs
    first, second = answers
    assert first[-2]["delta"]["stop_reason"] == "tool_use"
    assert second[-2]["delta"]["stop_reason"] == "end_turn"
    texts = [e["delta"]["text"] for e in second if e.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == "It says b."


def test_the_context_of_a_request_of_claude_code_is_found_again():
    body = {**CODE, "max_tokens": 1, "stream": False, "thinking": {"type": "disabled"}}
    with serving(settings=GenerationSettings(max_denoising_steps=1)) as running:
        running.state.aliases = ("claude-*",)
        usages = []
        for nonce in ("36ee5", "0aaa9"):
            system = [{"type": "text", "text": BILLING.replace("36ee5", nonce)}, CODE["system"][1]]
            answer = ask(running, post("/v1/messages", {**body, "system": system}, **HEADERS))
            usages.append(answer.json["usage"])
    total = usages[0]["input_tokens"] + usages[0]["cache_read_input_tokens"]
    assert usages[1]["cache_read_input_tokens"] > total // 2


def test_an_alias_with_a_star_stands_for_many_names(server):
    state = server.state
    before, state.aliases = state.aliases, ("claude-*", "plain[1m]")
    try:
        for name in ("claude-opus-4-1", "claude-", "plain[1m]", "bundled"):
            assert state.model(name).name == "bundled"
        for name in ("Claude-x", "xclaude-", "plain1"):
            with pytest.raises(ApiError):
                state.model(name)
    finally:
        state.aliases = before
