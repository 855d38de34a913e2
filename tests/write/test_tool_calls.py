"""Tool calls and the budget of thoughts, from canvases to the functions' results; the model follows
a script."""

from __future__ import annotations

import json
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import (
    GenerationSettings,
    PromptOptions,
    batch_generate,
    bundled_model,
    generate,
    load_tokenizer,
    stream_generate,
)
from mlx_diffgemma.cli.generate import _answer
from mlx_diffgemma.cli.output import Follower
from mlx_diffgemma.cli.render import View
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.errors import ConfigError, PromptError
from mlx_diffgemma.events import (
    BrokenToolCall,
    CanvasCommitted,
    Finished,
    StepDone,
    Text,
    ToolCall,
)
from mlx_diffgemma.language.controls import special_tokens
from mlx_diffgemma.view.report import as_object
from mlx_diffgemma.view.trace import Trace
from tests.checkpoints import GENERATION, draw_config

TOKENIZER = load_tokenizer(bundled_model())
SPECIALS = special_tokens(TOKENIZER)
CLOSE, END = SPECIALS["<channel|>"], SPECIALS["<turn|>"]
V, L = 384, 16
CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:[1,2]}<tool_call|>'
WEATHER = {"city": "Paris", "days": [1, 2]}


@dataclass(frozen=True)
class Known:
    """What the model remembers of a row's text: how many of its canvases are committed."""

    row: int
    length: int
    commits: int = -1  # before the prompt
    arrays: tuple[mx.array, ...] = ()
    unread: None = None

    def closed(self) -> Known:
        return self


class Script:
    """A model that writes given texts, one per row, canvas by canvas, whatever the canvas holds.
    Each look goes to the text's next tokens: a pinned token takes the place of the script's."""

    dtype = mx.float32

    def __init__(self, *texts: str):
        raw = draw_config(0, vocab_size=V, canvas_length=L)
        self.config = ModelConfig.from_dict(
            raw, GENERATION | {"eos_token_id": [1, END, SPECIALS["<|tool_response>"]]}
        )
        self.rows = [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]
        self.begun = 0

    def encode(self, pieces, contexts, images=None, *, states=True):
        known = []
        for piece, context in zip(pieces, contexts, strict=True):
            if not context.length:
                context, self.begun = Known(self.begun, 0), self.begun + 1
            length = context.length + piece.shape[1]
            known.append(Known(context.row, length, context.commits + 1))
        return None, known

    def check_vision(self):
        raise PromptError("a script reads no images")

    def open(self, context, canvas_length, *, unread=None):
        return context if unread is None else self.encode([unread], [context])[1][0]

    def canvas_states(self, canvases, opened, *, self_conditioning=None):
        known = list(opened)
        opened.clear()
        rows = []
        for context in known:
            start = context.commits * L
            rows += [*self.rows[context.row][start : start + L], *[END] * L][:L]
        return mx.array(1e6 * np.eye(V, dtype=np.float32)[np.array(rows)][None]), known

    def outputs(self, states):
        return states

    def embed(self, tokens):
        return mx.zeros((*tokens.shape, V))

    def mean_embedding(self, weights, total):
        return weights


def events_of(text: str, **more) -> list:
    tokens = more.pop("max_new_tokens", 256)
    chosen = GenerationSettings(seed=1, max_new_tokens=tokens, **more)
    return list(stream_generate(Script(text), TOKENIZER, "x", settings=chosen))


def written(events) -> list:
    return [event for event in events if isinstance(event, Text | ToolCall | BrokenToolCall)]


def joined(events, channel: str = "answer") -> str:
    pieces = [event for event in events if isinstance(event, Text)]
    return "".join(piece.piece for piece in pieces if piece.channel == channel)


def committed(events) -> list[int]:
    canvases = [event for event in events if isinstance(event, CanvasCommitted)]
    return [token for canvas in canvases for token in canvas.tokens[0].tolist()]


# --- calls ---


def test_calls_over_several_canvases_come_in_order_with_the_text():
    events = events_of(f"Let me see. {CALL}{CALL} Done.")
    calls = [ToolCall(f"call_{i}", "weather", WEATHER) for i in (0, 1)]
    parts = written(events)
    assert [part for part in parts if isinstance(part, ToolCall)] == calls
    first = parts.index(calls[0])
    assert joined(parts[:first]) == "Let me see. " and parts[first + 1] == calls[1]
    assert joined(parts[first:]) == " Done."
    assert isinstance(events[-1], Finished) and events[-1].canvases > 4


def test_generate_returns_the_text_alone_and_prints_a_call_in_a_line(capsys):
    model = Script(f"So: {CALL}")
    assert generate(model, TOKENIZER, "x", max_tokens=256, verbose=True) == "So: "
    assert '[tool call] weather({"city": "Paris", "days": [1, 2]})\n' in capsys.readouterr().out


def test_a_run_with_a_call_alone_is_not_called_empty(capsys):
    assert generate(Script(CALL), TOKENIZER, "x", max_tokens=256, verbose=True) == ""
    assert "No text generated" not in capsys.readouterr().out


def test_a_batch_has_the_calls_of_each_row():
    model = Script(f"a{CALL}{CALL}", "no call", f"{CALL}b")
    response = batch_generate(model, TOKENIZER, ["x"] * 3, max_tokens=256)
    assert response.texts == ["a", "no call", "b"]
    one, other = (ToolCall(f"call_{i}", "weather", WEATHER) for i in (0, 1))
    assert response.tool_calls == [[one, other], [], [one]]


def test_a_call_that_the_budget_cuts_off_is_text_and_named():
    parts = written(events_of(f"a {CALL}", max_new_tokens=20))
    cut = TOKENIZER.decode(TOKENIZER.encode(CALL, add_special_tokens=False)[:18])
    assert joined(parts) == "a " + cut
    assert parts[-1] == BrokenToolCall("call_0", cut, "incomplete")


def test_a_model_that_opens_a_result_after_its_call_has_ended():
    events = events_of(f"{CALL}<|tool_response>response:weather{{}}")
    assert written(events) == [ToolCall("call_0", "weather", WEATHER)]
    assert events[-1].reason == "stop"


def test_calls_are_objects_in_json_and_in_the_trace():
    trace = Trace(TOKENIZER, model="m", prompt="x", settings=GenerationSettings(seed=1))
    events = events_of(f"{CALL}<|tool_call>call:f{{")
    for event in events:
        trace.observe(event)
    call = {"id": "call_0", "name": "weather", "arguments": WEATHER}
    broken = {"id": "call_1", "text": "<|tool_call>call:f{", "problem": "incomplete"}
    lines = [json.loads(json.dumps(as_object(event))) for event in written(events)]
    assert lines[0] == {"event": "tool_call", **call}
    assert lines[-1] == {"event": "broken_tool_call", **broken}
    assert trace.as_object()["tool_calls"] == [call]


# --- the budget of thoughts ---

THOUGHT = "<|channel>thought\n" + "hm, " * 20 + "yes<channel|>so"


def test_without_a_budget_thoughts_are_as_long_as_the_model_makes_them():
    events = events_of(THOUGHT)
    assert joined(events, "thought") == "hm, " * 20 + "yes" and joined(events) == "so"


@pytest.mark.parametrize(("most", "canvases"), [(0, 1), (15, 1), (16, 2), (31, 2), (32, 3)])
def test_the_next_canvas_after_the_budget_begins_with_the_end_of_the_thought(most, canvases):
    """A canvas has 16 tokens; of the first, one is the marker that opens the thought."""
    free, limited = events_of(THOUGHT), events_of(THOUGHT, max_thinking_tokens=most)
    border = canvases * L
    assert committed(limited)[:border] == committed(free)[:border]
    assert committed(limited)[border] == CLOSE
    script = TOKENIZER.encode(THOUGHT, add_special_tokens=False)
    assert committed(limited)[border + 1 : border + L] == script[border + 1 : border + L]
    assert joined(limited, "thought") == TOKENIZER.decode(script[1:border]).removeprefix(
        "thought\n"
    )
    assert joined(limited).startswith(TOKENIZER.decode(script[border + 1 : border + L]))
    assert committed(limited).count(CLOSE) == 2  # the second is the script's own
    for event in limited:
        if isinstance(event, StepDone) and event.canvas_index == canvases:
            assert event.draft[0, 0].item() == CLOSE and event.certainty[0, 0].item() == 1


@pytest.mark.parametrize(("stop", "found"), [((), None), (("x", "two", "wo"), "two")])
def test_the_end_tells_the_tokens_of_thoughts_and_the_stop_string(stop, found):
    text = "<|channel>thought\nHm, so.<channel|>one two"
    chosen = GenerationSettings(seed=1, max_new_tokens=64)
    *_, end = stream_generate(Script(text), TOKENIZER, "x", settings=chosen, stop=stop)
    thought = TOKENIZER.encode("thought\nHm, so.", add_special_tokens=False)
    assert (end.stop_string, end.thought_tokens) == (found, len(thought))


def test_a_thought_that_ends_within_its_budget_is_left_alone():
    for most in (-1, 84, 200):
        assert committed(events_of(THOUGHT, max_thinking_tokens=most)) == committed(
            events_of(THOUGHT)
        )
    answer = "the answer is longer than a canvas, but it is no thought"
    assert joined(events_of(answer, max_thinking_tokens=0)) == answer


def test_the_budget_holds_for_all_thoughts_of_an_answer_together():
    text = "<|channel>thought\n12345<channel|>a<|channel>thought\n" + "hm, " * 20
    # The first has 13 tokens, the second fills the next canvas with 15 beside its marker.
    for most, border in ((28, 2 * L), (29, 3 * L)):
        assert committed(events_of(text, max_thinking_tokens=most)).index(CLOSE, L) == border


def test_in_a_batch_only_the_row_that_thinks_is_closed():
    answer = "the answer is longer than two canvases of 16"
    texts = (THOUGHT, answer, "<|channel>thought\nhm<channel|>so")
    chosen = GenerationSettings(seed=1, max_new_tokens=256, max_thinking_tokens=10)
    response = batch_generate(Script(*texts), TOKENIZER, ["x"] * 3, settings=chosen)
    assert response.texts[1:] == [answer, "so"] and response.thoughts[1:] == ["", "hm"]
    assert response.thoughts[0] == "hm, hm,"  # all of the first canvas


@pytest.mark.parametrize("bad", [-2, 1.5, True])
def test_a_budget_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="at least 0, or -1 for all"):
        GenerationSettings(max_thinking_tokens=bad)


# --- the command ---


def shown(text: str, *, verbose: bool = True, as_json: bool = False) -> None:
    """Show a run as the command does."""
    model, view = Script(text), View(verbose=verbose)
    chosen = GenerationSettings(seed=1, max_new_tokens=32)
    follows = Follower(view, TOKENIZER, chosen.resolve(model.config))
    start = {"event": "start"} if as_json else None
    _answer(model, "x", chosen, (), PromptOptions(), None, follows, [], start)
    view.close()


SHORT = '<|tool_call>call:f{a:<|"|>\x1b[31m\n<|"|>}<tool_call|>'


def test_the_terminal_gets_a_call_in_one_line_and_stdout_nothing_of_it(capfdbinary):
    shown(f"so {SHORT}")
    out, err = (stream.decode() for stream in capfdbinary.readouterr())
    assert out == "so \n"
    assert err == 'tool call call_0: f({"a": "\\u001b[31m\\n"})\n'
    shown(SHORT)
    assert b"empty" not in capfdbinary.readouterr().err, "a call is an answer"
    shown(SHORT, verbose=False)
    assert capfdbinary.readouterr() == (b"", b"")


def test_a_broken_call_is_shown_and_said_to_be_one(capfdbinary):
    shown("so <|tool_call>call:f{a<tool_call|>")
    out, err = capfdbinary.readouterr()
    assert out == b"so <|tool_call>call:f{a<tool_call|>\n"
    assert err == b"the tool call in this answer is malformed\n"


def test_json_has_an_object_per_call(capfdbinary):
    shown(f"so {SHORT}", as_json=True)
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    (call,) = (line for line in lines if line["event"] == "tool_call")
    assert (call["id"], call["name"], call["arguments"]) == ("call_0", "f", {"a": "\x1b[31m\n"})
    assert [line["text"] for line in lines if line["event"] == "text"] == ["so "]
