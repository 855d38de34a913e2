"""Tool calls: what a template writes of a call is read from the ids as the same values."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import PromptOptions, bundled_model, encode_prompt, load_tokenizer
from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.events import BrokenToolCall, Text, ToolCall
from mlx_diffgemma.language.controls import special_tokens
from mlx_diffgemma.language.text import TextStream

# The documented format of calls, results and declarations, and nothing else of a chat.
TEMPLATE = """
{%- macro write(value) -%}
{%- if value is none -%}null
{%- elif value is string -%}<|"|>{{ value }}<|"|>
{%- elif value is boolean -%}{{ 'true' if value else 'false' }}
{%- elif value is mapping -%}{ {{- pairs(value) -}} }
{%- elif value is sequence -%}
[{%- for item in value -%}{{ write(item) }}{{ ',' if not loop.last }}{%- endfor -%}]
{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- macro pairs(values) -%}
{%- for key, value in values | dictsort -%}
{{ key }}:{{ write(value) }}{{ ',' if not loop.last }}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for tool in tools or [] -%}<|tool>declaration:{{ tool.function.name }}<tool|>{%- endfor -%}
{%- for message in messages -%}
<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<|tool_call>call:{{ call.function.name }}{ {{- pairs(call.function.arguments) -}} }<tool_call|>
{%- endfor -%}
<turn|>
{% endfor -%}
<|turn>model
"""
TOKENIZER = load_tokenizer(bundled_model())
TOKENIZER.chat_template = TEMPLATE
SPECIALS = special_tokens(TOKENIZER)
EOS = (SPECIALS["<eos>"], SPECIALS["<turn|>"], SPECIALS["<|tool_response>"])
CALL = SPECIALS["<|tool_call>"]
TIMES = "<|tool_call>call:multiply{a:3,b:[1,{c:null}]}<tool_call|>"


def ids_of(text: str) -> list[int]:
    """Control tokens take effect, as those that the model writes."""
    return TOKENIZER.encode(text, add_special_tokens=False)


def read(*pushes, prompt=(), stop=()) -> list:
    stream = TextStream(TOKENIZER, EOS, prompt, stop)
    return [event for ids in pushes for event in stream.push(ids)] + stream.finish()


def merged(events) -> list:
    """Pieces of text that follow each other as one: where they are split depends on the pushes."""
    out: list = []
    for event in events:
        last = out[-1] if out else None
        both = isinstance(event, Text) and isinstance(last, Text)
        if both and event.channel == last.channel:
            out[-1] = Text(last.piece + event.piece, event.channel)
        else:
            out.append(event)
    return out


def arguments_of(inside: str):
    """The arguments of one call, or None if it is malformed."""
    *_, event = read(ids_of("<|tool_call>call:f{" + inside + "}<tool_call|>"))
    return event.arguments if isinstance(event, ToolCall) else None


# --- the round trip: 2,345 values ---

# "▁" stands for a space in the tokenizer; it is no text that could come back.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
STRINGS = st.lists(
    st.one_of(
        st.text(CHARACTERS, max_size=8),
        st.sampled_from([*SPECIALS, "{", "}", ":", ",", '"', "'", "\\", "\n", "<|", '<|"', "|>"]),
    ),
    max_size=5,
).map("".join)
# A bare key ends at the first colon, and spaces around it are not part of it.
KEYS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='▁:"\0'), min_size=1
).filter(lambda key: key == key.strip() and key[0] not in "}")
NUMBERS = st.one_of(
    st.integers(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.from_regex(r"[\w.-]{1,12}", fullmatch=True).filter(lambda name: "▁" not in name),
        st.dictionaries(KEYS, VALUES, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def chat(calls, *, as_text: bool) -> list[dict]:
    functions = [
        {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
        for name, arguments in calls
    ]
    message = {"tool_calls": [{"type": "function", "function": f} for f in functions]}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, **message}]


def exactly(calls) -> list[str]:
    """The same only for the same values of the same types: 1, 1.0 and True differ."""
    return [f"{name} {json.dumps(arguments, sort_keys=True)}" for name, arguments in calls]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(CALLS, st.booleans(), st.lists(st.integers(0, 400), max_size=4))
def test_the_values_that_a_template_writes_are_read_however_canvases_split_them(
    calls, as_text, borders
):
    ids = encode_prompt(TOKENIZER, chat(calls, as_text=as_text))
    written = ids[ids.index(CALL) :]
    places = [0, *sorted(min(place, len(written)) for place in borders), len(written)]
    events = read(*(written[start:stop] for start, stop in pairwise(places)))
    assert all(isinstance(event, ToolCall) for event in events)
    assert exactly((event.name, event.arguments) for event in events) == exactly(calls)
    assert [event.id for event in events] == [f"call_{i}" for i in range(len(calls))]


# --- in the stream ---

CASES = {
    "text around and between": f"so {TIMES}, then {TIMES} done",
    "after a thought": f"<|channel>thought\nhm<channel|>{TIMES}",
    "in another channel": f"<|channel>final\n{TIMES}",
    "cut off": '<|tool_call>call:f{a:<|"|>so',
    "cut off at once": "a<|tool_call>",
    "malformed": "a<|tool_call>call:f{a}<tool_call|>b",
    "begun again": f"a<|tool_call>call:f{{{TIMES}",
    "a thought within": "<|tool_call>call:f{<|channel>thought\nhm<channel|>b",
    "ended": "a<|tool_call>call:f{<turn|>b",
}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_however_canvases_split_the_ids_the_same_events_come_in_order(text):
    ids = ids_of(text)
    whole = merged(read(ids))
    assert whole == merged(read(*[[token] for token in ids]))
    for at in range(len(ids)):
        assert merged(read(ids[:at], ids[at:])) == whole


def test_a_call_comes_in_its_place_as_soon_as_it_is_complete():
    first, second = (
        ToolCall(f"call_{i}", "multiply", {"a": 3, "b": [1, {"c": None}]}) for i in (0, 1)
    )
    expected = [Text("so ", "answer"), first, Text(", then ", "answer"), second]
    assert read(ids_of(CASES["text around and between"])) == [*expected, Text(" done", "answer")]
    stream, ids = TextStream(TOKENIZER, EOS), ids_of(TIMES)
    assert stream.push(ids[:-1]) == [] and stream.push(ids[-1:]) == [first]


def test_a_call_that_the_budget_or_an_end_cuts_off_is_text_and_named_incomplete():
    text = '<|tool_call>call:f{a:<|"|>so'
    broken = BrokenToolCall("call_0", text, "incomplete")
    assert read(ids_of("x" + text)) == [Text("x", "answer"), Text(text, "answer"), broken]
    assert read(ids_of(text + "<turn|>b")) == [Text(text, "answer"), broken]
    begun = CASES["begun again"]
    kinds = [type(event) for event in read(ids_of(begun))]
    assert kinds == [Text, Text, BrokenToolCall, ToolCall]


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            "{a}",
            "{a:}",
            "{a:b}",
            "{a:1",
            " a:1}",
            "{a:1}}",
            "{a:1}x",
            "{a:01}",
            "{a:1.}",
            "{a:.5}",
        ),
        *("{a:+1}", "{a:1 2}", "{a:[1,]}", "{a:[1}", "{a:1,}", "{a:True}", "{a:NaN}", "{a:1e999}"),
        *("{a:.5}", "{a:-}", '{a:<|"|>b}', '{a:<|"|>b<|"|>c}', '{a:"b}', "{a:\0}", "", "(a:1)"),
        "{a:" + "[" * 150 + "]" * 150 + "}",
        "{a:" + "9" * 5000 + "}",
    ],
)
def test_what_cannot_be_read_is_text_and_named_malformed(arguments):
    malformed_as_text(f"<|tool_call>call:f{arguments}<tool_call|>")


@pytest.mark.parametrize("head", ["", "f", "call:", "call f", "call:f g"])
def test_a_call_without_its_name_is_malformed(head):
    malformed_as_text(f"<|tool_call>{head}{{a:1}}<tool_call|>")


def malformed_as_text(text: str) -> None:
    broken = BrokenToolCall("call_0", text, "malformed")
    assert read(ids_of(text + "b")) == [Text(text, "answer"), broken, Text("b", "answer")]


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("", {}),
        (" a : 1 , b : [ 1 , 2 ] ", {"a": 1, "b": [1, 2]}),
        ("a:None,b:null", {"a": None, "b": None}),
        ('a:"x\\n}",<|"|>b:c<|"|>:2,"d":3', {"a": "x\n}", "b:c": 2, "d": 3}),
        ("a:{},b:[],c:[[],{}]", {"a": {}, "b": [], "c": [[], {}]}),
        ("a:-0,b:1E+2,c:12345678901234567890", {"a": 0, "b": 100.0, "c": 12345678901234567890}),
        ('a:<|"|><|"|>', {"a": ""}),
        ('a:<|"|>{b:<|tool_call><|channel>,}<|"|>', {"a": "{b:<|tool_call><|channel>,}"}),
        ("a-b.c d:1", {"a-b.c d": 1}),
    ],
)
def test_what_models_write_beside_the_format_is_read_too(inside, expected):
    assert arguments_of(inside) == expected


def test_a_call_that_a_thought_mentions_is_text_of_the_thought():
    text = f"<|channel>thought\nI could {TIMES} it<channel|>so"
    assert merged(read(ids_of(text))) == [
        Text(f"I could {TIMES} it", "thought"),
        Text("so", "answer"),
    ]
    thinking = ids_of("<|turn>model\n<|channel>thought\nhm")
    assert [type(event) for event in merged(read(ids_of(TIMES), prompt=thinking))] == [Text]


def test_stop_strings_are_looked_for_in_text_only_and_nothing_follows_one():
    assert [type(e) for e in read(ids_of(f"a {TIMES}"), stop=["multiply"])] == [Text, ToolCall]
    assert read(ids_of(f"a STOP {TIMES}"), stop=["STOP"]) == [Text("a ", "answer")]
    # What was held back comes before the call, and no stop string goes around it.
    events = merged(read(ids_of(f"a ST{TIMES}OP"), stop=["STOP"]))
    assert [type(event) for event in events] == [Text, ToolCall, Text]
    assert events[0] == Text("a ST", "answer")


def test_calls_are_numbered_on_from_those_in_the_prompt():
    prompt = encode_prompt(TOKENIZER, chat([("f", {}), ("g", {})], as_text=False))
    (event,) = read(ids_of(TIMES), prompt=prompt)
    assert event.id == "call_2"


def test_a_call_that_the_prompt_leaves_open_is_finished_by_the_model():
    prompt = ids_of("<|turn>model\n<|tool_call>call:f{a:")
    assert read(ids_of("1}<tool_call|>b"), prompt=prompt) == [
        ToolCall("call_0", "f", {"a": 1}),
        Text("b", "answer"),
    ]
    broken = BrokenToolCall("call_0", "<|tool_call>call:f{a:1", "incomplete")
    assert read(ids_of("1"), prompt=prompt) == [Text("1", "answer"), broken]
    ended = ids_of("<|turn>model\n<|tool_call>call:f{a:<turn|>\n<|turn>model\n")
    assert read(ids_of("1"), prompt=ended) == [Text("1", "answer")]


def test_an_id_without_text_does_not_break_a_call():
    ids = ids_of(TIMES)
    assert read([*ids[:5], 100_000, *ids[5:]]) == read(ids)


# --- in the prompt ---


def test_calls_in_every_form_are_rendered_alike():
    arguments = {"b": [1, None], "a": "x"}
    function = {"name": "f", "arguments": arguments}
    forms = [
        {"id": "1", "type": "function", "function": function},
        {"type": "function", "function": function | {"arguments": json.dumps(arguments)}},
        function,
        ToolCall("call_0", "f", arguments),
    ]
    prompts = {
        tuple(encode_prompt(TOKENIZER, [{"role": "user", "content": "x"}, message]))
        for message in ({"role": "assistant", "content": "", "tool_calls": [c]} for c in forms)
    }
    assert len(prompts) == 1
    assert '<|tool_call>call:f{a:<|"|>x<|"|>,b:[1,null]}' in TOKENIZER.decode(prompts.pop())


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_no_arguments_are_an_empty_object(arguments):
    ids = encode_prompt(
        TOKENIZER, [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    )
    assert "call:f{}" in TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ("f", "tool_calls must be a list"),
        ([1], "a tool call is an object such as"),
        ([{"function": {"arguments": {}}}], "a tool call is an object such as"),
        (
            [{"name": "f", "arguments": "[1]"}],
            "of f must be an object, or the text of a JSON object",
        ),
        ([{"name": "f", "arguments": "{"}], "of f must be an object"),
        ([{"name": "f", "arguments": '{"a": NaN}'}], "of f must be an object"),
        ([{"name": "f", "arguments": 5}], "of f must be an object"),
    ],
)
def test_a_call_that_is_none_is_refused_in_one_line(calls, said):
    with pytest.raises(PromptError, match=said) as raised:
        encode_prompt(TOKENIZER, [{"role": "assistant", "content": "x", "tool_calls": calls}])
    assert "\n" not in str(raised.value)


def test_tools_in_every_form_are_declared_alike():
    def add(a: int) -> int:
        """Add.

        Args:
            a: a number
        """
        return a

    function = {"name": "add", "description": "Add.", "parameters": {}}
    framed = {"type": "function", "function": function}
    prompts = {
        tuple(encode_prompt(TOKENIZER, "x", options))
        for options in (
            *(PromptOptions(tools=[tool]) for tool in (add, function, framed)),
            PromptOptions(chat_template_config={"tools": [framed]}),
        )
    }
    assert len(prompts) == 1
    assert "<|tool>declaration:add<tool|>" in TOKENIZER.decode(prompts.pop())


@pytest.mark.parametrize("tool", [5, "add", {}, {"function": 5}, {"function": {}}, {"name": 5}])
def test_a_tool_that_is_none_is_refused_in_one_line(tool):
    with pytest.raises(PromptError, match="a tool is a Python function or an object") as raised:
        encode_prompt(TOKENIZER, "x", PromptOptions(tools=[tool]))
    assert "\n" not in str(raised.value)


def test_tools_that_are_no_list_or_given_twice_are_refused():
    with pytest.raises(PromptError, match="tools must be a list, got dict"):
        encode_prompt(TOKENIZER, "x", PromptOptions(tools={"name": "f"}))
    twice = PromptOptions(tools=[{"name": "f"}], chat_template_config={"tools": [{"name": "f"}]})
    with pytest.raises(PromptError, match="given twice"):
        encode_prompt(TOKENIZER, "x", twice)
