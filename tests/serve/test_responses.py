"""OpenAI's own client against `/v1/responses`: text, streams, tools, conversations that the server
keeps, formats, errors; and Codex's requests."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from mlx_diffgemma import GenerationSettings
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve import sse
from mlx_diffgemma.serve.body import checked
from mlx_diffgemma.serve.errors import ApiError
from mlx_diffgemma.serve.responses_store import Kept, ResponseStore
from mlx_diffgemma.serve.responses_types import (
    Counted,
    ResponsesRequest,
    ToolField,
    messages_of,
    tools_of,
    with_instructions,
)
from tests.engine.cases import eventually, is_idle
from tests.serve.cases import COUNT, COUNTED, LONG, SORTED, ask, get, post, scripted, serving

ASKED, COUNTING = "Sort: 6 3 1 7", COUNT[0]["content"]
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME = {"type": "function", "name": "time", "strict": False, "parameters": {"type": "object"}}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x+/"},
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2, 3]}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
THOUGHT = "<|channel>thought\nLet me see.<channel|>"
TEXT_EVENTS = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def quick():
    """A client of a server that gives each canvas one step, where the text does not matter."""
    with serving(settings=GenerationSettings(max_denoising_steps=1)) as running:
        yield client_of(running)
        assert not running.bugs


def client_of(running, **more) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, **more)


def create(client, input=ASKED, **fields):
    return client.responses.create(model="bundled", input=input, **fields)


def events_of(running, **fields) -> list[dict]:
    """The events of a stream, each with its name and number checked."""
    body = {"model": "bundled", "input": ASKED, "stream": True, **fields}
    answer = ask(running, post("/v1/responses", body))
    assert answer.status == 200, answer
    blocks = answer.body.decode().split("\n\n")
    assert blocks.pop() == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == number
    return events


def kinds_of(events) -> list[str]:
    return [event["type"] for event in events]


def test_a_response_is_a_message_with_its_usage(client):
    response = create(client, instructions=None, metadata={"a": "b"})
    (item,) = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert response.output_text == SORTED and response.status == "completed"
    assert (response.object, response.model, response.error) == ("response", "bundled", None)
    assert response.incomplete_details is None and response.metadata == {"a": "b"}
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (29, 8, 37)
    assert 0 <= usage.input_tokens_details.cached_tokens < 29
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert usage.model_extra["diffusion"]["steps"] >= 1
    assert not response.model_extra.keys() - {"store"} and not item.model_extra


def test_a_stream_has_all_events_in_order(server):
    events = events_of(server, input=COUNTING)
    begin = ["response.created", "response.in_progress"]
    last = len(events) - 4  # a delta or two for two canvases: a late reader gets the text as one
    assert 5 <= last <= 6
    item = [*TEXT_EVENTS[:2], *TEXT_EVENTS[2:3] * (last - 4), *TEXT_EVENTS[3:]]
    assert kinds_of(events) == [*begin, *item, "response.completed"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    deltas = [event["delta"] for event in events if "delta" in event]
    assert "".join(deltas) == events[last]["text"] == COUNTED and all(deltas)
    added, done = events[2]["item"], events[last + 2]["item"]
    assert (added["content"], added["status"]) == ([], "in_progress")
    assert (done["content"][0]["text"], done["status"]) == (COUNTED, "completed")
    assert added["id"] == done["id"] == events[4]["item_id"]
    assert events[-1]["response"]["output"] == [done]
    assert events[-1]["response"]["usage"]["output_tokens"] == 3 * 26


def test_the_clients_stream_ends_with_the_response_of_a_whole_answer(client):
    seed = {"seed": 4}
    with client.responses.stream(model="bundled", input=ASKED, extra_body=seed) as told:
        streamed = told.get_final_response()
    whole = create(client, extra_body=seed)
    assert streamed.output_text == whole.output_text
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert streamed.to_dict().keys() - {"usage"} == whole.to_dict().keys() - {"usage"}


def test_a_limit_makes_the_response_incomplete(client, server):
    cut = create(client, max_output_tokens=3)
    assert (cut.output_text, cut.status) == ("1 3", "incomplete")
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete" and cut.usage.output_tokens == 3
    last = events_of(server, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete" and last["response"]["status"] == "incomplete"


def test_a_required_tool_is_called_as_declared(quick):
    response = create(quick, tools=[WEATHER], tool_choice="required")
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    arguments = json.loads(call.arguments)
    assert arguments["city"] in ("Oslo", "Rome") and set(arguments) <= {"city", "days"}


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "time"},
        {"type": "allowed_tools", "mode": "required", "tools": [TIME]},
    ],
)
def test_a_chosen_tool_is_called_and_no_other(quick, choice):
    with quick.responses.stream(
        model="bundled",
        input=ASKED,
        tools=[WEATHER, TIME],
        tool_choice=choice,
        parallel_tool_calls=False,
    ) as told:
        (call,) = told.get_final_response().output
    assert (call.name, call.arguments) == ("time", "{}")


def test_thoughts_text_and_calls_are_items():
    answer = f"{THOUGHT}I look.{CALL}\n{CALL}"
    with serving(model=scripted(*[answer] * 3)) as running:
        whole = create(client_of(running), tools=[WEATHER], reasoning={"effort": "high"})
        events = events_of(running, tools=[WEATHER])
        single = create(client_of(running), tools=[WEATHER], parallel_tool_calls=False)
    thought, _, *calls = whole.output
    assert [item.type for item in whole.output] == ["reasoning", "message", *["function_call"] * 2]
    assert [part.text for part in thought.content] == ["Let me see."] and thought.summary == []
    assert whole.output_text == "I look.\n" and "Let me see" not in whole.output_text
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Rome", "days": 2}] * 2
    assert calls[0].call_id != calls[1].call_id and calls[0].id != calls[0].call_id
    details = whole.usage.output_tokens_details
    assert 0 < details.reasoning_tokens < whole.usage.output_tokens
    assert [item.type for item in single.output] == ["reasoning", "message", "function_call"]

    without_deltas = [kind for kind in kinds_of(events) if not kind.endswith(".delta")]
    reasoning = [kind.replace("output_text", "reasoning_text") for kind in TEXT_EVENTS]
    expected = [*reasoning, *TEXT_EVENTS, *CALL_EVENTS, *CALL_EVENTS]
    expected = [kind for kind in expected if not kind.endswith(".delta")]
    assert without_deltas[2:-1] == expected
    done = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert [json.loads(e["arguments"]) for e in done] == [{"city": "Rome", "days": 2}] * 2
    assert [e["output_index"] for e in events if "item" in e] == [0, 0, 1, 1, 2, 2, 3, 3]
    thoughts = [e["delta"] for e in events if e["type"] == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "Let me see."


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_name_that_no_tool_may_have_is_kept(stream):
    odd = f"<|tool_call>call:don't!{'x' * 150}{{}}<tool_call|>"
    with serving(model=scripted(odd, "ok")) as running:
        client = client_of(running)
        made = create(client, tools=[WEATHER], stream=stream)
        if stream:
            *_, last = made
            made = last.response
        (call,) = made.output
        assert call.name.startswith("don't!")
        done = {"type": "function_call_output", "call_id": call.call_id, "output": "unknown"}
        then = create(client, [done], previous_response_id=made.id, tools=[WEATHER])
        assert then.output_text == "ok"


def test_a_million_wrong_values_are_one_error():
    start = time.process_time()
    with pytest.raises(ApiError, match="metadata") as error:
        checked(ResponsesRequest, {"metadata": dict.fromkeys(map(str, range(400_000)), 1)})
    assert error.value.param == "metadata" and time.process_time() - start < 1


def test_a_call_that_the_limit_cuts_is_left_out():
    with serving(model=scripted(*[f"I look.{CALL}"] * 2)) as running:
        whole = create(client_of(running), tools=[WEATHER], max_output_tokens=14)
        events = events_of(running, tools=[WEATHER], max_output_tokens=14)
    assert whole.status == "incomplete" and whole.output_text == "I look."
    assert [item.type for item in whole.output] == ["message"]
    assert events[-1]["type"] == "response.incomplete" and "<|" not in json.dumps(events)


def test_formats_are_kept(quick):
    response = create(quick, text=FORMAT)
    assert json.loads(response.output_text)["n"] in (1, 2, 3)
    free = create(quick, text={"format": {"type": "json_object"}}, max_output_tokens=40)
    assert isinstance(json.loads(free.output_text), dict)
    assert create(quick, text={"format": {"type": "text"}}).text.format.type == "text"


def test_with_a_format_an_answer_fits_it_or_is_a_call():
    with serving(model=scripted('{"n": 2}', CALL, '{"n": 7}')) as running:
        fields = {"tools": [WEATHER], "text": FORMAT}
        written, called, mended = (create(client_of(running), **fields) for _ in range(3))
    assert json.loads(written.output_text) == {"n": 2}
    assert mended.output_text.replace(" ", "") in ('{"n":1}', '{"n":2}', '{"n":3}')
    assert [item.type for item in called.output] == ["function_call"]


class Number(BaseModel):
    n: Literal[1, 2, 3]


def test_the_clients_own_types_are_kept(quick):
    parsed = quick.responses.parse(model="bundled", input=ASKED, text_format=Number)
    assert parsed.output_parsed.n in (1, 2, 3)
    tool = openai.pydantic_function_tool(Number)
    called = quick.responses.parse(
        model="bundled", input=ASKED, tools=[tool], tool_choice="required"
    )
    assert called.output[0].parsed_arguments.n in (1, 2, 3)


def test_a_conversation_goes_on_from_a_response_that_is_kept(server, client):
    first = create(client, ASKED, instructions="Be short.")
    second = create(client, "Sort: 9 2", previous_response_id=first.id)
    history = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Sort: 9 2"},
    ]
    alone = create(client, history)  # instructions are not handed on
    assert second.usage.input_tokens == alone.usage.input_tokens
    assert second.previous_response_id == first.id
    counted = client.responses.input_tokens.count(
        model="bundled", input="Sort: 9 2", previous_response_id=first.id
    )
    assert counted.input_tokens == second.usage.input_tokens
    streamed = events_of(server, input="Sort: 9 2", previous_response_id=first.id)[-1]["response"]
    assert streamed["usage"]["input_tokens"] == second.usage.input_tokens
    third = create(client, "Sort: 5", previous_response_id=streamed["id"])
    assert third.usage.input_tokens > second.usage.input_tokens


def test_a_kept_response_is_found_listed_and_deleted(client):
    made = create(client)
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    (item,) = client.responses.input_items.list(made.id).data
    assert (item.role, item.content[0].text) == ("user", ASKED)
    with pytest.raises(openai.BadRequestError, match="complete"):
        client.responses.cancel(made.id)
    client.responses.delete(made.id)
    for act in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as error:
            act(made.id)
        assert error.value.param == "response_id"
    with pytest.raises(openai.BadRequestError) as error:
        create(client, previous_response_id=made.id)
    assert error.value.code == "previous_response_not_found"
    assert error.value.param == "previous_response_id"


def test_a_response_that_shall_not_be_kept_is_not(client):
    made = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def kept(name: str, text: str = "") -> Kept:
    return Kept({"id": name}, [{"role": "user", "content": text}], [])


def test_the_store_forgets_what_was_not_used_for_the_longest_time():
    store = ResponseStore(Limits(max_kept_responses=2))
    for name in ("a", "b"):
        store.put(kept(name))
    store.get("a")
    store.put(kept("c"))
    assert store.get("a") and store.get("c") and len(store) == 2
    with pytest.raises(ApiError):
        store.get("b")


def test_the_store_is_bounded_in_bytes():
    store = ResponseStore(Limits(max_kept_mb=0.001))
    for name in "abcdef":
        store.put(kept(name, "x" * 400))
    assert len(store) == 2
    store.put(kept("large", "x" * 2000))  # alone larger than the store
    assert len(store) == 2 and store.get("f")
    store.drop("f")
    store.drop("e")
    store.put(kept("g", "x" * 900))
    assert len(store) == 1


def conversation(*items, before=(), **fields):
    body = checked(Counted, {"model": "x", "input": list(items), **fields})
    return with_instructions(messages_of(body, list(before), Limits()), body.instructions)


def call_of(name, arguments, number="c"):
    function = {"name": name, "arguments": arguments}
    return {"id": number, "type": "function", "function": function}


def test_items_become_messages_of_the_template():
    text = {"type": "input_text", "text": "a"}
    thought = {"type": "reasoning_text", "text": "Hm."}
    called = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x": 1}'}
    made = conversation(
        {"type": "message", "role": "developer", "content": [text]},
        {"role": "user", "content": [text, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [thought]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I", "annotations": []}]},
        called,
        {**called, "call_id": "d", "name": "g", "namespace": "mcp__x__"},
        {"type": "custom_tool_call", "call_id": "e", "name": "apply_patch", "input": "xx"},
        {"type": "function_call_output", "call_id": "c", "output": "one"},
        {"type": "function_call_output", "call_id": "d", "output": [text]},
        {"type": "custom_tool_call_output", "call_id": "e", "output": ""},
        {"role": "user", "content": "so?"},
        instructions="Be short.",
    )  # fmt: skip
    calls = [
        call_of("f", {"x": 1}),
        call_of("mcp__x__g", {"x": 1}, "d"),
        call_of("apply_patch", {"input": "xx"}, "e"),
    ]
    assert made == [
        {"role": "system", "content": "Be short.\n\na"},
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "I", "tool_calls": calls, "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "c", "content": "one"},
        {"role": "tool", "tool_call_id": "d", "content": "a"},
        {"role": "tool", "tool_call_id": "e", "content": ""},
        {"role": "user", "content": "so?"},
    ]


def test_messages_before_are_not_changed():
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    called = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "z"}
    made = conversation(called, output, before=before)
    assert made[1]["tool_calls"] and "tool_calls" not in before[1] and len(before) == 2


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0].image_url"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0]"),
        ([{"role": "user"}], "input[0].content"),
        ([{"type": "message", "content": "x"}], "input[0].role"),
        ([{"id": "msg_1"}], "input[0]"),
        ([{"type": "web_search_call", "id": "w"}], "input[0]"),
        ([{"type": "function_call", "call_id": "c", "name": "f"}], "input[0].arguments"),
        (
            [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}],
            "input[0].arguments",
        ),
        ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}], "input"),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], "input[0].call_id"),
    ],
)
def test_items_that_cannot_be_read_are_refused_by_name(items, param):
    with pytest.raises(ApiError) as error:
        conversation(*items)
    assert (error.value.status, error.value.param) == (400, param)


def test_tools_of_all_kinds_become_functions():
    namespace = {"type": "namespace", "name": "mcp__x__", "description": "", "tools": [WEATHER]}
    untold = [{"type": "web_search", "external_web_access": True}, {"type": "image_generation"}]
    given = [*untold, PATCH, namespace, WEATHER]
    tools = tools_of([checked(ToolField, tool) for tool in given])
    patch, inner, outer = tools.told
    assert (patch.name, inner.name, outer.name) == ("apply_patch", "mcp__x__weather", "weather")
    assert "start: /x+/" in patch.description and patch.parameters["required"] == ["input"]
    assert tools.called["mcp__x__weather"].namespace == "mcp__x__"
    assert tools.grammars == {"apply_patch"}


REFUSED = [
    ({"top_p": 0.5}, "top_p"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"temperature": 3}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ({"input": []}, "input"),
    ({"input": [{"role": "cook", "content": "x"}]}, "input"),
    ({"tool_choice": "required"}, "tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
    ({"tools": [PATCH], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [PATCH], "tool_choice": {"type": "custom", "name": "apply_patch"}}, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "code_interpreter", "container": "c"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server, fields, param):
    body = {"model": "bundled", "input": ASKED, **fields}
    answer = ask(server, post("/v1/responses", body))
    assert answer.status == 400 and answer.error["param"] == param
    assert answer.error["message"]


def test_fields_that_ask_for_nothing_and_unknown_ones_are_ignored(client):
    more = {"nonsense": {"a": [1]}, "max_tool_calls": 3, "client_metadata": {"a": "b"}}
    harmless = {"top_p": 1, "top_logprobs": 0, "background": False, "truncation": "disabled"}
    ignored = {"service_tier": "auto", "prompt_cache_key": "k", "user": "u"}
    answer = create(client, **harmless, **ignored, extra_body=more)
    assert answer.output_text == SORTED


def test_a_schema_that_cannot_be_kept_is_refused_by_its_keyword(client, server):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    before = server.state.metrics.count("steps_total")
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    tool = {"type": "function", "name": "f", "parameters": schema, "strict": True}
    for fields, param in (({"text": form}, "text.format.schema"), ({"tools": [tool]}, "tools")):
        with pytest.raises(openai.BadRequestError) as error:
            create(client, **fields)
        assert error.value.code == "constraint" and error.value.param == param
        assert "uniqueItems" in error.value.body["message"]
    assert server.state.metrics.count("steps_total") == before


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(client):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, "x" * 2000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "input"


def test_a_stream_that_fails_ends_with_a_failed_response(monkeypatch):
    monkeypatch.setattr(sse, "_FIRST_SECONDS", 0.05)
    with serving(settings=LONG) as running:
        stream = iter(create(client_of(running), COUNTING, stream=True))
        assert next(stream).type == "response.created"
        running.engine.close(cancel=True)
        *_, last = stream
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error.code == "server_error" and last.response.error.message
        assert get(running, f"/v1/responses/{last.response.id}").status == 404


def test_a_quiet_stream_says_that_it_is_in_progress(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    slow = GenerationSettings(max_denoising_steps=40, stability_threshold=40)
    with (
        serving(settings=slow) as running,
        client_of(running).responses.stream(model="bundled", input=ASKED) as told,
    ):
        kinds = [event.type for event in told]
        assert told.get_final_response().output_text
    assert kinds.count("response.in_progress") > 2 and kinds[-1] == "response.completed"


def test_a_client_that_closes_its_stream_ends_its_row():
    with serving(settings=LONG) as running:
        stream = create(client_of(running), COUNTING, stream=True)
        next(iter(stream))
        assert running.engine.counts["running"] == 1
        stream.close()
        assert eventually(lambda: is_idle(running.engine))
        assert running.state.metrics.count("cancelled_total") == 1


CODEX = {
    "model": "bundled",
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Runs a command.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {"cmd": {"type": "string"}, "yield_time_ms": {"type": "number"}},
                "required": ["cmd"],
                "additionalProperties": False,
            },
        },
        PATCH,
        {"type": "web_search", "external_web_access": True},
        {"type": "image_generation", "output_format": "png"},
        {
            "type": "namespace",
            "name": "mcp__docs__",
            "description": "Tools of docs.",
            "tools": [{"type": "function", "name": "find", "strict": False, "parameters": {}}],
        },
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-thread",
    "client_metadata": {"root_turn_id": "0199-turn", "x-codex-turn-metadata": "{}"},
}


def message(role: str, text: str) -> dict:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "id": "msg_0199", "role": role, "content": content}


def codex_reads(events) -> SimpleNamespace:
    """What Codex takes from a stream: the text, the finished items, the end."""
    ends = [e for e in events if e["type"] == "response.completed"]
    return SimpleNamespace(
        text="".join(e["delta"] for e in events if e["type"] == "response.output_text.delta"),
        items=[e["item"] for e in events if e["type"] == "response.output_item.done"],
        usage=ends[-1]["response"]["usage"],
        id=ends[-1]["response"]["id"],
    )


def test_a_turn_of_codex_is_answered():
    """The shape that Codex 0.171.0 sent to `tests.serve.agents`: every request has all items again,
    and nothing is kept."""
    script = [
        f'{THOUGHT}<|tool_call>call:exec_command{{cmd:<|"|>ls<|"|>}}<tool_call|>',
        '<|tool_call>call:apply_patch{input:<|"|>xx<|"|>}<tool_call|>'
        '<|tool_call>call:mcp__docs__find{q:<|"|>a<|"|>}<tool_call|>',
        "Done.",
    ]
    items = [message("developer", "You are Codex."), message("developer", "Sandbox: none.")]
    items.append(message("user", "List the files."))
    with serving(model=scripted(*script)) as running:
        turns = []
        for _ in script:
            turns.append(codex_reads(events_of(running, **{**CODEX, "input": items})))
            items = [*items, *turns[-1].items]
            if items[-2]["type"] == "reasoning":
                items[-2] = {**items[-2], "encrypted_content": None}
            for item in turns[-1].items:
                if "call_id" in item:
                    kind = f"{item['type']}_output"
                    items.append({"type": kind, "call_id": item["call_id"], "output": "ok"})
        assert not running.bugs
    one, two, three = turns
    assert [item["type"] for item in one.items] == ["reasoning", "function_call"]
    assert json.loads(one.items[1]["arguments"]) == {"cmd": "ls"}
    patch, find = two.items
    assert (patch["type"], patch["name"], patch["input"]) == (
        "custom_tool_call",
        "apply_patch",
        "xx",
    )
    assert (find["name"], find["namespace"]) == ("find", "mcp__docs__")
    assert three.text == "Done." and three.usage["input_tokens"] > two.usage["input_tokens"]
