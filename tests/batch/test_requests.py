"""Lines of a batch on the bundled model: each has the answer that it would have alone, and a bad
one has an error."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletion
from openai.types.decision import Decision

from mlx_diffgemma import (
    Constraint,
    Engine,
    GenerationSettings,
    PromptOptions,
    Question,
    decide,
    generate,
)
from mlx_diffgemma.batch.decisions import DecisionLines
from mlx_diffgemma.batch.lines import Line
from mlx_diffgemma.batch.requests import PromptLines, RequestLines, call, is_openai
from mlx_diffgemma.batch.run import run_lines
from mlx_diffgemma.serve.state import Served, State
from tests.engine.cases import loaded

PROMPTS = ("Sort: 6 3 1 7", "Reverse: kaa", "Count from 38 to 63.", "Squares from 2 to 3.")
UNKNOWN = "Who wrote this, and why?"
SEED = 11


@pytest.fixture(scope="module")
def engine():
    with Engine(*loaded(), max_rows=4) as engine:
        yield engine


@pytest.fixture
def state(engine) -> State:
    return State(settings=GenerationSettings(seed=SEED), models={"bundled": Served("it", engine)})


def answered(work, *contents) -> list[dict]:
    """The answers to lines, which run together."""
    raw = [c if isinstance(c, bytes) else json.dumps(c).encode() for c in contents]
    lines = (Line(n, content) for n, content in enumerate(raw, 1))
    found: list[dict] = []
    run_lines(lines, work, lambda each: found.append(each.answer), at_once=8)
    return json.loads(json.dumps(found))


def chat(name: str, *messages: str, **fields) -> dict:
    turns = [{"role": "user", "content": text} for text in messages]
    body = {"model": "bundled", "messages": turns, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def alone(prompt: str, seed: int, **more) -> str:
    settings = GenerationSettings(seed=seed, **more.pop("settings", {}))
    return generate(*loaded(), prompt, settings=settings, **more)


def test_each_line_of_openais_form_has_the_answer_that_generate_gives_alone(state):
    lines = [chat(f"n{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    lines.append(chat("own", PROMPTS[2], seed=77, max_tokens=20, temperature=0.5))
    found = answered(RequestLines(state).answer, *lines)
    expected = [alone(prompt, SEED + i, max_tokens=4096) for i, prompt in enumerate(PROMPTS)]
    expected.append(alone(PROMPTS[2], 77, settings={"temperature": 0.5}, max_tokens=20))
    for line, each, text in zip(lines, found, expected, strict=True):
        assert set(each) == {"id", "custom_id", "response", "error"}
        assert each["custom_id"] == line["custom_id"] and each["error"] is None
        assert each["response"]["status_code"] == 200 and each["response"]["request_id"]
        completion = ChatCompletion.model_validate(each["response"]["body"], strict=True)
        assert completion.choices[0].message.content == text
    assert found[-1]["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert len({each["id"] for each in found}) == len(found)


def test_seeds_count_from_the_first_line(engine):
    """What is written in one step to a prompt that says nothing depends on the noise."""
    once = GenerationSettings(seed=SEED, max_denoising_steps=1)
    state = State(settings=once, models={"bundled": Served("it", engine)})
    found = answered(RequestLines(state).answer, *(chat(f"n{i}", UNKNOWN) for i in range(3)))
    texts = [each["response"]["body"]["choices"][0]["message"]["content"] for each in found]
    told = {"settings": {"max_denoising_steps": 1}, "max_tokens": 4096}
    expected = [alone(UNKNOWN, SEED + i, **told) for i in range(4)]
    assert texts == expected[:3] and len(set(expected)) == 4


def test_each_plain_line_has_the_answer_that_generate_gives_alone(state):
    lines = [
        {"prompt": PROMPTS[0]},
        {"id": "mine", "prompt": PROMPTS[1], "settings": {"seed": 5, "policy": "fast"}},
        {"messages": [{"role": "user", "content": PROMPTS[2]}], "max_tokens": 12, "id": 3.5},
        {"prompt": PROMPTS[3], "settings": {"max_new_tokens": 9}, "seed": 8, "temperature": 0},
        {"prompt": "Hello", "constraint": {"choices": ["yes", "no"]}, "system_prompt": "Be."},
        {"prompt": PROMPTS[0], "stop": ["6"]},
    ]
    found = answered(PromptLines(state).answer, *lines)
    fast = {"policy": "fast"}
    expected = [
        alone(PROMPTS[0], SEED, max_tokens=4096),
        alone(PROMPTS[1], 5, settings=fast, max_tokens=4096),
        alone(PROMPTS[2], SEED + 2, max_tokens=12),
        alone(PROMPTS[3], 8, settings={"temperature": 0}, max_tokens=9),
        alone(
            "Hello",
            SEED + 4,
            constraint=Constraint.choices(["yes", "no"]),
            prompt_options=PromptOptions(system_prompt="Be."),
            max_tokens=4096,
        ),
        alone(PROMPTS[0], SEED + 5, stop=["6"], max_tokens=4096),
    ]
    assert [each["text"] for each in found] == expected
    assert [each["id"] for each in found] == [1, "mine", 3.5, 4, 5, 6]
    assert [each["seed"] for each in found] == [SEED, 5, SEED + 2, 8, SEED + 4, SEED + 5]
    assert [each["finish_reason"] for each in found] == ["stop", "stop", "length", "length"] + (
        ["stop"] * 2
    )
    assert all(each["new_tokens"] and each["prompt_tokens"] and each["steps"] for each in found)


EVENTS = {"chat": {"messages": [{"role": "user", "content": PROMPTS[0]}]}}


@pytest.mark.parametrize("line", [{"url": "/v1/\ud800"}, {"url": "/x/events", "body": EVENTS}])
def test_a_route_that_no_batch_can_ask_is_an_error_of_its_line_alone(state, line):
    wrong, right = answered(
        RequestLines(state).answer, chat("a", PROMPTS[0]) | line, chat("b", PROMPTS[0])
    )
    assert wrong["error"]["code"] == "invalid_line" and wrong["response"] is None
    assert right["response"]["status_code"] == 200


def test_constraints_come_through_response_format_in_both_forms(state):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    (given,) = answered(RequestLines(state).answer, chat("a", "Hello", response_format=form))
    text = given["response"]["body"]["choices"][0]["message"]["content"]
    assert json.loads(text)["n"] in (1, 2)
    (given,) = answered(PromptLines(state).answer, {"prompt": "Hello", "response_format": form})
    assert json.loads(given["text"])["n"] in (1, 2)
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "http://x/y"}}}
    (given,) = answered(RequestLines(state).answer, chat("a", "Hello", response_format=bad))
    assert given["response"]["status_code"] == 400
    assert "$ref" in given["response"]["body"]["error"]["message"]


def test_decisions_are_requests_too(state):
    question = {"type": "choice", "instructions": "Which?", "name": "w"}
    body = {
        "input": "Sort: 3 1",
        "questions": [question | {"choices": [{"value": "3"}, {"value": "1"}]}],
    }
    line = {"custom_id": "d", "method": "POST", "url": "/v1/decisions", "body": body}
    (found,) = answered(RequestLines(state).answer, line)
    decision = Decision.model_validate(found["response"]["body"], strict=True)
    expected = decide(*loaded(), "Sort: 3 1", Question.choice("Which?", ["3", "1"])).answer
    (answer,) = decision.answers
    assert answer.type == "choice" and answer.choice == expected.value
    assert answer.probabilities[0].probability == pytest.approx(expected.probabilities[0], abs=1e-5)


BAD = [
    (b"oops", "line 1 is not JSON"),
    (b"[]", "line 1 is no JSON object"),
    ({"body": {}}, "needs a custom_id"),
    ({"custom_id": 3}, "needs a custom_id"),
    (chat("a") | {"method": "GET"}, "the method must be POST, got 'GET'"),
    (chat("a") | {"url": "http://x"}, "the url must be a path"),
    (chat("a") | {"body": 3}, "the body must be an object"),
    (chat("a", "x", stream=True), "a batch does not stream"),
]


@pytest.mark.parametrize(("line", "expected"), BAD)
def test_a_line_that_holds_no_request_has_an_error_and_the_next_an_answer(state, line, expected):
    bad, good = answered(RequestLines(state).answer, line, chat("b", PROMPTS[0]))
    assert bad["response"] is None and bad["error"]["code"] == "invalid_line"
    assert expected in bad["error"]["message"]
    assert good["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("line", "status", "expected"),
    [
        (chat("a", "x", temperature=9), 400, "temperature"),
        (chat("a", "x", logprobs=True), 400, "logprobs is not supported"),
        (chat("a"), 400, "messages is empty"),
        (chat("a", "x", model="other"), 404, "there is no model 'other'"),
        (chat("a", "7 " * 3000), 400, "positions are free for it"),
        (chat("a", "x") | {"url": "/v1/nothing"}, 404, "there is no route"),
    ],
)
def test_a_request_that_the_server_refuses_has_its_status(state, line, status, expected):
    (found,) = answered(RequestLines(state).answer, line)
    assert found["error"] is None and found["response"]["status_code"] == status
    assert expected in found["response"]["body"]["error"]["message"]


def test_a_custom_id_is_used_once_also_across_runs(state):
    lines = RequestLines(state)
    lines.pass_by([Line(1, json.dumps(chat("a", "x")).encode()), Line(2, b"oops")])
    first, second, third = answered(lines.answer, chat("a", "x"), chat("b", "x"), chat("b", "x"))
    assert [e["error"] is None for e in (first, second, third)] == [False, True, False]
    assert "'b' of an earlier line" in third["error"]["message"]
    assert third["custom_id"] == "b"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "line 1 is not JSON"),
        ({}, "needs a prompt or messages"),
        ({"prompt": "x", "messages": []}, "needs a prompt or messages"),
        ({"prompt": 3}, "the prompt must be text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "settings": {"sed": 1}}, "there is no setting 'sed'"),
        ({"prompt": "x", "settings": {"seed": "a"}}, "seed must be a whole number"),
        ({"prompt": "x", "settings": [1]}, "settings must be an object"),
        ({"prompt": "x", "settings": {"entropy_bound": 1, "policy": "fast"}}, "has no effect"),
        ({"prompt": "x", "thinking": "yes"}, "thinking must be true or false"),
        ({"prompt": "x", "n": 2}, "n has no meaning"),
        ({"prompt": "x", "system_prompt": 2}, "system_prompt must be text"),
        ({"prompt": "x", "temperature": 9}, "temperature"),
    ],
)
def test_a_plain_line_that_cannot_be_answered_has_an_error(state, line, expected):
    bad, good = answered(PromptLines(state).answer, line, {"prompt": PROMPTS[0]})
    assert set(bad) == {"id", "error"} and bad["id"] == 1
    assert expected in bad["error"] and "\n" not in bad["error"]
    assert good["text"] == alone(PROMPTS[0], SEED + 1, max_tokens=4096)


def test_lines_of_decisions_have_questions_of_their_own_or_the_commands(engine):
    question = Question.choice("Which?", ["3", "1"])
    work = DecisionLines(engine, (question,)).answer
    own = {"type": "score", "instructions": "How?", "levels": [{"label": "x"}, {"label": "y"}]}
    lines = [
        {"input": "Sort: 3 1"},
        {"input": [{"role": "user", "content": "Sort: 3 1"}], "id": "m", "questions": [own]},
        {"questions": [own]},
        {"input": "x", "questions": [{"type": "score"}]},
        {"input": "x", "questions": 3},
        b"oops",
    ]
    found = answered(work, *lines)
    expected = decide(*loaded(), "Sort: 3 1", question)
    (answer,) = found[0]["answers"]
    assert answer["choice"] == expected.answer.value
    assert answer["share"] == pytest.approx(expected.answer.share, rel=1e-3)
    assert found[0]["prompt_tokens"] == expected.prompt_tokens
    assert found[1]["id"] == "m" and found[1]["answers"][0]["type"] == "score"
    for each, said in zip(
        found[2:],
        ("needs `input`", "instructions must be text", "must be a list", "not JSON"),
        strict=True,
    ):
        assert said in each["error"]
    (none,) = answered(DecisionLines(engine).answer, {"input": "x"})
    assert "has no questions" in none["error"]


def test_the_form_of_a_file_is_that_of_its_first_object(tmp_path: Path):
    file = tmp_path / "in.jsonl"
    for text, expected in (
        ('oops\n{"custom_id": "a"}\n', True),
        ('{"prompt": "x"}\n{"custom_id": "a"}\n', False),
        ("oops\n", False),
        ('{"messages": []}\n', False),
        ('{"body": {}}\n', True),
    ):
        file.write_text(text)
        assert is_openai(file) == expected, text


def test_a_call_without_a_network_is_what_a_connection_would_be(state):
    async def app(scope, receive, send):
        body = (await receive())["body"]
        waits = asyncio.ensure_future(receive())
        done, _ = await asyncio.wait({waits}, timeout=0.05)
        assert not done, "the client has gone"
        waits.cancel()
        told = f"{scope['path']}?{scope['query_string'].decode()} {body.decode()}"
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": told.encode()[:4], "more_body": True})
        await send({"type": "http.response.body", "body": told.encode()[4:]})

    assert asyncio.run(call(app, "POST", "/v1/x?y=1", b"{}")) == (418, b"/v1/x?y=1 {}")
