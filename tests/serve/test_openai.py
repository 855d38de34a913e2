"""OpenAI's own client against the server: chat, streams, tools, structured answers, errors."""

from __future__ import annotations

import json
import threading
from itertools import pairwise

import openai
import pytest

from tests.engine.cases import eventually, is_idle
from tests.serve.cases import COUNT, COUNTED, LONG, PATIENCE, SORT, SORTED, scripted, serving
from tests.write.test_tool_calls import TOKENIZER, L, Script

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2, 3]}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
SAY = [{"role": "user", "content": "Write something."}]
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
THOUGHT = "<|channel>thought\nLet me see.<channel|>"


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def client_of(running, **more) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, **more)


def create(client, messages=SORT, **fields):
    return client.chat.completions.create(model="bundled", messages=messages, **fields)


def test_a_chat_is_answered_with_its_usage(client):
    answer = create(client, seed=1)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (SORTED, "assistant")
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    usage = answer.usage
    assert usage.prompt_tokens == 29 and usage.completion_tokens == 8  # <turn|> counts
    assert usage.total_tokens == 37
    assert 0 <= usage.prompt_tokens_details.cached_tokens < 29
    diffusion = usage.model_extra["diffusion"]
    assert diffusion["steps"] >= 1 and diffusion["canvases"] == 1 and diffusion["total_ms"] > 0


def test_a_second_request_finds_the_context_of_the_first(client):
    messages = [{"role": "user", "content": "Sort: 9 8 7 6 5 4"}]
    first, second = (create(client, messages, seed=1).usage for _ in range(2))
    assert first.prompt_tokens == second.prompt_tokens
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 25  # up to the end of the user's turn


def test_a_stream_begins_with_the_role_and_ends_with_the_usage(client):
    chunks = list(create(client, COUNT, stream=True, stream_options={"include_usage": True}))
    *told, usage = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in told[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in told)
    assert text == COUNTED
    reasons = [chunk.choices[0].finish_reason for chunk in told]
    assert reasons == [None] * (len(told) - 1) + ["stop"]
    assert usage.choices == [] and usage.usage.completion_tokens == 3 * 26
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_diffusing_a_stream_has_settled_text_only(client):
    chunks = list(create(client, COUNT, stream=True))
    written = sum(bool(chunk.choices[0].delta.content) for chunk in chunks)
    assert written in (1, 2)  # of two canvases; a late reader gets them as one
    assert all(chunk.usage is None for chunk in chunks)


class Waiting(Script):
    """Begins its second canvas only once it may."""

    def __init__(self, *texts: str):
        super().__init__(*texts)
        self.may_go_on = threading.Event()

    def canvas_states(self, canvases, opened, **more):
        if opened[0].commits and not self.may_go_on.wait(PATIENCE):
            raise TimeoutError("nobody read the first canvas")
        return super().canvas_states(canvases, opened, **more)


def test_the_first_canvas_is_read_before_the_second_is_begun():
    text = "word " * (L // 4)
    model = Waiting(text)
    with serving(model=(model, TOKENIZER)) as running:
        told = []
        for chunk in create(client_of(running), stream=True, max_tokens=2 * L):
            if chunk.choices[0].delta.content:
                told.append(chunk.choices[0].delta.content)
                model.may_go_on.set()
    assert len(told) == 2 and "".join(told) == text


def test_drafts_replace_each_other_and_end_with_the_answer(client):
    for messages, most, drafts in ((COUNT, 100, 2), (SAY, 30, 3)):
        limited = {"seed": 3, "max_tokens": most}
        settled = create(client, messages, **limited).choices[0].message.content
        body = {"diffusing": True}
        chunks = list(create(client, messages, stream=True, extra_body=body, **limited))
        texts = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
        assert texts[-1] == settled and len(texts) >= drafts
        assert all(one != two for one, two in pairwise(texts))


@pytest.mark.long
def test_a_seed_fixes_the_answer(client):
    one, two, other = (create(client, SAY, seed=seed, max_tokens=30) for seed in (5, 5, 6))
    texts = [each.choices[0].message.content for each in (one, two, other)]
    assert texts[0] == texts[1] != texts[2]


def test_n_answers_are_those_of_the_next_seeds(client):
    both = create(client, SAY, seed=5, n=2, max_tokens=30)
    alone = [create(client, SAY, seed=seed, max_tokens=30) for seed in (5, 6)]
    texts = [each.choices[0].message.content for each in alone]
    assert [choice.message.content for choice in both.choices] == texts
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert both.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)


def test_n_answers_are_streamed_by_index(client):
    texts = {0: "", 1: ""}
    for chunk in create(client, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: SORTED, 1: SORTED}


def test_a_stop_string_ends_the_answer(client):
    answer = create(client, stop=["6"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("1 3 ", "stop")
    chunks = list(create(client, stop="6", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "1 3 "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_cuts_the_answer(client, name):
    answer = create(client, **{name: 3})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("1 3", "length")
    assert answer.usage.completion_tokens == 3


def test_json_schema_and_json_object_are_kept(client):
    strict = {"name": "answer", "schema": SCHEMA, "strict": True}
    form = {"type": "json_schema", "json_schema": strict}
    value = json.loads(create(client, response_format=form).choices[0].message.content)
    assert value["n"] in (1, 2, 3) and value["ok"] in (True, False) and len(value) == 2
    limited = create(client, response_format={"type": "json_object"}, max_tokens=40)
    assert isinstance(json.loads(limited.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [({"choices": ["yes", "no"]}, {"yes", "no"}), ({"regex": "a[bc]d"}, {"abd", "acd"})],
)
def test_choices_and_expressions_are_kept(client, constraint, fits):
    answer = create(client, extra_body={"constraint": constraint})
    assert answer.choices[0].message.content in fits


def test_a_required_tool_is_called_as_declared(client):
    answer = create(client, tools=[WEATHER], tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.type, call.function.name) == ("function", "weather")
    assert arguments["city"] in ("Oslo", "Rome") and set(arguments) <= {"city", "days"}


def test_with_a_format_an_answer_fits_it_or_is_calls():
    """As pydantic-ai asks with `NativeOutput` and tools."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    right, wrong = '{"n": 2, "ok": true}', '{"n": 7, "ok": true}'
    with serving(model=scripted(right, CALL, wrong, "n", CALL)) as running:
        client = client_of(running)
        fields = {"tools": [WEATHER], "max_tokens": 48}
        either = [create(client, response_format=form, **fields) for _ in range(3)]
        chosen = create(client, extra_body={"constraint": {"choices": ["yes", "no"]}}, **fields)
        forced = create(client, response_format=form, tool_choice="required", **fields)
    written, called, mended, chosen, forced = (
        answer.choices[0].message for answer in (*either, chosen, forced)
    )
    assert json.loads(mended.content)["n"] in (1, 2, 3)
    assert (json.loads(written.content), written.tool_calls) == ({"n": 2, "ok": True}, None)
    assert json.loads(called.tool_calls[0].function.arguments) == {"city": "Rome", "days": 2}
    assert called.content is forced.content is None and forced.tool_calls
    assert chosen.tool_calls or chosen.content in ("yes", "no")


def test_a_named_tool_is_called_and_no_other(client):
    choice = {"type": "function", "function": {"name": "time"}}
    answer = create(client, tools=[WEATHER, TIME], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "time" and json.loads(call.function.arguments) == {}


def test_calls_text_and_thoughts_of_one_answer():
    answer = f"{THOUGHT}I look.{CALL}{CALL}"
    with serving(model=scripted(answer, answer)) as running:
        client = client_of(running)
        (choice,) = create(client, tools=[WEATHER]).choices
        chunks = list(create(client, tools=[WEATHER], stream=True))
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.reasoning_content.strip() == choice.message.reasoning.strip()
    assert choice.message.reasoning_content.strip() == "Let me see."
    assert len({call.id for call in choice.message.tool_calls}) == 2
    asked = [call.function for call in choice.message.tool_calls]
    assert [(f.name, json.loads(f.arguments)) for f in asked] == [
        ("weather", {"city": "Rome", "days": 2})
    ] * 2
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    assert thought.strip() == "Let me see."
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    heads, bodies = calls[::2], calls[1::2]
    assert [(c.index, c.type, c.function.name, c.function.arguments) for c in heads] == [
        (0, "function", "weather", ""),
        (1, "function", "weather", ""),
    ]
    assert [c.index for c in bodies] == [0, 1] and all(c.id is None for c in bodies)
    assert [json.loads(c.function.arguments)["days"] for c in bodies] == [2, 2]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_one_call_where_parallel_calls_are_not_wanted():
    with serving(model=scripted(CALL + CALL)) as running:
        answer = create(client_of(running), tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1


def test_a_call_cut_by_the_limit_leaves_what_is_whole():
    with serving(model=scripted(*[f"I look.{CALL}{CALL}"] * 2)) as running:
        client = client_of(running)
        most = len(TOKENIZER.encode(f"I look.{CALL}", add_special_tokens=False)) + 9
        answer = create(client, tools=[WEATHER], max_tokens=most)
        chunks = list(create(client, tools=[WEATHER], max_tokens=most, stream=True))
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.content == "I look." and len(choice.message.tool_calls) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_call_in_a_thought_stays_a_thought():
    with serving(model=scripted(f"<|channel>thought\nPerhaps {CALL}?<channel|>No.")) as running:
        (choice,) = create(client_of(running), tools=[WEATHER]).choices
    assert (choice.message.content, choice.message.tool_calls) == ("No.", None)
    assert "call:weather" in choice.message.reasoning_content


def test_a_conversation_with_a_tools_result_is_read(client):
    call = {"name": "weather", "arguments": '{"city": "Rome", "note": "{\\"}\\n"}'}
    messages = [
        {"role": "developer", "content": "Be short."},
        *SORT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_a", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "sunny"},
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("Sort: ", "2 1")]},
    ]
    assert create(client, messages, max_tokens=8).choices[0].message.content is not None


def test_models_are_listed_and_found(client):
    (listed,) = client.models.list().data
    assert listed == client.models.retrieve("bundled")
    assert (listed.id, listed.object, listed.owned_by) == ("bundled", "model", "mlx_diffgemma")
    assert listed.model_extra == {
        "context_length": 2048, "max_model_len": 2048, "canvas_length": 64
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("a/b")
    assert error.value.body["code"] == "model_not_found"


def test_a_request_picks_its_model_and_never_a_file(client):
    with serving(model=scripted("one"), more={"tuned": scripted("two")}) as running:
        both = client_of(running)
        assert [each.id for each in both.models.list().data] == ["bundled", "tuned"]
        for name, text in (("tuned", "two"), ("bundled", "one")):
            answer = both.chat.completions.create(model=name, messages=SORT)
            assert (answer.model, answer.choices[0].message.content) == (name, text)
    for name in ("/etc", "mlx_diffgemma/demo", " "):
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model=name, messages=SORT)
        assert error.value.param == "model"


REFUSED = [
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_p": 0.5}, "top_p"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"temperature": 3}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"tool_choice": "required"}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"response_format": {"type": "json_object"}, "stop": "x"}, "stop"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"extra_body": {"diffusing": True}}, "diffusing"),
    ({"extra_body": {"constraint": {}}}, "constraint"),
    ({"extra_body": {"constraint": {"regex": "("}}}, "constraint.regex"),
    ({"extra_body": {"constraint": {"choices": []}}}, "constraint.choices"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].image_url",
    ),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "cook", "content": "x"}]}, "messages[0].role"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, **fields)
    assert error.value.param == param and param in str(error.value.body["message"])


def test_fields_that_ask_for_nothing_and_unknown_ones_are_ignored(client):
    more = {"top_k": 3, "nonsense": {"a": [1]}, "user": "x", "metadata": {"a": "b"}, "store": False}
    harmless = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False}
    answer = create(client, **harmless, tools=[], tool_choice="auto", extra_body=more)
    assert answer.choices[0].message.content == SORTED


def test_a_schema_that_cannot_be_kept_is_refused_by_its_keyword(client, server):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    before = server.state.metrics.count("steps_total")
    with pytest.raises(openai.BadRequestError) as error:
        create(client, response_format=form)
    assert error.value.code == "constraint" and "uniqueItems" in error.value.body["message"]
    assert error.value.param == "response_format.json_schema.schema"
    assert server.state.metrics.count("steps_total") == before


def test_a_full_queue_is_told_with_the_time_to_wait():
    with serving(settings=LONG, max_rows=1, max_queue=1) as running:
        client = client_of(running)
        streams = [create(client, COUNT, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as error:
            create(client)
        for stream in streams:
            stream.close()
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["retry-after"]) >= 1


def test_while_the_model_loads_the_status_is_503():
    gate = threading.Event()
    with serving(gate=gate) as running:
        client = client_of(running)
        with pytest.raises(openai.InternalServerError) as error:
            create(client)
        assert error.value.status_code == 503 and "loaded" in error.value.body["message"]
        assert int(error.value.response.headers["retry-after"]) >= 1
        gate.set()
        assert eventually(lambda: bool(running.state.models))
        assert create(client).choices[0].message.content == SORTED


def test_a_client_that_closes_its_stream_ends_its_rows():
    with serving(settings=LONG) as running:
        stream = create(client_of(running), COUNT, stream=True, n=2)
        next(iter(stream))
        assert running.engine.counts["running"] == 2
        stream.close()
        assert eventually(lambda: is_idle(running.engine))
        assert running.state.metrics.count("cancelled_total") == 2
