"""`/v1/decisions` as OpenAI's own client uses it, on the bundled model."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, AsyncOpenAI
from openai.types.decision import Decision

from mlx_diffgemma import Engine, Question, decide
from mlx_diffgemma.serve.app import application
from mlx_diffgemma.serve.security import Access
from mlx_diffgemma.serve.state import Served, State
from tests.engine.cases import Made, eventually, is_idle, loaded

TEXT = "Sort: 6 3 1 7"
QUESTIONS = [
    {"type": "predicate", "instructions": "Is the list sorted?", "name": "sorted"},
    {
        "type": "choice",
        "instructions": "Which number is the least?",
        "choices": [{"value": "6"}, {"value": "1", "description": "one"}, {"value": True}],
    },
    {
        "type": "score",
        "instructions": [{"type": "input_text", "text": "How long is it?"}],
        "levels": [{"label": "short"}, {"label": "long", "description": "ten or more"}],
        "name": "length",
    },
]
ASKED = [
    Question.predicate("Is the list sorted?"),
    Question.choice("Which number is the least?", {"6": None, "1": "one", True: None}),
    Question.score("How long is it?", {"short": None, "long": "ten or more"}),
]


@pytest.fixture(scope="module")
def state():
    with Engine(*loaded(), max_rows=4) as engine:
        yield State(models={"bundled": Served("bundled", engine)})


def create(state: State, **body: Any) -> Decision:
    """What the client makes of the answer of the application."""
    bugs: list[Exception] = []

    async def ask() -> Decision:
        app = application(state, Access(), on_bug=bugs.append)
        transport = httpx2.ASGITransport(app=app)
        async with AsyncOpenAI(
            base_url="http://localhost/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
        ) as client:
            return await client.decisions.create(**{"model": "bundled", "input": TEXT} | body)

    try:
        return asyncio.run(ask())
    finally:
        assert not bugs


def test_each_kind_of_question_is_answered_as_decide_answers_it(state):
    found = create(state, questions=QUESTIONS)
    Decision.model_validate(found.model_dump(), strict=True)
    expected = decide(*loaded(), TEXT, ASKED)
    predicate, choice, score = found.answers
    values = [answer.probabilities for answer in expected.answers]
    assert (predicate.type, predicate.name) == ("predicate", "sorted")
    assert predicate.probability == pytest.approx(values[0][0], abs=1e-5)
    assert choice.type == "choice" and choice.name is None
    assert [p.value for p in choice.probabilities] == ["6", "1", True]
    assert [p.probability for p in choice.probabilities] == pytest.approx(values[1], abs=1e-5)
    assert choice.choice == expected.answers[1].value
    assert choice.confidence == pytest.approx(expected.answers[1].confidence, rel=1e-3)
    assert score.type == "score" and score.name == "length"
    assert [(p.label, p.value) for p in score.probabilities] == [("short", 0), ("long", 1)]
    assert score.score == pytest.approx(values[2][1], abs=1e-5)
    usage = found.usage
    assert usage.input_tokens == expected.prompt_tokens and usage.output_tokens == 3
    assert usage.total_tokens == usage.input_tokens + 3
    assert found.model == "bundled"


def test_the_same_request_has_the_same_answer(state):
    first, again = (create(state, questions=QUESTIONS).answers for _ in range(2))
    assert first == again


def test_an_input_may_be_messages_calls_and_their_outputs(state):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_json", "data": {"list": [3, 1]}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "1 3"}]},
        {"type": "message", "role": "user", "content": "Thanks."},
    ]
    found = create(state, input=items, questions=QUESTIONS[:1])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": '{"list": [3, 1]}'},
        {"role": "assistant", "content": "1 3"},
        {"role": "user", "content": "Thanks."},
    ]
    expected = decide(*loaded(), messages, ASKED[0])
    assert found.usage.input_tokens == expected.prompt_tokens
    assert found.answers[0].probability == pytest.approx(expected.answer.probability, abs=1e-5)
    calls = [
        {"role": "user", "content": "Look."},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"at": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "nothing"},
        {"type": "custom_tool_call", "call_id": "d", "name": "run", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "done"},
    ]
    with_calls = create(state, input=calls, questions=QUESTIONS[:1])
    assert with_calls.usage.input_tokens > 0


def wrong(question: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"questions": [QUESTIONS[0], question | more]}


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        ({"questions": []}, "questions", "1 to 400 questions, got 0"),
        ({"questions": [QUESTIONS[0]] * 401}, "questions", "1 to 400 questions, got 401"),
        (wrong(QUESTIONS[1], choices=[{"value": "a"}]), "questions[1]", "there are 1"),
        (
            wrong(QUESTIONS[1], choices=[{"value": str(n)} for n in range(256)]),
            "questions[1]",
            "there are 256",
        ),
        (wrong(QUESTIONS[1], choices=[{"value": "a"}] * 2), "questions[1]", "is there twice"),
        (wrong(QUESTIONS[1], choices=None), "questions[1]", "must be a list of objects"),
        (wrong(QUESTIONS[0], instructions=""), "questions[1]", "must be a text"),
        (wrong(QUESTIONS[0], type="guess"), "questions[1]", "predicate, choice or score"),
        (
            wrong(QUESTIONS[0], instructions=[{"type": "input_image", "image_url": "data:,"}]),
            "questions[1]",
            "can hold text only",
        ),
        ({"input": []}, "input", "input is empty"),
        ({"input": 3}, "input", "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0]", "role must be one of"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
            "must be a data: URL",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "no", "output": "x"}]},
            "input[0].call_id",
            "names no call before it",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
            "input[0].arguments",
            "is not the text of a JSON object",
        ),
        ({"input": [{"type": "reasoning"}]}, "input[0]", "'reasoning' is not supported"),
        ({"input": "7 " * 3000}, "input", "positions are free for it"),
    ],
)
def test_what_cannot_be_decided_is_a_400_that_names_the_field(state, body, param, expected):
    with pytest.raises(APIStatusError) as raised:
        create(state, **{"questions": QUESTIONS} | body)
    error = raised.value
    assert error.status_code == 400 and expected in error.message, error.message
    assert error.param == param


def test_another_model_is_a_404_and_a_full_queue_a_429():
    with Engine(*loaded(), max_rows=1, max_queue=1) as engine:
        state = State(models={"bundled": Served("bundled", engine)})
        with pytest.raises(APIStatusError) as raised:
            create(state, questions=QUESTIONS, model="gpt")
        assert raised.value.status_code == 404
        go_on, began = threading.Event(), threading.Event()

        def waits(model, tokenizer):
            began.set()
            assert go_on.wait(60)
            yield "held"

        runs = [engine.submit(Made(waits))]
        assert began.wait(60)
        runs.append(engine.submit(Made(waits)))
        try:
            with pytest.raises(APIStatusError) as raised:
                create(state, questions=QUESTIONS)
            assert raised.value.status_code == 429
        finally:
            go_on.set()
        assert [list(run) for run in runs] == [["held"], ["held"]]
        assert eventually(lambda: is_idle(engine))
        assert create(state, questions=QUESTIONS).answers


def test_a_server_that_ends_answers_with_503():
    with Engine(*loaded()) as engine:
        state = State(models={"bundled": Served("bundled", engine)})
        submit = engine.submit

        def ends(task):
            run = submit(task)
            state.end()
            return run

        engine.submit = ends
        engine.close()
        with pytest.raises(APIStatusError) as raised:
            create(state, questions=QUESTIONS)
        assert raised.value.status_code == 503
