"""A conversation: what the template gets, turns taken back and again, and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import mlx.core as mx
import pytest

from mlx_diffgemma import (
    Chat,
    Constraint,
    DiffGemmaError,
    Engine,
    GenerationSettings,
    Request,
    Store,
    bundled_model,
    encode_prompt,
    generate,
    load,
    stream_generate,
)
from mlx_diffgemma.errors import ChatError, ConfigError, ConstraintError, SourceError
from mlx_diffgemma.events import (
    BrokenToolCall,
    CanvasCommitted,
    Event,
    Finished,
    PrefillDone,
    StepDone,
    Text,
    ToolCall,
)

MODEL, TOKENIZER = load(bundled_model())
# The bundled model knows single questions: behind a first turn it writes anything.
SETTINGS = GenerationSettings(seed=7, max_new_tokens=24, canvas_length=24, max_denoising_steps=6)
COUNT, SORT, SQUARES = "Count from 12 to 15.", "Sort: 3 1 2", "Count from 3 to 5."


def chat_with(**options) -> Chat:
    return Chat(MODEL, TOKENIZER, **{"settings": SETTINGS, **options})


def text_of(events) -> str:
    return "".join(e.piece for e in events if isinstance(e, Text) and e.channel == "answer")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def talked() -> Iterator[tuple[Chat, list[str]]]:
    """A chat of two turns, and its answers."""
    chat = chat_with()
    yield chat, [text_of(chat.send(COUNT)), text_of(chat.send(SORT))]


# --- turns ---


def test_each_turn_writes_what_generate_writes_for_the_whole_conversation(talked):
    chat, (first, second) = talked
    messages = [user(COUNT), assistant(first), user(SORT)]
    assert first == generate(MODEL, TOKENIZER, COUNT, settings=SETTINGS) == "12 13 14 15"
    second_seed = replace(SETTINGS, seed=8)
    assert second == generate(MODEL, TOKENIZER, messages, settings=second_seed)
    assert chat.messages == [*messages, assistant(second)] and chat.turns == [COUNT, SORT]


def test_the_events_are_those_of_stream_generate():
    chat = chat_with(store=Store(1))  # keeps nothing
    kinds = [type(event) for event in chat.send(COUNT)]
    assert kinds == [type(e) for e in stream_generate(MODEL, TOKENIZER, COUNT, settings=SETTINGS)]


def test_a_turn_reads_only_what_is_behind_the_last_prompt(talked):
    chat, _ = talked
    before = chat.messages[:3]
    done = next(event for event in chat.send(SQUARES) if isinstance(event, PrefillDone))
    # The second prompt and the third one begin alike.
    assert done.cached_tokens >= len(encode_prompt(TOKENIZER, before))
    assert chat.store is not None and 0 < chat.store.nbytes <= chat.store.max_bytes


def test_the_system_prompt_and_the_given_store_are_used():
    store = Store(10**7)
    chat = chat_with(system_prompt="Be brief.", store=store)
    done = next(event for event in chat.send(COUNT) if isinstance(event, PrefillDone))
    whole = [{"role": "system", "content": "Be brief."}, user(COUNT)]
    assert done.prompt_tokens == len(encode_prompt(TOKENIZER, whole))
    assert chat.messages == [] and store.nbytes > 0  # the stream was dropped before any text


def test_a_chat_through_an_engine_writes_the_same(talked):
    _, answers = talked
    with Engine(MODEL, TOKENIZER, store=Store(10**7)) as engine:
        chat = Chat(engine, settings=SETTINGS)
        assert [text_of(chat.send(text)) for text in (COUNT, SORT)] == answers
        stream = chat.send(SQUARES)
        next(stream)
        stream.close()
        assert len(chat.turns) == 2
        with pytest.raises(ChatError, match="engine has its own"):
            Chat(engine, TOKENIZER)
    with pytest.raises(ChatError, match="both from load"):
        Chat(MODEL)


def test_one_answer_is_held_to_a_constraint_and_the_next_is_free():
    chat, constraint = chat_with(), Constraint.choices(["12 to 15", "no"])
    events = list(chat.send(COUNT, constraint=constraint))
    assert text_of(events) == chat.messages[-1]["content"] in ("12 to 15", "no")
    assert isinstance(events[-1], Finished) and events[-1].constraint == "kept"
    chat.reseed(7)
    events = list(chat.retry())
    assert text_of(events) == "12 13 14 15" and events[-1].constraint is None
    letters = Constraint.regex("[a-z]{3}")
    assert letters.accepts(text_of(chat.edit(1, SORT, constraint=letters)))
    assert letters.accepts(text_of(chat.retry(constraint=letters))) and chat.turns == [SORT]


def test_a_constraint_that_cannot_be_kept_leaves_the_message_unsent(talked):
    chat, _ = talked
    long = Constraint.regex("[a-z]{30}")
    with pytest.raises(ConstraintError, match="allow at least 31"):
        list(chat.send(SQUARES, constraint=long))
    assert chat.unsent == SQUARES and len(chat.turns) == 2
    assert text_of(chat.retry(constraint=Constraint.choices(["3 4 5"]))) == "3 4 5"
    with pytest.raises(ConfigError, match="exclude each other"):
        list(chat_with(stop="x").send(COUNT, constraint=long))


# --- streams that end early ---


def until_commit(stream) -> str:
    """The text of a stream that is closed behind its first committed text."""
    said = ""
    for event in stream:
        said += event.piece if isinstance(event, Text) else ""
        if said and isinstance(event, (StepDone, Finished)):
            break
    stream.close()
    return said


def test_an_interrupted_answer_keeps_the_text_so_far():
    chat = chat_with(settings=replace(SETTINGS, canvas_length=8, max_new_tokens=48))
    said = until_commit(chat.send("Count from 12 to 30."))
    assert said and chat.messages == [user("Count from 12 to 30."), assistant(said)]
    assert text_of(chat.send(SORT)) and len(chat.turns) == 2


def test_without_any_text_the_conversation_is_what_it_was_and_retry_sends_again(talked):
    chat, _ = talked
    before = chat.messages
    for stream in (chat.send(SQUARES), chat.retry(), chat.edit(1, SQUARES)):
        next(stream)
        stream.close()
        assert chat.messages == before
    text_of(chat.retry())  # of the edit
    assert chat.turns == [SQUARES]


def test_an_error_leaves_the_conversation_and_the_next_turn_works(talked):
    chat, _ = talked
    before = chat.messages
    for text in ("x" * 100_000, "half \ud800", "", " \n"):
        with pytest.raises(DiffGemmaError):
            text_of(chat.send(text))
        assert chat.messages == before
    text_of(chat.send(COUNT))
    assert len(chat.turns) == 3


def test_nothing_changes_a_chat_while_it_writes(talked):
    chat, _ = talked
    stream = chat.send(SQUARES)
    next(stream)
    actions = (
        chat.undo, chat.reset, lambda: chat.save("x"), lambda: chat.load("x"),
        lambda: next(chat.send("a")), lambda: chat.reseed(1), lambda: next(chat.retry()),
    )  # fmt: skip
    for action in actions:
        with pytest.raises(ChatError, match="is being written"):
            action()
    stream.close()
    assert chat.undo() == SQUARES  # which got no answer: the turns before it stay
    assert chat.undo() == SORT


# --- turns taken back, and again ---


def test_undo_takes_back_turn_by_turn(talked):
    chat, answers = talked
    assert chat.undo() == SORT
    assert chat.messages == [user(COUNT), assistant(answers[0])]
    assert chat.undo() == COUNT and chat.messages == []
    with pytest.raises(ChatError, match="no message yet"):
        chat.undo()


def test_retry_draws_again_under_the_next_seed(talked):
    chat, answers = talked
    again = text_of(chat.retry())
    messages = [user(COUNT), assistant(answers[0]), user(SORT)]
    assert again == generate(MODEL, TOKENIZER, messages, settings=replace(SETTINGS, seed=9))
    assert chat.messages == [*messages, assistant(again)]


def test_edit_replaces_a_message_and_drops_the_rest(talked):
    chat, _ = talked
    answer = text_of(chat.edit(1, SQUARES))
    assert chat.messages == [user(SQUARES), assistant(answer)]
    for number in (0, 2, -1):
        with pytest.raises(ChatError, match=f"no message {number}; they are numbered 1 to 1"):
            text_of(chat.edit(number, "x"))
    chat.reset()
    with pytest.raises(ChatError, match="no message yet"):
        text_of(chat.retry())


def test_a_message_that_is_changed_begins_from_its_answer_and_another_try_does_not(talked):
    chat, (first, _) = talked
    chat.settings = replace(SETTINGS, warm_start=0.1)
    asked = []

    def noted(*arguments):
        asked.append(arguments[-1])
        return Request(*arguments)

    with patch("mlx_diffgemma.write.chat.Request", noted):
        text_of(chat.edit(1, "Count from 12 to 16."))
        text_of(chat.retry())
        text_of(chat.send(SORT))
    assert asked == [first, None, None]


def test_reset_and_reseed_begin_the_seeds_again():
    chat = chat_with(settings=replace(SETTINGS, seed=2**63 - 1))
    first = text_of(chat.send(SORT))
    text_of(chat.retry())
    chat.reset()
    assert text_of(chat.send(SORT)) == first
    chat.reset()
    chat.reseed(2**63 - 1)
    assert text_of(chat.send(SORT)) == first
    with pytest.raises(ConfigError, match="seed"):
        chat.reseed(-1)


def test_settings_that_the_model_cannot_use_are_refused_at_once():
    chat = chat_with()
    with pytest.raises(ConfigError, match="canvas_length 9999"):
        chat.settings = GenerationSettings(canvas_length=9999)
    assert chat.settings == SETTINGS
    with pytest.raises(ConfigError):
        chat_with(settings=GenerationSettings(canvas_length=9999))


# --- thoughts and tools ---


class Scripted:
    """Stands for an engine, whose model says what it is told to; keeps the tasks that it got."""

    def __init__(self, *said: Event) -> None:
        self.model, self.tokenizer, self.tasks, self.cancelled = MODEL, TOKENIZER, [], 0
        self.said = said

    def submit(self, task):
        self.tasks.append(task)
        task.job(self.model, self.tokenizer)  # the template takes the messages
        return self

    def __iter__(self):
        yield from self.said
        yield Finished("stop", 1, 1, 1, 1)

    def cancel(self) -> None:
        self.cancelled += 1


def scripted(*said: Event, **options) -> tuple[Chat, Scripted]:
    engine = Scripted(*said)
    return Chat(engine, settings=SETTINGS, **options), engine


def weather(city: str):
    """Tell the weather.

    Args:
      city: where
    """


def test_thoughts_are_dropped_from_the_history():
    chat, engine = scripted(Text("hmm", "thought"), Text("yes", "answer"), thinking=True)
    assert len(list(chat.send("a"))) == 3
    assert chat.messages == [user("a"), assistant("yes")]
    assert engine.tasks[0].request.prompt_options.thinking and engine.cancelled == 1


def test_a_tool_call_waits_for_its_result_and_the_model_goes_on():
    calls = [ToolCall("call_0", "weather", {"city": "Paris"}), ToolCall("call_1", "time", {})]
    said = [Text("hmm", "thought"), Text("Let me see.", "answer"), *calls]
    chat, engine = scripted(*said, tools=[weather, {"name": "time"}])
    list(chat.send("a"))
    assert [t["function"]["name"] for t in engine.tasks[0].request.prompt_options.tools] == [
        "weather",
        "time",
    ]
    assert chat.open_calls == calls
    text, calling = chat.messages[1:]
    # Templates write text behind the results if it is in the same message.
    assert text == {**assistant("Let me see."), "reasoning": "hmm"}
    assert calling["content"] == "" and len(calling["tool_calls"]) == 2
    for action in (lambda: next(chat.send("b")), lambda: next(chat.resume())):
        with pytest.raises(ChatError, match=r"tool call call_0 \(weather\) waits for its result"):
            action()
    chat.answer_tool(calls[0], {"°C": 21})
    with pytest.raises(ChatError, match="those that do: call_1"):
        chat.answer_tool(calls[0], "again")
    with pytest.raises(ChatError, match="JSON's types"):
        chat.answer_tool("call_1", {"a": object()})
    chat.answer_tool("call_1", "noon")
    result = {"role": "tool", "tool_call_id": "call_0", "name": "weather", "content": '{"°C": 21}'}
    assert chat.messages[3] == result
    engine.said = [Text("Warm.", "answer")]
    assert text_of(chat.resume()) == "Warm."
    assert len(engine.tasks[-1].request.prompt) == 5
    assert chat.messages[-1] == assistant("Warm.") and not chat.open_calls
    with pytest.raises(ChatError, match="no tool's result"):
        next(chat.resume())
    list(chat.send("c"))
    assert not any("reasoning" in message for message in chat.messages)
    list(chat.edit(1, "e"))
    assert chat.messages == [user("e"), assistant("Warm.")]


def test_a_call_can_be_required_and_the_model_goes_on_behind_its_result():
    clock = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    chat = chat_with(tools=[clock])
    list(chat.send(COUNT, constraint=Constraint.tool_call(chat.tools)))
    (call,) = chat.open_calls
    assert (call.name, call.arguments) == ("clock", {})
    chat.answer_tool(call, "noon")
    noon = Constraint.choices(["noon", "midnight"])
    assert text_of(chat.resume(constraint=noon)) in ("noon", "midnight")
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]


def test_every_answer_is_drawn_under_the_next_seed():
    chat, engine = scripted(Text("b", "answer"))
    for events in (chat.send("a"), chat.retry(), chat.edit(1, "c")):
        list(events)
    next(chat.send("d"))  # dropped before its end, but with text
    chat.reseed(2**63 - 1)
    list(chat.send("e"))
    list(chat.send("f"))  # the seed after the greatest one is 0
    seeds = [task.request.settings.seed for task in engine.tasks]
    assert seeds == [7, 8, 9, 10, 2**63 - 1, 0]
    chat.reseed(None)
    list(chat.send("g"))
    assert engine.tasks[-1].request.settings.seed is None


def test_a_failed_resume_keeps_the_results():
    call = ToolCall("call_0", "time", {})
    chat, engine = scripted(call)
    list(chat.send("a"))
    chat.answer_tool(call, "noon")
    before, engine.said = chat.messages, [StepDone(0, 0, *[mx.array([[0]])] * 4)]
    stream = chat.resume()
    next(stream)
    stream.close()
    assert chat.messages == before and engine.cancelled == 2
    engine.said = [Text("Noon.", "answer")]
    assert text_of(chat.resume()) == "Noon."


def test_a_broken_call_is_text_of_the_answer():
    broken = "<|tool_call>call:weather{city:"
    chat, _ = scripted(Text(broken, "answer"), BrokenToolCall("call_0", broken, "incomplete"))
    list(chat.send("a"))
    assert chat.messages[1] == assistant(broken) and not chat.open_calls
    list(chat.send("b"))


# --- files ---


def test_a_saved_chat_goes_on_elsewhere(talked, tmp_path):
    chat, _ = talked
    chat.system_prompt = "Naïve \u2028"
    chat.save(tmp_path / "chat.json")
    chat.save(tmp_path / "chat.json")  # a saved chat may be replaced
    other = Chat(MODEL, TOKENIZER)
    other.load(tmp_path / "chat.json")
    assert other.messages == chat.messages and other.settings == SETTINGS
    assert other.system_prompt == chat.system_prompt
    assert text_of(other.send(SQUARES)) == text_of(chat.send(SQUARES))


def test_tools_and_open_calls_are_saved(tmp_path):
    call = ToolCall("call_0", "weather", {"city": "Paris"})
    chat, _ = scripted(call, tools=[weather])
    list(chat.send("a"))
    chat.save(tmp_path / "chat.json")
    other = chat_with()
    other.load(tmp_path / "chat.json")
    assert other.tools == chat.tools and other.tools[0]["function"]["name"] == "weather"
    assert other.open_calls == [call]


def saved(**changes) -> dict:
    good = {"format": "mlx_diffgemma chat", "version": 1, "messages": [user("a"), assistant("b")]}
    return {**good, **changes}


CALL = {"id": "call_0", "type": "function", "function": {"name": "t", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_0", "content": "x"}
BAD_FILES = {
    "empty": (b"", "is no saved chat"),
    "binary": (b"\x00\xff" * 100, "is no saved chat"),
    "half": (b'{"format": "mlx_diffgemma chat", "mess', "is not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "is not valid JSON"),
    "list": (b"[1]", "is not a JSON object"),
    "other": (b'{"a": 1}', '"format" is not "mlx_diffgemma chat"'),
    "version": (saved(version=2), "of version 2, and this program reads version 1"),
    "text": (saved(messages="x"), "\"messages\" is 'x'"),
    "item": (saved(messages=["x"]), "message 1 has no role"),
    "role": (saved(messages=[{"role": ["a"], "content": "x"}]), "message 1 has no role"),
    "keys": (saved(messages=[{**user("a"), "image": "x"}]), "message 1 has the keys"),
    "content": (saved(messages=[user("a"), {"role": "assistant", "content": 1}]), "is not text"),
    "blank": (saved(messages=[user(" "), assistant("b")]), "message 1 is empty"),
    "first": (saved(messages=[assistant("b")]), "message 1 is out of order"),
    "twice": (saved(messages=[user("a"), user("a")]), "message 2 is out of order"),
    "last": (saved(messages=[user("a")]), "last message has no answer"),
    "call": (saved(messages=[user("a"), {**CALLING, "tool_calls": ["x"]}]), "no id, name"),
    "result": (saved(messages=[user("a"), assistant("b"), RESULT]), "answers no tool call"),
    "open": (saved(messages=[user("a"), CALLING, user("b")]), "before the results"),
    "setting": (saved(settings={"sed": 1}), "there is no setting 'sed'"),
    "value": (saved(settings={"seed": "x"}), "seed must be a whole number"),
    "model": (saved(settings={"canvas_length": 9999}), "canvas_length 9999 is longer"),
    "tool": (saved(tools=["x"]), "a tool is a Python function or"),
    "stop": (saved(stop=[1]), "stop"),
    "thinking": (saved(thinking="yes"), "\"thinking\" is 'yes'"),
    "surrogate": (saved(system_prompt="\ud800"), "half a character"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_chat_is_refused_in_one_line(name, tmp_path):
    content, said = BAD_FILES[name]
    file = tmp_path / "chat.json"
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(raw)
    chat = chat_with()
    with pytest.raises(DiffGemmaError) as raised:
        chat.load(file)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert chat.messages == [] and chat.settings == SETTINGS and chat.system_prompt is None


def test_good_files_in_every_order_are_read(tmp_path):
    file = tmp_path / "chat.json"
    for messages in (
        [],
        [user("a"), assistant("")],
        [user("a"), assistant("let me see"), CALLING, RESULT, assistant("b"), user("c"), CALLING],
    ):
        file.write_text(json.dumps(saved(messages=messages)))
        chat = chat_with()
        chat.load(file)
        assert chat.messages == messages


def test_saving_replaces_no_other_file(tmp_path):
    chat, other = chat_with(), tmp_path / "notes.txt"
    other.write_text("precious")
    with pytest.raises(ChatError, match="it is not replaced, choose another name"):
        chat.save(other)
    assert other.read_text() == "precious"
    with pytest.raises(ChatError, match="no ordinary file"):
        chat.save(tmp_path)
    with pytest.raises(SourceError):
        chat.save(tmp_path / "missing" / "chat.json")
    with pytest.raises(ChatError, match="cannot be read: No such file"):
        chat.load(tmp_path / "missing.json")


def test_the_progress_of_a_prompt_is_told():
    told: list[tuple[int, int]] = []
    chat = chat_with(prompt_progress_callback=lambda done, of: told.append((done, of)))
    commits = sum(isinstance(event, CanvasCommitted) for event in chat.send(COUNT))
    assert commits and told[-1][0] == told[-1][1] > 0
