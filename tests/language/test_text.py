"""Text from ids: nothing shown twice, late, half or under the wrong heading."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import bundled_model, load_tokenizer
from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.events import StepDone, Text
from mlx_diffgemma.language.controls import special_tokens
from mlx_diffgemma.language.stops import Stops, stop_strings
from mlx_diffgemma.language.text import TextStream, draft_pieces

TOKENIZER = load_tokenizer(bundled_model())
SPECIALS = special_tokens(TOKENIZER)
BEGIN, END = SPECIALS["<|channel>"], SPECIALS["<channel|>"]
EOS = (SPECIALS["<eos>"], SPECIALS["<turn|>"])
SHOWN = ("<|tool_call>", "<tool_call|>", '<|"|>')


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def byte(value: int) -> int:
    return TOKENIZER.convert_tokens_to_ids(f"<0x{value:02X}>")


def run(*pushes, prompt=()) -> list[Text]:
    """The text; test_tools.py looks at the calls."""
    stream = TextStream(TOKENIZER, EOS, prompt)
    events = [event for ids in pushes for event in stream.push(ids)] + stream.finish()
    return [event for event in events if isinstance(event, Text)]


def joined(pieces: list[Text], channel: str) -> str:
    return "".join(piece.piece for piece in pieces if piece.channel == channel)


def channels(*pushes, prompt=()) -> tuple[str, str]:
    pieces = run(*pushes, prompt=prompt)
    assert all(piece.piece for piece in pieces), "an empty piece is no piece"
    return joined(pieces, "thought"), joined(pieces, "answer")


# --- pieces ---


def test_pieces_come_as_soon_as_they_are_final_and_join_to_the_whole():
    stream = TextStream(TOKENIZER, EOS)
    assert stream.push(ids_of("Hello ")) == [Text("Hello ", "answer")]
    assert stream.push(ids_of("wor")) == [Text("wor", "answer")]
    assert stream.push([]) == []
    assert stream.push(ids_of("ld")) == [Text("ld", "answer")]
    assert stream.finish() == [] == stream.finish()


@pytest.mark.parametrize("text", ["é", "日本", "🙂", "a🙂b", "👩‍👩‍👧"])
def test_a_character_split_over_pushes_is_shown_whole(text):
    ids = ids_of(text)
    assert len(ids) > len(text), "the bundled tokenizer spells these as bytes"
    for cut in range(len(ids) + 1):
        assert channels(ids[:cut], ids[cut:]) == ("", text)
    assert channels(*[[token] for token in ids]) == ("", text)


def test_a_half_character_is_held_back_until_the_rest_or_the_end_comes():
    stream = TextStream(TOKENIZER, EOS)
    assert stream.push([*ids_of("a"), byte(0xC3)]) == [Text("a", "answer")]
    assert stream.push([byte(0xA9), *ids_of("b")]) == [Text("éb", "answer")]
    assert stream.push([byte(0xF0), byte(0x9F)]) == []
    assert stream.finish() == [Text("\ufffd\ufffd", "answer")]


@pytest.mark.parametrize(
    "bytes_",
    [[0xFF], [0x80], [0xC3, 0x28], [0xE2, 0x82], [0xED, 0xA0, 0x80], [0xF0, 0x9F, 0x99]],
)
def test_invalid_bytes_are_shown_as_a_decoder_shows_them_and_stop_nothing(bytes_):
    ids = [*ids_of("a"), *map(byte, bytes_), *ids_of("b")]
    expected = TOKENIZER.decode(ids)
    assert "\ufffd" in expected and expected[0] == "a" and expected[-1] == "b"
    assert channels(*[[token] for token in ids]) == ("", expected)
    assert channels(ids) == ("", expected)


# Weighted towards bytes, markers and line breaks; all ids of the model, also those that the
# tokenizer has no text for.
ORDINARY = st.one_of(
    st.integers(24, 400),
    st.integers(0, 255).map(byte),
    st.sampled_from([byte(b) for b in "é🙂日".encode()]),
)
TOKENS = st.one_of(
    ORDINARY,
    st.sampled_from([BEGIN, END, *ids_of("\n a")]),
    st.sampled_from([token for token in SPECIALS.values() if token not in EOS]),
)
SPLITS = st.lists(st.lists(TOKENS, max_size=8), max_size=6)


@settings(max_examples=150, deadline=None)
@given(SPLITS)
def test_however_ids_are_split_the_same_text_comes_out(pushes):
    whole = [token for ids in pushes for token in ids]
    assert channels(*pushes) == channels(whole) == channels(*[[token] for token in whole])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(ORDINARY, max_size=8), max_size=6))
def test_without_control_tokens_the_pieces_are_the_tokenizers_own_text(pushes):
    whole = [token for ids in pushes for token in ids]
    assert channels(*pushes) == ("", TOKENIZER.decode(whole))


@settings(max_examples=100, deadline=None)
@given(SPLITS)
def test_what_was_shown_is_the_beginning_of_what_is_shown_in_the_end(pushes):
    stream, shown = TextStream(TOKENIZER, EOS), {"answer": "", "thought": ""}
    whole = run([token for ids in pushes for token in ids])
    for ids in pushes:
        for piece in stream.push(ids):
            if isinstance(piece, Text):
                shown[piece.channel] += piece.piece
    for channel, text in shown.items():
        assert joined(whole, channel).startswith(text)


# --- channels ---


def test_thought_and_answer_are_told_apart_and_the_name_is_not_shown():
    ids = [BEGIN, *ids_of("thought\nhm\nhm"), END, *ids_of("so\n")]
    assert run(ids) == [Text("hm\nhm", "thought"), Text("so\n", "answer")]


def test_a_name_split_over_pushes_is_not_shown():
    assert channels([BEGIN], ids_of("tho"), ids_of("ught"), ids_of("\nhm"), [END]) == ("hm", "")
    assert channels([BEGIN, *ids_of("thought")], ids_of("\n"), ids_of("hm")) == ("hm", "")


@pytest.mark.parametrize("name", ["", "thought", "thought\n"])
def test_an_empty_thought_shows_nothing(name):
    assert channels([BEGIN, *ids_of(name), END, *ids_of("so")]) == ("", "so")


OTHERS = ["final\nHi", "final", "\n", "thoughtful\nHi", "thoughts\n", "thought hm\n", "thought \n"]
OTHERS += [" thought\nHi", "\nthought\nHi", "Thought\nHi", "thou", "th\nought\n", "Hi", "é\n"]


@pytest.mark.parametrize("text", OTHERS)
def test_text_of_a_channel_that_is_not_called_thought_is_part_of_the_answer(text):
    ids = [*ids_of("a"), BEGIN, *ids_of(text), END, *ids_of("b")]
    for cut in range(len(ids) + 1):
        assert channels(ids[:cut], ids[cut:]) == ("", f"a{text}b")
    assert channels(*[[token] for token in ids]) == ("", f"a{text}b")
    assert channels([BEGIN, *ids_of(text), EOS[1]]) == ("", text)
    assert channels([BEGIN, *ids_of(text)]) == ("", text)


def test_text_of_another_channel_comes_as_soon_as_its_name_is_another():
    stream = TextStream(TOKENIZER, EOS)
    assert stream.push([BEGIN, *ids_of("thou")]) == []
    assert stream.push(ids_of("s")) == [Text("thous", "answer")]
    assert stream.push(ids_of("and")) == [Text("and", "answer")]
    assert stream.push([BEGIN, *ids_of("thought")]) == []
    assert stream.push(ids_of("\nhm")) == [Text("hm", "thought")]


@pytest.mark.parametrize(
    ("tail", "rest", "expected"),
    [("final\nH", "i", ("", "i")), ("thou", "sand", ("", "sand")), ("thought", "s\n", ("", "s\n"))],
)
def test_another_channel_that_the_prompt_leaves_open_is_the_answer(tail, rest, expected):
    assert channels(ids_of(rest), prompt=[2, BEGIN, *ids_of(tail)]) == expected


# Transformers' template for the answers of this family, without its tool calls.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {
            "open": "<|channel>thought\n",
            "close": "<channel|>",
            "content": "text",
        },
        "content": {"close": ["<turn|>", "<eos>"], "content": "text"},
    },
}
NAMES = ["thought", "thought\n", "thou", "ght\n", "\n", " ", "thoughtful\n", "final\n", "Hi", "x"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(NAMES), max_size=4), st.lists(st.sampled_from(NAMES), max_size=3))
def test_a_thought_is_what_transformers_takes_for_one(inside, behind):
    text = f"<|channel>{''.join(inside)}"
    if "".join(inside) != "thought":  # an empty thought, for us
        whole = f"{text}<channel|>{''.join(behind)}<turn|>"
        parsed = TOKENIZER.parse_response(whole, RESPONSE, prefix="")
        content = parsed.get("content", "")
        for marker in ("<|channel>", "<channel|>"):
            content = content.replace(marker, "")
        thought, answer = channels(ids_of(text), [END, *ids_of("".join(behind)), EOS[1]])
        assert thought.strip() == parsed.get("reasoning_content", "").strip()
        assert answer.strip() == content.strip()


def test_text_before_a_thought_and_several_thoughts_keep_their_order():
    ids = ids_of("a<|channel>thought\nb<channel|>c<|channel>thought\nd<channel|>")
    assert [(p.piece, p.channel) for p in run(ids)] == [
        ("a", "answer"),
        ("b", "thought"),
        ("c", "answer"),
        ("d", "thought"),
    ]


def test_a_thought_that_never_closes_is_shown_as_a_thought():
    assert channels([BEGIN, *ids_of("thought\nhm")]) == ("hm", "")


def test_a_closing_marker_alone_is_not_shown():
    assert channels([*ids_of("a"), END, *ids_of("b")]) == ("", "ab")


def test_half_a_character_does_not_leak_into_the_next_channel():
    thought, answer = channels([BEGIN, *ids_of("thought\n"), byte(0xC3)], [END, byte(0xA9)])
    assert (thought, answer) == ("\ufffd", "\ufffd")


@pytest.mark.parametrize("tail", ["", "thought\n", "thought\nalready"])
def test_a_thought_that_the_prompt_leaves_open_goes_on(tail):
    prompt = [2, *ids_of("x\n"), BEGIN, *ids_of(tail)]
    begins = "" if "\n" in tail else "thought\n"
    ids = [*ids_of(begins + "hm"), END, *ids_of("so")]
    assert channels(ids, prompt=prompt) == ("hm", "so")


def test_a_name_that_the_prompt_breaks_off_is_finished_by_the_answer():
    prompt = [BEGIN, *ids_of("thou")]
    assert channels(ids_of("ght\nhm"), prompt=prompt) == ("hm", "")


def test_a_thought_that_the_prompt_closes_is_over():
    prompt = [BEGIN, *ids_of("thought\n"), END]
    assert channels(ids_of("so"), prompt=prompt) == ("", "so")


def test_the_prompts_own_text_is_not_shown():
    assert channels(ids_of("so"), prompt=ids_of("question")) == ("", "so")


# --- stop strings ---


def stopped(*pushes, stop) -> tuple[str, bool]:
    stream = TextStream(TOKENIZER, EOS, stop=stop)
    pieces = [piece for ids in pushes for piece in stream.push(ids)] + stream.finish()
    return joined(pieces, "answer"), stream.is_stopped


def test_what_may_become_a_stop_string_is_held_back_until_it_is_none():
    stream = TextStream(TOKENIZER, EOS, stop=["STOP", "\n\n"])
    assert stream.push(ids_of("one\n")) == [Text("one", "answer")]
    assert stream.push(ids_of("two ST")) == [Text("\ntwo ", "answer")]
    assert stream.push(ids_of("ART ")) == [Text("START ", "answer")]
    assert stream.push(ids_of("STO")) == [] and not stream.is_stopped
    assert stream.push(ids_of("P and")) == [] and stream.is_stopped
    assert stream.push(ids_of("more")) == [] == stream.finish()


def test_what_was_held_back_is_shown_where_the_answer_ends_before():
    assert stopped(ids_of("a ST"), stop=["STOP"]) == ("a ST", False)
    assert stopped([*ids_of("a ST"), EOS[1]], ids_of("OP"), stop=["STOP"]) == ("a ST", False)


def test_a_stop_string_in_a_thought_is_none_and_one_around_a_thought_is_one():
    ids = ids_of("<|channel>thought\nSTOP<channel|>so")
    assert stopped(ids, stop=["STOP"]) == ("so", False)
    ids = ids_of("a ST<|channel>thought\nhm<channel|>OP b")
    assert stopped(ids, stop=["STOP"]) == ("a ", True)


def test_a_stop_string_of_characters_made_of_bytes_is_found():
    ids = ids_of("a 🙂é b")
    assert stopped(*[[token] for token in ids], stop=["é"]) == ("a 🙂", True)


LETTERS = st.text("abc", max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(LETTERS, max_size=5), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_answer_ends_before_the_stop_string_that_is_complete_first(pieces, strings):
    stops, whole = Stops(strings), "".join(pieces)
    ends = [n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(strings))]
    expected = whole
    if ends:
        expected = min((whole[: ends[0]].removesuffix(string) for string in strings), key=len)
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        assert expected.startswith(shown)
    assert shown + stops.finish() == expected
    assert (stops.found is not None) == bool(ends)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "", [1], 5, b"abc", {"a": 1}, {"a"}])
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(PromptError, match="stop"):
        stop_strings(stop)


def test_a_string_alone_is_one_stop_string():
    assert stop_strings("abc") == ("abc",) and stop_strings(["a", "b"]) == ("a", "b")
    assert stop_strings(()) == ()


# --- control tokens ---


@pytest.mark.parametrize("name", [name for name, t in SPECIALS.items() if t not in EOS])
def test_control_tokens_are_hidden_except_those_of_tool_calls(name):
    text = TOKENIZER.decode([SPECIALS[name]])
    _, answer = channels([*ids_of("a"), SPECIALS[name]], [END, *ids_of("b")])
    assert answer == ("a" + text * (name in SHOWN) + "b")


@pytest.mark.parametrize("end", EOS)
def test_an_end_token_ends_and_is_not_shown(end):
    assert channels([*ids_of("a"), end, *ids_of("b")], ids_of("c")) == ("", "a")


def test_an_end_token_lets_go_of_what_was_held_back():
    stream = TextStream(TOKENIZER, EOS)
    assert stream.push([byte(0xC3), EOS[0]]) == [Text("\ufffd", "answer")]
    assert stream.push(ids_of("b")) == [] == stream.finish()


def test_an_id_that_the_tokenizer_does_not_know_is_no_text():
    assert channels([*ids_of("a"), 100_000, *ids_of("b")]) == ("", "ab")


# --- drafts ---


def test_a_draft_ends_at_its_first_end_token_and_hides_markers():
    ids = [BEGIN, *ids_of("ab"), EOS[1], *ids_of("c")]
    accepted = [i % 2 == 0 for i in range(len(ids))]
    zeros = mx.zeros((1, len(ids)))
    event = StepDone(0, 0, mx.array([ids]), mx.array([accepted]), zeros, zeros)
    assert draft_pieces(TOKENIZER, event, EOS) == [("a", False), ("b", True)]


def test_channels_of_successive_pieces_of_one_push_alternate():
    pieces = run(ids_of("a<|channel>thought\nb<channel|>c"))
    assert all(first.channel != second.channel for first, second in pairwise(pieces))
