"""Tool calls as automata: what they accept is what `language.tools` reads, with valid arguments."""

from itertools import groupby
from random import Random

import pytest

from mlx_diffgemma import bundled_model, load_tokenizer
from mlx_diffgemma.constraint.dfa import NOWHERE, SPECIAL
from mlx_diffgemma.constraint.dialect import validator_of
from mlx_diffgemma.constraint.regex import regex
from mlx_diffgemma.constraint.tool_calls import CallTokens, tool_calls
from mlx_diffgemma.errors import ConstraintError, PromptError
from mlx_diffgemma.events import ToolCall
from mlx_diffgemma.language.controls import special_tokens
from mlx_diffgemma.language.tools import CALL_BEGIN, CALL_END, QUOTE, CallReader
from tests.constraint.schemas import Draws

TOKENIZER = load_tokenizer(bundled_model())
SPECIALS = special_tokens(TOKENIZER)
TOKENS = CallTokens(SPECIALS[CALL_BEGIN], SPECIALS[CALL_END], SPECIALS[QUOTE])
MARKS = {CALL_BEGIN: TOKENS.begin, CALL_END: TOKENS.end, QUOTE: TOKENS.quote}
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "City": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "odd: key": {"type": "boolean"},
            "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
            "tags": {"type": "array", "items": {"type": ["string", "null"]}},
        },
        "required": ["City"],
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def symbols(text):
    """The symbols of a text in which control tokens are spelled."""
    found = []
    while text:
        mark = next((mark for mark in MARKS if text.startswith(mark)), None)
        found.append(SPECIAL + MARKS[mark] if mark else ord(text[0]))
        text = text[len(mark) if mark else 1 :]
    return found


def accepts(automaton, text):
    return automaton.accepts(symbols(text))


def read(drawn):
    """The events of calls, whose texts between control tokens are tokenized by themselves."""
    reader, events = CallReader(TOKENIZER, ()), []
    for is_special, run in groupby(drawn, lambda symbol: symbol >= SPECIAL):
        if is_special:
            ids = [symbol - SPECIAL for symbol in run]
        else:
            ids = TOKENIZER.encode("".join(map(chr, run)), add_special_tokens=False)
        for token in ids:
            if token == TOKENS.begin and not reader.is_open:
                reader.open()
            else:
                events += reader.push(token) or []
    return events


def test_calls_have_the_form_of_the_templates():
    automaton = tool_calls([WEATHER, CLOCK], TOKENS).dfa
    assert accepts(automaton, "<|tool_call>call:clock{}<tool_call|>")
    call = '<|tool_call>call:get_weather{City:<|"|>A "b"\n{<|"|>,days:3,unit:<|"|>celsius<|"|>'
    assert accepts(automaton, call + "}<tool_call|>")
    assert accepts(automaton, call + ",where:{lat:-1.5}}<tool_call|>")
    assert not accepts(automaton, call + ",days:3}<tool_call|>")
    assert not accepts(automaton, call + ",more:1}<tool_call|>")
    assert not accepts(automaton, "<|tool_call>call:get_weather{}<tool_call|>")  # City is required
    assert not accepts(automaton, "<|tool_call>call:other{}<tool_call|>")
    assert not accepts(automaton, "call:clock{}")
    assert not accepts(automaton, '<|tool_call>call:get_weather{City:"x"}<tool_call|>')


def test_keys_come_in_alphabetical_order():
    automaton = tool_calls([WEATHER], TOKENS).dfa
    call = '<|tool_call>call:get_weather{City:<|"|>x<|"|>,%s}<tool_call|>'
    assert accepts(
        automaton, call % 'days:1,<|"|>odd: key<|"|>:true,tags:[],unit:<|"|>celsius<|"|>'
    )
    assert not accepts(automaton, call % 'unit:<|"|>celsius<|"|>,days:1')


def test_a_text_or_calls_where_none_is_required():
    one = "<|tool_call>call:clock{}<tool_call|>"
    free = tool_calls([CLOCK], TOKENS, required=False, most=2).dfa
    for text in ("", "It is late.", one, one * 2, "Let me see." + one):
        assert accepts(free, text)
    assert not accepts(free, one * 3) and not accepts(free, one + "text")
    forced = tool_calls([CLOCK], TOKENS).dfa
    assert not accepts(forced, "") and not accepts(forced, "a" + one)
    assert not accepts(forced, one * 2)
    many = tool_calls([CLOCK, WEATHER], TOKENS, most=None).dfa
    assert accepts(many, one * 7) and not accepts(many, "")


def test_a_text_of_a_form_stands_instead_of_calls_and_not_before_them():
    one = "<|tool_call>call:clock{}<tool_call|>"
    either = tool_calls([CLOCK], TOKENS, required=False, most=2, answer=regex("[0-9]+")).dfa
    for text in ("12", one, one * 2):
        assert accepts(either, text)
    for text in ("", "It is late.", "12" + one, one + "12", one * 3):
        assert not accepts(either, text)


def test_drawn_calls_are_read_with_valid_arguments():
    draws, rng = Draws(tool_calls([WEATHER, CLOCK], TOKENS, most=None).dfa), Random(3)
    validators = {"get_weather": validator_of(WEATHER["parameters"]), "clock": validator_of(True)}
    names = set()
    for _ in range(150):
        drawn = draws.symbols(rng)
        calls = read(drawn)
        assert calls and all(isinstance(call, ToolCall) for call in calls), drawn
        for call in calls:
            names.add(call.name)
            assert validators[call.name].is_valid(call.arguments), call
    assert names == {"get_weather", "clock"}


def test_refusals_name_the_tool():
    wrong = {"name": "f", "parameters": {"properties": {"a": {"pattern": r"\b"}}}}
    with pytest.raises(ConstraintError, match="tool f: JSON Schema, pattern") as caught:
        tool_calls([wrong], TOKENS)
    assert caught.value.pointer == "/properties/a" and caught.value.keyword == "pattern"
    with pytest.raises(ConstraintError, match="two tools"):
        tool_calls([CLOCK, CLOCK], TOKENS)
    with pytest.raises(ConstraintError, match="one tool"):
        tool_calls([], TOKENS)
    with pytest.raises(ConstraintError, match="no spaces"):
        tool_calls([{"name": "a b"}], TOKENS)
    with pytest.raises(PromptError):
        tool_calls([{"nothing": 1}], TOKENS)


def test_what_is_cut_in_a_tool_is_noted():
    tool = {"name": "f", "parameters": {"properties": {"a": {}}}}
    assert tool_calls([tool], TOKENS).notes[0].startswith("f: values of any type")


def test_numbers_are_read_as_finite_ones_and_written_again():
    def tool(**schema):
        parameters = {"type": "object", "properties": {"n": schema}, "required": ["n"]}
        return {"name": "put", "parameters": parameters}

    def accepts(number, **schema):
        dfa, state = tool_calls([tool(**schema)], TOKENS).dfa, 0
        symbols = [SPECIAL + TOKENS.begin, *map(ord, f"call:put{{n:{number}}}")]
        for symbol in [*symbols, SPECIAL + TOKENS.end]:
            if (state := dfa.step(state, symbol)) == NOWHERE:
                return False
        return bool(dfa.accepting[state])

    assert accepts(2**64, type="integer") and accepts(-(2**63), type="number")
    assert accepts(f"{2**64}.{'1' * 999}", type="number")
    assert not accepts("9" * 21, type="integer") and not accepts("9" * 21 + ".5", type="number")
    assert accepts(10**30, type="integer", minimum=10**29)
    assert not accepts(10**40, type="integer", minimum=10**29)
    assert not accepts("1e9", type="number")
