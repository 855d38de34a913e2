"""`POST /x/events` and `GET /x/settings`: what the page asks beyond the public API."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma import GenerationSettings
from mlx_diffgemma.config.entry import entries
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve.forms import form_of
from mlx_diffgemma.serve.page_settings import SHOWN
from mlx_diffgemma.serve.pieces import Outbox
from mlx_diffgemma.serve.steps import Kinds, Step
from tests.engine.cases import eventually
from tests.serve.cases import (
    COUNT,
    COUNTED,
    LONG,
    Answered,
    Running,
    ask,
    connected,
    get,
    post,
    scripted,
    serving,
)
from tests.write.test_tool_calls import CALL, CLOSE, END, SPECIALS, TOKENIZER

PATH = "/x/events"
OBJECT = {
    "type": "object",
    "properties": {
        "least": {"type": "integer", "minimum": 0, "maximum": 9},
        "in": {"type": "object", "properties": {"a/b": {"type": "boolean"}}, "required": ["a/b"]},
    },
    "required": ["least", "in"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        assert not running.bugs


def events(running: Running, **body: Any) -> list[dict[str, Any]]:
    answer = ask(running, post(PATH, {"settings": {"seed": 1}, **body}))
    assert answer.status == 200, answer.body
    return answer.events


def refused(running: Running, **body: Any) -> Answered:
    answer = ask(running, post(PATH, body))
    assert answer.status == 400, answer.body
    return answer


def of(told: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in told if each["event"] == kind]


def spelled(told: list[dict[str, Any]], ids: list[int]) -> str:
    words = {int(i): word for each in told for i, word in each.get("words", {}).items()}
    return "".join(words[i] for i in ids)


def test_a_chat_is_told_step_by_step_and_its_words_once(server):
    told = events(server, chat={"messages": COUNT})
    assert told[0] == {
        "event": "begin",
        "model": "bundled",
        "seed": 1,
        "rows": 1,
        "max_steps": 48,
    }
    assert "".join(each["text"] for each in of(told, "text")) == COUNTED
    steps = of(told, "step")
    assert [each["step"] for each in steps if each["canvas"] == 0] == list(
        range(len([each for each in steps if each["canvas"] == 0]))
    )
    for step in steps:
        columns = [step[name] for name in ("draft", "kinds", "accepted", "certainty", "entropy")]
        assert {len(column) for column in columns} == {64}
        assert all(0 <= value <= 1000 for value in step["certainty"])
        assert set(step["accepted"]) <= {0, 1}
    last = [each for each in steps if each["canvas"] == 1][-1]
    answer = last["kinds"].index("e")
    assert spelled(told, last["draft"][:answer]) == "9 60 61 62 63"
    told_ids = [i for each in told for i in each.get("words", {})]
    assert len(told_ids) == len(set(told_ids))
    (finished,) = of(told, "finished")
    assert finished["steps"] == len(steps) and finished["reason"] == "stop"
    assert told[-1]["event"] == "end" and told[-1]["usage"]["diffusion"]["canvases"] == 2


def test_the_seed_that_is_told_gives_the_run_again(server):
    told = events(server, chat={"messages": COUNT}, settings={})
    again = events(server, chat={"messages": COUNT}, settings={"seed": told[0]["seed"]})
    drafts = [[each["draft"] for each in of(one, "step")] for one in (told, again)]
    assert drafts[0] == drafts[1]


def test_candidates_come_where_they_are_asked_for(server):
    step = of(events(server, chat={"messages": COUNT}, settings={"top_candidates": 2}), "step")[0]
    assert all(len(row) == 2 for row in step["candidates"])
    assert [row[0][0] for row in step["candidates"]] == step["draft"]
    assert "candidates" not in of(events(server, chat={"messages": COUNT}), "step")[0]


def test_a_template_is_filled_in_rows_with_its_text_pinned(server):
    fill = {"template": "12 13 14 {{gap}} 18 19 20", "prompt": "Count from 12 to 20."}
    told = events(server, fill=fill, n=2)
    results = of(told, "result")
    assert sorted(each["row"] for each in results) == [0, 1]
    assert all(each["text"] == "12 13 14 15 16 17 18 19 20" for each in results)
    final = [each for each in of(told, "step") if each["trial"]["final"]][-1]
    given = [token for token, one in zip(final["draft"], final["pinned"], strict=True) if one]
    assert spelled(told, given).startswith("12 13 14 ")


def test_a_selection_is_rewritten_and_a_place_is_written_at(server):
    edit = {"document": "é12 13 xx 15", "start": 7, "stop": 9, "instruction": "Fix it."}
    few = {"seed": 1, "max_denoising_steps": 4}
    (result,) = of(events(server, edit=edit, settings=few), "result")
    assert result["text"] and set(result["slots"]) == {"selection"}
    place = {"document": "12 13  15", "start": 6, "stop": 6}
    (result,) = of(events(server, edit=place, settings=few), "result")
    assert result["text"]
    for start, stop in ((5, 4), (0, 99)):
        answer = refused(server, edit={"document": "a b c", "start": start, "stop": stop})
        assert "lies outside of the document's 5 characters" in answer.error["message"]


def test_a_form_has_its_structure_from_the_first_step_and_is_checked(server):
    few = {"seed": 1, "max_denoising_steps": 6}
    told = events(server, form={"text": "Sort: 3 1 2", "schema": OBJECT}, settings=few)
    (result,) = of(told, "result")
    assert result["valid"] is True
    assert set(json.loads(result["text"])) == {"least", "in"}
    first = next(each for each in of(told, "step") if each["trial"]["final"])
    given = [token for token, one in zip(first["draft"], first["pinned"], strict=True) if one]
    assert '"least"' in spelled(told, given) and '"a/b"' in spelled(told, given)


def test_a_form_without_one_structure_is_held_by_its_schema(server):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "minProperties": 1}
    assert form_of(schema) is None
    told = events(
        server,
        form={"text": "Sort: 3 1 2", "schema": {**schema, "required": ["n"]}},
        settings={"seed": 1, "max_denoising_steps": 6},
    )
    assert of(told, "finished")[0]["constraint"] == "kept"
    assert json.loads("".join(each["text"] for each in of(told, "text")))["n"] in (1, 2)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "array", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{}]},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
    ],
)
def test_what_gives_no_structure_is_no_form(schema):
    assert form_of(schema) is None


def test_the_slots_of_a_form_are_called_by_their_pointers():
    assert [slot.name for slot in form_of(OBJECT).slots] == ["/least", "/in/a~1b"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "there must be one task"),
        ({"chat": {"messages": COUNT}, "fill": {"template": "{{gap}}"}}, "there must be one task"),
        ({"fill": {"template": "no slot"}}, "fill.template: the template has no slot"),
        ({"fill": {"template": "{{match: (}}"}}, "fill.template"),
        ({"form": {"text": "x", "schema": {"type": "never"}}}, "form.schema"),
        ({"chat": {"messages": COUNT}, "settings": {"t_min": 1}}, "settings: 't_min' is none of"),
        ({"chat": {"messages": COUNT}, "settings": {"canvas_length": 65}}, "at most 64"),
        ({"chat": {"messages": COUNT}, "settings": {"max_denoising_steps": 257}}, "at most 256"),
        ({"chat": {"messages": COUNT}, "settings": {"policy": "slow"}}, "policy"),
        ({"chat": {"messages": COUNT}, "settings": {"seed": "1"}}, "seed must be a whole number"),
        ({"chat": {"messages": COUNT}, "n": 9}, "n is 9"),
        ({"chat": {"messages": []}}, "messages is empty"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, body, message):
    assert message in refused(server, **body).error["message"]


def test_slots_are_bounded_as_schemas_are():
    with serving(limits=Limits(max_schema_kb=0.1, max_parts=2), model=scripted("x")) as running:
        long = {"template": "{{one of: " + "x" * 200 + " | y}}"}
        assert "characters" in refused(running, fill=long).error["message"]
        assert "entries" in refused(running, fill={"template": "{{gap}} " * 3}).error["message"]
        pattern = {"template": "{{match: " + "x" * 200 + "}}"}
        assert "characters" in refused(running, fill=pattern).error["message"]


def test_thoughts_calls_and_names_of_channels_are_told_apart():
    text = "<|channel>thought\nhm<channel|>yes" + CALL
    tokens = [*TOKENIZER.encode(text, add_special_tokens=False), END, 5]
    kinds = Kinds(TOKENIZER, [END])
    inside = len(TOKENIZER.encode(CALL, add_special_tokens=False)) - 2
    quotes = [i for i, token in enumerate(tokens) if token == SPECIALS['<|"|>']]
    told = kinds.of(tokens)
    assert told[: len("xthoughtx") + 2 + 1 + 3] == "x" + "x" * 8 + "tt" + "x" + "aaa"
    assert told.endswith("ee") and told.count("c") == inside - len(quotes)
    # A canvas goes on where the one before ended, and so does one behind a prompt.
    kinds.commit(tokens[:9])
    assert kinds.of(tokens[9:12]) == "ttx"
    for prompt, canvas, letters in (
        ([*tokens[:9], CLOSE], tokens[9:11], "aa"),
        (tokens[:3], tokens[3:10], "xxxxxxt"),
    ):
        kinds = Kinds(TOKENIZER, [END])
        kinds.begin(np.array(prompt, np.int32))
        assert kinds.of(canvas) == letters


def test_a_call_of_a_tool_is_told_with_its_arguments():
    with serving(model=scripted(CALL)) as running:
        tools = [{"type": "function", "function": {"name": "weather"}}]
        told = events(running, chat={"messages": COUNT, "tools": tools})
    (call,) = of(told, "tool_call")
    assert (call["name"], call["arguments"]) == ("weather", {"city": "Paris", "days": [1, 2]})


def test_a_client_that_goes_ends_its_run_within_a_step():
    with serving(settings=LONG) as running:
        with connected(running) as connection:
            connection.sendall(post(PATH, {"chat": {"messages": COUNT}}))
            assert eventually(lambda: running.steps > 2)
        assert eventually(lambda: running.engine.counts["running"] == 0)
        assert running.steps < 150


def test_a_slow_reader_loses_the_oldest_steps_and_no_text():
    outbox = Outbox()
    steps = [Step(0, i, 0.0, [], "", [], [], [], None, None, []) for i in range(100)]
    for step in steps:
        outbox.put(0, step)
        outbox.put(1, step)
    assert len(outbox) == 128
    assert [piece for i, piece in outbox._waiting if i == 0] == steps[-64:]


def test_the_settings_have_the_help_of_their_entries(server):
    told = get(server, "/x/settings").json
    known = entries(GenerationSettings)
    assert [each["name"] for each in told["settings"]] == list(SHOWN)
    for each in told["settings"]:
        assert each["help"] == known[each["name"]].help
    by_name = {each["name"]: each for each in told["settings"]}
    assert by_name["policy"]["choices"] == ["reference", "fast"]
    assert by_name["canvas_length"]["at_most"] == 64
    assert by_name["max_new_tokens"]["default"] == Limits().max_answer_tokens


def test_the_settings_of_a_request_take_effect(server):
    told = events(server, chat={"messages": COUNT}, settings={"seed": 1, "max_new_tokens": 5})
    assert of(told, "finished")[0]["reason"] == "length"
    told = events(server, chat={"messages": COUNT}, settings={"seed": 1, "canvas_length": 16})
    assert {len(each["draft"]) for each in of(told, "step")} == {16}
